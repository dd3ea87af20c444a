"""An auxiliary head for training (deep supervision and self-distillation), discarded afterwards.

[CLS] alone gives a weak training signal to the small bundled encoder: from one label a row it must learn which tokens
belong to which response, and where to attend. The auxiliary head classifies the same row from the mean hidden states of
its three segments, so every token receives a gradient. docs/experiments.md reports its effect.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from minipref.config import LABELS, EncoderConfig
from minipref.model import PreferenceModel


class AuxiliaryHead(nn.Module):
    """A linear classifier on the mean hidden states of the prompt, of A and of B, before the last layer.

    Shapes: x (B, L, D), segment_ids (B, L) int64 -> logits (B, 3).
    Paper: deep supervision (Lee et al. 2015, arXiv 1409.5185).
    """

    def __init__(self, config: EncoderConfig):
        super().__init__()
        self.linear = nn.Linear(3 * config.hidden_size, len(LABELS))
        nn.init.zeros_(self.linear.weight)                           # no gradient to the encoder from an untrained head
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor, segment_ids: Tensor) -> Tensor:
        # In float16 a sum over a long segment could exceed 65,504. The factor 2^-12 cancels in the division.
        is_in = F.one_hot(segment_ids, 4)[..., :3].to(x.dtype) * 2.0**-12        # (B, L, 3), the fourth is padding
        means = is_in.mT @ x / is_in.sum(dim=1)[..., None]                       # (B, 3, D)
        return self.linear(means.flatten(1))


def segment_ids(input_ids: Tensor, sep_id: int) -> Tensor:
    """0 for tokens of the prompt, 1 for A, 2 for B, 3 for padding: the number of [SEP] before the token.

    A [SEP] belongs to the segment that it ends, [CLS] to the prompt. Shapes: (B, L) -> (B, L) int64.
    """
    is_sep = (input_ids == sep_id).long()
    return is_sep.cumsum(dim=1) - is_sep


class ModelWithAuxiliaryHead(nn.Module):
    """The model in training. Shapes: input_ids, attention_mask (B, L) -> logits (B, 3), auxiliary logits (B, 3)."""

    def __init__(self, model: PreferenceModel, sep_id: int):
        super().__init__()
        self.model, self.sep_id = model, sep_id
        self.auxiliary_head = AuxiliaryHead(model.config)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        x, cls = self.model.last_states(input_ids, attention_mask)               # (B, L, D), (B, D)
        return self.model.classify(cls), self.auxiliary_head(x, segment_ids(input_ids, self.sep_id))


def aux_loss(logits: Tensor, aux_logits: Tensor, labels: Tensor) -> Tensor:
    """The auxiliary head's cross entropy plus KL(auxiliary head || model), summed over the rows.

    The divergence trains the model only. Annotators disagree, so soft targets are less noisy than hard labels.
    Shapes: (B, 3), (B, 3), (B,) int64 -> ().
    Paper: self-distillation (Zhang et al. 2019, arXiv 1905.08094), here from a lower layer to the last.
    """
    cross_entropy = F.cross_entropy(aux_logits.float(), labels, reduction="sum")
    targets = F.log_softmax(aux_logits.detach().float(), dim=-1)
    return cross_entropy + F.kl_div(F.log_softmax(logits.float(), dim=-1), targets, reduction="sum", log_target=True)
