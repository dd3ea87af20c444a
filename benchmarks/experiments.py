"""The effect of pretraining: baselines and encoders on the same rows, several seeds; tables of docs/experiments-log.md.

    python benchmarks/experiments.py sample --train data/synthetic/train.csv
    python benchmarks/experiments.py autoj --train autoj.csv --options "--max-length 512" --encoders bundled random
    python benchmarks/experiments.py sample --train a.csv --encoders nes=runs/nes/model mlm=runs/mlm/model --seeds 1 2 3
    python benchmarks/experiments.py real --train a.csv b.csv --encoders --by model_a
    python benchmarks/experiments.py --page                    write the tables again without measuring

The first argument names the table. An encoder is `bundled` (weights/minipref-tiny), `random` (the same architecture and
tokenizer with random weights), or NAME=FOLDER. The seed decides the split by prompt, the order, the new head and, for
`random`, the encoder, so equal seeds of two encoders have equal rows. Scores are those of report.json or, with --test,
those of the best model on a held-out test set. Both orders are averaged, and the temperature is cross-fitted.
Results are stored in benchmarks/experiments.json; an encoder and seed that are already there are not run again without
--again. With --runs the runs are kept, and an interrupted run is resumed.

If rows are of several kinds, an encoder can improve its score by recognising the kinds. --by COLUMN adds the baseline
for this: the class prior of each value of that column, which no model sees.

TF-IDF of A minus B with a logistic regression needs scikit-learn (a development package).
"""

import argparse
import contextlib
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402 - these need the path
import pandas as pd  # noqa: E402
import torch  # noqa: E402

from minipref import metrics  # noqa: E402
from minipref.checkpoint import encoder_tensors, write_checkpoint  # noqa: E402
from minipref.config import EncoderConfig  # noqa: E402
from minipref.data import Pair, character_counts, read_pairs, segment_texts, split_by_prompt  # noqa: E402
from minipref.model import Encoder, init_weights  # noqa: E402
from minipref.predictor import load_judge  # noqa: E402
from minipref.recipes import recipe  # noqa: E402
from minipref.run.folder import has_checkpoint  # noqa: E402
from minipref.runtime import write_json, write_text  # noqa: E402
from minipref.synthetic import read_truth  # noqa: E402
from minipref.tokenizer import load_tokenizer  # noqa: E402

FIGURES, PAGE = ROOT / "benchmarks" / "experiments.json", ROOT / "docs" / "experiments-log.md"
BUNDLED = ROOT / "weights" / "minipref-tiny"
MARKS = "<!-- tables -->\n", "<!-- /tables -->"
EARLIER = ("autoj-512", "real", "one-pass")          # not on the page


def main() -> None:
    options = parse_arguments()
    figures = json.loads(FIGURES.read_text(encoding="utf-8")) if FIGURES.exists() else {}
    if not options.page:
        table = figures.setdefault(options.table, {"rows": {}, "how": {}})
        how = {"command": "python benchmarks/" + shlex.join([Path(sys.argv[0]).name, *without_paths(sys.argv[1:])]),
               "machine": machine()}
        for seed in options.seeds:
            for name, scores in wanted(options, seed, table["rows"]):
                table["rows"].setdefault(name, {})[str(seed)] = scores()
                table["how"][name] = how
                write_json(FIGURES, figures)
                print(f"{options.table}, {name}, seed {seed}: {table['rows'][name][str(seed)]}", flush=True)
    write_page(figures)


def wanted(options: argparse.Namespace, seed: int, done: dict) -> Iterator[tuple[str, Callable[[], dict]]]:
    """The missing results of this seed: names, and functions that compute them."""
    def missing(name: str) -> bool:
        return options.again or str(seed) not in done.get(name, {})

    simple = ["uniform", "class prior", "length only", "TF-IDF of A minus B"]
    simple += [f"class prior by {options.by}"] if options.by else []
    if any(missing(name) for name in simple):
        scores = baselines(options, seed)
        yield from ((name, lambda name=name: scores[name]) for name in simple if missing(name))
    for encoder in options.encoders:
        name, _, folder = encoder.partition("=")
        if missing(name):
            yield name, lambda name=name, folder=folder: fine_tuned(name, folder, options, seed)


