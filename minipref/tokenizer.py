"""Text to ids: sentencepiece's own, from `spm.model` or `tokenizer.json`, without sentencepiece.

DeBERTa-v3 reads text through a sentencepiece Unigram model of 128,000 pieces, and its weights know only the ids that
sentencepiece gives. From a text to those ids there are four steps:

    1. normalise: NFKC and some more, by a table inside spm.model
    2. spell: put a space in front, collapse runs of spaces, write each space as '▁'
    3. cut into pieces: of all ways to do it, the one with the highest sum of scores
    4. what no piece covers becomes its UTF-8 bytes, one of the pieces <0x00> .. <0xFF> each

Step 3 is the `tokenizers` library's Unigram model. Its usual pipeline for the rest (Precompiled, Strip, Replace,
Metaspace, byte_fallback) is right on ordinary text and wrong in two ways, which is why the rest is done here:

- *Text can become special.* The library does not know which pieces are for text. '[SEP]' typed by a user comes out as
  the id that ends a field, '<0x41>' as the byte A. Here all pieces but those for text get a name with a space in it
  before the library sees them. Spelled text has no spaces, so nothing can match. The library's byte fallback
  looks bytes up by name, so it is off, and the spans that come back unknown are turned into bytes here.
- *The table is read differently.* sentencepiece applies, at each position, the longest rule that fits. The library
  goes from grapheme to grapheme: one rule for the whole of it, or else one per character. Decomposed accents,
  kana and Hangul, and stacked combining marks come out differently. `Charsmap` does as sentencepiece does.

Pieces of v3 hold a '▁' at their start or not at all, so a text can be cut before each '▁' and every word on its own;
a table of the words seen so far then saves most of the work.

What still differs: sentencepiece sums scores in float32 from the start of the text, so where two ways to cut a word
differ by less than its rounding, it picks either ('BBBBB' is 'BB' 'BBB' or 'BBB' 'BB'); here the sum within the word
decides. The rounding grows with the text. Past `LONG` characters, where ways that are not equal would be
confused too, the text is read by `Tokenizer._best_path`, which is sentencepiece's own procedure to the last bit.
"""

import base64
import hashlib
import json
import math
import os
import re
import struct
import unicodedata
from array import array
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, Regex, decoders, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as LibraryTokenizer
from tokenizers.models import Unigram
from tokenizers.trainers import UnigramTrainer

from minipref.errors import InputError, shown
from minipref.files import replacing

SPACE = "▁"   # U+2581, how sentencepiece writes a space
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)   # sentencepiece's numbers for the kinds of pieces
BYTE_PIECES = {f"<0x{byte:02X}>": byte for byte in range(256)}
SPECIALS = {"pad": ("[PAD]", "<pad>"), "cls": ("[CLS]", "<s>"), "sep": ("[SEP]", "</s>"), "mask": ("[MASK]", "<mask>")}
SPARE = 1.15             # times the pieces wanted are trained: those that join letters with signs can be left out then
UNKNOWN_PENALTY = 10.0   # sentencepiece: an unknown character scores this much below the lowest piece

SPACES = re.compile(" {2,}")
SURROGATE = re.compile("[\ud800-\udfff]")
SURROGATE_PAIR = re.compile("[\ud800-\udbff][\udc00-\udfff]")

REBASE = 100_000.0         # the sum at which sentencepiece starts from 0 again
LONG = 8192                # characters from which a text is read as sentencepiece does, float32 sums and all
TEXTS_AT_ONCE = 1024       # texts of a batch that are spelled and cut before the new words among them are looked up
CHARACTERS_KEPT = 1 << 20  # total length of the words whose ids are remembered

# No honest file comes near these; one that passes them is refused before it costs memory or time.
MAX_FILE_BYTES = {"spm.model": 8 << 20, "tokenizer.json": 32 << 20}
MAX_PIECES = 1 << 20
MAX_PIECE_LENGTH = 128     # characters
MAX_TOTAL_LENGTH = 2 << 20 # characters of all pieces; v3 has 871,140
MAX_ADDED_IDS = 1 << 16    # ids past the last piece
MAX_TRIE_BYTES = 2 << 20   # of the character map; v3's has 177,152
MAX_TRIE_STEPS = 1 << 20   # v3's takes 262,072
MAX_RULE_BYTES = 128       # of either side of one of its rules


@dataclass(frozen=True)
class Vocabulary:
    """What a tokenizer's file says, whichever file it was. The id of a piece is its place in the three lists."""

    pieces: list[str]
    scores: list[float]               # log probabilities; they matter where the kind is NORMAL
    kinds: list[int]                  # NORMAL .. BYTE
    added: list[str]                  # names of the ids after the pieces
    normalize: Callable[[str], str]   # step 1
    space_in_front: bool              # sentencepiece's add_dummy_prefix
    collapse_spaces: bool             # sentencepiece's remove_extra_whitespaces


