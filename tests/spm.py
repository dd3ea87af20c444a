"""Shared by the tests of tokenizers: texts from the standard library, and handmade spm.model files."""

import functools
import importlib
import inspect
import struct

from minipref.pretrain.vocabulary import train_vocabulary
from minipref.sentencepiece_model import BYTE, BYTE_PIECES, NORMAL, UNKNOWN
from minipref.tokenizer import Tokenizer


@functools.cache
def docstrings() -> list[str]:
    """Lines of English from the standard library's docstrings, in a fixed order, and every ASCII character."""
    lines = []
    for name in ("argparse", "datetime", "decimal", "email", "json", "logging", "pathlib", "random", "statistics",
                 "string", "subprocess", "tarfile", "textwrap", "threading", "unittest", "zipfile"):
        home = importlib.import_module(name)
        own = [thing for thing in vars(home).values()
               if (inspect.isclass(thing) or inspect.isfunction(thing)) and thing.__module__ == name]
        for thing in [home, *own]:
            lines += [line for line in (inspect.getdoc(thing) or "").splitlines() if line.strip()]
    every_sign = " ".join(chr(point) for point in range(0x21, 0x7F))
    return list(dict.fromkeys(lines)) + [every_sign] * 20


@functools.cache
def trained_tokenizer() -> Tokenizer:
    return train_vocabulary(docstrings(), 1500)


def varint(number: int) -> bytes:
    if number < 0x80:
        return bytes([number])
    return bytes([number & 0x7F | 0x80]) + varint(number >> 7)


def field(number: int, value: int | float | bytes) -> bytes:
    """A field of a protobuf message: a varint, a float or bytes, by the type of the value."""
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    if isinstance(value, float):
        return varint(number << 3 | 5) + struct.pack("<f", value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def spm_model(entries: list[tuple[str, float, int]], *, bytes_too: bool = False, charsmap: bytes = b"",
              trainer: bytes = b"", normalizer: bytes = b"") -> bytes:
    """A sentencepiece model: [UNK], the byte pieces if `bytes_too`, and the entries (piece, score, kind)."""
    entries = [("[UNK]", 0.0, UNKNOWN), *[(name, 0.0, BYTE) for name in BYTE_PIECES if bytes_too], *entries]
    pieces = [field(1, piece.encode()) + field(2, score) + field(3, kind) for piece, score, kind in entries]
    return (b"".join(field(1, piece) for piece in pieces) + field(2, field(3, 1) + field(35, int(bytes_too)) + trainer)
            + field(3, field(1, b"test") + (field(2, charsmap) if charsmap else b"") + normalizer))


A = ("a", -1.0, NORMAL)


def charsmap_of(units: dict[int, int], targets: bytes = b"x\0", size: int = 256) -> bytes:
    """A precompiled_charsmap whose trie has these units by position; all others are 0."""
    return struct.pack(f"<I{size}I", 4 * size, *(units.get(place, 0) for place in range(size))) + targets


def one_rule(byte: int, target: int = 0) -> dict[int, int]:
    """The trie of a rule for one byte: its unit, at the byte's position because the root's base is 0, and its leaf."""
    leaf = byte ^ 5
    return {byte: 5 << 10 | 1 << 8 | byte, leaf: 1 << 31 | target}


SMALL_TRIE = charsmap_of(one_rule(97) | one_rule(0x65, 2), b"x\0yy\0", size=128)
SMALL_MODEL = spm_model([A, ("x", -2.0, NORMAL), ("▁", -2.5, NORMAL), ("ab", -3.0, NORMAL)], charsmap=SMALL_TRIE)


def load_or_refuse(name: str, data: bytes) -> None:
    """Any bytes give a tokenizer that can encode, or an error with a message, which load_tokenizer passes on."""
    try:
        tokenizer = Tokenizer(name, data)
    except (ValueError, OverflowError, RecursionError) as problem:
        assert str(problem)
    else:
        ids = tokenizer.encode("An ｅxample: e\u0301 漢 [SEP]")
        assert all(0 <= id < tokenizer.vocab_size for id in ids)
