"""The comparison of frozen encoders: vectors of the right tokens, a fair split, a table that says what was found."""

import re
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from small import write_encoder, write_rows

import minipref
from minipref import metrics
from minipref.data import Pair, encode_pairs, make_batch, read_pairs

sys.path.insert(0, str(ROOT / "benchmarks"))
import frozen


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_encoder(tmp_path_factory.mktemp("encoder") / "small")


@pytest.fixture(scope="module")
def csv(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.csv", 150)


@torch.no_grad()
def test_the_vectors_are_the_means_over_each_answers_own_tokens(folder, csv):
    encoder, tokenizer = minipref.load_encoder(folder).eval(), minipref.load_tokenizer(folder)
    pairs = list(read_pairs(csv))[:20]
    found = frozen.answer_means(encoder, tokenizer, pairs, 64)
    examples = encode_pairs(pairs, tokenizer, 64)
    for row in range(len(pairs)):                                       # alone: no padding and no other row beside it
        ids, is_token, _ = make_batch(examples, [row], [False], tokenizer)
        prompt, a, b = (len(field) for field in examples.fields(row))
        of = slice(prompt + 2, prompt + 3 + a), slice(prompt + 3 + a, prompt + 4 + a + b)
        for layer, x in enumerate(encoder.layer_outputs(ids, is_token)):
            for answer in (0, 1):
                expected = x[0, of[answer]].mean(0).numpy()
                assert np.allclose(found[row, layer, answer], expected, atol=1e-5), (row, layer, answer)


def test_a_regression_on_what_decides_finds_it_and_one_on_nothing_gives_the_class_prior(csv):
    pairs = list(read_pairs(csv))
    labels = np.array([pair.label for pair in pairs])
    sure = frozen.judged(np.eye(3)[labels], pairs, 0.2, 1)
    assert sure["accuracy"] == 1 and sure["log_loss"] < 0.2
    nothing = frozen.judged(np.zeros((len(pairs), 1)), pairs, 0.2, 1)
    part = frozen.split_by_prompt([pair.prompt for pair in pairs], labels, (0.8, 0.2), 1)
    prior = np.tile(metrics.class_prior(labels[part == 0]), (sum(part == 1), 1))
    assert abs(nothing["log_loss"] - metrics.evaluate(prior, labels[part == 1])["log_loss"]) < 1e-3


def test_no_row_that_is_scored_is_fitted_on(csv, monkeypatch):
    pairs = list(read_pairs(csv))
    fitted, plain = [], frozen.metrics.logistic_regression

    def noted(x, labels, penalty):
        fitted.append({int(number) for number in x[:, 0]})
        return plain(x, labels, penalty)

    monkeypatch.setattr(frozen.metrics, "logistic_regression", noted)
    frozen.judged(np.arange(len(pairs), dtype=float)[:, None], pairs, 0.2, 1)
    part = frozen.split_by_prompt([p.prompt for p in pairs], [p.label for p in pairs], (0.8, 0.2), 1)
    assert fitted[-1] == set(np.flatnonzero(part == 0))
    assert len(fitted) == len(frozen.PENALTIES) + 1 and all(rows < fitted[-1] for rows in fitted[:-1])


def test_the_table_has_a_line_for_each_encoder_and_length(folder, csv, capsys, monkeypatch):
    monkeypatch.setattr(frozen, "BUNDLED", folder)                      # `random` has its architecture
    assert frozen.main(["--train", str(csv), "--seeds", "1", "2", "--lengths", "256", "512-marked",
                        "--encoders", f"small={folder}", "random"]) == 0
    lines = [re.split(r" *\| *", line.strip("| ")) for line in capsys.readouterr().out.splitlines()]
    assert [line[:2] for line in lines[2:]] == [["none", ""], ["small", "256"], ["small", "512-marked"],
                                                ["random", "256"], ["random", "512-marked"]]
    none, small, _, random, _ = lines[2:]
    assert all(len(line) == 8 for line in lines[2:])
    assert float(small[2]) < float(none[2]) - 0.2                       # 'yes' or 'no' shows in the mean vector
    assert float(random[2]) < float(none[2]) - 0.2 and random[3] != small[3]


def test_a_cut_field_says_between_head_and_tail_how_much_is_not_there():
    tokenizer = minipref.load_tokenizer(ROOT / "weights" / "minipref-tiny")
    words = " ".join(f"word{n}" for n in range(400))
    pairs = [Pair("", ("Short.",), (words,), ("Yes.",)), Pair("", (words,), ("Yes.",), ("No.",))]

    def fields(length: int) -> list[list[list[int]]]:
        examples = encode_pairs(pairs, tokenizer, length)
        assert (examples.lengths <= length).all()
        return [[field.tolist() for field in examples.fields(row)] for row in range(2)]

    plain, whole = fields(128), fields(4096)
    with frozen.marked_cuts(tokenizer):
        marked, tight, same = fields(128), fields(20), fields(4096)
    assert same == whole and tight == fields(20)                      # nothing cut; no room for a marker
    assert fields(128) == plain                                       # and only while it lasts
    for row, long in (0, 1), (1, 0):
        of_row = zip(marked[row], plain[row], whole[row], strict=True)
        for number, (field, without, all_of_it) in enumerate(of_row):
            if number != long:
                assert field == without == all_of_it
                continue
            marker = tokenizer.encode(f"[... {len(all_of_it) - len(without)} tokens ...]")
            assert len(field) == len(without) < len(all_of_it)
            at = next(n for n in range(len(field)) if field[n:n + len(marker)] == marker)
            head, tail = field[:at], field[at + len(marker):]
            assert head == all_of_it[:at] and tail == all_of_it[-len(tail):] and abs(len(head) - len(tail)) <= 1
