"""The messages of a run: input, hyperparameters with their sources, memory and disk, and the remaining time."""

import dataclasses
import shutil
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from minipref import threads
from minipref.data import Pair, count_missing, prompt_key
from minipref.recipes import RECIPE_RULES, RECIPES, default_recipe
from minipref.run import distributed
from minipref.run.setup import Setup
from minipref.runtime import InputError

GIVEN = "given on the command line"


def log_header(setup: Setup, splits: list[tuple[np.ndarray, np.ndarray]], encoder_hint: str,
               rows_hint: str) -> None:
    """Print encoder, rows, split, machine and hyperparameters. The hints say how to get the real encoder and rows."""
    options, config, pairs = setup.options, setup.config, setup.pairs
    print(f"encoder    {options.encoder}{encoder_hint}")
    print(f"rows       {', '.join(options.train)}{rows_hint}")
    labels = np.bincount([p.label for p in pairs], minlength=3)
    missing = count_missing(pairs)
    print(f"           {len(pairs):,} rows: {labels[0]:,} A, {labels[1]:,} B, {labels[2]:,} ties; {missing:,} missing "
          f"or empty responses{'; soft labels, scored by the most probable class' * options.soft_labels}")
    ids = Counter(pair.id for pair in pairs)
    if repeated := [id for id, count in ids.items() if count > 1]:
        print(f"           repeated ids, in all files together: {len(repeated):,}; the first: {repeated[0]}")
    print(f"           {setup.tokenized.truncation()}")
    log_split(pairs, splits)
    processes = f", {distributed.world_size()} processes" if distributed.world_size() > 1 else ""
    print(f"machine    {setup.device.type}, {setup.precision}, {torch.get_num_threads()} threads{threads.NOTE}, "
          f"torch {torch.__version__}{processes}")
    default = default_recipe(options.encoder)
    print(f"recipe     {options.recipe}   ({RECIPE_RULES[default] if options.recipe == default else GIVEN})")
    sources = {name: source for name, (_, source) in RECIPES[options.recipe].items()} | {
        field.name: GIVEN for field in dataclasses.fields(config) if hasattr(options, field.name)}
    for name, source in sources.items():
        value = getattr(config, name)
        print(f"           {name:<16} {value if isinstance(value, str) else format(value, 'g'):<8} {source}")
    print(f"           {'seed':<16} {options.seed:<8}")


def log_split(pairs: Sequence[Pair], splits: list[tuple[np.ndarray, np.ndarray]]) -> None:
    """Print the split, and whether a prompt is in both training and validation rows."""
    train_rows, valid_rows = splits[0]
    if len(splits) > 1:
        print(f"split      {len(splits)} folds by prompt: every row is predicted by a model that never saw its prompt")
    elif len(valid_rows):
        shared = {prompt_key(pairs[r].prompt) for r in train_rows} & {prompt_key(pairs[r].prompt) for r in valid_rows}
        leak = f"WARNING: {len(shared):,} prompts are on both sides, so the score is too good" if shared else \
            "no prompt on both sides"
        print(f"split      {len(train_rows):,} training rows, {len(valid_rows):,} validation rows; {leak}")
    else:
        print(f"split      none: all {len(train_rows):,} rows are trained on, so there is no score")


def log_model(model: nn.Module, folder: Path) -> None:
    """Print what was loaded, and the memory and disk that the run needs. Errors: `InputError` for too little disk."""
    parameters = sum(p.numel() for p in model.parameters())
    disk = 4 * parameters * (3 * 3 + 1)    # parameters and two moments in three states, and model/
    free = shutil.disk_usage(next(p for p in (folder, *folder.resolve().parents) if p.exists())).free
    held = sum(file.stat().st_size for place in ("state", "model") for file in (folder / place).glob("*.safetensors"))
    free, held = distributed.broadcast((free, held))
    print(f"model      {model.load_report}; {parameters / 1e6:.1f} M parameters")
    print(f"           weights, gradients and AdamW's moments take {size(16 * parameters)} of memory, activations come "
          f"on top;\n           the run takes up to {size(disk)} of disk")
    if disk > free + held:                 # a resumed run already holds most of it
        raise InputError(file=folder, found=f"{size(free)} free on its disk",
                         expected=f"{size(disk - held)} for the state")


class Clock:
    """Seconds from one `lap()` to the next: (wall clock, processor time of all cores)."""

    def __init__(self):
        self.before = time.perf_counter(), time.process_time()

    def lap(self) -> tuple[float, float]:
        before, self.before = self.before, (time.perf_counter(), time.process_time())
        return self.before[0] - before[0], self.before[1] - before[1]


def log_eta(step_seconds: list[float], seconds: float, steps_left: int, bar: tqdm) -> None:
    """Collect the times of the first twenty steps, then print an estimate of the remaining time once.

    The first ten steps are ignored: they load libraries and allocate memory.
    """
    if len(step_seconds) < 20:
        step_seconds.append(seconds)
        if len(step_seconds) == 20 and steps_left:
            pace = sum(step_seconds[10:]) / 10
            bar.write(f"{pace:.3g} s a step: the remaining {steps_left:,} take {duration(pace * steps_left)} at that "
                      f"speed, evaluations on top; peak memory so far {size(peak_memory())}")


def peak_memory() -> int:
    """Peak memory in bytes: of the GPU's allocator if one is used, else the process's resident set."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated()
    try:
        import resource
    except ModuleNotFoundError:                # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def size(number: float) -> str:
    return f"{number / 2**30:.1f} GB" if number >= 2**30 else f"{number / 2**20:.0f} MB"


def duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{seconds:.0f} s" if seconds < 120 else f"{minutes} min" if minutes < 120 else f"{minutes / 60:.1f} h"
