"""The tokenizer gives sentencepiece's ids for any text, and reads any tokenizer.json or gives a one-line error.

sentencepiece is the reference: it trains models on the docstrings of the standard library and encodes with them. If two
segmentations have the same score, it may choose either (see `minipref/tokenizer.py`); `assert_same_ids` accepts other
ids than sentencepiece's only if their score is the same.
"""

import base64
import io
import json
import math
import os
import pickle
import random
import time
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small import BUNDLED
from spm import SMALL_TRIE, docstrings, load_or_refuse, spm_model, trained_tokenizer
from tokenizers import Tokenizer as LibraryTokenizer

from minipref.runtime import InputError
from minipref.sentencepiece_model import BYTE, CHARSMAP, CONTROL, NORMAL, UNKNOWN, UNUSED, read_fields
from minipref.sentencepiece_model import read_sentencepiece_model as read_model
from minipref.tokenizer import CACHED_WORD_LENGTH, Tokenizer, load_tokenizer

V3_ORDER = {"pad_id": 0, "bos_id": 1, "eos_id": 2, "unk_id": 3,
            "pad_piece": "[PAD]", "bos_piece": "[CLS]", "eos_piece": "[SEP]", "unk_piece": "[UNK]"}
MODELS = {   # training options of sentencepiece, without the ids of special pieces
    "like_v3": {"byte_fallback": True},
    "without_bytes": {},
    "across_words": {"byte_fallback": True, "split_by_whitespace": False},
    "not_normalized": {"byte_fallback": True, "normalization_rule_name": "identity", "add_dummy_prefix": False},
    "spaces_kept": {"byte_fallback": True, "remove_extra_whitespaces": False},
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
    """Random characters: a third from all of Unicode, a third below U+10000, a third below U+0700."""
    top = draw.choice([0x110000, 0x10000, 0x700])
    points = [draw.randrange(top) for _ in range(length)]
    return "".join(chr(point) for point in points if not 0xD800 <= point < 0xE000)


# All of Unicode and, twice as often, characters of pieces and rules.
any_text = st.lists(st.one_of(
    st.text(max_size=8), st.sampled_from([" ", "▁", "[SEP]", "<0x41>", "\u0301", "\u3099", "か", "\u1161", "ing"]),
    st.text(st.sampled_from("abet  \u0300\u0301\u0323\u0327\u304b\u3099\u1100\u1161\u11a8\uff76\uff9e"), max_size=8),
)).map("".join)


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
    return trained_tokenizer()


def sum_of_scores(oracle, spelled: str, ids: list[int]) -> float:
    """The score that the Viterbi search maximises. Characters that no piece covers were unknown."""
    pieces = [id for id in ids if not (oracle.is_byte(id) or oracle.is_unknown(id))]
    ordinary = [oracle.get_score(id) for id in range(oracle.vocab_size())
                if not (oracle.is_byte(id) or oracle.is_unknown(id) or oracle.is_control(id) or oracle.is_unused(id))]
    unknown = len(spelled) - sum(len(oracle.id_to_piece(id)) for id in pieces)
    return math.fsum([oracle.get_score(id) for id in pieces] + [min(ordinary) - 10.0] * unknown)


def assert_same_ids(tokenizer, oracle, texts: list[str]) -> None:
    """Our ids are sentencepiece's, or have the same score within float32's precision."""
    for text, ours, theirs in zip(texts, tokenizer.encode_batch(texts), oracle.encode(texts), strict=True):
        if ours != theirs:
            spelled = oracle.normalize(text)
            sums = [sum_of_scores(oracle, spelled, ids) for ids in (ours, theirs)]
            equal = abs(sums[0] - sums[1]) <= 4 * np.spacing(np.float32(abs(sums[1])))
            assert equal, f"{text[:200]!r}: {tokenizer.tokens(ours)[:40]} and {oracle.id_to_piece(theirs)[:40]}, {sums}"


# ---------------------------------------------------------------------------------------------------------------------
# The same ids as sentencepiece


def test_the_reader_finds_the_pieces_scores_and_types_that_sentencepiece_finds(both):
    tokenizer, oracle = both
    vocabulary = read_model(tokenizer._data)
    types = [UNKNOWN if oracle.is_unknown(id) else CONTROL if oracle.is_control(id) else
             UNUSED if oracle.is_unused(id) else BYTE if oracle.is_byte(id) else NORMAL for id in range(len(oracle))]
    assert vocabulary.pieces == oracle.id_to_piece(list(range(len(oracle))))
    assert vocabulary.scores == oracle.get_score(list(range(len(oracle))))
    assert vocabulary.types == types


def test_every_rule_of_the_character_map_is_what_sentencepiece_applies(both):
    tokenizer, oracle = both
    sources = [source for charsmap in tokenizer._vocabulary.normalizers for source in charsmap.rules][::11]
    points = [chr(point) for point in range(0x21, 0xFFFE, 3) if not 0xD800 <= point < 0xE000]
    texts = [f"a{text}b" for text in sources + points]   # within, where no space is stripped
    words = [tokenizer._pre_tokenize(tokenizer._normalize(text)) for text in texts]
    assert list(map("".join, words)) == [oracle.normalize(text) for text in texts]


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
    assert_same_ids(Tokenizer("spm.model", data), sentencepiece.SentencePieceProcessor(model_proto=data), texts)


@pytest.mark.parametrize("score_of_r", [-9.0, -9.5, -10.5, -11.0])
def test_an_unknown_character_costs_what_it_costs_sentencepiece(sentencepiece, score_of_r):
    # 'pqr' is 'pq' 'r', -12 and the score of 'r', or an unknown 'p' and 'qr', -22 and 0.
    data = spm_model([("pq", -12.0, NORMAL), ("r", score_of_r, NORMAL), ("qr", 0.0, NORMAL), ("▁", 0.0, NORMAL),
                      ("unused", -50.0, UNUSED)], bytes_too=True)
    tokenizer = Tokenizer("spm.model", data)
    ids = tokenizer.encode("pqr")
    assert ids == sentencepiece.SentencePieceProcessor(model_proto=data).encode("pqr")
    assert ("r" in tokenizer.tokens(ids)) == (score_of_r > -10.0)


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
def test_a_hundred_thousand_characters_have_the_ids_of_sentencepiece(like_v3, kind):
    text = LONG_TEXTS[kind](random.Random(2))
    assert len(text) >= 90_000
    assert_same_ids(*like_v3, [text])


@pytest.mark.parametrize("text", ["the quick brown fox ", "x", "e\u0301", "漢"])
def test_the_time_for_a_text_grows_with_its_length_and_not_with_its_square(like_v3, text):
    def seconds(characters: int) -> float:
        start = time.process_time()
        like_v3[0].encode(text * (characters // len(text)))
        return time.process_time() - start

    seconds(20_000)
    assert seconds(400_000) < 60 * max(seconds(20_000), 0.005)   # 20 times the text; squared, that would be 400


def test_a_batch_has_the_ids_of_its_texts_one_by_one_whatever_was_encoded_before(like_v3, models_dir, monkeypatch):
    monkeypatch.setattr("minipref.tokenizer.CACHED_WORDS", 10)
    texts = [*HARD_TEXTS, *docstrings()[:300], "x" * CACHED_WORD_LENGTH, "x" * (CACHED_WORD_LENGTH + 1)]
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
    assert_same_ids(tokenizer, oracle, [long])


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
        for id, kind in enumerate(tokenizer._vocabulary.types):
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


@pytest.mark.parametrize("text, read_as", [
    ("a\ud800b", "a\ufffdb"), ("\udfff", "\ufffd"), ("\udc00\ud800", "\ufffd\ufffd"), ("\ud83d\ude00", "\U0001f600"),
    ("\ud83d\ud83d\ude00", "\ufffd\U0001f600"), ("\ud83d \ude00", "\ufffd \ufffd"), ("plain", "plain"),
])
def test_lone_surrogates_are_replaced(like_v3, models_dir, text, read_as):
    tokenizer = load_tokenizer(models_dir / "not_normalized")   # the one in which U+FFFD is not a space
    assert tokenizer.encode(text) == tokenizer.encode(read_as)


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


def test_special_tokens_that_the_file_lacks_come_after_its_pieces():
    entries = [("[SEP]", 0.0, CONTROL), ("a", -1.0, NORMAL), ("[CLS]", -2.0, NORMAL)]
    tokenizer = Tokenizer("spm.model", spm_model(entries))
    assert [tokenizer.sep_id, tokenizer.pad_id, tokenizer.cls_id, tokenizer.mask_id] == [1, 4, 5, 6]
    assert tokenizer.tokens([1, 4, 5, 6]) == ["[SEP]", "[PAD]", "[CLS]", "[MASK]"]   # the piece '[CLS]' is text here
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
    """The tokenizer.json that transformers 4 writes for a DeBERTa-v3 spm.model, with some keys changed."""
    vocabulary = read_model((model / "spm.model").read_bytes())
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
    """sentencepiece's built-in character map nmt_nfkc."""
    spec = sentencepiece.SentencePieceNormalizer(rule_name="nmt_nfkc").serialized_normalizer_spec()
    return dict(read_fields(spec))[CHARSMAP]


@pytest.fixture(scope="session")
def v3_json(models_dir, nmt_nfkc) -> dict:
    return hugging_face_json(models_dir / "like_v3", charsmap=nmt_nfkc)


def write_json(folder: Path, file: object) -> Path:
    (folder / "tokenizer.json").write_text(json.dumps(file), encoding="utf-8")
    return folder


def test_a_hugging_face_tokenizer_json_gives_the_ids_of_the_spm_model_it_was_made_of(like_v3, v3_json, tmp_path):
    tokenizer = load_tokenizer(write_json(tmp_path, v3_json))
    draw = random.Random(4)
    texts = HARD_TEXTS + docstrings() + [random_text(draw, draw.randrange(31)) for _ in range(1000)]
    assert tokenizer.encode_batch(texts) == like_v3[0].encode_batch(texts)
    assert (tokenizer.mask_id, tokenizer.vocab_size) == (like_v3[0].mask_id, like_v3[0].vocab_size)


def test_the_usual_pipeline_of_the_library_is_not_enough(like_v3, v3_json):
    # The reason for steps 1, 2 and 4 of minipref/tokenizer.py. Should this fail one day, they can go.
    usual = LibraryTokenizer.from_str(json.dumps({**v3_json, "model": {**v3_json["model"], "byte_fallback": True}}))
    differ = [text for text in HARD_TEXTS if usual.encode(text).ids != like_v3[1].encode(text)]
    assert "[CLS] [SEP] [PAD] [UNK] [MASK]" in differ                  # specials
    assert any(text.startswith("<0x41>") for text in differ)           # bytes
    assert any(text.startswith("か\u3099") for text in differ)         # the character map


def token(content: str, **flags) -> dict:
    """An added token as transformers writes it, without its id."""
    return {"content": content, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False,
            "special": False, **flags}


def test_an_added_token_may_be_a_piece_and_a_special_one_is_no_longer_for_text(like_v3, v3_json, tmp_path):
    newline = len(like_v3[1]) + 1
    word, special = like_v3[1].piece_to_id("ing"), like_v3[1].piece_to_id("▁the")
    file = {**v3_json, "added_tokens": [*v3_json["added_tokens"], {"id": newline, **token("\n")},
                                        {"id": word, **token("ing")}, {"id": special, **token("▁the", special=True)}]}
    tokenizer = load_tokenizer(write_json(tmp_path, file))
    assert tokenizer.tokens([newline]) == ["\n"] and tokenizer.vocab_size == newline + 1
    a, b = (like_v3[0].encode(text) for text in "ab")
    assert tokenizer.encode("a\nbing") == [*a, newline, *b, word]
    assert special not in tokenizer.encode("the")


@pytest.fixture
def small_spm(tmp_path) -> tuple[Path, Tokenizer]:
    """A folder with an spm.model of a piece for each letter, and its tokenizer; [MASK] and added tokens follow."""
    entries = [(name, 0.0, CONTROL) for name in ("[PAD]", "[CLS]", "[SEP]")]
    entries += [(character, -1.0, NORMAL) for character in "▁abcdeo<>[]"]
    Tokenizer("spm.model", spm_model(entries, bytes_too=True)).save(tmp_path)
    return tmp_path, load_tokenizer(tmp_path)


ADDED_BESIDE = {   # name -> content of that file for {content: id}
    "tokenizer.json": lambda ids: {"added_tokens": [{"id": id, **token(content)} for content, id in ids.items()]},
    "tokenizer_config.json": lambda ids: {"added_tokens_decoder": {str(id): token(c) for c, id in ids.items()}},
    "added_tokens.json": lambda ids: dict(sorted(ids.items())),
}


@pytest.mark.parametrize("names", [[name] for name in ADDED_BESIDE] + [[*ADDED_BESIDE]], ids="-".join)
def test_added_tokens_beside_an_spm_model_are_read_from_whatever_file_has_them(small_spm, names):
    folder, plain = small_spm
    ids = {content: plain.mask_id + n for n, content in enumerate(("[MASK]", "\n", "<code>", "<c"))}
    for name in names:
        (folder / name).write_text(json.dumps(ADDED_BESIDE[name](ids)))
    tokenizer = load_tokenizer(folder)
    assert (tokenizer.vocab_size, tokenizer.mask_id) == (plain.vocab_size + 3, plain.mask_id)
    a, b = plain.encode("a"), plain.encode("b")
    newline, code, c = (ids[content] for content in ("\n", "<code>", "<c"))
    texts = {"a\nb": [*a, newline, *b], "\n \n": [newline, newline], " a \n\n b ": [*a, newline, newline, *b],
             "<code>a<cb": [code, *a, c, *b], "[MASK]": plain.encode("[MASK]"), "": [], " ": [],
             "a [SEP] b": plain.encode("a [SEP] b"), "\ud800<c": [*plain.encode("\ufffd"), c]}
    assert tokenizer.encode_batch(texts) == list(texts.values())
    assert tokenizer.decode([*a, newline, *b]) == "a\n b"
    tokenizer.save(folder / "again")
    for again in (load_tokenizer(folder / "again"), pickle.loads(pickle.dumps(tokenizer))):
        assert again.encode_batch(texts) == list(texts.values())
        assert again.vocab_size == tokenizer.vocab_size
    assert tokenizer.fingerprint != plain.fingerprint


def test_a_special_token_without_flags_is_special_where_another_file_says_so(small_spm):
    folder, plain = small_spm
    (folder / "added_tokens.json").write_text(json.dumps({"<a>": plain.vocab_size, "[MASK]": plain.mask_id}))
    assert load_tokenizer(folder).encode("<a>") == [plain.vocab_size]
    (folder / "special_tokens_map.json").write_text('{"additional_special_tokens": ["<a>"]}')
    assert load_tokenizer(folder).encode("<a>") == plain.encode("<a>")


def test_flags_that_a_file_has_count_before_those_that_another_leaves_out(small_spm):
    folder, plain = small_spm
    (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": {
        plain.mask_id: token("[MASK]", special=True), plain.vocab_size: token("a b", normalized=True)}}))
    (folder / "added_tokens.json").write_text(json.dumps({"a b": plain.vocab_size}))
    for tokenizer in (load_tokenizer(folder), load_tokenizer(folder)):
        assert tokenizer.encode("a   b") == [plain.vocab_size]
        tokenizer.save(folder)


