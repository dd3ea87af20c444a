"""Disentangled attention: the definition by hand, each term alone, and every fast form against the definition."""

import math

import pytest
import torch
from helpers import SMALL, large_weights, relative, resized
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from minipref.fast.attention import batched_attention, blockwise_attention, cls_attention
from minipref.model import (
    DisentangledSelfAttention,
    attention_by_definition,
    attention_scores,
    distance_buckets,
    log_bucket,
    masked_softmax,
    relative_index,
)


def attention_in_terms(q, k, v, pos_q, pos_k, attention_mask, position_buckets, max_distance):
    """Attention of a plain layer: the three terms, their sum, the masked softmax, and the product with v."""
    index = relative_index(distance_buckets(q.shape[2], position_buckets, max_distance))
    c2c, c2p, p2c = attention_scores(q, k, pos_q, pos_k, index)
    return masked_softmax(c2c + c2p + p2c, attention_mask).to(v.dtype) @ v


def fast(form):
    """One of the fast forms with the definition's arguments; for a single query, the form for [CLS]."""
    def attention(q, k, v, pos_q, pos_k, attention_mask, position_buckets, max_distance):
        buckets = distance_buckets(k.shape[2], position_buckets, max_distance)
        function = form if q.shape[2] == k.shape[2] else cls_attention
        return function(q, k, v, pos_q, pos_k, attention_mask, buckets)
    return attention


PATHS = {"plain": attention_in_terms, "blocks": fast(blockwise_attention), "batched": fast(batched_attention)}
every_path = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS.keys())


