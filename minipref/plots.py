"""A run's report as one page: curves, confusion, calibration, lengths, and its most confident mistakes.

`train.py` calls `write_report` at a run's end; the page is `report.html` in the run's folder. It needs no server and
fetches nothing, and equal runs have equal pages.

What is unusual here: matplotlib is an extra (`pip install .[plots]`). Without it the page has its tables and texts and
no figures, and says so, and so does training, once.
"""

import html
import io
import math
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import numpy as np

from minipref import metrics
from minipref.config import LABELS, TrainConfig
from minipref.data import Pair, character_counts
from minipref.files import write_text
from minipref.optim import cosine_with_warmup

INK = "#010203"            # in matplotlib; on the page the colour of the text, light or dark
COLOURS = ("#c8641e", "#2a78c8", "#5f8f3a")
MISTAKES = 10
MOST_SHOWN = 1500          # characters of a text


def write_report(folder: Path, report: dict, rows: list[dict], config: TrainConfig, pairs: Sequence[Pair],
                 logits: np.ndarray) -> None:
    """Write `folder`/report.html.

    `report` is report.json's content, `rows` those of metrics.csv. Shapes: N validation pairs with their labels, their
    logits (N, 2, 3); N = 0 for a run on all rows, whose page has no scores.
    """
    figures = [("Learning rate", "the learning rate over all steps", lambda axes: draw_lr(axes, report, rows, config))]
    tables = []
    if len(pairs):
        result = report["results"]["model, calibrated"]
        labels = np.array([pair.label for pair in pairs])
        probabilities = metrics.averaged(logits, report["temperature"])
        lengths = character_counts(pairs)
        figures = [
            ("Loss", "training and validation loss by epoch", lambda axes: draw_curves(axes, rows, LOSSES)),
            ("Scores", "accuracy and macro F1 by epoch", lambda axes: draw_curves(axes, rows, SCORES)),
            *figures,
            ("People and model", "the confusion matrix", lambda axes: draw_confusion(axes, result)),
            ("Reliability", "accuracy at each confidence", lambda axes: draw_reliability(axes, result)),
            ("Length and correctness", "accuracy by the pair's length",
             lambda axes: draw_lengths(axes, probabilities, labels, lengths)),
            ("Liking for length", "how often A wins, by how much longer A is",
             lambda axes: draw_length_bias(axes, probabilities, labels, lengths)),
        ]
        tables = [scores_html(report["results"]), confusion_html(result), curves_html(rows),
                  mistakes_html(pairs, labels, probabilities)]
    head = f"<p>{html.escape(' '.join(report.get('verdict', ['Trained on every row: there is no score.'])))}</p>"
    facts = (f"<p class=quiet>Ended: {html.escape(report['ended'])}. {report['steps']:,} steps, the best after "
             f"{report['best_step']:,}; {report['train_rows']:,} rows trained on, {report['valid_rows']:,} validated "
             "on.</p>")
    body = "\n".join([head, facts, figures_html(figures), *tables])
    write_text(folder / "report.html", PAGE.replace("@BODY@", body))


# --- figures ----------------------------------------------------------------------------------------------------------

