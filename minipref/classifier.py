"""The three-way head: which of two answers a person will prefer.

The pair is one sequence, `[CLS] prompt [SEP] A [SEP] B [SEP]`, so that every layer compares the answers with each other
and with the prompt. [CLS]'s last vector stands for the whole; the published checkpoint has no pooler and no classifier,
both start fresh.

For the small encoder that ships with the project [CLS] alone is too narrow a door: one label a row has to teach it
which tokens belong to which answer, and where to look, before it can see anything. `FieldHead` is a second door, open
during training and closed after it.
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
        return self.verdict(self.encoder.cls_vector(ids, is_token))

    def verdict(self, cls: Tensor) -> Tensor:
        """The logits for [CLS]'s last vector. Shapes: (B, D) -> (B, 3)."""
        pooled = F.gelu(self.pooler(self.pooler_dropout(cls)))           # (B, D)
        return self.head(self.head_dropout(pooled))                      # (B, C)

    def probabilities(self, ids: Tensor, is_token: Tensor, temperature: float = 1.0) -> Tensor:
        """softmax(logits / temperature), in float32 at least. Shapes: as forward -> (B, 3)."""
        logits = self(ids, is_token)
        return torch.softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature, dim=-1)


class FieldHead(nn.Module):
    """A verdict from what the last layer is given: the mean vectors of the prompt, of A and of B, and a linear map.

    A mean hands its gradient to every token of its field, so the layers learn from the first step to mark what is wrong
    with an answer in all its tokens; after that [CLS] finds it. Source: deep supervision (Lee et al. 2015, arXiv
    1409.5185). What it is worth is in docs/experiments.md.

    Shapes: x (B, L, D), field (B, L) int64 as `field_of_tokens` gives it -> logits (B, 3).
    """

    def __init__(self, config: EncoderConfig):
        super().__init__()
        self.linear = nn.Linear(3 * config.width, len(LABELS))
        nn.init.zeros_(self.linear.weight)                               # no push before there is an opinion
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor, field: Tensor) -> Tensor:
        # A power of two cancels to the last digit, and keeps float16's sums over a long field below its 65,504.
        is_in = F.one_hot(field, 4)[..., :3].to(x.dtype) * 2.0**-12      # (B, L, 3), the fourth is padding
        means = is_in.mT @ x / is_in.sum(dim=1)[..., None]               # (B, 3, D)
        return self.linear(means.flatten(1))


def field_of_tokens(ids: Tensor, sep_id: int) -> Tensor:
    """For each token of `[CLS] prompt [SEP] A [SEP] B [SEP]` 0 for the prompt, 1 for A, 2 for B, 3 for padding.

    It is the number of [SEP] before it: each one ends its field and is of it, and [CLS] is of the prompt's.
    Shapes: (B, L) -> (B, L) int64.
    """
    is_sep = (ids == sep_id).long()
    return is_sep.cumsum(dim=1) - is_sep


class WithFieldHead(nn.Module):
    """The model in training, with the second head beside the first.

    Shapes: ids, is_token (B, L) -> the model's own logits (B, 3), the field head's (B, 3).
    """

    def __init__(self, model: PreferenceModel, sep_id: int):
        super().__init__()
        self.model, self.sep_id = model, sep_id
        self.field_head = FieldHead(model.config)

    def forward(self, ids: Tensor, is_token: Tensor) -> tuple[Tensor, Tensor]:
        *_, x, last = self.model.encoder.layer_outputs(ids, is_token, cls_only=True)     # (B, L, D), (B, 1, D)
        return self.model.verdict(last[:, 0]), self.field_head(x, field_of_tokens(ids, self.sep_id))


def field_loss(own: Tensor, of_fields: Tensor, labels: Tensor) -> Tensor:
    """What the field head adds to the loss, summed over the rows: its own cross-entropy, and the divergence of the
    model's verdict from the field head's, KL(field head || model), which reaches the model alone.

    People differ, so a label is a noisy thing to learn from. The field head, which learns sooner, says of a row how
    often each label would come: the better lesson. Source: self-distillation (Zhang et al. 2019, arXiv 1905.08094),
    here from a lower layer to the last. Shapes: (B, 3), (B, 3), (B,) int64 -> one number.
    """
    its_own = F.cross_entropy(of_fields.float(), labels, reduction="sum")
    lesson = F.log_softmax(of_fields.detach().float(), dim=-1)
    return its_own + F.kl_div(F.log_softmax(own.float(), dim=-1), lesson, reduction="sum", log_target=True)
