"""Judge a CSV of pairs, or one pair: three probabilities each.

    python predict.py test.csv                              writes submission.csv with the newest run's model
    python predict.py test.csv --model runs/a/model runs/b/model      the average of several models
    python predict.py --prompt "..." --a "..." --b "..."    one pair, printed
    torchrun --standalone --nproc-per-node 4 -- predict.py test.csv   rows shared out to four GPUs or processes

A CSV with label columns is scored as well. What is unusual here: the submission is checked before it is moved into
place, so a file of that name is always a whole and valid one.
"""

import sys
from collections.abc import Callable

import numpy as np
import pandas as pd
from tqdm import tqdm

from minipref import distributed, metrics, runs
from minipref.config import LABELS
from minipref.data import LABEL_COLUMNS, read_pairs
from minipref.errors import ArgumentParser, InputError, print_anything
from minipref.files import check_writable, replacing
from minipref.judge import (
    Judge,
    add_rows_or_pair,
    check_rows_or_pair,
    choose_device,
    choose_precision,
    load_judge,
    out_of_memory,
)


def parse_arguments(arguments: list[str] | None):
    parser = ArgumentParser(prog="predict.py", description="Three probabilities for each pair of answers.")
    add = parser.add_argument
    add_rows_or_pair(parser)
    add("--model", nargs="+", metavar="DIR", help="trained models, averaged (default: the newest run's)")
    add("--output", default="submission.csv", metavar="CSV")
    add("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto")
    add("--precision", choices=("auto", "fp32", "bf16", "fp16"), default="auto")
    add("--batch-tokens", type=int, default=16_384, help="tokens of a batch, padding included")
    add("--no-swap-average", action="store_true", help="judge each pair in one order only: half the time")
    options = parser.parse_args(arguments)
    check_rows_or_pair(parser, options)
    if options.batch_tokens < 1:
        parser.error(f"--batch-tokens {options.batch_tokens}")
    return options


def main(arguments: list[str] | None = None) -> int:
    print_anything()
    with distributed.joined():
        try:
            options = parse_arguments(arguments)
            device = distributed.own_device(choose_device(options.device))
            precision = choose_precision(options.precision, device)
            if options.csv is not None:
                check_writable(options.output)     # now, not after hours of judging
            folders = options.model or runs.newest_models()
            judges = [load_judge(folder, device, precision) for folder in folders]
            if options.csv is None:
                for label, p in zip(LABELS, judge_rows(judges, [(options.prompt, options.a, options.b)], options)[0]):
                    print(f"{label:<4} {p:.4f}")
            else:
                print(f"model      {', '.join(map(str, folders))}")
                predict_file(judges, options)
        except InputError as problem:
            if distributed.speaks():
                print(f"predict.py: {problem}", file=sys.stderr)
            return 2
        except OSError as problem:
            print(f"predict.py{distributed.who()}: {' '.join(str(problem).split())}", file=sys.stderr)
            return 1
        except RuntimeError as problem:
            if found := out_of_memory(problem):
                print(f"predict.py{distributed.who()}: {found}; a smaller --batch-tokens takes less, and "
                      "nothing was written", file=sys.stderr)
                return 1
            if not distributed.is_lost(problem):
                raise
            print(f"predict.py{distributed.who()}: another process is gone, and all stop with it; nothing was written",
                  file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            print(f"predict.py{distributed.who()}: interrupted, nothing was written", file=sys.stderr)
            return 130
    return 0


def predict_file(judges: list[Judge], options) -> None:
    """Judge every row of the CSV and write the submission; print the metrics if the rows are labelled.

    All rows are read before the first is judged: that costs their text's memory, and spares the hours that a bad last
    row would have wasted. Several processes judge every N-th row each.
    """
    pairs = list(read_pairs(options.csv, labels="if present", unique_ids=True))
    print(f"rows       {options.csv}: {len(pairs):,}")
    mine = distributed.share(np.arange(len(pairs)))
    probabilities = np.zeros((len(pairs), len(LABELS)))
    with tqdm(total=len(mine) * len(judges), unit="pairs", disable=None if distributed.is_first() else True,
              dynamic_ncols=True) as bar:
        probabilities[mine] = judge_rows(judges, [pairs[row] for row in mine], options, bar.update)
    probabilities = distributed.summed(probabilities)            # what is another's is 0 here
    broken = int(distributed.summed(judges[0].tokenizer.replaced_surrogates))
    if not distributed.is_first():
        return
    ids, labels = [pair.id for pair in pairs], [pair.label for pair in pairs]
    write_submission(options.output, ids, probabilities)
    orders = "one order" if options.no_swap_average else "both orders"
    print(f"wrote      {options.output}: {len(ids):,} rows, {orders} "
          f"of each, {len(judges)} model{'s' if len(judges) > 1 else ''}")
    if broken:
        print(f"           {broken:,} texts with broken characters mended")
    if labels[0] is not None:
        result = metrics.evaluate(probabilities, np.array(labels))
        print(f"\n{metrics.score_table({'these rows': result})}\n\n{metrics.confusion_table(result)}")


def judge_rows(judges: list[Judge], pairs: list, options,
               progress: Callable[[int], object] | None = None) -> np.ndarray:
    """The mean of all models' probabilities. Shapes: N rows -> (N, 3)."""
    return np.mean([judge.compare_many(pairs, options.batch_tokens, not options.no_swap_average, progress)
                    for judge in judges], axis=0)


def write_submission(path: str, ids: list[str], probabilities: np.ndarray) -> None:
    """Write `id,winner_model_a,winner_model_b,winner_tie`, ids in order; check it, then move it into place."""
    frame = pd.DataFrame(dict(zip(LABEL_COLUMNS, probabilities.T)))
    frame.insert(0, "id", ids)
    with replacing(path) as temporary:
        frame.to_csv(temporary, index=False, float_format="%.9f", lineterminator="\n")
        back = pd.read_csv(temporary, dtype={"id": str}, keep_default_na=False)
        values = back[list(LABEL_COLUMNS)].to_numpy(dtype=np.float64)
        if back["id"].tolist() != ids or not np.isfinite(values).all() or abs(values.sum(1) - 1).max() > 1e-6:
            raise InputError(file=path, found="ids or probabilities that do not survive writing",
                             expected="finite rows that sum to 1, and ids without line breaks at their ends")


if __name__ == "__main__":
    sys.exit(main())
