"""A run's page and model card: correct scores, any texts, with and without matplotlib."""

import argparse
import json
import re
import sys

import numpy as np
import pandas as pd
import pytest

from minipref import metrics
from minipref.config import LABELS
from minipref.data import Pair, character_counts, read_pairs
from minipref.recipes import recipe
from minipref.run import report as run_report

CONFIG = recipe("tiny")
MARK = "\ufffd"


def finished_run(count=200, seed=0, evaluations=3):
    """A made-up run's report, metrics rows, pairs and probabilities."""
    draw = np.random.default_rng(seed)
    labels = draw.integers(0, 3, count)
    logits = draw.normal(size=(count, 2, 3))
    logits[np.arange(count), :, labels] += 1
    texts = [f"<i>{'x' * int(n)}</i>" for n in draw.integers(1, 300, 3 * count)]
    pairs = [Pair(f"row-{n}", (texts[3 * n],), (texts[3 * n + 1], None), (texts[3 * n + 2],), int(label))
             for n, label in enumerate(labels)]
    lengths = character_counts(pairs)
    report = FACTS | {"steps": 300, "best_step": 200, "train_rows": 1600, "valid_rows": count}
    report |= metrics.score_logits(logits, labels, lengths, labels, lengths, 0)
    rows = [{"step": 100 * n, "epoch": float(n), "train_loss": 1.1 - n / 10, "log_loss": 1.0 - n / 20,
             "lr": 1e-4 / n, "accuracy": 0.4, "f1": 0.3, "best": int(n < 3)}
            for n in range(1, evaluations + 1)]
    return report, rows, pairs, metrics.swap_averaged(logits, 1.2)


def written(tmp_path, report, rows, pairs, probabilities) -> str:
    run_report.write_page(tmp_path, report, rows, pairs, probabilities)
    return (tmp_path / "report.html").read_text(encoding="utf-8")


FACTS = {"run": "runs/one", "date": "2026-01-01 12:00", "encoder": "weights/tiny", "rows": ["a.csv", "b.csv"],
         "recipe": "tiny", "seed": 7, "minutes": 12.5, "command": "python train.py --seed 7",
         "ended": "all 3 epochs done"}


class Axes:
    """Replaces matplotlib's axes and records the calls."""

    def __init__(self):
        self.calls = []

    def __getattr__(self, name):
        return lambda *arguments, **options: self.calls.append((name, arguments, options))

    def of(self, name):
        return [(arguments, options) for called, arguments, options in self.calls if called == name]


