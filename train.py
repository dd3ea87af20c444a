"""Fine-tune DeBERTa-v3 on human preference: the whole loop, top to bottom.

    python train.py                                     what `make train` does: real rows and weights if they are there
    python train.py --train data/train.csv --encoder weights/deberta-v3-small --run runs/first
    python train.py --resume --run runs/first           go on exactly where it stopped
    torchrun --standalone --nproc-per-node 4 -- train.py   the same on four GPUs, or four shares of a CPU

What is unusual here:
- The loop has one flat body: evaluate if an evaluation is due, else take one optimizer step; save now and then. All
  that the next turn depends on is in `Progress`, the model, the optimizer and the random generators, and all of that
  is the saved state. So a run can stop between any two turns, and goes on bit for bit.
- Order and swaps of an epoch are functions of (seed, epoch): there is no sampler whose state could be lost.
- Several processes run this same file. They differ in which rows of a batch are theirs and in that only the first
  writes and speaks; the calls of `distributed`, which do nothing in a single process, are all there is to it.
- The score at the end stands beside what one gets for nothing, and is said as it is.
"""

import contextlib
import dataclasses
import json
import math
import os
import platform
import shutil
import signal
import sys
import time
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from tqdm import tqdm

from minipref import __version__, distributed, metrics, plots, runs, sample
from minipref.checkpoint import load_classifier
from minipref.classifier import PreferenceModel, WithFieldHead, field_loss
from minipref.config import LABELS, RECIPES, TrainConfig
from minipref.data import (
    Examples,
    Pair,
    character_counts,
    encode_cached,
    epoch_batches,
    epoch_swaps,
    make_batch,
    prompt_key,
    read_pairs,
    split_by_prompt,
)
from minipref.errors import ArgumentParser, InputError, print_anything
from minipref.files import check_writable, sha256_of, write_json, write_text
from minipref.judge import (
    LONGEST,
    Judge,
    autocast,
    check_vocabulary,
    choose_device,
    choose_precision,
    out_of_memory,
    predict_logits,
)
from minipref.lean import give_back_freed_memory
from minipref.optim import AdamW, clip_gradients, cosine_with_warmup, decay_groups
from minipref.report import as_text, model_card, score_folds, score_logits
from minipref.tokenizer import Tokenizer, load_tokenizer

HERE = Path(__file__).resolve().parent
REAL_WEIGHTS, BUNDLED_WEIGHTS = Path("weights/deberta-v3-small"), Path("weights/minipref-tiny")
REAL_ROWS, SAMPLE_ROWS = Path("data/train.csv"), Path("data/sample/train.csv")
PAD_TO = 8          # tokens: fewer lengths, so that oneDNN, which compiles bfloat16 products by shape, has most of them
MOST_SKIPPED = 25                  # fp16 steps in a row that overflow before the run gives up


# --- what was asked for -----------------------------------------------------------------------------------------------

def parse_arguments(arguments: list[str] | None) -> dict:
    """The options that were given; those that were not are absent, so that --resume can tell."""
    whole, real = _number(int, 1), _number(float, 0)
    parser = ArgumentParser(prog="train.py", description="Fine-tune DeBERTa-v3 on human preference.",
                            argument_default=None)
    add = parser.add_argument
    add("--train", nargs="+", metavar="CSV", help="labelled rows (default: data/train.csv, else the generated sample)")
    add("--valid", metavar="CSV", help="validate on these rows instead of a part of the training rows")
    add("--encoder", metavar="DIR", help="config.json, model.safetensors and tokenizer in the Hugging Face layout")
    add("--run", metavar="DIR", help="where the run's files go (default: runs/ and the time)")
    add("--recipe", choices=sorted(RECIPES), help="the set of figures to start from")
    add("--resume", action="store_true", help="go on with the run in --run")
    add("--folds", type=_number(int, 2, 1000), help="train this many models, each validated on rows that it never saw")
    add("--all-rows", action="store_true", help="train on every row; nothing is left to validate on")
    add("--epochs", type=_number(int, 1, 10**4), help="passes over the training rows")
    add("--batch-size", type=whole, help="rows in one pass forward and backward, over all processes")
    add("--eval-batch-size", type=whole, help="the same, for evaluation")
    add("--accumulate", type=whole, help="passes per optimizer step")
    add("--lr", type=_number(float, 0, 1e30), help="learning rate at the peak")
    add("--warmup", type=real, help="steps of warmup; below 1, a share of all steps")
    add("--adam-beta2", type=_number(float, 0, 0.999999), help="AdamW's memory of squared gradients")
    add("--weight-decay", type=_number(float, 0, 1), help="AdamW's, on matrices and tables")
    add("--head-dropout", type=_number(float, 0, 0.999), help="dropout before the classifier")
    add("--patience", type=_number(int, 0), help="evaluations without a better score before stopping; 0 never stops")
    add("--evals-per-epoch", type=_number(int, 1, 10**4), help="evaluations per epoch")
    add("--field-loss", type=_number(float, 0, 1000), help="weight of a second head, which training alone has")
    add("--max-length", type=_number(int, 8, LONGEST), help="tokens of prompt and answers together")
    add("--precision", choices=("auto", "fp32", "bf16", "fp16"), help="of the forward pass; weights stay float32")
    add("--device", choices=("auto", "cpu", "cuda", "mps"))
    add("--seed", type=_number(int, 0, 2**63 - 1), help="of the split, the order, the swaps, the head and dropout")
    add("--valid-fraction", type=_number(float, 0.001, 0.9), help="share of the rows that validate")
    add("--no-swap", action="store_true", help="do not exchange A and B at random in training")
    add("--freeze-embeddings", action="store_true", help="keep the word table as it is")
    add("--checkpoint-activations", action="store_true", help="less memory for a second forward pass")
    add("--compile", action="store_true", help="torch.compile the model")
    add("--save-every", type=real, metavar="MINUTES", help="the most that a sudden death can cost (default 10)")
    add("--limit", type=whole, metavar="N", help="only the first N rows, for a quick look")
    given = vars(parser.parse_args(arguments))
    return {name: value for name, value in given.items() if value is not None and value is not False}    # 0 is given