# --- baselines --------------------------------------------------------------------------------------------------------

def baselines(options: argparse.Namespace, seed: int) -> dict[str, dict]:
    """Baselines on the rows on which an encoder is scored with this seed."""
    train = with_kinds(options.train, options.by)
    if options.valid:
        valid = with_kinds([options.valid], options.by)
    else:
        shares = [1 - options.valid_fraction, options.valid_fraction]                              # train.py's split
        part = split_by_prompt([p.prompt for p, _ in train], [p.label for p, _ in train], shares, seed)
        train, valid = ([row for row, k in zip(train, part) if k == which] for which in (0, 1))
    if options.test:
        valid = with_kinds([options.test], options.by)
    (train, kinds), (valid, valid_kinds) = (zip(*rows) for rows in (train, valid))
    labels, valid_labels = (np.array([pair.label for pair in pairs]) for pairs in (train, valid))
    found = metrics.baselines(character_counts(train), labels, character_counts(valid), valid_labels)
    found["TF-IDF of A minus B"] = metrics.evaluate(by_words(train, labels, valid, seed), valid_labels)
    if options.by:
        found[f"class prior by {options.by}"] = metrics.evaluate(by_kind(kinds, labels, valid_kinds), valid_labels)
    best = read_bayes_optimal(files(options), valid)
    if best is not None:
        found["Bayes-optimal"] = metrics.evaluate(best, valid_labels)
    bayes_optimal = {"bayes_optimal": round(found["Bayes-optimal"]["log_loss"], 5)} if best is not None else {}
    return {name: scores(result) | bayes_optimal for name, result in found.items()}


def files(options: argparse.Namespace) -> list[str]:
    """All CSVs in the options."""
    return [path for path in (*options.train, options.valid, options.test) if path]


def with_kinds(paths: list[str], column: str | None) -> list[tuple[Pair, str]]:
    """The rows of CSVs, each with its value in a column, or with "" if `column` is None."""
    pairs = [pair for path in paths for pair in read_pairs(path)]
    if column is None:
        return [(pair, "") for pair in pairs]
    entries = [pd.read_csv(path, dtype=str, keep_default_na=False)[column] for path in paths]
    return list(zip(pairs, np.concatenate(entries), strict=True))


def by_kind(kinds: Sequence[str], labels: np.ndarray, valid_kinds: Sequence[str]) -> np.ndarray:
    """The class shares of each row's kind, smoothed with five rows of the overall shares.

    Shapes: n kinds, (n,), kinds of the rows of valid -> (rows of valid, 3).
    """
    kinds, overall = np.array(kinds), np.bincount(labels, minlength=3) / len(labels)
    counts = {kind: np.bincount(labels[kinds == kind], minlength=3) for kind in {*kinds, *valid_kinds}}
    return np.array([(counts[kind] + 5 * overall) / (counts[kind].sum() + 5) for kind in valid_kinds])


def by_words(train: list[Pair], labels: np.ndarray, valid: list[Pair], seed: int) -> np.ndarray:
    """Probabilities of a logistic regression on the TF-IDF of A's unigrams and bigrams minus B's. The penalty is
    chosen on a tenth of the training rows, split by prompt. Shapes: -> (rows of valid, 3)."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    words = TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True)
    words.fit(text for pair in train for text in (answer(pair.response_a), answer(pair.response_b)))
    x, x_valid = (words.transform([answer(p.response_a) for p in pairs]) -
                  words.transform([answer(p.response_b) for p in pairs]) for pairs in (train, valid))
    inner = split_by_prompt([p.prompt for p in train], labels, (0.9, 0.1), seed)

    def fitted(penalty: float, rows: np.ndarray) -> LogisticRegression:
        return LogisticRegression(C=1 / penalty, max_iter=2000).fit(x[rows], labels[rows])

    def loss(penalty: float) -> float:
        probabilities = fitted(penalty, inner == 0).predict_proba(x[inner == 1])
        return metrics.evaluate(probabilities, labels[inner == 1])["log_loss"]

    best = min((0.1, 1.0, 10.0, 100.0, 1000.0), key=loss)
    return fitted(best, inner >= 0).predict_proba(x_valid)


def answer(turns: tuple) -> str:
    return "\n".join(segment_texts(turns))


def read_bayes_optimal(paths: list[str], pairs: list[Pair]) -> np.ndarray | None:
    """The rule's probabilities of these rows, or None if a row is not synthetic. Shapes: -> (rows, 3)."""
    truth = read_truth(paths)
    found = [truth.get(pair.id) for pair in pairs]
    return None if any(p is None for p in found) else np.array(found)


