"""AdamW, schedules, clipping and parameter groups, against torch's and transformers' implementations."""

import copy
import math

import pytest
import torch
from helpers import SMALL, large_model, relative
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from minipref.model import EncoderLayer
from minipref.optim import (
    PIECE,
    AdamW,
    _in_pieces,
    clip_gradients,
    cosine_with_warmup,
    decay_groups,
    linear_with_warmup,
)

SHAPES = [(7, 5), (5,), (40, 3), (1,), (2, 3, 4), ()]


def fresh_parameters(seed: int = 0, dtype=torch.float64) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)) for shape in SHAPES]


def two_groups(parameters: list[nn.Parameter]) -> list[dict]:
    return [{"params": parameters[:2] + parameters[2:4], "weight_decay": 0.1, "lr": 2e-2},
            {"params": parameters[4:], "weight_decay": 0.0, "betas": (0.8, 0.99), "eps": 1e-6}]


def draw_gradients(parameters: list[nn.Parameter], step: int) -> None:
    """Random gradients, the same for equal `step`: most rows of the (40, 3) one are zero, as in word embeddings, and in
    every fifth step one parameter without any."""
    generator = torch.Generator().manual_seed(1000 + step)
    for index, p in enumerate(parameters):
        p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype) * 10.0**(step % 7 - 3)
        if p.shape == (40, 3):
            p.grad[torch.rand(40, generator=generator) < 0.9] = 0
        if step % 5 == 4 and index == 1:
            p.grad = None


def assert_equal_parameters(ours, theirs, tolerance: float) -> None:
    for our, their in zip(ours, theirs):
        assert relative(our, their) < tolerance, f"parameter of shape {tuple(our.shape)}"


def test_adamw_is_torchs_over_200_steps_with_groups_and_zero_rows():
    ours, theirs = fresh_parameters(), fresh_parameters()
    our = AdamW(two_groups(ours), lr=3e-3, weight_decay=0.03)
    their = torch.optim.AdamW(two_groups(theirs), lr=3e-3, weight_decay=0.03)
    for step in range(200):
        for optimizer, parameters in ((our, ours), (their, theirs)):
            draw_gradients(parameters, step)
            for group in optimizer.param_groups:
                group["lr"] *= 0.99
            optimizer.step()
        if step in (0, 1, 10, 199):
            assert_equal_parameters(ours, theirs, 1e-12)


def test_adamw_first_step_by_hand():
    # m / (1 - beta1) = g and v / (1 - beta2) = g^2: the first step is lr * g / (|g| + eps), after the decay.
    p = nn.Parameter(torch.tensor([2.0, -3.0], dtype=torch.float64))
    p.grad = torch.tensor([0.5, -1e-8], dtype=torch.float64)
    AdamW([p], lr=0.1, eps=1e-8, weight_decay=0.2).step()
    wanted = [2 * (1 - 0.02) - 0.1 * 0.5 / (0.5 + 1e-8), -3 * (1 - 0.02) + 0.1 * 1e-8 / (1e-8 + 1e-8)]
    assert relative(p, torch.tensor(wanted, dtype=torch.float64)) < 1e-14


def test_adamw_decay_is_decoupled_from_the_gradient():
    # Coupled decay would go through the moments: with a zero gradient its step is lr for every weight.
    p = nn.Parameter(torch.tensor([4.0, 0.5], dtype=torch.float64))
    p.grad = torch.zeros_like(p)
    AdamW([p], lr=0.1, weight_decay=0.5).step()
    assert relative(p, torch.tensor([3.8, 0.475], dtype=torch.float64)) < 1e-14


def test_adamw_moves_rows_whose_gradient_is_zero_as_long_as_their_moments_do():
    p = nn.Parameter(torch.ones(2, 3, dtype=torch.float64))
    optimizer = AdamW([p], lr=0.1, weight_decay=0.0)
    p.grad = torch.tensor([[1.0] * 3, [0.0] * 3], dtype=torch.float64)
    optimizer.step()
    p.grad = torch.zeros_like(p)
    before = p.detach().clone()
    optimizer.step()
    assert (p[0] < before[0]).all()
    assert torch.equal(p[1], torch.ones(3, dtype=torch.float64))


