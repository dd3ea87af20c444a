"""`python -m minipref.pretrain`: the options."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from minipref import runtime
from minipref.pretrain.loop import PATHS, PROGRAM, pretrain
from minipref.run import folder
from minipref.runtime import ArgumentParser, InputError, number, run_program

COUNT, LENGTH, RATE = number(int, 1), number(int, 4), number(float, 0, 0.999)     # LENGTH: 15% of 3 tokens round to 0
NUMBERS = {  # option -> (type, default, help)
    "steps": (COUNT, 5000, "optimizer steps"),
    "batch-tokens": (COUNT, 2048, "tokens per step"),
    "length": (LENGTH, 128, "tokens of a window"),
    "long-length": (LENGTH, 512, "tokens of a long window"),
    "warmup": (COUNT, 400, "warmup steps"),
    "evaluations": (COUNT, 25, "evaluations on held-out text"),
    "heldout-tokens": (COUNT, 32_768, "maximum number of tokens of an evaluation"),
    "long-share": (number(float, 0, 1), 0.1, "share of steps with long windows"),
    "lr": (RATE, 2e-3, "peak learning rate of the generator"),
    "discriminator-lr": (RATE, 5e-4, "peak learning rate of the discriminator"),
    "heldout-share": (RATE, 0.01, "share of documents held out"),
    "dropout": (RATE, 0.0, "dropout in pretraining"),
    "threads": (COUNT, None, "CPU threads (default: torch's choice)"),
    "seed": (number(int, 0, 2**63 - 1), 0, "seed of weights, windows, masks and dropout"),
}
FRESH = {  # the same; not allowed with --encoder
    "vocab-size": (COUNT, 8000, "number of ids, with special tokens"),
    "width": (COUNT, 192, "hidden size D"),
    "heads": (COUNT, 3, "attention heads H"),
    "layers": (COUNT, 4, "layers N; the generator has half as many"),
    "feed-forward": (COUNT, 768, "intermediate size F"),
    "init-std": (number(float, 1e-6, 0.999), 0.06, "standard deviation of initial weights"),
}
DEFAULTS = {"output": "runs/pretrain", "resume": False, "encoder": None, "objective": "rtd", "sharing": "gdes",
            "precision": "auto", "device": "auto", "tokenizer": None}
DEFAULTS |= {name.replace("-", "_"): default for name, (_, default, _) in (NUMBERS | FRESH).items()}


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    return run_program("pretrain", lambda: pretrain(resolve_options(parse_arguments(arguments))),
                       "; a smaller --batch-tokens takes less memory")


def parse_arguments(arguments: Sequence[str] | None) -> dict:
    """The options given on the command line, without defaults: --resume must know which ones the user gave."""
    parser = ArgumentParser(prog=PROGRAM, description="Pretrain a small DeBERTa-v3 on text.",
                            argument_default=argparse.SUPPRESS)
    add = parser.add_argument
    add("--corpus", nargs="+", metavar="PATH", help="folders, .jsonl, .jsonl.gz or .txt files")
    add("--output", metavar="DIR", help="the run's folder, with the encoder in its model/ (default: runs/pretrain)")
    add("--resume", action="store_true", help="resume the run in --output, with its options")
    add("--encoder", metavar="DIR", help="start from this encoder and its tokenizer instead of random weights")
    add("--objective", choices=("rtd", "mlm"), help="mlm: masked LM only, no discriminator (default: rtd)")
    add("--sharing", choices=("gdes", "es", "nes"), help="sharing of the word embeddings in rtd (default: gdes)")
    add("--precision", choices=("auto", "fp32", "bf16"), help="precision of the forward pass (default: auto)")
    add("--device", choices=runtime.DEVICES, help="(default: auto)")
    fresh = parser.add_argument_group("a new encoder", "Not with --encoder, which has its own.")
    fresh.add_argument("--tokenizer", metavar="DIR", help="folder with a tokenizer, instead of training a vocabulary")
    for group, rows in ((parser, NUMBERS), (fresh, FRESH)):
        for name, (kind, default, text) in rows.items():
            group.add_argument(f"--{name}", type=kind, metavar="X" if isinstance(default, float) else "N",
                               help=text if default is None else f"{text} (default: {default})")
    return vars(parser.parse_args(arguments))


def resolve_options(overrides: dict) -> argparse.Namespace:
    """All options of the run. Options not given have their default, or on --resume the value stored in the run."""
    if overrides.get("resume"):
        overrides = {"output": DEFAULTS["output"]} | overrides
        return argparse.Namespace(**folder.resumed_options(
            Path(overrides["output"]), PROGRAM, overrides, {"resume", "output", "threads", "device"}, set(PATHS)))
    if "corpus" not in overrides:
        raise InputError(found="no --corpus", expected="folders or files of text")
    for name in ("tokenizer", *FRESH):
        if "encoder" in overrides and name.replace("-", "_") in overrides:
            raise InputError(found=f"--{name} with --encoder", expected="one of the two: the encoder has its own")
    options = argparse.Namespace(**DEFAULTS | overrides)
    if options.warmup >= options.steps:
        raise InputError(found=f"--warmup {options.warmup} with --steps {options.steps}", expected="fewer than --steps")
    for name, length in (("length", options.length), ("long-length", options.long_length)):
        if length > options.batch_tokens:
            raise InputError(found=f"--{name} {length} with --batch-tokens {options.batch_tokens}",
                             expected="at most --batch-tokens")
    return options


if __name__ == "__main__":
    sys.exit(main())
