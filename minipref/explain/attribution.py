"""One pair through the model, with every layer's scores, and which tokens its prediction depends on.

A token's attribution is gradient times input: how the log odds of the prediction would change if the token's embedding
were scaled up a little. That is a local sensitivity, not a causal explanation.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from minipref.config import LABELS
from minipref.data import Pair, collate, encode_pairs
from minipref.model import PreferenceModel, attention_scores, masked_softmax, relative_index
from minipref.predictor import MAX_LENGTH, Judge
from minipref.runtime import FORBIDDEN
from minipref.sentencepiece_model import BYTE_PIECES
from minipref.tokenizer import SPACE, Tokenizer

TERMS = ("c2c", "c2p", "p2c")


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


@dataclass
class Explanation:
    """Everything that the page shows of one pair, in the order that has A first."""

    model: str                     # its name
    tokens: list[str]              # L, as plain text
    segments: list[str]            # L: prompt, A, B, or "" for a special token
    scores: np.ndarray             # (N, H, 3, L, L): c2c, c2p, p2c, each row less its mean
    probs: np.ndarray              # (N, H, L, L)
    num_truncated: int             # tokens that did not fit and were left out
    gaps: list[int]                # the tokens in front of which they stood
    attribution: Attribution | None    # None without a trained classifier

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
    input_ids, attention_mask, _ = collate(tokenized, [0], [False], tokenizer)
    swapped_ids, _, _ = collate(tokenized, [0], [True], tokenizer)
    _, scores, _ = forward_with_scores(model, input_ids, attention_mask)

    scores = scores - scores.mean(-1, keepdim=True)
    probs = masked_softmax(scores.sum(2), attention_mask)                # (N, H, L, L)
    attribution = None
    if not model.load_report.new:
        places = swapped_places([len(segment) for segment in tokenized.segments(0)])
        untruncated_probs = judge.compare_many([pair])[0] if tokenized.num_truncated[0] else None
        added = judge.surface_logits([pair])
        surface = torch.zeros(1, len(LABELS)) if added is None else torch.from_numpy(added)
        attribution = attribute(model, input_ids, swapped_ids, places, judge.temperature, surface, untruncated_probs)
    segments, gaps = [""], []
    for segment, tokens, all_tokens in zip(("prompt", "A", "B"), tokenized.segments(0), untruncated.segments(0)):
        if len(tokens) < len(all_tokens):
            gaps.append(len(segments) + len(tokens) - len(tokens) // 2)  # as `truncate_head_tail` cuts
        segments += [segment] * len(tokens) + [""]
    return Explanation(name, readable(tokenizer, input_ids[0].tolist()), segments, scores.numpy(), probs.numpy(),
                       int(tokenized.num_truncated[0]), gaps, attribution)


def forward_with_scores(model: PreferenceModel, input_ids: Tensor, attention_mask: Tensor
                        ) -> tuple[Tensor, Tensor, Tensor]:
    """`PreferenceModel.forward` that also returns its embeddings, a leaf with a gradient, and every layer's scores.

    Shapes: input_ids, attention_mask (1, L) -> (1, L, D), (N, H, 3, L, L), (1, 3).
    """
    encoder = model.encoder
    with torch.no_grad():
        embeddings = encoder.embed(input_ids, attention_mask)
        rel_embeddings, buckets = encoder.relative_table(input_ids.shape[1])
    x, scores = embeddings.requires_grad_(), []
    for layer in encoder.layers:
        with torch.no_grad():
            q, k, _, pos_q, pos_k = layer.attention.project(x, rel_embeddings)
            terms = attention_scores(q, k, pos_q, pos_k, relative_index(buckets))
            scores.append(torch.cat(terms).transpose(0, 1))              # (H, 3, L, L)
        x = layer(x, attention_mask, rel_embeddings, buckets)
    return embeddings, torch.stack(scores), model.classify(x[:, 0])


def attribute(model: PreferenceModel, input_ids: Tensor, swapped_ids: Tensor, places: list[int], temperature: float,
              surface: Tensor, untruncated_probs: np.ndarray | None) -> Attribution:
    """Both orders' probabilities and attributions. `places` says where a token of the first order is in the other;
    `surface` (1, 3) are the logits that the blend adds, which no token has a part in.
    """
    attention_mask = torch.ones_like(input_ids, dtype=torch.bool)
    passes = [forward_with_scores(model, order, attention_mask) for order in (input_ids, swapped_ids)]
    logits = torch.cat([logits for _, _, logits in passes]) / temperature
    logits = torch.stack([logits[0], logits[1, [1, 0, 2]]]) + surface    # both in the order A, B, tie
    probabilities = torch.softmax(logits.detach().double(), -1).numpy()
    prediction = int(probabilities.mean(0).argmax())
    others = [c for c in range(len(LABELS)) if c != prediction]
    log_odds = logits[:, prediction] - torch.logsumexp(logits[:, others], -1)
    embeddings = [x for x, _, _ in passes]
    gradients = torch.autograd.grad(log_odds.sum(), embeddings)
    a_first, b_first = ((g * x.detach())[0].sum(-1).numpy() for g, x in zip(gradients, embeddings))
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