@pytest.mark.parametrize("gaps_in", ["nothing", "the parameter", "the gradient"])
def test_adamw_of_a_tensor_larger_than_a_piece_is_torchs(gaps_in):
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(3, PIECE // 2 + 123, generator=generator)
    ours, theirs = (nn.Parameter(start.T.contiguous().T if gaps_in == "the parameter" else start.clone())
                    for _ in range(2))
    optimizers = AdamW([ours], lr=1e-2), torch.optim.AdamW([theirs], lr=1e-2)
    for _ in range(3):
        gradient = torch.randn(start.shape, generator=generator)
        ours.grad = gradient.T.contiguous().T if gaps_in == "the gradient" else gradient
        theirs.grad = gradient.clone()
        for optimizer in optimizers:
            optimizer.step()
    assert ours.is_contiguous() == (gaps_in != "the parameter")
    assert relative(ours, theirs) < 1e-6


def test_large_tensors_are_cut_into_pieces_and_small_ones_come_whole():
    large, small = torch.zeros(2, PIECE + 3), torch.zeros(2, PIECE // 2)
    assert [len(piece) for piece, _ in _in_pieces(large, large)] == [PIECE, PIECE, 6]
    assert [tuple(piece.shape) for piece, in _in_pieces(small)] == [small.shape]
    assert len(list(_in_pieces(large, large.T.contiguous().T))) == 1, "memory with gaps has no common pieces"


@pytest.mark.parametrize("into", [AdamW, torch.optim.AdamW])
@pytest.mark.parametrize("out_of", [AdamW, torch.optim.AdamW])
def test_adamw_state_goes_in_and_out_and_to_torch_and_back(out_of, into):
    straight, moved = fresh_parameters(), fresh_parameters()
    reference = torch.optim.AdamW(two_groups(straight), lr=3e-3)
    optimizer = out_of(two_groups(moved), lr=3e-3)
    for step in range(20):
        if step == 10:
            state = copy.deepcopy(optimizer.state_dict())
            optimizer = into(two_groups(moved), lr=1.0, weight_decay=0.9)     # all overwritten by the state
            optimizer.load_state_dict(state)
        for other, parameters in ((reference, straight), (optimizer, moved)):
            draw_gradients(parameters, step)
            other.step()
    assert_equal_parameters(moved, straight, 1e-12)


def test_adamw_counts_steps_for_each_parameter():
    p, late = (nn.Parameter(torch.ones(2, dtype=torch.float64)) for _ in range(2))
    optimizer = AdamW([p, late], lr=0.1, weight_decay=0.0)
    for step in range(3):
        p.grad = torch.ones_like(p)
        late.grad = torch.ones_like(late) if step == 2 else None
        optimizer.step()
    assert relative(late, torch.full((2,), 0.9, dtype=torch.float64)) < 1e-7, "its first step, with a first step's bias"


def test_adamw_closure_is_called_with_gradients_on_and_its_loss_returned():
    p = nn.Parameter(torch.tensor([3.0]))
    optimizer = AdamW([p], lr=0.1, weight_decay=0.0)

    def closure():
        optimizer.zero_grad()
        loss = (p * p).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) == 9.0
    assert p.item() == pytest.approx(2.9)


@pytest.mark.parametrize("wrong", [{"lr": -1.0}, {"eps": -1e-8}, {"weight_decay": -0.1}, {"betas": (1.0, 0.9)},
                                   {"betas": (0.9, -0.1)}, {"lr": float("nan")}])
def test_adamw_refuses_hyper_parameters_out_of_range(wrong):
    with pytest.raises(ValueError, match="out of range"):
        AdamW(fresh_parameters(), **wrong)


def test_adamw_accepts_the_ends_of_the_ranges():
    p = nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    AdamW([p], lr=0.0, betas=(0.0, 0.0), eps=0.0, weight_decay=0.0).step()
    assert torch.equal(p, torch.ones(3))


def test_adamw_refuses_sparse_gradients():
    table = nn.Embedding(5, 2, sparse=True)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="dense"):
        AdamW(table.parameters()).step()


# The schedule.

@pytest.mark.parametrize("step, wanted", [
    (0, 0.0), (1, 0.25), (2, 0.5), (3, 0.75), (4, 1.0),                       # four steps of warmup
    (6, 0.5 * (1 + math.cos(math.pi / 4))), (8, 0.5), (10, 0.5 * (1 - math.cos(math.pi / 4))),
    (11, 0.5 * (1 - math.cos(math.pi / 8))), (12, 0.0), (13, 0.0), (1000, 0.0),
])
def test_schedule_follows_the_table(step, wanted):
    assert cosine_with_warmup(step, 12, 4, 2e-5) == pytest.approx(2e-5 * wanted, rel=1e-12, abs=1e-20)


def test_schedule_without_warmup_starts_at_the_peak():
    assert cosine_with_warmup(0, 10, 0, 3e-4) == 3e-4


def test_schedule_that_is_all_warmup_never_passes_the_peak():
    assert [cosine_with_warmup(step, 4, 4, 1.0) for step in range(6)] == [0.0, 0.25, 0.5, 0.75, 0.0, 0.0]


