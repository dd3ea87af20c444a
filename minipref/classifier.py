"""The three-way head: which of two answers a person will prefer.

The pair is one sequence, `[CLS] prompt [SEP] A [SEP] B [SEP]`, so that every layer compares the answers with each other
and with the prompt. [CLS]'s last vector stands for the whole; the published checkpoint has no pooler and no classifier,
both start fresh.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minipref.config import LABELS, EncoderConfig
from minipref.encoder import Encoder


class PreferenceModel(nn.Module):
    """Encoder, pooler and head. Shapes: ids (B, L) int64, is_token (B, L) bool -> logits (B, 3): A, B, tie."""

    def __init__(self, config: EncoderConfig):
        super().__init__()
        D, C = config.width, len(LABELS)
        self.encoder = Encoder(config)
        self.pooler = nn.Linear(D, D)
        self.head = nn.Linear(D, C)
        self.pooler_dropout = nn.Dropout(config.pooler_dropout)
        self.head_dropout = nn.Dropout(config.head_dropout)

    @property
    def config(self) -> EncoderConfig:
        return self.encoder.config

    def forward(self, ids: Tensor, is_token: Tensor) -> Tensor:
        cls = self.encoder.cls_vector(ids, is_token)                     # (B, D)
        pooled = F.gelu(self.pooler(self.pooler_dropout(cls)))           # (B, D)
        return self.head(self.head_dropout(pooled))                      # (B, C)

    def probabilities(self, ids: Tensor, is_token: Tensor, temperature: float = 1.0) -> Tensor:
        """softmax(logits / temperature), in float32 at least. Shapes: as forward -> (B, 3)."""
        logits = self(ids, is_token)
        return torch.softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature, dim=-1)
