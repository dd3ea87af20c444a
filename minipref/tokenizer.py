"""Text to the token ids of sentencepiece, from `spm.model` or `tokenizer.json`, without the sentencepiece package.

DeBERTa-v3 has a Unigram vocabulary of 128,000 pieces and was pretrained on the ids of sentencepiece. The four steps:

    1. normalize: NFKC and a little more, by the character map in spm.model; collapse runs of spaces, strip the ends
    2. pre-tokenize: put a space in front, write each space as '▁', split before each '▁'
    3. segment each word: of all ways to split it into pieces, the one with the highest sum of scores (Viterbi)
    4. byte fallback: a character that no piece covers becomes its UTF-8 bytes, which are the pieces <0x00> .. <0xFF>

Step 3 uses the Unigram model of the `tokenizers` library. The other steps differ from that library, and therefore from
transformers, in two ways:

- *A special token typed by a user stays text.* In the library '[SEP]' in a text becomes the id that ends a segment, and
  '<0x41>' becomes the byte A. Here control and byte pieces have names with a space in them before the library sees
  them. A pre-tokenized text contains no spaces, so it cannot match such a name. The library finds byte pieces by their
  names, so step 4 is done here.
- *The character map applies the longest matching rule at each position*, as in sentencepiece. The library applies one
  rule to a whole grapheme, or else one to each character. It gives other ids for decomposed accents, kana and Hangul.

transformers 5 drops the character map and byte fallback altogether.

*Added tokens* (transformers' `add_tokens`) are matched first, as in transformers. A text is split at them, the longest
match at each place, and the parts between them go through the four steps separately. A token with the flag `normalized`
is matched after step 1, any other before it. Special tokens are not matched: they stay text.

Differs: sentencepiece sums scores in float32 from the start of the text; here each word has its own float64 sum. If the
scores of two segmentations differ by less than float32's rounding, the other one may be chosen: 'BBBBB' is 'BB' 'BBB'
or 'BBB' 'BB'.
"""

import base64
import functools
import hashlib
import json
import os
import re
from collections.abc import Callable, Sequence
from operator import itemgetter
from pathlib import Path

from tokenizers import Regex, normalizers
from tokenizers.models import Unigram

from minipref.runtime import InputError, atomic_write, check_folder, check_regular_file, read_json, short_repr
from minipref.sentencepiece_model import (
    BYTE,
    BYTE_PIECES,
    CONTROL,
    NORMAL,
    UNKNOWN,
    CharacterMap,
    Vocabulary,
    read_sentencepiece_model,
)

SPACE = "▁"   # U+2581, how sentencepiece writes a space
SPECIAL_TOKENS = ("[PAD]", "[CLS]", "[SEP]", "[MASK]")
SPACES = re.compile(" {2,}")
SURROGATE = re.compile("[\ud800-\udfff]")
CACHED_WORDS = 1 << 17
CACHED_WORD_LENGTH = 64    # longer words are not cached: few of them recur
MAX_FILE_BYTES = {"spm.model": 8 << 20, "tokenizer.json": 32 << 20}   # larger files are refused before they are read


