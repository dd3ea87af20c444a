"""The same numbers in less time: `accelerate(model)` optimises a plain model of `model.py` in place.

Each class below overrides the slow methods of one plain class. `accelerate` assigns these classes to existing modules,
so parameters, state_dict, hooks and optimizers stay the same. The optimisations:

    attention      in blocks without a gather, with a hand-written backward pass (attention.py)
    feed-forward   activations are recomputed in the backward pass; dropout stores a seed, not a mask (layers.py)
    table          only the relative embeddings within the sequence's length are projected
    last layer     a classifier uses only [CLS], so the last layer computes only [CLS]

On a GPU the attention of all heads is computed in one batch instead. torch.compile needs the plain model: the compiler
fuses its gathers, but cannot optimise a hand-written backward pass.
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
    """With `cls_only` the only query is [CLS]. Shapes: as the plain class; with `cls_only` -> (B, 1, D)."""

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
    """Shapes: as the plain class; with `cls_only` -> (B, 1, D)."""

    def forward(self, x: Tensor, attention_mask: Tensor, rel_embeddings: Tensor, buckets: Tensor,
                cls_only: bool = False) -> Tensor:
        attended = self.attention(x, attention_mask, rel_embeddings, buckets, cls_only)
        x = self.attn_norm(x[:, :attended.shape[1]] + self.dropout(attended))
        return self.ff_norm(x + self.dropout(self.feed_forward(x)))

    def feed_forward(self, x: Tensor) -> Tensor:
        return feed_forward(x, self.ff_in, self.ff_out)


class FastEncoder(plain.Encoder):
    def hidden_states(self, input_ids: Tensor, attention_mask: Tensor, cls_only: bool = False) -> Iterator[Tensor]:
        """As the plain class; with `cls_only` the last state is that of [CLS], (B, 1, D)."""
        attention_mask = attention_mask.bool()
        x = self.embed(input_ids, attention_mask)
        yield x
        rel_embeddings, buckets = self.relative_table(input_ids.shape[1])
        for layer in self.layers:
            x = layer(x, attention_mask, rel_embeddings, buckets, cls_only and layer is self.layers[-1])
            yield x

    def relative_table(self, length: int) -> tuple[Tensor, Tensor]:
        """Only the rows for distances below `length`. Shapes: -> (R', D) with R' <= R, (2 * length - 1,) int64."""
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
    """Accelerate every encoder and classifier in `model`, in place; return `model`.

    Parameters stay the same, and outputs are the same up to rounding. In training mode the same seed gives different
    dropout masks. Call it before DDP wraps the model.
    """
    for module in list(model.modules()):
        if type(module) is plain.Encoder:
            for part in module.modules():
                if type(part) is nn.Dropout:
                    part.__class__ = FastDropout
        module.__class__ = FAST.get(type(module), type(module))
    return model


def checkpoint_activations(model: plain.PreferenceModel) -> None:
    """Recompute each layer in the backward pass instead of storing its activations: less memory, more time.

    Works with plain and fast layers.
    """
    for layer in model.encoder.layers:
        layer.forward = partial(_recomputed, layer.forward)


def _recomputed(forward, *arguments):
    return checkpoint(forward, *arguments, use_reentrant=False) if torch.is_grad_enabled() else forward(*arguments)