def scores(result: dict) -> dict:
    return {name: round(result[name], 5) for name in ("log_loss", "accuracy")}


# --- encoders ---------------------------------------------------------------------------------------------------------

def fine_tuned(name: str, folder: str, options: argparse.Namespace, seed: int) -> dict:
    """Scores of train.py for this encoder and seed; with --test, of its model on the test rows."""
    with contextlib.nullcontext(options.runs) if options.runs else tempfile.TemporaryDirectory() as kept:
        place = Path(kept).resolve() / options.table / f"{name}-{seed}"
        if name == "random":
            folder = fresh_encoder(BUNDLED, place / BUNDLED.name, seed)
        valid = ["--valid", options.valid] if options.valid else ["--valid-fraction", str(options.valid_fraction)]
        encoder = Path(folder).resolve() if folder else BUNDLED.relative_to(ROOT)
        command = [sys.executable, "train.py", "--train", *options.train, *valid, "--recipe", "tiny", "--encoder",
                   str(encoder), "--no-blend", "--seed", str(seed), "--run", str(place / "run"),
                   *shlex.split(options.options)]
        with keeping(ROOT / "runs" / "latest"):
            subprocess.run(command + ["--resume"] * has_checkpoint(place / "run"), cwd=ROOT, check=True,
                           stdout=subprocess.DEVNULL)
        report = json.loads((place / "run" / "report.json").read_text(encoding="utf-8"))
        found = scores(report["results"]["model, calibrated"])
        if options.test:
            found = judged(place / "run" / "model", options.test) | {"valid_log_loss": found["log_loss"]}
    return found | {"minutes": report["minutes"], "ended": report["ended"]}


def judged(model: Path, csv: str) -> dict:
    """A trained model's scores on a file of labelled rows."""
    pairs = list(read_pairs(csv))
    return scores(metrics.evaluate(load_judge(model).compare_many(pairs), np.array([pair.label for pair in pairs])))


def fresh_encoder(like: Path, folder: Path, seed: int) -> Path:
    """A folder with an encoder of the same architecture and tokenizer, with random weights."""
    config = EncoderConfig.from_json(like / "config.json")
    torch.manual_seed(seed)
    encoder = Encoder(config)
    init_weights(encoder, config.initializer_range)
    load_tokenizer(like).save(folder)
    write_checkpoint(encoder_tensors(encoder), config.to_json(), folder, torch.float32)
    return folder


@contextlib.contextmanager
def keeping(path: Path) -> Iterator[None]:
    """Restore the file at the end: an experiment must not become predict.py's newest run."""
    before = path.read_bytes() if path.exists() else None
    try:
        yield
    finally:
        if before is not None:
            path.write_bytes(before)
        else:
            path.unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                path.parent.rmdir()                         # only if nothing else is in it


# --- the page ---------------------------------------------------------------------------------------------------------

def write_page(figures: dict) -> None:
    """Write the tables between the marks of docs/experiments-log.md."""
    text = PAGE.read_text(encoding="utf-8")
    before, after = text.split(MARKS[0])[0], text.split(MARKS[1])[1]
    write_text(PAGE, before + MARKS[0] + "\n".join(as_table(name, table) for name, table in figures.items()
                                                      if name not in EARLIER) + MARKS[1] + after)