@pytest.mark.parametrize("flags, why", [
    ({"lstrip": True}, "lstrip"), ({"rstrip": True, "single_word": True}, "rstrip and single_word"),
    ({"content": "\n", "normalized": True}, "normalized"), ({"content": "\n"}, ""), ({"content": " x "}, ""),
    ({"content": " x", "normalized": True}, "normalized"), ({"normalized": True}, ""),
    ({"special": True, "lstrip": True}, ""),
])
def test_an_added_token_with_a_flag_that_cannot_be_kept_is_refused_by_name(trained, tmp_path, flags, why):
    trained.save(tmp_path)
    added = token("<code>") | flags
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": {trained.vocab_size: added}}))
    if not why:
        assert load_tokenizer(tmp_path).vocab_size == trained.vocab_size + 1
        return
    with pytest.raises(InputError) as refused:
        load_tokenizer(tmp_path)
    assert f"the added token {added['content']!r} with the flag {why}" in str(refused.value)


@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json"])
@pytest.mark.parametrize("setting", [{"do_lower_case": True}, {"split_by_punct": True}, {"sep_token": "</s>"},
                                     {"pad_token": {"content": "<pad>"}}], ids=str)
def test_settings_that_give_other_ids_are_refused_by_name(small_spm, trained, tmp_path, name, setting):
    trained.save(tmp_path / "json")
    for folder in (small_spm[0], tmp_path / "json"):
        (folder / name).write_text(json.dumps(setting))
        with pytest.raises(InputError, match=f"{name}: {next(iter(setting))} is .*; expected"):
            load_tokenizer(folder)


