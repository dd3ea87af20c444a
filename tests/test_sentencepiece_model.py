"""Errors of the reader of spm.model. Its ids are tested in test_tokenizer.py."""

import math
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from spm import SMALL_MODEL, SMALL_TRIE, A, charsmap_of, field, load_or_refuse, one_rule, spm_model, varint

import minipref.sentencepiece_model
from minipref.runtime import InputError
from minipref.sentencepiece_model import (
    BYTE,
    CHARSMAP,
    CONTROL,
    NORMAL,
    NORMALIZER,
    UNKNOWN,
    USER_DEFINED,
    CharacterMap,
    read_fields,
    read_sentencepiece_model,
)
from minipref.tokenizer import Tokenizer, load_tokenizer

WRONG_MODELS = {   # name: (bytes, part of the message)
    "empty": (b"", "it lacks its pieces"),
    "text": (b"this is not a model", "damaged"),
    "zeros": (bytes(1000), "it lacks its pieces"),
    "a page": (b"<!DOCTYPE html><html>not found</html>", "damaged"),
    "no trainer": (field(1, field(1, b"a")) + field(3, b""), "cut off"),
    "no normalizer": (field(1, field(1, b"a")) + field(2, b""), "cut off"),
    "a length of exabytes": (varint(1 << 3 | 2) + varint(1 << 62), "4,611,686,018,427,387,904 bytes with 0 left"),
    "a number without end": (b"\xff" * 30, "more than ten bytes"),
    "a number cut off": (b"\x0a\x80", "ends within a number"),
    "a group": (b"\x0b\x0c", "wire type"),
    "a wire type that is none": (b"\x4f", "a field of wire type 7"),
    "pieces as numbers": (field(1, 7), "it lacks its pieces"),
    "a piece that is not UTF-8": (field(1, field(1, b"\xff\xfe")), "codec can't decode"),
    "an empty piece": (spm_model([A, ("", -1.0, NORMAL)]), "piece 2 has 0 characters"),
    "a piece without end": (spm_model([A, ("x" * 1000, -1.0, NORMAL)]), "piece 2 has 1,000 characters"),
    "a piece twice": (spm_model([A, A]), "2 pieces are 'a'"),
    "a score that is none": (spm_model([("a", math.nan, NORMAL)]), "score of piece 1 is nan"),
    "an endless score": (spm_model([("a", -math.inf, NORMAL)]), "score of piece 1 is -inf"),
    "a positive score": (spm_model([("a", 2.0, NORMAL)]), "score of piece 1 is 2.0"),
    "a type that is none": (spm_model([("a", -1.0, 9)]), "piece 1, 'a', is of type 9"),
    "two unknown pieces": (spm_model([A, ("u", 0.0, UNKNOWN)]), "2 unknown pieces"),
    "no unknown piece": (field(1, field(1, b"a")) + field(2, b"") + field(3, b""), "0 unknown pieces"),
    "nothing for text": (spm_model([("[CLS]", 0.0, CONTROL)]), "no piece for text"),
    "user-defined pieces": (spm_model([A, ("u", 0.0, USER_DEFINED)]), "'u', is of type 4"),
    "some bytes": (spm_model([A, ("<0x41>", 0.0, BYTE)], trainer=field(35, 1)), "1 byte pieces that are not"),
    "bytes that are not": (spm_model([A, ("q", 0.0, BYTE)], bytes_too=True), "257 byte pieces that are not"),
    "BPE": (spm_model([A], trainer=field(3, 2)), "a model of type BPE; expected the spm.model of a Unigram model"),
    "words": (spm_model([A], trainer=field(3, 3)), "a model of type word"),
    "characters": (spm_model([A], trainer=field(3, 4)), "a model of type character"),
    "a type of the future": (spm_model([A], trainer=field(3, 99)), "a model of type 99"),
    "space behind": (spm_model([A], trainer=field(24, 1)), "treat_whitespace_as_suffix"),
    "plain spaces": (spm_model([A], normalizer=field(5, 0)), "escape_whitespaces"),
    "a short map": (spm_model([A], charsmap=b"\x01\0"), "a character map of 2 bytes"),
    "a map without a trie": (spm_model([A], charsmap=bytes(8)), "with a trie of 0"),
    "a trie longer than the map": (spm_model([A], charsmap=struct.pack("<II", 400, 0)), "with a trie of 400"),
    "a trie of exabytes": (spm_model([A], charsmap=b"\xfc\xff\xff\xff" + bytes(64)), "with a trie of 4,294,967,292"),
    "half a unit": (spm_model([A], charsmap=struct.pack("<I", 3) + bytes(64)), "with a trie of 3"),
    # The child 'a' of the root has the root's own base.
    "a trie with a cycle": (spm_model([A], charsmap=charsmap_of({97: 97 << 10 | 97})), "is not a valid trie"),
    # From base 4 k two children, at 4 k ^ 1 and ^ 2, lead to base 4 k + 4: 2^60 ways through 120 units.
    "a trie of a quintillion rules": (spm_model([A], charsmap=charsmap_of(
        {4 * k ^ byte: (4 * k ^ byte ^ 4 * k + 4) << 10 | byte for k in range(60) for byte in (1, 2)})),
        "is not a valid trie"),
    "a trie that leads outside": (spm_model([A], charsmap=charsmap_of({97: 999 << 10 | 97})), "is not a valid trie"),
    "a target outside": (spm_model([A], charsmap=charsmap_of(one_rule(97, target=2))), "no target starts at byte 2"),
    "a target without end": (spm_model([A], charsmap=charsmap_of(one_rule(97), b"xyz")), "no target starts at byte 0"),
    "a target that is not UTF-8": (spm_model([A], charsmap=charsmap_of(one_rule(97), b"\xff\0")), "codec can't decode"),
    "a source that is not UTF-8": (spm_model([A], charsmap=charsmap_of(one_rule(200))), "codec can't decode"),
}


