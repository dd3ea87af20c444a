"""The time that training has to take at least is counted from what a step multiplies."""

import itertools
import math
import re
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import budget

import train


@pytest.fixture(scope="module")
def steps() -> budget.Steps:
    return budget.Steps(rows=64)


def test_a_step_multiplies_what_its_layers_are_counted_to_multiply(steps):
    config, seen = steps.model.model.config, []
    handle = steps.model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[1]))
    for number in range(len(steps.batches)):
        B = len(steps.batches[number])
        L = math.ceil(steps.setup.examples.lengths[steps.batches[number]].max() / train.PAD_TO) * train.PAD_TO
        D, F, H, d = config.width, config.feed_forward, config.heads, config.head_width
        whole_layer = L * (4 * D * D + 2 * D * F) + 2 * L * L * d * H           # projections, feed-forward, q k, p v
        last_layer = L * 2 * D * D + 2 * D * D + 2 * D * F + 2 * L * d * H      # keys and values of all, [CLS]'s rest
        without_positions = 6 * B * ((config.layers - 1) * whole_layer + last_layer)
        counted = steps.operations(number)
        assert without_positions < counted < 1.5 * without_positions
        assert seen.pop() == L and not seen                                     # a step pads to a multiple of PAD_TO
    handle.remove()


def test_a_product_added_in_place_is_counted():
    a, b, into = torch.ones(2, 3, 4), torch.ones(2, 4, 5), torch.zeros(2, 3, 5)
    with budget.FlopCounterMode(display=False, custom_mapping=budget.IN_PLACE) as counter:
        into.baddbmm_(a, b)
    assert counter.get_total_flops() == 2 * (2 * 3 * 4 * 5)


def test_a_pass_takes_its_operations_over_the_rate_and_its_steps_their_time(steps, monkeypatch):
    monkeypatch.setattr(budget, "rate", lambda *_: 1e9)
    ticks = itertools.count()
    monkeypatch.setattr(budget, "time", SimpleNamespace(perf_counter=lambda: next(ticks)))     # a second for each step
    found = budget.measured(steps, range(len(steps.batches)))
    operations = sum(steps.operations(number) for number in range(len(steps.batches)))
    assert found["tera"] == pytest.approx(operations / 1e12)
    assert found["at_least"] == pytest.approx(operations / 1e9 / 60)
    assert found["as_it_is"] == pytest.approx(len(steps.batches) / 60)


def test_nothing_is_learnt_while_it_measures(steps):
    before = [p.clone() for p in steps.model.parameters()]
    steps.take(0)
    assert all(torch.equal(p, was) for p, was in zip(steps.model.parameters(), before))


def test_the_lines_that_it_prints(capsys):
    threads = torch.get_num_threads()
    assert budget.main(["--rows", "64", "--steps", "1", "--precision", "fp32"]) == 0
    assert torch.get_num_threads() == threads
    first, *lines = capsys.readouterr().out.splitlines()
    tiny = budget.recipe("tiny")
    assert first == f"64 rows in {tiny.steps_per_epoch(64)} steps a pass, {tiny.epochs} passes, fp32"
    assert [int(re.match(r"(\d+) threads?: \d", line)[1]) for line in lines] == sorted({1, threads})