@pytest.mark.parametrize("name, content", [
    ("added_tokens.json", '{"x": "far"}'), ("added_tokens.json", '{"x": 1}'), ("added_tokens.json", "[]"),
    ("added_tokens.json", '{"x": 99999}'), ("added_tokens.json", "{"), ("special_tokens_map.json", "3"),
    ("special_tokens_map.json", '{"additional_special_tokens": [[]]}'), ("tokenizer.json", '{"added_tokens": 3}'),
    ("tokenizer.json", '{"added_tokens": ["x"]}'), ("tokenizer.json", '{"added_tokens": [{"id": 1}]}'),
    ("tokenizer_config.json", '{"added_tokens_decoder": [1]}'),
    ("tokenizer_config.json", '{"added_tokens_decoder": 3}'),
    ("tokenizer_config.json", '{"added_tokens_decoder": {"x": {}}}'),
    ("tokenizer_config.json", '{"added_tokens_decoder": {"1": 2}}'),
])
def test_damaged_files_beside_an_spm_model_are_one_line(small_spm, name, content):
    (small_spm[0] / name).write_text(content)
    with pytest.raises(InputError, match="; expected") as refused:
        load_tokenizer(small_spm[0])
    assert "\n" not in str(refused.value)


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
        {"type": "Metaspace", "replacement": "▁", "add_prefix_space": True}]}, True),
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


