"""Pretraining from scratch: what makes DeBERTa 'v3' is in this file, and in no other.

BERT hides words and asks which they were (MLM). That is a question about one token in seven. ELECTRA asks about every
token: a small *generator* fills the hidden places with words it finds likely, and the encoder, the *discriminator*,
says of each token whether it is the writer's or a replacement (RTD, replaced-token detection):

    text          the  judge  read  both  answers  twice
    masked        the  judge [MASK] both  answers [MASK]
    generator     the  judge  gave  both  answers  twice      drawn from its distribution, so it can be right
    labels         0     0     1     0      0       0         1 where the token now differs from the text

    L = L_MLM(generator) + 50 L_RTD(discriminator)            only the discriminator is kept in the end

Both read words through an embedding table. v3's own idea is how they share it (`Pretraining.discriminator_table`):

    ES     E_D = E                  one table, as in ELECTRA: MLM pulls similar words together and RTD pulls them apart
    NES    E_D = its own            no tug of war, but the discriminator learns nothing from the generator's table
    GDES   E_D = sg(E_G) + E_delta  gradient-disentangled, v3: sg() lets no gradient through, so RTD moves only E_delta

Unusual here:
- Nothing is padded. Documents are packed into windows `[CLS] paragraph [SEP] paragraph [SEP] para`, and the k-th batch
  of a run depends on the seed and k alone, so that going on after an interruption needs no bookkeeping.
- Most steps read short windows, which are cheap, and every tenth reads long ones: short windows never see a distance
  beyond their length, and a row of the relative table that no gradient ever reached is noise.
- Masking is by token and every chosen token becomes [MASK], as in Microsoft's RTD code: the discriminator never sees a
  [MASK], so BERT's 80/10/10 has no purpose there. `--objective mlm`, whose encoder is kept, has 80/10/10.
- The discriminator's head adds [CLS] to every token before it judges it, as Microsoft's does (the papers do not say
  so). [CLS]'s own label is always 'original'; this sum is what teaches it to stand for the whole.

Paper: DeBERTaV3 (arXiv 2111.09543), section 3; ELECTRA (arXiv 2003.10555).
Differs: v3's generator has absolute positions before its last layers (the 'enhanced mask decoder'); ours has none.

    python -m minipref.pretrain --corpus CORPUS [CORPUS ...] --output runs/pretrain
    python -m minipref.pretrain --corpus CORPUS --encoder weights/minipref-tiny        going on from an encoder
"""

import argparse
import contextlib
import functools
import gzip
import hashlib
import itertools
import json
import math
import os
import re
import signal
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from tqdm import tqdm

from minipref import __version__, runs
from minipref.checkpoint import encoder_tensors, load_encoder, write_checkpoint
from minipref.config import EncoderConfig
from minipref.encoder import Encoder, initialise
from minipref.errors import ArgumentParser, InputError, shown
from minipref.files import check_writable, write_json
from minipref.judge import autocast, check_vocabulary, choose_device, choose_precision
from minipref.optim import AdamW, clip_gradients, cosine_with_warmup, decay_groups
from minipref.tokenizer import Tokenizer, load_tokenizer, train_vocabulary

RTD_WEIGHT = 50.0             # the paper's lambda: spread over all tokens, RTD's loss is small beside MLM's
MASKED_SHARE = 0.15
ADAM = {"betas": (0.9, 0.98), "eps": 1e-6, "weight_decay": 0.01}      # v3's
MAX_GRADIENT_NORM = 1.0
SUFFIXES = (".jsonl", ".jsonl.gz", ".txt")
BLANK_LINES = re.compile(r"\n\s*\n")


# --- Text in: documents, ids, windows ---

@dataclass
class Corpus:
    """Text as ids, with [SEP] after every paragraph."""

    tokenizer: Tokenizer
    train: list[np.ndarray]            # int32, one array a document
    heldout: list[np.ndarray]

    @functools.cached_property
    def counts(self) -> np.ndarray:
        """How often each id occurs in the training part. Shapes: -> (V,) int64."""
        return np.bincount(np.concatenate(self.train), minlength=self.tokenizer.vocab_size)

    @functools.cached_property
    def digest(self) -> str:
        """Of the ids, and of where documents begin: an epoch shuffles these."""
        documents = self.train + self.heldout
        ends = np.array([len(self.train), *map(len, documents)])
        return hashlib.sha256(np.concatenate(documents).tobytes() + ends.tobytes()).hexdigest()


def load_corpus(paths: Sequence[str | Path], heldout_share: float, tokenizer: str | Path | None, vocab_size: int
                ) -> Corpus:
    """Read, hold some documents out, and tokenize: with a tokenizer's folder, or with a vocabulary of its own.

    Errors: InputError naming what cannot be read; or that there is too little text.
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

    A line of a .jsonl is an object with the document as its "text". In a .txt, blank lines separate documents; where
    there is none, each line is one.
    Errors: InputError naming the file and the line, for anything that is not that.
    """
    documents = []
    for path in map(Path, paths):
        files = sorted(p for p in path.rglob("*") if p.name.endswith(SUFFIXES)) if path.is_dir() else [path]
        if not files or not all(file.is_file() and file.name.endswith(SUFFIXES) for file in files):
            found = "no text in this folder" if path.is_dir() else "not a text" if path.exists() else "no such file"
            raise InputError(file=path, found=found, expected="a file or folder of " + ", ".join(SUFFIXES))
        for file in files:
            text = _read_text(file)
            documents += _parts_of_text(text) if file.suffix == ".txt" else _lines_of_json(file, text)
    return [document for document in documents if document.strip()]


