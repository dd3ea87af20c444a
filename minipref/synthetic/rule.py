"""The distribution of the labels.

The utility u of an answer is `PER_WORD` times its words minus the weights of its flaws. With d = u_A - u_B, the label
follows Davidson's model of paired comparisons with ties (Davidson 1970, JASA 65:317):

    P(A) : P(B) : P(tie)  =  exp(d/2) : exp(-d/2) : TIE

The three logits are linear in d, and exchanging A and B exchanges P(A) and P(B).
"""

import math
from collections.abc import Collection

import numpy as np

WEIGHTS = {
    "off": 8.0,       # about another topic than the prompt
    "cut": 5.0,       # breaks off in the middle of a sentence
    "form": 4.0,      # a list where prose was asked for, or the reverse
    "amount": 4.0,    # one sentence where details were asked for, or the reverse
    "wrong": 5.0,     # states a wrong fact
}
FLAWS = tuple(WEIGHTS)
PER_WORD = 0.03       # a small preference for longer answers
TIE = 3.0             # with d = 0, P(tie) = 3/5


def utility(flaws: Collection[str], words: int) -> float:
    """The utility of an answer with these flaws and this many words, in units of d."""
    return PER_WORD * words - sum(WEIGHTS[flaw] for flaw in FLAWS if flaw in flaws)


def outcome_probabilities(d: float) -> tuple[float, float, float]:
    """(P(A), P(B), P(tie)) for d = u_A - u_B, rounded to six decimals to be equal on all machines."""
    a, b = math.exp(d / 2), math.exp(-d / 2)
    a, b = (round(1e6 * share / (a + b + TIE)) for share in (a, b))
    return a / 1e6, b / 1e6, (10**6 - a - b) / 1e6


def bayes_optimal_log_loss(probabilities: np.ndarray) -> float:
    """The expected log loss of predicting the rule's own probabilities (N, 3): the mean entropy, in nats per row."""
    p = np.asarray(probabilities, dtype=np.float64)
    return float(-(p * np.log(np.where(p > 0, p, 1.0))).sum(axis=1).mean())