def _number(kind: type, lowest: float, highest: float = 10**9):
    def parse(text: str):
        value = kind(text)
        if not lowest <= value <= highest:          # NaN is not, either
            raise ValueError
        return value
    parse.__name__ = f"number from {lowest} to {highest}"
    return parse


DEFAULTS = {"precision": "auto", "device": "auto", "seed": 42, "save_every": 10.0}
FREE_TO_CHANGE = {"resume", "run", "save_every"}       # on --resume; everything else would change the result


def fill_in(given: dict) -> dict:
    """The options of a new run: what was given, and a default for what was not."""
    options = DEFAULTS | given
    if "run" not in options:
        now = datetime.now().strftime("%Y%m%d-%H%M%S-%f")[:-3]
        options["run"] = distributed.from_first(str(Path("runs") / now))
    if "encoder" not in options:
        places = (REAL_WEIGHTS, HERE / REAL_WEIGHTS, BUNDLED_WEIGHTS, HERE / BUNDLED_WEIGHTS)
        options["encoder"] = str(next((place for place in places if place.is_dir()), places[-1]))
    if "train" not in options:
        if not REAL_ROWS.is_file() and distributed.is_first():
            sample.write_sample(SAMPLE_ROWS.parent)
        distributed.wait()
        options["train"] = [str(REAL_ROWS if REAL_ROWS.is_file() else SAMPLE_ROWS)]
    options.setdefault("recipe", "tiny" if Path(options["encoder"]).name == BUNDLED_WEIGHTS.name else "seed")
    for first, second in (("folds", "all_rows"), ("folds", "valid"), ("all_rows", "valid")):
        if first in options and second in options:
            raise InputError(found=f"--{first} and --{second}".replace("_", "-"), expected="one of the two")
    return options


def figures(options: dict) -> TrainConfig:
    """The recipe's figures, with those given on the command line in their place."""
    chosen = {name: value for name, (value, _) in RECIPES[options["recipe"]].items()}
    chosen |= {f.name: options[f.name] for f in dataclasses.fields(TrainConfig) if f.name in options}
    return TrainConfig(**chosen, swap="no_swap" not in options)


def resumed(given: dict) -> dict:
    """The options of the run to go on with. Errors: `InputError` for one given now that says otherwise."""
    if "run" not in given:
        raise InputError(found="--resume without --run", expected="the folder of the run to go on with")
    folder = Path(given["run"])
    stored = runs.read_made_of(folder, "train.py")["options"]
    for name in sorted(given.keys() - FREE_TO_CHANGE):
        if given[name] != stored.get(name):
            raise InputError(file=folder / "config.json", found=f"--{name.replace('_', '-')} {given[name]}, where the "
                             f"run has {stored.get(name, 'its default')}", expected="the same, or a run of its own")
    return stored | {name: given[name] for name in FREE_TO_CHANGE if name in given}


# --- stopping ---------------------------------------------------------------------------------------------------------

class Stopped(Exception):
    """SIGINT or SIGTERM came, and the state is saved."""


class StopSignal:
    """Inside its block the first SIGINT or SIGTERM waits until the loop gets to it; a second ends the process.

    Of several processes each may get the signal twice, from the system and passed on by torchrun: one that comes within
    five seconds of the first is taken for the same.
    """

    def __init__(self):
        self.number, self.since = 0, 0.0

    def __enter__(self) -> "StopSignal":
        self._before = {number: signal.signal(number, self._remember) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame: object) -> None:
        if self.number and (distributed.size() == 1 or time.monotonic() - self.since > 5):
            os._exit(128 + number)
        self.number, self.since = number, time.monotonic()

    def check(self, *_) -> None:
        number = distributed.most(self.number)
        if number:                             # if not, self.number stays: a signal may have come during the sum
            self.number = number
            raise Stopped


class Failed(Exception):
    """The run cannot go on, and it is not the input's form that is wrong: one line, exit code 1."""


# --- the program ------------------------------------------------------------------------------------------------------