def load_tokenizer(folder: str | Path) -> "Tokenizer":
    """The tokenizer of a folder: from its `spm.model`, or from its `tokenizer.json` if it has no spm.model.

    A tokenizer.json means what it says, except where the library's reading of it differs from sentencepiece's (above).
    One that transformers 5 made from a DeBERTa vocabulary has lost the character map, and its ids are not quite v3's.

    Errors: InputError that names the file, if there is neither, or if it cannot be read, is damaged, or is not a
    Unigram model. A damaged spm.model is not passed over for a tokenizer.json beside it.
    """
    folder = Path(folder)
    for name in READERS:
        if os.path.lexists(folder / name):
            data = _read_file(folder / name)
            try:
                return Tokenizer(name, data)
            except (ValueError, OverflowError, RecursionError) as problem:
                raise InputError(file=folder / name, found=str(problem),
                                 expected=f"the {name} of a Unigram model") from None
    raise InputError(file=folder, found="no tokenizer here" if folder.is_dir() else "not a folder",
                     expected="a folder with spm.model or tokenizer.json")


def _read_file(path: Path) -> bytes:
    limit = MAX_FILE_BYTES[path.name]
    try:
        if not path.is_file():   # a folder, or a pipe that would keep us waiting
            raise InputError(file=path, found="not a file")
        with path.open("rb") as file:
            data = file.read(limit + 1)
    except OSError as problem:
        raise InputError(file=path, found=f"cannot be read: {problem.strerror}") from None
    if len(data) > limit:
        raise InputError(file=path, found=f"more than {limit:,} bytes", expected="a tokenizer")
    return data


