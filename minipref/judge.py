"""A trained model, its tokenizer and its budgets, as one thing that compares answers.

Unusual here: people and models alike favour an answer for where it stands. Each pair is judged in both orders and the
two verdicts, turned so that they speak of the same answers, are averaged.
"""

import argparse
import contextlib
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from minipref import distributed
from minipref.checkpoint import load_classifier, save_classifier
from minipref.classifier import PreferenceModel
from minipref.data import (
    SHARES,
    Examples,
    Pair,
    Turns,
    batches_by_tokens,
    encode_pairs,
    make_batch,
    swap_classes,
)
from minipref.errors import ArgumentParser, InputError, shown
from minipref.files import read_json, write_json
from minipref.metrics import averaged
from minipref.tokenizer import Tokenizer, load_tokenizer

SETTINGS = "minipref.json"        # in a model's folder, beside config.json: what its training chose
ROWS_AT_ONCE = 4096               # that are tokenised, and sorted by length, together
LONGEST = 1 << 16                 # tokens; far beyond any use, and still a size that a machine can refuse politely


class Judge:
    """Says how likely a person prefers A, prefers B or calls it a tie.

    `temperature` divides the logits; `max_length` is the budget of the whole sequence in tokens.
    """

    def __init__(self, model: PreferenceModel, tokenizer: Tokenizer, max_length: int, temperature: float = 1.0,
                 precision: str = "fp32"):
        self.model, self.tokenizer = model, tokenizer
        self.max_length, self.temperature, self.precision = max_length, temperature, precision

    def compare(self, prompt: str | Sequence[str | None], response_a: str | Sequence[str | None],
                response_b: str | Sequence[str | None]) -> tuple[float, float, float]:
        """(p_a, p_b, p_tie) of one pair; each argument is a text, or a list of turns with None for a missing one."""
        return tuple(self.compare_many([(prompt, response_a, response_b)])[0].tolist())

    def compare_many(self, rows: Iterable[tuple], batch_tokens: int = 16_384, swap_average: bool = True,
                     progress: Callable[[int], object] | None = None) -> np.ndarray:
        """Probabilities of many pairs (prompt, response_a, response_b). Shapes: N rows -> (N, 3) float64.

        Errors: `InputError` where the model's arithmetic overflows.
        """
        pairs = [row if isinstance(row, Pair) else Pair("", *map(_as_turns, row)) for row in rows]
        if not pairs:
            return np.empty((0, 3))
        blocks = [pairs[begin:begin + ROWS_AT_ONCE] for begin in range(0, len(pairs), ROWS_AT_ONCE)]
        orders = (False, True) if swap_average else (False,)
        logits = []
        with ThreadPoolExecutor(1) as beside:               # tokenises the next block while this one is judged
            coming = beside.submit(encode_pairs, blocks[0], self.tokenizer, self.max_length)
            for following in (*blocks[1:], None):
                examples = coming.result()
                if following is not None:
                    coming = beside.submit(encode_pairs, following, self.tokenizer, self.max_length)
                logits.append(predict_logits(self.model, examples, self.tokenizer, batch_tokens,
                                             precision=self.precision, orders=orders, progress=progress))
        logits = np.concatenate(logits)
        if not np.isfinite(logits).all():
            raise InputError(found=f"logits that are not finite, in precision {self.precision}",
                             expected="--precision fp32 or bf16, or a model whose training did not diverge")
        return averaged(logits, self.temperature)

    def save(self, folder: str | Path) -> None:
        """Write a folder that `load_judge` and Hugging Face's `from_pretrained` load."""
        folder = Path(folder)
        self.tokenizer.save(folder)
        write_json(folder / SETTINGS, {"format": 1, "max_length": self.max_length, "shares": list(SHARES),
                                       "temperature": self.temperature})
        save_classifier(self.model, folder)


