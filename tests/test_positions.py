"""Distances, buckets and rows of the relative embeddings."""

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from minipref.model import distance_buckets, log_bucket, relative_index

ANCHORS = {0: 0, 1: 1, 2: 2, 127: 127, 128: 128, 129: 129, 130: 130, 131: 131, 132: 131, 150: 143, 200: 169, 256: 192,
           400: 233, 505: 254, 506: 255, 507: 255, 510: 255, 511: 255}


def exact_bucket(distance: int, position_buckets: int, max_distance: int) -> int:
    """The bucket formula in exact integer arithmetic.

    ceil(log(a / half) / log(reach / half) * (half - 1)) is the smallest n for which
    (a / half)^(half - 1) <= (reach / half)^n; multiplied out, both sides are integers.
    """
    half, reach = position_buckets // 2, max_distance - 1
    a = min(abs(distance), reach)
    bucket = a
    if a > half:
        n = 0
        while a**(half - 1) * half**n > reach**n * half**(half - 1):
            n += 1
        bucket = half + n
    return bucket if distance >= 0 else -bucket


def test_buckets_of_v3_are_the_published_ones():
    found = log_bucket(torch.tensor(list(ANCHORS)))
    assert found.tolist() == list(ANCHORS.values())


def test_negative_distances_mirror_positive_ones():
    distance = torch.arange(1, 2000)
    assert torch.equal(log_bucket(-distance), -log_bucket(distance))
    assert log_bucket(torch.tensor(0)).item() == 0


def test_near_distances_have_a_bucket_of_their_own_and_far_ones_share():
    buckets = log_bucket(torch.arange(0, 512))
    assert torch.equal(buckets[:132], torch.arange(132))       # up to half of them, and the first three beyond
    steps = buckets.diff()
    assert set(steps.tolist()) == {0, 1}, "every bucket is used, in order"
    assert buckets[-1] == 255


def test_every_bucket_of_v3_is_the_one_of_exact_arithmetic():
    distance = torch.arange(-600, 601)
    wanted = [exact_bucket(d, 256, 512) for d in distance.tolist()]
    assert log_bucket(distance).tolist() == wanted


@given(position_buckets=st.integers(4, 80), extra=st.integers(2, 400))
@example(position_buckets=20, extra=71)   # the logarithms' ratio is 1/3 at distance 20: rounding can move the bucket
@example(position_buckets=32, extra=113)           # and here at 32 and at 64
@settings(max_examples=150)
def test_buckets_of_any_span_are_those_of_exact_arithmetic(position_buckets, extra):
    max_distance = position_buckets // 2 + extra
    distance = torch.arange(-max_distance - 3, max_distance + 4)
    wanted = [exact_bucket(d, position_buckets, max_distance) for d in distance.tolist()]
    assert log_bucket(distance, position_buckets, max_distance).tolist() == wanted


@pytest.mark.parametrize("position_buckets, max_distance, distances, wanted", [
    (8, 24, [3, 4, 5, 7, 8, 12, 13, 23, 24], [3, 4, 5, 5, 6, 6, 7, 7, 7]),
    (20, 81, [10, 11, 19, 20, 21, 40, 41, 80, 81], [10, 11, 13, 13, 14, 16, 17, 19, 19]),
    (32, 129, [16, 17, 32, 33, 64, 65, 127, 128], [16, 17, 21, 22, 26, 27, 31, 31]),
])
def test_small_spans_match_tables_written_by_hand(position_buckets, max_distance, distances, wanted):
    # The last two have distances at which the logarithms' ratio is a whole number: 20 / 10 is the cube root of 80 / 10.
    assert log_bucket(torch.tensor(distances), position_buckets, max_distance).tolist() == wanted


def test_distances_past_the_largest_are_clamped_as_microsoft_does():
    far = torch.tensor([511, 512, 700, 5000, 10**6, 2**40])
    assert log_bucket(far).tolist() == [255] * 6
    assert log_bucket(-far).tolist() == [-255] * 6


def test_hugging_face_runs_on_past_the_largest_distance_and_we_do_not():
    pytest.importorskip("transformers")
    from transformers.models.deberta_v2.modeling_deberta_v2 import make_log_bucket_position
    distance = torch.arange(-700, 701)
    theirs = make_log_bucket_position(distance, 256, 512).long()
    ours = log_bucket(distance)
    inside = distance.abs() < 512
    assert torch.equal(ours[inside], theirs[inside])
    assert theirs[distance == -700].item() < -256, "Hugging Face: beyond the table, then clamped to row 0"
    assert ours[distance == -700].item() == -255, "Microsoft and minipref: the last trained row"


def test_rows_run_from_one_to_the_last_and_row_zero_is_never_read():
    rows = distance_buckets(600, 256, 512)
    assert rows.dtype == torch.int64
    assert rows.shape == (1199,)
    assert rows.min() == 1
    assert rows.max() == 511
    assert rows[599] == 256, "distance 0 is the middle of the table"


@pytest.mark.parametrize("length", [1, 2, 3, 31])
def test_relative_index_holds_the_row_of_i_minus_j(length):
    index = relative_index(distance_buckets(length, 8, 24))
    assert index.shape == (length, length)
    assert index.dtype == torch.int64
    for i in range(length):
        for j in range(length):
            assert index[i, j] == exact_bucket(i - j, 8, 24) + 8, f"query {i}, key {j}"


def test_buckets_do_not_depend_on_the_ambient_precision():
    wanted = log_bucket(torch.arange(-511, 512))
    before = torch.get_default_dtype()
    try:
        for dtype in (torch.bfloat16, torch.float16, torch.float64):
            torch.set_default_dtype(dtype)
            assert torch.equal(log_bucket(torch.arange(-511, 512)), wanted), dtype
    finally:
        torch.set_default_dtype(before)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(log_bucket(torch.arange(-511, 512)), wanted)


def test_a_ratio_rounded_to_bfloat16_would_move_74_of_the_1023_distances():
    distance = torch.arange(-511, 512)
    ratio = torch.log(distance.abs().clamp(min=128).double() / 128) / math.log(511 / 128)
    far = 128 + torch.ceil(ratio.bfloat16().double() * 127).long()
    rounded = torch.where(distance.abs() <= 128, distance, far * distance.sign())
    assert (rounded != log_bucket(distance)).sum() == 74


def test_any_shape_of_distances_goes_in_and_comes_out():
    for shape in ((), (0,), (1, 3, 2)):
        distance = torch.full(shape, -300)
        assert log_bucket(distance).shape == shape
        assert log_bucket(distance).dtype == torch.int64


def test_bucket_widths_grow_by_the_same_factor():
    # What makes the buckets logarithmic: bucket 128 + n ends at 128 * (511 / 128)^(n / 127).
    buckets = log_bucket(torch.arange(0, 512))
    for n in (10, 40, 80, 120):
        end = math.floor(128 * (511 / 128)**(n / 127))
        assert buckets[end] == 128 + n
        assert buckets[end + 1] > 128 + n