class Tokenizer:
    """Text to ids and back, for one vocabulary. `load_tokenizer` and `train_vocabulary` make it.

    `pad_id`, `cls_id`, `sep_id`, `unk_id`, `mask_id` are for the caller to place: no text encodes to them (except to
    `unk_id`, in a vocabulary without byte pieces). A special token that the file lacks has the next id after the file's
    own: for v3 that is [MASK], 128000. `vocab_size` counts all ids, those included.
    `fingerprint` is the sha256 of the file, in hex.
    `replaced_surrogates` counts the texts given to `encode` or `encode_batch` so far (one given twice counts twice)
    that held a lone surrogate, which is half of a UTF-16 pair and not a character; each was read as U+FFFD. A high half
    followed by a low one is read as the character that they stand for, and does not count.
    """

    def __init__(self, name: str, data: bytes):
        """`data`: the bytes of a file named `name`. Errors: ValueError that says what is wrong with them."""
        self._name, self._data = name, data
        self._vocabulary = vocabulary = READERS[name](data)
        _check(vocabulary)
        self.fingerprint = hashlib.sha256(data).hexdigest()
        self._names = vocabulary.pieces + vocabulary.added
        self._kinds = vocabulary.kinds + [CONTROL] * len(vocabulary.added)
        not_for_text = {piece: id for id, piece in enumerate(self._names) if self._kinds[id] in (CONTROL, BYTE)}
        self._byte_ids = [not_for_text[piece] for piece in BYTE_PIECES] if BYTE in self._kinds else []
        self.unk_id = self._kinds.index(UNKNOWN)
        self.pad_id, self.cls_id, self.sep_id, self.mask_id = (
            self._special_id(not_for_text, *spellings) for spellings in SPECIALS.values())
        self.vocab_size = len(self._names)
        self.replaced_surrogates = 0

        self._for_text = {piece: id for id, piece in enumerate(vocabulary.pieces) if vocabulary.kinds[id] == NORMAL}
        lowest = np.float32(min(vocabulary.scores[id] for id in self._for_text.values()))
        self._unknown_score = float(lowest - np.float32(UNKNOWN_PENALTY))
        self._words_stand_alone = not any(SPACE in piece[1:] for piece in self._for_text)
        self._unigram = Unigram(_as_the_library_may_see(vocabulary), self.unk_id, byte_fallback=False)
        self._ids_of: dict[str, tuple[int, ...]] = {}   # of the words seen so far
        self._characters_kept = 0
        self._starts: dict[str, int] = {}               # for `_best_path`; filled when it is first needed

    def __reduce__(self):
        return Tokenizer, (self._name, self._data)

    def _special_id(self, not_for_text: dict[str, int], name: str, other_name: str) -> int:
        for spelling in (name, other_name):
            if spelling in not_for_text:
                return not_for_text[spelling]
        self._names.append(name)
        self._kinds.append(CONTROL)
        return len(self._names) - 1

    def encode(self, text: str) -> list[int]:
        """The ids of a text, no special tokens added; none for an empty text or for one of spaces only."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text, in turn. It starts no threads or processes, so it can itself run in several."""
        encoded = []
        for start in range(0, len(texts), TEXTS_AT_ONCE):
            spelled = [self._spell(text) for text in texts[start:start + TEXTS_AT_ONCE]]
            words = [self._cut(text) if len(text) <= LONG else [] for text in spelled]
            ids_of = self._learn(word for its_words in words for word in its_words)
            for text, its_words in zip(spelled, words):
                ids = [id for word in its_words for id in ids_of[word]] if len(text) <= LONG else self._best_path(text)
                encoded.append(ids if self._byte_ids else _one_of_each_run(self.unk_id, ids))
        return encoded

    def _spell(self, text: str) -> str:
        """Steps 1 and 2: the text as the pieces spell it."""
        if not isinstance(text, str):
            raise TypeError(f"a text must be a str, not {shown(text)}")
        if not text:
            return ""
        vocabulary = self._vocabulary
        text = vocabulary.normalize(self._without_surrogates(text))
        if vocabulary.collapse_spaces:
            text = SPACES.sub(" ", text).lstrip(" ")
        text = ((" " if vocabulary.space_in_front else "") + text).replace(" ", SPACE)
        # sentencepiece looks for '▁', not for spaces, at the end: a '▁' of the text's own goes too.
        return text.rstrip(SPACE) if vocabulary.collapse_spaces else text

    def _without_surrogates(self, text: str) -> str:
        if not SURROGATE.search(text):
            return text
        text = SURROGATE_PAIR.sub(lambda pair: pair[0].encode("utf-16", "surrogatepass").decode("utf-16"), text)
        text, replaced = SURROGATE.subn("\ufffd", text)
        self.replaced_surrogates += replaced > 0
        return text

    def _cut(self, text: str) -> list[str]:
        """The words of a spelled text; the text itself if some piece may reach from one word into the next."""
        if not self._words_stand_alone:
            return [text] if text else []
        first, *others = text.split(SPACE)
        return ([first] if first else []) + [SPACE + word for word in others]

    def _learn(self, words: Iterable[str]) -> dict[str, tuple[int, ...]]:
        """Steps 3 and 4 for the words that are new: the table that then has them all. A large one starts anew."""
        if self._characters_kept > CHARACTERS_KEPT:
            self._ids_of, self._characters_kept = {}, 0
        ids_of = self._ids_of
        for word in words:
            if word in ids_of:
                continue
            ids, raw = [], word.encode()
            for token in self._unigram.tokenize(word):   # unknown characters side by side are one token
                start, end = token.offsets               # in bytes
                ids += self._ids_of_unknown(raw[start:end]) if token.id == self.unk_id else [token.id]
            ids_of[word] = tuple(ids)
            self._characters_kept += len(word)
        return ids_of

    def _ids_of_unknown(self, raw: bytes) -> list[int]:
        return [self._byte_ids[byte] for byte in raw] if self._byte_ids else [self.unk_id]

    def _best_path(self, text: str) -> list[int]:
        """Steps 3 and 4 for a spelled text as sentencepiece does them, float32 sums from its start included.

        Each place in the text gets the highest sum of scores of pieces that spell the text up to there, and the last of
        these pieces; from the end, each leads back to the one before. Among equal sums the first found stays. A sum
        that has passed `REBASE` is taken for 0 from there on, as in sentencepiece 0.2.3; older ones let it grow.
        """
        self._starts = self._starts or _starts_of(self._for_text)
        highest, reached = [0.0] + [-math.inf] * len(text), 0
        last, its_start = [self.unk_id] * (len(text) + 1), [0] * (len(text) + 1)
        float32 = array("f", [0.0])   # rounds what is put into it
        for start in range(len(text)):
            if highest[start] < -REBASE:
                here = slice(start, reached + 1)
                highest[here] = array("f", [total - highest[start] for total in highest[here]])
            for end, id, score in self._pieces_from(start, text):
                float32[0] = highest[start] + score
                if float32[0] > highest[end]:
                    highest[end], last[end], its_start[end] = float32[0], id, start
            reached = max(reached, end)

        backwards, end = [], len(text)
        while end:
            start = its_start[end]
            unknown = last[end] == self.unk_id
            backwards += reversed(self._ids_of_unknown(text[start:end].encode())) if unknown else [last[end]]
            end = start
        return backwards[::-1]

    def _pieces_from(self, start: int, text: str) -> Iterator[tuple[int, int, float]]:
        """(end, id, score) of the pieces that text[start:] begins with; its first character is unknown if no piece."""
        end, id = start + 1, self._starts.get(text[start], NO_PIECE)
        if id == NO_PIECE:
            yield end, self.unk_id, self._unknown_score
        while id is not None:
            if id != NO_PIECE:
                yield end, id, self._vocabulary.scores[id]
            end += 1
            id = self._starts.get(text[start:end]) if end <= len(text) else None

    def tokens(self, ids: Sequence[int]) -> list[str]:
        """The pieces of the ids, as the file writes them. Errors: IndexError for an id outside 0 .. vocab_size - 1."""
        for id in ids:
            if not 0 <= id < self.vocab_size:
                raise IndexError(f"id {id} is outside 0 .. {self.vocab_size - 1}")
        return [self._names[id] for id in ids]

    def decode(self, ids: Sequence[int]) -> str:
        """The ids as text to be read by people: bytes joined to characters, special tokens by their names.

        What normalisation changed stays changed, and bytes that are not UTF-8 come out as U+FFFD. Errors: IndexError.
        """
        parts = []
        for id, piece in zip(ids, self.tokens(ids)):
            is_byte = self._kinds[id] == BYTE
            parts.append(bytes([BYTE_PIECES[piece]]) if is_byte else piece.replace(SPACE, " ").encode())
        text = b"".join(parts).decode(errors="replace")
        return text.removeprefix(" ") if self._vocabulary.space_in_front else text

    def save(self, folder: str | Path) -> None:
        """Writes the tokenizer's file, byte for byte as it was read, and a tokenizer_config.json for transformers.

        Errors: InputError if that is not possible, or if the folder has an `spm.model` that would be read instead.
        """
        folder = Path(folder)
        if self._name != "spm.model" and os.path.lexists(folder / "spm.model"):
            raise InputError(file=folder / "spm.model", found="another tokenizer, which would be read instead",
                             expected="a folder without spm.model")
        try:
            for name, data in ((self._name, self._data), ("tokenizer_config.json", self._config())):
                with replacing(folder / name) as temporary:
                    temporary.write_bytes(data)
        except OSError as problem:
            raise InputError(file=folder, found=f"cannot be written: {problem.strerror}") from None

    def _config(self) -> bytes:
        if self._name == "spm.model":
            config = {"tokenizer_class": "DebertaV2Tokenizer", "vocab_type": "spm", "do_lower_case": False,
                      "split_by_punct": False}
        else:   # the class that takes a tokenizer.json as it is; the one for DeBERTa builds its own pipeline
            config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        for role in ("pad", "cls", "sep", "unk", "mask"):
            config[f"{role}_token"] = self._names[getattr(self, f"{role}_id")]
        return (json.dumps(config, indent=2) + "\n").encode()


