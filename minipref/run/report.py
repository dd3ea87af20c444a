"""A run's report page (curves, confusion, calibration, length bias, confident mistakes) and its model card.

`final_report` scores the best model and writes both. The page is one HTML file that loads nothing else.

What is unusual here: matplotlib is an extra (`pip install .[plots]`). Without it the page has tables but no figures.
"""

import dataclasses
import io
import math
import shlex
import textwrap
from collections.abc import Callable, Sequence
from datetime import datetime
from functools import cache
from pathlib import Path

import numpy as np
import torch

from minipref import metrics
from minipref.checkpoint import load_classifier
from minipref.config import LABELS
from minipref.data import Pair, character_counts
from minipref.fast import accelerate
from minipref.model import PreferenceModel
from minipref.predictor import Judge, predict_logits
from minipref.run import distributed, folder
from minipref.run.setup import Setup
from minipref.run.state import drop_previous, weights_sha256
from minipref.runtime import InputError, RunError, html_text, read_json, write_json, write_text
from minipref.surface import fit_surface

TEMPLATE = Path(__file__).with_name("report.html")
INK = "#010203"            # in matplotlib; replaced by the page's text colour
COLOURS = ("#c8641e", "#2a78c8", "#5f8f3a")
MISTAKES = 10
MOST_SHOWN = 1500          # characters of a text


def final_report(run: Path, classifier: PreferenceModel, state, ended: str, train_rows: np.ndarray,
                 valid_rows: np.ndarray, setup: Setup) -> np.ndarray:
    """Score the best model and the baselines, fit the blend, write model/, report.json and report.html.

    Without validation rows (--all-rows) the last parameters are written without scores. `state` is train.py's
    `TrainState`. Returns the validation rows' logits in both orders, (rows, 2, 3).
    """
    options, config, pairs = setup.options, setup.config, setup.pairs
    summary = facts_of(run, options) | {
        "ended": ended, "steps": state.step, "best_step": state.best_step, "minutes": round(state.seconds / 60, 2),
        "skipped_steps": state.skipped, "train_rows": len(train_rows), "valid_rows": len(valid_rows)}
    logits, probabilities, temperature, surface = np.empty((0, 2, 3)), np.empty((0, 3)), 1.0, None
    if len(valid_rows):
        classifier = load_classifier(run / "model", device=setup.device)
        if weights_sha256(classifier) != state.best_weights:
            raise InputError(file=run / "model" / "model.safetensors",
                             found="other weights than the best evaluation's",
                             expected=f"the unchanged weights of step {state.best_step:,}")
        if not options.no_fast:
            accelerate(classifier)
        logits = predict_logits(classifier, setup.tokenized.take(valid_rows), setup.tokenizer,
                                config.eval_batch_size * config.max_length, config.eval_batch_size, setup.precision,
                                progress=setup.stop.check, together=True)
    elif not all(torch.isfinite(parameter).all() for parameter in classifier.parameters()):
        raise RunError(f"step {state.step}: weights that are not finite. A smaller --lr usually helps.")
    if not distributed.is_main_process():
        return logits
    if len(valid_rows):
        lengths, labels = character_counts(pairs), setup.tokenized.labels
        bayes_optimal = [setup.truth.get(pairs[row].id) for row in valid_rows]
        surface, blend = fit_surface(setup.features[train_rows], labels[train_rows]), not options.no_blend
        surface_logits = surface.logits(setup.features[valid_rows])
        scored = metrics.score_logits(logits, labels[valid_rows], lengths[valid_rows], labels[train_rows],
                                      lengths[train_rows], options.seed,
                                      None if any(p is None for p in bayes_optimal) else np.array(bayes_optimal),
                                      surface_logits, blend)
        temperature, weight = metrics.fit_blend(logits, surface_logits if blend else None, labels[valid_rows])
        surface = surface.times(weight) if weight else None
        probabilities = metrics.swap_averaged(logits, temperature, weight * surface_logits)
        summary |= scored | {"temperature": temperature, "surface_weight": weight}
        print(f"\n{len(valid_rows):,} validation rows (lower log loss is better; calibrated and blend: cross-fitted)")
        print(metrics.results_text(scored))
    folder.write_latest(run)
    if folder.is_finished(run):
        print(f"this run was finished before: its files stay as they are (without {run / 'report.json'} they would be "
              "written again)")
        return logits
    if len(valid_rows):
        folder.write_csv(run / "valid_predictions.csv",
                         [prediction(pairs[row], p) for row, p in zip(valid_rows, probabilities)])
    Judge(classifier, setup.tokenizer, config.max_length, temperature, surface=surface).save(
        run / "model", replace=True)
    write_text(run / "model" / "README.md", model_card(
        summary, Path(options.encoder).name, [Path(file).name for file in options.train], options.recipe,
        dataclasses.asdict(config), options.seed))
    write_page(run, summary, state.history, [pairs[row] for row in valid_rows], probabilities)
    drop_previous(run / "state")
    write_json(run / "report.json", summary)               # the last file, the mark of a finished run
    return logits


