"""Disentangled attention: what DeBERTa has in place of BERT's attention.

BERT adds a vector for the position to a vector for the word and lets attention sort it out. DeBERTa never mixes the
two. A token at i has a content vector; a *distance* i - j has a vector of its own, from a table shared by all layers;
and a score is the sum of the three ways in which they can meet (content looks at content, content looks at
position, position looks at content):

    score[i, j] = ( q_i . k_j  +  q_i . pos_k[row(i - j)]  +  k_j . pos_q[row(i - j)] ) / sqrt(3 d)
                     c2c              c2p                         p2c

`row` is in `positions.py`. The scale is sqrt(3 d) and not sqrt(d) because three products of variance d are added.

The letters, here and everywhere in minipref:

    B batch   L tokens (i a query, j a key)   D width   H heads   d = D / H   F feed-forward   N layers
    R rows of the relative table (2 * span)   V vocabulary   C classes

    x (B, L, D)   q k v (B, H, L, d)   pos_q pos_k (H, R, d)   rel_index (L, L)   is_token (B, L) bool
    c2c c2p p2c scores probs (B, H, L, L)

Unusual here:
- **The sign of p2c.** The paper (equation 4) has Q^r[delta(j, i)] in the third term. The released weights were trained
  with Q^r[delta(i, j)], the same distance as in the second; Microsoft's and Hugging Face's code agree on that. With
  the paper's sign the outputs are garbage that looks like a model.
- **Shared projections.** v3 has no projections for positions: the table goes through the layer's own q_proj and
  k_proj, biases included.
- Only keys are masked. What a padding query attends to is never read by anyone.

Read `attention_by_definition` first; the rest computes the same thing faster.
"""

import math

import torch
from torch import Tensor, nn

from minipref.config import EncoderConfig
from minipref.fused import choose_path, fast_attention
from minipref.lean import Dropout, in_low_precision
from minipref.positions import log_bucket, relative_index


def attention_by_definition(q: Tensor, k: Tensor, v: Tensor, pos_q: Tensor, pos_k: Tensor, is_token: Tensor,
                            span: int, max_distance: int) -> Tensor:
    """Disentangled attention in three loops: slow, and the specification that everything faster is tested against.

    Shapes: q, k, v (B, H, L, d); pos_q, pos_k (H, 2 * span, d); is_token (B, L) bool -> (B, H, L, d).
    Paper: DeBERTa (arXiv 2006.03654), equation 4 and algorithm 1.
    Differs: the paper's third term reads row(j - i); the released weights mean row(i - j).
    """
    B, H, L, d = q.shape
    out = torch.zeros_like(v)
    for b in range(B):
        keys = [j for j in range(L) if is_token[b, j]]
        for h in range(H):
            for i in range(L):
                scores = []
                for j in keys:
                    row = log_bucket(torch.tensor(i - j), span, max_distance) + span
                    c2c = q[b, h, i] @ k[b, h, j]
                    c2p = q[b, h, i] @ pos_k[h, row]
                    p2c = k[b, h, j] @ pos_q[h, row]
                    scores.append((c2c + c2p + p2c) / math.sqrt(3 * d))
                probs = torch.softmax(torch.stack(scores), dim=0)
                out[b, h, i] = probs @ v[b, h, keys]
    return out


def disentangled_scores(q: Tensor, k: Tensor, pos_q: Tensor, pos_k: Tensor, rel_index: Tensor
                        ) -> tuple[Tensor, Tensor, Tensor]:
    """The three terms of the score, each already divided by sqrt(3 d).

    Shapes: q, k (B, H, L, d); pos_q, pos_k (H, R, d); rel_index (L, L) -> c2c, c2p, p2c (B, H, L, L) each.
    """
    scale = 1 / math.sqrt(3 * q.shape[-1])
    q, pos_q = q * scale, pos_q * scale                    # before the products: in float16 they could overflow
    c2c = q @ k.mT

    # Every query against every row of the table, then for each key the row that its distance selects.
    every_row = q @ pos_k.mT                                             # (B, H, L_i, R)
    c2p = every_row.gather(-1, rel_index.expand_as(c2c))                 # (B, H, L_i, L_j)

    # The same for keys. A key at j gathers over the queries i, so the index and the result are transposed.
    every_row = k @ pos_q.mT                                             # (B, H, L_j, R)
    p2c = every_row.gather(-1, rel_index.mT.expand_as(c2c.mT)).mT        # (B, H, L_i, L_j)
    return c2c, c2p, p2c


def masked_softmax(scores: Tensor, is_token: Tensor) -> Tensor:
    """Softmax over the keys that are tokens, in float32 even where autocast would stay in half precision.

    Shapes: scores (B, H, L, L), is_token (B, L) -> probs (B, H, L, L), float32 (float64 for float64 scores).
    """
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    lowest = torch.finfo(scores.dtype).min                 # not -inf: a row of padding only must not become NaN
    return torch.softmax(scores.masked_fill(~is_token[:, None, None, :], lowest), dim=-1)


class DisentangledAttention(nn.Module):
    """One layer's self-attention, up to and including the output projection.

    `cls_only` asks for the first token's result alone: the last layer of a classifier needs no other.

    Shapes: x (B, L, D), is_token (B, L), rel (R, D) the normalised relative table, rows (2L - 1,) the row of each
    distance -> (B, L, D), or (B, 1, D).
    """

    def __init__(self, config: EncoderConfig):
        super().__init__()
        D = config.width
        self.heads = config.heads
        self.q_proj = nn.Linear(D, D)
        self.k_proj = nn.Linear(D, D)
        self.v_proj = nn.Linear(D, D)
        self.out_proj = nn.Linear(D, D)
        self.rel_dropout = Dropout(config.hidden_dropout)
        self.attn_dropout = nn.Dropout(config.attention_dropout)

    def forward(self, x: Tensor, is_token: Tensor, rel: Tensor, rows: Tensor, cls_only: bool = False) -> Tensor:
        q, k, v, pos_q, pos_k = self.project(x, rel, cls_only)
        path = choose_path(x.device)
        if path == "plain":
            rel_index = relative_index(rows)[:q.shape[2]]
            c2c, c2p, p2c = disentangled_scores(q, k, pos_q, pos_k, rel_index)
            probs = masked_softmax(c2c + c2p + p2c, is_token)
            out = self.attn_dropout(probs).to(v.dtype) @ v               # (B, H, L, d)
        else:                                                            # the same numbers, sooner: fused.py
            dropout = self.attn_dropout.p if self.training else 0.0
            out = fast_attention(q, k, v, pos_q, pos_k, is_token, rows, dropout, path)
        return self.out_proj(out.transpose(1, 2).flatten(2))             # (B, L, D)

    def project(self, x: Tensor, rel: Tensor, cls_only: bool = False
                ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Queries, keys and values of the tokens; queries and keys of the table, through the same two projections.

        Shapes: x (B, L, D), rel (R, D) -> q, k, v (B, H, L, d), pos_q, pos_k (H, R, d); with `cls_only` q is
        (B, H, 1, d).
        """
        x, rel = in_low_precision(x), in_low_precision(self.rel_dropout(rel))
        asking = x[:, :1] if cls_only else x
        return (self.split_heads(self.q_proj(asking)), self.split_heads(self.k_proj(x)),
                self.split_heads(self.v_proj(x)),
                self.split_heads(self.q_proj(rel)), self.split_heads(self.k_proj(rel)))

    def split_heads(self, x: Tensor) -> Tensor:
        """(..., L, D) -> (..., H, L, d)."""
        return x.unflatten(-1, (self.heads, -1)).transpose(-2, -3)
