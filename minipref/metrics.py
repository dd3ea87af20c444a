"""Scores, baselines, calibration by temperature, and the conclusions drawn from them. All arithmetic is float64.

What is unusual here: train.py compares its scores with trivial baselines (uniform, class prior) and a stronger one, a
logistic regression on lengths alone (annotators prefer longer responses).
"""

import math

import numpy as np
import torch

from minipref.config import LABELS
from minipref.surface import fit_surface, length_features, logistic_regression

CLASSES = len(LABELS)
BINS = 15              # of the calibration error, equally wide over confidences 0..1


def evaluate(probabilities: np.ndarray, labels: np.ndarray) -> dict:
    """Score predictions against labels.

    Shapes: probabilities (N, 3) summing to 1, labels (N,) int in 0..2 -> a dict of plain numbers and lists:
    `log_loss` (nats; the competition's score), `accuracy`, macro `precision`, `recall` and `f1` (0 for a class that is
    never predicted), `ece` (expected calibration error of the top class), `confusion` (3, 3; rows are labels, columns
    predictions), `per_class` (precision, recall, f1 and support by label), `calibration` (per bin: confidence,
    accuracy, rows), `clipped` (how many probabilities of true classes were raised to 2.2e-16 to keep the log finite).
    Errors: ValueError for wrong shapes, labels or sums.
    """
    p, y = _checked(probabilities, labels)
    rows = np.arange(len(y))
    smallest = np.finfo(np.float64).eps
    chosen = p[rows, y]
    predicted = p.argmax(1)
    confusion = np.zeros((CLASSES, CLASSES), dtype=np.int64)
    np.add.at(confusion, (y, predicted), 1)

    hits, truths, guesses = confusion.diagonal(), confusion.sum(1), confusion.sum(0)
    precision = hits / np.maximum(guesses, 1)
    recall = hits / np.maximum(truths, 1)
    f1 = 2 * hits / np.maximum(truths + guesses, 1)
    present = (truths + guesses) > 0                       # as in scikit-learn: classes that never occur do not count
    calibration, ece = _calibration(p.max(1), predicted == y)
    return {
        "rows": len(y),
        "log_loss": float(-np.log(chosen.clip(min=smallest)).mean()),
        "accuracy": float((predicted == y).mean()),
        "precision": float(precision[present].mean()),
        "recall": float(recall[present].mean()),
        "f1": float(f1[present].mean()),
        "ece": ece,
        "confusion": confusion.tolist(),
        "per_class": {label: {"precision": float(precision[c]), "recall": float(recall[c]), "f1": float(f1[c]),
                              "support": int(truths[c])} for c, label in enumerate(LABELS)},
        "calibration": calibration,
        "clipped": int((chosen < smallest).sum()),
    }