def check_resumed(run: Path, state, ended: bool, device: torch.device) -> None:
    """Check report.json and model/ of a run to resume against its state: now, and not after hours of training.

    Other weights in model/ are only noted: after a return to the previous state they are those of a later evaluation,
    which the run will repeat. The weights of an evaluation at the state's own step are in the state itself.
    """
    folder.check_report(run, ended)
    if 0 < state.best_step < state.step and (
            weights_sha256(load_classifier(run / "model", device=device)) != state.best_weights):
        print(f"note: {run / 'model'} has other weights than the best evaluation so far, of step {state.best_step:,}: "
              "unless a later one is better, the run will end with an error")


def folds_report(run: Path, logits: list[np.ndarray], splits: list[tuple[np.ndarray, np.ndarray]], setup: Setup
                 ) -> None:
    """Score every row with the model that was not trained on it; write oof.csv, report.json and report.html."""
    if not distributed.is_main_process():
        return
    options, pairs, labels = setup.options, setup.pairs, setup.tokenized.labels
    scored = metrics.score_folds(logits, splits, labels, character_counts(pairs), options.seed, setup.features,
                                 not options.no_blend)
    probabilities, fold_of = scored.pop("probabilities"), np.zeros(len(pairs), dtype=int)
    for fold, (_, valid_rows) in enumerate(splits, 1):
        fold_of[valid_rows] = fold
    print(f"\nout of fold, {len(splits)} models, {len(pairs):,} rows\n{metrics.results_text(scored)}")
    if folder.is_finished(run):
        return
    folder.write_csv(run / "oof.csv", [prediction(pair, p) | {"fold": fold}
                                       for pair, p, fold in zip(pairs, probabilities, fold_of.tolist())])
    reports = [read_json(run / f"fold-{fold}" / "report.json", "a fold's report") for fold in range(1, len(splits) + 1)]
    summary = facts_of(run, options) | scored | {
        "folds": len(splits), "ended": f"{len(splits)} folds", "train_rows": len(pairs), "valid_rows": len(pairs),
        **{name: sum(report[name] for report in reports) for name in ("steps", "minutes")}}
    write_page(run, summary, [], pairs, probabilities)
    write_json(run / "report.json", summary)


def facts_of(run: Path, options) -> dict:
    """The facts that identify a run in its report."""
    return {"run": str(run), "date": datetime.now().strftime("%Y-%m-%d %H:%M"), "encoder": options.encoder,
            "rows": options.train, "recipe": options.recipe, "seed": options.seed, "command": command(options)}


def prediction(pair: Pair, probabilities: np.ndarray) -> dict:
    """A row of valid_predictions.csv or oof.csv."""
    return {"id": pair.id, "label": LABELS[pair.label],
            **{f"p_{name.lower()}": f"{value:.6f}" for name, value in zip(LABELS, probabilities)}}


def command(options) -> str:
    """The run's command with every option written out."""
    words = ["python", "train.py"]
    for name, value in sorted(vars(options).items()):
        if value is not None and value is not False and name != "resume":              # 0 stays
            words += [f"--{name.replace('_', '-')}", *([] if value is True else map(str, np.atleast_1d(value)))]
    return shlex.join(words)


