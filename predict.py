"""Predict a CSV of pairs, or one pair: three probabilities for each.

    python predict.py test.csv                              writes submission.csv with the newest run's model
    python predict.py --model runs/a/model runs/b/model test.csv      the average of several models
    python predict.py --prompt "..." --a "..." --b "..."    one pair, printed
    torchrun --standalone --nproc-per-node 4 -- predict.py test.csv   rows divided among four processes

A CSV with label columns is also scored. What is unusual here: the submission is checked before it is moved into place,
so the output file is always complete and valid.
"""

import argparse
import contextlib
import os
import sys
from collections.abc import Callable
from pathlib import Path

import minipref.threads  # isort: skip  # noqa: F401 - before torch
import numpy as np
import pandas as pd
from tqdm import tqdm

from minipref import metrics, runtime
from minipref.config import LABELS
from minipref.data import LABEL_COLUMNS, count_missing, read_pairs
from minipref.predictor import SETTINGS, Judge, add_rows_or_pair, check_rows_or_pair, load_judge
from minipref.run import distributed
from minipref.run.folder import newest_models
from minipref.run.state import keep_globals
from minipref.runtime import ArgumentParser, InputError, atomic_write, number, read_json, run_program

OTHER_FORMATS = {".bz2", ".gz", ".json", ".jsonl", ".parquet", ".tsv", ".xlsx", ".xz", ".zip"}


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = ArgumentParser(prog="predict.py", description="Predict P(A), P(B) and P(tie) for each pair.")
    add = parser.add_argument
    add_rows_or_pair(parser)
    add("--model", nargs="+", action="extend", metavar="DIR",
        help="trained models, averaged (default: the newest run's)")
    add("--output", metavar="CSV", help="the submission (default: submission.csv)")
    add("--device", choices=runtime.DEVICES, default="auto", help="default: a GPU if there is one")
    add("--precision", choices=runtime.PRECISIONS, default="auto", help="default: the fastest")
    add("--batch-tokens", type=number(int, 1), default=16_384, help="tokens in a batch, with padding (16,384)")
    add("--no-swap-average", action="store_true", help="predict each pair in one order only, in half the time")
    add("--no-fast", action="store_true", help="run the plain model of minipref/model.py, which is slower")
    options = parser.parse_args(arguments)
    files = [path for path in options.model or () if not os.path.isdir(path)]
    if options.csv is None and options.prompt is None and files and len(options.model) > 1:
        options.csv = files[-1]                    # argparse reads `--model A B test.csv` as three models
        options.model.remove(options.csv)
    check_rows_or_pair(parser, options)
    if options.csv is None and options.output is not None:
        parser.error("--output without a CSV: one pair is printed")
    options.output = options.output or "submission.csv"
    return options


def main(arguments: list[str] | None = None) -> int:
    def body() -> None:
        with distributed.process_group():
            predict(parse_arguments(arguments))

    return run_program("predict.py", body, "; a smaller --batch-tokens takes less memory", distributed.rank_suffix())


@keep_globals()
def predict(options: argparse.Namespace) -> None:
    device = distributed.local_device(runtime.choose_device(options.device))
    precision = runtime.choose_precision(options.precision, device)
    folders = options.model or newest_models()
    if options.csv is not None:
        runtime.check_writable(options.output, [options.csv, *folders])     # before hours of work
        check_submission(options.output)
    judges = [load_judge(folder, device, precision, fast=not options.no_fast) for folder in folders]
    check_distinct(folders)
    for folder, judge in zip(folders, judges):
        if judge.model.load_report.note:
            print(f"note: {folder}: {judge.model.load_report.note}")
    if options.csv is not None:
        # A submission on stdout must not be mixed with messages.
        with contextlib.redirect_stdout(sys.stderr if runtime.standard_stream(options.output) == 1 else sys.stdout):
            print(f"model      {', '.join(map(str, folders))}")
            predict_file(judges, options)
    else:
        for label, p in zip(LABELS, predict_rows(judges, [(options.prompt, options.a, options.b)], options)[0]):
            print(f"{label:<4} {p:.4f}")