def _checked(probabilities: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    p, y = np.asarray(probabilities, dtype=np.float64), np.asarray(labels)
    if p.ndim != 2 or p.shape[1] != CLASSES or y.shape != (len(p),) or not len(p):
        raise ValueError(f"probabilities {p.shape} and labels {y.shape}: expected (N, {CLASSES}) and (N,), N > 0")
    if not np.isin(y, range(CLASSES)).all():
        raise ValueError(f"labels must be 0, 1 or 2, found {sorted(set(y.tolist()) - set(range(CLASSES)))[:3]}")
    if not (np.isfinite(p).all() and (p >= 0).all() and np.allclose(p.sum(1), 1, atol=1e-5, rtol=0)):
        raise ValueError("each row of probabilities must be non-negative and sum to 1")
    return p, y.astype(np.int64)


def _calibration(confidence: np.ndarray, right: np.ndarray) -> tuple[list[dict], float]:
    """Mean confidence and accuracy in each bin of the top class's confidence, and the ECE."""
    bins = np.minimum((confidence * BINS).astype(int), BINS - 1)
    table, ece = [], 0.0
    for b in range(BINS):
        inside = bins == b
        if inside.any():
            mean, accuracy = float(confidence[inside].mean()), float(right[inside].mean())
            table.append({"confidence": mean, "accuracy": accuracy, "rows": int(inside.sum())})
            ece += inside.mean() * abs(mean - accuracy)
    return table, float(ece)


# --- baselines --------------------------------------------------------------------------------------------------------

def class_prior(labels: np.ndarray) -> np.ndarray:
    """The share of each class, with Laplace smoothing. Shapes: (N,) -> (3,)."""
    counts = np.bincount(labels, minlength=CLASSES) + 1
    return counts / counts.sum()


def baselines(train_lengths: np.ndarray, train_labels: np.ndarray, valid_lengths: np.ndarray, valid_labels: np.ndarray
              ) -> dict[str, dict]:
    """The baselines, fitted on the training rows and scored on the validation rows.

    Shapes: lengths (N, 3) in characters of prompt, A and B; labels (N,) -> {name: `evaluate`'s dict}.
    """
    rows = len(valid_labels)
    by_length = logistic_regression(length_features(train_lengths), train_labels)
    return {
        "uniform": evaluate(np.full((rows, CLASSES), 1 / CLASSES), valid_labels),
        "class prior": evaluate(np.tile(class_prior(train_labels), (rows, 1)), valid_labels),
        "length only": evaluate(softmax(by_length.logits(length_features(valid_lengths))), valid_labels),
    }


def is_constant(probabilities: np.ndarray) -> bool:
    """Whether predictions are almost equal for all rows: the common failure of learning only the class prior. False for
    a single row."""
    return len(probabilities) > 1 and bool(np.std(probabilities, axis=0).max() < 0.01)


# --- temperature and blend --------------------------------------------------------------------------------------------

def softmax(logits: np.ndarray) -> np.ndarray:
    """Softmax over the last axis, in float64."""
    logits = np.asarray(logits, dtype=np.float64)
    e = np.exp(logits - logits.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def swap_averaged(logits: np.ndarray, temperature: float, surface: np.ndarray | None = None) -> np.ndarray:
    """Probabilities from the logits of one or both orders: the mean over the orders of softmax(logits / temperature).

    `surface`, the weighted logits of the surface features, is added to the scaled logits of each order.
    Shapes: logits (N, orders, 3), column 0 for the row's own A in every order; surface (N, 3) -> (N, 3).
    """
    logits = np.asarray(logits, dtype=np.float64) / temperature
    return softmax(logits if surface is None else logits + surface[:, None]).mean(1)


def fit_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """The temperature from 1/20 to 20 that minimises the log loss of `swap_averaged` on these rows.

    The penalty (log T)^2 / 2 on the sum of the losses keeps T away from 0 if few rows are all predicted correctly; with
    hundreds of rows it has no effect. Found by golden-section search over log T.
    Shapes: (N, orders, 3), (N,) -> float.
    Paper: Guo et al., On Calibration of Modern Neural Networks (arXiv 1706.04599).
    """
    def loss(log_t: float) -> float:
        chosen = swap_averaged(logits, np.exp(log_t))[np.arange(len(labels)), labels]
        return -np.log(chosen.clip(min=np.finfo(np.float64).tiny)).sum() + log_t**2 / 2

    low, high = -np.log(20), np.log(20)
    ratio = (np.sqrt(5) - 1) / 2
    inner = [high - ratio * (high - low), low + ratio * (high - low)]
    losses = [loss(t) for t in inner]
    while high - low > 1e-5:
        if losses[0] < losses[1]:
            high, inner[1], losses[1] = inner[1], inner[0], losses[0]
            inner[0] = high - ratio * (high - low)
            losses[0] = loss(inner[0])
        else:
            low, inner[0], losses[0] = inner[0], inner[1], losses[1]
            inner[1] = low + ratio * (high - low)
            losses[1] = loss(inner[1])
    return float(np.exp((low + high) / 2))


def fit_blend(logits: np.ndarray, surface: np.ndarray | None, labels: np.ndarray) -> tuple[float, float]:
    """The temperature T and weight w >= 0 that minimise the log loss of softmax(logits / T + w * surface), averaged
    over the orders, on these rows. Without `surface`, `fit_temperature` and w = 0.

    The penalties (log T)^2 / 2 and 2 w^2 on the sum of the losses keep w near 0 if the surface features do not help.
    With hundreds of rows they have little effect.
    Shapes: (N, orders, 3), (N, 3), (N,) -> (T, w).
    """
    if surface is None:
        return fit_temperature(logits, labels), 0.0
    x, extra, y = (torch.from_numpy(np.asarray(array)) for array in (logits, surface, labels))
    raw, weight = (torch.zeros((), dtype=torch.float64, requires_grad=True) for _ in range(2))
    optimizer = torch.optim.LBFGS([raw, weight], max_iter=100, tolerance_grad=1e-9, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        log_t = math.log(20) * torch.tanh(raw)                       # `fit_temperature`'s range
        log_p = torch.log_softmax(x * torch.exp(-log_t) + weight * extra[:, None], -1).logsumexp(1)
        total = torch.nn.functional.nll_loss(log_p, y, reduction="sum") + log_t.square() / 2 + 2 * weight.square()
        total.backward()
        return total

    optimizer.step(loss)
    if weight <= 0:
        return fit_blend(logits, None, labels)
    return 20 ** math.tanh(raw.item()), weight.item()


def cross_fit(logits: np.ndarray, surface: np.ndarray | None, labels: np.ndarray, seed: int, folds: int = 5
              ) -> np.ndarray:
    """Calibrated (or, with `surface`, blended) probabilities: each fold uses parameters fitted on the other folds.

    A fit is optimistic on its own rows, so scores are computed on these probabilities.
    Shapes: (N, orders, 3), (N, 3), (N,) -> (N, 3).
    """
    fold = np.random.default_rng([seed, 4]).permutation(len(labels)) % min(folds, len(labels))
    probabilities = np.empty((len(labels), CLASSES))
    for f in np.unique(fold):
        held, rest = fold == f, fold != f
        temperature, weight = fit_blend(logits[rest], None if surface is None else surface[rest], labels[rest]) \
            if rest.any() else (1.0, 0.0)
        probabilities[held] = swap_averaged(logits[held], temperature, weight * surface[held] if weight else None)
    return probabilities


# --- conclusions ------------------------------------------------------------------------------------------------------

def score_logits(logits: np.ndarray, labels: np.ndarray, lengths: np.ndarray, train_labels: np.ndarray,
                 train_lengths: np.ndarray, seed: int, bayes_optimal: np.ndarray | None = None,
                 surface: np.ndarray | None = None, blend: bool = False) -> dict:
    """A model's validation scores and the baselines on the same rows.

    Shapes: logits (N, 2, 3) in both orders; labels (N,); lengths (N, 3) in characters of prompt, A and B; labels and
    lengths of the M training rows; bayes_optimal (N, 3), the probabilities from which the labels were drawn, if known;
    surface (N, 3), the logits of the surface features. Returns `results`, {name: `evaluate`'s dict}; `final`, the name
    of the main score; `swap_flips`, the share of rows whose predicted class depends on the order; and `conclusions`,
    a list of sentences. The calibrated and the blended scores are cross-fitted.
    """
    results = baselines(train_lengths, train_labels, lengths, labels)
    if surface is not None:
        results["surface features"] = evaluate(softmax(surface), labels)
    results["model, one order"] = evaluate(swap_averaged(logits[:, :1], 1.0), labels)
    results["model, both orders"] = evaluate(swap_averaged(logits, 1.0), labels)
    final, probabilities = "model, calibrated", cross_fit(logits, None, labels, seed)
    results[final] = evaluate(probabilities, labels)
    if blend:
        final, probabilities = "blend", cross_fit(logits, surface, labels, seed)
        results[final] = evaluate(probabilities, labels)
    if bayes_optimal is not None:
        results["Bayes-optimal"] = evaluate(bayes_optimal, labels)
    return {"results": results, "final": final, "swap_flips": swap_flips(logits),
            "conclusions": conclusions(probabilities, swap_averaged(logits, 1.0), labels, results)}


def swap_flips(logits: np.ndarray) -> float:
    """The share of rows whose predicted class depends on the order. Shapes: (N, orders, 3)."""
    predicted = logits.argmax(2)
    return float((predicted != predicted[:, :1]).any(1).mean())


def conclusions(probabilities: np.ndarray, raw: np.ndarray, labels: np.ndarray, results: dict[str, dict]) -> list[str]:
    """Sentences that compare the score with the baselines in `results`: "class prior", and the better of "length only"
    and "surface features".

    `raw` are the probabilities before calibration: a high temperature can make useless predictions look constant.
    """
    score = evaluate(probabilities, labels)["log_loss"]
    prior = results["class prior"]["log_loss"]
    counted, name = min((results[name]["log_loss"], name) for name in ("length only", "surface features")
                        if name in results)
    losses = -np.log(probabilities[np.arange(len(labels)), labels].clip(min=np.finfo(float).eps))
    error = losses.std() / math.sqrt(len(losses))
    sentences = []
    if is_constant(raw):
        sentences.append("CONSTANT PREDICTIONS: the model predicts nearly the same for every row; it has learnt only "
                         "the class prior. Another --lr, more --epochs or another --seed may help "
                         "(docs/troubleshooting.md).")
    sentences.append(f"{'Better' if score < counted else 'NOT better'} than the {name.replace(' ', '-')} baseline: "
                     f"{score:.4f} against {counted:.4f} (standard error of the score: {error:.4f}).")
    if score >= prior:
        sentences.append(f"NOT better than the class-prior baseline: {score:.4f} against {prior:.4f}.")
    if "Bayes-optimal" in results:
        closed = (prior - score) / (prior - results["Bayes-optimal"]["log_loss"])
        sentences.append(f"Gap closed between the class prior and the Bayes-optimal score: {closed:.0%}.")
    return sentences


def results_text(scored: dict) -> str:
    """The result of `score_logits` as text: score table, confusion matrix of the main score, conclusions."""
    results, final = scored["results"], scored["final"]
    return "\n\n".join([score_table(results), confusion_table(results[final]), "\n".join(scored["conclusions"])])


def score_folds(logits: list[np.ndarray], splits: list[tuple[np.ndarray, np.ndarray]], labels: np.ndarray,
                lengths: np.ndarray, seed: int, features: np.ndarray, blend: bool) -> dict:
    """Out-of-fold scores: every row is predicted by the model that was not trained on it. Baselines likewise.

    Shapes: per fold logits (rows, 2, 3) and (training rows, validation rows); labels (N,), lengths (N, 3) and surface
    features (N, K) of all rows. Returns the dict of `score_logits` and the rows' `probabilities` (N, 3).
    """
    held = np.concatenate([valid for _, valid in splits])
    truth = labels[held]
    prior = [np.tile(class_prior(labels[train]), (len(valid), 1)) for train, valid in splits]
    by_length = length_features(lengths)
    by_length, surface = (
        np.concatenate([fit(x[train], labels[train]).logits(x[valid]) for train, valid in splits])
        for x, fit in ((by_length, logistic_regression), (features, fit_surface)))
    logits = np.concatenate(logits)
    probabilities = cross_fit(logits, surface if blend else None, truth, seed)
    results = {"class prior": evaluate(np.concatenate(prior), truth),
               "length only": evaluate(softmax(by_length), truth),
               "surface features": evaluate(softmax(surface), truth),
               "out of fold": evaluate(probabilities, truth)}
    return {"results": results, "final": "out of fold", "swap_flips": swap_flips(logits),
            "probabilities": probabilities[np.argsort(held)],
            "conclusions": conclusions(probabilities, swap_averaged(logits, 1.0), truth, results)}


# --- tables -----------------------------------------------------------------------------------------------------------

def score_table(results: dict[str, dict]) -> str:
    """A text table with one line for each result of `evaluate`."""
    width = max(len(name) for name in results) + 2
    lines = [" " * width + "log loss  accuracy  precision  recall      F1     ECE"]
    for name, r in results.items():
        lines.append(f"{name:<{width}}{r['log_loss']:8.4f}{r['accuracy']:10.3f}{r['precision']:11.3f}"
                     f"{r['recall']:8.3f}{r['f1']:8.3f}{r['ece']:8.3f}")
    return "\n".join(lines)


def confusion_table(result: dict) -> str:
    """The confusion matrix as text: rows are labels, columns predictions."""
    lines = ["label \\ prediction" + "".join(f"{label:>8}" for label in LABELS)]
    lines += [f"{label:<18}" + "".join(f"{count:8,}" for count in row)
              for label, row in zip(LABELS, result["confusion"])]
    return "\n".join(lines)
