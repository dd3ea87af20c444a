"""The tokenizer gives sentencepiece's ids for any text, and its readers say in one line what is wrong with any file.

sentencepiece is the oracle: it trains the models, on the docstrings of the standard library, and encodes with them.
Where two ways to cut a text have the same sum of scores it may take either (`minipref/tokenizer.py` says why);
`assert_same_ids` lets another way than sentencepiece's pass only when the scores, added up, are equal.
"""

import base64
import functools
import importlib
import inspect
import io
import json
import math
import os
import pickle
import random
import struct
import time
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as LibraryTokenizer

import minipref.tokenizer
from minipref.errors import InputError
from minipref.tokenizer import (
    BYTE,
    BYTE_PIECES,
    CONTROL,
    LONG,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    load_tokenizer,
    train_vocabulary,
)

V3_ORDER = {"pad_id": 0, "bos_id": 1, "eos_id": 2, "unk_id": 3,
            "pad_piece": "[PAD]", "bos_piece": "[CLS]", "eos_piece": "[SEP]", "unk_piece": "[UNK]"}
MODELS = {   # how sentencepiece trains each, beside the ids of the special pieces
    "like_v3": {"byte_fallback": True},
    "without_bytes": {},
    "across_words": {"byte_fallback": True, "split_by_whitespace": False},
    "not_normalized": {"byte_fallback": True, "normalization_rule_name": "identity"},
    "spaces_kept": {"byte_fallback": True, "remove_extra_whitespaces": False, "add_dummy_prefix": False},
    "case_folded": {"byte_fallback": True, "normalization_rule_name": "nmt_nfkc_cf"},
}

HARD_TEXTS = [
    # the character map
    "Ｆｕｌｌ－ｗｉｄｔｈ　１２３～ ﾊﾝｶｸ ｶﾞ", "ﬁ ﬀ ℌ ① ½ ² ™ ㎏ ㈱ ﷺ ǆ ẛ̣ ſ Å Ω K", "¨ ´ ¯ ¸ ˘ ˙ ΅ ͺ ‗ a¨b a´ ´",
    "e\u0301 o\u0308 A\u030a c\u0327 u\u0308\u0304 a\u0323\u0302 a\u0302\u0323 s\u0307\u0323 \u1e9b\u0323",
    "か\u3099は\u309aカ\u3099ハ\u309a ｶ\u3099 \uff76\uff9e か\u309b", "\u1025\u102e \u0e33 \u0eb3 \u0dd9\u0dcf\u0dca",
    "\u1112\u1161\u11ab\u1100\u116e\u11a8 \u1100\u1161 \u1161\u11a8 \u1100\u1100\u1161 \uac00\u11a8 \u115f\u1160",
    "\u0301\u0301 \u0301a x\u0301\u0302\u0303\u0304\u0305 a\u0315\u0300\u05ae\u0300b \u0344 \u0340 \u0f71\u0f72 \u0958",
    "\u05e9\u05c1 \u05e9\u05bc\u05c1 \ufb2c \u0627\u0653\u0627\u0654 \ufdfa \ufe70 \u064b\u0651",
    "\u0915\u094d\u0937\u093f \u0928\u093c \u0b47\u0b3e",
    "İstanbul ıŞĞ ß ẞ ŉ ǰ ΐ ΰ և ẖ ﬅ ΣΑΣ ς", "\ufffd\ufffd a\ufffdb \ufffe \uffff \U0010ffff \ue000 \U0001f23b \uff5e",
    # bytes, scripts, emoji
    "漢字 汉字 仮名 カナ 한국어 ไทย עברית العربية हिन्दी ελληνικά русский ქართული አማርኛ 𠮷野家 \uf900 \U0002f800",
    "😀 👍🏽 👩‍👩‍👧‍👦 🇩🇪 ❤️ ☺︎ 1️⃣ 🏴\U000e0067\U000e0062\U000e007f 🤷🏻‍♀️",
    # spaces, controls, what cannot be seen
    "zero\u200bwidth\u200cjoin\u200der \u2060word\u2060 \ufeffbom \u00adsoft\u00ad \u200e\u200f \u202emirror\u202c",
    "a\tb\nc\r\nd\x0be\x0cf\x1cg\x85h\u2028i\u2029j", "nbsp\u00a0\u00a0two \u2003em \u3000wide \u2009thin \u205f\u1680",
    "\x00", "a\x00b \x00 c", "\x01 a\x08b\x07 \x1b[0m \x7f \x80 \x8f \x9f \x02", "   lead  and   trail    ",
    # what a user may type to look like something else
    "[CLS] [SEP] [PAD] [UNK] [MASK]", "[CLS][SEP] x[SEP]y [ SEP ] [sep] ［ＳＥＰ］", "▁[CLS]▁ ▁<0x41>▁",
    "<0x41> <0x0A><0xFF> <0xE6><0xBC><0xA2> <0x4 0x41> ＜0x41＞", "<s> </s> <pad> <unk> <mask>",
    "▁", "▁▁", "a▁b", "▁a", "a▁", "a ▁ b ▁ ", " ▁ \u2581\u2581x",
    # ordinary
    "don't \"quoted\" “curly” ‘single’ — – … • © ® € £ ¥ § ¶ † ‰ ∑ √ ≠ ≤ → ⇒ ■ ★",
    "def f(x):\n    return {\"a\": [1, 2.5e-3], 'b': x**2}  # comment\n\n\tif __name__ == \"__main__\":",
    "https://example.com/a?b=c&d=%20#e user@example.com C:\\path\\file.txt $\\frac{1}{2}$",
    "BBBBB aaaaaaaaaaaaaaaaaaaaaaa ------- ======== ........ 000000000 1234567890123 ,,,,;;;;",
    # hardly anything
    "", " ", "      ", "\n", "\t \n", "\u3000", "\x01", "\x01 ", " \x01", "\u200b", "\u0301", "a", "漢", "\u00a0",
]


def random_text(draw: random.Random, length: int) -> str:
    """A third of all are from the whole of Unicode, a third below U+10000, a third below U+0700."""
    top = draw.choice([0x110000, 0x10000, 0x700])
    points = [draw.randrange(top) for _ in range(length)]
    return "".join(chr(point) for point in points if not 0xD800 <= point < 0xE000)


# Whole Unicode, and, twice as often, what the pieces and the rules are made of.
any_text = st.lists(st.one_of(
    st.text(max_size=8), st.sampled_from([" ", "▁", "[SEP]", "<0x41>", "\u0301", "\u3099", "か", "\u1161", "ing"]),
    st.text(st.sampled_from("abet  \u0300\u0301\u0323\u0327\u304b\u3099\u1100\u1161\u11a8\uff76\uff9e"), max_size=8),
)).map("".join)