def test_equal_runs_have_equal_pages_with_every_figure_and_table(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    page = written(tmp_path, *finished_run())
    assert page == written(tmp_path, *finished_run())
    assert re.findall(r"<figcaption>(.*?)</figcaption>", page) == [
        "Loss", "Scores", "Confusion matrix", "Reliability",
        "Length bias", "Loss by length"]
    assert page.count('<svg role="img" aria-label="') == 6 and run_report.INK not in page and "currentColor" in page
    assert page.count("<details>") == run_report.MISTAKES and "prefers-color-scheme: dark" in page


def test_a_page_fetches_nothing_and_takes_no_text_for_html(tmp_path):
    page = written(tmp_path, *finished_run())
    assert "<i>" not in page and "&lt;i&gt;xx" in page and "default-src 'none'" in page
    assert not re.search(r"<(script|img|link|iframe)|\bsrc=|@import|url\((?!#)", page)
    assert all(link.startswith("#") for link in re.findall(r'href="([^"]*)"', page))


def test_characters_that_html_forbids_are_on_no_page(tmp_path):
    """Lone surrogates cannot be written as UTF-8, and the page is written after the whole training."""
    report, rows, _, logits = finished_run(20)
    forbidden = "".join(map(chr, (*range(9), 11, 12, *range(14, 32), *range(127, 160), 0xfdd0, 0xfdef, 0xfffe, 0xffff,
                                  0x1fffe, 0x10ffff)))
    text = json.dumps([f"<{forbidden}>\ud800", None, "\udfff"])
    ids = [f"{forbidden}{n}" for n in range(20)]
    frame = pd.DataFrame({"id": ids, "prompt": text, "response_a": text, "response_b": text})
    frame[["winner_model_a", "winner_model_b", "winner_tie"]] = 1, 0, 0
    frame.to_csv(tmp_path / "t.csv", index=False, lineterminator="\n")
    pairs = read_pairs(tmp_path / "t.csv")
    assert [pair.id for pair in pairs] == ids
    page = written(tmp_path, report, rows, pairs, logits)
    assert f"&lt;{len(forbidden) * MARK}&gt;" in page and not set(forbidden) & set(page)


def test_without_matplotlib_the_page_has_its_tables_and_that_is_said_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    run_report.log_missing_matplotlib.cache_clear()
    for fold in ("fold-1", "fold-2"):
        (tmp_path / fold).mkdir()
        page = written(tmp_path / fold, *finished_run())
        assert "<svg" not in page and "The figures were left out" in page and page.count("<table>") == 4
    run_report.log_missing_matplotlib.cache_clear()
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and "matplotlib is not installed" in out


@pytest.mark.parametrize("make", [lambda: finished_run(count=1, evaluations=1), lambda: finished_run(count=2)])
def test_a_handful_of_rows_still_makes_a_page(tmp_path, make):
    report, rows, pairs, probabilities = make()
    empty = [Pair(pair.id, ("",), ("",), ("",), pair.label) for pair in pairs]
    assert "<h2>The" in written(tmp_path, report, rows, empty, probabilities)


def test_a_run_on_all_rows_has_a_page_without_scores(tmp_path):
    report = FACTS | {"steps": 300, "best_step": 0, "train_rows": 1600, "valid_rows": 0}
    page = written(tmp_path, report, [], [], np.empty((0, 3)))
    assert "there is no score" in page and page.count("<table>") == 1 and "log loss" not in page


def test_a_page_names_its_run(tmp_path):
    report, *others = finished_run()
    page = written(tmp_path, report, *others)
    for text in ("runs/one", "2026-01-01 12:00", "weights/tiny", "a.csv, b.csv", "tiny, seed 7", "12.5 minutes",
                 "python train.py --seed 7", f"for {report['swap_flips']:.0%} of the rows"):
        assert text in page, text
    assert "class=warning" not in page


def test_a_constant_model_has_a_warning_on_its_page(tmp_path):
    report, *others = finished_run()
    report["conclusions"].insert(0, "CONSTANT PREDICTIONS: ...")
    assert "<p class=warning role=alert>CONSTANT PREDICTIONS" in written(tmp_path, report, *others)


def test_the_command_on_the_page_has_every_option():
    options = argparse.Namespace(train=["a b.csv", "c.csv"], seed=7, no_swap=True, no_fast=False, folds=None, lr=0.1,
                                 resume=True, patience=0, warmup=0.0)
    assert run_report.command(options) == (
        "python train.py --lr 0.1 --no-swap --patience 0 --seed 7 --train 'a b.csv' c.csv --warmup 0.0")


def test_the_loss_plot_has_the_baselines_and_the_loss_by_length_every_row():
    axes, (_, rows, pairs, p) = Axes(), finished_run()
    run_report.draw_curves(axes, rows, run_report.LOSSES, {"class prior": 1.1, "Bayes-optimal": 0.5})
    assert [(a, o["label"]) for a, o in axes.of("axhline")] == [((1.1,), "class prior"), ((0.5,), "Bayes-optimal")]
    labels = np.array([pair.label for pair in pairs])
    run_report.draw_loss_by_length(axes, p, labels, character_counts(pairs))
    (middles, means, _), _ = axes.of("errorbar")[0]
    assert (np.diff(middles) > 0).all() and len(middles) == 10
    assert means.mean() == pytest.approx(metrics.evaluate(p, labels)["log_loss"], rel=0.05)


def test_mistakes_are_the_most_confident_first_with_their_texts():
    pairs = [Pair("sure", ("<b> " + 50 * "long ",), ("a" * 5000,), ("b",), 0), Pair("right", ("p",), ("a",), ("b",), 1),
             Pair("less sure", ("p",), ("a",), (None,), 2)]
    page = run_report.mistakes_html(pairs, np.array([0, 1, 2]), np.array([[.05, .9, .05], [.1, .8, .1], [.6, .3, .1]]))
    assert re.findall(r"<summary>(.*?)</summary>", page) == [
        f"sure: label A, prediction B with 90%: &lt;b&gt; {13 * 'long '}long...",
        "less sure: label tie, prediction A with 60%: p"]
    assert "[... 3,500 characters ...]" in page and "(no answer)" in page and "The 2 most" in page


def test_the_confusion_matrix_is_drawn_with_labels_in_rows():
    axes, (report, *_) = Axes(), finished_run()
    result = report["results"]["model, calibrated"]
    run_report.draw_confusion(axes, result)
    cells = {(y, x): int(text.split("\n")[0].replace(",", "")) for (x, y, text), _ in axes.of("text")}
    assert [[cells[truth, prediction] for prediction in range(3)] for truth in range(3)] == result["confusion"]
    assert axes.of("set_yticks")[0][0][1] == LABELS and axes.of("set_ylabel")[0][0] == ("label",)
    low, high = axes.of("set_ylim")[0][0]
    assert low > high                                                    # the first row on top, as in the table


def test_the_reliability_diagram_has_the_calibration_bins():
    axes, (report, *_) = Axes(), finished_run()
    result = report["results"]["model, calibrated"]
    run_report.draw_reliability(axes, result)
    (x, y), options = axes.of("scatter")[0]
    assert x == [b["confidence"] for b in result["calibration"]] and y == [b["accuracy"] for b in result["calibration"]]
    assert len(options["s"]) == len(x)


def test_tenths_hold_every_row_once_in_order():
    by, values = np.arange(100)[::-1], (np.arange(100) < 50).astype(float)
    middles, means, errors = run_report.tenths(by, values)
    assert np.allclose(middles, np.arange(4.5, 100, 10)) and np.allclose(means, [0] * 5 + [1] * 5)
    assert np.allclose(errors, 0) and len(run_report.tenths(np.arange(3), np.ones(3))[0]) == 3


def test_length_bias_compares_the_annotators_with_the_model():
    axes, (_, _, pairs, p) = Axes(), finished_run()
    labels = np.array([pair.label for pair in pairs])
    run_report.draw_length_bias(axes, p, labels, character_counts(pairs))
    (annotators, _), (model, _) = ((arguments[1], options) for arguments, options in axes.of("errorbar"))
    assert np.isclose(annotators.mean(), (labels == 0).mean()) and np.isclose(model.mean(), p[:, 0].mean())


def test_the_model_card_says_what_it_was_trained_on_and_what_it_scored():
    report = finished_run()[0]
    card = run_report.model_card(report, "minipref-tiny", ["train.csv"], "tiny", {"lr": 1e-3}, 7)
    assert f"{report['results']['model, calibrated']['log_loss']:.4f}" in card and "| lr | 0.001 |" in card
    bare = run_report.model_card({"train_rows": 300, "steps": 90, "best_step": 0}, "e", ["t.csv"], "tiny", {}, 7)
    assert "there is no score" in bare
