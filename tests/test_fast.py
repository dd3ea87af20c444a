"""`accelerate(model)` against the plain model, and the memory, dropout and speed of the fast forms.

`test_attention.py` compares every form of attention with the definition.
"""

import copy
import ctypes
import math
import os
import platform
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from helpers import SMALL, gradients, large_model, padded_batch, relative, resized, worst_gradient
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import minipref.fast.attention as fast
import minipref.fast.layers as fast_layers
from minipref.config import EncoderConfig
from minipref.fast import accelerate
from minipref.fast.attention import blockwise_attention, relative_shift, select_backend, token_groups
from minipref.fast.layers import DropoutMask, FastDropout, feed_forward, tune_malloc
from minipref.model import (
    Encoder,
    PreferenceModel,
    attention_scores,
    distance_buckets,
    init_weights,
    masked_softmax,
    relative_index,
)

SPAN, MAX_DISTANCE = 8, 24


def inputs(B=2, H=2, L=20, d=6, dtype=torch.float64, seed=0):
    """q, k, v, pos_q, pos_k with requires_grad, and the table row of each distance."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(B, H, L, d)] * 3 + [(H, 2 * SPAN, d)] * 2
    tensors = [(1.5 * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype).requires_grad_()
               for shape in shapes]
    return tensors, distance_buckets(L, SPAN, MAX_DISTANCE)


def tokens(lengths, L):
    return torch.arange(L) < torch.tensor(lengths)[:, None]


def values_and_gradients(out, tensors, seed=7):
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return [out.detach(), *torch.autograd.grad((out * weights.to(out.dtype)).sum(), tensors)]


# Blocks, tiles and groups.

@given(lengths=st.lists(st.integers(1, 20), min_size=1, max_size=5),
       block_scores=st.sampled_from([1, 60, 400, 2500]), lanes=st.sampled_from([1, 4, 32]), seed=st.integers(0, 99))
@settings(max_examples=40)
def test_cutting_into_blocks_changes_nothing(lengths, block_scores, lanes, seed):
    L = 20
    tensors, rows = inputs(B=len(lengths), L=L, seed=seed)
    attention_mask = tokens(lengths, L)
    real = attention_mask[:, None, :, None]
    whole = values_and_gradients(blockwise_attention(*tensors, attention_mask, rows) * real, tensors)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fast, "BLOCK_SCORES", block_scores)
        patch.setattr(fast, "LANES", lanes)
        fast.tiles.cache_clear()
        cut = values_and_gradients(blockwise_attention(*tensors, attention_mask, rows) * real, tensors)
    fast.tiles.cache_clear()
    for found, wanted in zip(cut, whole):
        assert relative(found, wanted) < 1e-12


@given(lengths=st.lists(st.integers(0, 9), min_size=1, max_size=12), most=st.sampled_from([1, 40, 100, 10**6]))
def test_groups_hold_every_row_that_has_tokens_once_and_no_more_scores_than_asked_for(lengths, most):
    attention_mask = tokens(lengths, 9)
    attention_mask[:, 1] &= False                                # a hole in every sequence that gets so far
    ends = [row.nonzero().max().item() + 1 if row.any() else 0 for row in attention_mask]
    seen = []
    for batch, n, padding in token_groups(attention_mask, most):
        members = range(len(lengths))[batch]
        seen += members
        assert n == max(ends[b] for b in members)
        assert len(members) == 1 or len(members) * n * n <= most
        expected = ~attention_mask[batch, None, :n]
        assert torch.equal(padding, expected) if expected.any() else padding is None
    assert len(seen) == len(set(seen)) and {b for b, end in enumerate(ends) if end} <= set(seen)


def test_the_relative_shift_are_a_view_of_the_products_that_belong_together():
    product = torch.arange(2 * 3 * 9).view(2, 3, 9)
    view = relative_shift(product, 5)
    assert view.shape == (2, 3, 5)
    assert all(view[g, a, b] == product[g, a, b - a + 2] for g in range(2) for a in range(3) for b in range(5))
    assert view.untyped_storage().data_ptr() == product.untyped_storage().data_ptr()
    later = torch.arange(3 * 3 * 9).view(3, 3, 9)[1:]      # starts in the middle of its memory
    assert torch.equal(relative_shift(later, 5), relative_shift(later.clone(), 5))


def test_the_relative_shift_refuse_what_their_strides_would_read_wrongly():
    with pytest.raises(AssertionError):
        relative_shift(torch.zeros(2, 9, 3).mT, 5)
    with pytest.raises(AssertionError):
        relative_shift(torch.zeros(2, 3, 6), 5)


def test_padding_costs_no_computation(monkeypatch):
    monkeypatch.setattr(fast, "BLOCK_SCORES", 30 * 30)         # no room for two rows of the batch
    computed, compute_probs = [], fast.Block.compute_probs

    def recorded(block, padding, space, reach):
        computed.append(tuple(block.probs.shape))
        assert padding is None
        compute_probs(block, padding, space, reach)

    monkeypatch.setattr(fast.Block, "compute_probs", recorded)
    tensors, rows = inputs(B=3, H=1, L=40)
    out = blockwise_attention(*tensors, tokens([30, 0, 29], 40), rows)
    assert computed == [(1, 30, 30), (1, 29, 29)]
    assert (out[0, :, 30:] == 0).all() and (out[1] == 0).all() and (out[2, :, 29:] == 0).all()


# Memory kept for the backward pass.

def bytes_kept(function) -> int:
    """Bytes that autograd stores for the backward pass of a computation."""
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(
            lambda x: kept.setdefault(x.untyped_storage().data_ptr(), x) is None or x, lambda x: x):
        out = function()
    total = sum(x.untyped_storage().nbytes() for x in kept.values())
    assert out.requires_grad
    return total


def test_attention_keeps_its_inputs_and_no_square():
    tensors, rows = inputs(B=1, H=1, L=300, d=4, dtype=torch.float32)
    attention_mask = torch.ones(1, 300, dtype=torch.bool)
    kept = bytes_kept(lambda: blockwise_attention(*tensors, attention_mask, rows, 0.1))
    assert kept <= sum(x.nbytes for x in (*tensors, attention_mask, rows))
    assert kept < 300 * 300


def test_feed_forward_keeps_one_hidden_tensor():
    ff_in, ff_out = nn.Linear(8, 64), nn.Linear(64, 8)
    x = torch.randn(2, 50, 8)
    hidden = 2 * 50 * 64 * 4
    assert hidden < bytes_kept(lambda: feed_forward(x, ff_in, ff_out)) < 1.5 * hidden
    assert bytes_kept(lambda: ff_out(F.gelu(ff_in(x)))) > 2 * hidden, "this test could not tell"


def test_dropout_keeps_nothing():
    x = torch.randn(50, 40, requires_grad=True)
    assert bytes_kept(lambda: FastDropout(0.1)(x)) == 0


def test_second_derivatives_are_refused_and_not_wrong():
    tensors, rows = inputs(L=5)
    loss = blockwise_attention(*tensors, tokens([5, 5], 5), rows).square().sum()
    gradient, = torch.autograd.grad(loss, tensors[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


# Dropout.

def attention_with_mask(q, k, v, pos_q, pos_k, attention_mask, rows, mask):
    """The plain form with a given dropout mask (B, H, L, L), already divided by the keep probability."""
    scores = sum(attention_scores(q, k, pos_q, pos_k, relative_index(rows)))
    return (masked_softmax(scores, attention_mask) * mask) @ v


def mask_of(q, k, pos_q, pos_k, attention_mask, rows, dropout, seed):
    """The dropout mask of `blockwise_attention`, from its output with v the identity."""
    B, H, L, d = q.shape
    assert d == L, 'v must be a square'
    torch.manual_seed(seed)
    eye = torch.eye(L, dtype=q.dtype).expand(B, H, L, L)
    weighted = blockwise_attention(q, k, eye, pos_q, pos_k, attention_mask, rows, dropout)
    probs = masked_softmax(sum(attention_scores(q, k, pos_q, pos_k, relative_index(rows))), attention_mask)
    return torch.where(probs > 0, weighted / probs, 0)


@pytest.mark.parametrize("block_scores", [250, 2**17])
def test_dropout_multiplies_probabilities_by_zero_or_one_over_the_kept_share(block_scores, monkeypatch):
    monkeypatch.setattr(fast, "BLOCK_SCORES", block_scores)
    L, dropout = 20, 0.3
    tensors, rows = inputs(B=3, L=L, d=L)
    q, k, _, pos_q, pos_k = tensors
    attention_mask = tokens([20, 11, 20], L)
    attention_mask[2, 4:6] = False
    with torch.no_grad():
        mask = mask_of(q, k, pos_q, pos_k, attention_mask, rows, dropout, seed=3)
    allowed = (attention_mask[:, None, :, None] & attention_mask[:, None, None, :]).expand_as(mask)
    kept = mask[allowed]
    share = 1 - round(dropout * 2**16) / 2**16
    assert abs(share - 0.7) < 1e-5
    assert ((kept < 1e-12) | ((kept - 1 / share).abs() < 1e-6)).all()
    assert abs((kept > 0).double().mean() - 0.7) < 4 * math.sqrt(0.3 * 0.7 / len(kept))

    torch.manual_seed(3)
    real = attention_mask[:, None, :, None]
    found = values_and_gradients(blockwise_attention(*tensors, attention_mask, rows, dropout) * real, tensors)
    wanted = values_and_gradients(attention_with_mask(*tensors, attention_mask, rows, mask) * real, tensors)
    for f, w in zip(found, wanted):
        assert relative(f, w) < 1e-11


def test_dropout_passes_gradcheck():
    tensors, rows = inputs(B=2, L=6, d=3, seed=5)
    attention_mask = tokens([6, 4], 6)

    def dropped(*tensors):
        torch.manual_seed(2)
        return blockwise_attention(*tensors, attention_mask, rows, 0.4) * attention_mask[:, None, :, None]

    assert torch.autograd.gradcheck(dropped, tensors, eps=1e-6, atol=1e-7, rtol=1e-5)


def test_dropout_repeats_with_torchs_seed_and_only_with_it():
    tensors, rows = inputs()
    attention_mask = tokens([20, 20], 20)

    def drawn(seed):
        torch.manual_seed(seed)
        return [blockwise_attention(*tensors, attention_mask, rows, 0.2).detach() for _ in range(2)]

    first, again, other = drawn(1), drawn(1), drawn(2)
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    assert not torch.equal(first[0], first[1]) and not torch.equal(first[0], other[0])


def test_without_dropout_torchs_generator_is_left_alone():
    tensors, rows = inputs()
    before = torch.get_rng_state()
    blockwise_attention(*tensors, tokens([20, 20], 20), rows)
    FastDropout(0.5).eval()(tensors[0])
    FastDropout(0.0)(tensors[0])
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("rate", [0.1, 0.25, 0.5, 0.999999])
def test_dropout_masks_are_ones_in_the_share_they_state(rate):
    mask = DropoutMask(rate, seed=4)
    drawn = mask.fill(torch.empty(1000, 401, dtype=torch.float32))
    assert ((drawn == 0) | (drawn == 1)).all()
    n, keep = drawn.numel(), mask.keep
    assert keep > 0 and abs(keep - (1 - rate)) < 2e-5
    assert abs(drawn.double().mean() - keep) < 4 * math.sqrt(keep * (1 - keep) / n)
    for lag in (1, 2, 3, 4, 401):                          # neighbours, also in one word, and rows are independent
        a, b = drawn.flatten()[:-lag].double(), drawn.flatten()[lag:].double()
        assert abs(((a - keep) * (b - keep)).mean()) < 5 * keep * (1 - keep) / math.sqrt(n)
    assert not torch.equal(mask.fill(torch.empty_like(drawn)), drawn)
    assert torch.equal(DropoutMask(rate, seed=4).fill(torch.empty_like(drawn)), drawn)


@pytest.mark.parametrize("shape", [(7,), (3, 5), (2, 300, 700)])
def test_dropout_scales_what_it_keeps_and_sends_gradients_the_same_way(shape):
    x = torch.randn(shape, dtype=torch.float64).transpose(0, -1).requires_grad_()     # not contiguous
    drop = FastDropout(0.25)
    torch.manual_seed(1)
    out = drop(x)
    kept = out != 0
    assert relative(out[kept], x[kept] / 0.75) < 1e-12
    out.sum().backward()
    assert torch.equal(x.grad, kept.double() / 0.75)
    if x.numel() > 1000:
        assert abs(kept.double().mean() - 0.75) < 4 * math.sqrt(0.25 * 0.75 / x.numel())


# The feed-forward.

@pytest.mark.parametrize("frozen", [(), ("weight",), ("bias",)])
def test_feed_forward_has_the_values_and_gradients_of_its_formula(frozen):
    torch.manual_seed(0)
    ff_in, ff_out = nn.Linear(5, 9).double(), nn.Linear(9, 5).double()
    for name in frozen:
        ff_out.get_parameter(name).requires_grad_(False)
    x = torch.randn(2, 7, 5, dtype=torch.float64, requires_grad=True)
    wanting = [p for p in (x, *ff_in.parameters(), *ff_out.parameters()) if p.requires_grad]
    found = values_and_gradients(feed_forward(x, ff_in, ff_out), wanting)
    wanted = values_and_gradients(ff_out(F.gelu(ff_in(x))), wanting)
    for f, w in zip(found, wanted):
        assert relative(f, w) < 1e-13
    assert torch.autograd.gradcheck(lambda *_: feed_forward(x, ff_in, ff_out), wanting)


@pytest.mark.parametrize("tokens_at_once", [1, 3, 100])
def test_feed_forward_without_gradients_is_the_same_in_any_slices(tokens_at_once, monkeypatch):
    monkeypatch.setattr(fast_layers, "SLICE", tokens_at_once)
    torch.manual_seed(0)
    ff_in, ff_out = nn.Linear(5, 9).double(), nn.Linear(9, 5).double()
    x = torch.randn(2, 7, 5, dtype=torch.float64)
    with torch.no_grad():
        assert relative(feed_forward(x, ff_in, ff_out), ff_out(F.gelu(ff_in(x)))) < 1e-13


def test_feed_forward_under_autocast_is_no_farther_off_than_torchs_own():
    torch.manual_seed(0)
    ff_in, ff_out = nn.Linear(64, 256), nn.Linear(256, 64)
    x = torch.randn(4, 50, 64, requires_grad=True)
    wanting = [x, *ff_in.parameters(), *ff_out.parameters()]
    exact = values_and_gradients(ff_out(F.gelu(ff_in(x))), wanting)
    with torch.autocast("cpu", torch.bfloat16):
        found = values_and_gradients(feed_forward(x, ff_in, ff_out), wanting)
        theirs = values_and_gradients(ff_out(F.gelu(ff_in(x))), wanting)
    assert found[0].dtype == torch.bfloat16
    for f, t, e in zip(found, theirs, exact):
        assert f.dtype == t.dtype
        assert relative(f, e) < max(1.5 * relative(t, e), 1e-3)


# Precision, and the choice of path.

def test_autocast_leaves_float32_inputs_in_float32():
    tensors, rows = inputs(dtype=torch.float32)
    attention_mask = tokens([20, 13], 20)
    outside = values_and_gradients(blockwise_attention(*tensors, attention_mask, rows), tensors)
    with torch.autocast("cpu", torch.bfloat16):
        inside = values_and_gradients(blockwise_attention(*tensors, attention_mask, rows), tensors)
    for found, wanted in zip(inside, outside):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("length", [37, 512, 700])
def test_the_softmax_of_bfloat16_scores_is_the_float32_one_rounded(length):
    # Blocks rely on it: the kernel computes in float32 for every dtype, also in place.
    scores = 4 * torch.randn(300, length, generator=torch.Generator().manual_seed(0)).bfloat16()
    exact, rounded = torch.softmax(scores.double(), -1), torch.softmax(scores, -1)
    assert torch.equal(torch.softmax(scores, -1, out=scores), rounded)
    assert ((rounded.double() - exact).abs() <= 2**-8 * exact).all(), "one rounding, and no more"


def test_the_backend_is_blocks_on_a_cpu_and_batched_on_an_accelerator():
    assert select_backend(torch.device("cpu")) == "blocks"
    assert select_backend(torch.device("cuda")) == select_backend(torch.device("mps")) == "batched"


def test_an_accelerated_model_uses_the_backend_selected_and_the_plain_one_none(monkeypatch):
    ids, attention_mask = padded_batch(SMALL, [9])
    used = []

    def recorded(function):
        return lambda *args: (used.append(function.__name__), function(*args))[1]

    for function in (fast.blockwise_attention, fast.batched_attention, fast.cls_attention):
        monkeypatch.setattr(fast, function.__name__, recorded(function))
    model = large_model(SMALL)
    model(ids, attention_mask)
    assert used == []
    accelerate(model)
    for backend in ("blocks", "batched"):
        monkeypatch.setattr(fast, "select_backend", lambda device, backend=backend: backend)
        model(ids, attention_mask)
        model.encoder(ids, attention_mask)
    assert used == ["blockwise_attention", "cls_attention", "blockwise_attention", "blockwise_attention",
                    "batched_attention", "cls_attention", "batched_attention", "batched_attention"]


# The accelerated model against the plain one.

def results(model, ids, attention_mask):
    """Logits, every layer's output without padding, and all gradients of their sum, by name."""
    weights = torch.randn(ids.shape[1], model.config.hidden_size, dtype=torch.float64,
                          generator=torch.Generator().manual_seed(1))
    logits, states = model(ids, attention_mask), list(model.encoder.hidden_states(ids, attention_mask))
    (sum((weights.to(x.dtype) * x)[attention_mask].sum() for x in states) + logits.square().sum()).backward()
    values = {"logits": logits} | {f"layer {n}": x[attention_mask] for n, x in enumerate(states)}
    return values, gradients(model)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-11), (torch.float32, 2e-4)])
