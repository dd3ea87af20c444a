"""Held-out metrics of generator and discriminator, and their context-free baselines."""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from minipref.pretrain.objective import Pretraining
from minipref.run.state import restore_rng, rng_state
from minipref.runtime import autocast


@torch.no_grad()
def evaluate(model: Pretraining, batches: list[Tensor], counts: np.ndarray, precision: str = "fp32"
             ) -> dict[str, float]:
    """The metrics on held-out windows, rounded to five decimals; every call masks the same tokens.

    Restores the random generators. Shapes: batches (B, L) each; counts (V,), occurrences of each id in the training
    text.
    """
    losses, hits, targets, rtd_logits, is_replaced, seen_ids = [], [], [], [], [], []
    model.eval()
    generators = rng_state()                           # torch.random.fork_rng does not cover MPS
    torch.manual_seed(0)
    for input_ids in batches:
        with autocast(input_ids.device, precision):
            is_masked, corrupted_ids, mlm_logits = model.corrupt(input_ids)
        targets.append(input_ids[is_masked])
        losses.append(F.cross_entropy(mlm_logits, targets[-1], reduction="none"))
        hits.append(mlm_logits.argmax(dim=-1) == targets[-1])
        if model.objective == "rtd":
            is_word = ~model.is_special(input_ids)
            with autocast(input_ids.device, precision):
                rtd_logits.append(model.discriminate(corrupted_ids)[is_word])
            is_replaced.append((corrupted_ids != input_ids)[is_word])
            seen_ids.append(corrupted_ids[is_word])
    restore_rng(*generators)
    model.train()
    scores = {"mlm_loss": torch.cat(losses).mean().item(), "mlm_accuracy": torch.cat(hits).float().mean().item()}
    word_counts = counts.copy()
    word_counts[model.special_ids.cpu().numpy()] = 0                    # special tokens are never masked
    scores |= unigram_scores(torch.cat(targets).cpu().numpy(), word_counts)
    if model.objective == "rtd":
        logits, labels, seen = (torch.cat(parts).cpu().numpy() for parts in (rtd_logits, is_replaced, seen_ids))
        scores |= detection_scores(logits, labels, np.log1p(counts[seen]))
    return {name: round(float(value), 5) for name, value in scores.items()}


def unigram_scores(targets: np.ndarray, counts: np.ndarray) -> dict[str, float]:
    """Scores of predicting every masked token from word frequencies with add-one smoothing.

    Shapes: targets (n,) ids, counts (V,).
    """
    probs = (counts + 1) / (counts + 1).sum()
    return {"unigram_loss": -np.log(probs[targets]).mean(), "unigram_accuracy": (targets == probs.argmax()).mean()}


def detection_scores(rtd_logits: np.ndarray, is_replaced: np.ndarray, log_frequency: np.ndarray) -> dict[str, float]:
    """Scores of the discriminator over all tokens but special ones, and of its baselines.

    - rtd_precision, rtd_recall, rtd_f1: the prediction is 'replaced' if the probability is above one half.
    - 'Always original' has the accuracy 1 - replaced_share and an F1 of 0; constant_loss is the loss of the best
      constant probability.
    - unigram_best_f1: the prediction is 'replaced' for words more, or less, frequent than a threshold. Direction and
      threshold are the best on these tokens. rtd_best_f1 is the discriminator's F1 at its best threshold.

    Shapes: (n,) each; is_replaced bool.
    """
    share = is_replaced.mean()
    predicted = rtd_logits > 0
    found = (predicted & is_replaced).sum()
    return {
        "rtd_loss": (np.logaddexp(0, rtd_logits) - rtd_logits * is_replaced).mean(),
        "constant_loss": -sum(p * math.log(p) for p in (share, 1 - share) if p > 0),
        "rtd_accuracy": (predicted == is_replaced).mean(),
        "replaced_share": share,
        "rtd_precision": found / max(1, predicted.sum()),
        "rtd_recall": found / max(1, is_replaced.sum()),
        "rtd_f1": 2 * found / max(1, predicted.sum() + is_replaced.sum()),
        "rtd_best_f1": best_f1(rtd_logits, is_replaced),
        "unigram_best_f1": max(best_f1(log_frequency, is_replaced), best_f1(-log_frequency, is_replaced)),
        "rtd_average_precision": average_precision(rtd_logits, is_replaced),
    }


def best_f1(scores: np.ndarray, labels: np.ndarray) -> float:
    """The highest F1 over all thresholds of the score. Shapes: scores (n,), labels (n,) bool."""
    order = np.argsort(-scores, kind="stable")
    found = np.cumsum(labels[order])
    ends = np.append(np.flatnonzero(np.diff(scores[order])), len(order) - 1)        # equal scores share a threshold
    return float((2 * found[ends] / (ends + 1 + max(1, labels.sum()))).max())


def average_precision(scores: np.ndarray, labels: np.ndarray) -> float:
    """The mean over the positives of the precision at their ranks. Shapes: scores (n,), labels (n,) bool."""
    in_order = labels[np.argsort(-scores, kind="stable")]
    precision = np.cumsum(in_order) / np.arange(1, len(in_order) + 1)
    return float(precision[in_order].mean()) if in_order.any() else 0.0


def summary(row: dict[str, float]) -> str:
    """A row of metrics.csv as one line of text."""
    line = (f"step {row['step']:,}: MLM loss {row['mlm_loss']:.3f} (word frequency {row['unigram_loss']:.3f}), "
            f"accuracy {row['mlm_accuracy']:.1%} ({row['unigram_accuracy']:.1%})")
    if "rtd_f1" in row:
        line += (f"; RTD loss {row['rtd_loss']:.4f} (constant {row['constant_loss']:.4f}), precision "
                 f"{row['rtd_precision']:.3f}, recall {row['rtd_recall']:.3f}, F1 {row['rtd_f1']:.3f} (always original "
                 f"0, word frequency at its best {row['unigram_best_f1']:.3f})")
    return line