NO_PIECE = -1   # in the table of starts: pieces begin like this, but it is none itself


def _starts_of(pieces: dict[str, int]) -> dict[str, int]:
    """Every string that a piece begins with -> the id of the piece that it is, or NO_PIECE."""
    starts = {piece[:length]: NO_PIECE for piece in pieces for length in range(1, len(piece))}
    return starts | pieces


def _one_of_each_run(unknown: int, ids: list[int]) -> list[int]:
    """Without byte pieces, sentencepiece has one unknown id for unknown characters side by side."""
    return [id for place, id in enumerate(ids) if id != unknown or ids[place - 1:place] != [unknown]]


def _as_the_library_may_see(vocabulary: Vocabulary) -> list[tuple[str, float]]:
    """(name, score) by id. Only pieces for text keep their names; those of the others have a space, as no text has.

    With a score of 0 the others do not lower the lowest score, either, from which the library derives the unknown's.
    """
    return [(piece, score) if kind == NORMAL else (f" {id}", 0.0)
            for id, (piece, score, kind) in enumerate(zip(vocabulary.pieces, vocabulary.scores, vocabulary.kinds))]


def _check(vocabulary: Vocabulary) -> None:
    """What sentencepiece checks when it loads a model, and that nothing is absurdly large. Errors: ValueError."""
    pieces, kinds = vocabulary.pieces, vocabulary.kinds
    if sum(map(len, pieces)) > MAX_TOTAL_LENGTH:
        raise ValueError(f"pieces of {sum(map(len, pieces)):,} characters together")
    place: dict[str, int] = {}
    for id, (piece, score, kind) in enumerate(zip(pieces, vocabulary.scores, kinds)):
        if not 0 < len(piece) <= MAX_PIECE_LENGTH:
            raise ValueError(f"piece {id} has {len(piece):,} characters")
        if SURROGATE.search(piece):
            raise ValueError(f"piece {id}, {shown(piece)}, is not Unicode")
        if place.setdefault(piece, id) != id:
            raise ValueError(f"pieces {place[piece]} and {id} are both {shown(piece)}")
        if not -math.inf < score <= 0.0:
            raise ValueError(f"the score of piece {id} is {score}, which is no log probability")
        if kind == USER_DEFINED:
            raise ValueError(f"piece {id}, {shown(piece)}, is user-defined, which no piece of v3 is")
    if kinds.count(UNKNOWN) != 1:
        raise ValueError(f"{kinds.count(UNKNOWN)} unknown pieces instead of one")
    if NORMAL not in kinds:
        raise ValueError("no piece for text")
    of_bytes = [piece for piece, kind in zip(pieces, kinds) if kind == BYTE]
    if of_bytes and set(of_bytes) != BYTE_PIECES.keys():
        raise ValueError(f"{len(of_bytes)} byte pieces that are not <0x00> to <0xFF>")


# ---------------------------------------------------------------------------------------------------------------------
# spm.model, a protobuf message: https://github.com/google/sentencepiece/blob/master/src/sentencepiece_model.proto

