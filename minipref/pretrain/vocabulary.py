"""Train a Unigram vocabulary on texts, with v3's order of ids."""

import json
import unicodedata
from collections import Counter
from collections.abc import Iterable

from tokenizers import AddedToken, Regex, decoders, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as LibraryTokenizer
from tokenizers.models import Unigram
from tokenizers.trainers import UnigramTrainer

from minipref.runtime import InputError
from minipref.sentencepiece_model import BYTE_PIECES
from minipref.tokenizer import SPACE, SPACES, Tokenizer, replace_surrogates

FIRST_PIECES = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", *BYTE_PIECES]   # as in v3; [MASK] is the last id
SURPLUS = 1.15   # trained pieces per wanted piece, so that pieces that mix letters and signs can be dropped
NORMALIZER = normalizers.Sequence([normalizers.Nmt(), normalizers.NFKC(),
                                   normalizers.Replace(Regex(" {2,}"), " "), normalizers.Strip()])
PRE_TOKENIZER = pre_tokenizers.Metaspace(SPACE, prepend_scheme="always", split=True)


def train_vocabulary(texts: Iterable[str], vocab_size: int, *, character_coverage: float = 0.9995,
                     max_piece_length: int = 16) -> Tokenizer:
    """A tokenizer with a Unigram vocabulary trained on `texts`: [PAD] [CLS] [SEP] [UNK], bytes, pieces, [MASK].

    `vocab_size` counts all of them. The rarest characters, a share of 1 - `character_coverage` of the texts, get no
    piece and are encoded as bytes. A piece has at most `max_piece_length` characters, and a space only at its start.

    Differs: normalization is Nmt and NFKC of the `tokenizers` library instead of v3's character map. Two single
    characters differ, U+FF5E and U+1F23B, and NFKC also sorts and composes any number of combining marks. A piece
    mixes letters, digits and signs only if there are not enough other pieces; 166 of v3's do. A piece may mix scripts;
    v3's do not. v3's longest piece has 32 characters.

    The order of summation in the library's trainer varies, so scores are rounded to four decimals. Pieces with equal
    scores could still differ at the end of the vocabulary.

    Errors: InputError if `vocab_size` is too small for the characters, or too large for the texts.
    """
    texts = [NORMALIZER.normalize_str(replace_surrogates(text)) for text in texts]
    counts = Counter()
    for text in texts:
        counts.update(text)
    common = _most_common_characters(counts, character_coverage)
    num_pieces = vocab_size - len(FIRST_PIECES) - 1
    if not common or num_pieces <= len(common):
        raise InputError(found=f"a vocabulary of {vocab_size:,} for texts of {len(common):,} different characters",
                         expected=f"more than {vocab_size - num_pieces + len(common):,}, and some text")

    rare_to_space = {ord(character): " " for character in counts if character not in common}
    texts = [SPACES.sub(" ", text.translate(rare_to_space)).strip(" ") for text in texts]
    library = LibraryTokenizer(Unigram())
    library.pre_tokenizer = PRE_TOKENIZER
    library.train_from_iterator(texts, UnigramTrainer(
        vocab_size=round(SURPLUS * num_pieces), max_piece_length=max_piece_length, show_progress=False,
        special_tokens=["[UNK]"], unk_token="[UNK]"))
    trained = json.loads(library.to_str())["model"]["vocab"][1:]   # without [UNK]
    pieces = _select(_deterministic(trained), num_pieces)
    if len(pieces) < num_pieces:
        raise InputError(found=f"texts that have {len(pieces):,} pieces",
                         expected=f"{num_pieces:,}, for a vocabulary of {vocab_size:,}")
    return Tokenizer("tokenizer.json", _tokenizer_json(pieces))


def _most_common_characters(counts: Counter, coverage: float) -> set[str]:
    """The most frequent characters that together make up `coverage` of the texts, without spaces."""
    counts = {character: count for character, count in counts.items() if character != " "}
    missing, common = coverage * sum(counts.values()), set()
    for character, count in sorted(counts.items(), key=lambda entry: (-entry[1], entry[0])):
        if missing <= 0:
            break
        common.add(character)
        missing -= count
    return common


def _deterministic(trained: list[tuple[str, float]]) -> list[tuple[str, float]]:
    """The trainer's pieces sorted by score, with the random parts of scores and order removed.

    The trainer keeps single characters that training would drop, with scores that rise from the lowest score in steps
    of .0001, in random order. Here all of them get the lowest score.
    """
    lowest = min(score for _, score in trained)
    last_step = lowest + 1e-4 * sum(len(piece) == 1 for piece, _ in trained)
    scored = [(piece, lowest if len(piece) == 1 and score < last_step else score) for piece, score in trained]
    return sorted([(piece, round(score, 4)) for piece, score in scored], key=lambda entry: (-entry[1], entry[0]))


def _select(pieces: list[tuple[str, float]], num_pieces: int) -> list[tuple[str, float]]:
    """The best `num_pieces` of the sorted pieces: first single characters, then pieces of only letters, only digits or
    only signs, then pieces that mix these.

    Pre-tokenizing at these boundaries would not work. The trainer searches the set of distinct words for pieces, and a
    frequent word without variants would occur in that set only once.
    """
    def kind(character: str) -> str:
        return {"L": "letter", "M": "letter", "N": "digit"}.get(unicodedata.category(character)[0], "sign")

    def rank(entry: tuple[str, float]) -> int:
        piece = entry[0]
        return 0 if len(piece) == 1 else 1 if len({kind(character) for character in piece.lstrip(SPACE)}) == 1 else 2

    selected = set(sorted(pieces, key=rank)[:num_pieces])   # the sort is stable: within a rank the best come first
    return [entry for entry in pieces if entry in selected]


def _tokenizer_json(pieces: list[tuple[str, float]]) -> bytes:
    """A tokenizer.json for `load_tokenizer` and for transformers' PreTrainedTokenizerFast."""
    vocabulary = [(piece, 0.0) for piece in FIRST_PIECES] + pieces + [("[MASK]", 0.0)]
    library = LibraryTokenizer(Unigram(vocabulary, unk_id=FIRST_PIECES.index("[UNK]"), byte_fallback=True))
    library.normalizer, library.pre_tokenizer = NORMALIZER, PRE_TOKENIZER
    library.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(token, FIRST_PIECES.index(token)) for token in ("[CLS]", "[SEP]")])
    library.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(),
                                         decoders.Strip(" ", 1, 0)])
    library.add_special_tokens([AddedToken(token, normalized=False) for token in (*FIRST_PIECES[:4], "[MASK]")])
    return library.to_str().encode()
