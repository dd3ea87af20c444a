"""DeBERTa-v3 and a three-way preference classifier, in plain PyTorch without optimisations.

BERT adds a position embedding to each token embedding. DeBERTa keeps the two apart: a token i has a content vector, a
*distance* i - j has a vector of its own, and an attention score is the sum of three products:

    score[i, j] = ( q_i . k_j  +  q_i . pos_k[bucket(i - j)]  +  k_j . pos_q[bucket(i - j)] ) / sqrt(3 d)
                     c2c            c2p                              p2c

What is unusual, compared with BERT or a GPT:
- Each distance up to 130 has a bucket of its own; farther ones share buckets. One embedding table serves all layers.
- The table goes through each layer's own q_proj and k_proj, biases included (`share_att_key` in config.json).
- **The sign of p2c.** The paper (equation 4) has the distance j - i in the third term; the released weights use i - j.
- The scale is sqrt(3 d), because three products of variance d are added.
- Post-LayerNorm, no absolute positions, no token types, and a GELU pooler (BERT's is tanh).

Letters: B batch, L tokens (i query, j key), D hidden size, H heads, d = D / H, F intermediate size, N layers,
R = 2 * position_buckets relative embeddings, V vocabulary, C classes.

Read `attention_by_definition` first. `minipref/fast/` replaces parts of it; results are equal up to rounding (dropout
masks may differ).
"""

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minipref.config import LABELS, EncoderConfig

# --- relative positions -----------------------------------------------------------------------------------------------

def log_bucket(distance: Tensor, position_buckets: int = 256, max_distance: int = 512) -> Tensor:
    """The bucket of each signed distance i - j.

        distance   0  1  2 ... 128 | 129 130 131 132 ... 150 ... 256 ... 511 and beyond     (256 buckets, 512)
        bucket     0  1  2 ... 128 | 129 130 131 131 ... 143 ... 192 ... 255

    Negative distances mirror this. All of it is float64: `ceil` turns a rounding error into another bucket, and in
    bfloat16 74 of the 1,023 distances would get a wrong bucket.

    Shapes: any int64 tensor -> int64 of the same shape, in -(position_buckets - 1)..position_buckets - 1.
    Paper: the formula is only in Microsoft's code, `make_log_bucket_position`.
    Differs: Hugging Face does not clamp, and reads the untrained row 0 for far negative distances.
    """
    exact = position_buckets // 2
    distance = distance.clamp(1 - max_distance, max_distance - 1)
    far = distance.abs().clamp(min=exact).double()                   # a shorter one would have a negative logarithm
    reach = torch.tensor((max_distance - 1) / exact, dtype=torch.float64, device=distance.device)
    # 1e-9: where the exact value is a whole number (log 2 / log 8 * 3 = 1), `ceil` must not round its error up.
    steps = torch.ceil(torch.log(far / exact) / torch.log(reach) * (exact - 1) - 1e-9).long()
    return torch.where(distance.abs() <= exact, distance, (exact + steps) * distance.sign())


def distance_buckets(length: int, position_buckets: int, max_distance: int) -> Tensor:
    """For every distance among `length` tokens its row of the relative embeddings, bucket + position_buckets.

    Row 0 is never used, and its gradient is 0: no distance has the bucket -position_buckets.

    Shapes: -> (2L - 1,) int64; entry i - j + L - 1 belongs to a query at i and a key at j.
    """
    distance = torch.arange(1 - length, length)
    return log_bucket(distance, position_buckets, max_distance) + position_buckets


def relative_index(buckets: Tensor) -> Tensor:
    """`distance_buckets` for pairs of tokens: [i, j] is the row for the distance i - j. Shapes: (2L - 1,) -> (L, L)."""
    length = (len(buckets) + 1) // 2
    i = torch.arange(length, device=buckets.device)
    return buckets[i[:, None] - i[None, :] + length - 1]


# --- attention --------------------------------------------------------------------------------------------------------

def attention_by_definition(q: Tensor, k: Tensor, v: Tensor, pos_q: Tensor, pos_k: Tensor, attention_mask: Tensor,
                            position_buckets: int, max_distance: int) -> Tensor:
    """Disentangled attention in loops: slow, and the specification against which the faster forms are tested.

    Shapes: q, k, v (B, H, L, d); pos_q, pos_k (H, R, d); attention_mask (B, L) bool -> (B, H, L, d).
    Paper: DeBERTa (arXiv 2006.03654), equation 4 and algorithm 1.
    Differs: the paper's third term has bucket(j - i); the released weights use bucket(i - j).
    """
    B, H, L, d = q.shape
    out = torch.zeros_like(v)
    for b in range(B):
        keys = [j for j in range(L) if attention_mask[b, j]]
        for h in range(H):
            for i in range(L):
                scores = []
                for j in keys:
                    row = log_bucket(torch.tensor(i - j), position_buckets, max_distance) + position_buckets
                    c2c = q[b, h, i] @ k[b, h, j]
                    c2p = q[b, h, i] @ pos_k[h, row]
                    p2c = k[b, h, j] @ pos_q[h, row]
                    scores.append((c2c + c2p + p2c) / math.sqrt(3 * d))
                probs = torch.softmax(torch.stack(scores), dim=0)
                out[b, h, i] = probs @ v[b, h, keys]
    return out