VARINT, EIGHT_BYTES, LENGTH_AND_BYTES, FOUR_BYTES = 0, 1, 2, 5    # protobuf's wire types, those in use
MODEL_FIELDS = {1: LENGTH_AND_BYTES, 2: LENGTH_AND_BYTES, 3: LENGTH_AND_BYTES}   # a piece, the trainer, the normalizer
PIECE_FIELDS = {1: LENGTH_AND_BYTES, 2: FOUR_BYTES, 3: VARINT}    # its text, score, kind
TRAINER_FIELDS = {3: VARINT, 24: VARINT, 35: VARINT}   # model_type, treat_whitespace_as_suffix, byte_fallback
NORMALIZER_FIELDS = {2: LENGTH_AND_BYTES,                         # precompiled_charsmap
                     3: VARINT, 4: VARINT, 5: VARINT}             # add_dummy_prefix, remove_extra_, escape_whitespaces
MODEL_TYPES = {1: "Unigram", 2: "BPE", 3: "word", 4: "character"}


def _read_spm(data: bytes) -> Vocabulary:
    """The vocabulary in an spm.model. Errors: ValueError that says what is wrong."""
    pieces, scores, kinds, trainer, normalizer, seen = [], [], [], {}, {}, set()
    for number, value in _fields(data, MODEL_FIELDS):
        seen.add(number)
        if number == 1:
            piece = dict(_fields(value, PIECE_FIELDS))
            pieces.append(piece.get(1, b"").decode())
            scores.append(struct.unpack("<f", piece[2])[0] if 2 in piece else 0.0)
            kinds.append(piece.get(3, NORMAL))
            if not NORMAL <= kinds[-1] <= BYTE:
                raise ValueError(f"piece {len(pieces) - 1} is of kind {kinds[-1]}, which there is not")
            if len(pieces) > MAX_PIECES:
                raise ValueError(f"more than {MAX_PIECES:,} pieces")
        elif number == 2:
            trainer.update(_fields(value, TRAINER_FIELDS))
        else:
            normalizer.update(_fields(value, NORMALIZER_FIELDS))

    if seen != MODEL_FIELDS.keys():   # a file that is cut off between its parts is a smaller model, to protobuf
        raise ValueError("damaged or cut off: it lacks its pieces, its trainer's settings or its normalizer")
    if trainer.get(3, 1) != 1:
        raise ValueError(f"a model of type {MODEL_TYPES.get(trainer[3], trainer[3])}")
    if trainer.get(24, 0):
        raise ValueError("a model with the space after the word (treat_whitespace_as_suffix)")
    if not normalizer.get(5, 1):
        raise ValueError("a model that leaves spaces as they are (no escape_whitespaces)")
    if bool(trainer.get(35, 0)) != (BYTE in kinds):
        raise ValueError(f"byte_fallback is {bool(trainer.get(35, 0))} and {kinds.count(BYTE)} pieces are bytes")
    return Vocabulary(pieces, scores, kinds, [], Charsmap(normalizer.get(2, b"")),
                      space_in_front=bool(normalizer.get(3, 1)), collapse_spaces=bool(normalizer.get(4, 1)))


def _fields(message: bytes, wanted: dict[int, int]) -> Iterator[tuple[int, int | bytes]]:
    """(number, value) of the fields of a protobuf message whose number is in `wanted`, number -> wire type, in order.

    One pass over the bytes, no recursion, and never a copy longer than the message. Errors: ValueError.
    """
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        number, wire_type = key >> 3, key & 7
        if wanted.get(number, wire_type) != wire_type:
            raise ValueError(f"damaged: field {number} is of wire type {wire_type} instead of {wanted[number]}")
        if wire_type == VARINT:
            value, at = _varint(message, at)
        else:
            if wire_type == LENGTH_AND_BYTES:
                length, at = _varint(message, at)
            elif wire_type in (FOUR_BYTES, EIGHT_BYTES):
                length = 4 if wire_type == FOUR_BYTES else 8
            else:
                raise ValueError(f"damaged: field {number} is of wire type {wire_type}, which there is not")
            if length > len(message) - at:
                raise ValueError(f"damaged or cut off: a field of {length:,} bytes with {len(message) - at:,} left")
            value, at = message[at:at + length], at + length
        if number in wanted:
            yield number, value


def _varint(message: bytes, at: int) -> tuple[int, int]:
    """The number that begins at `at`, seven bits a byte and the lowest first, and where it ends."""
    number = 0
    for shift in range(0, 70, 7):
        if at >= len(message):
            raise ValueError("damaged or cut off: it ends within a number")
        byte, at = message[at], at + 1
        number |= (byte & 0x7F) << shift
        if byte < 0x80:
            return number, at
    raise ValueError("damaged: a number of more than ten bytes")


