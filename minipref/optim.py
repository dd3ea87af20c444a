"""AdamW, the learning-rate schedule and gradient clipping.

What is unusual here: AdamW is limited by memory bandwidth, and the word embeddings are 98 of v3-small's 142 million
parameters. Applied to whole tensors, each of AdamW's eight elementwise operations reads them from memory again. The
update therefore runs piece by piece: a piece of the parameter, its gradient and its two moments stay in the cache for
all eight operations, so memory is read once.
"""

import math
import re
from collections.abc import Iterable

import torch
from torch import Tensor, nn

PIECE = 1 << 17        # elements: four float32 arrays of this length are 2 MiB, about one core's second-level cache


class AdamW(torch.optim.Optimizer):
    """Adam with decoupled weight decay; a drop-in for `torch.optim.AdamW`, its state_dict included.

    At step t, for a parameter p with gradient g (all elementwise):

        p <- p - lr * weight_decay * p                       decay: on the weight, not through the gradient
        m <- beta1 * m + (1 - beta1) * g                     mean of gradients
        v <- beta2 * v + (1 - beta2) * g * g                 mean of their squares
        p <- p - lr * (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps)

    m and v start at zero; dividing by 1 - beta^t corrects that bias.

    Paper: Loshchilov and Hutter, Decoupled Weight Decay Regularization (arXiv 1711.05101), algorithm 2.
    Differs: lr is the paper's eta_t * alpha and scales the decay too; there eta_t alone does.
    Errors: ValueError for a hyperparameter out of range, RuntimeError for a sparse gradient.
    """

    def __init__(self, params_or_groups: Iterable, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999),
                 eps: float = 1e-8, weight_decay: float = 0.01):
        if not (lr >= 0 and eps >= 0 and weight_decay >= 0 and all(0 <= beta < 1 for beta in betas)):
            raise ValueError(f"lr {lr}, betas {betas}, eps {eps} or weight_decay {weight_decay} is out of range")
        super().__init__(params_or_groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._update(p, group)
        return loss

    def _update(self, p: Tensor, group: dict) -> None:
        if p.grad.is_sparse:
            raise RuntimeError("AdamW needs dense gradients: its moments move even where a gradient is zero")
        state = self.state[p]
        if not state:
            state["step"] = torch.tensor(0.0)
            state["exp_avg"] = torch.zeros_like(p, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(p, memory_format=torch.preserve_format)
        state["step"] += 1
        t, (beta1, beta2) = state["step"].item(), group["betas"]
        step_size = group["lr"] / (1 - beta1**t)
        root_correction = math.sqrt(1 - beta2**t)

        for p_, g, m, v in _in_pieces(p, p.grad, state["exp_avg"], state["exp_avg_sq"]):
            p_.mul_(1 - group["lr"] * group["weight_decay"])
            m.lerp_(g, 1 - beta1)
            v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
            p_.addcdiv_(m, v.sqrt().div_(root_correction).add_(group["eps"]), value=-step_size)


def _in_pieces(*tensors: Tensor) -> Iterable[tuple[Tensor, ...]]:
    """Tensors of one shape, cut into the same flat pieces. Small or non-contiguous ones are not cut."""
    if tensors[0].numel() <= PIECE or not all(t.is_contiguous() for t in tensors) or tensors[0].is_cuda:
        return [tensors]                   # on a GPU every kernel launch costs more than the cache saves
    return zip(*(t.view(-1).split(PIECE) for t in tensors))


LAYER = re.compile(r"\blayers\.(\d+)\.")
EMBEDDINGS = re.compile(r"\b(word|rel)_(embeddings|norm)\.")


def decay_groups(model: nn.Module, weight_decay: float, peak_lr: float = 0.0, head_lr: float = 0.0,
                 layer_decay: float = 1.0) -> list[dict]:
    """Groups of trainable parameters with the same weight decay and the same `peak_lr`.

    Weight matrices and embeddings decay. Biases and LayerNorms do not, as in Microsoft's fine-tuning code.

    The last layer's peak learning rate is `peak_lr`. Each lower layer has `layer_decay` times the rate of the layer
    above it, and the embeddings count as one more layer at the bottom: lower layers hold more general features. The new
    head has `head_lr`, or `peak_lr` if that is 0.
    Paper: layer-wise decay: ELECTRA (arXiv 2003.10555), appendix B; before it ULMFiT (arXiv 1801.06146), section 3.2.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    depth = 1 + max((int(found[1]) for name, _ in named if (found := LAYER.search(name))), default=0)
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for decays in (True, False):
        for name, p in named:
            if found := LAYER.search(name):
                lr = peak_lr * layer_decay ** (depth - 1 - int(found[1]))
            elif EMBEDDINGS.search(name):
                lr = peak_lr * layer_decay**depth
            else:
                lr = head_lr or peak_lr
            if (p.ndim >= 2) == decays:
                groups.setdefault((weight_decay if decays else 0.0, lr), []).append(p)
    return [{"params": params, "weight_decay": decay, "peak_lr": lr} for (decay, lr), params in groups.items()]


def cosine_with_warmup(step: int, total_steps: int, warmup_steps: int, peak_lr: float) -> float:
    """The learning rate at `step`, counted from 0: linear warmup, then half a cosine down to 0.

    The same numbers as transformers' `get_cosine_schedule_with_warmup`, as a pure function.
    """
    if step < warmup_steps:                                             # 1. warming up, from 0
        return peak_lr * step / warmup_steps
    if step >= total_steps:                                             # 2. past the end
        return 0.0
    progress = (step - warmup_steps) / (total_steps - warmup_steps)     # 3. 0 at the peak, 1 at the end
    return peak_lr * 0.5 * (1 + math.cos(math.pi * progress))


def linear_with_warmup(step: int, total_steps: int, warmup_steps: int, peak_lr: float) -> float:
    """The same with a linear decrease, as in Microsoft's fine-tuning and `get_linear_schedule_with_warmup`."""
    if step < warmup_steps:
        return peak_lr * step / warmup_steps
    return peak_lr * max(0.0, (total_steps - step) / max(total_steps - warmup_steps, 1))


def learning_rates(schedule: str, step: int, total_steps: int, warmup_steps: int, peaks: Iterable[float]
                   ) -> list[float]:
    """The learning rates at `step` for several peak values."""
    rate = {"cosine": cosine_with_warmup, "linear": linear_with_warmup}[schedule]
    return [rate(step, total_steps, warmup_steps, peak) for peak in peaks]


@torch.no_grad()
def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> float:
    """Scale all gradients so that their joint L2 norm is at most `max_norm`; return the norm before scaling.

    If the norm is not finite the gradients are left unchanged, and the caller must skip the step.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    if not gradients:
        return 0.0
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients))).item()
    if math.isfinite(norm) and norm > max_norm:
        torch._foreach_mul_(gradients, max_norm / norm)
    return norm
