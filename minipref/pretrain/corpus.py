"""The corpus: documents, token ids, and packed windows.

What is unusual here:
- There is no padding. Documents are packed into windows `[CLS] paragraph [SEP] paragraph [SEP] para`. Batch k depends
  only on k and the seed, so a resumed run needs no position in the data.
- Most steps use short windows, which are cheap; every tenth step uses long ones, which train the relative embeddings of
  longer distances.
"""

import functools
import gzip
import hashlib
import itertools
import json
import math
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from minipref.layouts import unique_keys
from minipref.pretrain.vocabulary import train_vocabulary
from minipref.runtime import InputError, short_repr
from minipref.tokenizer import Tokenizer, load_tokenizer

SUFFIXES = (".jsonl", ".jsonl.gz", ".txt")
BLANK_LINES = re.compile(r"\n\s*\n")


# --- documents --------------------------------------------------------------------------------------------------------

@dataclass
class Corpus:
    """Documents as token ids, with [SEP] after every paragraph."""

    tokenizer: Tokenizer
    train: list[np.ndarray]            # int32, one array a document
    heldout: list[np.ndarray]

    @functools.cached_property
    def counts(self) -> np.ndarray:
        """How often each id occurs in the training part. Shapes: -> (V,) int64."""
        return np.bincount(np.concatenate(self.train), minlength=self.tokenizer.vocab_size)

    @functools.cached_property
    def sha256(self) -> str:
        """SHA-256 of the ids and of the document boundaries, which determine the shuffling."""
        documents = self.train + self.heldout
        boundaries = np.array([len(self.train), *map(len, documents)])
        return hashlib.sha256(np.concatenate(documents).tobytes() + boundaries.tobytes()).hexdigest()


def load_corpus(paths: Sequence[str | Path], heldout_share: float, tokenizer: str | Path | None, vocab_size: int
                ) -> Corpus:
    """Read documents, hold some out, and tokenize with a folder's tokenizer or a vocabulary trained here.

    Errors: `InputError` for a file that cannot be read, or for too little text.
    """
    documents = read_corpus(paths)
    train = [document for document in documents if not is_held_out(document, heldout_share)]
    heldout = [document for document in documents if is_held_out(document, heldout_share)]
    if not train or not heldout:
        raise InputError(file=paths[0], found=f"{len(train)} documents to train on and {len(heldout)} held out",
                         expected="some of both: more text, or another --heldout-share")
    tokenizer = load_tokenizer(tokenizer) if tokenizer else train_vocabulary(train, vocab_size)
    return Corpus(tokenizer, encode_documents(tokenizer, train), encode_documents(tokenizer, heldout))


def read_corpus(paths: Sequence[str | Path]) -> list[str]:
    """The documents of files and folders (every .jsonl, .jsonl.gz and .txt below, in the order of their names).

    A line of a .jsonl is an object with the document as its "text". In a .txt, blank lines separate documents; in a
    .txt without blank lines, each line is a document.
    Errors: `InputError` naming the file and the line, for anything else.
    """
    documents, seen = [], set()
    for path in map(Path, paths):
        files = sorted(p for p in path.rglob("*") if p.name.endswith(SUFFIXES)) if path.is_dir() else [path]
        if not files or not all(file.is_file() and file.name.endswith(SUFFIXES) for file in files):
            found = "no text in this folder" if path.is_dir() else "not a text" if path.exists() else "no such file"
            raise InputError(file=path, found=found, expected="a file or folder of " + ", ".join(SUFFIXES))
        for file in files:
            if (place := file.resolve()) in seen:
                raise InputError(file=file, found="a file already in the corpus", expected="each file once")
            seen.add(place)
            text = _read_text(file)
            documents += _split_text(text) if file.suffix == ".txt" else _parse_jsonl(file, text)
    return [document for document in documents if document.strip()]


def _read_text(path: Path) -> str:
    try:
        content = path.read_bytes()
        content = gzip.decompress(content) if path.suffix == ".gz" else content
        return content.decode("utf-8").replace("\r\n", "\n")
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as problem:
        raise InputError(file=path, found=str(problem), expected="UTF-8 text") from None


def _split_text(text: str) -> list[str]:
    parts = BLANK_LINES.split(text.strip())
    return parts if len(parts) > 1 else text.split("\n")