@pytest.mark.parametrize("name", ["newline", "words", "the longest", "spaces", "pieces", "all"])
def test_added_tokens_have_the_ids_of_transformers(trained, tmp_path, name):
    transformers = pytest.importorskip("transformers")
    plain = transformers.AddedToken
    added = {"newline": [plain("\n", normalized=False)], "words": ["<code>", "foo bar"],
             "the longest": ["<c", "<code>", "<code><code>", "foo", "foo bar"], "pieces": ["the", "ing", "xt"],
             "spaces": [plain(token, normalized=False) for token in ("  ", "\n\n", "\t", " x ", "▁y")]}
    added["all"] = [one for group in added.values() for one in group]
    trained.save(tmp_path)
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    theirs.add_tokens(added[name])
    theirs.save_pretrained(tmp_path)
    theirs, ours = transformers.AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(tmp_path)
    assert ours.vocab_size == len(theirs)
    pieces = ["\n", " ", "  ", "\t", "<code>", "<c", "foo", "foo bar", "foo  bar", "the", "nothing", "x", " y", "ﬁ"]
    draw, produced = random.Random(5), set()
    for _ in range(200):
        text = "".join(draw.choice(pieces) for _ in range(draw.randrange(1, 9)))
        assert ours.encode(text) == theirs(text, add_special_tokens=False)["input_ids"], text
        produced.update(ours.tokens(ours.encode(text)))
    assert produced & {str(one) for one in added[name]}
    assert not {ours.sep_id, ours.cls_id} & set(ours.encode("[SEP][CLS]\n[SEP]"))


