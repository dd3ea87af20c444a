"""One pair through the model, with every layer's scores, and which tokens its prediction depends on.

A token's attribution is gradient times input: how the log odds of the prediction would change if the token's embedding
were scaled up a little. That is a local sensitivity, not a causal explanation.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from minipref.config import LABELS
from minipref.data import Pair, TokenizedPairs, collate, encode_pairs
from minipref.model import PreferenceModel, attention_scores, masked_softmax, relative_index
from minipref.predictor import MAX_LENGTH, Judge
from minipref.runtime import FORBIDDEN
from minipref.sentencepiece_model import BYTE_PIECES
from minipref.tokenizer import SPACE, Tokenizer

TERMS = ("c2c", "c2p", "p2c")
VECTORS = ("q", "k", "pos_q", "pos_k")
OUTCOMES = ("A is better", "B is better", "a tie")
MARGIN = 0.05          # two probabilities closer than this are reported as 'undecided'


@dataclass
class Attribution:
    """What a trained model predicts for the pair, and each token's attribution in nats of the prediction's log odds."""

    prediction: int                        # 0 A, 1 B, 2 tie
    probabilities: np.ndarray              # (2, 3): A first, B first; both in the order A, B, tie
    attributions: np.ndarray               # (2, L): the same tokens in both orders, in the order that has A first
    untruncated_probs: np.ndarray | None   # (3,) for the pair at the model's own budget; None without truncation

    @property
    def averaged(self) -> np.ndarray:
        """(3,) the model's answer: the mean of both orders."""
        return self.probabilities.mean(0)

    @property
    def outcome(self) -> str:
        """The answer in words: an outcome of `OUTCOMES`, or 'undecided' where the first two are within `MARGIN`."""
        return OUTCOMES[self.prediction] if _leads(self.averaged) else "undecided"

    @property
    def order_sensitive(self) -> bool:
        """Whether exchanging A and B changes the winner, with a lead of `MARGIN` in both orders."""
        first, second = self.probabilities
        return bool(first.argmax() != second.argmax()) and _leads(first) and _leads(second)


def _leads(probabilities: np.ndarray) -> bool:
    second, first = np.sort(probabilities)[-2:]
    return bool(first - second >= MARGIN)


@dataclass
class Explanation:
    """Everything that the page shows of one pair, in the order that has A first. U: number of distinct buckets."""

    model: str                     # its name
    pair: Pair
    tokens: list[str]              # L, as plain text
    segments: list[str]            # L: prompt, A, B, or "" for a special token
    scores: np.ndarray             # (N, H, 3, L, L): c2c, c2p, p2c, each row minus its mean
    means: np.ndarray              # (N, H, 3, L): those means
    probs: np.ndarray              # (N, H, L, L)
    vectors: dict[str, np.ndarray]     # q, k (N, H, L, d), pos_q, pos_k (N, H, U, d)
    buckets: np.ndarray            # (U,) the bucket of each of these rows
    rows: np.ndarray               # (2L - 1,) which of the U belongs to the distance i - j, at i - j + L - 1
    exact: int                     # up to this distance a bucket is the distance itself
    gaps: dict[int, int]           # where text was truncated: index of the next kept token -> number of tokens cut
    attribution: Attribution | None    # None without a trained classifier

    @property
    def num_truncated(self) -> int:
        return sum(self.gaps.values())

    def panels(self, layer: int, head: int) -> dict[str, np.ndarray]:
        """The matrices of one head, counted from 0, under the names of `PANELS`."""
        scores = self.scores[layer, head]
        return dict(zip(TERMS, scores)) | {"sum": scores.sum(0), "probs": self.probs[layer, head]}