def as_table(name: str, table: dict) -> str:
    lines = [f"### {name}\n",
             "| what | log loss, mean | per seed | gap closed, mean | accuracy, mean | minutes, median |",
             "|---|---:|---|---:|---:|---:|"]
    for what, by_seed in table["rows"].items():
        if what == "uniform":                              # 1.0986 in every table
            continue
        losses = [scores["log_loss"] for scores in by_seed.values()]
        accuracy = statistics.mean(scores["accuracy"] for scores in by_seed.values())
        minutes = [scores["minutes"] for scores in by_seed.values() if "minutes" in scores]
        closed = gap_closed(by_seed, table["rows"]["class prior"])
        lines.append(f"| {what} | {statistics.mean(losses):.4f} | {', '.join(f'{x:.4f}' for x in losses)} | "
                     f"{f'{round(statistics.mean(closed), 2) + 0:.0%}' if closed else ''} | {accuracy:.3f} | "
                     f"{f'{statistics.median(minutes):.1f}' if minutes else ''} |")
    rows_of = {}                                                                    # command and machine -> rows
    for what, how in table["how"].items():
        if what == "uniform":
            continue
        rows_of.setdefault(f"`{how['command']}` ({how['machine']})", []).append(what)
    lines += ["", *(f"- {', '.join(rows)}: {how}" for how, rows in rows_of.items())]
    return "\n".join(lines) + "\n"


def gap_closed(by_seed: dict[str, dict], prior: dict[str, dict]) -> list[float]:
    """The gap closed between class-prior and Bayes-optimal log loss, for each seed; [] for real rows, whose
    Bayes-optimal loss is unknown."""
    if not all("bayes_optimal" in prior[seed] for seed in by_seed):
        return []
    return [(prior[seed]["log_loss"] - scores["log_loss"]) / (prior[seed]["log_loss"] - prior[seed]["bayes_optimal"])
            for seed, scores in by_seed.items()]


def machine() -> str:
    vectors = torch.backends.cpu.get_cpu_capability()
    return f"{os.cpu_count()} cores, {platform.machine()}, {vectors}, torch {torch.__version__}"


def without_paths(arguments: list[str]) -> list[str]:
    """The command with short paths: files by their names, an encoder by its last two parts, `gdes/model`."""
    return [f"{name}={Path(*Path(path).parts[-2:])}" if path else Path(name).name if "/" in name else name
            for name, _, path in (argument.partition("=") for argument in arguments)]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("table", nargs="?", help="name of the table")
    add("--train", nargs="+", metavar="CSV")
    add("--valid", metavar="CSV", help="validation rows (default: a tenth of --train)")
    add("--test", metavar="CSV", help="held-out test set: labelled rows that no run uses")
    add("--valid-fraction", type=float, default=recipe("tiny").valid_fraction, help="share of the rows for validation")
    add("--encoders", nargs="*", default=["bundled", "random"], metavar="NAME[=DIR]")
    add("--seeds", nargs="+", type=int, default=[1, 2, 3])
    add("--by", metavar="COLUMN", help="add the class prior of each value of this column as a baseline")
    add("--options", default="", help="more options of train.py, as one argument")
    add("--runs", metavar="DIR", help="keep the runs in this folder, and resume those in it")
    add("--again", action="store_true", help="repeat measurements that exist")
    add("--page", action="store_true", help="only write the tables again")
    options = parser.parse_args()
    if not options.page and not (options.table and options.train):
        parser.error("a table's name and --train, or --page")
    options.train = [str(Path(path).resolve()) for path in options.train or ()]    # train.py is run from ROOT
    options.valid = options.valid and str(Path(options.valid).resolve())
    for path in files(options) if options.by else ():
        if options.by not in pd.read_csv(path, nrows=0):
            parser.error(f"--by {options.by}: no such column in {path}")
    for encoder in options.encoders:
        name, _, folder = encoder.partition("=")
        if not folder and name not in ("bundled", "random"):
            parser.error(f"--encoders {encoder}: bundled, random or NAME=FOLDER")
    return options


if __name__ == "__main__":
    main()