@pytest.mark.parametrize("name", WRONG_MODELS)
def test_a_wrong_spm_model_is_refused_in_one_line_that_names_it(tmp_path, name):
    data, message = WRONG_MODELS[name]
    (tmp_path / "spm.model").write_bytes(data)
    with pytest.raises(InputError, match=r"spm\.model: .*; expected") as refused:
        load_tokenizer(tmp_path)
    assert message in str(refused.value) and "\n" not in str(refused.value)


def test_the_models_of_the_table_are_wrong_in_one_thing_only(tmp_path):
    (tmp_path / "spm.model").write_bytes(
        spm_model([A, ("x", -2.0, NORMAL)], bytes_too=True, charsmap=charsmap_of(one_rule(97))))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer._vocabulary.normalizers[0].rules == {"a": "x"}
    assert tokenizer.tokens(tokenizer.encode("a")) == ["<0xE2>", "<0x96>", "<0x81>", "x"]


def test_the_published_model_has_the_sizes_that_the_limits_are_set_by(reference_dir, monkeypatch):
    data = (reference_dir / "deberta-v3-small" / "spm.model").read_bytes()
    vocabulary = read_sentencepiece_model(data)
    rules = vocabulary.normalizers[0].rules
    assert len(vocabulary.pieces) == 128_000 and max(map(len, vocabulary.pieces)) == 32
    assert len("".join(vocabulary.pieces).encode()) == 1_074_318
    assert len(rules) == 224_711 and max(map(len, rules)) == 4
    charsmap = dict(read_fields(dict(read_fields(data))[NORMALIZER]))[CHARSMAP]
    for limit, just_enough in (("MAX_TRIE_STEPS", 262_072), ("MAX_TRIE_BYTES", 177_152)):
        monkeypatch.setattr(minipref.sentencepiece_model, limit, just_enough)
        assert CharacterMap(charsmap).rules == rules
        monkeypatch.setattr(minipref.sentencepiece_model, limit, just_enough - 1)
        with pytest.raises(ValueError, match="damaged"):
            CharacterMap(charsmap)
        monkeypatch.undo()


def test_a_model_that_is_cut_off_anywhere_is_refused():
    for cut in range(len(SMALL_MODEL)):
        with pytest.raises(ValueError, match=r"damaged|end of data"):
            Tokenizer("spm.model", SMALL_MODEL[:cut])


def edited(data: bytes, edits: list[tuple[int, int, bytes]]) -> bytes:
    """Apply edits (position, length, new), each of which replaces `length` bytes by `new`."""
    for place, length, new in edits:
        place %= len(data) + 1
        data = data[:place] + new + data[place + length:]
    return data


edits = st.lists(st.tuples(st.integers(0, 1 << 20), st.integers(0, 3), st.binary(max_size=3)), min_size=1, max_size=4)


@settings(max_examples=600)
@given(edits=edits)
def test_the_protobuf_reader_takes_any_damage(edits):
    load_or_refuse("spm.model", edited(SMALL_MODEL, edits))


@settings(max_examples=600)
@given(edits=edits)
def test_the_reader_of_the_character_map_takes_any_damage(edits):
    load_or_refuse("spm.model", spm_model([A], charsmap=edited(SMALL_TRIE, edits)))


@settings(max_examples=300)
@given(data=st.binary(max_size=300))
def test_the_readers_take_any_bytes(data):
    load_or_refuse("spm.model", data)
    load_or_refuse("tokenizer.json", data)
