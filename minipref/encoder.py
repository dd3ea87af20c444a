"""The encoder: word embeddings, then N layers of attention and feed-forward.

Unusual here, compared with a GPT or a newer encoder:
- post-LayerNorm: the sum of input and output is normalised, `norm(x + f(x))`; the residual stream is never raw;
- no positions are added to the input: the only place that knows about order is the relative table, one for all
  layers, normalised once and dropped out anew in each layer;
- padding is zeroed once, after the embedding's norm, and masked as keys from then on.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from minipref.attention import DisentangledAttention
from minipref.config import EncoderConfig
from minipref.lean import Dropout, feed_forward
from minipref.positions import distance_rows


class EncoderLayer(nn.Module):
    """Attention, then a two-layer perceptron, each with dropout, a residual connection and LayerNorm after it.

    Shapes: x (B, L, D), is_token (B, L), rel (R, D), rows (2L - 1,) -> (B, L, D); with `cls_only` (B, 1, D).
    """

    def __init__(self, config: EncoderConfig):
        super().__init__()
        D, F_ = config.width, config.feed_forward
        self.attention = DisentangledAttention(config)
        self.attn_norm = nn.LayerNorm(D, eps=config.norm_eps)
        self.ff_in = nn.Linear(D, F_)
        self.ff_out = nn.Linear(F_, D)
        self.ff_norm = nn.LayerNorm(D, eps=config.norm_eps)
        self.dropout = Dropout(config.hidden_dropout)

    def forward(self, x: Tensor, is_token: Tensor, rel: Tensor, rows: Tensor, cls_only: bool = False) -> Tensor:
        attended = self.attention(x, is_token, rel, rows, cls_only)
        x = self.attn_norm(x[:, :attended.shape[1]] + self.dropout(attended))
        return self.ff_norm(x + self.dropout(feed_forward(x, self.ff_in, self.ff_out)))


class Encoder(nn.Module):
    """DeBERTa-v3 without any head.

    Shapes: ids (B, L) int64, is_token (B, L) bool -> (B, L, D). Rows where `is_token` is False hold no meaning.
    Errors: IndexError for an id outside the vocabulary.
    """

    def __init__(self, config: EncoderConfig):
        super().__init__()
        self.config = config
        V, D, R = config.vocab_size, config.width, 2 * config.span
        self.word_table = nn.Embedding(V, D, padding_idx=config.pad_id)
        self.word_norm = nn.LayerNorm(D, eps=config.norm_eps)
        self.rel_table = nn.Embedding(R, D)
        self.rel_norm = nn.LayerNorm(D, eps=config.norm_eps)
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.layers))
        self.dropout = Dropout(config.hidden_dropout)
        self.checkpoint_activations = False       # trade a second forward pass for the memory of the first

    def forward(self, ids: Tensor, is_token: Tensor) -> Tensor:
        for x in self.layer_outputs(ids, is_token):
            last = x
        return last

    def cls_vector(self, ids: Tensor, is_token: Tensor) -> Tensor:
        """The last layer's first vector, exactly `self(ids, is_token)[:, 0]`, without computing that layer's others.

        Shapes: (B, L), (B, L) -> (B, D).
        """
        for x in self.layer_outputs(ids, is_token, cls_only=True):
            last = x
        return last[:, 0]

    def layer_outputs(self, ids: Tensor, is_token: Tensor, cls_only: bool = False) -> Iterator[Tensor]:
        """The embeddings and then each layer's output, N + 1 tensors of (B, L, D), one at a time.

        With `cls_only` the last of them is (B, 1, D), the first token's.
        """
        x = self.embed(ids, is_token)
        yield x
        rel, rows = self.relative_table(ids.shape[1])                    # the same for every layer
        for layer in self.layers:
            arguments = x, is_token, rel, rows, cls_only and layer is self.layers[-1]
            if self.checkpoint_activations and torch.is_grad_enabled():
                x = checkpoint(layer, *arguments, use_reentrant=False)
            else:
                x = layer(*arguments)
            yield x

    def relative_table(self, length: int) -> tuple[Tensor, Tensor]:
        """The normalised rows that `length` tokens can refer to, and for each distance which of them it is.

        Few tokens know few distances, and rows that none of them needs would be projected in vain in every layer.

        Shapes: -> (R', D) with R' <= R, (2 * length - 1,) int64.
        """
        rows = distance_rows(length, self.config.span, self.config.max_distance)
        if torch.compiler.is_compiling():                                # which would have to stop at int()
            return self.rel_norm(self.rel_table.weight), rows.to(self.rel_table.weight.device)
        lowest, highest = int(rows[0]), int(rows[-1])                    # rows never descend
        rel = self.rel_norm(self.rel_table.weight[lowest:highest + 1])
        return rel, (rows - lowest).to(rel.device)

    def embed(self, ids: Tensor, is_token: Tensor) -> Tensor:
        """Word vectors, normalised, with padding zeroed. Shapes: (B, L), (B, L) -> (B, L, D)."""
        x = self.word_norm(self.word_table(ids))
        return self.dropout(x * is_token[..., None])


def initialise(module: nn.Module, std: float) -> None:
    """Fresh weights as DeBERTa draws them, from torch's global generator: N(0, std), biases 0, LayerNorms 1 and 0."""
    for part in module.modules():
        if isinstance(part, nn.Linear | nn.Embedding):
            nn.init.normal_(part.weight, std=std)
        if isinstance(part, nn.Linear):
            nn.init.zeros_(part.bias)
        if isinstance(part, nn.LayerNorm):
            nn.init.ones_(part.weight)
            nn.init.zeros_(part.bias)
        if isinstance(part, nn.Embedding) and part.padding_idx is not None:
            with torch.no_grad():
                part.weight[part.padding_idx].zero_()
