"""Preparation of a run: hyperparameters, split, and the manifest that --resume checks."""

import argparse
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import torch

from minipref import __version__
from minipref.data import Pair, TokenizedPairs, split_by_prompt
from minipref.recipes import RECIPES, TrainConfig
from minipref.run import folder
from minipref.run.signals import StopSignal
from minipref.runtime import InputError, folder_sha256, sha256_of
from minipref.tokenizer import Tokenizer

PROGRAM = "train.py"
PATHS = {"train", "valid", "encoder"}          # options of train.py whose files may have moved on --resume


@dataclass
class Setup:
    """Objects that all folds of a run share."""

    options: argparse.Namespace
    config: TrainConfig
    device: torch.device
    precision: str
    tokenizer: Tokenizer
    pairs: list[Pair]
    tokenized: TokenizedPairs
    truth: dict[str, np.ndarray]     # id -> the probabilities from which a synthetic row's label was drawn
    features: np.ndarray         # surface features, (N, K)
    stop: StopSignal


def hyperparameters(options: argparse.Namespace) -> TrainConfig:
    """The preset's hyperparameters, overridden by those given on the command line."""
    values = {name: value for name, (value, _) in RECIPES[options.recipe].items()}
    given = {f.name: getattr(options, f.name) for f in fields(TrainConfig) if hasattr(options, f.name)}
    return TrainConfig(**values | given, swap=not options.no_swap)


def warmup(options: argparse.Namespace, config: TrainConfig, total_steps: int) -> tuple[int, str]:
    """Steps of warmup, and a note on them. A recipe's warmup is limited to a tenth of the run, so that a short run
    reaches the peak; --warmup is not limited."""
    steps, most = config.warmup_steps(total_steps), max(1, total_steps // 10)
    if "warmup" in options:
        return steps, " (so the learning rate does not reach its peak)" if steps > total_steps else ""
    return (most, f" (a tenth at most; the recipe has {steps:,})") if steps > most else (steps, "")


def split_rows(pairs: list[Pair], held_out: list[Pair], config: TrainConfig, options: argparse.Namespace
               ) -> list[tuple[np.ndarray, np.ndarray]]:
    """[(training rows, validation rows)], one entry per fold. `held_out` rows are numbered after `pairs`."""
    if held_out:
        return [(np.arange(len(pairs)), np.arange(len(pairs), len(pairs) + len(held_out)))]
    if options.all_rows:
        return [(np.arange(len(pairs)), np.arange(0))]
    folds = options.folds
    shares = [1 / folds] * folds if folds else [1 - config.valid_fraction, config.valid_fraction]
    part = split_by_prompt([p.prompt for p in pairs], [p.label for p in pairs], shares, options.seed)
    splits = [(np.flatnonzero(part != k), np.flatnonzero(part == k)) for k in (range(folds) if folds else [1])]
    if any(len(train) == 0 or len(valid) == 0 for train, valid in splits):
        raise InputError(file=", ".join(options.train), found=f"{len(pairs)} rows, whose prompts cannot be split",
                         expected="more rows with different prompts, or --all-rows")
    return splits


def write_or_check_manifest(run: Path, options: argparse.Namespace, config: TrainConfig, device: torch.device,
                            precision: str) -> None:
    """Write the run's manifest, or on --resume compare with it. Files are compared by their SHA-256."""
    fingerprint = {"train": [sha256_of(path) for path in options.train],
                   "valid": sha256_of(options.valid) if options.valid else None,
                   "encoder": folder_sha256(options.encoder), "precision": precision,
                   "minipref": __version__} | folder.machine_fingerprint(device)
    twice = next((path for n, path in enumerate(options.train)
                  if fingerprint["train"][n] in fingerprint["train"][:n]), None)
    if twice:
        raise InputError(file=twice, found="the same content as another file of --train", expected="each file once")
    if options.resume:
        folder.check_manifest(run, PROGRAM, asdict(config), fingerprint,
                              {name: vars(options)[name] for name in PATHS})
    else:
        stored = {name: value for name, value in vars(options).items() if name not in ("run", "resume")}
        folder.write_manifest(run, {"program": PROGRAM, "options": stored, "hyperparameters": asdict(config),
                                    "fingerprint": fingerprint})