def test_a_newline_added_as_a_plain_string_is_refused(trained, tmp_path):
    # Normalization makes nothing of it. transformers then finds nothing before each character, and splits texts there.
    transformers = pytest.importorskip("transformers")
    trained.save(tmp_path)
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    theirs.add_tokens(["\n"])
    assert theirs.vocab_size not in theirs("a\nb")["input_ids"]
    theirs.save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"the added token '\\n' with the flag normalized"):
        load_tokenizer(tmp_path)


def test_the_tokenizer_json_of_transformers_5_is_read_as_it_is(like_v3, tmp_path):
    transformers = pytest.importorskip("transformers")
    vocabulary = read_model(like_v3[0]._data)
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
# Files that are wrong


def changed(**keys):
    """A valid tokenizer.json with these keys replaced."""
    return lambda file: {**file, **keys}


def model(vocab, unk_id=0) -> dict:
    return {"model": {"type": "Unigram", "vocab": vocab, "unk_id": unk_id}, "added_tokens": []}


def added(*tokens: dict) -> dict:
    return {"added_tokens": list(tokens)}


REPLACE = {"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": ""}
PUNCTUATION = {"type": "Sequence",
               "pretokenizers": [{"type": "Punctuation"}, {"type": "Metaspace", "replacement": "▁"}]}