def write_page(folder: Path, report: dict, rows: list[dict], pairs: Sequence[Pair], probabilities: np.ndarray) -> None:
    """Write `folder`/report.html.

    `report` is the content of report.json, `rows` that of metrics.csv. Shapes: N validation pairs, probabilities
    (N, 3). N = 0 for a run on all rows, whose page has no scores.
    """
    figures, tables = [], []
    if len(pairs):
        result = report["results"][report["final"]]
        labels = np.array([pair.label for pair in pairs])
        lengths = character_counts(pairs)
        lines = {name: report["results"][name]["log_loss"] for name in ("class prior", "surface features",
                                                                        "Bayes-optimal") if name in report["results"]}
        figures = [
            *([("Loss", "training and validation loss by epoch", lambda axes: draw_curves(axes, rows, LOSSES, lines)),
               ("Scores", "accuracy and macro F1 by epoch", lambda axes: draw_curves(axes, rows, SCORES))]
              if rows else []),                                            # the page over all folds has no curve
            ("Confusion matrix", "the confusion matrix", lambda axes: draw_confusion(axes, result)),
            ("Reliability", "accuracy at each confidence", lambda axes: draw_reliability(axes, result)),
            ("Length bias", "how often A wins, by the ratio of A's length to B's",
             lambda axes: draw_length_bias(axes, probabilities, labels, lengths)),
            ("Loss by length", "log loss by the length of prompt and responses",
             lambda axes: draw_loss_by_length(axes, probabilities, labels, lengths)),
        ]
        tables = [scores_html(report["results"]), confusion_html(result), curves_html(rows) if rows else "",
                  mistakes_html(pairs, labels, probabilities)]
    sentences = report.get("conclusions", ["Trained on every row: there is no score."])
    constant = sentences[0].startswith("CONSTANT")
    head = f"<p{' class=warning role=alert' if constant else ''}>{html_text(' '.join(sentences))}</p>"
    facts = {"run": report["run"], "date": report["date"], "encoder": report["encoder"],
             "rows": ", ".join(report["rows"]), "recipe": f"{report['recipe']}, seed {report['seed']}",
             "trained": f"{report['train_rows']:,} rows, {report['steps']:,} steps in {report['minutes']:.1f} minutes; "
                        f"{report['ended']}", "validated": f"{report['valid_rows']:,} rows",
             "command": report["command"]}
    if "best_step" in report:
        facts["best"] = f"after {report['best_step']:,} steps"
    if "swap_flips" in report:
        facts["A and B exchanged"] = f"another class is predicted for {report['swap_flips']:.0%} of the rows"
    body = "\n".join([head, table_html("This run", ("", ""), list(facts.items())), figures_html(figures), *tables])
    write_text(folder / "report.html", TEMPLATE.read_text(encoding="utf-8").replace("@BODY@", body))


# --- the model card ---------------------------------------------------------------------------------------------------

def model_card(report: dict, encoder: str, files: list[str], recipe: str, hyperparameters: dict, seed: int) -> str:
    """README.md of a model's folder: description, training data and procedure, scores, limitations."""
    if "results" in report:
        final, prior, by_length = (report["results"][name] for name in (
            report["final"], "class prior", "length only"))
        scored = (f"On {report['valid_rows']:,} validation rows: log loss {final['log_loss']:.4f}, accuracy "
                  f"{final['accuracy']:.3f}, macro F1 {final['f1']:.3f}, calibration error (ECE) {final['ece']:.3f}. "
                  f"On the same rows the class-prior baseline has {prior['log_loss']:.4f}, the length-only baseline "
                  f"{by_length['log_loss']:.4f}.\n\n" + " ".join(report["conclusions"]))
    else:
        scored = "It was trained on every row, so there is no score."
    table = "\n".join(f"| {name} | {value} |" for name, value in hyperparameters.items())
    return f"""# A preference model made with minipref

A DeBERTa-v3 encoder with a three-way head: from a prompt and two responses, the probabilities that a person prefers A,
prefers B or calls it a tie ({", ".join(f"{i} {label}" for i, label in enumerate(LABELS))}). It started from the encoder
`{encoder}` and was fine-tuned on {report['train_rows']:,} rows of {', '.join(files)}.

{scored}

Use: `minipref.load_judge(folder).compare(prompt, a, b)`, `python predict.py test.csv --model folder`, or
`transformers.AutoModelForSequenceClassification.from_pretrained(folder)` on ids laid out as
`[CLS] prompt [SEP] A [SEP] B [SEP]`. `minipref.json` holds the maximum length, the temperature and the regression on
surface features. minipref uses them; transformers returns only the network's logits.

The model reproduces the preferences of its annotators, including their preference for longer responses. It does not
check facts, and a probability of 0.6 is a weak preference.

Recipe `{recipe}`, seed {seed}, {report['steps']:,} steps, the best after {report['best_step']:,}:

| hyperparameter | value |
|---|---|
{table}
"""