def figures_html(figures: list[tuple[str, str, Callable]]) -> str:
    """Each figure drawn into an SVG of its own, or one sentence where matplotlib is missing."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        say_what_is_left_out()
        return "<p>The figures were left out: matplotlib is not installed (<code>pip install .[plots]</code>).</p>"
    parts = []
    for number, (title, said, draw) in enumerate(figures):
        with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": str(number), "font.size": 9,
                                    **{f"{part}.color": INK for part in ("text", "xtick", "ytick")},
                                    "axes.edgecolor": INK, "axes.labelcolor": INK,
                                    "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False}):
            figure = Figure(figsize=(4.4, 3.2))
            axes = figure.add_axes((0.15, 0.16, 0.8, 0.74))
            draw(axes)
            svg = io.StringIO()
            figure.savefig(svg, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
        drawing = svg.getvalue()
        drawing = drawing[drawing.index("<svg"):].replace(INK, "currentColor").replace(
            "<svg ", f'<svg role="img" aria-label="{html.escape(said)}" ', 1)
        parts.append(f"<figure><figcaption>{html.escape(title)}</figcaption>{drawing}</figure>")
    return f'<div class="figures">{"".join(parts)}</div>'


@cache
def say_what_is_left_out() -> None:
    """Once a process, however many folds a run has."""
    print("report.html has no figures: matplotlib is not installed (pip install .[plots])")


LOSSES = {"train_loss": "training", "log_loss": "validation"}
SCORES = {"accuracy": "accuracy", "f1": "macro F1"}


def draw_curves(axes, rows: list[dict], which: dict[str, str]) -> None:
    """Columns of metrics.csv over the epochs, with the best evaluation marked."""
    epochs = [row["epoch"] for row in rows]
    for (column, name), colour in zip(which.items(), COLOURS):
        axes.plot(epochs, [row[column] for row in rows], "o-", ms=3, color=colour, label=name)
    best = [row["epoch"] for row in rows if row["best"]][-1:]
    for epoch in best:
        axes.axvline(epoch, color=INK, lw=0.7, ls=":")
    axes.set_xlabel("epoch (dotted: the model that was kept)")
    axes.legend()


def draw_lr(axes, report: dict, rows: list[dict], config: TrainConfig) -> None:
    """The whole schedule, and how far the run went along it."""
    total = config.epochs * config.steps_per_epoch(report["train_rows"])
    steps = np.unique(np.linspace(1, total, 400).astype(int))
    rates = [learning_rate(int(step), total, config) for step in steps]
    axes.plot(steps, rates, color=COLOURS[1])
    axes.fill_between(steps, rates, where=steps <= report["steps"], color=COLOURS[1], alpha=0.25, lw=0)
    axes.plot([row["step"] for row in rows], [row["lr"] for row in rows], "o", ms=3, color=COLOURS[0])
    axes.set_xlabel("step (filled: taken; dots: evaluations)")
    axes.set_ylim(0)
    axes.ticklabel_format(axis="y", scilimits=(0, 0))


def learning_rate(step: int, total: int, config: TrainConfig) -> float:
    """The rate of a step, counted from 1, as the loop in train.py sets it."""
    return cosine_with_warmup(step, total + 1, config.warmup_steps(total), config.lr)


def draw_confusion(axes, result: dict) -> None:
    """What people said (rows) against what the model said (columns); shades are shares of the row."""
    counts = np.array(result["confusion"])
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    for truth in range(len(LABELS)):
        for said in range(len(LABELS)):
            axes.fill_between([said - 0.5, said + 0.5], truth - 0.5, truth + 0.5, color=COLOURS[1], lw=0,
                              alpha=float(shares[truth, said]))
            axes.text(said, truth, f"{counts[truth, said]:,}\n{shares[truth, said]:.0%}", ha="center", va="center")
    axes.set_xticks(range(len(LABELS)), LABELS)
    axes.set_yticks(range(len(LABELS)), LABELS)
    axes.set_xlim(-0.5, len(LABELS) - 0.5)
    axes.set_ylim(len(LABELS) - 0.5, -0.5)
    axes.set_xlabel("the model said")
    axes.set_ylabel("people said")


def draw_reliability(axes, result: dict) -> None:
    """Accuracy against confidence: on the diagonal a confidence means what it says. Areas are numbers of rows."""
    bins = result["calibration"]
    axes.plot([0, 1], [0, 1], color=INK, lw=0.7, ls=":")
    axes.plot([b["confidence"] for b in bins], [b["accuracy"] for b in bins], color=COLOURS[0], lw=1)
    axes.scatter([b["confidence"] for b in bins], [b["accuracy"] for b in bins], color=COLOURS[0], lw=0,
                 s=[4 + 200 * b["rows"] / result["rows"] for b in bins])
    axes.set_xlim(0.3, 1)
    axes.set_ylim(0, 1)
    axes.set_xlabel(f"confidence in the likeliest class (ECE {result['ece']:.3f})")
    axes.set_ylabel("accuracy")


def draw_lengths(axes, probabilities: np.ndarray, labels: np.ndarray, lengths: np.ndarray) -> None:
    """Accuracy in tenths of the rows by the length of prompt and answers together, with standard errors."""
    right = probabilities.argmax(1) == labels
    middles, means, errors = tenths(lengths.sum(1).clip(min=1), right)
    axes.errorbar(middles, means, errors, fmt="o-", ms=3, color=COLOURS[0])
    axes.set_xscale("log")
    axes.set_ylim(0, 1)
    axes.set_xlabel("characters of prompt and answers (log scale)")
    axes.set_ylabel("accuracy")


def draw_length_bias(axes, probabilities: np.ndarray, labels: np.ndarray, lengths: np.ndarray) -> None:
    """How often people preferred A, and how often the model expects it, by how much longer A is than B."""
    longer = metrics.length_features(lengths)[:, 0]
    for values, name, colour in ((labels == 0, "people", COLOURS[0]), (probabilities[:, 0], "model", COLOURS[1])):
        middles, means, errors = tenths(longer, values)
        axes.errorbar(middles, means, errors, fmt="o-", ms=3, color=colour, label=name)
    axes.set_ylim(0, 1)
    axes.set_xlabel("log(characters of A / characters of B)")
    axes.set_ylabel("A preferred")
    axes.legend()


def tenths(by: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows sorted by `by` and cut into ten: the median of `by`, the mean of `values` and its standard error in each.

    Shapes: (N,), (N,) -> (min(10, N),) each.
    """
    parts = [part for part in np.array_split(np.argsort(by, kind="stable"), 10) if len(part)]
    return (np.array([np.median(by[part]) for part in parts]), np.array([values[part].mean() for part in parts]),
            np.array([values[part].std() / math.sqrt(len(part)) for part in parts]))


