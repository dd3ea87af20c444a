"""A vocabulary trained on texts has v3's order of ids, and the same texts give the same vocabulary."""

import unicodedata

import pytest
from spm import docstrings, trained_tokenizer

from minipref.pretrain.vocabulary import train_vocabulary
from minipref.runtime import InputError
from minipref.sentencepiece_model import BYTE_PIECES
from minipref.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def trained():
    return trained_tokenizer()


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


def normalized(tokenizer, text: str) -> str:
    return "".join(tokenizer._pre_tokenize(tokenizer._normalize(text)))


def test_a_trained_vocabulary_normalizes_like_nmt_nfkc_where_unicode_has_not_changed(trained):
    sentencepiece = pytest.importorskip("sentencepiece")
    oracle = sentencepiece.SentencePieceNormalizer(rule_name="nmt_nfkc")
    category = unicodedata.ucd_3_2_0.category
    points = [chr(point) for point in range(1, 0x30000) if category(chr(point)) not in ("Cn", "Cs")]
    assert len(points) > 90_000
    # sentencepiece 0.2.3 keeps the joiner U+200D, which v3's map and the library make a space.
    assert [point for point in points if normalized(trained, point) != oracle.normalize(point)] == ["\u200d", "\uff5e"]
    for text in ("e\u0301", "か\u3099", "\u1112\u1161\u11ab", "a\u0323\u0302", "ｶ\u3099", "  ﬁ\n\t½ ™\u00a0 "):
        assert normalized(trained, text) == oracle.normalize(text), text
    assert normalized(trained, "a\u0315\u0300b") != oracle.normalize("a\u0315\u0300b")   # NFKC sorts marks


def test_a_trained_vocabulary_normalizes_all_characters_but_two_like_the_published_model(trained, reference_dir):
    published = load_tokenizer(reference_dir / "deberta-v3-small")
    points = [chr(point) for point in range(1, 0x110000) if not 0xD800 <= point < 0xE000]
    differ = [point for point in points if normalized(trained, point) != normalized(published, point)]
    assert differ == ["\uff5e", "\U0001f23b"]


@pytest.mark.parametrize("texts, size, message", [
    (["abc abd abe"] * 9, 261, "a vocabulary of 261 for texts of 5 different characters; expected more than 266"),
    (["abc abd abe"] * 9, 5000, "texts that have .* pieces; expected 4,739, for a vocabulary of 5,000"),
    ([], 1000, "for texts of 0 different characters"), (["", " \n"], 1000, "for texts of 0 different characters"),
])
def test_a_vocabulary_that_cannot_be_is_refused(texts, size, message):
    with pytest.raises(InputError, match=message):
        train_vocabulary(texts, size)