class Charsmap:
    """sentencepiece's `precompiled_charsmap`: rules text -> text, of which the longest that fits applies at each place.

    `rules` has them all, 224,711 of one to four characters for v3's nmt_nfkc. A character that no rule fits stays.
    """

    def __init__(self, blob: bytes):
        """Errors: ValueError."""
        self.rules = _read_rules(blob) if blob else {}
        self._longest = max(map(len, self.rules), default=0)
        self._alone = {ord(source): target for source, target in self.rules.items() if len(source) == 1}
        self._first = {source[0] for source in self.rules if len(source) > 1}
        later = {character for source in self.rules for character in source[1:]}
        # A rule of several characters goes on with some of `later`, which are combining marks for the most part. So
        # only runs of those, and the character before each, need the walk; elsewhere each character is on its own.
        self._run = re.compile(f"[{''.join(map(re.escape, sorted(later)))}]+") if later else None

    def __call__(self, text: str) -> str:
        parts, done = [], 0
        for run in self._run.finditer(text) if self._run else ():
            start = run.start()
            if start > done and text[start - 1] in self._first:
                start -= 1
            parts += [text[done:start].translate(self._alone), *self._walk(text[start:run.end()])]
            done = run.end()
        return "".join([*parts, text[done:].translate(self._alone)])

    def _walk(self, text: str) -> Iterator[str]:
        at = 0
        while at < len(text):
            for end in range(min(len(text), at + self._longest), at, -1):
                if (target := self.rules.get(text[at:end])) is not None:
                    break
            else:
                end, target = at + 1, text[at]
            yield target
            at = end


LABEL, LEAF, NUMBER = 0x8000_00FF, 1 << 8, 0x7FFF_FFFF   # bits of a unit