def main(arguments: list[str] | None = None) -> int:
    print_anything()
    options = {}
    with distributed.joined():
        try:
            given = parse_arguments(arguments)
            options = resumed(given) if "resume" in given else fill_in(given)
            with StopSignal() as stop:
                run(options, stop)
        except Stopped:
            print(f"stopped; the state is saved. To go on: python train.py --resume --run '{options['run']}'")
            return 128 + stop.number
        except (InputError, Failed) as problem:               # which all processes meet alike
            if distributed.speaks():
                print(f"train.py: {problem}", file=sys.stderr)
            return 2 if isinstance(problem, InputError) else 1
        except OSError as problem:
            print(f"train.py{distributed.who()}: {' '.join(str(problem).split())}{way_on(options)}", file=sys.stderr)
            return 1
        except RuntimeError as problem:
            if found := out_of_memory(problem):
                print(f"train.py{distributed.who()}: {found}; the same steps take less with a smaller --batch-size and "
                      f"--accumulate, or with --checkpoint-activations{way_on(options)}", file=sys.stderr)
                return 1
            if not distributed.is_lost(problem):
                raise
            print(f"train.py{distributed.who()}: another process of the run is gone, and all stop with it; the last "
                  "saved state is whole. To go on: the same command with --resume and --run", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            print("train.py: interrupted before the run began", file=sys.stderr)
            return 130
    return 0


def way_on(options: dict) -> str:
    """What to say after a run's death of what is left of it."""
    saved = "run" in options and has_begun(Path(options["run"]))
    return "; the state saved before is whole, and --resume goes on from it" if saved else ""


def has_begun(folder: Path) -> bool:
    """Whether a run's folder, or that of one of its folds, has a state to go on from."""
    return any(runs.has_state(place / "state") for place in (folder, *folder.glob("fold-*")))


@dataclass
class Setup:
    """What all folds of a run share."""

    options: dict
    config: TrainConfig
    device: torch.device
    precision: str
    tokenizer: Tokenizer
    pairs: list[Pair]
    examples: Examples
    lengths: np.ndarray                   # (N, 3) characters of each row's prompt, A and B
    truth: dict[str, np.ndarray]          # the sample's own probabilities, by id; empty for real rows
    stop: StopSignal


def run(options: dict, stop: StopSignal) -> None:
    """Train in the run's folder, which is this run's alone until the end."""
    folder = Path(options["run"])
    check_writable(folder / "config.json")
    with runs.alone_in(folder) if distributed.is_first() else contextlib.nullcontext():
        train_in(folder, options, stop)


def train_in(folder: Path, options: dict, stop: StopSignal) -> None:
    """Read, split, encode, train once or once per fold, report."""
    config = figures(options)
    device = distributed.own_device(choose_device(options["device"]))
    precision = choose_precision(options["precision"], device)
    if device.type == "cpu":              # the same sums in the same order: runs on a CPU can be repeated bit for bit
        torch.set_deterministic_debug_mode("error")     # as use_deterministic_algorithms(True), which imports for 2 s
        torch.utils.deterministic.fill_uninitialized_memory = False
        give_back_freed_memory()                        # a quarter of a step's peak would be holes
    if "resume" not in options and has_begun(folder):
        raise InputError(file=folder, found="a run that can go on", expected="--resume, or another name for --run")

    tokenizer = load_tokenizer(options["encoder"])
    pairs = [p for path in options["train"] for p in read_pairs(path)][:options.get("limit")]
    held_out = list(read_pairs(options["valid"])) if "valid" in options else []
    splits = split(pairs, held_out, config, options)
    pairs = pairs + held_out
    identity = check_identity(folder, options, config, device, precision)
    source = json.dumps([identity["train"], identity["valid"], options.get("limit")])
    with distributed.first_before_others():
        examples, cached = encode_cached(pairs, tokenizer, config.max_length, folder / "tokens.safetensors", source,
                                         progress=sys.stderr.isatty())
    setup = Setup(options, config, device, precision, tokenizer, pairs, examples, character_counts(pairs),
                  read_truth(options["train"]), stop)
    say_what_was_taken(setup, splits, cached)

    logits = []
    for number, (train_rows, valid_rows) in enumerate(splits, 1):
        if len(splits) > 1:
            print(f"\nfold {number} of {len(splits)}")
        logits.append(fit(folder / f"fold-{number}" if len(splits) > 1 else folder, train_rows, valid_rows, setup))
    if len(splits) > 1 and distributed.is_first():
        scored = score_folds(logits, splits, examples.labels, setup.lengths, options["seed"])
        print(f"\nout of fold, {len(splits)} models, {len(pairs):,} rows\n{as_text(scored, 'out of fold')}")
        write_json(folder / "report.json", {"folds": len(splits), "rows": len(pairs)} | scored)
    print(f"\nto predict: python predict.py test.csv   (takes {folder}, the newest run)")


def split(pairs: list[Pair], held_out: list[Pair], config: TrainConfig, options: dict) -> list[tuple]:
    """[(rows to train on, rows to validate on)], one entry, or one per fold; `held_out` rows count on after `pairs`."""
    if held_out:
        return [(np.arange(len(pairs)), np.arange(len(pairs), len(pairs) + len(held_out)))]
    if "all_rows" in options:
        return [(np.arange(len(pairs)), np.arange(0))]
    folds = options.get("folds")
    shares = [1 / folds] * folds if folds else [1 - config.valid_fraction, config.valid_fraction]
    part = split_by_prompt([p.prompt for p in pairs], [p.label for p in pairs], shares, options["seed"])
    splits = [(np.flatnonzero(part != k), np.flatnonzero(part == k)) for k in (range(folds) if folds else [1])]
    if any(len(train) == 0 or len(valid) == 0 for train, valid in splits):
        raise InputError(file=", ".join(options["train"]), found=f"{len(pairs)} rows, whose prompts cannot be split",
                         expected="more rows with different prompts, or --all-rows")
    return splits


MUST_BE_SAME = ("train", "valid", "encoder", "precision", "minipref")     # on --resume, by content, not by name
MAY_DIFFER = ("device", "threads", "processes", "torch", "python", "system")     # the sums come out in another order


def check_identity(folder: Path, options: dict, config: TrainConfig, device: torch.device, precision: str) -> dict:
    """Write down what the run is made of, or on --resume compare it. Files are known by content, not by name."""
    encoder = Path(options["encoder"])
    identity = {
        "train": [sha256_of(path) for path in options["train"]],
        "valid": sha256_of(options["valid"]) if "valid" in options else None,
        "encoder": {file.name: sha256_of(file) for file in sorted(encoder.iterdir())
                    if file.suffix in (".safetensors", ".json", ".model") and file.is_file()},
        "device": device.type, "precision": precision, "threads": torch.get_num_threads(), "minipref": __version__,
        "processes": distributed.size(), "torch": torch.__version__, "python": platform.python_version(),
        "system": platform.machine(),
    }
    path = folder / "config.json"
    if "resume" not in options:
        made_of = {"options": {k: v for k, v in options.items() if k not in ("run", "resume")},
                   "figures": dataclasses.asdict(config), "identity": identity}
        if distributed.is_first():
            runs.write_made_of(folder, made_of)
        return identity
    stored = runs.read_made_of(folder, "train.py")
    before = stored["figures"] | {name: stored["identity"].get(name) for name in (*MUST_BE_SAME, *MAY_DIFFER)}
    now = dataclasses.asdict(config) | identity
    for name in (*sorted((before.keys() | now.keys()) - {*MAY_DIFFER}), *MAY_DIFFER):
        if before.get(name) == now.get(name):
            continue
        change = f"{now.get(name)} and was {before.get(name)}" if not isinstance(now.get(name), list | dict) else ""
        if name not in MAY_DIFFER:
            raise InputError(file=path, found=f"{name} has changed since the run began{change and f': it is {change}'}",
                             expected="the same, or a run of its own")
        print(f"note: {name} is {change}: the run goes on, but not bit for bit")
    return identity


def read_truth(train_files: list[str]) -> dict[str, np.ndarray]:
    """The generated sample comes with the probabilities that its labels were drawn from; real rows do not."""
    truth = {}
    for path in {Path(file).with_name("truth.csv") for file in train_files}:
        if path.is_file():
            frame = pd.read_csv(path, dtype={"id": str})
            truth |= dict(zip(frame["id"], frame[["p_a", "p_b", "p_tie"]].to_numpy()))
    return truth


def say_what_was_taken(setup: Setup, splits: list[tuple], cached: bool) -> None:
    """The first lines: encoder, rows, recipe, split, and how to get the real thing where a stand-in was taken."""
    options, config, pairs = setup.options, setup.config, setup.pairs
    encoder, files = Path(options["encoder"]), options["train"]
    hint = "   (the small one that ships with minipref; the real one: make weights)"
    print(f"encoder    {encoder}{hint if encoder.name == BUNDLED_WEIGHTS.name else ''}")
    hint = "   (a generated sample; real rows: make data)"
    print(f"rows       {', '.join(files)}{hint if files == [str(SAMPLE_ROWS)] else ''}")
    labels = np.bincount([p.label for p in pairs], minlength=3)
    missing = sum(turn is None for p in pairs for turns in (p.response_a, p.response_b) for turn in turns)
    print(f"           {len(pairs):,} rows: {labels[0]:,} A, {labels[1]:,} B, {labels[2]:,} ties; {missing:,} missing "
          f"answers read as text; {setup.tokenizer.replaced_surrogates:,} texts with broken characters mended")
    print(f"           {setup.examples.truncation()}{'; token ids from the cache' if cached else ''}")
    train_rows, valid_rows = splits[0]
    shared = {prompt_key(pairs[r].prompt) for r in train_rows} & {prompt_key(pairs[r].prompt) for r in valid_rows}
    if len(splits) > 1:
        print(f"split      {len(splits)} folds by prompt: every row is judged by a model that never saw its prompt")
    elif len(valid_rows):
        leak = f"WARNING: {len(shared):,} prompts are on both sides, the score will flatter" if shared else \
            "no prompt on both sides"
        print(f"split      {len(train_rows):,} rows to train on, {len(valid_rows):,} to validate on; {leak}")
    else:
        print(f"split      none: all {len(train_rows):,} rows are trained on, so there will be no score")
    print(f"machine    {setup.device.type}, {setup.precision}, {torch.get_num_threads()} threads, "
          f"torch {torch.__version__}{f', {distributed.size()} processes' if distributed.size() > 1 else ''}")
    print(f"recipe     {options['recipe']}")
    for name, (_, source) in RECIPES[options["recipe"]].items():
        given = name in options
        print(f"           {name:<16} {getattr(config, name):<8g} {'given on the command line' if given else source}")
    print(f"           {'seed':<16} {options['seed']:<8}")


# --- the loop ---------------------------------------------------------------------------------------------------------

@dataclass
class Progress:
    """Where a run is: all that the next turn of the loop needs to know beside weights, moments and generators."""

    step: int = 0                  # optimizer steps taken
    evaluated: int = 0             # the step of the last evaluation
    best: float = math.inf         # the least validation log loss so far
    best_step: int = 0
    best_weights: str = ""         # a hash of the weights then, which model/ holds
    since_best: int = 0            # evaluations since then
    loss_sum: float = 0.0          # of the training rows since the last evaluation
    loss_rows: int = 0
    skipped: int = 0               # fp16 steps left out because a gradient overflowed
    skipped_in_a_row: int = 0
    finished: str = ""             # why the loop ended
    rows: list[dict] = field(default_factory=list)       # metrics.csv
    timing: list[dict] = field(default_factory=list)     # timing.csv
    seconds: float = 0.0           # of training, over all sittings


def fit(folder: Path, train_rows: np.ndarray, valid_rows: np.ndarray, setup: Setup) -> np.ndarray:
    """Train one model and report on it. Returns the validation rows' logits in both orders, (rows, 2, 3)."""
    options, config, device, stop = setup.options, setup.config, setup.device, setup.stop
    valid, seed = setup.examples.take(valid_rows), options["seed"]

    runs.seed_everything(seed)
    model = load_classifier(options["encoder"], device=device)
    say_what_was_loaded(model, folder, options, setup)
    model.encoder.config = dataclasses.replace(model.config, head_dropout=config.head_dropout)
    model.head_dropout.p = config.head_dropout
    model.encoder.word_table.weight.requires_grad_("freeze_embeddings" not in options)
    model.encoder.checkpoint_activations = "checkpoint_activations" in options
    trained = WithFieldHead(model, setup.tokenizer.sep_id).to(device) if config.field_loss else model
    forward = torch.compile(trained, dynamic=True) if "compile" in options else trained
    forward = distributed.parallel(forward, device)
    distributed.own_randomness(seed)
    optimizer = AdamW(decay_groups(trained, config.weight_decay), lr=config.lr, betas=(0.9, config.adam_beta2),
                      eps=config.adam_eps)
    scaler = torch.amp.GradScaler(device.type, enabled=setup.precision == "fp16")
    judge = Judge(model, setup.tokenizer, config.max_length, precision=setup.precision)

    # An epoch is a list of windows, a window is the batches of one optimizer step.
    steps_per_epoch = config.steps_per_epoch(len(train_rows))
    total = config.epochs * steps_per_epoch
    warmup = config.warmup_steps(total)
    evaluate_at = {(epoch * steps_per_epoch + round(part * steps_per_epoch / config.evals_per_epoch))
                   for epoch in range(config.epochs) for part in range(1, config.evals_per_epoch + 1)}
    print(f"steps      {total:,} of {config.batch_size * config.accumulate} rows, {warmup:,} of them warmup; "
          f"{len(evaluate_at)} evaluations at most" if len(valid_rows) else f"steps      {total:,}")

    progress = Progress()
    if "resume" in options:
        progress = load_state(folder, trained, optimizer, scaler)
        keep_best(folder, judge, progress)
        print(f"resumed at step {progress.step:,} of {total:,}")

    trained.train()
    bar = tqdm(total=config.epochs * len(train_rows), initial=progress.step * config.batch_size * config.accumulate,
               unit="pairs", disable=None if distributed.is_first() else True, dynamic_ncols=True, smoothing=0.05)
    started = saved = time.monotonic()
    epoch_in_hand, paces = None, []
    try:
        while not progress.finished:
            if progress.step in evaluate_at and progress.evaluated < progress.step and len(valid_rows):
                logits = predict_logits(model, valid, setup.tokenizer, config.eval_batch_size * config.max_length,
                                        config.eval_batch_size, setup.precision, (False,), stop.check, together=True)
                started = clock(progress, started)
                check_finite(logits, valid_rows, progress, setup)
                note_evaluation(progress, metrics.averaged(logits, 1.0), valid.labels, steps_per_epoch, optimizer, bar)
                if progress.since_best == 0:
                    progress.best_weights = distributed.from_first(runs.digest_of(model))    # which writes model/
                elif config.patience and progress.since_best >= config.patience:
                    progress.finished = f"no better log loss in {config.patience} evaluations"
            elif progress.step == total:
                progress.finished = f"all {config.epochs} epochs done"
            else:
                epoch, window = divmod(progress.step, steps_per_epoch)
                if epoch != epoch_in_hand:
                    epoch_in_hand = epoch
                    batches = epoch_batches(setup.examples.lengths[train_rows], config.batch_size, seed, epoch)
                    swaps = epoch_swaps(len(train_rows), seed, epoch) & config.swap
                # Schedule steps 1 to total of total + 1: neither the first nor the last step is wasted on a rate of 0.
                lr = cosine_with_warmup(progress.step + 1, total + 1, warmup, config.lr)
                taken = batches[window * config.accumulate:(window + 1) * config.accumulate]
                begun = time.monotonic()
                loss, rows = take_step(forward, optimizer, scaler, lr, [(train_rows[b], swaps[b]) for b in taken],
                                       progress, setup)
                progress.step += 1
                bar.update(rows)
                bar.set_postfix(loss=f"{loss:.3f}", lr=f"{lr:.1e}", refresh=False)
                if len(paces) < 20:                                  # the first ten load libraries and ask for memory
                    paces.append(time.monotonic() - begun)
                    if len(paces) == 20 and progress.step < total:
                        say_how_long(total - progress.step, sum(paces[10:]) / 10, bar)
                if not distributed.most(time.monotonic() - saved >= 60 * options["save_every"]):
                    stop.check()
                    continue
            saved = started = clock(progress, started)
            save_state(folder, progress, trained, optimizer, scaler)
            keep_best(folder, judge, progress)
            stop.check()
    except Stopped:
        clock(progress, started)
        save_state(folder, progress, trained, optimizer, scaler)
        raise
    finally:
        bar.close()
    print(f"ended: {progress.finished}")
    return finish(folder, judge, progress, train_rows, valid_rows, setup)


def take_step(model: torch.nn.Module, optimizer: AdamW, scaler: torch.amp.GradScaler, lr: float, window: list,
              progress: Progress, setup: Setup) -> tuple[float, int]:
    """One optimizer step on the batches of a window: forward, backward, clip, AdamW. Returns mean loss and rows.

    The loss is the mean over the window's rows, so accumulating equals one large batch even where the last is smaller,
    and so do several processes, each with its share of the rows. A field head's loss is learnt from and not reported.
    """
    rows_in_window = sum(len(rows) for rows, _ in window)
    total = 0.0
    optimizer.zero_grad(set_to_none=True)
    for number, batch in enumerate(window, 1):
        rows, swapped, weight = distributed.batch_share(*batch)
        tensors = make_batch(setup.examples, rows, swapped, setup.tokenizer, PAD_TO)
        ids, is_token, labels = (t.to(setup.device) for t in tensors)
        with distributed.averaging(model, now=number == len(window)):
            with autocast(setup.device, setup.precision):
                logits = model(ids, is_token)                                   # (B, 3); with a field head, two
            own, *of_fields = logits if setup.config.field_loss else (logits,)
            loss = F.cross_entropy(own.float(), labels, reduction="sum")
            more = sum(setup.config.field_loss * field_loss(own, z, labels) for z in of_fields)
            scaler.scale(weight * (loss + more) / rows_in_window).backward()
        total += loss.item() / rows_in_window if weight else 0.0

    total = float(distributed.summed(total))
    scaler.unscale_(optimizer)
    norm = clip_gradients(model.parameters(), setup.config.clip)
    if math.isfinite(norm) and math.isfinite(total):
        progress.skipped_in_a_row = 0
        progress.loss_sum += total * rows_in_window
        progress.loss_rows += rows_in_window
    elif scaler.is_enabled() and progress.skipped_in_a_row < MOST_SKIPPED:
        progress.skipped += 1                  # the scale was too large: this step is left out and the scale halved
        progress.skipped_in_a_row += 1
    else:
        ids = ", ".join(setup.pairs[r].id for rows, _ in window for r in rows)
        raise Failed(f"step {progress.step + 1}: loss {total}, gradient norm {norm}; rows {ids}. "
                     "A smaller --lr or --precision bf16 or fp32 usually helps.")
    for group in optimizer.param_groups:
        group["lr"] = lr
    scaler.step(optimizer)
    scaler.update()
    return total, rows_in_window


def note_evaluation(progress: Progress, probabilities: np.ndarray, labels: np.ndarray, steps_per_epoch: int,
                    optimizer: AdamW, bar: tqdm) -> None:
    """Score an evaluation, keep its row for metrics.csv, and see whether it is the best so far."""
    result = metrics.evaluate(probabilities, labels)
    better = result["log_loss"] < progress.best
    progress.evaluated = progress.step
    progress.since_best = 0 if better else progress.since_best + 1
    if better:
        progress.best, progress.best_step = result["log_loss"], progress.step
    train_loss = progress.loss_sum / max(progress.loss_rows, 1)
    progress.rows.append({
        "step": progress.step, "epoch": round(progress.step / steps_per_epoch, 4), "train_loss": train_loss,
        "lr": optimizer.param_groups[0]["lr"],
        **{name: result[name] for name in ("log_loss", "accuracy", "precision", "recall", "f1", "ece")},
        "skipped": progress.skipped, "best": int(better)})
    progress.timing.append({"step": progress.step, "seconds": round(progress.seconds, 1),
                            "peak_memory_mb": round(peak_memory() / 2**20)})
    progress.loss_sum, progress.loss_rows = 0.0, 0
    bar.write(f"epoch {progress.step / steps_per_epoch:5.2f}   train loss {train_loss:.4f}   log loss "
              f"{result['log_loss']:.4f}   accuracy {result['accuracy']:.3f}   F1 {result['f1']:.3f}"
              f"{'   best' if better else ''}")


def check_finite(logits: np.ndarray, rows: np.ndarray, progress: Progress, setup: Setup) -> None:
    """Errors: `Failed` with the ids of the rows of which the model says nothing that is a number."""
    spoiled = rows[~np.isfinite(logits).all(axis=(1, 2))]
    if len(spoiled):
        ids = ", ".join(setup.pairs[row].id for row in spoiled[:20])
        raise Failed(f"step {progress.step}: logits that are not finite for {len(spoiled):,} of {len(rows):,} rows to "
                     f"validate on: {ids}{', ...' if len(spoiled) > 20 else ''}. A smaller --lr usually helps.")


# --- state ------------------------------------------------------------------------------------------------------------

def clock(progress: Progress, started: float) -> float:
    """Add the time since `started` to the run's; return the time now, to start from."""
    now = time.monotonic()
    progress.seconds += now - started
    return now


def save_state(folder: Path, progress: Progress, model: torch.nn.Module, optimizer: AdamW, scaler) -> None:
    """Everything that `load_state` needs, in one atomic step; then the logs, which are part of it."""
    generators, facts = runs.random_state()
    everyones = distributed.gathered(generators)           # all else is the same in every process
    if not distributed.is_first():
        return
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    tensors |= runs.optimizer_tensors(optimizer) | generators
    for rank, others in enumerate(everyones[1:], 1):
        tensors |= {f"rank.{rank}.{name}": value for name, value in others.items()}
    runs.save_state(folder / "state", tensors, {"progress": dataclasses.asdict(progress), "random": facts,
                                                "scaler": scaler.state_dict(), "step": progress.step,
                                                "lr": optimizer.param_groups[0]["lr"]})
    write_logs(folder, progress)


def load_state(folder: Path, model: torch.nn.Module, optimizer: AdamW, scaler) -> Progress:
    """Put everything back to where `save_state` found it, the logs too; a run that never saved is at its beginning.

    Errors: `InputError` naming what is damaged or missing.
    """
    if not runs.has_state(folder / "state"):
        if (folder / "metrics.csv").exists():          # written after each state, so there was one
            raise InputError(file=folder / "state", found="no state, though the run had got as far as an evaluation",
                             expected="the folder as it was, or the run begun anew: without --resume")
        return Progress()
    tensors, facts = runs.load_state(folder / "state")
    model.load_state_dict({name.removeprefix("model."): value for name, value in tensors.items()
                           if name.startswith("model.")})
    runs.restore_optimizer(optimizer, tensors)
    for group in optimizer.param_groups:
        group["lr"] = facts["lr"]
    scaler.load_state_dict(facts["scaler"])
    own = f"rank.{distributed.rank()}." if distributed.rank() else ""
    if f"{own}random.torch" in tensors:                    # not where there were fewer processes: a new one draws anew
        runs.restore_random_state({name.removeprefix(own): value for name, value in tensors.items()
                                   if name.startswith(f"{own}random.")}, facts["random"])
    progress = Progress(**facts["progress"])
    if distributed.is_first():
        write_logs(folder, progress)
    return progress


def write_logs(folder: Path, progress: Progress) -> None:
    runs.write_rows(folder / "metrics.csv", progress.rows)
    runs.write_rows(folder / "timing.csv", progress.timing)


def keep_best(folder: Path, judge: Judge, progress: Progress) -> None:
    """Write model/ where the state just saved or loaded is that of the best evaluation.

    Only after the state is safe: killed between the two, the run finds the best weights in the state and writes them
    again. So model/ is never of an evaluation that the state does not know.
    """
    if distributed.is_first() and progress.best_step == progress.step == progress.evaluated > 0:
        judge.save(folder / "model")
        remember_latest(folder)


def remember_latest(folder: Path) -> None:
    """Name the newest run for predict.py; of a fold, the run that it belongs to. No run ends for lack of this file."""
    run = folder.parent if folder.name.startswith("fold-") else folder
    try:
        write_text(runs.LATEST, f"{run.resolve()}\n")
    except OSError as problem:
        print(f"note: {runs.LATEST} cannot be written ({problem.strerror}): name {run / 'model'} to predict.py "
              "yourself")


# --- the end ----------------------------------------------------------------------------------------------------------

def finish(folder: Path, judge: Judge, progress: Progress, train_rows: np.ndarray, valid_rows: np.ndarray,
           setup: Setup) -> np.ndarray:
    """Score the best model beside the baselines, fit its temperature, write model/ and report.json."""
    report = {"ended": progress.finished, "steps": progress.step, "best_step": progress.best_step,
              "minutes": round(progress.seconds / 60, 2), "skipped_steps": progress.skipped,
              "train_rows": len(train_rows), "valid_rows": len(valid_rows)}
    logits = np.empty((0, 2, 3))
    if len(valid_rows):
        best = load_classifier(folder / "model", device=setup.device)
        if runs.digest_of(best) != progress.best_weights:
            raise InputError(file=folder / "model" / "model.safetensors",
                             found="other weights than the best evaluation's",
                             expected=f"those of step {progress.best_step:,}, as they were written")
        judge = Judge(best, setup.tokenizer, setup.config.max_length, precision=setup.precision)
        valid = setup.examples.take(valid_rows)
        logits = predict_logits(best, valid, setup.tokenizer, setup.config.eval_batch_size * setup.config.max_length,
                                setup.config.eval_batch_size, setup.precision, progress=setup.stop.check, together=True)
    if not distributed.is_first():
        return logits
    if len(valid_rows):
        judge.temperature = metrics.fit_temperature(logits, valid.labels)
        reachable = [setup.truth.get(setup.pairs[row].id) for row in valid_rows]
        scored = score_logits(logits, valid.labels, setup.lengths[valid_rows], setup.examples.labels[train_rows],
                              setup.lengths[train_rows], setup.options["seed"],
                              None if any(p is None for p in reachable) else np.array(reachable))
        report |= scored | {"temperature": judge.temperature}
        print(f"\non {len(valid):,} validation rows (log loss: lower is better; calibrated: temperature of other rows)")
        print(as_text(scored))
        write_predictions(folder / "valid_predictions.csv", logits, judge.temperature, valid_rows, setup)
    elif not all(torch.isfinite(p).all() for p in judge.model.parameters()):
        raise Failed(f"step {progress.step}: weights that are not finite. A smaller --lr usually helps.")
    judge.save(folder / "model")
    card = model_card(report, Path(setup.options["encoder"]).name, [Path(f).name for f in setup.options["train"]],
                      setup.options["recipe"], dataclasses.asdict(setup.config), setup.options["seed"])
    write_text(folder / "model" / "README.md", card)
    remember_latest(folder)
    write_json(folder / "report.json", report)
    plots.write_report(folder, report, progress.rows, setup.config, [setup.pairs[row] for row in valid_rows], logits)
    return logits


def write_predictions(path: Path, logits: np.ndarray, temperature: float, valid_rows: np.ndarray, setup: Setup) -> None:
    """The validation rows with what the model said of them, to look at and to blend with."""
    probabilities = metrics.averaged(logits, temperature)
    runs.write_rows(path, [
        {"id": setup.pairs[row].id, "label": LABELS[setup.examples.labels[row]],
         **{f"p_{name.lower()}": f"{value:.6f}" for name, value in zip(LABELS, p)}}
        for row, p in zip(valid_rows, probabilities)])


# --- small talk -------------------------------------------------------------------------------------------------------

def say_what_was_loaded(model: PreferenceModel, folder: Path, options: dict, setup: Setup) -> None:
    """Report the checkpoint and what memory and disk the run takes; refuse to start on a disk that is too small."""
    check_vocabulary(setup.tokenizer, model.config.vocab_size, options["encoder"])
    numbers = sum(p.numel() for p in model.parameters())
    disk = 4 * numbers * (3 * 3 + 1)       # weights and two moments in two states and one being written; and model/
    free = shutil.disk_usage(next(p for p in (folder, *folder.resolve().parents) if p.exists())).free
    held = sum(file.stat().st_size for place in ("state", "model") for file in (folder / place).glob("*.safetensors"))
    free, held = distributed.from_first((free, held))
    print(f"model      {model.load_report}; {numbers / 1e6:.1f} M parameters")
    print(f"           weights, gradients and AdamW's moments take {_size(16 * numbers)} of memory, activations come on"
          f" top;\n           the run takes up to {_size(disk)} of disk")
    if disk > free + held:                 # a run that goes on has most of it already
        raise InputError(file=folder, found=f"{_size(free)} free on its disk",
                         expected=f"{_size(disk - held)} for the state")


def say_how_long(steps: int, pace: float, bar: tqdm) -> None:
    """What is to come, at `pace` seconds a step; `steps` are those that are left."""
    bar.write(f"{pace:.3g} s a step: the {steps:,} to come take {_duration(pace * steps)} at that pace, evaluations on "
              f"top; peak memory so far {_size(peak_memory())}")


def peak_memory() -> int:
    """Bytes: the GPU's peak allocation if one is used, else the process's peak resident set."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated()
    try:
        import resource
    except ModuleNotFoundError:                # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def _size(number: float) -> str:
    return f"{number / 2**30:.1f} GB" if number >= 2**30 else f"{number / 2**20:.0f} MB"


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{seconds:.0f} s" if seconds < 120 else f"{minutes} min" if minutes < 120 else f"{minutes / 60:.1f} h"


if __name__ == "__main__":
    sys.exit(main())