@pytest.mark.parametrize("lengths", [[1], [30, 8], [301, 40]])
def test_the_accelerated_model_is_the_plain_one(lengths, dtype, tolerance, form):
    plain = large_model(resized(SMALL, position_buckets=32, max_distance=128), dtype=dtype)
    ids, attention_mask = padded_batch(SMALL, lengths)
    values, all_gradients = results(form(plain), ids, attention_mask)
    wanted_values, wanted_gradients = results(plain, ids, attention_mask)
    for name, value in wanted_values.items():
        assert relative(values[name], value) < tolerance, f"fast differs from plain: {name}"
    worst, name = worst_gradient(all_gradients, wanted_gradients)
    assert worst < tolerance, f"fast differs from plain: the gradient of {name}"


def test_accelerating_keeps_parameters_names_and_modules_and_can_be_done_twice():
    model = large_model(resized(SMALL, hidden_dropout_prob=0.1))
    parameters, modules = dict(model.named_parameters()), dict(model.named_modules())
    assert accelerate(accelerate(model)) is model
    assert all(model.get_parameter(name) is parameter for name, parameter in parameters.items())
    assert all(model.get_submodule(name) is module for name, module in modules.items())
    assert isinstance(model, PreferenceModel) and isinstance(model.encoder, Encoder)
    assert all(isinstance(part, nn.Dropout) for name, part in model.named_modules() if name.endswith("dropout"))
    drops = {name: type(part) for name, part in model.named_modules() if isinstance(part, nn.Dropout)}
    assert {kind for name, kind in drops.items() if name.startswith("encoder.")} == {FastDropout}
    assert drops["pooler_dropout"] is drops["classifier_dropout"] is nn.Dropout, "the head's dropout draws as torch's"