@functools.cache
def docstrings() -> list[str]:
    """Lines of English that are wherever Python is, in the same order each time, and every sign of ASCII."""
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


@pytest.fixture(scope="session")
def sentencepiece():
    return pytest.importorskip("sentencepiece")


@pytest.fixture(scope="session")
def models_dir(sentencepiece, tmp_path_factory) -> Path:
    """A folder for each of `MODELS`, with its spm.model."""
    folder = tmp_path_factory.mktemp("models")
    lines = docstrings() + ["Größe café naïve Москва 漢字 かな 한국 😀 → “ ” ’ …"] * 3
    for name, how in MODELS.items():
        written = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines), model_writer=written, vocab_size=1200, minloglevel=2, num_threads=1,
            **V3_ORDER, **how)
        (folder / name).mkdir()
        (folder / name / "spm.model").write_bytes(written.getvalue())
    return folder


@pytest.fixture(scope="session", params=MODELS)
def both(request, sentencepiece, models_dir):
    """Our tokenizer, and sentencepiece, for one of the models."""
    folder = models_dir / request.param
    return load_tokenizer(folder), sentencepiece.SentencePieceProcessor(model_file=str(folder / "spm.model"))


@pytest.fixture(scope="session")
def like_v3(sentencepiece, models_dir):
    folder = models_dir / "like_v3"
    return load_tokenizer(folder), sentencepiece.SentencePieceProcessor(model_file=str(folder / "spm.model"))


@pytest.fixture(scope="session")
def trained():
    return train_vocabulary(docstrings(), 1500)


def sum_of_scores(oracle, spelled: str, ids: list[int]) -> float:
    """What the Viterbi search maximises. Each character that no piece of the ids covers was unknown."""
    pieces = [id for id in ids if not (oracle.is_byte(id) or oracle.is_unknown(id))]
    ordinary = [oracle.get_score(id) for id in range(oracle.vocab_size())
                if not (oracle.is_byte(id) or oracle.is_unknown(id) or oracle.is_control(id) or oracle.is_unused(id))]
    unknown = len(spelled) - sum(len(oracle.id_to_piece(id)) for id in pieces)
    return math.fsum([oracle.get_score(id) for id in pieces] + [min(ordinary) - 10.0] * unknown)


def assert_same_ids(tokenizer, oracle, texts: list[str]) -> None:
    """Our ids are sentencepiece's, or add up to the same score, within what float32 can hold of such a sum."""
    for text, ours, theirs in zip(texts, tokenizer.encode_batch(texts), oracle.encode(texts), strict=True):
        if ours != theirs:
            spelled = oracle.normalize(text)
            sums = [sum_of_scores(oracle, spelled, ids) for ids in (ours, theirs)]
            equal = abs(sums[0] - sums[1]) <= 4 * np.spacing(np.float32(abs(sums[1])))
            assert equal, f"{text[:200]!r}: {tokenizer.tokens(ours)[:40]} and {oracle.id_to_piece(theirs)[:40]}, {sums}"


# ---------------------------------------------------------------------------------------------------------------------
# The same ids as sentencepiece


def test_the_reader_finds_the_pieces_scores_and_kinds_that_sentencepiece_finds(both):
    tokenizer, oracle = both
    vocabulary = tokenizer._vocabulary
    kinds = [UNKNOWN if oracle.is_unknown(id) else CONTROL if oracle.is_control(id) else
             UNUSED if oracle.is_unused(id) else BYTE if oracle.is_byte(id) else NORMAL for id in range(len(oracle))]
    assert vocabulary.pieces == oracle.id_to_piece(list(range(len(oracle))))
    assert vocabulary.scores == oracle.get_score(list(range(len(oracle))))
    assert vocabulary.kinds == kinds


def test_every_rule_of_the_character_map_is_what_sentencepiece_applies(both):
    tokenizer, oracle = both
    sources = list(tokenizer._vocabulary.normalize.rules)[::11]
    points = [chr(point) for point in range(0x21, 0xFFFE, 3) if not 0xD800 <= point < 0xE000]
    texts = [f"a{text}b" for text in sources + points]   # within, where no space is stripped
    assert [tokenizer._spell(text) for text in texts] == [oracle.normalize(text) for text in texts]


@pytest.mark.parametrize("text", HARD_TEXTS, ids=range(len(HARD_TEXTS)))
def test_hard_texts_have_the_ids_of_sentencepiece(both, text):
    assert_same_ids(*both, [text])


def test_random_unicode_has_the_ids_of_sentencepiece(both):
    draw = random.Random(0)
    assert_same_ids(*both, [random_text(draw, draw.randrange(31)) for _ in range(3000)])


def test_decomposed_scripts_have_the_ids_of_sentencepiece(both):
    draw = random.Random(1)
    composed = [point for point in range(0xC0, 0x30000)
                if unicodedata.decomposition(chr(point)) or 0xAC00 <= point < 0xD7A4]
    marks = [chr(point) for point in range(0x300, 0x3100) if unicodedata.combining(chr(point))]
    texts = []
    for _ in range(1500):
        form = draw.choice(["NFD", "NFKD", "NFC"])
        letters = [unicodedata.normalize(form, chr(draw.choice(composed))) for _ in range(draw.randrange(1, 6))]
        texts.append("".join(letter + draw.choice(["", "", draw.choice(marks)]) for letter in letters))
    assert_same_ids(*both, texts)


@settings(max_examples=150)
@given(texts=st.lists(any_text, min_size=10, max_size=30))
def test_any_text_has_the_ids_of_sentencepiece(like_v3, texts):
    assert_same_ids(*like_v3, texts)


@settings(max_examples=200)
@given(pieces=st.dictionaries(st.text("ab▁漢", min_size=1, max_size=4), st.integers(-12, 0), min_size=1),
       texts=st.lists(st.text("ab 漢x", max_size=20), min_size=5, max_size=20), bytes_too=st.booleans(),
       unused=st.sets(st.integers(0, 40)))
def test_any_vocabulary_has_the_ids_of_sentencepiece(sentencepiece, pieces, texts, bytes_too, unused):
    # Whole scores make ties of every kind.
    entries = [(piece, float(score), UNUSED if place in unused else NORMAL)
               for place, (piece, score) in enumerate(pieces.items())]
    entries.append(("z", -3.0, NORMAL))
    data = spm_model(entries, bytes_too=bytes_too)
    tokenizer = minipref.tokenizer.Tokenizer("spm.model", data)
    oracle = sentencepiece.SentencePieceProcessor(model_proto=data)
    assert_same_ids(tokenizer, oracle, texts)
    with pytest.MonkeyPatch.context() as patch:   # the way long texts are read breaks ties as sentencepiece does
        patch.setattr(minipref.tokenizer, "LONG", 0)
        assert tokenizer.encode_batch(texts) == oracle.encode(texts)