def predict_file(judges: list[Judge], options: argparse.Namespace) -> None:
    """Predict every row of the CSV and write the submission; print the scores if the rows are labelled.

    All rows are read before the first is predicted, so a malformed last row cannot waste hours of work. Each of N
    processes predicts every N-th row.
    """
    pairs = read_pairs(options.csv, labels="if present", unique_ids=True)
    missing = count_missing(pairs)
    print(f"rows       {options.csv}: {len(pairs):,}{f'; {missing:,} missing or empty responses' * (missing > 0)}")
    shard = distributed.shard(np.arange(len(pairs)))
    probabilities = np.zeros((len(pairs), len(LABELS)))
    with tqdm(total=len(shard) * len(judges), unit="pairs", dynamic_ncols=True,
              disable=None if distributed.is_main_process() else True) as bar:
        probabilities[shard] = predict_rows(judges, [pairs[row] for row in shard], options, bar.update)
    probabilities = distributed.all_reduce_sum(probabilities)            # rows of other processes are 0 here
    if not distributed.is_main_process():
        return
    ids, labels = [pair.id for pair in pairs], [pair.label for pair in pairs]
    write_submission(options.output, ids, probabilities)
    orders = "one order" if options.no_swap_average else "both orders"
    print(f"wrote      {options.output}: {len(ids):,} rows, {orders} of each, {len(judges)} "
          f"model{'s' if len(judges) > 1 else ''}")
    if labels[0] is not None:
        result = metrics.evaluate(probabilities, np.array(labels))
        print(f"\n{metrics.score_table({'these rows': result})}\n\n{metrics.confusion_table(result)}")


def predict_rows(judges: list[Judge], pairs: list, options: argparse.Namespace,
                 progress: Callable[[int], object] | None = None) -> np.ndarray:
    """The mean of all models' probabilities. Shapes: N rows -> (N, 3)."""
    return np.mean([judge.compare_many(pairs, options.batch_tokens, not options.no_swap_average, progress)
                    for judge in judges], axis=0)


def check_distinct(folders: list) -> None:
    """Errors: `InputError` for a model that is given twice, under whatever name."""
    seen = []
    for folder in folders:
        settings = read_json(Path(folder, SETTINGS), "")       # with the SHA-256 of the weights
        if settings in seen and "files" in settings:
            raise InputError(file=folder, found="the same model as another one of --model", expected="each model once")
        seen.append(settings)


def check_submission(path: str) -> None:
    """Errors: `InputError` for an existing, non-empty file that is no submission (0/1 labels are not a submission),
    and for a new file with the name of another format."""
    if not os.path.isfile(path) or not os.path.getsize(path):
        if Path(path).suffix.lower() in OTHER_FORMATS:
            raise InputError(file=path, found="the name of another format",
                             expected="one that ends in .csv: the submission is CSV, without compression")
        return
    try:
        frame = pd.read_csv(path, dtype=str)
        cells = frame[list(LABEL_COLUMNS)].to_numpy()
        is_submission = list(frame) == ["id", *LABEL_COLUMNS] and bool(
            (abs(cells.astype(np.float64).sum(1) - 1) < 1e-3).all()) and set(cells.flat) != {"0", "1"}
    except (KeyError, ValueError):               # pandas' own errors are ValueErrors
        is_submission = False
    if not is_submission:
        raise InputError(file=path, found="a file that is not a submission",
                         expected="a new name, or this file moved away")


def write_submission(path: str, ids: list[str], probabilities: np.ndarray) -> None:
    """Write `id,winner_model_a,winner_model_b,winner_tie`, ids in order; check it, then move it into place."""
    frame = pd.DataFrame(dict(zip(LABEL_COLUMNS, probabilities.T)))
    frame.insert(0, "id", ids)
    with atomic_write(path) as temporary:
        frame.to_csv(temporary, index=False, float_format="%.9f", lineterminator="\n")
        back = pd.read_csv(temporary, dtype={"id": str}, keep_default_na=False)
        values = back[list(LABEL_COLUMNS)].to_numpy(dtype=np.float64)
        if back["id"].tolist() != ids or not np.isfinite(values).all() or abs(values.sum(1) - 1).max() > 1e-6:
            raise InputError(file=path, found="ids or probabilities that do not survive writing",
                             expected="finite rows that sum to 1, and ids without line breaks at their ends")


if __name__ == "__main__":
    sys.exit(main())