def test_an_accelerated_model_can_be_copied_and_the_copy_is_its_own():
    model = accelerate(large_model(SMALL))
    ids, attention_mask = padded_batch(SMALL, [9, 4])
    wanted, twin = model(ids, attention_mask), copy.deepcopy(model)
    with torch.no_grad():
        twin.encoder.layers[0].ff_in.weight.zero_()
    assert torch.equal(model(ids, attention_mask), wanted)
    assert not torch.equal(twin(ids, attention_mask), wanted)


def test_an_encoder_alone_is_accelerated_and_gives_every_token():
    encoder = large_model(SMALL).encoder
    ids, attention_mask = padded_batch(SMALL, [30, 8])
    wanted = encoder(ids, attention_mask)
    found = accelerate(encoder)(ids, attention_mask)
    assert type(encoder) is not Encoder and found.shape == wanted.shape
    assert relative(found[attention_mask], wanted[attention_mask]) < 1e-5


def test_the_encoder_of_an_accelerated_classifier_still_gives_every_token():
    model = accelerate(large_model(SMALL))
    ids, attention_mask = padded_batch(SMALL, [30, 8])
    assert model.encoder(ids, attention_mask).shape == (2, 30, SMALL.hidden_size)
    assert relative(model.classify(model.encoder(ids, attention_mask)[:, 0]), model(ids, attention_mask)) < 1e-5