def _read_text(path: Path) -> str:
    try:
        content = path.read_bytes()
        content = gzip.decompress(content) if path.suffix == ".gz" else content
        return content.decode("utf-8").replace("\r\n", "\n")
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as problem:
        raise InputError(file=path, found=str(problem), expected="UTF-8 text") from None


def _parts_of_text(text: str) -> list[str]:
    parts = BLANK_LINES.split(text.strip())
    return parts if len(parts) > 1 else text.split("\n")


def _lines_of_json(path: Path, text: str) -> list[str]:
    documents = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                document = json.loads(line)["text"]
            except (ValueError, TypeError, KeyError, RecursionError):
                document = None
            if not isinstance(document, str):
                raise InputError(file=path, row=number, found=shown(line), expected='{"text": "..."}')
            documents.append(document)
    return documents


def is_held_out(document: str, share: float) -> bool:
    """Whether a document is kept for evaluation. Its own hash decides, so copies always fall on the same side."""
    first = hashlib.sha256(document.encode("utf-8", "surrogatepass")).digest()[:8]
    return int.from_bytes(first) < share * 2**64


def encode_documents(tokenizer: Tokenizer, documents: list[str]) -> list[np.ndarray]:
    """Each document's ids, with [SEP] after every paragraph. Shapes: one int32 array a document.

    Why not after the document alone: where [SEP] only ever parted texts that have nothing to do with each other, an
    encoder would have no reason to look past it, and a prompt and its answers are parted by nothing else.
    """
    paragraphs = [[part for part in BLANK_LINES.split(document) if part.strip()] for document in documents]
    flat, at_once = list(itertools.chain.from_iterable(paragraphs)), 4096
    batches = (flat[start:start + at_once] for start in range(0, len(flat), at_once))
    ids = (ids + [tokenizer.sep_id] for batch in batches for ids in tokenizer.encode_batch(batch))
    return [np.fromiter(itertools.chain.from_iterable(itertools.islice(ids, len(parts))), dtype=np.int32)
            for parts in paragraphs]


class Windows:
    """Documents packed into windows of one length: [CLS], then a piece of all documents in a row.

    An epoch shuffles the documents, joins them, cuts, and shuffles the windows. `batch(k)` depends on k and the seed
    alone.
    """

    def __init__(self, documents: list[np.ndarray], length: int, size: int, seed: int, cls_id: int):
        self.documents, self.length, self.size, self.seed, self.cls_id = documents, length, size, seed, cls_id
        tokens = sum(map(len, documents))
        self.batches_per_epoch = tokens // (length - 1) // size
        if not self.batches_per_epoch:
            raise InputError(found=f"{tokens:,} tokens of text", expected=f"at least {(length - 1) * size:,}, for "
                             f"{size} windows of {length}: more text, or smaller --batch-tokens")
        self._epoch, self._rows = -1, None

    def batch(self, number: int) -> Tensor:
        """The batch of this number, from 0. Shapes: -> (B, L) int64."""
        epoch, place = divmod(number, self.batches_per_epoch)
        if epoch != self._epoch:
            rng = np.random.default_rng([self.seed, self.length, epoch])
            stream = np.concatenate([self.documents[i] for i in rng.permutation(len(self.documents))])
            whole = len(stream) // (self.length - 1) * (self.length - 1)
            self._epoch, self._rows = epoch, rng.permutation(stream[:whole].reshape(-1, self.length - 1))
        rows = self._rows[place * self.size:(place + 1) * self.size]
        return F.pad(torch.from_numpy(rows).long(), (1, 0), value=self.cls_id)