def _read_rules(blob: bytes) -> dict[str, str]:
    """The rules of a precompiled_charsmap: the size of a trie (four bytes), the trie, and the targets, a 0 after each.

    The trie is a 'double array' (Darts-clone) over the UTF-8 bytes of the sources, in units of 32 bits. The child of a
    node for byte b is the unit at `base ^ b`, if that has b for its label. Its own base is its place ^ its offset. If a
    source ends with it, it has the leaf bit, and the unit at its base says at which byte the target starts. Nodes may
    share children, so a damaged trie may have cycles: the length of a source and the number of steps bound the walk.
    Errors: ValueError.
    """
    size = int.from_bytes(blob[:4], "little")
    if len(blob) < 4 or size % 4 or not 0 < size <= min(len(blob) - 4, MAX_TRIE_BYTES):
        raise ValueError(f"damaged: a character map of {len(blob):,} bytes with a trie of {size:,}")
    units = np.frombuffer(blob, "<u4", size // 4, offset=4).tolist()
    targets = blob[4 + size:]
    children = defaultdict(list)   # base -> places of the units that could be its children
    for place, unit in enumerate(units):
        if label := unit & LABEL:
            children[place ^ label].append(place)

    rules: dict[str, str] = {}
    read: dict[int, str] = {}      # start -> target; many rules share one
    steps = 0
    waiting = [(_offset(units[0]), b"")]
    while waiting:
        base, so_far = waiting.pop()
        for place in children.get(base, ()):
            unit, steps = units[place], steps + 1
            source, its_base = so_far + bytes([unit & 0xFF]), place ^ _offset(unit)
            if steps > MAX_TRIE_STEPS or len(source) > MAX_RULE_BYTES or its_base >= len(units):
                raise ValueError("damaged: the trie of the character map is not one")
            if unit & LEAF:
                start = units[its_base] & NUMBER
                if start not in read:
                    read[start] = _read_target(targets, start)
                rules[source.decode()] = read[start]
            waiting.append((its_base, source))
    return rules


def _offset(unit: int) -> int:
    return unit >> 10 << (unit >> 6 & 8)


def _read_target(targets: bytes, start: int) -> str:
    end = targets.find(b"\0", start, start + MAX_RULE_BYTES + 1)
    if end < 0:
        raise ValueError(f"damaged: no target starts at byte {start:,} of {len(targets):,} of the character map")
    target = targets[start:end].decode()
    if "  " in target:   # sentencepiece collapses spaces from rule to rule but not within one; here they look the same
        raise ValueError(f"a rule of the character map makes two spaces, {shown(target)}")
    return target


# ---------------------------------------------------------------------------------------------------------------------
# tokenizer.json, the library's own format

TRANSFORMERS_5_SPACES = r"\s{2,}|[\n\r\t]"   # transformers 5 writes this in place of v3's character map


def _read_json(data: bytes) -> Vocabulary:
    """The vocabulary in a tokenizer.json. Errors: ValueError that says what is wrong; OverflowError, RecursionError."""
    file = _is(dict, json.loads(data), "the file")
    model = _is(dict, file.get("model"), "model")
    if model.get("type", "Unigram") != "Unigram":
        raise ValueError(f"a model of type {shown(model['type'])}")
    entries = _is(list, model.get("vocab"), "model.vocab")
    for id, entry in enumerate(entries):
        if type(entry) is not list or [type(part) for part in entry] not in ([str, float], [str, int]):
            raise ValueError(f"entry {id} of model.vocab is {shown(entry)}, not [piece, score]")
    pieces = [piece for piece, _ in entries]
    unk_id = _is(int, model.get("unk_id"), "model.unk_id")

    added = {}
    for token in _is(list, file.get("added_tokens") or [], "added_tokens"):
        id = _is(int, _is(dict, token, "an added token").get("id"), "the id of an added token")
        added[id] = (_is(str, token.get("content"), f"added token {id}"), bool(token.get("special")))
        if not 0 <= id < len(pieces) + MAX_ADDED_IDS:
            raise ValueError(f"added token {id} beside {len(pieces):,} pieces")
        if id < len(pieces) and pieces[id] != added[id][0]:
            raise ValueError(f"added token {id} is {shown(added[id][0])}, and piece {id} is {shown(pieces[id])}")
    past_the_pieces = range(len(pieces), max(added, default=0) + 1)
    names = [added[id][0] if id in added else f"[no token {id}]" for id in past_the_pieces]

    normalize, collapse_spaces = _read_normalizer(file.get("normalizer"))
    kinds = [_kind(piece, id == unk_id, id in added and added[id][1]) for id, piece in enumerate(pieces)]
    return Vocabulary(pieces, [float(score) for _, score in entries], kinds, names, normalize,
                      _read_space_in_front(file.get("pre_tokenizer")), collapse_spaces)


def _kind(piece: str, is_unknown: bool, is_special: bool) -> int:
    """What the file does not say outright of a piece, from its name and from the added tokens."""
    if is_unknown:
        return UNKNOWN
    if piece in BYTE_PIECES:
        return BYTE
    return CONTROL if is_special or any(piece == name for name, _ in SPECIALS.values()) else NORMAL


def _read_normalizer(node: object) -> tuple[Callable[[str], str], bool]:
    """Step 1 as the file has it, and whether it collapses spaces, which is then done in step 2, as is Strip."""
    steps, collapse_spaces = [], False
    for step in _flat(node, "normalizers"):
        kind, pattern = step.get("type"), step.get("pattern")
        regex = pattern.get("Regex") if isinstance(pattern, dict) else None
        if kind == "Precompiled":
            blob = _is(str, step.get("precompiled_charsmap") or "", "precompiled_charsmap")
            steps.append(Charsmap(base64.b64decode(blob, validate=True)))
        elif kind in ("Nmt", "NFC", "NFKC"):
            steps.append(getattr(normalizers, kind)().normalize_str)
        elif kind == "Replace" and regex in (" {2,}", TRANSFORMERS_5_SPACES):
            collapse_spaces = True
            if regex == TRANSFORMERS_5_SPACES:
                steps.append(normalizers.Replace(Regex(regex), " ").normalize_str)
        elif kind != "Strip":
            raise ValueError(f"the normalizer {shown(step)}")
    return partial(_in_turn, steps), collapse_spaces


def _in_turn(steps: list[Callable[[str], str]], text: str) -> str:
    for step in steps:
        text = step(text)
    return text


def _read_space_in_front(node: object) -> bool:
    steps = _flat(node, "pretokenizers")
    spellers = [step for step in steps if step.get("type") == "Metaspace" and step.get("replacement") == SPACE]
    others = [step for step in steps if step not in spellers and step.get("type") != "WhitespaceSplit"]
    if len(spellers) != 1 or others:
        raise ValueError(f"the pre-tokenizer {shown(node)}, not Metaspace with {SPACE}")
    without_scheme = "always" if spellers[0].get("add_prefix_space", True) else "never"   # how older files say it
    return spellers[0].get("prepend_scheme", without_scheme) != "never"


def _flat(node: object, inner: str) -> list[dict]:
    """The steps of a normalizer or pre-tokenizer, one after the other, those of a Sequence in its place."""
    if node is None:
        return []
    if _is(dict, node, f"one of the {inner}").get("type") != "Sequence":
        return [node]
    return [step for part in _is(list, node.get(inner), inner) for step in _flat(part, inner)]


def _is(kind: type, value: object, what: str):
    if type(value) is not kind:
        raise ValueError(f"{what} is {shown(value)}")
    return value


READERS = {"spm.model": _read_spm, "tokenizer.json": _read_json}   # in the order of preference


# ---------------------------------------------------------------------------------------------------------------------
# A vocabulary of one's own

OWN_ORDER = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", *BYTE_PIECES]   # the first ids, as in v3


def train_vocabulary(texts: Iterable[str], vocab_size: int, *, character_coverage: float = 0.9995,
                     max_piece_length: int = 16) -> Tokenizer:
    """A Unigram vocabulary learnt from texts, with v3's order of ids: [PAD] [CLS] [SEP] [UNK], bytes, pieces, [MASK].

    `vocab_size` counts them all. The rarest characters, which make up 1 - `character_coverage` of the texts, get no
    piece and are read as bytes. A piece has at most `max_piece_length` characters and no space but at its start.

    Differs: step 1 is the library's Nmt and NFKC instead of v3's character map. Of all single characters these read two
    differently, U+FF5E and U+1F23B. NFKC also sorts and composes combining marks, however many there are. As in all but
    166 of v3's, which has pieces like '▁£1', no piece joins letters, digits and signs (as long as there are enough
    others); unlike v3's, scripts may meet in one. v3's longest piece has 32 characters.

    The library's trainer adds up in an order that changes from run to run. Scores are rounded to four decimals, where
    that does not show; pieces worth exactly the same could still change places at the edge of the vocabulary.

    Errors: InputError if `vocab_size` is too small for the characters, or too large for the texts.
    """
    normalizer, speller = _own_normalizer(), pre_tokenizers.Metaspace(SPACE, prepend_scheme="always", split=True)
    texts = [normalizer.normalize_str(SURROGATE.sub("\ufffd", text)) for text in texts]
    counts = Counter()
    for text in texts:
        counts.update(text)
    common = _most_common_characters(counts, character_coverage)
    wanted = vocab_size - len(OWN_ORDER) - 1
    if not common or wanted <= len(common):
        raise InputError(found=f"a vocabulary of {vocab_size:,} for texts of {len(common):,} different characters",
                         expected=f"more than {vocab_size - wanted + len(common):,}, and some text")

    rare_to_space = {ord(character): " " for character in counts if character not in common}
    texts = [SPACES.sub(" ", text.translate(rare_to_space)).strip(" ") for text in texts]
    library = LibraryTokenizer(Unigram())
    library.pre_tokenizer = speller
    library.train_from_iterator(texts, UnigramTrainer(
        vocab_size=round(SPARE * wanted), max_piece_length=max_piece_length, show_progress=False,
        special_tokens=["[UNK]"], unk_token="[UNK]"))
    pieces = _best(_settled(json.loads(library.to_str())["model"]["vocab"][1:]), wanted)
    if len(pieces) < wanted:
        raise InputError(found=f"texts that have {len(pieces):,} pieces",
                         expected=f"{wanted:,}, for a vocabulary of {vocab_size:,}")
    return Tokenizer("tokenizer.json", _own_tokenizer_json(pieces, speller))


def _own_normalizer() -> normalizers.Normalizer:
    return normalizers.Sequence([normalizers.Nmt(), normalizers.NFKC(),
                                 normalizers.Replace(Regex(" {2,}"), " "), normalizers.Strip()])


def _own_tokenizer_json(pieces: list[tuple[str, float]], speller: pre_tokenizers.PreTokenizer) -> bytes:
    """A tokenizer.json that `_read_json` reads, and transformers' PreTrainedTokenizerFast as well."""
    vocabulary = [(name, 0.0) for name in OWN_ORDER] + pieces + [("[MASK]", 0.0)]
    library = LibraryTokenizer(Unigram(vocabulary, unk_id=OWN_ORDER.index("[UNK]"), byte_fallback=True))
    library.normalizer, library.pre_tokenizer = _own_normalizer(), speller
    library.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(name, OWN_ORDER.index(name)) for name in ("[CLS]", "[SEP]")])
    library.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(),
                                         decoders.Strip(" ", 1, 0)])
    library.add_special_tokens([AddedToken(name, normalized=False) for name in (*OWN_ORDER[:4], "[MASK]")])
    return library.to_str().encode()