DAMAGED_MAP = {"type": "Precompiled", "precompiled_charsmap": "AAAA"}
WRONG_JSON = {   # name: (changes to a valid file, part of the message)
    "a list": (lambda file: [file], "no Unigram model with"),
    "no model": (lambda file: {}, "no Unigram model with"),
    "BPE": (changed(model={"type": "BPE", "vocab": {}, "merges": []}), "a model of type 'BPE'"),
    "WordPiece": (changed(model={"type": "WordPiece"}), "a model of type 'WordPiece'"),
    "a vocabulary by name": (changed(**model({"a": 1})), "no Unigram model with vocab"),
    "no scores": (changed(**model(["a", "b"])), "entry 0 of the vocab is 'a'"),
    "scores as text": (changed(**model([["a", "-1"]])), "entry 0 of the vocab is ['a', '-1']"),
    "a score that is none": (changed(**model([["u", 0], ["a", math.nan]])), "score of piece 1 is nan"),
    "a score too large": (changed(**model([["u", 0], ["a", 10 ** 400]])), "too large"),
    "no unknown": (changed(**model([["a", -1]], None)), "no Unigram model with vocab, unk_id"),
    "an unknown outside": (changed(**model([["a", -1]], 10 ** 9)), "0 unknown pieces"),
    "half a character": (changed(**model([["u", 0], ["\ud800", -1]])), "surrogates not allowed"),
    "added tokens by name": (changed(added_tokens={"a": 1}), "no Unigram model with vocab, unk_id and added_tokens"),
    "an added id far away": (changed(**added({"id": 10 ** 9, "content": "x"})), "the added token {'id': 1000000000"),
    "a negative added id": (changed(**added({"id": -1, "content": "x"})), "the added token {'id': -1"),
    "an added token without a name": (changed(**added({"id": 1})), "the added token {'id': 1}"),
    "an added token elsewhere": (changed(**added({"id": 1, "content": "[SEP]"})), "the added token {'id': 1"),
    "lower case": (changed(normalizer={"type": "Lowercase"}), "the normalizer {'type': 'Lowercase'}"),
    "another replacement": (changed(normalizer=REPLACE), "the normalizer {'type': 'Replace'"),
    "a normalizer that is none": (changed(normalizer=3), "the normalizer 3"),
    "a map that is not base64": (changed(normalizer={"type": "Precompiled", "precompiled_charsmap": "***"}), "base64"),
    "a map that is damaged": (changed(normalizer=DAMAGED_MAP), "a character map of 3 bytes"),
    "split at punctuation": (changed(pre_tokenizer=PUNCTUATION), "the pre-tokenizer [{'type': 'Punctuation'}"),
    "no pre-tokenizer": (changed(pre_tokenizer=None), "the pre-tokenizer []"),
    "another space": (changed(pre_tokenizer={"type": "Metaspace", "replacement": "_"}), "the pre-tokenizer [{'type'"),
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
    with pytest.raises(InputError, match="no such folder"):
        load_tokenizer(tmp_path / "nowhere")
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="not a folder"):
        load_tokenizer(tmp_path / "file")


