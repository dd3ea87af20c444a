"""Checks what you wrote for the building exercises of docs/exercises.md.

    python docs/exercises.py buckets mine.py          or attention, adamw, temperature, head

It imports your file, runs the function or class that the exercise asks for beside the project's, and says either what
is right or the first thing that is not. Exit code 0: it is right; 1: not yet; 2: nothing to check.
"""

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import numpy as np  # noqa: E402 - these need the path
import torch  # noqa: E402
from torch import nn  # noqa: E402

import minipref  # noqa: E402
from minipref.checkpoint import load_classifier  # noqa: E402
from minipref.data import Pair  # noqa: E402
from minipref.explain import explain  # noqa: E402
from minipref.metrics import evaluate, swap_averaged  # noqa: E402
from minipref.model import DisentangledSelfAttention, distance_buckets  # noqa: E402
from minipref.predictor import Judge  # noqa: E402
from minipref.runtime import InputError  # noqa: E402

TINY = ROOT / "weights" / "minipref-tiny"
TEXT = ("Which of the two planets is larger, Venus or Mars?", "Venus is the larger one; its radius is 6,052 km.",
        "Both are planets, and neither of them is as large as Jupiter.")


class NotYet(Exception):
    """What is not right, in one line."""


def right(condition: bool, otherwise: str) -> None:
    if not condition:
        raise NotYet(otherwise)


def buckets(log_bucket: Callable) -> str:
    """`log_bucket(distance, position_buckets, max_distance)`: int64 tensor -> int64 tensor."""
    for position_buckets, max_distance in ((256, 512), (8, 24), (16, 64)):
        distance = torch.arange(-3 * max_distance, 3 * max_distance)
        found, wanted = (function(distance, position_buckets, max_distance)
                         for function in (log_bucket, minipref.log_bucket))
        wrong = distance[found != wanted]
        right(not len(wrong), f"{position_buckets} buckets, max_distance {max_distance}: {len(wrong)} distances are in "
              f"another bucket, {wrong[:5].tolist()} among them")
    return "every distance is in its bucket"


def attention(mine: Callable) -> str:
    """`attention(q, k, v, pos_q, pos_k, attention_mask, buckets)` -> (B, H, L, d), differentiable."""
    position_buckets, max_distance = 8, 24
    for lengths in ([1], [2, 5], [20, 13], [31]):
        generator = torch.Generator().manual_seed(len(lengths))
        L, shape = max(lengths), (len(lengths), 2, max(lengths), 6)
        inputs = [torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_()
                  for s in [shape] * 3 + [(2, 2 * position_buckets, 6)] * 2]
        attention_mask = torch.arange(L) < torch.tensor(lengths)[:, None]
        found = mine(*inputs, attention_mask, distance_buckets(L, position_buckets, max_distance))
        wanted = minipref.attention_by_definition(*inputs, attention_mask, position_buckets, max_distance)
        weights = torch.randn(shape, generator=generator, dtype=torch.float64) * attention_mask[:, None, :, None]
        names = ("values", *(f"gradient of {name}" for name in ("q", "k", "v", "pos_q", "pos_k")))
        pairs = [(found * weights.bool(), wanted * weights.bool()),
                 *zip(*(torch.autograd.grad((out * weights).sum(), inputs) for out in (found, wanted)))]
        for name, (f, w) in zip(names, pairs):
            apart = (f - w).abs().max().item()
            right(apart < 1e-9, f"lengths {lengths}: {name} differs by {apart:.1e} from the definition")
    return "values and gradients match the definition" + (parity(mine) or "; not compared: transformers is missing")


def parity(mine: Callable) -> str:
    """The parity test of tests/test_parity.py with `mine` in every layer; "" without transformers."""
    if importlib.util.find_spec("transformers") is None:
        return ""
    from helpers import SMALL
    from test_parity import assert_parity

    plain = DisentangledSelfAttention.attend
    DisentangledSelfAttention.attend = lambda layer, *arguments: mine(*arguments)
    try:
        assert_parity(SMALL, [20, 13], torch.float64)
    except AssertionError as problem:
        raise NotYet(f"it equals the definition, but not transformers: {str(problem).splitlines()[0]}") from None
    finally:
        DisentangledSelfAttention.attend = plain
    return ", and a model with it matches transformers"