# --- figures ----------------------------------------------------------------------------------------------------------

def figures_html(figures: list[tuple[str, str, Callable]]) -> str:
    """Each figure as an SVG, or one sentence if matplotlib is missing."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        log_missing_matplotlib()
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
            "<svg ", f'<svg role="img" aria-label="{html_text(said)}" ', 1)
        parts.append(f"<figure><figcaption>{html_text(title)}</figcaption>{drawing}</figure>")
    return f'<div class="figures">{"".join(parts)}</div>'


@cache
def log_missing_matplotlib() -> None:
    """Cached, so that a run with folds prints it once."""
    print("report.html has no figures: matplotlib is not installed (pip install .[plots])")


LOSSES = {"train_loss": "training", "log_loss": "validation"}
SCORES = {"accuracy": "accuracy", "f1": "macro F1"}


def draw_curves(axes, rows: list[dict], which: dict[str, str], lines: dict[str, float] | None = None) -> None:
    """Columns of metrics.csv by epoch, the best evaluation marked, and other scores as horizontal lines."""
    epochs = [row["epoch"] for row in rows]
    for (column, name), colour in zip(which.items(), COLOURS):
        axes.plot(epochs, [row[column] for row in rows], "o-", ms=3, color=colour, label=name)
    best = [row["epoch"] for row in rows if row["best"]][-1:]
    for epoch in best:
        axes.axvline(epoch, color=INK, lw=0.7, ls=":")
    for (name, value), style in zip((lines or {}).items(), ("--", "-.", ":")):
        axes.axhline(value, color=INK, lw=0.7, ls=style, label=name)
    axes.set_xlabel("epoch (dotted: the model that was kept)")
    axes.legend()


def draw_confusion(axes, result: dict) -> None:
    """Labels (rows) against predictions (columns); shades are shares of the row."""
    counts = np.array(result["confusion"])
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    for truth in range(len(LABELS)):
        for prediction in range(len(LABELS)):
            axes.fill_between([prediction - 0.5, prediction + 0.5], truth - 0.5, truth + 0.5, color=COLOURS[1], lw=0,
                              alpha=float(shares[truth, prediction]))
            axes.text(prediction, truth, f"{counts[truth, prediction]:,}\n{shares[truth, prediction]:.0%}",
                      ha="center", va="center")
    axes.set_xticks(range(len(LABELS)), LABELS)
    axes.set_yticks(range(len(LABELS)), LABELS)
    axes.set_xlim(-0.5, len(LABELS) - 0.5)
    axes.set_ylim(len(LABELS) - 0.5, -0.5)
    axes.set_xlabel("prediction")
    axes.set_ylabel("label")


def draw_reliability(axes, result: dict) -> None:
    """Accuracy by confidence; a calibrated model is on the diagonal. Areas show the number of rows."""
    bins = result["calibration"]
    axes.plot([0, 1], [0, 1], color=INK, lw=0.7, ls=":")
    axes.plot([b["confidence"] for b in bins], [b["accuracy"] for b in bins], color=COLOURS[0], lw=1)
    axes.scatter([b["confidence"] for b in bins], [b["accuracy"] for b in bins], color=COLOURS[0], lw=0,
                 s=[4 + 200 * b["rows"] / result["rows"] for b in bins])
    axes.set_xlim(0.3, 1)
    axes.set_ylim(0, 1)
    axes.set_xlabel(f"confidence in the likeliest class (ECE {result['ece']:.3f})")
    axes.set_ylabel("accuracy")


def draw_length_bias(axes, probabilities: np.ndarray, labels: np.ndarray, lengths: np.ndarray) -> None:
    """Frequency with which annotators prefer A, and the model's mean P(A), by the length ratio of A and B."""
    longer = metrics.length_features(lengths)[:, 0]
    for values, name, colour in ((labels == 0, "annotators", COLOURS[0]), (probabilities[:, 0], "model", COLOURS[1])):
        middles, means, errors = tenths(longer, values)
        axes.errorbar(middles, means, errors, fmt="o-", ms=3, color=colour, label=name)
    axes.set_ylim(0, 1)
    axes.set_xlabel("log(characters of A / characters of B)")
    axes.set_ylabel("A preferred")
    axes.legend()