@pytest.fixture(scope="module")
def six_layers():
    """A v3-small with a small vocabulary and initial weights times 1.5, and a batch of up to 330 tokens."""
    torch.manual_seed(0)
    config = EncoderConfig(vocab_size=900)
    model = PreferenceModel(config)
    init_weights(model, std=0.03)
    return model.eval(), *padded_batch(config, [330, 211])


@pytest.mark.slow
def test_float32_probabilities_are_the_plain_forms_within_1e_5_and_bfloat16_ones_within_1e_2(six_layers):
    model, ids, attention_mask = six_layers
    with torch.inference_mode():
        plain = torch.softmax(model(ids, attention_mask), -1)
        accelerated = accelerate(copy.deepcopy(model))
        found = torch.softmax(accelerated(ids, attention_mask), -1)
        with torch.autocast("cpu", torch.bfloat16):
            rounded = torch.softmax(accelerated(ids, attention_mask).float(), -1)
    assert (found - plain).abs().max() < 1e-5
    assert 0 < (rounded - plain).abs().max() < 1e-2


def test_the_last_layer_computes_one_query_and_one_feed_forward(monkeypatch):
    seen = []
    monkeypatch.setattr("minipref.fast.feed_forward", lambda x, *layers: (seen.append(x.shape[1]),
                                                                          feed_forward(x, *layers))[1])
    model = accelerate(large_model(SMALL))
    model(*padded_batch(SMALL, [30, 8]))
    assert seen == [30, 1]