def load_judge(folder: str | Path, device: torch.device | str = "cpu", precision: str = "fp32") -> Judge:
    """A trained model's folder, as train.py writes it: weights, tokenizer, budgets, temperature.

    Errors: `InputError` for whatever is missing, damaged, or does not fit together.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(file=folder, found="no such folder", expected="a trained model's folder, like runs/NAME/model")
    max_length, temperature = _read_settings(folder / SETTINGS)
    tokenizer = load_tokenizer(folder)
    model = load_classifier(folder, device=device)
    if model.load_report.new:
        raise InputError(file=folder / "model.safetensors", found=f"no {' and no '.join(model.load_report.new)}",
                         expected="a trained classifier: this is an encoder, train.py --encoder makes one of it")
    check_vocabulary(tokenizer, model.config.vocab_size, folder)
    return Judge(model, tokenizer, max_length, temperature, precision)


def add_rows_or_pair(parser: ArgumentParser) -> None:
    """The arguments by which a program is told what to judge: a CSV, or one pair."""
    parser.add_argument("csv", nargs="?", metavar="CSV", help="rows with id, prompt, response_a, response_b")
    parser.add_argument("--prompt", metavar="TEXT", help="one pair instead of a CSV")
    parser.add_argument("--a", metavar="TEXT")
    parser.add_argument("--b", metavar="TEXT")


def check_rows_or_pair(parser: ArgumentParser, options: argparse.Namespace) -> None:
    """Errors: `InputError` for neither or both."""
    pair = [options.prompt, options.a, options.b]
    if options.csv is None and None in pair:
        parser.error("neither a CSV nor all of --prompt, --a and --b")
    if options.csv is not None and any(text is not None for text in pair):
        parser.error("both a CSV and --prompt, --a or --b")


def check_vocabulary(tokenizer: Tokenizer, vocab_size: int, folder: str | Path) -> None:
    """Refuse a tokenizer whose ids the word table does not have."""
    if tokenizer.vocab_size > vocab_size:
        raise InputError(file=folder, found=f"a tokenizer of {tokenizer.vocab_size:,} ids and a word table of "
                         f"{vocab_size:,} rows", expected="a tokenizer and a model that belong together")


def _read_settings(path: Path) -> tuple[int, float]:
    settings = read_json(path, "a folder that train.py wrote")
    max_length, temperature = settings.get("max_length"), settings.get("temperature")
    if settings.get("format") != 1 or settings.get("shares") != list(SHARES):
        raise InputError(file=path, found=f"format {shown(settings.get('format'))}, shares "
                         f"{shown(settings.get('shares'))}", expected=f"format 1, shares {list(SHARES)}")
    if type(max_length) is not int or not 8 <= max_length <= LONGEST:
        raise InputError(file=path, found=f"max_length is {shown(max_length)}", expected=f"from 8 to {LONGEST} tokens")
    if type(temperature) not in (int, float) or not 0 < temperature < 1e6:
        raise InputError(file=path, found=f"temperature is {shown(temperature)}",
                         expected="a positive number below a million")
    return max_length, float(temperature)


def _as_turns(value: str | Sequence[str | None]) -> Turns:
    return (value,) if isinstance(value, str) else tuple(value)


@torch.no_grad()
def predict_logits(model: PreferenceModel, examples: Examples, tokenizer: Tokenizer, batch_tokens: int,
                   most_rows: int = 256, precision: str = "fp32", orders: Sequence[bool] = (False, True),
                   progress: Callable[[int], object] | None = None, together: bool = False) -> np.ndarray:
    """Logits of every row in each of the orders asked for (False as it stands, True with A and B exchanged).

    Rows go longest first, so that a batch has little padding and memory is at its highest at once. Logits of the
    exchanged order are turned back: column 0 always speaks of the row's own A. `progress` is called after each batch
    with its number of rows. With `together` the processes of a run (distributed.py) share the batches, and all get all
    logits; `progress` is then called equally often in each.
    Shapes: N rows -> (N, orders, 3) float64.
    """
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    logits = np.zeros((len(examples), len(orders), 3))
    batches = list(batches_by_tokens(examples.lengths, batch_tokens, most_rows))
    for rows in distributed.dealt(batches) if together else batches:
        for order, swapped in enumerate(orders if len(rows) else ()):
            ids, is_token, _ = make_batch(examples, rows, [swapped] * len(rows), tokenizer)
            with autocast(device, precision):
                out = model(ids.to(device), is_token.to(device)).cpu().double().numpy()   # MPS has no float64
            logits[rows, order] = swap_classes(out) if swapped else out
        if progress:
            progress(len(rows))
    model.train(was_training)
    return distributed.summed(logits) if together else logits


def autocast(device: torch.device, precision: str):
    """The context in which a forward pass runs in `precision`; parameters stay float32 whatever it is."""
    if precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, torch.bfloat16 if precision == "bf16" else torch.float16)


def choose_device(name: str) -> torch.device:
    """`auto` takes a GPU where there is one. Errors: `InputError` for a device that this machine does not have."""
    have = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        name = next(kind for kind in ("cuda", "mps", "cpu") if have[kind])
    if not have[name]:
        raise InputError(found=f"--device {name}, which this machine or this build of torch does not have",
                         expected=f"auto or one of {', '.join(kind for kind, there in have.items() if there)}")
    return torch.device(name)


def choose_precision(name: str, device: torch.device) -> str:
    """`auto` is bf16 where products in it are fast (GPUs since Ampere, CPUs with AMX or AVX-512 bf16), else fp16 on an
    older CUDA GPU, else fp32. Never fp16 on a CPU: it works there, at a thirtieth of float32's speed.
    """
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    if device.type == "cpu" and (torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()):
        return "bf16"
    return "fp32"


def out_of_memory(problem: RuntimeError) -> str | None:
    """What to say of an error, if it is that a GPU or the system has no more memory to give; else None."""
    words = "can't allocate memory", "not enough memory"                 # of the CPU's allocator, which has no class
    if isinstance(problem, torch.OutOfMemoryError) or any(part in str(problem) for part in words):
        return f"out of memory: {str(problem).splitlines()[0].rstrip('. ')}"
    return None
