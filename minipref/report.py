"""What a run says of itself at its end: the figures beside what they must beat, as a table, sentences, a model card.

Unusual here: the sentences are derived from the figures, never chosen by hand; a model that has collapsed to the class
prior, or that a count of characters beats, is reported as just that.
"""

import math

import numpy as np

from minipref import metrics
from minipref.config import LABELS


def score_logits(logits: np.ndarray, labels: np.ndarray, lengths: np.ndarray, train_labels: np.ndarray,
                 train_lengths: np.ndarray, seed: int, reachable: np.ndarray | None = None) -> dict:
    """A model's validation figures beside the baselines on the same rows.

    Shapes: logits (N, 2, 3) in both orders; labels (N,); lengths (N, 3) in characters of prompt, A and B; the same of
    the M training rows; reachable (N, 3), the probabilities that the labels were drawn from, where they are known.
    Returns `results`, {name: `metrics.evaluate`'s dict}, and `verdict`, sentences. The calibrated figures' temperature
    was fitted on other rows than those it is applied to.
    """
    results = metrics.baselines(train_lengths, train_labels, lengths, labels)
    results["model, one order"] = metrics.evaluate(metrics.averaged(logits[:, :1], 1.0), labels)
    results["model, both orders"] = metrics.evaluate(metrics.averaged(logits, 1.0), labels)
    calibrated = metrics.cross_fitted(logits, labels, seed)
    results["model, calibrated"] = metrics.evaluate(calibrated, labels)
    if reachable is not None:
        results["best reachable"] = metrics.evaluate(reachable, labels)
    return {"results": results, "verdict": verdict(calibrated, metrics.averaged(logits, 1.0), labels, results)}


def verdict(probabilities: np.ndarray, raw: np.ndarray, labels: np.ndarray, results: dict[str, dict]) -> list[str]:
    """What the figures mean, in plain sentences. `results` needs "class prior" and "length only".

    `raw` are the probabilities before the temperature, which may have flattened opinions that were worthless.
    """
    score = metrics.evaluate(probabilities, labels)["log_loss"]
    prior, by_length = results["class prior"]["log_loss"], results["length only"]["log_loss"]
    losses = -np.log(probabilities[np.arange(len(labels)), labels].clip(min=np.finfo(float).eps))
    error = losses.std() / math.sqrt(len(losses))
    said = []
    if metrics.collapsed(raw):
        said.append("COLLAPSED: the model says nearly the same of every row: it has learnt the class prior, no more. "
                    "Another --lr, more --epochs or another --seed may help.")
    said.append(f"{'Better' if score < by_length else 'NOT better'} than counting characters: {score:.4f} against "
                f"{by_length:.4f} (standard error of the score: {error:.4f}).")
    if score >= prior:
        said.append(f"NOT better than the class prior: {score:.4f} against {prior:.4f}.")
    if "best reachable" in results:
        closed = (prior - score) / (prior - results["best reachable"]["log_loss"])
        said.append(f"It closes {closed:.0%} of the gap between the class prior and the best reachable score.")
    return said


def as_text(scored: dict, name: str = "model, calibrated") -> str:
    """`score_logits`'s figures as the terminal shows them: the table, the confusion matrix of `name`, the verdict."""
    results = scored["results"]
    return "\n\n".join([metrics.score_table(results), metrics.confusion_table(results[name]),
                        "\n".join(scored["verdict"])])


def score_folds(logits: list[np.ndarray], splits: list[tuple[np.ndarray, np.ndarray]], labels: np.ndarray,
                lengths: np.ndarray, seed: int) -> dict:
    """The out-of-fold figures: every row judged by the model that did not see it, beside baselines fitted likewise.

    Shapes: per fold logits (rows, 2, 3) and (training rows, validation rows); labels (N,), lengths (N, 3) of all rows.
    """
    held = np.concatenate([valid for _, valid in splits])
    truth = labels[held]
    prior = [np.tile(metrics.class_prior(labels[train]), (len(valid), 1)) for train, valid in splits]
    features = metrics.length_features(lengths)
    by_length = [metrics.logistic_regression(features[train], labels[train])(features[valid])
                 for train, valid in splits]
    logits = np.concatenate(logits)
    probabilities = metrics.cross_fitted(logits, truth, seed)
    results = {"class prior": metrics.evaluate(np.concatenate(prior), truth),
               "length only": metrics.evaluate(np.concatenate(by_length), truth),
               "out of fold": metrics.evaluate(probabilities, truth)}
    return {"results": results, "verdict": verdict(probabilities, metrics.averaged(logits, 1.0), truth, results)}


def model_card(report: dict, encoder: str, files: list[str], recipe: str, figures: dict, seed: int) -> str:
    """README.md of a model's folder: what it is, what it was trained on and how, what it scored, what it is not for."""
    if "results" in report:
        final, prior, by_length = (report["results"][name] for name in (
            "model, calibrated", "class prior", "length only"))
        scored = (f"On {report['valid_rows']:,} validation rows: log loss {final['log_loss']:.4f}, accuracy "
                  f"{final['accuracy']:.3f}, macro F1 {final['f1']:.3f}, calibration error {final['ece']:.3f}. "
                  f"On the same rows the class prior has {prior['log_loss']:.4f}, a regression on lengths alone "
                  f"{by_length['log_loss']:.4f}.\n\n" + " ".join(report["verdict"]))
    else:
        scored = "It was trained on every row it had, so there is no score."
    table = "\n".join(f"| {name} | {value} |" for name, value in figures.items())
    return f"""# A preference model made with minipref

A DeBERTa-v3 encoder with a three-way head: from a prompt and two answers, the probabilities that a person prefers A,
prefers B or calls it a tie ({", ".join(f"{i} {label}" for i, label in enumerate(LABELS))}). It started from the encoder
`{encoder}` and was fine-tuned on {report['train_rows']:,} rows of {', '.join(files)}.

{scored}

Use: `minipref.load_judge(folder).compare(prompt, a, b)`, `python predict.py test.csv --model folder`, or
`transformers.AutoModelForSequenceClassification.from_pretrained(folder)` on ids laid out as
`[CLS] prompt [SEP] A [SEP] B [SEP]`. `minipref.json` holds the budgets and the temperature.

It repeats the preferences of the people who labelled its rows, their liking for longer answers included. It does not
check facts, and a probability of 0.6 is a weak opinion.

Recipe `{recipe}`, seed {seed}, {report['steps']:,} steps, the best after {report['best_step']:,}:

| figure | value |
|---|---|
{table}
"""