def test_the_relative_table_holds_the_rows_that_occur_and_no_others():
    encoder = accelerate(large_model(SMALL).encoder)
    everything = encoder.rel_norm(encoder.rel_embeddings.weight)
    for length in (1, 2, 7, 24, 60):
        table, buckets = encoder.relative_table(length)
        wanted = everything[distance_buckets(length, SMALL.position_buckets, SMALL.max_distance)]
        assert torch.equal(table[buckets], wanted)
        assert len(table) == len(buckets.unique())
    assert len(encoder.relative_table(1)[0]) == 1


@pytest.mark.filterwarnings("ignore:The .grad attribute")          # torch's own tracing looks at it
def test_the_plain_model_under_torch_compile_gives_the_same():
    # The "eager" backend traces as every other does, and needs no C++ compiler.
    model = large_model(resized(SMALL, num_hidden_layers=2))
    ids, attention_mask = padded_batch(SMALL, [12, 7])
    compiled = torch.compile(model, backend="eager")
    assert relative(compiled(ids, attention_mask), model(ids, attention_mask)) < 1e-5


def resident() -> int:
    """Resident memory of the process in bytes."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return 1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS"))


def in_a_fork(measure) -> int:
    """The result of `measure` in a forked process, so that its glibc settings do not affect this one."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(writing, str(measure()).encode())
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as answer:
        found = answer.read()
    os.waitpid(child, 0)
    return int(found)


