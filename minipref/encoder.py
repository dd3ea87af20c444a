"""The encoder: word embeddings, then N layers of attention and feed-forward.

Unusual here, compared with a GPT or a newer encoder:
- post-LayerNorm: the sum of input and output is normalised, `norm(x + f(x))`; the residual stream is never raw;
- no positions are added to the input: the only place that knows about order is the relative table, one for all
  layers, normalised once and dropped out anew in each layer;
- padding is zeroed once, after the embedding's norm, and masked as keys from then on.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from minipref.attention import DisentangledAttention
from minipref.config import EncoderConfig
from minipref.positions import distance_rows, relative_index


class EncoderLayer(nn.Module):
    """Attention, then a two-layer perceptron, each with dropout, a residual connection and LayerNorm after it.

    Shapes: x (B, L, D), is_token (B, L), rel (R, D), rel_index (L, L) -> (B, L, D).
    """

    def __init__(self, config: EncoderConfig):
        super().__init__()
        D, F_ = config.width, config.feed_forward
        self.attention = DisentangledAttention(config)
        self.attn_norm = nn.LayerNorm(D, eps=config.norm_eps)
        self.ff_in = nn.Linear(D, F_)
        self.ff_out = nn.Linear(F_, D)
        self.ff_norm = nn.LayerNorm(D, eps=config.norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(self, x: Tensor, is_token: Tensor, rel: Tensor, rel_index: Tensor) -> Tensor:
        x = self.attn_norm(x + self.dropout(self.attention(x, is_token, rel, rel_index)))
        hidden = F.gelu(self.ff_in(x))                                   # (B, L, F); the exact GELU, with erf
        return self.ff_norm(x + self.dropout(self.ff_out(hidden)))


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
        self.dropout = nn.Dropout(config.hidden_dropout)
        self.checkpoint_activations = False       # trade a second forward pass for the memory of the first

    def forward(self, ids: Tensor, is_token: Tensor) -> Tensor:
        for x in self.layer_outputs(ids, is_token):
            last = x
        return last

    def layer_outputs(self, ids: Tensor, is_token: Tensor) -> Iterator[Tensor]:
        """The embeddings and then each layer's output, N + 1 tensors of (B, L, D), one at a time."""
        x = self.embed(ids, is_token)
        yield x
        rows = distance_rows(ids.shape[1], self.config.span, self.config.max_distance, device=ids.device)
        rel_index = relative_index(rows)                                 # (L, L), the same for every layer
        rel = self.rel_norm(self.rel_table.weight)                       # (R, D), likewise
        for layer in self.layers:
            if self.checkpoint_activations and torch.is_grad_enabled():
                x = checkpoint(layer, x, is_token, rel, rel_index, use_reentrant=False)
            else:
                x = layer(x, is_token, rel, rel_index)
            yield x

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
