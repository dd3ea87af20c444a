"""Baselines, encoders and ablations on the same rows, with several seeds; the tables of docs/experiments.md.

    python benchmarks/experiments.py sample --train data/synthetic/train.csv
    python benchmarks/experiments.py autoj --train autoj.csv --options "--max-length 512" --encoders bundled random
    python benchmarks/experiments.py sample --train a.csv --encoders nes=runs/nes/model mlm=runs/mlm/model --seeds 1 2 3
    python benchmarks/experiments.py real --train a.csv b.csv --encoders --by model_a
    python benchmarks/experiments.py parts --train a.csv --encoders bundled --without swap warmup

The first argument names the table. An encoder is `bundled` (weights/minipref-tiny), `random` (the same architecture and
tokenizer with random weights), or NAME=FOLDER. --without trains the bundled encoder without one part of the training
(ablation). The seed decides the split by prompt, the order, the new head and, for `random`, the encoder, so equal seeds
have equal rows. Scores are those of report.json or, with --test, those of the best model on a held-out test set. Both
orders are averaged; without --test, the temperature is cross-fitted. Results are stored in benchmarks/experiments.json;
what is already there is not run again without --again. `make docs` writes the page's tables. With --runs the runs are
kept, and an interrupted run is resumed.

If rows are of several kinds, an encoder can improve its score by recognising the kinds. --by COLUMN adds the baseline
for this: the class prior of each value of that column, which no model sees.

TF-IDF of A minus B and the areas under the ROC curve need scikit-learn (a development package).
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
from minipref.config import LABELS, EncoderConfig  # noqa: E402
from minipref.data import Pair, character_counts, read_pairs, segment_texts, split_by_prompt  # noqa: E402
from minipref.model import Encoder, init_weights  # noqa: E402
from minipref.predictor import load_judge  # noqa: E402
from minipref.recipes import recipe  # noqa: E402
from minipref.run.folder import has_checkpoint  # noqa: E402
from minipref.runtime import write_json  # noqa: E402
from minipref.synthetic import read_truth  # noqa: E402
from minipref.tokenizer import load_tokenizer  # noqa: E402

FIGURES = ROOT / "benchmarks" / "experiments.json"
BUNDLED = ROOT / "weights" / "minipref-tiny"
WITHOUT = {                                          # a part of the training: the options that leave it out
    "auxiliary-head": ["--aux-loss", "0"],
    "swap": ["--no-swap"],
    "warmup": ["--warmup", "0"],
    "decay": ["--weight-decay", "0"],
    "bfloat16": ["--precision", "fp32"],
    "stopping": ["--patience", "0"],
}
STAGES = {"last": "last evaluation, one order", "one_order": "best model, one order", "both_orders": "both orders"}
AREAS = {"auc_tie": "AUC, tie", "auc_winner": "AUC, winner"}


def main() -> None:
    options = parse_arguments()
    figures = json.loads(FIGURES.read_text(encoding="utf-8")) if FIGURES.exists() else {}
    found = figures.setdefault(options.table, {"rows": {}, "how": {}})
    how = {"command": "python benchmarks/" + shlex.join([Path(sys.argv[0]).name, *without_paths(sys.argv[1:])]),
           "machine": machine()}
    for seed in options.seeds:
        for name, scores in wanted(options, seed, found["rows"]):
            found["rows"].setdefault(name, {})[str(seed)] = scores()
            found["how"][name] = how
            write_json(FIGURES, figures)
            print(f"{options.table}, {name}, seed {seed}: {found['rows'][name][str(seed)]}", flush=True)
    print(f"\n{table(found)}")


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
    for part in options.without:
        if missing(f"without {part}"):
            yield f"without {part}", lambda part=part: fine_tuned(f"without-{part}", "", options, seed, WITHOUT[part])


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

def fine_tuned(name: str, folder: str, options: argparse.Namespace, seed: int, more: Sequence[str] = ()) -> dict:
    """Scores of train.py for this encoder and seed; with --test, of its model on the test rows.

    The areas under the ROC curve: `auc_tie` of p_tie for ties, `auc_winner` of p_a - p_b for A among the other rows.
    """
    with contextlib.nullcontext(options.runs) if options.runs else tempfile.TemporaryDirectory() as kept:
        place = Path(kept).resolve() / options.table / f"{name}-{seed}"
        if name == "random":
            folder = fresh_encoder(BUNDLED, place / BUNDLED.name, seed)
        valid = ["--valid", options.valid] if options.valid else ["--valid-fraction", str(options.valid_fraction)]
        encoder = Path(folder).resolve() if folder else BUNDLED.relative_to(ROOT)
        command = [sys.executable, "train.py", "--train", *options.train, *valid, "--recipe", "tiny", "--encoder",
                   str(encoder), "--no-blend", "--seed", str(seed), "--run", str(place / "run"),
                   *shlex.split(options.options), *more]
        with keeping(ROOT / "runs" / "latest"):
            subprocess.run(command + ["--resume"] * has_checkpoint(place / "run"), cwd=ROOT, check=True,
                           stdout=subprocess.DEVNULL)
        report = json.loads((place / "run" / "report.json").read_text(encoding="utf-8"))
        results = report["results"]
        found = scores(results["model, calibrated"])
        if options.test:
            pairs = list(read_pairs(options.test))
            labels = np.array([pair.label for pair in pairs])
            probabilities = load_judge(place / "run" / "model").compare_many(pairs)
            found = scores(metrics.evaluate(probabilities, labels)) | {"valid_log_loss": found["log_loss"]}
        else:
            rows = pd.read_csv(place / "run" / "valid_predictions.csv")
            labels = rows["label"].map(LABELS.index).to_numpy()
            probabilities = rows[["p_a", "p_b", "p_tie"]].to_numpy()
            last = pd.read_csv(place / "run" / "metrics.csv")["log_loss"].iloc[-1]
            found |= {"last": round(float(last), 5), "one_order": round(results["model, one order"]["log_loss"], 5),
                      "both_orders": round(results["model, both orders"]["log_loss"], 5)}
    p_a, p_b, p_tie = probabilities.T
    decided = labels < 2
    found |= {"auc_tie": area(~decided, p_tie), "auc_winner": area(labels[decided] == 0, (p_a - p_b)[decided])}
    return found | {"minutes": report["minutes"], "ended": report["ended"]}


def area(positive: np.ndarray, score: np.ndarray) -> float:
    from sklearn.metrics import roc_auc_score
    return round(float(roc_auc_score(positive, score)), 3)


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


# --- the table --------------------------------------------------------------------------------------------------------

def table(measured: dict) -> str:
    """A table of experiments.json as Markdown: means over the seeds, then the commands."""
    rows = {name: by_seed for name, by_seed in measured["rows"].items() if name != "uniform"}   # 1.0986 everywhere
    priors = rows["class prior"]

    def mean(by_seed: dict[str, dict], key: str, style: str) -> str:
        values = [scores[key] for scores in by_seed.values() if key in scores]
        return format(statistics.mean(values), style) if values else ""

    best = mean(priors, "bayes_optimal", ".4f")
    columns = STAGES if best else AREAS        # without a Bayes-optimal score, the areas show what a model has learnt
    more = [key for key in columns if any(key in scores for by_seed in rows.values() for scores in by_seed.values())]
    heads = ["log loss", *["gap closed"] * bool(best), "accuracy", *map(columns.get, more), "log loss per seed"]
    lines = [f"| | {' | '.join(heads)} |", "|---|" + "---:|" * (len(heads) - 1) + "---|"]
    for name, by_seed in rows.items():
        gap = [f"{round(statistics.mean(gap_closed(by_seed, priors)), 2) + 0:.0%}"] if best else []
        cells = [name, mean(by_seed, "log_loss", ".4f"), *gap, mean(by_seed, "accuracy", ".3f"),
                 *(mean(by_seed, key, ".2f" if key in AREAS else ".4f") for key in more),
                 ", ".join(f"{scores['log_loss']:.4f}" for scores in by_seed.values())]
        lines.append(f"| {' | '.join(cells)} |")
    if best:
        lines.append(f"| Bayes-optimal | {best} | 100% |" + " |" * (len(more) + 2))
    names = {}                                                                      # command and machine -> rows
    for name in rows:
        if how := measured["how"].get(name):
            names.setdefault(f"`{how['command']}` ({how['machine']})", []).append(name)
    return "\n".join([*lines, "", *(f"- {', '.join(of)}: {how}" for how, of in names.items())])


def gap_closed(by_seed: dict[str, dict], prior: dict[str, dict]) -> list[float]:
    """The gap closed between class-prior and Bayes-optimal log loss, for each seed."""
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
    add("table", help="name of the table")
    add("--train", nargs="+", required=True, metavar="CSV")
    add("--valid", metavar="CSV", help="validation rows (default: a tenth of --train)")
    add("--test", metavar="CSV", help="held-out test set: labelled rows that no run uses")
    add("--valid-fraction", type=float, default=recipe("tiny").valid_fraction, help="share of the rows for validation")
    add("--encoders", nargs="*", default=["bundled", "random"], metavar="NAME[=DIR]")
    add("--without", nargs="*", default=[], choices=WITHOUT, metavar="PART",
        help=f"also the bundled encoder without a part of the training: {', '.join(WITHOUT)}")
    add("--seeds", nargs="+", type=int, default=[1, 2, 3])
    add("--by", metavar="COLUMN", help="add the class prior of each value of this column as a baseline")
    add("--options", default="", help="more options of train.py, as one argument")
    add("--runs", metavar="DIR", help="keep the runs in this folder, and resume those in it")
    add("--again", action="store_true", help="repeat measurements that exist")
    options = parser.parse_args()
    options.train = [str(Path(path).resolve()) for path in options.train]          # train.py is run from ROOT
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
