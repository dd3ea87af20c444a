"""A trained model in use: `Judge` holds weights, tokenizer, budget and temperature, and compares responses.

What is unusual here: annotators and models have a position bias. Each pair is predicted in both orders, the prediction
for the swapped pair is mapped back (A and B exchanged), and the two are averaged.
"""

import argparse
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from minipref.checkpoint import load_classifier, save_classifier
from minipref.config import LABELS
from minipref.data import SHARES, Pair, TokenizedPairs, batches_by_tokens, collate, encode_pairs, swap_classes, to_pairs
from minipref.fast import accelerate
from minipref.metrics import swap_averaged
from minipref.model import PreferenceModel
from minipref.run import distributed
from minipref.run.folder import is_interim
from minipref.runtime import (
    ArgumentParser,
    InputError,
    autocast,
    check_folder,
    folder_sha256,
    read_json,
    short_repr,
    write_json,
)
from minipref.surface import FEATURES, LogisticRegression, surface_features
from minipref.tokenizer import Tokenizer, load_tokenizer

SETTINGS = "minipref.json"        # in a model's folder, next to config.json: max_length, temperature, blend
ROWS_AT_ONCE = 4096               # tokenized and sorted by length together
MAX_LENGTH = 1 << 16              # tokens; far beyond any use, and small enough for a clear out-of-memory error


class Judge:
    """Predicts the probabilities that a person prefers A, prefers B, or calls it a tie.

    `temperature` divides the logits; the logits of `surface`, a regression on surface features scaled by its weight in
    the blend, are added; `max_length` is the budget of the whole sequence in tokens.
    """

    def __init__(self, model: PreferenceModel, tokenizer: Tokenizer, max_length: int, temperature: float = 1.0,
                 precision: str = "fp32", surface: LogisticRegression | None = None):
        self.model, self.tokenizer, self.surface = model, tokenizer, surface
        self.max_length, self.temperature, self.precision = max_length, temperature, precision

    def compare(self, prompt: str | Sequence[str | None], response_a: str | Sequence[str | None],
                response_b: str | Sequence[str | None]) -> tuple[float, float, float]:
        """(p_a, p_b, p_tie) of one pair; the arguments are those of a row of `compare_many`."""
        return tuple(self.compare_many([(prompt, response_a, response_b)])[0].tolist())

    def compare_many(self, rows: Iterable[tuple], batch_tokens: int = 16_384, swap_average: bool = True,
                     progress: Callable[[int], object] | None = None) -> np.ndarray:
        """Probabilities of many pairs (prompt, response_a, response_b). Shapes: N rows -> (N, 3) float64.

        Each of the three is a text or a list of turns, in which None is a missing turn. If most prompts are JSON lists,
        all texts are parsed, as in a file with these cells (`to_pairs`).
        Errors: `InputError` for any other row, or if the model's arithmetic overflows.
        """
        pairs = to_pairs(rows)
        if not pairs:
            return np.empty((0, 3))
        blocks = [pairs[begin:begin + ROWS_AT_ONCE] for begin in range(0, len(pairs), ROWS_AT_ONCE)]
        orders = (False, True) if swap_average else (False,)
        logits = []
        with ThreadPoolExecutor(1) as executor:             # tokenizes the next block during prediction of this one
            coming = executor.submit(encode_pairs, blocks[0], self.tokenizer, self.max_length)
            for following in (*blocks[1:], None):
                tokenized = coming.result()
                if following is not None:
                    coming = executor.submit(encode_pairs, following, self.tokenizer, self.max_length)
                logits.append(predict_logits(self.model, tokenized, self.tokenizer, batch_tokens,
                                             precision=self.precision, orders=orders, progress=progress))
        logits = np.concatenate(logits)
        if not np.isfinite(logits).all():
            raise InputError(found=f"logits that are not finite, in precision {self.precision}",
                             expected="--precision fp32 or bf16, or a model whose training did not diverge")
        return swap_averaged(logits, self.temperature, self.surface_logits(pairs))

    def surface_logits(self, pairs: Sequence[Pair]) -> np.ndarray | None:
        """The logits that the blend adds to each row. Shapes: N pairs -> (N, 3)."""
        return None if self.surface is None else self.surface.logits(surface_features(pairs))

    def save(self, folder: str | Path, replace: bool = False) -> None:
        """Write a folder that `load_judge` and Hugging Face's `from_pretrained` load.

        The settings come last. They hold the SHA-256 of the other files, so that a mix of two models is detected.
        Errors: `InputError` for a folder that is not empty, unless `replace`.
        """
        folder = Path(folder)
        if not replace and folder.is_dir() and any(folder.iterdir()):
            raise InputError(file=folder, found="a folder that is not empty",
                             expected="a new or an empty one, or replace=True")
        self.tokenizer.save(folder)
        save_classifier(self.model, folder)
        files = {name: digest for name, digest in folder_sha256(folder).items() if name != SETTINGS}
        surface = {name: value.tolist() for name, value in vars(self.surface).items()} if self.surface else None
        write_json(folder / SETTINGS, {
            "format": 2, "max_length": self.max_length, "shares": list(SHARES), "temperature": self.temperature,
            "surface": surface and {"features": list(FEATURES)} | surface, "files": files})