def draw_loss_by_length(axes, probabilities: np.ndarray, labels: np.ndarray, lengths: np.ndarray) -> None:
    """Mean log loss in ten groups of rows by length."""
    losses = -np.log(probabilities[np.arange(len(labels)), labels].clip(min=np.finfo(float).eps))
    middles, means, errors = tenths(lengths.sum(1).clip(min=1), losses)
    axes.errorbar(middles, means, errors, fmt="o-", ms=3, color=COLOURS[0])
    axes.set_xscale("log")
    axes.set_xlabel("characters of prompt, A and B")
    axes.set_ylabel("log loss")


def tenths(by: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows sorted by `by` in ten groups: each group's median of `by`, mean of `values` and its standard error.

    Shapes: (N,), (N,) -> (min(10, N),) each.
    """
    parts = [part for part in np.array_split(np.argsort(by, kind="stable"), 10) if len(part)]
    return (np.array([np.median(by[part]) for part in parts]), np.array([values[part].mean() for part in parts]),
            np.array([values[part].std() / math.sqrt(len(part)) for part in parts]))


# --- tables -----------------------------------------------------------------------------------------------------------

def table_html(caption: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """An HTML table whose first column is a header. Cells are escaped here."""
    head = "".join(f"<th scope=col>{html_text(cell)}</th>" for cell in header)
    body = "".join(f"<tr><th scope=row>{html_text(row[0])}</th>"
                   + "".join(f"<td>{html_text(cell)}</td>" for cell in row[1:]) + "</tr>" for row in rows)
    return f"<table><caption>{html_text(caption)}</caption><tr>{head}</tr>{body}</table>"


def scores_html(results: dict[str, dict]) -> str:
    names = ("log_loss", "accuracy", "precision", "recall", "f1", "ece")
    return table_html("On the validation rows", ("", *(name.replace("_", " ") for name in names)),
                      [(name, *(f"{result[column]:.4f}" for column in names)) for name, result in results.items()])


def confusion_html(result: dict) -> str:
    return table_html("Labels (rows) and predictions (columns)", ("", *LABELS),
                      [(label, *(f"{count:,}" for count in row)) for label, row in zip(LABELS, result["confusion"])])


def curves_html(rows: list[dict]) -> str:
    return table_html("Evaluations", ("epoch", "step", "training loss", "log loss", "accuracy", "F1", "learning rate"),
                      [(f"{row['epoch']:g}{' (best so far)' if row['best'] else ''}", f"{row['step']:,}",
                        *(f"{row[name]:.4f}" for name in ("train_loss", "log_loss", "accuracy", "f1")),
                        f"{row['lr']:.2e}") for row in rows])


def mistakes_html(pairs: Sequence[Pair], labels: np.ndarray, probabilities: np.ndarray) -> str:
    """The wrong predictions with the highest confidence, with their texts."""
    confidence, predictions = probabilities.max(1), probabilities.argmax(1)
    wrong = np.flatnonzero(predictions != labels)
    parts = []
    for row in wrong[np.argsort(-confidence[wrong], kind="stable")][:MISTAKES]:
        pair = pairs[row]
        texts = "".join(f"<dt>{name}</dt><dd>{html_text(shortened(turns))}</dd>" for name, turns in
                        (("prompt", pair.prompt), ("A", pair.response_a), ("B", pair.response_b)))
        prompt = textwrap.shorten(shortened(pair.prompt), 80, placeholder="...")
        parts.append(f"<details><summary>{html_text(pair.id)}: label {LABELS[labels[row]]}, prediction "
                     f"{LABELS[predictions[row]]} with {confidence[row]:.0%}: {html_text(prompt)}</summary>"
                     f"<dl>{texts}</dl></details>")
    return f"<h2>The {len(parts)} most confident mistakes</h2>{''.join(parts)}"


def shortened(turns: Sequence[str | None]) -> str:
    """Turns as one text. A long text is cut in the middle."""
    text = "\n\n".join("(no answer)" if turn is None else turn for turn in turns)
    if len(text) <= MOST_SHOWN:
        return text
    half = MOST_SHOWN // 2
    return f"{text[:half]}\n[... {len(text) - 2 * half:,} characters ...]\n{text[-half:]}"