def adamw(mine: type) -> str:
    """`AdamW(params, lr, betas, eps, weight_decay)` with `step()` and `zero_grad()`."""
    def start() -> list[nn.Parameter]:
        generator = torch.Generator().manual_seed(0)
        return [nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64)) for shape in ((4, 3), (3,))]

    options = {"lr": 0.03, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}
    ours, theirs = start(), start()
    optimizers = minipref.AdamW(ours, **options), mine(theirs, **options)
    draw = torch.Generator().manual_seed(1)
    for step in range(1, 51):
        gradients = [torch.randn(p.shape, generator=draw, dtype=torch.float64) for p in ours]
        for optimizer, parameters in zip(optimizers, (ours, theirs)):
            optimizer.zero_grad()
            for p, g in zip(parameters, gradients):
                p.grad = g.clone()
            optimizer.step()
        apart = max((a - b).abs().max().item() for a, b in zip(ours, theirs))
        right(apart < 1e-9, f"after step {step} a parameter is {apart:.1e} away")
    return "50 steps end where minipref.AdamW's do"


def temperature(fit_temperature: Callable) -> str:
    """`fit_temperature(logits, labels)`: (N, orders, 3), (N,) -> float."""
    draw = np.random.default_rng(0)
    for factor in (0.5, 1.0, 3.0):
        honest = draw.normal(size=(4000, 2, 3))
        labels = (draw.random((4000, 1)) > swap_averaged(honest, 1.0).cumsum(1)).sum(1).clip(max=2)
        logits = factor * honest
        found, best = (evaluate(swap_averaged(logits, t), labels)["log_loss"] for t in
                       (fit_temperature(logits, labels), minipref.metrics.fit_temperature(logits, labels)))
        right(found < best + 1e-4, f"logits {factor} times as sure as they should be: your temperature's log loss is "
              f"{found:.5f}, and {best:.5f} can be had")
    return "no temperature does better"


def head(answer: Callable) -> str:
    """`head()` -> (layer, head), from 1: the head of the bundled encoder that looks most at the next token."""
    torch.manual_seed(0)
    judge = Judge(load_classifier(TINY), minipref.load_tokenizer(TINY), 96)
    seen = explain(judge, Pair("", *((text,) for text in TEXT)), 96)
    share = np.diagonal(seen.probs, 1, -2, -1).mean(-1)                  # (N, H): probability of the key i + 1
    best = tuple(int(n) + 1 for n in np.unravel_index(share.argmax(), share.shape))
    layer, number = answer()
    right((layer, number) == best, f"layer {layer}, head {number} gives the next token "
          f"{share[layer - 1, number - 1]:.0%}; another gives it {share.max():.0%}")
    return f"it gives the next token {share.max():.0%} of its attention"


CHECKS = {"buckets": (buckets, "log_bucket"), "attention": (attention, "attention"), "adamw": (adamw, "AdamW"),
          "temperature": (temperature, "fit_temperature"), "head": (head, "head")}


def written_by_reader(path: str, name: str):
    """What the reader's file calls `name`. Errors: `InputError`."""
    if not Path(path).is_file():
        raise InputError(file=path, found="no such file", expected=f"a Python file that defines {name}")
    spec = importlib.util.spec_from_file_location("mine", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, name):
        raise InputError(file=path, found=f"nothing that is called {name}", expected="what the exercise asks for")
    return getattr(module, name)


def main(arguments: list[str]) -> int:
    try:
        if len(arguments) != 2 or arguments[0] not in CHECKS:
            raise InputError(found=" ".join(arguments) or "nothing", expected=f"one of {', '.join(CHECKS)}, and a file")
        check, name = CHECKS[arguments[0]]
        print(f"right: {check(written_by_reader(arguments[1], name))}")
        return 0
    except NotYet as problem:
        print(f"not yet: {problem}")
        return 1
    except InputError as problem:
        print(f"exercises.py: {problem}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