def load_judge(folder: str | Path, device: torch.device | str = "cpu", precision: str = "fp32", fast: bool = True
               ) -> Judge:
    """Load a trained model's folder, written by train.py: weights, tokenizer, budget, temperature.

    The model is accelerated unless `fast` is False. `model.load_report.note` lists changed files and other warnings.
    Errors: `InputError` for missing, damaged or inconsistent files.
    """
    folder = Path(folder)
    check_folder(folder, "a trained model's folder, like runs/NAME/model")
    max_length, temperature, surface = _read_settings(folder / SETTINGS)
    tokenizer = load_tokenizer(folder)
    model = load_classifier(folder, device=device)
    refuse_other_task(model, folder)
    if model.load_report.new:
        raise InputError(file=folder / "model.safetensors", found=f"no {' and no '.join(model.load_report.new)}",
                         expected="a trained classifier; this is an encoder, which train.py --encoder fine-tunes")
    check_vocabulary(tokenizer, model.config.vocab_size, folder)
    interim = "the best model so far of an unfinished run, without temperature and blend" * is_interim(folder)
    notes = model.load_report.note, _changed_files(folder), interim
    model.load_report.note = "; ".join(filter(None, notes))
    return Judge(accelerate(model) if fast else model, tokenizer, max_length, temperature, precision, surface)


def refuse_other_task(model: PreferenceModel, folder: str | Path) -> None:
    """Errors: `InputError` for a classifier that was trained for another task."""
    if model.load_report.other_task:
        raise InputError(file=folder, found=f"a head for: {model.load_report.other_task}",
                         expected=f"a head for {', '.join(LABELS)}; train.py --encoder trains one on this encoder")


def check_vocabulary(tokenizer: Tokenizer, vocab_size: int, folder: str | Path) -> None:
    """Errors: `InputError` for a tokenizer with more ids than there are word embeddings."""
    if tokenizer.vocab_size > vocab_size:
        raise InputError(file=folder, found=f"a tokenizer of {tokenizer.vocab_size:,} ids and {vocab_size:,} word "
                         "embeddings", expected="a tokenizer and a model that belong together")


def _changed_files(folder: Path) -> str:
    """A sentence that names the files changed since `Judge.save` wrote them; empty if there are none."""
    written = read_json(folder / SETTINGS, "").get("files", {})
    if not isinstance(written, dict):
        raise InputError(file=folder / SETTINGS, found=f"files is {short_repr(written)}", expected="{name: SHA-256}")
    if not written:                                  # by minipref 0.1
        return ""
    found = folder_sha256(folder)
    changed = [name for name in written | found if name != SETTINGS and found.get(name) != written.get(name)]
    return f"{', '.join(changed)}: not as train.py wrote {'it' if len(changed) == 1 else 'them'}" if changed else ""