def random_inputs(B: int, H: int, L: int, d: int, position_buckets: int, seed: int, dtype=torch.float64,
                  size: float = 1.5):
    """q, k, v, pos_q, pos_k with requires_grad, large enough for a peaked softmax."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(B, H, L, d)] * 3 + [(H, 2 * position_buckets, d)] * 2
    return [(size * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype).requires_grad_()
            for shape in shapes]


def tokens(lengths: list[int]) -> Tensor:
    return torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]


def value_and_gradients(function, inputs, attention_mask, position_buckets, max_distance, rows=None) -> list[Tensor]:
    """The output with padding zeroed, and the gradients of a random projection of its (first) rows without padding."""
    real = attention_mask[:, None, :rows, None]
    out = function(*inputs, attention_mask, position_buckets, max_distance) * real
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    return [out, *torch.autograd.grad((out * weights.to(out.dtype)).sum(), inputs)]


NAMES = ("value", "gradient of q", "gradient of k", "gradient of v", "gradient of pos_q", "gradient of pos_k")


# The definition itself, and each term.

def test_definition_gives_the_numbers_worked_out_by_hand():
    # Two tokens, one head, width 1, 2 buckets per direction: rows 0..3 stand for distances -2 (never), -1, 0, 1.
    q, k, v = (torch.tensor(x, dtype=torch.float64).view(1, 1, 2, 1) for x in ([1., 2.], [3., -1.], [10., 20.]))
    pos_q = torch.tensor([99., .5, -1., 2.], dtype=torch.float64).view(1, 4, 1)
    pos_k = torch.tensor([99., 4., .25, -3.], dtype=torch.float64).view(1, 4, 1)
    out = attention_by_definition(q, k, v, pos_q, pos_k, torch.ones(1, 2, dtype=torch.bool), 2, 4)
    # score = (q_i k_j + q_i pos_k[row(i - j)] + k_j pos_q[row(i - j)]) / sqrt(3)
    s00 = (1 * 3 + 1 * .25 + 3 * -1) / math.sqrt(3)
    s01 = (1 * -1 + 1 * 4 + -1 * .5) / math.sqrt(3)       # distance -1
    s10 = (2 * 3 + 2 * -3 + 3 * 2) / math.sqrt(3)         # distance +1
    s11 = (2 * -1 + 2 * .25 + -1 * -1) / math.sqrt(3)
    p01, p11 = 1 / (1 + math.exp(s00 - s01)), 1 / (1 + math.exp(s10 - s11))
    wanted = torch.tensor([10 + 10 * p01, 10 + 10 * p11], dtype=torch.float64)
    assert relative(out.flatten(), wanted) < 1e-14


@pytest.fixture(scope="module")
def terms():
    """The terms of random heads over 19 tokens, with their inputs."""
    q, k, _, pos_q, pos_k = random_inputs(B=2, H=2, L=19, d=5, position_buckets=8, seed=1)
    row = relative_index(distance_buckets(19, 8, 24))
    return q, k, pos_q, pos_k, attention_scores(q, k, pos_q, pos_k, row)


def row(i: int, j: int) -> int:
    return int(log_bucket(torch.tensor(i - j), 8, 24)) + 8


def every_pair(score) -> Tensor:
    """score(b, h, i, j) for all indices, in loops."""
    return torch.tensor([[[[score(b, h, i, j) for j in range(19)] for i in range(19)] for h in range(2)]
                         for b in range(2)], dtype=torch.float64)


def test_c2c_is_query_times_key_over_sqrt_3d(terms):
    q, k, _, _, (c2c, _, _) = terms
    with torch.no_grad():
        wanted = every_pair(lambda b, h, i, j: q[b, h, i] @ k[b, h, j] / math.sqrt(3 * 5))
    assert relative(c2c, wanted) < 1e-14


def test_c2p_is_the_query_times_the_row_of_i_minus_j(terms):
    q, _, _, pos_k, (_, c2p, _) = terms
    with torch.no_grad():
        wanted = every_pair(lambda b, h, i, j: q[b, h, i] @ pos_k[h, row(i, j)] / math.sqrt(3 * 5))
    assert relative(c2p, wanted) < 1e-14


def test_p2c_is_the_key_times_the_row_of_i_minus_j_not_of_j_minus_i(terms):
    _, k, pos_q, _, (_, _, p2c) = terms
    with torch.no_grad():
        wanted = every_pair(lambda b, h, i, j: k[b, h, j] @ pos_q[h, row(i, j)] / math.sqrt(3 * 5))
        paper = every_pair(lambda b, h, i, j: k[b, h, j] @ pos_q[h, row(j, i)] / math.sqrt(3 * 5))
    assert relative(p2c, wanted) < 1e-14
    assert relative(paper, wanted) > 0.5, "this test could not tell the paper's sign from the released one"


# The mask.

def test_padding_keys_get_no_probability_and_padding_queries_stay_finite():
    scores = 5 * torch.randn(2, 3, 7, 7, generator=torch.Generator().manual_seed(0))
    attention_mask = tokens([7, 4])
    probs = masked_softmax(scores, attention_mask)
    assert (probs[1, :, :, 4:] == 0).all()
    assert relative(probs.sum(-1), torch.ones(2, 3, 7)) < 1e-6
    assert relative(probs[1, :, :, :4], torch.softmax(scores[1, :, :, :4], -1)) < 1e-6, "queries are not masked"


def test_a_sequence_of_padding_only_gives_no_nan():
    probs = masked_softmax(torch.zeros(1, 1, 3, 3), torch.zeros(1, 3, dtype=torch.bool))
    assert torch.isfinite(probs).all()


@pytest.mark.parametrize("dtype, wanted", [(torch.bfloat16, torch.float32), (torch.float16, torch.float32),
                                           (torch.float32, torch.float32), (torch.float64, torch.float64)])
def test_softmax_is_float32_or_better_whatever_the_scores_are(dtype, wanted):
    scores = torch.randn(1, 2, 300, 300, generator=torch.Generator().manual_seed(0)).to(dtype)
    probs = masked_softmax(scores, torch.ones(1, 300, dtype=torch.bool))
    assert probs.dtype == wanted
    assert relative(probs.sum(-1), torch.ones(1, 2, 300)) < 1e-5
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(masked_softmax(scores, torch.ones(1, 300, dtype=torch.bool)), probs)


# Every fast path against the definition.

@st.composite
def problems(draw, shortest=1):
    """Sizes, a mask with padding at the end and holes (at least one token in every row), and inputs."""
    B, H, L, d = (draw(st.integers(1, most)) for most in (2, 3, 13, 5))
    L = max(L, shortest)
    position_buckets, reach = draw(st.integers(4, 9)), draw(st.integers(2, 12))
    attention_mask = tokens([L, max(1, L - draw(st.integers(0, 12)))][:B])
    for b, j in draw(st.lists(st.tuples(st.integers(0, B - 1), st.integers(0, L - 1)), max_size=4)):
        attention_mask[b, j] &= attention_mask[b].sum() == 1
    inputs = random_inputs(B, H, L, d, position_buckets, draw(st.integers(0, 2**16)))
    return inputs, attention_mask, position_buckets, position_buckets // 2 + reach


@every_path
@given(problem=problems())
@settings(max_examples=40)
def test_path_equals_the_definition_in_value_and_gradient(path, problem):
    found, wanted = value_and_gradients(path, *problem), value_and_gradients(attention_by_definition, *problem)
    for name, f, w in zip(NAMES, found, wanted):
        assert relative(f, w, at_least=1e-3) < 1e-12, name


@every_path
def test_path_equals_the_definition_past_the_largest_distance(path):
    attention_mask = tokens([40])
    inputs = random_inputs(1, 1, 40, 3, position_buckets=6, seed=3)
    found = value_and_gradients(path, inputs, attention_mask, 6, 16)
    wanted = value_and_gradients(attention_by_definition, inputs, attention_mask, 6, 16)
    for name, f, w in zip(NAMES, found, wanted):
        assert relative(f, w) < 1e-12, name
    for gradient in found[4:]:
        assert (gradient[:, 0] == 0).all(), "row 0 of the table is never read"


@pytest.mark.parametrize("lengths", [[100], [100, 61], [97, 100]])
def test_keys_past_the_last_bucket_are_scored_by_one_product(lengths, monkeypatch):
    """Blocks of 32 queries: some have far keys on the left, some on the right, some on both sides."""
    from minipref.fast import attention
    monkeypatch.setattr(attention, "LEAST_FAR", 1)
    monkeypatch.setattr(attention, "BLOCK_SCORES", 1)
    regions = []
    near_keys = attention.Block.near_keys
    monkeypatch.setattr(attention.Block, "near_keys",
                        lambda block, reach: regions.append(near_keys(block, reach)) or regions[-1])
    attention_mask, L = tokens(lengths), max(lengths)
    inputs = random_inputs(len(lengths), 2, L, 3, position_buckets=6, seed=3)
    found = value_and_gradients(PATHS["blocks"], inputs, attention_mask, 6, 16)
    wanted = value_and_gradients(attention_in_terms, inputs, attention_mask, 6, 16)
    for name, f, w in zip(NAMES, found, wanted):
        assert relative(f, w) < 1e-12, name
    assert any(start for start, _ in regions) and any(stop < 90 for _, stop in regions)
    assert any(start and stop < 90 for start, stop in regions)


@pytest.mark.parametrize(("buckets", "distance"), [
    ([0, 0, 1, 2, 3, 3, 3], 2), ([0, 1, 2, 3, 4, 5, 6], 3), ([0, 0, 0, 1, 2, 2, 2], 1), ([5, 5, 5], 1), ([4], 1),
    ([0, 0, 1, 0, 3, 3, 3], 2)])
def test_the_distance_of_the_last_bucket_is_where_all_farther_ones_are_alike(buckets, distance):
    from minipref.fast.attention import distance_of_last_bucket
    assert distance_of_last_bucket(torch.tensor(buckets)) == distance
    v3 = distance_of_last_bucket(distance_buckets(2048, 256, 512))
    assert (distance_buckets(2048, 256, 512)[2047 + v3:] == 511).all()
    assert distance_buckets(2048, 256, 512)[2047 + v3 - 1] == 510


@every_path
@pytest.mark.parametrize("B, H, L, d, position_buckets, max_distance, lengths", [
    (1, 2, 7, 3, 4, 8, [7]), (2, 1, 6, 2, 5, 7, [6, 3]), (1, 1, 1, 2, 4, 8, [1]),
])
def test_path_passes_gradcheck(path, B, H, L, d, position_buckets, max_distance, lengths):
    attention_mask = tokens(lengths)
    inputs = random_inputs(B, H, L, d, position_buckets, seed=5, size=0.8)

    def real_rows(*inputs):
        return path(*inputs, attention_mask, position_buckets, max_distance) * attention_mask[:, None, :, None]

    assert torch.autograd.gradcheck(real_rows, inputs, eps=1e-6, atol=1e-7, rtol=1e-5)


@every_path
def test_path_at_one_token_gives_zero_gradients_to_all_that_cannot_matter(path):
    # A single key always has probability 1, so q, k and the table have gradients of exactly 0.
    inputs = random_inputs(2, 2, 1, 4, position_buckets=4, seed=2)
    out, dq, dk, dv, dpos_q, dpos_k = value_and_gradients(path, inputs, tokens([1, 1]), 4, 8)
    assert torch.equal(out, inputs[2])
    assert dv.abs().min() > 0
    for gradient in (dq, dk, dpos_q, dpos_k):
        assert (gradient == 0).all()


@every_path
def test_path_takes_inputs_that_are_not_contiguous(path):
    attention_mask = tokens([11, 9])
    inputs = random_inputs(2, 3, 11, 4, position_buckets=6, seed=4)
    strided = [(x.mT.contiguous().mT if i % 2 else x.transpose(0, 1).contiguous().transpose(0, 1)).detach()
               .requires_grad_() for i, x in enumerate(inputs)]
    assert not any(x.is_contiguous() for x in strided)
    found = value_and_gradients(path, strided, attention_mask, 6, 16)
    wanted = value_and_gradients(path, inputs, attention_mask, 6, 16)
    for name, f, w in zip(NAMES, found, wanted):
        assert relative(f, w) < 1e-13, name


@every_path
@pytest.mark.parametrize("lengths", [[300, 260], [700]])      # past a block of scores, too
def test_path_in_float32_is_within_rounding_of_float64_at_v3s_spans(path, lengths):
    attention_mask = tokens(lengths)
    exact = random_inputs(len(lengths), 2, max(lengths), 16, position_buckets=256, seed=6, size=0.7)
    rounded = [x.detach().float().requires_grad_() for x in exact]
    exact = [x.detach().double().requires_grad_() for x in rounded]
    found = value_and_gradients(path, rounded, attention_mask, 256, 512)
    wanted = value_and_gradients(attention_in_terms, exact, attention_mask, 256, 512)
    assert relative(found[0], wanted[0]) < 1e-5
    for name, f, w in zip(NAMES[1:], found[1:], wanted[1:]):
        assert relative(f, w) < 1e-4, name


@every_path
def test_path_never_lets_padding_touch_real_tokens(path):
    attention_mask = tokens([12, 5])
    inputs = random_inputs(2, 2, 12, 3, position_buckets=6, seed=8)
    found = value_and_gradients(path, inputs, attention_mask, 6, 16)
    with torch.no_grad():
        for x in inputs[:3]:
            x[1, :, 5:] = 1e3 * torch.randn(2, 7, 3, generator=torch.Generator().manual_seed(1))
    changed = value_and_gradients(path, inputs, attention_mask, 6, 16)
    assert torch.equal(found[0], changed[0])
    for name, f, c in zip(NAMES[1:4], found[1:4], changed[1:4]):
        assert (f[1, :, 5:] == 0).all(), f"{name}: padding has none"
        assert relative(c, f) < 1e-13, name


@given(problem=problems(shortest=2))
@settings(max_examples=40)
def test_attention_of_cls_alone_is_the_definitions_first_row(problem):
    (q, *others), attention_mask, *sizes = problem
    attention_mask[:, 0] = True
    first = q.detach()[:, :, :1].clone().requires_grad_()

    def definition(first, *rest):
        return attention_by_definition(torch.cat([first, q.detach()[:, :, 1:]], 2), *rest)[:, :, :1]

    found = value_and_gradients(PATHS["blocks"], [first, *others], attention_mask, *sizes, rows=1)
    wanted = value_and_gradients(definition, [first, *others], attention_mask, *sizes, rows=1)
    for name, f, w in zip(NAMES, found, wanted):
        assert relative(f, w, at_least=1e-3) < 1e-12, name


@every_path
def test_path_with_a_sequence_of_padding_only_stays_finite_and_spoils_no_other(path):
    inputs = random_inputs(3, 2, 9, 4, position_buckets=6, seed=11)
    attention_mask = tokens([9, 0, 4])
    found = value_and_gradients(path, inputs, attention_mask, 6, 16)
    wanted = value_and_gradients(path, [x[[0, 2]] if x.ndim == 4 else x for x in inputs], attention_mask[[0, 2]], 6, 16)
    assert all(torch.isfinite(x).all() for x in found)
    assert relative(found[0][[0, 2]], wanted[0]) < 1e-13
    assert all((gradient[1] == 0).all() for gradient in found[1:4])
    nothing = value_and_gradients(path, inputs, torch.zeros(3, 9, dtype=torch.bool), 6, 16)
    assert all(torch.isfinite(x).all() for x in nothing)


@every_path
@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 3e-2), (torch.float16, 4e-3)])
def test_path_in_half_precision_is_within_its_rounding(path, dtype, tolerance):
    attention_mask = tokens([150, 90])
    rounded = [x.detach().to(dtype).requires_grad_() for x in random_inputs(2, 2, 150, 12, position_buckets=16, seed=12,
                                                                      size=0.7)]
    exact = [x.detach().double().requires_grad_() for x in rounded]
    found = value_and_gradients(path, rounded, attention_mask, 16, 64)
    wanted = value_and_gradients(path, exact, attention_mask, 16, 64)
    for name, f, w in zip(NAMES, found, wanted):
        assert f.dtype == dtype
        assert relative(f, w) < tolerance, name


@every_path
def test_path_scales_before_scores_can_overflow(path):
    # In float16 the products of 100 * 20 * 192 are infinite; divided by sqrt(3 d) = 24 first, they are 16,000.
    q, k, pos_q, pos_k = (torch.full(shape, size, dtype=torch.float16) for shape, size in
                          (((1, 1, 9, 192), 100.), ((1, 1, 9, 192), 20.), ((1, 32, 192), 100.), ((1, 32, 192), 20.)))
    v = torch.arange(9, dtype=torch.float16).view(1, 1, 9, 1).expand(1, 1, 9, 192)
    for queries in (q, q[:, :, :1]) if path is not PATHS["plain"] else (q,):
        out = path(queries, k, v, pos_q, pos_k, tokens([9]), 16, 64)
        assert relative(out, torch.full(queries.shape, 4.)) < 2e-3, "all keys look alike: the mean of v"


# Dropout. The forms draw differently; for each, a seed makes it a function, and on average nothing changes.

dropping = pytest.mark.parametrize("form, queries", [(blockwise_attention, 6), (batched_attention, 6),
                                                    (cls_attention, 1)], ids=["blocks", "batched", "cls"])


def dropped(form, queries: int, rate: float, attention_mask: Tensor):
    """q, k, v, pos_q, pos_k -> the output with dropout, the same for the same seed."""
    def attention(q, k, v, pos_q, pos_k, seed=0):
        torch.manual_seed(seed)
        buckets = distance_buckets(6, 4, 8)
        return form(q[:, :, :queries], k, v, pos_q, pos_k, attention_mask, buckets, rate)
    return attention


@dropping
def test_dropout_has_the_gradient_of_what_it_dropped(form, queries):
    inputs = random_inputs(2, 1, 6, 3, position_buckets=4, seed=13, size=0.8)
    assert torch.autograd.gradcheck(dropped(form, queries, 0.4, tokens([6, 6])), inputs, atol=1e-7, rtol=1e-5)


@dropping
def test_dropout_keeps_the_mean_and_drops_the_share_it_should(form, queries):
    # With v the unit vectors, the output is the probabilities: a dropped one is 0, a kept one 1 / (1 - rate) as large.
    q, k, _, pos_q, pos_k = (x.detach() for x in random_inputs(2, 2, 6, 6, position_buckets=4, seed=14, size=0.7))
    v = torch.eye(6, dtype=torch.float64).expand(2, 2, 6, 6)
    attention = dropped(form, queries, 0.25, tokens([6, 6]))
    probs = dropped(form, queries, 0.0, tokens([6, 6]))(q, k, v, pos_q, pos_k)
    draws = torch.stack([attention(q, k, v, pos_q, pos_k, seed) for seed in range(500)])
    assert relative(draws.max(0).values, probs / 0.75) < 1e-4
    count = draws.numel()
    assert abs((draws == 0).double().mean() - 0.25) < 5 * math.sqrt(0.25 * 0.75 / count)
    shares = (draws == 0).double().mean(0)
    assert (shares - 0.25).abs().max() < 5 * math.sqrt(0.25 * 0.75 / 500), "each entry is dropped as often"


# The module's own part: the projections.

@pytest.fixture(scope="module")
def layer() -> DisentangledSelfAttention:
    module = DisentangledSelfAttention(resized(SMALL, hidden_size=12, num_attention_heads=3)).double()
    module.config = resized(SMALL, hidden_size=12, num_attention_heads=3)
    return large_weights(module, seed=9).eval()


def linear(projection: nn.Linear, x: Tensor) -> Tensor:
    return x @ projection.weight.T + projection.bias


def test_positions_go_through_the_query_and_key_projections_biases_included(layer):
    x = torch.randn(2, 5, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rel = torch.randn(16, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = layer.project(x, rel)
    for name, part, projection, source in zip(
            ("q", "k", "v", "pos_q", "pos_k"), found,
            (layer.q_proj, layer.k_proj, layer.v_proj, layer.q_proj, layer.k_proj), (x, x, x, rel, rel)):
        whole = linear(projection, source)
        for h in range(3):
            head = part[:, h] if part.ndim == 4 else part[h]
            assert relative(head, whole[..., 4 * h: 4 * h + 4]) < 1e-14, f"{name}, head {h}"