@pytest.mark.parametrize("score_of_r", [-9.0, -9.5, -10.5, -11.0])
@pytest.mark.parametrize("long", [False, True])
def test_an_unknown_character_costs_what_it_costs_sentencepiece(sentencepiece, score_of_r, long):
    # 'pqr' is 'pq' 'r', -12 and the score of 'r', or an unknown 'p' and 'qr', -22 and 0.
    data = spm_model([("pq", -12.0, NORMAL), ("r", score_of_r, NORMAL), ("qr", 0.0, NORMAL), ("▁", 0.0, NORMAL),
                      ("unused", -50.0, UNUSED)], bytes_too=True)
    tokenizer = minipref.tokenizer.Tokenizer("spm.model", data)
    ids = tokenizer.encode("pqr" + " " * (LONG if long else 0) + "pqr" * (LONG if long else 0))
    theirs = sentencepiece.SentencePieceProcessor(model_proto=data).encode("pqr")
    assert ids[:len(theirs)] == theirs
    assert ("r" in tokenizer.tokens(theirs)) == (score_of_r > -10.0)


def test_a_long_text_is_summed_up_in_float32_like_sentencepiece_does(sentencepiece):
    # 'abc' is 'a' 'bc' by a margin of .0003, less than what float32 rounds off a sum of some thousands.
    data = spm_model([("a", -1.1, NORMAL), ("bc", -3.2, NORMAL), ("ab", -2.6503, NORMAL), ("c", -1.65, NORMAL),
                      ("x", -3.3, NORMAL), ("▁", -2.7, NORMAL)])
    tokenizer = minipref.tokenizer.Tokenizer("spm.model", data)
    draw = random.Random(5)
    text = "".join(draw.choice(["abc", "x", "xx ", "a"]) for _ in range(60_000))
    ids = tokenizer.encode(text)
    assert ids == sentencepiece.SentencePieceProcessor(model_proto=data).encode(text)
    assert {"bc", "ab"} <= set(tokenizer.tokens(ids))   # it has gone both ways


LONG_TEXTS = {
    "one letter": lambda draw: "a" * 100_000,
    "digits": lambda draw: "".join(draw.choice("0123456789") for _ in range(100_000)),
    "spaces": lambda draw: " " * 100_000 + "x" + " " * 100_000,
    "words": lambda draw: " ".join(draw.choice(docstrings()) for _ in range(2500))[:100_000],
    "no spaces": lambda draw: "".join(draw.choice(docstrings()) for _ in range(2500)).replace(" ", "")[:100_000],
    "Chinese": lambda draw: "".join(chr(draw.randrange(0x4E00, 0xA000)) for _ in range(100_000)),
    "marks": lambda draw: "e" + "".join(chr(draw.randrange(0x300, 0x345)) for _ in range(100_000)),
    "anything": lambda draw: random_text(draw, 100_000),
}


@pytest.mark.parametrize("kind", LONG_TEXTS)
def test_a_hundred_thousand_characters_have_exactly_the_ids_of_sentencepiece(like_v3, kind):
    tokenizer, oracle = like_v3
    text = LONG_TEXTS[kind](random.Random(2))
    assert len(text) >= 90_000
    assert tokenizer.encode(text) == oracle.encode(text)   # here even ties are broken its way


def test_the_length_at_which_a_text_counts_as_long_makes_no_difference(like_v3):
    for length in (LONG - 2, LONG - 1, LONG, LONG + 1):
        assert_same_ids(*like_v3, [("spam and eggs " * 1000)[:length]])