def _read_settings(path: Path) -> tuple[int, float, LogisticRegression | None]:
    settings = read_json(path, "a folder that train.py wrote")
    max_length, temperature = settings.get("max_length"), settings.get("temperature")
    if settings.get("format") not in (1, 2) or settings.get("shares") != list(SHARES):
        raise InputError(file=path, found=f"format {short_repr(settings.get('format'))}, shares "
                         f"{short_repr(settings.get('shares'))}", expected=f"format 1 or 2, shares {list(SHARES)}")
    if type(max_length) is not int or not 8 <= max_length <= MAX_LENGTH:
        raise InputError(file=path, found=f"max_length is {short_repr(max_length)}",
                         expected=f"from 8 to {MAX_LENGTH} tokens")
    if type(temperature) not in (int, float) or not 0 < temperature < 1e6:
        raise InputError(file=path, found=f"temperature is {short_repr(temperature)}",
                         expected="a positive number below a million")
    return max_length, float(temperature), _read_surface(path, settings.get("surface"))


def _read_surface(path: Path, stored: dict | None) -> LogisticRegression | None:
    if stored is None:
        return None
    shapes = {"mean": (len(FEATURES),), "spread": (len(FEATURES),), "weights": (len(FEATURES) + 1, len(LABELS))}
    try:
        arrays = {name: np.array(stored[name], dtype=np.float64) for name in shapes}
        fits = stored["features"] == list(FEATURES) and all(
            array.shape == shapes[name] and np.isfinite(array).all() for name, array in arrays.items())
    except (KeyError, TypeError, ValueError):
        fits = False
    if not fits:
        raise InputError(file=path, found="a surface regression of other features, or a damaged one",
                         expected="one that this version wrote")
    return LogisticRegression(**arrays)


@torch.no_grad()
def predict_logits(model: PreferenceModel, tokenized: TokenizedPairs, tokenizer: Tokenizer, batch_tokens: int,
                   most_rows: int = 256, precision: str = "fp32", orders: Sequence[bool] = (False, True),
                   progress: Callable[[int], object] | None = None, together: bool = False) -> np.ndarray:
    """Logits of every row in each of `orders` (False as given, True with A and B swapped).

    Longest rows come first: batches have little padding, and memory peaks in the first batch. Logits of the swapped
    order are mapped back, so column 0 is always the row's own A. `progress` is called after each batch with its number
    of rows. With `together`, the processes of a run (run/distributed.py) share the batches, all return all logits, and
    `progress` is called equally often in each.
    Shapes: N rows -> (N, orders, 3) float64.
    """
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    logits = np.zeros((len(tokenized), len(orders), 3))
    batches = list(batches_by_tokens(tokenized.lengths, batch_tokens, most_rows))
    for rows in distributed.shard_batches(batches) if together else batches:
        for order, swapped in enumerate(orders if len(rows) else ()):
            input_ids, attention_mask, _ = collate(tokenized, rows, [swapped] * len(rows), tokenizer)
            with autocast(device, precision):
                out = model(input_ids.to(device), attention_mask.to(device)).cpu().double().numpy()   # no MPS float64
            logits[rows, order] = swap_classes(out) if swapped else out
        if progress:
            progress(len(rows))
    model.train(was_training)
    return distributed.all_reduce_sum(logits) if together else logits


# --- arguments --------------------------------------------------------------------------------------------------------

def add_rows_or_pair(parser: ArgumentParser) -> None:
    """Add the arguments for a CSV or one pair."""
    parser.add_argument("csv", nargs="?", metavar="CSV", help="rows with id, prompt, response_a, response_b")
    parser.add_argument("--prompt", metavar="TEXT", help="predict one pair instead of a CSV")
    parser.add_argument("--a", metavar="TEXT")
    parser.add_argument("--b", metavar="TEXT")
    parser.text_options = ("--prompt", "--a", "--b")


def check_rows_or_pair(parser: ArgumentParser, options: argparse.Namespace) -> None:
    """Errors: `InputError` unless there is either a CSV or a pair."""
    pair = [options.prompt, options.a, options.b]
    if options.csv is None and None in pair:
        parser.error("neither a CSV nor all of --prompt, --a and --b")
    if options.csv is not None and any(text is not None for text in pair):
        parser.error("both a CSV and --prompt, --a or --b")