# --- tables -----------------------------------------------------------------------------------------------------------

def table_html(caption: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose first column names its rows. Cells are escaped here."""
    head = "".join(f"<th scope=col>{html.escape(cell)}</th>" for cell in header)
    body = "".join(f"<tr><th scope=row>{html.escape(row[0])}</th>"
                   + "".join(f"<td>{html.escape(cell)}</td>" for cell in row[1:]) + "</tr>" for row in rows)
    return f"<table><caption>{html.escape(caption)}</caption><tr>{head}</tr>{body}</table>"


def scores_html(results: dict[str, dict]) -> str:
    names = ("log_loss", "accuracy", "precision", "recall", "f1", "ece")
    return table_html("On the validation rows", ("", *(name.replace("_", " ") for name in names)),
                      [(name, *(f"{result[column]:.4f}" for column in names)) for name, result in results.items()])


def confusion_html(result: dict) -> str:
    return table_html("People (rows) and the calibrated model (columns)", ("", *LABELS),
                      [(label, *(f"{count:,}" for count in row)) for label, row in zip(LABELS, result["confusion"])])


def curves_html(rows: list[dict]) -> str:
    return table_html("Evaluations", ("epoch", "step", "training loss", "log loss", "accuracy", "F1", "learning rate"),
                      [(f"{row['epoch']:g}{' (best so far)' if row['best'] else ''}", f"{row['step']:,}",
                        *(f"{row[name]:.4f}" for name in ("train_loss", "log_loss", "accuracy", "f1")),
                        f"{row['lr']:.2e}") for row in rows])


def mistakes_html(pairs: Sequence[Pair], labels: np.ndarray, probabilities: np.ndarray) -> str:
    """The rows that the model was most sure of and wrong about, with their texts."""
    confidence, said = probabilities.max(1), probabilities.argmax(1)
    wrong = np.flatnonzero(said != labels)
    parts = []
    for row in wrong[np.argsort(-confidence[wrong], kind="stable")][:MISTAKES]:
        pair = pairs[row]
        texts = "".join(f"<dt>{name}</dt><dd>{html.escape(shortened(turns))}</dd>" for name, turns in
                        (("prompt", pair.prompt), ("A", pair.response_a), ("B", pair.response_b)))
        parts.append(f"<details><summary>{html.escape(pair.id)}: people said {LABELS[labels[row]]}, the model "
                     f"{LABELS[said[row]]} with {confidence[row]:.0%}</summary><dl>{texts}</dl></details>")
    return f"<h2>The {len(parts)} most confident mistakes</h2>{''.join(parts)}"


def shortened(turns: Sequence[str | None]) -> str:
    """Turns as one text; of a long one head and tail, and how much lies between."""
    text = "\n\n".join("(no answer)" if turn is None else turn for turn in turns)
    if len(text) <= MOST_SHOWN:
        return text
    half = MOST_SHOWN // 2
    return f"{text[:half]}\n[... {len(text) - 2 * half:,} characters ...]\n{text[-half:]}"


PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>A run of minipref</title>
<style>
:root { color-scheme: light dark; --ink: #1f2328; --paper: #fff; --line: #d0d7de; --quiet: #59636e; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6edf3; --paper: #0d1117; --line: #3d444d; --quiet: #9198a1; } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 72rem;
       margin: 2rem auto; padding: 0 1rem; }
.figures { display: flex; flex-wrap: wrap; gap: 1rem; }
figure { margin: 0; }
svg { width: 22rem; max-width: 100%; height: auto; }
table { border-collapse: collapse; margin: 1rem 0; display: block; overflow-x: auto; }
caption { text-align: left; } caption, figcaption, .quiet, dt { color: var(--quiet); }
th, td { border: 1px solid var(--line); padding: .15rem .6rem; text-align: right; font-variant-numeric: tabular-nums; }
th[scope=row] { text-align: left; font-weight: normal; }
dd { margin: 0 0 .6rem 1rem; white-space: pre-wrap; overflow-wrap: anywhere; }
</style>
</head>
<body>
<main>
<h1>A run of minipref</h1>
@BODY@
</main>
</body>
</html>
"""