def replace_surrogates(text: str) -> str:
    """The text with U+FFFD for each lone surrogate (half of a UTF-16 pair). A complete pair becomes its character."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace") if SURROGATE.search(text) else text


def load_tokenizer(folder: str | Path) -> "Tokenizer":
    """The tokenizer of a folder: from its `spm.model`, or from its `tokenizer.json` if it has no spm.model.

    A tokenizer.json written by transformers 5 lacks the character map, so some ids differ from v3's. Added tokens are
    read from all files in which transformers stores them.

    Errors: InputError if both files are missing, or if the file is damaged or not a Unigram model. A damaged spm.model
    is an error even if there is a tokenizer.json.
    """
    folder = Path(folder)
    check_folder(folder, "a folder with spm.model or tokenizer.json")
    for name, limit in MAX_FILE_BYTES.items():
        path, expected = folder / name, f"the {name} of a Unigram model"
        if not os.path.lexists(path):
            continue
        check_regular_file(path, expected)
        try:
            with path.open("rb") as file:
                data = file.read(limit + 1)
            if len(data) > limit:
                raise ValueError(f"more than {limit:,} bytes")
            return Tokenizer(name, data, _read_added_tokens(folder, beside=name))
        except (OSError, ValueError, OverflowError, RecursionError) as problem:
            raise InputError(file=path, found=str(problem), expected=expected) from None
    raise InputError(file=folder, found="no tokenizer here", expected="a folder with spm.model or tokenizer.json")


def _read_added_tokens(folder: Path, beside: str) -> list[dict]:
    """The added tokens in all files of a folder except `beside`, each a dict with id, content and flags.

    added_tokens.json has no flags: it is written by transformers' slow tokenizers, which match before normalization.
    Errors: InputError for a malformed file, and for settings and special tokens that v3 does not have.
    """
    def read(name: str) -> dict:
        return read_json(folder / name, "a JSON file of a tokenizer") if os.path.lexists(folder / name) else {}

    def content(token: object) -> object:
        return token.get("content") if isinstance(token, dict) else token

    special = set(SPECIAL_TOKENS)
    try:
        for name in ("special_tokens_map.json", "tokenizer_config.json"):
            fields = read(name)
            wrong = [key for key in ("do_lower_case", "split_by_punct") if fields.get(key)]
            wrong += [key for token in SPECIAL_TOKENS
                      if content(fields.get(key := f"{token[1:-1].lower()}_token")) not in (None, token)]
            if wrong:
                raise InputError(file=folder / name, found=f"{wrong[0]} is {short_repr(fields[wrong[0]])}",
                                 expected="v3's special tokens, and neither do_lower_case nor split_by_punct")
            special.update(map(content, fields.get("additional_special_tokens") or ()))
        tokens = [{**token, "id": int(id)} for id, token in (fields.get("added_tokens_decoder") or {}).items()]
        name = "tokenizer.json"
        tokens += (read(name).get("added_tokens") or []) if beside != name else []
        name = "added_tokens.json"
        return tokens + [{"id": int(id), "content": token, "special": token in special, "normalized": False}
                         for token, id in read(name).items()]
    except (AttributeError, TypeError, ValueError):
        raise InputError(file=folder / name, found="added tokens in another form",
                         expected="the form in which transformers writes them") from None


class Tokenizer:
    """Text to ids and back, for one vocabulary. `load_tokenizer` and `train_vocabulary` create it.

    `pad_id`, `cls_id`, `sep_id`, `unk_id`, `mask_id`: the caller inserts these ids. No text encodes to them, except to
    `unk_id` in a vocabulary without byte pieces. A special token that the file lacks gets the next free id; for v3 that
    is [MASK], 128000.
    `vocab_size`: the number of ids, including special tokens.
    `fingerprint`: SHA-256 of the file and of added tokens from other files, in hex.
    """

    def __init__(self, name: str, data: bytes, added_tokens: Sequence[dict] = ()):
        """`data`: the bytes of the file `name`. `added_tokens`: tokens that the file may lack, each with id, content
        and the flags of transformers. Errors: ValueError.
        """
        self._name, self._data, self._added_tokens = name, data, added_tokens
        self._vocabulary = vocabulary = read_sentencepiece_model(data) if name == "spm.model" else _read_json(data)
        in_text = _place_added_tokens(vocabulary, [*vocabulary.added_tokens, *added_tokens])
        vocabulary.check()
        pieces, scores, types = vocabulary.pieces, vocabulary.scores, vocabulary.types
        control_ids = {piece: id for id, piece in enumerate(pieces) if types[id] == CONTROL}
        for token in SPECIAL_TOKENS:
            if token not in control_ids:
                control_ids[token] = len(pieces)
                pieces += [token]
                scores += [0.0]
                types += [CONTROL]
        self.pad_id, self.cls_id, self.sep_id, self.mask_id = (control_ids[token] for token in SPECIAL_TOKENS)
        self.unk_id = types.index(UNKNOWN)
        self.vocab_size = len(pieces)
        listed = sorted((token["id"], token["content"], bool(token.get("normalized", True)), bool(token.get("special")))
                        for token in added_tokens)
        self.fingerprint = hashlib.sha256(data + (json.dumps(listed).encode() if listed else b"")).hexdigest()

        byte_ids = {piece: id for id, piece in enumerate(pieces) if types[id] == BYTE}
        self._byte_ids = [byte_ids[piece] for piece in BYTE_PIECES] if byte_ids else []
        # Only pieces for text keep their names. The library derives the score of an unknown character from the lowest
        # score, so the other pieces get the score 0.
        named = [(piece, score) if type == NORMAL else (f" {id}", 0.0)
                 for id, (piece, score, type) in enumerate(zip(pieces, scores, types))]
        self._unigram = Unigram(named, self.unk_id, byte_fallback=False)
        # Words are independent if no piece and no run of unknown characters can span two of them.
        text_pieces = {piece for piece, type in zip(pieces, types) if type == NORMAL}
        self._splits_words = SPACE in text_pieces and not any(SPACE in piece[1:] for piece in text_pieces)
        self._segment_cached = functools.lru_cache(CACHED_WORDS)(self._segment)

        before, after = {}, {}     # content -> id of the added tokens that are matched before and after step 1
        for content, token in in_text.items():
            normalized = token.get("normalized", True)
            flags = [flag for flag in ("lstrip", "rstrip", "single_word") if token.get(flag)]
            if normalized and self._normalize(content) != content:     # '\n' would become '', which matches everywhere
                flags.append("normalized (and normalization changes it)")
            if flags:
                raise ValueError(f"the added token {short_repr(content)} with the flag {' and '.join(flags)}")
            (after if normalized else before)[content] = token["id"]
        self._before, self._after = (
            (ids, re.compile(f"({'|'.join(map(re.escape, sorted(ids, key=len, reverse=True)))})"))
            for ids in (before, after))

    def __reduce__(self):
        return Tokenizer, (self._name, self._data, self._added_tokens)

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without special tokens. No ids for an empty text or one of spaces."""
        ids = []
        for raw in _split(self._mend(text), *self._before) if text != "" else ():
            for part in [raw] if isinstance(raw, int) else _split(self._normalize(raw), *self._after):
                if isinstance(part, int):
                    ids.append(part)
                    continue
                for word in self._pre_tokenize(part):
                    ids += self._segment_cached(word) if len(word) <= CACHED_WORD_LENGTH else self._segment(word)
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` for each text. It starts no threads or processes, so it can be called from several."""
        return [self.encode(text) for text in texts]

    def _mend(self, text: str) -> str:
        """The text with surrogate pairs joined and lone surrogates replaced."""
        if not isinstance(text, str):
            raise TypeError(f"a text must be a str, not {short_repr(text)}")
        return replace_surrogates(text)

    def _normalize(self, text: str) -> str:
        """Step 1."""
        for normalize in self._vocabulary.normalizers:
            text = normalize(text)
        if self._vocabulary.remove_extra_whitespaces:   # sentencepiece also strips a '▁' of the text
            text = SPACES.sub(" ", text).lstrip(" ").rstrip(f" {SPACE}")
        return text

    def _pre_tokenize(self, text: str) -> list[str]:
        """Step 2. The whole text is one word if words are not independent."""
        has_space = self._vocabulary.remove_extra_whitespaces and text[:1] in ("", " ")   # after an added token
        text = ((" " if self._vocabulary.add_dummy_prefix and not has_space else "") + text).replace(" ", SPACE)
        if not self._splits_words:
            return [text] if text else []
        first, *others = text.split(SPACE)
        return ([first] if first else []) + [SPACE + word for word in others]

    def _segment(self, word: str) -> tuple[int, ...]:
        """Steps 3 and 4 for one word."""
        ids, utf8 = [], word.encode()
        for token in self._unigram.tokenize(word):   # adjacent unknown characters form one token
            if token.id == self.unk_id and self._byte_ids:
                start, end = token.offsets           # in bytes
                ids += [self._byte_ids[byte] for byte in utf8[start:end]]
            else:
                ids.append(token.id)
        return tuple(ids)

    def tokens(self, ids: Sequence[int]) -> list[str]:
        """The pieces of the ids, as in the file. Errors: IndexError for an id outside 0 .. vocab_size - 1."""
        for id in ids:
            if not 0 <= id < self.vocab_size:
                raise IndexError(f"id {id} is outside 0 .. {self.vocab_size - 1}")
        return [self._vocabulary.pieces[id] for id in ids]

    def decode(self, ids: Sequence[int]) -> str:
        """The ids as text. Bytes become characters (U+FFFD if they are not UTF-8), special tokens their names.

        Normalization is not undone. Errors: IndexError.
        """
        parts = []
        for id, piece in zip(ids, self.tokens(ids)):
            is_byte = self._vocabulary.types[id] == BYTE
            parts.append(bytes([BYTE_PIECES[piece]]) if is_byte else piece.replace(SPACE, " ").encode())
        text = b"".join(parts).decode(errors="replace")
        return text.removeprefix(" ") if self._vocabulary.add_dummy_prefix else text

    def with_token(self, content: str) -> "Tokenizer":
        """This tokenizer with an added token at the next free id. Returns itself if it already has the token."""
        if content in self._before[0] or content in self._after[0]:
            return self
        mask = {"id": self.mask_id, "content": "[MASK]", "normalized": False, "special": True}     # spm.model lacks it
        added = [mask, {"id": self.vocab_size, "content": content, "normalized": False}]
        return Tokenizer(self._name, self._data, [*self._added_tokens, *added])

    def save(self, folder: str | Path) -> None:
        """Write the tokenizer's file with its original bytes, and a tokenizer_config.json for transformers.

        Errors: InputError if that fails, or if the folder has an `spm.model` that would be read instead.
        """
        folder = Path(folder)
        if self._name != "spm.model" and os.path.lexists(folder / "spm.model"):
            raise InputError(file=folder / "spm.model", found="another tokenizer, which would be read instead",
                             expected="a folder without spm.model")
        if self._name == "spm.model":
            config = {"tokenizer_class": "DebertaV2Tokenizer", "vocab_type": "spm", "do_lower_case": False,
                      "split_by_punct": False}
        else:   # DebertaV2Tokenizer would ignore the pipeline in tokenizer.json
            config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        for role in ("pad", "cls", "sep", "unk", "mask"):
            config[f"{role}_token"] = self._vocabulary.pieces[getattr(self, f"{role}_id")]
        if self._added_tokens:
            config["added_tokens_decoder"] = {str(token["id"]): {
                "content": token["content"], **{flag: bool(token.get(flag, flag == "normalized")) for flag in
                                                ("lstrip", "normalized", "rstrip", "single_word", "special")}}
                for token in self._added_tokens[::-1]}                     # the first of duplicates is used
        try:
            for name, data in ((self._name, self._data),
                               ("tokenizer_config.json", (json.dumps(config, indent=2) + "\n").encode())):
                with atomic_write(folder / name) as temporary:
                    temporary.write_bytes(data)
        except OSError as problem:
            raise InputError(file=folder, found=f"cannot be written: {problem.strerror}") from None


def _split(text: str, ids: dict[str, int], pattern: re.Pattern) -> list[str | int]:
    """A text as parts between added tokens, and the ids of these tokens."""
    return [ids.get(part, part) for part in pattern.split(text) if part] if ids else [text]


def _place_added_tokens(vocabulary: Vocabulary, tokens: Sequence[dict]) -> dict[str, dict]:
    """Append new tokens to the vocabulary; returns those that are matched in texts, by content.

    Errors: ValueError for a token whose id is neither that of its piece nor the next free one.
    """
    pieces, types, in_text = vocabulary.pieces, vocabulary.types, {}
    for token in tokens:
        match token:
            case {"id": int(), "content": str()}:
                pass
            case _:
                raise ValueError(f"the added token {short_repr(token)}, without id or content")
    for token in sorted(tokens, key=itemgetter("id")):
        id, content, is_new = token["id"], token["content"], token["id"] == len(pieces)
        if is_new:
            pieces.append(content)
            vocabulary.scores.append(0.0)
            types.append(CONTROL)                 # the Unigram model must not produce it
        elif not (0 <= id < len(pieces) and pieces[id] == content):
            raise ValueError(f"the added token {short_repr(token)}, which is neither a piece nor has the next id")
        if token.get("special"):
            types[id] = CONTROL if types[id] == NORMAL else types[id]
        elif content not in SPECIAL_TOKENS and (is_new or types[id] == NORMAL):
            in_text.setdefault(content, token)
    return in_text


# --- tokenizer.json, the format of the tokenizers library ---

TRANSFORMERS_5_SPACES = r"\s{2,}|[\n\r\t]"   # written by transformers 5 instead of v3's character map


def _read_json(data: bytes) -> Vocabulary:
    """The vocabulary in the bytes of a tokenizer.json. Errors: ValueError, OverflowError, RecursionError."""
    file = json.loads(data)
    match file:
        case {"model": {"type": "Unigram", "vocab": list(entries), "unk_id": int(unk_id)}, "added_tokens": list(added)}:
            pass
        case {"model": {"type": str(name)}} if name != "Unigram":
            raise ValueError(f"a model of type {short_repr(name)}")
        case _:
            raise ValueError("no Unigram model with vocab, unk_id and added_tokens")
    pieces, scores, types = [], [], []
    for id, entry in enumerate(entries):
        match entry:
            case [str(piece), float() | int() as score]:
                pieces.append(piece)
                scores.append(float(score))
                types.append(UNKNOWN if id == unk_id else BYTE if piece in BYTE_PIECES else
                             CONTROL if piece in SPECIAL_TOKENS else NORMAL)
            case _:
                raise ValueError(f"entry {id} of the vocab is {short_repr(entry)}, not [piece, score]")

    match _steps_of(file.get("pre_tokenizer"), "pretokenizers"):
        case [{"type": "Metaspace", "replacement": "▁"} as metaspace]:   # older files have only add_prefix_space
            scheme = metaspace.get("prepend_scheme")
            prefix = scheme != "never" and bool(metaspace.get("add_prefix_space", True))
            if scheme == "first" and any(isinstance(token, dict) and not token.get("special") for token in added):
                raise ValueError("a Metaspace with prepend_scheme 'first' and added tokens")
        case other:
            raise ValueError(f"the pre-tokenizer {short_repr(other)}, not Metaspace with {SPACE}")
    return Vocabulary(pieces, scores, types, *_read_normalizer(file.get("normalizer")), add_dummy_prefix=prefix,
                      added_tokens=added)


def _read_normalizer(node: object) -> tuple[list[Callable[[str], str]], bool]:
    """The normalizers and remove_extra_whitespaces of a Vocabulary. Errors: ValueError."""
    steps, remove_extra_whitespaces = [], False
    for step in _steps_of(node, "normalizers"):
        match step:
            case {"type": "Precompiled", "precompiled_charsmap": str() | None as encoded}:
                steps += [CharacterMap(base64.b64decode(encoded, validate=True))] if encoded else []
            case {"type": "Nmt" | "NFC" | "NFKC" as name}:
                steps.append(getattr(normalizers, name)().normalize_str)
            case {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "}:
                remove_extra_whitespaces = True
            case {"type": "Replace", "pattern": {"Regex": regex}, "content": " "} if regex == TRANSFORMERS_5_SPACES:
                steps.append(normalizers.Replace(Regex(regex), " ").normalize_str)
                remove_extra_whitespaces = True
            case {"type": "Strip"}:
                pass
            case _:
                raise ValueError(f"the normalizer {short_repr(step)}")
    return steps, remove_extra_whitespaces


def _steps_of(node: object, members: str) -> list:
    """The steps of a normalizer or pre-tokenizer: none, the members of a Sequence, or the node itself."""
    if isinstance(node, dict) and node.get("type") == "Sequence" and isinstance(node.get(members), list):
        return node[members]
    return [] if node is None else [node]