@given(total=st.integers(1, 200), warmup=st.integers(0, 100))
@settings(max_examples=30)
def test_schedule_is_that_of_transformers(total, warmup):
    pytest.importorskip("transformers")
    from transformers import get_cosine_schedule_with_warmup
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.7)
    schedule = get_cosine_schedule_with_warmup(optimizer, warmup, total)
    for step in range(total):
        assert cosine_with_warmup(step, total, warmup, 0.7) == pytest.approx(schedule.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        schedule.step()


# Clipping.

@pytest.mark.parametrize("max_norm", [0.5, 3.0, 1e6])
def test_clipping_is_torchs(max_norm):
    ours, theirs = fresh_parameters(), fresh_parameters()
    for parameters in (ours, theirs):
        draw_gradients(parameters, step=4)                    # 4: one parameter has no gradient
    norm = clip_gradients(ours, max_norm)
    wanted = torch.nn.utils.clip_grad_norm_(theirs, max_norm)
    assert norm == pytest.approx(wanted.item(), rel=1e-12)
    for our, their in zip(ours, theirs):
        if their.grad is None:
            assert our.grad is None
        else:
            assert relative(our.grad, their.grad) < 1e-5      # torch divides by norm + 1e-6


def test_clipping_scales_to_the_norm_exactly_and_leaves_smaller_ones_alone():
    parameters = fresh_parameters()
    draw_gradients(parameters, 1)
    before = [p.grad.clone() for p in parameters]
    norm = clip_gradients(parameters, 1e9)
    assert all(torch.equal(p.grad, g) for p, g in zip(parameters, before))
    clip_gradients(parameters, norm / 2)
    assert math.sqrt(sum(p.grad.square().sum().item() for p in parameters)) == pytest.approx(norm / 2, rel=1e-12)


@pytest.mark.parametrize("poison", [math.inf, math.nan])
def test_clipping_reports_a_norm_that_is_not_finite_and_touches_nothing(poison):
    parameters = fresh_parameters()
    draw_gradients(parameters, 1)
    parameters[2].grad[3, 1] = poison
    before = [p.grad.clone() for p in parameters]
    assert not math.isfinite(clip_gradients(parameters, 1.0))
    assert all(torch.equal(p.grad.nan_to_num(), g.nan_to_num()) for p, g in zip(parameters, before))


def test_clipping_of_nothing_is_zero():
    assert clip_gradients(fresh_parameters(), 1.0) == 0.0


# The groups.

def test_matrices_and_tables_decay_and_biases_and_norms_do_not():
    model = large_model(SMALL)
    decaying, free = decay_groups(model, 0.01)
    names = {id(p): name for name, p in model.named_parameters()}
    assert decaying["weight_decay"] == 0.01
    assert free["weight_decay"] == 0.0
    for p in decaying["params"]:
        assert names[id(p)].endswith("weight"), names[id(p)]
        assert "norm" not in names[id(p)], names[id(p)]
    for p in free["params"]:
        assert names[id(p)].endswith("bias") or "norm" in names[id(p)], names[id(p)]
    assert len(decaying["params"]) + len(free["params"]) == len(names)


def test_frozen_parameters_are_in_no_group():
    layer = EncoderLayer(SMALL)
    layer.ff_in.weight.requires_grad_(False)
    layer.ff_norm.bias.requires_grad_(False)
    groups = decay_groups(layer, 0.01)
    assert sum(len(group["params"]) for group in groups) == len(list(layer.parameters())) - 2
    assert not any(p is layer.ff_in.weight or p is layer.ff_norm.bias for group in groups for p in group["params"])


def test_each_layer_below_the_last_learns_more_slowly_and_the_head_at_its_own_rate():
    model = large_model(SMALL)                             # two layers
    groups = decay_groups(model, 0.01, peak_lr=1e-3, head_lr=5e-3, layer_decay=0.5)
    names = {id(p): name for name, p in model.named_parameters()}
    found = {names[id(p)]: (group["peak_lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert found.keys() == dict(model.named_parameters()).keys()
    for name, (lr, decay) in found.items():
        wanted = {"encoder.layers.1": 1e-3, "encoder.layers.0": 5e-4, "encoder": 2.5e-4, "": 5e-3}
        assert lr == pytest.approx(next(rate for part, rate in wanted.items() if name.startswith(part))), name
        assert decay == (0.01 if "norm" not in name and name.endswith("weight") else 0.0), name
    assert {group["peak_lr"] for group in decay_groups(model, 0.01, 1e-3)} == {1e-3}


def test_the_linear_schedule_is_transformers():
    transformers = pytest.importorskip("transformers")
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=3e-4)
    theirs = transformers.get_linear_schedule_with_warmup(optimizer, 7, 50)
    for step in range(55):
        assert linear_with_warmup(step, 50, 7, 3e-4) == pytest.approx(theirs.get_last_lr()[0], abs=1e-18)
        optimizer.step()
        theirs.step()


def test_the_linear_schedule_without_warmup_starts_at_the_peak_and_ends_at_0():
    assert [linear_with_warmup(step, 4, 0, 1.0) for step in range(6)] == [1.0, 0.75, 0.5, 0.25, 0.0, 0.0]
    assert [linear_with_warmup(step, 2, 2, 1.0) for step in range(4)] == [0.0, 0.5, 0.0, 0.0]
