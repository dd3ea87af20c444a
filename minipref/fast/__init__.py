"""The same numbers, sooner: `accelerate(model)` makes a plain model of `model.py` fast, in place and from outside.

Each class below replaces one plain class and overrides only what is faster. `accelerate` gives the modules that exist
these classes, so parameters, state_dict, hooks and optimizers stay what they are. What is faster:

    attention      in blocks without a gather, and a hand-written backward pass (attention.py)
    feed-forward   its activations are recomputed in the backward pass; dropout keeps a seed, not a mask (layers.py)
    table          only the relative embeddings that a sequence's length can reach are projected
    last layer     a classifier reads [CLS] alone, so the last layer computes [CLS] alone

On an accelerator the attention runs in one batched form instead. For torch.compile take the plain model: the compiler
fuses its gathers and cannot see into a hand-written backward pass.
"""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from minipref import model as plain
from minipref.fast.attention import fast_attention
from minipref.fast.layers import FastDropout, cast_for_autocast, feed_forward, tune_malloc

__all__ = ["accelerate", "checkpoint_activations", "tune_malloc"]


class FastSelfAttention(plain.DisentangledSelfAttention):
    """With `cls_only` the queries are [CLS] alone. Shapes: as the plain one's; with `cls_only` -> (B, 1, D)."""

    def forward(self, x: Tensor, attention_mask: Tensor, rel_embeddings: Tensor, buckets: Tensor,
                cls_only: bool = False) -> Tensor:
        x, rel = cast_for_autocast(x), cast_for_autocast(self.rel_dropout(rel_embeddings))
        queries = x[:, :1] if cls_only else x
        q, k, v, pos_q, pos_k = (self.split_heads(projection(tokens)) for projection, tokens in (
            (self.q_proj, queries), (self.k_proj, x), (self.v_proj, x), (self.q_proj, rel), (self.k_proj, rel)))
        dropout = self.attn_dropout.p if self.training else 0.0
        out = fast_attention(q, k, v, pos_q, pos_k, attention_mask, buckets, dropout)
        return self.out_proj(out.transpose(1, 2).flatten(2))


class FastLayer(plain.EncoderLayer):
    """Shapes: as the plain one's; with `cls_only` -> (B, 1, D)."""

    def forward(self, x: Tensor, attention_mask: Tensor, rel_embeddings: Tensor, buckets: Tensor,
                cls_only: bool = False) -> Tensor:
        attended = self.attention(x, attention_mask, rel_embeddings, buckets, cls_only)
        x = self.attn_norm(x[:, :attended.shape[1]] + self.dropout(attended))
        return self.ff_norm(x + self.dropout(self.feed_forward(x)))

    def feed_forward(self, x: Tensor) -> Tensor:
        return feed_forward(x, self.ff_in, self.ff_out)


class FastEncoder(plain.Encoder):
    def hidden_states(self, input_ids: Tensor, attention_mask: Tensor, cls_only: bool = False) -> Iterator[Tensor]:
        """As the plain one's; with `cls_only` the last is (B, 1, D), that of [CLS]."""
        attention_mask = attention_mask.bool()
        x = self.embed(input_ids, attention_mask)
        yield x
        rel_embeddings, buckets = self.relative_table(input_ids.shape[1])
        for layer in self.layers:
            x = layer(x, attention_mask, rel_embeddings, buckets, cls_only and layer is self.layers[-1])
            yield x

    def relative_table(self, length: int) -> tuple[Tensor, Tensor]:
        """Only the rows that `length` tokens can reach. Shapes: -> (R', D) with R' <= R, (2 * length - 1,) int64."""
        buckets = plain.distance_buckets(length, self.config.position_buckets, self.config.max_distance)
        lowest, highest = int(buckets[0]), int(buckets[-1])              # buckets never descend
        table = self.rel_norm(self.rel_embeddings.weight[lowest:highest + 1])
        return table, (buckets - lowest).to(table.device)


class FastPreferenceModel(plain.PreferenceModel):
    def last_states(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        x = last = None
        for state in self.encoder.hidden_states(input_ids, attention_mask, cls_only=True):
            x, last = last, state
        return x, last[:, 0]


FAST = {plain.DisentangledSelfAttention: FastSelfAttention, plain.EncoderLayer: FastLayer, plain.Encoder: FastEncoder,
        plain.PreferenceModel: FastPreferenceModel}


def accelerate(model: nn.Module) -> nn.Module:
    """Make every encoder and classifier inside `model` fast, in place; return it.

    Parameters and outputs stay the same, up to rounding. In training mode on a CPU, dropout draws other masks than
    the plain model's from the same seed. Before torch.compile or DDP wrap the model, not after.
    """
    for module in list(model.modules()):
        if type(module) is plain.Encoder:
            for part in module.modules():
                if type(part) is nn.Dropout:
                    part.__class__ = FastDropout
        module.__class__ = FAST.get(type(module), type(module))
    return model


def checkpoint_activations(model: plain.PreferenceModel) -> None:
    """Recompute each layer in the backward pass instead of keeping its activations: less memory, a second forward.

    Works with the plain and the fast layers.
    """
    for layer in model.encoder.layers:
        layer.forward = partial(_recomputed, layer.forward)


def _recomputed(forward, *arguments):
    return checkpoint(forward, *arguments, use_reentrant=False) if torch.is_grad_enabled() else forward(*arguments)