@pytest.mark.parametrize("name", ["spm.model", "tokenizer.json"])
def test_what_is_no_ordinary_file_is_refused_and_never_waited_for(tmp_path, name):
    path = tmp_path / name
    path.mkdir()
    with pytest.raises(InputError, match=f"{name}: a directory"):
        load_tokenizer(tmp_path)
    path.rmdir()
    os.mkfifo(path)
    with pytest.raises(InputError, match=f"{name}: a pipe"):
        load_tokenizer(tmp_path)
    path.unlink()
    path.symlink_to(tmp_path / "gone")
    with pytest.raises(InputError, match=f"{name}: no such file"):
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


scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
any_json = st.recursive(scalars, lambda inner: st.lists(inner, max_size=3)
                        | st.dictionaries(st.text(max_size=5), inner, max_size=3), max_leaves=6)


@settings(max_examples=300)
@given(value=any_json, place=st.integers(0, 1 << 16))
def test_the_reader_of_tokenizer_json_takes_any_value_anywhere(value, place):
    file = {"added_tokens": [{"id": 3, "content": "[MASK]", "special": True}],
            "normalizer": {"type": "Sequence", "normalizers": [
                {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(SMALL_TRIE).decode()},
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


# --- a token of our own

def assert_keeps_lines(tokenizer, folder):
    """The tokenizer with a line break as a token, also saved and loaded."""
    newline = tokenizer.with_token("\n")
    text = "- one\n- two\n\nthree"
    ids = newline.encode(text)
    assert ids.count(tokenizer.vocab_size) == 3 and newline.vocab_size == tokenizer.vocab_size + 1
    pieces = [part for line in text.split("\n") for part in ([*tokenizer.encode(line)], [tokenizer.vocab_size])][:-1]
    assert ids == [id for part in pieces for id in part], "each line as it is alone"
    assert newline.with_token("\n") is newline and newline.fingerprint != tokenizer.fingerprint
    newline.save(folder)
    loaded = load_tokenizer(folder)
    assert (loaded.encode(text), loaded.fingerprint, loaded.mask_id) == (ids, newline.fingerprint, tokenizer.mask_id)
    return newline


def test_a_line_break_may_become_a_token_that_transformers_reads_back(tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    newline = assert_keeps_lines(load_tokenizer(BUNDLED), tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    text = "a list:\n- one\n- two"
    assert theirs(text, add_special_tokens=False)["input_ids"] == newline.encode(text)


def test_the_published_vocabularys_line_break_is_its_first_free_row(reference_dir, tmp_path):
    newline = assert_keeps_lines(load_tokenizer(reference_dir / "deberta-v3-small"), tmp_path)
    assert newline.vocab_size == 128002 and newline.encode("\n") == [128001]