def attention_scores(q: Tensor, k: Tensor, pos_q: Tensor, pos_k: Tensor, index: Tensor
                     ) -> tuple[Tensor, Tensor, Tensor]:
    """The three terms of the score, each already divided by sqrt(3 d).

    Shapes: q, k (B, H, L, d); pos_q, pos_k (H, R, d); index (L, L) -> c2c, c2p, p2c (B, H, L, L) each.
    """
    scale = 1 / math.sqrt(3 * q.shape[-1])
    q, pos_q = q * scale, pos_q * scale                              # before products that could overflow in float16
    c2c = q @ k.mT                                                   # (B, H, L_i, L_j)

    # Multiply every query with every relative embedding, then gather each key's product by its distance.
    every_row = q @ pos_k.mT                                         # (B, H, L_i, R)
    c2p = every_row.gather(-1, index.expand_as(c2c))                 # (B, H, L_i, L_j)

    # The same for keys. Rows of the product are keys, so the index and the result are transposed.
    every_row = k @ pos_q.mT                                         # (B, H, L_j, R)
    p2c = every_row.gather(-1, index.mT.expand_as(c2c.mT)).mT        # (B, H, L_i, L_j)
    return c2c, c2p, p2c


def masked_softmax(scores: Tensor, attention_mask: Tensor) -> Tensor:
    """Softmax over the keys that are not padding, in float32 even under autocast. Padding queries are not masked: their
    outputs are unused.

    Shapes: scores (B, H, L, L), attention_mask (B, L) bool -> (B, H, L, L), float32 (float64 for float64 scores).
    """
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    lowest = torch.finfo(scores.dtype).min                           # not -inf, which gives NaN if all keys are padding
    return torch.softmax(scores.masked_fill(~attention_mask[:, None, None, :], lowest), dim=-1)


