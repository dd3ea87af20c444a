"""Reads `spm.model`, the file of a sentencepiece model, without the sentencepiece package.

The file is a protobuf message, described in
https://github.com/google/sentencepiece/blob/master/src/sentencepiece_model.proto. minipref needs three of its fields:

    pieces            text, score (a log probability) and type of each piece; the id of a piece is its position
    trainer_spec      to check that this is a Unigram model
    normalizer_spec   two switches for spaces, and the character map: a trie of rules such as 'ﬁ' -> 'fi'
"""

import math
import re
import struct
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np

from minipref.runtime import short_repr

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)   # sentencepiece's numbers for the types of pieces
BYTE_PIECES = {f"<0x{byte:02X}>": byte for byte in range(256)}
MODEL_TYPES = {1: "Unigram", 2: "BPE", 3: "word", 4: "character"}

# Limits for hostile files. The comments give the values of v3.
MAX_PIECES = 1 << 20          # 128,000
MAX_PIECE_LENGTH = 128        # characters; 32
MAX_PIECES_BYTES = 3 << 20    # all pieces together, in UTF-8; 1,074,318
MAX_TRIE_BYTES = 2 << 20      # 177,152
MAX_TRIE_STEPS = 1 << 20      # 262,072
MAX_RULE_BYTES = 128          # either side of a rule of the character map


@dataclass
class Vocabulary:
    """The content of a tokenizer file of either format. Entry i of the three lists belongs to id i."""

    pieces: list[str]
    scores: list[float]                            # log probabilities of the pieces of type NORMAL
    types: list[int]                               # NORMAL .. BYTE
    normalizers: list[Callable[[str], str]]        # applied in this order
    remove_extra_whitespaces: bool                 # strip spaces, and collapse runs of them
    add_dummy_prefix: bool                         # put a space in front of the text
    added_tokens: list[dict] = field(default_factory=list)   # of tokenizer.json, as dicts

    def check(self) -> None:
        """Errors: ValueError for a vocabulary that sentencepiece would not load, or of absurd size."""
        for id, (piece, score, type) in enumerate(zip(self.pieces, self.scores, self.types)):
            if not 0 < len(piece) <= MAX_PIECE_LENGTH:
                raise ValueError(f"piece {id} has {len(piece):,} characters")
            if not -math.inf < score <= 0.0:
                raise ValueError(f"the score of piece {id} is {score}, not a log probability")
            if type not in (NORMAL, UNKNOWN, CONTROL, UNUSED, BYTE):
                raise ValueError(f"piece {id}, {short_repr(piece)}, is of type {type}, which no piece of v3 is")
        if self.types.count(UNKNOWN) != 1:
            raise ValueError(f"{self.types.count(UNKNOWN)} unknown pieces instead of one")
        if NORMAL not in self.types:
            raise ValueError("no piece for text")
        if (size := len("".join(self.pieces).encode())) > MAX_PIECES_BYTES:   # encode() raises for surrogates
            raise ValueError(f"pieces of {size:,} bytes together")
        [(piece, count)] = Counter(self.pieces).most_common(1)
        if count > 1:
            raise ValueError(f"{count} pieces are {short_repr(piece)}")
        byte_pieces = {piece for piece, type in zip(self.pieces, self.types) if type == BYTE}
        if byte_pieces and byte_pieces != BYTE_PIECES.keys():
            raise ValueError(f"{len(byte_pieces)} byte pieces that are not <0x00> to <0xFF>")


VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5   # protobuf's wire types
# The keys of the fields in use: field number << 3 | wire type
PIECE, TRAINER, NORMALIZER = 1 << 3 | BYTES, 2 << 3 | BYTES, 3 << 3 | BYTES
TEXT, SCORE, TYPE = 1 << 3 | BYTES, 2 << 3 | FIXED32, 3 << 3 | VARINT                         # in PIECE
MODEL_TYPE, TREAT_WHITESPACE_AS_SUFFIX = 3 << 3 | VARINT, 24 << 3 | VARINT                    # in TRAINER
CHARSMAP, ADD_DUMMY_PREFIX = 2 << 3 | BYTES, 3 << 3 | VARINT                                  # in NORMALIZER
REMOVE_EXTRA_WHITESPACES, ESCAPE_WHITESPACES = 4 << 3 | VARINT, 5 << 3 | VARINT               # in NORMALIZER


def read_sentencepiece_model(data: bytes) -> Vocabulary:
    """The vocabulary in the bytes of an spm.model. Errors: ValueError."""
    pieces, scores, types, trainer, normalizer, found = [], [], [], {}, {}, set()
    for key, value in read_fields(data):
        found.add(key)
        if key == PIECE:
            piece = dict(read_fields(value))
            pieces.append(piece.get(TEXT, b"").decode())
            scores.append(struct.unpack("<f", piece.get(SCORE, bytes(4)))[0])
            types.append(piece.get(TYPE, NORMAL))
            if len(pieces) > MAX_PIECES:
                raise ValueError(f"more than {MAX_PIECES:,} pieces")
        elif key == TRAINER:
            trainer.update(read_fields(value))
        elif key == NORMALIZER:
            normalizer.update(read_fields(value))
    # In protobuf, a file that is cut off between two fields is a valid smaller message.
    if not found >= {PIECE, TRAINER, NORMALIZER}:
        raise ValueError("damaged or cut off: it lacks its pieces, its trainer_spec or its normalizer_spec")

    if (model_type := trainer.get(MODEL_TYPE, 1)) != 1:
        raise ValueError(f"a model of type {MODEL_TYPES.get(model_type, model_type)}")
    if trainer.get(TREAT_WHITESPACE_AS_SUFFIX) or not normalizer.get(ESCAPE_WHITESPACES, True):
        raise ValueError("a model with treat_whitespace_as_suffix or without escape_whitespaces")
    return Vocabulary(
        pieces, scores, types,
        normalizers=[CharacterMap(normalizer[CHARSMAP])] if normalizer.get(CHARSMAP) else [],
        remove_extra_whitespaces=bool(normalizer.get(REMOVE_EXTRA_WHITESPACES, True)),
        add_dummy_prefix=bool(normalizer.get(ADD_DUMMY_PREFIX, True)))