def freed_at_once(at_least: int) -> int:
    """Bytes that leave a process when of 40 tensors of 12 MB every other one is freed, but not the last.

    Some of the tensors may fall into holes that other tests left, and nothing leaves from those.
    """
    tune_malloc(at_least)
    tensors = [torch.zeros(3 << 20) + 1 for _ in range(40)]
    before = resident()
    del tensors[::2]
    return before - resident()


@pytest.fixture
def one_thread():
    """Forked processes have only one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


glibc_alone = pytest.mark.skipif(not (sys.platform == "linux" and platform.libc_ver()[0] == "glibc"),
                                 reason="glibc's malloc alone")


@glibc_alone
def test_freed_memory_goes_back_to_the_system_at_once(one_thread):
    kept = in_a_fork(lambda: freed_at_once(31 << 20))                                    # as glibc would by itself
    given_back = in_a_fork(lambda: freed_at_once(8 << 20))
    assert kept < 30 << 20 and given_back > 120 << 20                    # of 240 MB


@glibc_alone
def test_what_a_step_frees_it_finds_again(monkeypatch):
    """The thresholds of malloc take effect: page faults of a new process that fills 40 tensors of 4 MB and frees them,
    five times after the first. With glibc's defaults these are usually 40,000 or 200,000."""
    program = """if True:
        import resource, torch
        from minipref.fast.layers import tune_malloc
        torch.set_num_threads(1)
        def turn():
            tensors = [torch.full((1 << 20,), 1.0) for _ in range(40)]
            return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        tune_malloc(trim_threshold=256 << 20)
        first = turn()
        print(max(turn() for _ in range(5)) - first)"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    assert int(done.stdout) < 10_000

    told = {}
    monkeypatch.setattr(ctypes, "CDLL", lambda name: SimpleNamespace(mallopt=told.__setitem__))
    tune_malloc()
    assert told == {-3: 8 << 20, -1: 64 << 20}