class DisentangledSelfAttention(nn.Module):
    """Disentangled attention with its output projection.

    Shapes: x (B, L, D), attention_mask (B, L) bool, rel_embeddings (R, D), buckets (2L - 1,) -> (B, L, D).
    """

    def __init__(self, config: EncoderConfig):
        super().__init__()
        D = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.q_proj = nn.Linear(D, D)
        self.k_proj = nn.Linear(D, D)
        self.v_proj = nn.Linear(D, D)
        self.out_proj = nn.Linear(D, D)
        self.rel_dropout = nn.Dropout(config.hidden_dropout_prob)
        self.attn_dropout = nn.Dropout(config.attention_probs_dropout_prob)

    def forward(self, x: Tensor, attention_mask: Tensor, rel_embeddings: Tensor, buckets: Tensor) -> Tensor:
        q, k, v, pos_q, pos_k = self.project(x, rel_embeddings)
        out = self.attend(q, k, v, pos_q, pos_k, attention_mask, buckets)        # (B, H, L, d)
        return self.out_proj(out.transpose(1, 2).flatten(2))                     # (B, L, D)

    def project(self, x: Tensor, rel_embeddings: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Tokens and relative embeddings share the query and key projections.

        Shapes: (B, L, D), (R, D) -> q, k, v (B, H, L, d), pos_q, pos_k (H, R, d).
        """
        rel = self.rel_dropout(rel_embeddings)
        return (self.split_heads(self.q_proj(x)), self.split_heads(self.k_proj(x)), self.split_heads(self.v_proj(x)),
                self.split_heads(self.q_proj(rel)), self.split_heads(self.k_proj(rel)))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, pos_q: Tensor, pos_k: Tensor, attention_mask: Tensor,
               buckets: Tensor) -> Tensor:
        """Shapes: as `project` returns them, attention_mask (B, L), buckets (2L - 1,) -> (B, H, L, d)."""
        c2c, c2p, p2c = attention_scores(q, k, pos_q, pos_k, relative_index(buckets))
        probs = masked_softmax(c2c + c2p + p2c, attention_mask)
        return self.attn_dropout(probs).to(v.dtype) @ v

    def split_heads(self, x: Tensor) -> Tensor:
        """(..., L, D) -> (..., H, L, d)."""
        return x.unflatten(-1, (self.num_heads, -1)).transpose(-2, -3)


# --- encoder ----------------------------------------------------------------------------------------------------------

class EncoderLayer(nn.Module):
    """Attention and a two-layer MLP, each followed by dropout, a residual connection and LayerNorm (post-LN).

    Shapes: x (B, L, D), attention_mask (B, L) bool, rel_embeddings (R, D), buckets (2L - 1,) -> (B, L, D).
    """

    def __init__(self, config: EncoderConfig):
        super().__init__()
        D, F_ = config.hidden_size, config.intermediate_size
        self.attention = DisentangledSelfAttention(config)
        self.attn_norm = nn.LayerNorm(D, eps=config.layer_norm_eps)
        self.ff_in = nn.Linear(D, F_)
        self.ff_out = nn.Linear(F_, D)
        self.ff_norm = nn.LayerNorm(D, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, x: Tensor, attention_mask: Tensor, rel_embeddings: Tensor, buckets: Tensor) -> Tensor:
        x = self.attn_norm(x + self.dropout(self.attention(x, attention_mask, rel_embeddings, buckets)))
        return self.ff_norm(x + self.dropout(self.feed_forward(x)))

    def feed_forward(self, x: Tensor) -> Tensor:
        return self.ff_out(F.gelu(self.ff_in(x)))                    # the exact GELU, with erf


class Encoder(nn.Module):
    """DeBERTa-v3 without a head.

    Shapes: input_ids (B, L) int64, attention_mask (B, L) bool or 0/1 -> (B, L, D); outputs at padding are meaningless.
    Errors: IndexError for an id outside the vocabulary.
    """

    def __init__(self, config: EncoderConfig):
        super().__init__()
        self.config = config
        V, D, R = config.vocab_size, config.hidden_size, 2 * config.position_buckets
        self.word_embeddings = nn.Embedding(V, D, padding_idx=config.pad_token_id)
        self.word_norm = nn.LayerNorm(D, eps=config.layer_norm_eps)
        self.rel_embeddings = nn.Embedding(R, D)
        self.rel_norm = nn.LayerNorm(D, eps=config.layer_norm_eps)
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.num_hidden_layers))
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        for x in self.hidden_states(input_ids, attention_mask):
            last = x
        return last

    def hidden_states(self, input_ids: Tensor, attention_mask: Tensor) -> Iterator[Tensor]:
        """Yields the embeddings, then each layer's output: N + 1 tensors of (B, L, D)."""
        attention_mask = attention_mask.bool()
        x = self.embed(input_ids, attention_mask)
        yield x
        rel_embeddings, buckets = self.relative_table(input_ids.shape[1])        # the same for every layer
        for layer in self.layers:
            x = layer(x, attention_mask, rel_embeddings, buckets)
            yield x

    def embed(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Normalised word embeddings, 0 for padding. Shapes: (B, L), (B, L) bool -> (B, L, D)."""
        return self.dropout(self.word_norm(self.word_embeddings(input_ids)) * attention_mask[..., None])

    def relative_table(self, length: int) -> tuple[Tensor, Tensor]:
        """The normalised relative embeddings, and the row for each distance. Shapes: -> (R, D), (2L - 1,) int64."""
        table = self.rel_norm(self.rel_embeddings.weight)
        buckets = distance_buckets(length, self.config.position_buckets, self.config.max_distance)
        return table, buckets.to(table.device)                       # computed on the CPU: MPS has no float64


# --- classifier -------------------------------------------------------------------------------------------------------

class PreferenceModel(nn.Module):
    """Predicts which of two responses a person prefers, from `[CLS] prompt [SEP] A [SEP] B [SEP]`. Both responses are
    in one sequence so that every layer can compare them. The published checkpoint has no pooler and no classifier.

    Shapes: input_ids (B, L) int64, attention_mask (B, L) bool or 0/1 -> logits (B, 3): A, B, tie.
    """

    def __init__(self, config: EncoderConfig):
        super().__init__()
        D, C = config.hidden_size, len(LABELS)
        self.encoder = Encoder(config)
        self.pooler = nn.Linear(D, D)
        self.classifier = nn.Linear(D, C)
        self.pooler_dropout = nn.Dropout(config.pooler_dropout)
        self.classifier_dropout = nn.Dropout(config.cls_dropout)

    @property
    def config(self) -> EncoderConfig:
        return self.encoder.config

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        _, cls = self.last_states(input_ids, attention_mask)
        return self.classify(cls)

    def last_states(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        """The input of the last layer, and its output for [CLS]. Shapes: -> (B, L, D), (B, D)."""
        x = last = None
        for state in self.encoder.hidden_states(input_ids, attention_mask):
            x, last = last, state
        return x, last[:, 0]

    def classify(self, cls: Tensor) -> Tensor:
        """Logits from the last hidden state of [CLS]. Shapes: (B, D) -> (B, 3)."""
        pooled = F.gelu(self.pooler(self.pooler_dropout(cls)))                   # (B, D)
        return self.classifier(self.classifier_dropout(pooled))                  # (B, C)


def init_weights(module: nn.Module, std: float) -> None:
    """Initialise as DeBERTa does, from torch's global generator: weights N(0, std), biases 0, LayerNorms 1 and 0."""
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