def _parse_jsonl(path: Path, text: str) -> list[str]:
    documents = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                document = json.loads(line, object_pairs_hook=unique_keys)["text"]
            except (ValueError, TypeError, KeyError, RecursionError):
                document = None
            if not isinstance(document, str):
                raise InputError(file=path, row=number, found=short_repr(line), expected='{"text": "..."}')
            documents.append(document)
    return documents


def is_held_out(document: str, share: float) -> bool:
    """Whether a document is held out for evaluation. Its hash decides, so copies are never in both parts."""
    first = hashlib.sha256(document.encode("utf-8", "surrogatepass")).digest()[:8]
    return int.from_bytes(first) < share * 2**64


def encode_documents(tokenizer: Tokenizer, documents: list[str]) -> list[np.ndarray]:
    """Each document's ids, with [SEP] after every paragraph. Shapes: one int32 array a document.

    In fine-tuning [SEP] separates a prompt from its responses. If in pretraining it only separated unrelated documents,
    the encoder would not learn to attend across it.
    """
    paragraphs = [[part for part in BLANK_LINES.split(document) if part.strip()] for document in documents]
    flat, at_once = list(itertools.chain.from_iterable(paragraphs)), 4096
    batches = (flat[start:start + at_once] for start in range(0, len(flat), at_once))
    ids = (ids + [tokenizer.sep_id] for batch in batches for ids in tokenizer.encode_batch(batch))
    return [np.fromiter(itertools.chain.from_iterable(itertools.islice(ids, len(parts))), dtype=np.int32)
            for parts in paragraphs]


# --- windows ----------------------------------------------------------------------------------------------------------

class PackedWindows:
    """Documents packed into windows of one length: [CLS], then a slice of the concatenated documents.

    Each epoch shuffles the documents, concatenates them, cuts windows, and shuffles the windows. `batch(k)` depends
    only on k and the seed.
    """

    def __init__(self, documents: list[np.ndarray], length: int, batch_size: int, seed: int, cls_id: int):
        self.documents, self.length, self.batch_size = documents, length, batch_size
        self.seed, self.cls_id = seed, cls_id
        tokens = sum(map(len, documents))
        self.batches_per_epoch = tokens // (length - 1) // batch_size
        if not self.batches_per_epoch:
            raise InputError(found=f"{tokens:,} tokens of text", expected=f"at least {(length - 1) * batch_size:,}, "
                             f"for {batch_size} windows of {length}: more text, or smaller --batch-tokens")
        self._epoch, self._rows = -1, None

    def batch(self, number: int) -> Tensor:
        """Batch `number`, counted from 0. Shapes: -> (B, L) int64."""
        epoch, place = divmod(number, self.batches_per_epoch)
        if epoch != self._epoch:
            rng = np.random.default_rng([self.seed, self.length, epoch])
            stream = np.concatenate([self.documents[i] for i in rng.permutation(len(self.documents))])
            whole = len(stream) // (self.length - 1) * (self.length - 1)
            self._epoch, self._rows = epoch, rng.permutation(stream[:whole].reshape(-1, self.length - 1))
        rows = self._rows[place * self.batch_size:(place + 1) * self.batch_size]
        return F.pad(torch.from_numpy(rows).long(), (1, 0), value=self.cls_id)


def step_windows(step: int, short: PackedWindows, long: PackedWindows, long_share: float) -> Tensor:
    """The windows of this step; `long_share` of the steps, evenly spread, have long ones. Shapes: -> (B, L) int64."""
    long_before, long_with_this = int(step * long_share), int((step + 1) * long_share)
    return long.batch(long_before) if long_with_this > long_before else short.batch(step - long_before)


def heldout_batches(corpus: Corpus, length: int, tokens: int, device: torch.device) -> list[Tensor]:
    """About `tokens` tokens of windows of held-out documents, the same in every run. Shapes: (B, L) each.

    Errors: `InputError` for held-out documents too short for one window.
    """
    if (held_out := sum(map(len, corpus.heldout))) < length - 1:
        raise InputError(found=f"{held_out:,} tokens held out", expected=f"at least {length - 1}, for one window of "
                         f"{length}: more text, a larger --heldout-share or a smaller --length")
    windows = PackedWindows(corpus.heldout, length, 1, 0, corpus.tokenizer.cls_id)
    count = min(windows.batches_per_epoch, math.ceil(tokens / length))
    return list(torch.cat([windows.batch(k) for k in range(count)]).to(device).split(max(1, 4096 // length)))