def _most_common_characters(counts: Counter, coverage: float) -> set[str]:
    """As many of the most frequent characters as it takes to make up `coverage` of the text; spaces do not count."""
    counts = {character: count for character, count in counts.items() if character != " "}
    needed, common = coverage * sum(counts.values()), set()
    for character, count in sorted(counts.items(), key=lambda entry: (-entry[1], entry[0])):
        if needed <= 0:
            break
        common.add(character)
        needed -= count
    return common


def _best(pieces: list[tuple[str, float]], wanted: int) -> list[tuple[str, float]]:
    """Of the sorted pieces `wanted`: single characters, then those of one kind (letters, digits or signs), the others
    only if there are not enough.

    Why not cut the texts there before the training: the trainer looks for pieces among the *different* words, each
    once. A word that never stands beside a comma would be there a single time, and for the trainer that is not enough.
    """
    def kind(character: str) -> str:
        first = unicodedata.category(character)[0]
        return {"L": "letter", "M": "letter", "N": "digit"}.get(first, "sign")

    def rank(piece: tuple[str, float]) -> int:
        name = piece[0]
        return 0 if len(name) == 1 else 1 if len({kind(character) for character in name.lstrip(SPACE)}) == 1 else 2

    chosen = set(sorted(pieces, key=rank)[:wanted])                      # a stable sort: the best come first in each
    return [piece for piece in pieces if piece in chosen]


def _settled(trained: list[tuple[str, float]]) -> list[tuple[str, float]]:
    """The trainer's pieces, the best first, without what is random in their scores and order.

    Characters that the training itself would drop are kept by the trainer at the lowest score, each .0001 higher than
    the one before, in random order. They all get the lowest.
    """
    lowest = min(score for _, score in trained)
    last_step = lowest + 1e-4 * sum(len(piece) == 1 for piece, _ in trained)
    settled = [(piece, lowest if len(piece) == 1 and score < last_step else score) for piece, score in trained]
    return sorted([(piece, round(score, 4)) for piece, score in settled], key=lambda entry: (-entry[1], entry[0]))
