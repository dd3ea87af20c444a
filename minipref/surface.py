"""Surface features of a pair (lengths, list items, digits, ...) and a logistic regression on them.

Annotators prefer longer responses, and identical responses are ties. A small model fine-tuned on a thousand rows learns
less than these features show, and truncation hides the lengths from it. Its logits are therefore blended with the
regression's (`metrics.fit_blend`).

What is unusual here: the regression is fitted on both orders of every pair, so it treats A and B alike. Features other
than lengths and 'identical' have a strong penalty: little effect with a thousand rows, full effect with fifty thousand.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from minipref.config import LABELS
from minipref.data import Pair, Turns, swap_classes

COUNTS = ("characters", "line breaks", "list items", "code fences", "digits", "missing turns")
LIST_ITEM = re.compile(r"^\s*(?:[-*+•]|\d+[.)])\s", re.MULTILINE)
FEATURES = (*(f"log({name} of A / of B)" for name in COUNTS), *(f"|log({name} of A / of B)|" for name in COUNTS),
            "identical responses", "log mean characters", "log prompt characters", "log turns")
WEAK, STRONG = 1.0, 300.0       # penalties; chosen by cross-validation on real pairs (benchmarks/surface.py)
PENALTIES = np.array([WEAK if "characters" in name or "identical" in name else STRONG for name in FEATURES])


@dataclass(frozen=True)
class LogisticRegression:
    """Softmax regression on standardised features. Shapes: mean, spread (K,); weights (K + 1, 3), intercepts last."""

    mean: np.ndarray
    spread: np.ndarray
    weights: np.ndarray

    def logits(self, features: np.ndarray) -> np.ndarray:
        """Shapes: (N, K) -> (N, 3)."""
        return (features - self.mean) / self.spread @ self.weights[:-1] + self.weights[-1]

    def times(self, weight: float) -> "LogisticRegression":
        """The regression whose logits are `weight` times these."""
        return LogisticRegression(self.mean, self.spread, weight * self.weights)


def logistic_regression(features: np.ndarray, labels: np.ndarray, penalty: float | np.ndarray = 1.0
                        ) -> LogisticRegression:
    """Fit softmax regression with an L2 penalty on the weights of standardised features.

    The loss is convex and L-BFGS starts at zero, so there is no seed.
    Shapes: features (N, K), labels (N,), penalty () or (K,).
    """
    mean, spread = features.mean(0), features.std(0)
    spread[spread == 0] = 1
    x = torch.from_numpy((features - mean) / spread)
    y = torch.from_numpy(np.asarray(labels, dtype=np.int64))
    penalties = torch.as_tensor(penalty, dtype=torch.float64).reshape(-1, 1)
    weights = torch.zeros(x.shape[1] + 1, len(LABELS), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=200, tolerance_grad=1e-9, tolerance_change=1e-12,
                                  line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        total = torch.nn.functional.cross_entropy(x @ weights[:-1] + weights[-1], y, reduction="sum")
        total = (total + (penalties / 2 * weights[:-1].square()).sum()) / len(y)
        total.backward()
        return total

    optimizer.step(loss)
    return LogisticRegression(mean, spread, weights.detach().numpy())


# --- features ---------------------------------------------------------------------------------------------------------

def length_features(lengths: np.ndarray) -> np.ndarray:
    """Features of a pair that depend only on its lengths.

    Shapes: lengths (N, 3) in characters of prompt, A and B -> (N, 5): the log ratio of A to B, its absolute value, and
    the three log lengths.
    """
    logs = np.log1p(np.asarray(lengths, dtype=np.float64))
    longer = logs[:, 1] - logs[:, 2]
    return np.column_stack([longer, np.abs(longer), logs])


def surface_features(pairs: Sequence[Pair]) -> np.ndarray:
    """Each row's `FEATURES`, from its untruncated text. Shapes: N pairs -> (N, K)."""
    a, b = (np.log1p(np.array([counts(turns) for turns in texts], dtype=np.float64).reshape(-1, len(COUNTS)))
            for texts in ([pair.response_a for pair in pairs], [pair.response_b for pair in pairs]))
    identical = [pair.response_a == pair.response_b for pair in pairs]
    prompt = [np.log1p(sum(len(turn or "") for turn in pair.prompt)) for pair in pairs]
    turns = [np.log(max(len(pair.prompt), 1)) for pair in pairs]
    return np.column_stack([a - b, np.abs(a - b), identical, (a + b)[:, 0] / 2, prompt, turns])


def counts(turns: Turns) -> list[int]:
    """`COUNTS` of a response's turns."""
    text = "\n".join(turn or "" for turn in turns)
    return [len(text), text.count("\n"), len(LIST_ITEM.findall(text)), text.count("```") // 2,
            sum(map(text.count, "0123456789")), sum(not (turn or "").strip() for turn in turns)]


def fit_surface(features: np.ndarray, labels: np.ndarray) -> LogisticRegression:
    """The regression on `surface_features`, fitted on the rows in both orders. Shapes: (N, K), (N,)."""
    # Swapping A and B changes the sign of the log ratios and leaves the other features unchanged.
    signs = np.array([-1.0] * len(COUNTS) + [1.0] * (len(FEATURES) - len(COUNTS)))
    swapped = swap_classes(np.eye(len(LABELS)))[labels].argmax(1)
    return logistic_regression(np.concatenate([features, features * signs]), np.concatenate([labels, swapped]),
                               PENALTIES)