def read_fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(key, value) for each field of a protobuf message. Errors: ValueError."""
    at = 0
    while at < len(message):
        key, at = _read_varint(message, at)
        wire_type = key & 7
        if wire_type == VARINT:
            value, at = _read_varint(message, at)
        else:
            if wire_type == BYTES:
                length, at = _read_varint(message, at)
            elif wire_type in (FIXED32, FIXED64):
                length = 4 if wire_type == FIXED32 else 8
            else:
                raise ValueError(f"damaged: a field of wire type {wire_type}")
            if length > len(message) - at:
                raise ValueError(f"damaged or cut off: a field of {length:,} bytes with {len(message) - at:,} left")
            value, at = message[at:at + length], at + length
        yield key, value


def _read_varint(message: bytes, at: int) -> tuple[int, int]:
    """The number at position `at`, seven bits a byte, lowest first, and the position after it."""
    number = 0
    for shift in range(0, 70, 7):
        if at >= len(message):
            raise ValueError("damaged or cut off: it ends within a number")
        byte, at = message[at], at + 1
        number |= (byte & 0x7F) << shift
        if byte < 0x80:
            return number, at
    raise ValueError("damaged: a number of more than ten bytes")


class CharacterMap:
    """sentencepiece's `precompiled_charsmap`: at each position of a text it applies the longest rule that matches.

    `rules` maps source to target: 224,711 rules with sources of one to four characters for v3's nmt_nfkc. A character
    without a rule stays as it is.
    """

    def __init__(self, data: bytes):
        """Errors: ValueError."""
        self.rules = _read_rules(data)
        self._longest = max(map(len, self.rules), default=0)
        self._single = str.maketrans({source: target for source, target in self.rules.items() if len(source) == 1})
        # A rule of several characters needs one of these after the first. Most are combining marks, so few texts
        # contain any.
        later = sorted({character for source in self.rules for character in source[1:]})
        self._later = re.compile(f"[{''.join(map(re.escape, later))}]" if later else "(?!)")   # (?!) never matches

    def __call__(self, text: str) -> str:
        return "".join(self._longest_matches(text)) if self._later.search(text) else text.translate(self._single)

    def _longest_matches(self, text: str) -> Iterator[str]:
        at = 0
        while at < len(text):
            for length in range(self._longest, 0, -1):
                if (target := self.rules.get(text[at:at + length])) is not None:
                    break
            else:
                target = text[at]
            yield target
            at += length


def _read_rules(data: bytes) -> dict[str, str]:
    """The rules of a precompiled_charsmap: four bytes with the size of a trie, the trie, and the zero-terminated
    targets. Errors: ValueError.

    The trie is a double array (Darts-clone) over the UTF-8 bytes of the sources, in units of 32 bits:
    - the child of a node for byte b is the unit at `base ^ b`, if the label of that unit is b;
    - the base of a unit is its own position ^ its offset;
    - if a source ends at a unit, its leaf bit is set, and the unit at its base holds the position of the target.

    Nodes may share children, so a damaged trie may have cycles. Limits for the length of a source and the number of
    steps end the traversal.
    """
    size = int.from_bytes(data[:4], "little")
    if size % 4 or not 0 < size <= min(len(data) - 4, MAX_TRIE_BYTES):
        raise ValueError(f"damaged: a character map of {len(data):,} bytes with a trie of {size:,}")
    units, targets = np.frombuffer(data, "<u4", size // 4, offset=4).tolist(), data[4 + size:]
    children = defaultdict(list)   # base -> positions of the units that could be its children
    for position, unit in enumerate(units):
        if label := unit & 0x8000_00FF:   # the highest bit marks a unit that holds the position of a target
            children[position ^ label].append(position)

    rules, steps, stack = {}, 0, [(_offset(units[0]), b"")]
    while stack:
        base, prefix = stack.pop()
        for position in children.get(base, ()):
            unit, steps = units[position], steps + 1
            source, child_base = prefix + bytes([unit & 0xFF]), position ^ _offset(unit)
            if steps > MAX_TRIE_STEPS or len(source) > MAX_RULE_BYTES or child_base >= len(units):
                raise ValueError("damaged: the character map is not a valid trie")
            if unit & 0x100:   # the leaf bit
                start = units[child_base] & 0x7FFF_FFFF
                end = targets.find(b"\0", start, start + MAX_RULE_BYTES)
                if end < 0:
                    raise ValueError(f"damaged: no target starts at byte {start:,} of the character map")
                rules[source.decode()] = targets[start:end].decode()
            stack.append((child_base, source))
    return rules


def _offset(unit: int) -> int:
    return unit >> 10 << (unit >> 6 & 8)