@pytest.mark.parametrize("text", ["the quick brown fox ", "x", "e\u0301", "漢"])
def test_the_time_for_a_text_grows_with_its_length_and_not_with_its_square(like_v3, text):
    def seconds(characters: int) -> float:
        start = time.process_time()
        like_v3[0].encode(text * (characters // len(text)))
        return time.process_time() - start

    seconds(20_000)
    assert seconds(400_000) < 60 * max(seconds(20_000), 0.005)   # 20 times the text; squared, that would be 400


def test_a_batch_has_the_ids_of_its_texts_one_by_one_whatever_was_encoded_before(like_v3, models_dir, monkeypatch):
    monkeypatch.setattr(minipref.tokenizer, "TEXTS_AT_ONCE", 7)
    monkeypatch.setattr(minipref.tokenizer, "CHARACTERS_KEPT", 100)   # so that the table starts anew again and again
    texts = HARD_TEXTS + docstrings()[:300]
    forgetful = load_tokenizer(models_dir / "like_v3")
    assert forgetful.encode_batch(texts) == [like_v3[0].encode(text) for text in texts]
    assert forgetful.encode_batch(texts[::-1]) == [like_v3[0].encode(text) for text in texts][::-1]


def test_real_texts_have_the_ids_of_sentencepiece_with_the_published_model(reference_dir, sentencepiece):
    import pandas

    tokenizer = load_tokenizer(reference_dir / "deberta-v3-small")
    oracle = sentencepiece.SentencePieceProcessor(model_file=str(reference_dir / "deberta-v3-small" / "spm.model"))
    assert (tokenizer.vocab_size, tokenizer.mask_id, tokenizer.pad_id, tokenizer.cls_id, tokenizer.sep_id,
            tokenizer.unk_id) == (128_001, 128_000, 0, 1, 2, 3)
    cells = [cell for path in sorted((reference_dir / "data").glob("*/*.csv"))
             for name, column in pandas.read_csv(path, dtype=str, keep_default_na=False).items()
             if name in ("prompt", "response_a", "response_b") for cell in column]
    assert len(cells) > 20_000
    assert_same_ids(tokenizer, oracle, [turn for cell in cells for turn in turns(cell)])
    draw = random.Random(3)
    assert_same_ids(tokenizer, oracle, HARD_TEXTS + [random_text(draw, draw.randrange(31)) for _ in range(3000)])
    long = " ".join(turn for cell in draw.sample(cells, 300) for turn in turns(cell))[:150_000]
    assert tokenizer.encode(long) == oracle.encode(long)


def test_the_published_model_has_the_sizes_that_the_limits_are_set_by(reference_dir, monkeypatch):
    data = (reference_dir / "deberta-v3-small" / "spm.model").read_bytes()
    vocabulary = minipref.tokenizer._read_spm(data)
    rules = vocabulary.normalize.rules
    assert sum(map(len, vocabulary.pieces)) == 871_140 and max(map(len, vocabulary.pieces)) == 32
    assert len(rules) == 224_711 and max(map(len, rules)) == 4
    normalizer = dict(minipref.tokenizer._fields(data, {3: 2}))[3]
    charsmap = dict(minipref.tokenizer._fields(normalizer, {2: 2}))[2]
    for limit, just_enough in (("MAX_TRIE_STEPS", 262_072), ("MAX_TRIE_BYTES", 177_152)):
        monkeypatch.setattr(minipref.tokenizer, limit, just_enough)
        assert minipref.tokenizer._read_rules(charsmap) == rules
        monkeypatch.setattr(minipref.tokenizer, limit, just_enough - 1)
        with pytest.raises(ValueError, match="damaged"):
            minipref.tokenizer._read_rules(charsmap)
        monkeypatch.undo()


def turns(cell: str) -> list[str]:
    """The turns of a text cell, or the cell as one turn."""
    try:
        value = json.loads(cell)
    except ValueError:
        return [cell]
    return [str(turn) for turn in value if turn is not None] if isinstance(value, list) else [cell]


# ---------------------------------------------------------------------------------------------------------------------
# Text is only text


def test_no_text_becomes_a_special_id(both, trained):
    for tokenizer in (both[0], trained):
        special = {tokenizer.pad_id, tokenizer.cls_id, tokenizer.sep_id, tokenizer.mask_id}
        for id, kind in enumerate(tokenizer._kinds):
            if kind == NORMAL:
                continue
            name = tokenizer.tokens([id])[0]
            for text in (name, f" {name}", f"{name}{name}", f"x{name}y", f" {id}", f"▁{name}▁"):
                ids = tokenizer.encode(text)
                assert not special & set(ids), text
                # All of these are ASCII characters that the texts are full of, so none is unknown.
                assert tokenizer._byte_ids == [] or not set(tokenizer._byte_ids) & set(ids), text


@given(text=any_text)
def test_special_ids_never_come_out_of_any_text(trained, text):
    special = {trained.pad_id, trained.cls_id, trained.sep_id, trained.mask_id, trained.unk_id}
    assert not special & set(trained.encode(text))


@pytest.mark.parametrize("text, read_as, count", [
    ("a\ud800b", "a\ufffdb", 1), ("\udfff", "\ufffd", 1), ("\udc00\ud800", "\ufffd\ufffd", 1),
    ("\ud83d\ude00", "\U0001f600", 0), ("\ud83d\ud83d\ude00", "\ufffd\U0001f600", 1),
    ("\ud83d \ude00", "\ufffd \ufffd", 1), ("plain", "plain", 0), ("\ufffd", "\ufffd", 0),
])
def test_lone_surrogates_are_replaced_and_the_texts_with_them_counted(like_v3, models_dir, text, read_as, count):
    tokenizer = load_tokenizer(models_dir / "not_normalized")   # the one in which U+FFFD is not a space
    assert tokenizer.encode(text) == tokenizer.encode(read_as)
    assert tokenizer.replaced_surrogates == count
    tokenizer.encode_batch([text, "in between", text, ""])
    assert tokenizer.replaced_surrogates == 3 * count


def test_what_is_not_a_text_is_refused_not_skipped(like_v3):
    for wrong in (None, 3.5, float("nan"), b"bytes", ["list"]):
        with pytest.raises(TypeError, match="must be a str"):
            like_v3[0].encode(wrong)


# ---------------------------------------------------------------------------------------------------------------------
# Ids and names


def test_v3s_special_tokens_are_where_v3_has_them(like_v3):
    tokenizer, oracle = like_v3
    assert [tokenizer.pad_id, tokenizer.cls_id, tokenizer.sep_id, tokenizer.unk_id] == [0, 1, 2, 3]
    assert tokenizer.mask_id == len(oracle) == tokenizer.vocab_size - 1
    assert tokenizer.tokens([0, 1, 2, 3, 4, 259, tokenizer.mask_id]) == [
        "[PAD]", "[CLS]", "[SEP]", "[UNK]", "<0x00>", "<0xFF>", "[MASK]"]


def test_special_tokens_by_their_other_names_are_found_and_those_missing_come_after_the_pieces(tmp_path):
    (tmp_path / "spm.model").write_bytes(spm_model(
        [("<pad>", 0.0, CONTROL), ("</s>", 0.0, CONTROL), ("a", -1.0, NORMAL), ("<s>", -2.0, NORMAL)]))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.tokens([tokenizer.pad_id, tokenizer.sep_id]) == ["<pad>", "</s>"]
    assert tokenizer.tokens([tokenizer.cls_id, tokenizer.mask_id]) == ["[CLS]", "[MASK]"]   # '<s>' is text here
    assert [tokenizer.cls_id, tokenizer.mask_id] == [5, 6]
    assert tokenizer.vocab_size == 7


def test_decode_reads_like_the_text(like_v3, trained):
    for tokenizer in (like_v3[0], trained):
        for text in ("The quick brown fox.", "größer 漢字 😀!", "a [SEP] b <0x41>"):
            assert tokenizer.decode(tokenizer.encode(text)) == text
        ids = [tokenizer.cls_id, *tokenizer.encode("yes"), tokenizer.sep_id]
        assert tokenizer.decode(ids) == "[CLS] yes[SEP]"
        assert tokenizer.decode(tokenizer.encode("😀")[-4:-1]) == "\ufffd"   # three bytes of four
        assert tokenizer.decode([]) == ""
        assert "".join(tokenizer.tokens(tokenizer.encode("one two"))) == "▁one▁two"
        for wrong in (-1, tokenizer.vocab_size):
            with pytest.raises(IndexError, match="is outside"):
                tokenizer.decode([wrong])


def test_ids_may_come_as_numbers_of_numpy_and_torch(like_v3):
    import torch

    ids = like_v3[0].encode("one two")
    assert like_v3[0].decode(np.array(ids)) == like_v3[0].decode(torch.tensor(ids)) == "one two"


# ---------------------------------------------------------------------------------------------------------------------
# Saving and loading


def test_what_is_saved_is_loaded_as_the_same_tokenizer(like_v3, trained, tmp_path):
    texts = HARD_TEXTS + docstrings()[:100]
    for number, tokenizer in enumerate((like_v3[0], trained)):
        folder = tmp_path / str(number) / "new"
        tokenizer.save(folder)
        tokenizer.save(folder)   # once more, over itself
        again = load_tokenizer(folder)
        assert again.fingerprint == tokenizer.fingerprint and len(again.fingerprint) == 64
        assert again.vocab_size == tokenizer.vocab_size and again.mask_id == tokenizer.mask_id
        assert again.encode_batch(texts) == tokenizer.encode_batch(texts)
        assert len(list(folder.iterdir())) == 2   # nothing half-written is left
        pickled = pickle.loads(pickle.dumps(tokenizer))
        assert pickled.encode_batch(texts) == tokenizer.encode_batch(texts)


def test_a_failed_save_leaves_what_was_there(like_v3, trained, tmp_path, monkeypatch):
    like_v3[0].save(tmp_path)
    with pytest.raises(InputError, match=r"spm\.model: another tokenizer, which would be read instead"):
        trained.save(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for step in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, step, lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
            with pytest.raises(InputError, match="cannot be written: No space left on device"):
                like_v3[0].save(tmp_path)
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    with pytest.raises(InputError, match="cannot be written"):
        like_v3[0].save(tmp_path / "spm.model" / "below-a-file")


# ---------------------------------------------------------------------------------------------------------------------
# tokenizer.json


def hugging_face_json(model: Path, *, charsmap: bytes, **changes) -> dict:
    """The tokenizer.json that transformers 4 made of a DeBERTa-v3 spm.model, with some of its keys changed."""
    vocabulary = load_tokenizer(model)._vocabulary
    entries = [[piece, score] for piece, score in zip(vocabulary.pieces, vocabulary.scores)]
    specials = {0: "[PAD]", 1: "[CLS]", 2: "[SEP]", 3: "[UNK]", len(entries): "[MASK]"}
    file = {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [{"id": id, "content": name, "single_word": False, "lstrip": False, "rstrip": False,
                          "normalized": False, "special": True} for id, name in specials.items()],
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Strip", "strip_left": True, "strip_right": True},
            {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(charsmap).decode()},
            {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "}]},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}]},
        "post_processor": None, "decoder": None,
        "model": {"type": "Unigram", "unk_id": 3, "vocab": entries, "byte_fallback": False},
    }
    return {**file, **changes}


@pytest.fixture(scope="session")
def nmt_nfkc(sentencepiece) -> bytes:
    """The character map nmt_nfkc, as sentencepiece has it inside."""
    spec = sentencepiece.SentencePieceNormalizer(rule_name="nmt_nfkc").serialized_normalizer_spec()
    return dict(minipref.tokenizer._fields(spec, minipref.tokenizer.NORMALIZER_FIELDS))[2]


@pytest.fixture(scope="session")
def v3_json(models_dir, nmt_nfkc) -> dict:
    return hugging_face_json(models_dir / "like_v3", charsmap=nmt_nfkc)


def write_json(folder: Path, file: object) -> Path:
    (folder / "tokenizer.json").write_text(json.dumps(file), encoding="utf-8")
    return folder


def test_a_hugging_face_tokenizer_json_gives_the_ids_of_the_spm_model_it_was_made_of(like_v3, v3_json, tmp_path):
    tokenizer = load_tokenizer(write_json(tmp_path, v3_json))
    draw = random.Random(4)
    texts = HARD_TEXTS + docstrings() + [random_text(draw, draw.randrange(31)) for _ in range(1000)] + ["ab" * LONG]
    assert tokenizer.encode_batch(texts) == like_v3[0].encode_batch(texts)
    assert (tokenizer.mask_id, tokenizer.vocab_size) == (like_v3[0].mask_id, like_v3[0].vocab_size)


def test_the_usual_pipeline_of_the_library_is_not_enough(like_v3, v3_json):
    # The reason for half of minipref/tokenizer.py. Should this fail one day, that half can go.
    usual = LibraryTokenizer.from_str(json.dumps({**v3_json, "model": {**v3_json["model"], "byte_fallback": True}}))
    differ = [text for text in HARD_TEXTS if usual.encode(text).ids != like_v3[1].encode(text)]
    assert "[CLS] [SEP] [PAD] [UNK] [MASK]" in differ                  # specials
    assert any(text.startswith("<0x41>") for text in differ)           # bytes
    assert any(text.startswith("か\u3099") for text in differ)         # the character map


def test_added_tokens_have_their_ids_and_no_text_becomes_one(like_v3, v3_json, tmp_path):
    first_free = len(like_v3[1]) + 1
    newline = {"id": first_free + 3, "content": "\n", "special": False, "normalized": False}
    word = {"id": like_v3[1].piece_to_id("▁the"), "content": "▁the", "special": True}
    file = {**v3_json, "added_tokens": [*v3_json["added_tokens"], newline, word]}
    tokenizer = load_tokenizer(write_json(tmp_path, file))
    assert tokenizer.tokens([first_free, first_free + 3]) == [f"[no token {first_free}]", "\n"]
    assert tokenizer.vocab_size == first_free + 4
    assert word["id"] not in tokenizer.encode("the")   # special now, so no longer for text
    assert tokenizer.encode("a\nb") == like_v3[0].encode("a\nb")


def test_special_pieces_that_the_file_forgot_to_list_are_special_all_the_same(like_v3, v3_json, tmp_path):
    tokenizer = load_tokenizer(write_json(tmp_path, {**v3_json, "added_tokens": []}))
    assert tokenizer.encode("[SEP] [CLS]") == like_v3[0].encode("[SEP] [CLS]")
    assert [tokenizer.pad_id, tokenizer.cls_id, tokenizer.sep_id] == [0, 1, 2]


@pytest.mark.parametrize("spelling, in_front", [
    ({"type": "Metaspace", "replacement": "▁", "add_prefix_space": True}, True),
    ({"type": "Metaspace", "replacement": "▁", "add_prefix_space": False}, False),
    ({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "never", "split": False}, False),
    ({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first"}, True),
    ({"type": "Sequence", "pretokenizers": [
        {"type": "WhitespaceSplit"}, {"type": "Metaspace", "replacement": "▁", "add_prefix_space": True}]}, True),
])
def test_older_spellings_of_the_space_in_front_are_read(like_v3, v3_json, tmp_path, spelling, in_front):
    tokenizer = load_tokenizer(write_json(tmp_path, {**v3_json, "pre_tokenizer": spelling}))
    assert (tokenizer.tokens(tokenizer.encode("the"))[0][0] == "▁") == in_front


# ---------------------------------------------------------------------------------------------------------------------
# transformers


def test_transformers_reads_a_saved_vocabulary_of_our_own_with_the_same_ids(trained, tmp_path):
    transformers = pytest.importorskip("transformers")
    trained.save(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "deberta-v2"}')
    for theirs in (transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path),
                   transformers.AutoTokenizer.from_pretrained(tmp_path)):
        for text in [*docstrings(), "Größe 漢字 😀", "tabs\tand\nlines", "ﬁne  spaces ", "e\u0301"]:
            assert theirs(text, add_special_tokens=False)["input_ids"] == trained.encode(text), text
        assert [theirs.pad_token_id, theirs.cls_token_id, theirs.sep_token_id, theirs.unk_token_id,
                theirs.mask_token_id] == [0, 1, 2, 3, trained.mask_id]
        pair = theirs("one", "two")["input_ids"]
        assert pair == [1, *trained.encode("one"), 2, *trained.encode("two"), 2]
        assert theirs.decode(trained.encode("one (two) 漢!")) == "one (two) 漢!"


def test_the_tokenizer_json_of_transformers_5_is_read_as_it_is(like_v3, tmp_path):
    transformers = pytest.importorskip("transformers")
    vocabulary = like_v3[0]._vocabulary
    made = transformers.DebertaV2Tokenizer(vocab=list(zip(vocabulary.pieces, vocabulary.scores)))
    made.save_pretrained(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    texts = docstrings() + ["two  spaces\nand\tlines ", "e\u0301", "\u2003wide\u2003\u2003space"]
    theirs = {text: made(text, add_special_tokens=False)["input_ids"] for text in texts}
    without_unknown = [text for text in texts if made.unk_token_id not in theirs[text]]   # they have no bytes for it
    assert len(without_unknown) > 0.9 * len(docstrings())
    assert tokenizer.encode_batch(without_unknown) == [theirs[text] for text in without_unknown]
    assert tokenizer.mask_id == made.mask_token_id


# ---------------------------------------------------------------------------------------------------------------------
# A vocabulary of one's own


def test_a_trained_vocabulary_has_the_order_of_v3(trained):
    names = trained.tokens(range(trained.vocab_size))
    assert names[:4] == ["[PAD]", "[CLS]", "[SEP]", "[UNK]"] and names[4:260] == list(BYTE_PIECES)
    assert names[-1] == "[MASK]" and len(names) == len(set(names)) == 1500 == trained.vocab_size
    assert [trained.pad_id, trained.cls_id, trained.sep_id, trained.unk_id, trained.mask_id] == [0, 1, 2, 3, 1499]
    pieces, scores = names[260:-1], trained._vocabulary.scores[260:-1]
    assert not any("▁" in piece[1:] for piece in pieces) and max(map(len, pieces)) <= 16
    assert scores == sorted(scores, reverse=True) and "▁the" in pieces[:10]


def test_pieces_of_a_trained_vocabulary_do_not_join_letters_digits_and_signs_while_there_are_others(trained):
    def is_mixed(piece: str) -> bool:
        kinds = ("letter" if c.isalpha() else "digit" if c.isnumeric() else "sign" for c in piece.lstrip("▁"))
        return len(set(kinds)) > 1

    assert not any(map(is_mixed, train_vocabulary(docstrings(), 800).tokens(range(260, 799))))
    mixed = list(map(is_mixed, trained.tokens(range(260, trained.vocab_size - 1))))
    assert sum(mixed) < 100                                              # these texts have not enough of the others


def test_a_trained_vocabulary_shortens_what_it_was_trained_on(trained):
    text = " ".join(docstrings()[:500])
    assert len(trained.encode(text)) < len(text) / 2.5
    larger = train_vocabulary(docstrings(), 2500)
    assert len(larger.encode(text)) < 0.9 * len(trained.encode(text))


def test_the_same_texts_give_the_same_vocabulary_in_any_order(trained):
    assert train_vocabulary(docstrings()[::-1], 1500).fingerprint == trained.fingerprint


def test_rare_characters_are_bytes_and_frequent_ones_are_pieces():
    texts = [*docstrings()[:1000], "é" * 200, "漢"]
    tokenizer = train_vocabulary(texts, 800)
    assert "é" in tokenizer.tokens(range(800)) and "漢" not in tokenizer.tokens(range(800))
    assert tokenizer.tokens(tokenizer.encode("漢")) == ["▁", "<0xE6>", "<0xBC>", "<0xA2>"]
    assert "漢" in train_vocabulary(texts, 800, character_coverage=1.0).tokens(range(800))


def test_a_trained_vocabulary_normalizes_like_nmt_nfkc_where_unicode_has_not_changed(trained, sentencepiece):
    oracle = sentencepiece.SentencePieceNormalizer(rule_name="nmt_nfkc")
    category = unicodedata.ucd_3_2_0.category
    points = [chr(point) for point in range(1, 0x30000) if category(chr(point)) not in ("Cn", "Cs")]
    assert len(points) > 90_000
    # sentencepiece 0.2.3 keeps the joiner U+200D, which v3's map and the library make a space.
    assert [point for point in points if trained._spell(point) != oracle.normalize(point)] == ["\u200d", "\uff5e"]
    for text in ("e\u0301", "か\u3099", "\u1112\u1161\u11ab", "a\u0323\u0302", "ｶ\u3099", "  ﬁ\n\t½ ™\u00a0 "):
        assert trained._spell(text) == oracle.normalize(text), text
    assert trained._spell("a\u0315\u0300b") != oracle.normalize("a\u0315\u0300b")   # NFKC sorts marks, no rule does


def test_a_trained_vocabulary_normalizes_all_characters_but_two_like_the_published_model(trained, reference_dir):
    published = load_tokenizer(reference_dir / "deberta-v3-small")
    points = [chr(point) for point in range(1, 0x110000) if not 0xD800 <= point < 0xE000]
    differ = [point for point in points if trained._spell(point) != published._spell(point)]
    assert differ == ["\uff5e", "\U0001f23b"]


@pytest.mark.parametrize("texts, size, message", [
    (["abc abd abe"] * 9, 261, "a vocabulary of 261 for texts of 5 different characters; expected more than 266"),
    (["abc abd abe"] * 9, 5000, "texts that have .* pieces; expected 4,739, for a vocabulary of 5,000"),
    ([], 1000, "for texts of 0 different characters"), (["", " \n"], 1000, "for texts of 0 different characters"),
])
def test_a_vocabulary_that_cannot_be_is_refused(texts, size, message):
    with pytest.raises(InputError, match=message):
        train_vocabulary(texts, size)


# ---------------------------------------------------------------------------------------------------------------------
# Files that are wrong


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
    """A sentencepiece model: [UNK], the bytes if wanted, and the entries (piece, score, kind)."""
    entries = [("[UNK]", 0.0, UNKNOWN), *[(name, 0.0, BYTE) for name in BYTE_PIECES if bytes_too], *entries]
    pieces = [field(1, piece.encode()) + field(2, score) + field(3, kind) for piece, score, kind in entries]
    return (b"".join(field(1, piece) for piece in pieces) + field(2, field(3, 1) + field(35, int(bytes_too)) + trainer)
            + field(3, field(1, b"test") + (field(2, charsmap) if charsmap else b"") + normalizer))


A = ("a", -1.0, NORMAL)


def charsmap_of(units: dict[int, int], targets: bytes = b"x\0", size: int = 256) -> bytes:
    """A precompiled_charsmap: the units of its trie by their places, all others 0."""
    return struct.pack(f"<I{size}I", 4 * size, *(units.get(place, 0) for place in range(size))) + targets


def one_rule(byte: int, target: int = 0) -> dict[int, int]:
    """The trie of a rule for one byte: its unit, at the place of the byte as the root's base is 0, and its leaf's."""
    leaf = byte ^ 5
    return {byte: 5 << 10 | 1 << 8 | byte, leaf: 1 << 31 | target}


WRONG_MODELS = {   # name: (bytes, what the message says)
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
    "a wire type that is none": (b"\x4f", "wire type 7, which there is not"),
    "pieces as numbers": (field(1, 7), "field 1 is of wire type 0 instead of 2"),
    "a score as text": (field(1, field(1, b"a") + field(2, b"-1")), "field 2 is of wire type 2 instead of 5"),
    "a piece that is not UTF-8": (field(1, field(1, b"\xff\xfe")), "codec can't decode"),
    "an empty piece": (spm_model([A, ("", -1.0, NORMAL)]), "piece 2 has 0 characters"),
    "a piece without end": (spm_model([A, ("x" * 1000, -1.0, NORMAL)]), "piece 2 has 1,000 characters"),
    "a piece twice": (spm_model([A, A]), "pieces 1 and 2 are both 'a'"),
    "a score that is none": (spm_model([("a", math.nan, NORMAL)]), "score of piece 1 is nan"),
    "an endless score": (spm_model([("a", -math.inf, NORMAL)]), "score of piece 1 is -inf"),
    "a positive score": (spm_model([("a", 2.0, NORMAL)]), "score of piece 1 is 2.0"),
    "a kind that is none": (spm_model([("a", -1.0, 9)]), "piece 1 is of kind 9"),
    "two unknown pieces": (spm_model([A, ("u", 0.0, UNKNOWN)]), "2 unknown pieces"),
    "no unknown piece": (field(1, field(1, b"a")) + field(2, b"") + field(3, b""), "0 unknown pieces"),
    "nothing for text": (spm_model([("[CLS]", 0.0, CONTROL)]), "no piece for text"),
    "user-defined pieces": (spm_model([A, ("u", 0.0, USER_DEFINED)]), "'u', is user-defined"),
    "some bytes": (spm_model([A, ("<0x41>", 0.0, BYTE)], trainer=field(35, 1)), "1 byte pieces that are not"),
    "bytes that are not": (spm_model([A, ("q", 0.0, BYTE)], bytes_too=True), "257 byte pieces that are not"),
    "bytes without fallback": (spm_model([A, ("<0x41>", 0.0, BYTE)]), "byte_fallback is False and 1 pieces are bytes"),
    "fallback without bytes": (spm_model([A], trainer=field(35, 1)), "byte_fallback is True and 0 pieces are bytes"),
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
    "a trie with a cycle": (spm_model([A], charsmap=charsmap_of({97: 97 << 10 | 97})), "is not one"),
    # From base 4 k two children, at 4 k ^ 1 and ^ 2, lead to base 4 k + 4: 2^60 ways through 120 units.
    "a trie of a quintillion rules": (spm_model([A], charsmap=charsmap_of(
        {4 * k ^ byte: (4 * k ^ byte ^ 4 * k + 4) << 10 | byte for k in range(60) for byte in (1, 2)})), "is not one"),
    "a trie that leads outside": (spm_model([A], charsmap=charsmap_of({97: 999 << 10 | 97})), "is not one"),
    "a target outside": (spm_model([A], charsmap=charsmap_of(one_rule(97, target=2))), "no target starts at byte 2"),
    "a target without end": (spm_model([A], charsmap=charsmap_of(one_rule(97), b"xyz")), "no target starts at byte 0"),
    "a target that is not UTF-8": (spm_model([A], charsmap=charsmap_of(one_rule(97), b"\xff\0")), "codec can't decode"),
    "a source that is not UTF-8": (spm_model([A], charsmap=charsmap_of(one_rule(200))), "codec can't decode"),
    "a rule that gives two spaces": (spm_model([A], charsmap=charsmap_of(one_rule(97), b"x  y\0")), "makes two spaces"),
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
    assert tokenizer._vocabulary.normalize.rules == {"a": "x"}
    assert tokenizer.tokens(tokenizer.encode("a")) == ["<0xE2>", "<0x96>", "<0x81>", "x"]


def changed(**keys):
    """A change to the content of a good tokenizer.json: these keys anew."""
    return lambda file: {**file, **keys}


def model(vocab, unk_id=0) -> dict:
    return {"model": {"type": "Unigram", "vocab": vocab, "unk_id": unk_id}, "added_tokens": []}


def added(*tokens: dict) -> dict:
    return {"added_tokens": list(tokens)}


REPLACE = {"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": ""}
PUNCTUATION = {"type": "Sequence",
               "pretokenizers": [{"type": "Punctuation"}, {"type": "Metaspace", "replacement": "▁"}]}
DAMAGED_MAP = {"type": "Precompiled", "precompiled_charsmap": "AAAA"}
WRONG_JSON = {   # name: (what is made of a good file, what the message says)
    "a list": (lambda file: [file], "the file is ["),
    "no model": (lambda file: {}, "model is None"),
    "BPE": (changed(model={"type": "BPE", "vocab": {}, "merges": []}), "a model of type 'BPE'"),
    "WordPiece": (changed(model={"type": "WordPiece"}), "a model of type 'WordPiece'"),
    "a vocabulary by name": (changed(**model({"a": 1})), "model.vocab is {'a': 1}"),
    "no scores": (changed(**model(["a", "b"])), "entry 0 of model.vocab is 'a'"),
    "scores as text": (changed(**model([["a", "-1"]])), "entry 0 of model.vocab is ['a', '-1']"),
    "scores that are true": (changed(**model([["a", True]])), "entry 0 of model.vocab is ['a', True]"),
    "a score that is none": (changed(**model([["u", 0], ["a", math.nan]])), "score of piece 1 is nan"),
    "a score too large": (changed(**model([["u", 0], ["a", 10 ** 400]])), "too large"),
    "no unknown": (changed(**model([["a", -1]], None)), "model.unk_id is None"),
    "an unknown that is true": (changed(**model([["a", -1]], True)), "model.unk_id is True"),
    "an unknown outside": (changed(**model([["a", -1]], 10 ** 9)), "0 unknown pieces"),
    "half a character": (changed(**model([["u", 0], ["\ud800", -1]])), "piece 1, '\\ud800', is not Unicode"),
    "added tokens by name": (changed(added_tokens={"a": 1}), "added_tokens is {'a': 1}"),
    "an added id far away": (changed(**added({"id": 10 ** 9, "content": "x"})), "added token 1000000000 beside"),
    "a negative added id": (changed(**added({"id": -1, "content": "x"})), "added token -1 beside"),
    "an added token without a name": (changed(**added({"id": 1})), "added token 1 is None"),
    "an added token elsewhere": (changed(**added({"id": 1, "content": "[SEP]"})), "added token 1 is '[SEP]'"),
    "lower case": (changed(normalizer={"type": "Lowercase"}), "the normalizer {'type': 'Lowercase'}"),
    "another replacement": (changed(normalizer=REPLACE), "the normalizer {'type': 'Replace'"),
    "a normalizer that is none": (changed(normalizer=3), "one of the normalizers is 3"),
    "a map that is not base64": (changed(normalizer={"type": "Precompiled", "precompiled_charsmap": "***"}), "base64"),
    "a map that is damaged": (changed(normalizer=DAMAGED_MAP), "a character map of 3 bytes"),
    "split at punctuation": (changed(pre_tokenizer=PUNCTUATION), "the pre-tokenizer {'type': 'Sequence'"),
    "no pre-tokenizer": (changed(pre_tokenizer=None), "the pre-tokenizer None"),
    "another space": (changed(pre_tokenizer={"type": "Metaspace", "replacement": "_"}), "the pre-tokenizer {'type'"),
}


@pytest.mark.parametrize("name", WRONG_JSON)
def test_a_wrong_tokenizer_json_is_refused_in_one_line_that_names_it(tmp_path, name, trained):
    change, message = WRONG_JSON[name]
    write_json(tmp_path, change(json.loads(trained._data)))
    with pytest.raises(InputError, match=r"tokenizer\.json: .*; expected") as refused:
        load_tokenizer(tmp_path)
    assert message in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize("data", [b"", b"{", b"[" * 200_000, b"\xff\xfe{}", b"null", b"{}{}", bytes(100), b"1" * 5000],
                         ids=range(8))
def test_a_tokenizer_json_that_is_not_json_is_refused(tmp_path, data):
    (tmp_path / "tokenizer.json").write_bytes(data)
    with pytest.raises(InputError, match=r"tokenizer\.json: "):
        load_tokenizer(tmp_path)


def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"no tokenizer here; expected a folder with spm\.model or tokenizer\.json"):
        load_tokenizer(tmp_path)
    with pytest.raises(InputError, match="not a folder"):
        load_tokenizer(tmp_path / "nowhere")
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="not a folder"):
        load_tokenizer(tmp_path / "file")


@pytest.mark.parametrize("name", ["spm.model", "tokenizer.json"])
def test_what_is_no_ordinary_file_is_refused_and_never_waited_for(tmp_path, name):
    path = tmp_path / name
    path.mkdir()
    with pytest.raises(InputError, match=f"{name}: not a file"):
        load_tokenizer(tmp_path)
    path.rmdir()
    os.mkfifo(path)
    with pytest.raises(InputError, match=f"{name}: not a file"):
        load_tokenizer(tmp_path)
    path.unlink()
    path.symlink_to(tmp_path / "gone")
    with pytest.raises(InputError, match=f"{name}: not a file"):
        load_tokenizer(tmp_path)
    path.unlink()
    with path.open("wb") as file:
        file.truncate(10 << 30)   # ten gigabytes of nothing
    with pytest.raises(InputError, match=f"{name}: more than"):
        load_tokenizer(tmp_path)


def test_a_damaged_spm_model_is_not_passed_over_for_the_other_file(trained, tmp_path):
    trained.save(tmp_path)
    (tmp_path / "spm.model").write_bytes(b"damaged")
    with pytest.raises(InputError, match=r"spm\.model"):
        load_tokenizer(tmp_path)


def test_a_model_that_is_cut_off_anywhere_is_refused(models_dir, tmp_path):
    whole = (models_dir / "like_v3" / "spm.model").read_bytes()
    for cut in [*range(0, len(whole), len(whole) // 64), *range(len(whole) - 40, len(whole))]:
        (tmp_path / "spm.model").write_bytes(whole[:cut])
        with pytest.raises(InputError, match=r"spm\.model"):
            load_tokenizer(tmp_path)


def load_or_refuse(name: str, data: bytes) -> None:
    """Any bytes are a tokenizer that can encode, or a ValueError with one line, which load_tokenizer passes on."""
    try:
        tokenizer = minipref.tokenizer.Tokenizer(name, data)
    except (ValueError, OverflowError, RecursionError) as problem:
        assert str(problem)
    else:
        ids = tokenizer.encode("An ｅxample: e\u0301 漢 [SEP]")
        assert all(0 <= id < tokenizer.vocab_size for id in ids)


def edited(data: bytes, edits: list[tuple[int, int, bytes]]) -> bytes:
    """Each edit (place, length, new) puts `new` in the place of `length` bytes."""
    for place, length, new in edits:
        place %= len(data) + 1
        data = data[:place] + new + data[place + length:]
    return data


edits = st.lists(st.tuples(st.integers(0, 1 << 20), st.integers(0, 3), st.binary(max_size=3)), min_size=1, max_size=4)
small_trie = charsmap_of(one_rule(97) | one_rule(0x65, 2), b"x\0yy\0", size=128)
small_model = spm_model([A, ("x", -2.0, NORMAL), ("▁", -2.5, NORMAL), ("ab", -3.0, NORMAL)], charsmap=small_trie)


@settings(max_examples=600)
@given(edits=edits)
def test_the_protobuf_reader_takes_any_damage(edits):
    load_or_refuse("spm.model", edited(small_model, edits))


@settings(max_examples=600)
@given(edits=edits)
def test_the_reader_of_the_character_map_takes_any_damage(edits):
    load_or_refuse("spm.model", spm_model([A], charsmap=edited(small_trie, edits)))


@settings(max_examples=300)
@given(data=st.binary(max_size=300))
def test_the_readers_take_any_bytes(data):
    load_or_refuse("spm.model", data)
    load_or_refuse("tokenizer.json", data)


scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
any_json = st.recursive(scalars, lambda inner: st.lists(inner, max_size=3)
                        | st.dictionaries(st.text(max_size=5), inner, max_size=3), max_leaves=6)


@settings(max_examples=300)
@given(value=any_json, place=st.integers(0, 1 << 16))
def test_the_reader_of_tokenizer_json_takes_any_value_anywhere(value, place):
    file = {"added_tokens": [{"id": 3, "content": "[MASK]", "special": True}],
            "normalizer": {"type": "Sequence", "normalizers": [
                {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(small_trie).decode()},
                {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "}, {"type": "Strip"}]},
            "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always"},
            "model": {"type": "Unigram", "unk_id": 0, "vocab": [["[UNK]", 0.0], ["a", -1.0], ["▁", -2]]}}
    load_or_refuse("tokenizer.json", json.dumps(file).encode())
    places = list(containers(file))
    container, key = places[place % len(places)]
    container[key] = value
    load_or_refuse("tokenizer.json", json.dumps(file).encode())


def containers(value: object):
    """(container, key) of everything within a JSON value."""
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in entries:
        yield value, key
        yield from containers(inner)