def heldout_batches(corpus: Corpus, length: int, tokens: int, device: torch.device) -> list[Tensor]:
    """Windows of the held-out documents, about `tokens` tokens of them, the same in every run. Shapes: (B, L) each.

    Errors: InputError for held-out documents too short for one window.
    """
    if (held_out := sum(map(len, corpus.heldout))) < length - 1:
        raise InputError(found=f"{held_out:,} tokens held out", expected=f"at least {length - 1}, for one window of "
                         f"{length}: more text, a larger --heldout-share or a smaller --length")
    windows = Windows(corpus.heldout, length, 1, 0, corpus.tokenizer.cls_id)
    count = min(windows.batches_per_epoch, math.ceil(tokens / length))
    return list(torch.cat([windows.batch(k) for k in range(count)]).to(device).split(max(1, 4096 // length)))


# --- The task: hide, guess, replace, judge ---

def choose_masked(ids: Tensor, is_special: Tensor, share: float = MASKED_SHARE) -> Tensor:
    """Which tokens to hide: `share` of each window's length, rounded, but no special one.

    Shapes: ids, is_special (B, L) -> (B, L) bool.
    """
    order = torch.rand(ids.shape, device=ids.device).masked_fill(is_special, 2.0)
    chosen = order.topk(round(share * ids.shape[1]), dim=1, largest=False).indices
    return torch.zeros_like(is_special).scatter(1, chosen, True) & ~is_special


def hide_80_10_10(ids: Tensor, is_masked: Tensor, mask_id: int, vocab_size: int) -> Tensor:
    """BERT's way: of the chosen tokens 80% become [MASK], 10% any id, 10% stay, so that its encoder sees real words.

    Shapes: ids, is_masked (B, L) -> (B, L).
    """
    draw = torch.rand(ids.shape, device=ids.device)
    hidden = torch.where(draw < 0.8, mask_id, torch.where(draw < 0.9, torch.randint_like(ids, vocab_size), ids))
    return torch.where(is_masked, hidden, ids)


def sample(logits: Tensor) -> Tensor:
    """One id of each row's softmax(logits): the first whose cumulative probability passes a uniform number.

    That takes one random number a row; `torch.multinomial` draws one for each word of the vocabulary.
    Shapes: (M, V) -> (M,) int64.
    """
    cumulative = torch.softmax(logits.float(), dim=-1).cumsum(dim=-1)
    threshold = torch.rand(len(logits), 1, device=logits.device) * cumulative[:, -1:]      # the sum is 1 only nearly
    return torch.searchsorted(cumulative, threshold, right=True).squeeze(1).clamp(max=logits.shape[1] - 1)


class MaskedWordHead(nn.Module):
    """Which word was hidden; the table of input words is its output layer. A table may have more rows than there are
    words, as v3's 128,100 for 128,001: those are no answer. Shapes: x (M, D), table (V or more, D) -> (M, V)."""

    def __init__(self, config: EncoderConfig, words: int):
        super().__init__()
        self.dense = nn.Linear(config.width, config.width)
        self.norm = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.bias = nn.Parameter(torch.zeros(words))

    def forward(self, x: Tensor, table: Tensor) -> Tensor:
        return F.linear(self.norm(F.gelu(self.dense(x))), table[:len(self.bias)], self.bias)


class ReplacedTokenHead(nn.Module):
    """Whether each token is a replacement, as a logit, in the light of [CLS]. Shapes: x (B, L, D) -> (B, L)."""

    def __init__(self, config: EncoderConfig):
        super().__init__()
        self.norm = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.dense = nn.Linear(config.width, config.width)
        self.verdict = nn.Linear(config.width, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x[:, :1] + x)                                      # [CLS] is the first of every window
        return self.verdict(F.gelu(self.dense(x))).squeeze(-1)


class Pretraining(nn.Module):
    """Generator and discriminator with their heads. For objective "mlm": a generator of full depth, and nothing else.

    The generator is as wide as the discriminator, whose word table it shares, and half as deep.
    """

    def __init__(self, config: EncoderConfig, tokenizer: Tokenizer, objective: str = "rtd", sharing: str = "gdes"):
        super().__init__()
        self.config, self.objective, self.sharing = config, objective, sharing
        self.words, self.mask_id = tokenizer.vocab_size, tokenizer.mask_id
        layers = config.layers if objective == "mlm" else max(1, config.layers // 2)
        self.generator = Encoder(replace(config, layers=layers))
        self.masked_word_head = MaskedWordHead(config, self.words)
        if objective == "rtd":
            self.discriminator = Encoder(config)
            self.replaced_token_head = ReplacedTokenHead(config)
        initialise(self, config.init_std)
        if objective == "rtd" and sharing == "es":
            self.discriminator.word_table = self.generator.word_table
        if objective == "rtd" and sharing == "gdes":
            nn.init.zeros_(self.discriminator.word_table.weight)         # from here on this parameter is E_delta
        special = [tokenizer.pad_id, tokenizer.cls_id, tokenizer.sep_id, tokenizer.mask_id]
        self.register_buffer("special_ids", torch.tensor(special), persistent=False)

    def go_on_from(self, encoder: Encoder) -> None:
        """Take an encoder's weights in place of fresh ones: the discriminator all of them, the generator the word table
        and as many of the lowest layers as it has (for "mlm" all). The heads stay fresh."""
        trained = encoder.state_dict()
        for side in (self.generator, self.discriminator) if self.objective == "rtd" else (self.generator,):
            side.load_state_dict({name: trained[name] for name in side.state_dict()})
        if self.objective == "rtd" and self.sharing == "gdes":
            nn.init.zeros_(self.discriminator.word_table.weight)         # the words are E_G; E_delta is to come

    def discriminator_table(self) -> Tensor:
        """The words as the discriminator sees them. Shapes: -> (V, D). Paper: DeBERTaV3, section 3.3."""
        if self.sharing == "gdes":
            return self.generator.word_table.weight.detach() + self.discriminator.word_table.weight
        return self.discriminator.word_table.weight                      # nes: its own. es: the generator's as well

    def corrupt(self, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Hide some tokens, let the generator guess them, and put what it drew into their places.

        Shapes: ids (B, L) -> is_masked (B, L) bool, corrupted ids (B, L), the guesses' float32 logits (M, V).
        A drawn id is a number, not a function of the weights: no gradient comes back through `corrupted`.
        """
        is_masked = choose_masked(ids, self.is_special(ids))
        if self.objective == "mlm":
            hidden = hide_80_10_10(ids, is_masked, self.mask_id, self.words)
        else:
            hidden = ids.masked_fill(is_masked, self.mask_id)
        x = self.generator(hidden, torch.ones_like(is_masked))[is_masked]                # (M, D)
        guesses = self.masked_word_head(x, self.generator.word_table.weight).float()     # (M, V)
        return is_masked, ids.masked_scatter(is_masked, sample(guesses.detach())), guesses

    def judge(self, ids: Tensor) -> Tensor:
        """The discriminator's logits that each token is a replacement, float32. Shapes: (B, L) -> (B, L)."""
        is_token = torch.ones_like(ids, dtype=torch.bool)
        x = functional_call(self.discriminator, {"word_table.weight": self.discriminator_table()}, (ids, is_token))
        return self.replaced_token_head(x).float()

    def is_special(self, ids: Tensor) -> Tensor:
        """Shapes: (B, L) -> (B, L) bool."""
        return torch.isin(ids, self.special_ids)

    def sides(self) -> list[nn.Module]:
        """What each optimizer trains: the generator's side, and for "rtd" the discriminator's. A shared table is on the
        generator's."""
        sides = [nn.ModuleList([self.generator, self.masked_word_head])]
        if self.objective == "rtd":
            parts = [part for part in self.discriminator.children() if part is not self.generator.word_table]
            sides.append(nn.ModuleList([*parts, self.replaced_token_head]))
        return sides

    def encoder(self) -> tuple[Encoder, Tensor]:
        """What is kept in the end: an encoder, and the word table (V, D) to go with it, summed up."""
        if self.objective == "mlm":
            return self.generator, self.generator.word_table.weight
        return self.discriminator, self.discriminator_table()


# --- How well it does ---

@torch.no_grad()
def evaluate(model: Pretraining, batches: list[Tensor], counts: np.ndarray, autocast_here: Callable
             ) -> dict[str, float]:
    """The figures on held-out windows, rounded to five decimals; the same tokens are hidden at every call.

    Changes no random state. Shapes: batches (B, L) each, counts (V,): how often each id occurs in the training text.
    """
    losses, hits, hidden, verdicts, is_replaced, ids_seen = [], [], [], [], [], []
    model.eval()
    with runs.random_state_kept():
        torch.manual_seed(0)
        for ids in batches:
            with autocast_here():
                is_masked, corrupted, guesses = model.corrupt(ids)
            losses.append(F.cross_entropy(guesses, ids[is_masked], reduction="none"))
            hits.append(guesses.argmax(dim=-1) == ids[is_masked])
            hidden.append(ids[is_masked])
            if model.objective == "rtd":
                is_word = ~model.is_special(ids)
                with autocast_here():
                    verdicts.append(model.judge(corrupted)[is_word])
                is_replaced.append((corrupted != ids)[is_word])
                ids_seen.append(corrupted[is_word])
    model.train()
    figures = {"mlm_loss": torch.cat(losses).mean().item(), "mlm_accuracy": torch.cat(hits).float().mean().item()}
    of_words = counts.copy()
    of_words[model.special_ids.cpu().numpy()] = 0                       # which are never hidden
    figures |= frequency_figures(torch.cat(hidden).cpu().numpy(), of_words)
    if model.objective == "rtd":
        verdicts, is_replaced, ids_seen = (torch.cat(parts).cpu().numpy() for parts in
                                           (verdicts, is_replaced, ids_seen))
        figures |= detection_figures(verdicts, is_replaced, np.log1p(counts[ids_seen]))
    return {name: round(float(value), 5) for name, value in figures.items()}


def frequency_figures(hidden: np.ndarray, counts: np.ndarray) -> dict[str, float]:
    """What guessing hidden words by how often each occurs comes to, the same guess everywhere. One more is counted of
    each, so that no word is impossible. Shapes: hidden (n,) ids, counts (V,)."""
    shares = (counts + 1) / (counts + 1).sum()
    return {"unigram_loss": -np.log(shares[hidden]).mean(), "unigram_accuracy": (hidden == shares.argmax()).mean()}


def detection_figures(verdicts: np.ndarray, is_replaced: np.ndarray, commonness: np.ndarray) -> dict[str, float]:
    """The discriminator's figures over all but special tokens, and beside them those of who has not read the text.

    - rtd_precision, rtd_recall, rtd_f1: a token is called replaced where that is more likely than not.
    - 'always original' has the accuracy 1 - replaced_share and an F1 of 0; constant_loss is the loss of the best
      constant probability.
    - unigram_best_f1 calls words replaced that are commoner, or rarer, than some threshold. Direction and threshold are
      the best for these very tokens; rtd_best_f1 is ours with that same advantage.

    Shapes: (n,) each: verdicts logits, is_replaced bool, commonness log frequencies.
    """
    share = is_replaced.mean()
    called = verdicts > 0
    found = (called & is_replaced).sum()
    return {
        "rtd_loss": (np.logaddexp(0, verdicts) - verdicts * is_replaced).mean(),
        "constant_loss": -sum(p * math.log(p) for p in (share, 1 - share) if p > 0),
        "rtd_accuracy": (called == is_replaced).mean(),
        "replaced_share": share,
        "rtd_precision": found / max(1, called.sum()),
        "rtd_recall": found / max(1, is_replaced.sum()),
        "rtd_f1": 2 * found / max(1, called.sum() + is_replaced.sum()),
        "rtd_best_f1": best_f1(verdicts, is_replaced),
        "unigram_best_f1": max(best_f1(commonness, is_replaced), best_f1(-commonness, is_replaced)),
        "rtd_average_precision": average_precision(verdicts, is_replaced),
    }


def best_f1(scores: np.ndarray, labels: np.ndarray) -> float:
    """The highest F1 of 'where the score is at least t' over all t. Shapes: scores (n,), labels (n,) bool."""
    order = np.argsort(-scores, kind="stable")
    found = np.cumsum(labels[order])
    ends = np.append(np.flatnonzero(np.diff(scores[order])), len(order) - 1)        # equal scores are called together
    return float((2 * found[ends] / (ends + 1 + max(1, labels.sum()))).max())


def average_precision(scores: np.ndarray, labels: np.ndarray) -> float:
    """The mean, over the replaced tokens, of the precision down to each. Shapes: scores (n,), labels (n,) bool."""
    in_order = labels[np.argsort(-scores, kind="stable")]
    precision = np.cumsum(in_order) / np.arange(1, len(in_order) + 1)
    return float(precision[in_order].mean()) if in_order.any() else 0.0


# --- The run ---

@dataclass
class Progress:
    """Where a run stands, but for the weights, the optimizers and the random generators."""

    step: int = 0                                            # steps done
    mlm_sum: float = 0.0                                     # since the last evaluation: of the training losses,
    rtd_sum: float = 0.0
    summed: int = 0                                          # how many steps they were, of how many tokens,
    tokens: int = 0
    seconds: float = 0.0                                     # and the time that those took, on the wall
    processor_seconds: float = 0.0                           # and of the processor, all cores added up
    rows: list[dict] = field(default_factory=list)           # of metrics.csv
    timing: list[dict] = field(default_factory=list)         # of timing.csv


def pretrain(args: argparse.Namespace) -> int:
    """The whole run, in a folder that is this run's alone. Returns the exit code: 0, or 128 + the signal that stopped
    it."""
    output = Path(args.output)
    check_writable(output / "config.json")
    with runs.alone_in(output):
        return pretrain_in(output, args)


@dataclass
class Setup:
    """What a run's steps need beside `Progress`."""

    device: torch.device
    autocast: Callable[[], contextlib.AbstractContextManager]
    corpus: Corpus
    short: Windows
    long: Windows
    heldout: list[Tensor]
    shipped: EncoderConfig             # as model/ says it: with the encoder's own dropout, whatever pretraining uses
    model: Pretraining
    optimizers: list[AdamW]            # one for each of the model's sides


def pretrain_in(output: Path, args: argparse.Namespace) -> int:
    """Build or restore, train, evaluate now and then, ship."""
    setup, progress = set_up(output, args)
    print(describe(setup.model, setup.corpus, args.steps * args.batch_tokens), flush=True)
    evaluate_after = {round(args.steps * (k + 1) / args.evaluations) for k in range(args.evaluations)}
    clock = Clock()
    bar = tqdm(total=args.steps * args.batch_tokens, initial=progress.step * args.batch_tokens, desc="pretraining",
               unit=" tokens", unit_scale=True, smoothing=0.02, mininterval=1)
    with noted_signals() as signals, bar:
        for step in range(progress.step, args.steps):
            ids = next_windows(step, setup.short, setup.long, args.long_share).to(setup.device)      # (B, L)
            course = cosine_with_warmup(step + 1, args.steps + 1, args.warmup, 1.0)                  # 0 to 1 to 0
            mlm_loss, rtd_loss = take_step(setup, ids, course * args.lr, course * args.discriminator_lr)

            progress.step += 1
            progress.mlm_sum += mlm_loss
            progress.rtd_sum += rtd_loss
            progress.summed += 1
            progress.tokens += ids.numel()
            if not math.isfinite(progress.mlm_sum + progress.rtd_sum):
                raise InputError(found=f"a loss that is not a number in step {step} with --lr {args.lr}",
                                 expected="a lower --lr, or --precision fp32")
            seconds, processor_seconds = clock.lap()
            progress.seconds += seconds
            progress.processor_seconds += processor_seconds
            bar.update(ids.numel())

            if progress.step in evaluate_after:
                progress.timing.append(timing_row(progress))
                progress.rows.append(training_row(progress, course * args.lr)
                                     | evaluate(setup.model, setup.heldout, setup.corpus.counts, setup.autocast))
                bar.write(summary(progress.rows[-1]))
                progress.mlm_sum = progress.rtd_sum = progress.seconds = progress.processor_seconds = 0.0
                progress.summed = progress.tokens = 0
                runs.write_rows(output / "metrics.csv", progress.rows)
                runs.write_rows(output / "timing.csv", progress.timing)
                ship(setup.model, setup.shipped, setup.corpus.tokenizer, output / "model")
                save(output, setup, progress)
                clock.lap()                                                  # an evaluation's time is not a step's
            if signals:
                save(output, setup, progress)
                bar.write(f"stopped after step {progress.step}; the same command with --resume goes on from there")
                return 128 + signals[0]
    write_json(output / "report.json", {"parameters": parameters(setup.model.encoder()[0]), **progress.rows[-1]})
    return 0


def take_step(setup: Setup, ids: Tensor, lr: float, discriminator_lr: float) -> tuple[float, float]:
    """One step of the generator and, for "rtd", one of the discriminator on the same windows. Returns both losses, 0
    for one that there is not. Shapes: ids (B, L).
    """
    model, sides, optimizers = setup.model, setup.model.sides(), setup.optimizers
    one_table = model.objective == "rtd" and model.sharing == "es"

    # The generator guesses the hidden words, and learns from the loss.
    with setup.autocast():
        is_masked, corrupted, guesses = model.corrupt(ids)
    mlm_loss = F.cross_entropy(guesses, ids[is_masked])
    if not one_table:
        mlm_loss.backward()
        update(optimizers[0], sides[0], lr)
    if model.objective == "mlm":
        return mlm_loss.item(), 0.0

    # The discriminator judges every token of what came out. With ES both losses meet in the one table.
    with setup.autocast():
        verdicts = model.judge(corrupted)
    rtd_loss = F.binary_cross_entropy_with_logits(verdicts, (corrupted != ids).float())
    (RTD_WEIGHT * rtd_loss + (mlm_loss if one_table else 0)).backward()
    if one_table:
        update(optimizers[0], sides[0], lr)
    update(optimizers[1], sides[1], discriminator_lr)
    return mlm_loss.item(), rtd_loss.item()


def set_up(output: Path, args: argparse.Namespace) -> tuple[Setup, Progress]:
    """Read the text, then build what a new run begins with, or restore what the old one left; note what it is made of.

    Errors: InputError for what cannot be read, does not fit together, or would write over something.
    """
    if args.threads:
        torch.set_num_threads(args.threads)
    runs.seed_everything(args.seed)
    device = choose_device(args.device)
    precision = choose_precision(args.precision, device)
    precision = "fp32" if precision == "fp16" else precision                 # whose losses would have to be scaled
    settings = {k: v for k, v in vars(args).items() if k not in NOT_SETTINGS} | {"precision": precision}
    machine = {"device": device.type, "threads": torch.get_num_threads(), "torch": torch.__version__,
               "minipref": __version__}

    begun = shipped = None
    if args.resume:
        shipped = check_settings(output, settings, machine)
    elif runs.has_state(output / "state"):
        raise InputError(file=output, found="a run that was begun", expected="--resume, or another --output")
    elif args.encoder:
        if Path(args.encoder).resolve() == (output / "model").resolve():
            raise InputError(file=args.encoder, found="the folder that this run would write its own encoder to",
                             expected="another --output")
        begun = load_encoder(args.encoder)
        shipped = begun.config
        print(f"encoder {args.encoder}: {begun.load_report}")
    corpus = load_corpus(args.corpus, args.heldout_share,
                         output / "model" if args.resume else args.encoder or args.tokenizer, args.vocab_size)
    shipped = shipped or fresh_config(args, corpus.tokenizer)
    check_vocabulary(corpus.tokenizer, shipped.vocab_size, args.encoder or output)
    short, long = (Windows(corpus.train, length, args.batch_tokens // length, args.seed, corpus.tokenizer.cls_id)
                   for length in (args.length, args.long_length if args.long_share else args.length))
    heldout = heldout_batches(corpus, args.length, args.heldout_tokens, device)

    config = replace(shipped, hidden_dropout=args.dropout, attention_dropout=args.dropout)
    model = Pretraining(config, corpus.tokenizer, args.objective, args.sharing)
    if begun:
        model.go_on_from(begun)
    model.to(device).train()
    optimizers = [AdamW(decay_groups(side, ADAM["weight_decay"]), **ADAM) for side in model.sides()]
    setup = Setup(device, functools.partial(autocast, device, precision), corpus, short, long, heldout, shipped, model,
                  optimizers)
    if args.resume:
        return setup, restore(output, setup)
    runs.write_made_of(output, {"settings": settings, "machine": machine, "encoder": asdict(shipped),
                                "begun_with": runs.digest_of(begun) if begun else None})
    corpus.tokenizer.save(output / "model")
    return setup, Progress()


def next_windows(step: int, short: Windows, long: Windows, long_share: float) -> Tensor:
    """The windows of this step: long ones in `long_share` of the steps, evenly spread. Shapes: -> (B, L) int64."""
    long_before, long_with_this = int(step * long_share), int((step + 1) * long_share)
    return long.batch(long_before) if long_with_this > long_before else short.batch(step - long_before)


def update(optimizer: AdamW, side: nn.Module, lr: float) -> None:
    """Clip, step, and forget the gradients. Errors: InputError, before the step, where they are not numbers."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    norm = clip_gradients(side.parameters(), MAX_GRADIENT_NORM)
    if not math.isfinite(norm):
        raise InputError(found=f"gradients with a norm of {norm} at a rate of {lr:.1e}",
                         expected="a lower --lr or --discriminator-lr, or --precision fp32")
    optimizer.step()
    optimizer.zero_grad()


def fresh_config(args: argparse.Namespace, tokenizer: Tokenizer) -> EncoderConfig:
    """The encoder asked for, v3 in everything but size, as it is shipped: without dropout, whatever pretraining uses.

    With v3's 0.1 an encoder this small stays at the class prior when it is fine-tuned (docs/experiments.md).
    """
    if args.width % args.heads:
        raise InputError(found=f"--width {args.width} with --heads {args.heads}", expected="a multiple of the heads")
    return EncoderConfig(vocab_size=tokenizer.vocab_size, width=args.width, heads=args.heads, layers=args.layers,
                         feed_forward=args.feed_forward, hidden_dropout=0.0, attention_dropout=0.0, head_dropout=0.0,
                         init_std=args.init_std, pad_id=tokenizer.pad_id)


def save(output: Path, setup: Setup, progress: Progress) -> None:
    """Everything the next step depends on."""
    tensors, random_facts = runs.random_state()
    tensors |= {f"model.{name}": value for name, value in setup.model.named_parameters()}    # a shared table comes once
    for i, optimizer in enumerate(setup.optimizers):
        tensors |= runs.optimizer_tensors(optimizer, f"optimizer-{i}.")
    runs.save_state(output / "state", tensors,
                    asdict(progress) | {"random": random_facts, "corpus": setup.corpus.digest})


def restore(output: Path, setup: Setup) -> Progress:
    """The reverse of `save`. Errors: InputError for a damaged state, or a corpus that is not the one of the run."""
    tensors, facts = runs.load_state(output / "state")
    if facts.pop("corpus") != setup.corpus.digest:
        raise InputError(file=output, found="a run that was begun with another text", expected="the same --corpus")
    with torch.no_grad():
        for name, parameter in setup.model.named_parameters():
            parameter.copy_(tensors[f"model.{name}"])
    for i, optimizer in enumerate(setup.optimizers):
        runs.restore_optimizer(optimizer, tensors, f"optimizer-{i}.")
    runs.restore_random_state(tensors, facts.pop("random"))
    return Progress(**facts)


def check_settings(output: Path, settings: dict, machine: dict) -> EncoderConfig:
    """What the run that is to go on ships. Errors: InputError where it was begun with other settings than these."""
    if not runs.has_state(output / "state"):
        raise InputError(file=output, found="no saved state", expected="a run that was begun; leave --resume out")
    begun = runs.read_made_of(output, "minipref.pretrain")
    for name, value in settings.items():
        if name != "corpus" and begun["settings"].get(name) != value:    # a corpus is known by what is in it
            raise InputError(file=output, found=f"--{name.replace('_', '-')} {shown(value)}",
                             expected=f"{shown(begun['settings'].get(name))}, as the run was begun")
    for name, value in machine.items():
        if begun["machine"][name] != value:
            print(f"note: {name} is {value} and was {begun['machine'][name]}: the run goes on, but not bit for bit")
    return EncoderConfig(**begun["encoder"])


def ship(model: Pretraining, config: EncoderConfig, tokenizer: Tokenizer, folder: Path) -> None:
    """Write the encoder alone, its word table summed up, float16, in the Hugging Face layout, with the tokenizer."""
    encoder, table = model.encoder()
    tensors = encoder_tensors(encoder) | {"deberta.embeddings.word_embeddings.weight": table}
    fields = config.to_json()
    of_a_classifier = ["id2label", "label2id", "problem_type"]
    if config.head_dropout == config.hidden_dropout:                     # as it is read where the file does not say
        of_a_classifier.append("cls_dropout")
    for name in of_a_classifier:
        del fields[name]
    tokenizer.save(folder)
    write_checkpoint(tensors, fields | {"architectures": ["DebertaV2Model"], "dtype": "float16"}, folder, torch.float16)


@contextlib.contextmanager
def noted_signals() -> Iterator[list[int]]:
    """A list that the first SIGINT or SIGTERM is put into; a second one ends the process at once, saved or not."""
    noted = []

    def note(number: int, frame: object) -> None:
        if noted:
            os._exit(128 + number)
        noted.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# --- What it says ---

class Clock:
    """The seconds from one `lap()` to the next, (on the wall, of the processor)."""

    def __init__(self):
        self.before = time.perf_counter(), time.process_time()

    def lap(self) -> tuple[float, float]:
        before, self.before = self.before, (time.perf_counter(), time.process_time())
        return self.before[0] - before[0], self.before[1] - before[1]


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def describe(model: Pretraining, corpus: Corpus, tokens: int) -> str:
    of_epoch = sum(map(len, corpus.train))
    return (f"{parameters(model):,} parameters, {parameters(model.encoder()[0]):,} of them kept; {len(corpus.train):,} "
            f"documents, {of_epoch:,} tokens, of which the run reads {tokens:,} ({tokens / of_epoch:.2f} epochs); "
            f"held out: {len(corpus.heldout):,} documents, {sum(map(len, corpus.heldout)):,} tokens")


def training_row(progress: Progress, lr: float) -> dict[str, float]:
    before = progress.rows[-1]["tokens"] if progress.rows else 0
    return {"step": progress.step, "tokens": before + progress.tokens, "lr": round(lr, 7),
            "train_mlm_loss": round(progress.mlm_sum / progress.summed, 5),
            "train_rtd_loss": round(progress.rtd_sum / progress.summed, 5)}


def timing_row(progress: Progress) -> dict[str, float]:
    return {"step": progress.step, "seconds": round(progress.seconds, 1),
            "processor_seconds": round(progress.processor_seconds, 1),
            "tokens_per_second": round(progress.tokens / progress.seconds)}


def summary(row: dict[str, float]) -> str:
    line = (f"step {row['step']:,}: MLM loss {row['mlm_loss']:.3f} (word frequency {row['unigram_loss']:.3f}), "
            f"{row['mlm_accuracy']:.1%} right ({row['unigram_accuracy']:.1%})")
    if "rtd_f1" in row:
        line += (f"; RTD loss {row['rtd_loss']:.4f} (constant {row['constant_loss']:.4f}), precision "
                 f"{row['rtd_precision']:.3f}, recall {row['rtd_recall']:.3f}, F1 {row['rtd_f1']:.3f} (always original "
                 f"0, word frequency at its best {row['unigram_best_f1']:.3f})")
    return line


# --- Arguments ---

NOT_SETTINGS = ("output", "resume", "threads", "device")      # what may differ when a run goes on
FRESH = {"tokenizer": None, "vocab_size": 8000, "width": 192, "heads": 3, "layers": 4, "feed_forward": 768,
         "init_std": 0.06}                                      # an encoder to go on from has its own


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m minipref.pretrain`. Returns the exit code."""
    try:
        return pretrain(parse_arguments(argv))
    except InputError as problem:
        print(f"pretrain: {problem}", file=sys.stderr)
        return 2
    except OSError as problem:
        print(f"pretrain: {' '.join(str(problem).split())}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("pretrain: interrupted before the first step", file=sys.stderr)
        return 130


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = ArgumentParser(prog="python -m minipref.pretrain", description="Pretrain a small DeBERTa-v3 on text.",
                            formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--corpus", nargs="+", required=True, metavar="PATH", help="folders, .jsonl, .jsonl.gz or .txt files")
    add("--output", default="runs/pretrain", metavar="DIR", help="the run's folder; the encoder lands in its model/")
    add("--resume", action="store_true", help="go on with the run in --output")
    add("--encoder", metavar="DIR", help="go on from this encoder and its tokenizer, instead of fresh weights")
    add("--objective", choices=("rtd", "mlm"), default="rtd", help="mlm: no discriminator, keep a BERT instead")
    add("--sharing", choices=("gdes", "es", "nes"), default="gdes", help="of the word table, for rtd")
    for name, default, help in (
            ("steps", 5000, "optimizer steps"), ("batch-tokens", 2048, "a step reads"), ("length", 128, "of a window"),
            ("long-length", 512, "of a window in some steps"), ("warmup", 400, "steps"),
            ("evaluations", 25, "on held-out text, evenly spread"),
            ("heldout-tokens", 32_768, "that each reads, at most")):
        add(f"--{name}", type=positive, default=default, metavar="N", help=help)
    for name, default, help in (
            ("long-share", 0.1, "of the steps read long windows"), ("lr", 2e-3, "of the generator, at its peak"),
            ("discriminator-lr", 5e-4, "at its peak"),
            ("heldout-share", 0.01, "of the documents"), ("dropout", 0.0, "while pretraining")):
        add(f"--{name}", type=float, default=default, metavar="X", help=help)
    add("--precision", choices=("auto", "fp32", "bf16"), default="auto", help="of the forward pass")
    add("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto")
    add("--threads", type=positive, default=None, metavar="N", help="of the CPU; as many as torch likes, if left out")
    add("--seed", type=int, default=0)
    fresh = parser.add_argument_group("a fresh encoder", "Not beside --encoder, which has its own.")
    fresh.add_argument("--tokenizer", metavar="DIR", default=argparse.SUPPRESS,
                       help="a folder with a tokenizer, instead of training a vocabulary")
    for name, kind, help in (("vocab-size", positive, "ids, special ones included"), ("width", positive, "D"),
                             ("heads", positive, "H"), ("layers", positive, "N; the generator has half as many"),
                             ("feed-forward", positive, "F"), ("init-std", float, "of fresh matrices")):
        fresh.add_argument(f"--{name}", type=kind, metavar="X" if kind is float else "N", default=argparse.SUPPRESS,
                           help=f"{help} (default: {FRESH[name.replace('-', '_')]})")
    args = parser.parse_args(argv)
    for name, value in FRESH.items():
        if hasattr(args, name) and args.encoder:
            parser.error(f"--{name.replace('_', '-')} beside --encoder, which has its own")
        setattr(args, name, getattr(args, name, None if args.encoder else value))
    for name in ("lr", "discriminator_lr", "long_share", "heldout_share", "dropout", "init_std"):
        if not 0 <= (getattr(args, name) or 0) < 1 + (name == "long_share"):
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)} is not from 0 to 1")
    if args.init_std == 0:
        parser.error("--init-std 0 leaves nothing to learn from")
    if not 0 <= args.seed < 2**63:
        parser.error(f"--seed {args.seed} is not from 0 to {2**63 - 1}")
    if args.warmup >= args.steps:
        parser.error(f"--warmup {args.warmup} is not below --steps {args.steps}")
    for name in ("length", "long_length"):
        if not 4 <= getattr(args, name) <= args.batch_tokens:            # 15% of three tokens are none
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)} is not from 4 to --batch-tokens")
    return args


def positive(text: str) -> int:
    """A whole number of at least 1, for argparse."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return number


if __name__ == "__main__":
    sys.exit(main())