def explain(judge: Judge, pair: Pair, max_length: int, name: str = "") -> Explanation:
    """Explain one pair, truncated to `max_length` tokens, with a plain model (not an accelerated one).

    Without a trained classifier (`load_report.new`) there is no attribution. Errors: `InputError` below 7 tokens.
    """
    model, tokenizer = judge.model, judge.tokenizer
    tokenized, untruncated = (encode_pairs([pair], tokenizer, length) for length in (max_length, MAX_LENGTH))
    batches = [collate(tokenized, [0], [swapped], tokenizer)[:2]
               for swapped in ((False,) if model.load_report.new else (False, True))]
    orders, (input_ids, attention_mask) = [watch(model, *batch) for batch in batches], batches[0]
    scores, vectors, buckets, rows = attention_terms(model, orders[0].inputs)
    means = scores.mean(-1, keepdim=True)
    scores = scores - means
    probs = masked_softmax(scores.sum(2), attention_mask)                # (N, H, L, L); nothing is padding
    segments, gaps = [""], {}
    for segment, tokens, all_tokens in zip(("prompt", "A", "B"), tokenized.segments(0), untruncated.segments(0)):
        if len(tokens) < len(all_tokens):                                # cut as `truncate_head_tail` cuts
            gaps[len(segments) + len(tokens) - len(tokens) // 2] = len(all_tokens) - len(tokens)
        segments += [segment] * len(tokens) + [""]
    return Explanation(
        model=name, pair=pair, tokens=readable(tokenizer, input_ids[0].tolist()), segments=segments,
        scores=scores.numpy(), means=means[..., 0].numpy(), probs=probs.numpy(),
        vectors={name: vector.numpy() for name, vector in vectors.items()},
        buckets=buckets.numpy() - model.config.position_buckets, rows=rows.numpy(),
        exact=model.config.position_buckets // 2, gaps=gaps,
        attribution=None if model.load_report.new else attribute(judge, pair, tokenized, orders))


@dataclass
class Watched:
    """A forward pass of one sequence, and what was seen of it."""

    embeddings: Tensor             # (1, L, D), a leaf of the graph that ends in the logits
    logits: Tensor                 # (1, 3)
    inputs: list[tuple]            # of each layer's attention


def watch(model: PreferenceModel, input_ids: Tensor, attention_mask: Tensor) -> Watched:
    """Run `model(input_ids, attention_mask)` with hooks. Shapes: (1, L), (1, L)."""
    embeddings, inputs = [], []

    def make_leaf(module, given, x):
        embeddings.append(x.detach().requires_grad_())
        return embeddings[0]

    hooks = [model.encoder.dropout.register_forward_hook(make_leaf),     # the last step of `Encoder.embed`
             *(layer.attention.register_forward_pre_hook(lambda _, given: inputs.append(given))
               for layer in model.encoder.layers)]
    try:
        logits = model(input_ids, attention_mask)
    finally:
        for hook in hooks:
            hook.remove()
    return Watched(embeddings[0], logits, inputs)


@torch.no_grad()
def attention_terms(model: PreferenceModel, inputs: list[tuple]) -> tuple[Tensor, dict[str, Tensor], Tensor, Tensor]:
    """Every head's scores and vectors, by the model's own functions, from what its attentions were given.

    Shapes: -> scores (N, H, 3, L, L); q, k (N, H, L, d) and pos_q, pos_k (N, H, U, d) for the U rows of the relative
    embeddings that occur; these rows (U,); and for each distance its place among them (2L - 1,).
    """
    scores, vectors = [], {name: [] for name in VECTORS}
    buckets, rows = inputs[0][3].unique(return_inverse=True)
    for layer, (x, _, rel_embeddings, distances) in zip(model.encoder.layers, inputs):
        q, k, _, pos_q, pos_k = layer.attention.project(x, rel_embeddings)
        scores.append(torch.cat(attention_scores(q, k, pos_q, pos_k, relative_index(distances))).transpose(0, 1))
        for name, vector in zip(VECTORS, (q[0], k[0], pos_q[:, buckets], pos_k[:, buckets])):
            vectors[name].append(vector)
    return torch.stack(scores), {name: torch.stack(layers) for name, layers in vectors.items()}, buckets, rows


def attribute(judge: Judge, pair: Pair, tokenized: TokenizedPairs, orders: list[Watched]) -> Attribution:
    """The probabilities and attributions of both orders (A first, B first)."""
    added = judge.surface_logits([pair])                                 # of the blend; they get no attribution
    surface = torch.zeros(1, len(LABELS)) if added is None else torch.from_numpy(added)
    a_first, b_first = (order.logits[0] / judge.temperature for order in orders)
    logits = torch.stack([a_first, b_first[[1, 0, 2]]]) + surface        # (2, 3), both in the order A, B, tie
    probabilities = torch.softmax(logits.detach().double(), -1).numpy()
    prediction = int(probabilities.mean(0).argmax())
    others = [c for c in range(len(LABELS)) if c != prediction]
    log_odds = logits[:, prediction] - torch.logsumexp(logits[:, others], -1)
    embeddings = [order.embeddings for order in orders]
    gradients = torch.autograd.grad(log_odds.sum(), embeddings)
    a_first, b_first = ((g * x.detach())[0].sum(-1).numpy() for g, x in zip(gradients, embeddings))
    places = swapped_places([len(segment) for segment in tokenized.segments(0)])
    untruncated_probs = judge.compare_many([pair])[0] if tokenized.num_truncated[0] else None
    return Attribution(prediction, probabilities, np.stack([a_first, b_first[places]]), untruncated_probs)


def swapped_places(lengths: list[int]) -> list[int]:
    """For each token of `[CLS] prompt [SEP] A [SEP] B [SEP]`, its place in the sequence that has B before A.

    The first [SEP] after a response stays the first. `lengths` are the segments', without special tokens.
    """
    prompt, a, b = lengths
    before = prompt + 2                                                  # [CLS], the prompt and its [SEP]
    first_sep, last_sep = before + b, before + b + 1 + a
    return [*range(before), *range(first_sep + 1, last_sep), first_sep, *range(before, before + b), last_sep]


def readable(tokenizer: Tokenizer, input_ids: list[int]) -> list[str]:
    """The pieces as plain text: spaces and ASCII bytes as themselves; U+FFFD for what HTML and XML forbid."""
    pieces = [chr(BYTE_PIECES[piece]) if BYTE_PIECES.get(piece, 128) < 128 else piece.replace(SPACE, " ")
              for piece in tokenizer.tokens(input_ids)]
    return [FORBIDDEN.sub("\ufffd", piece) for piece in pieces]
