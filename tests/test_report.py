"""The verdict at the end of a run follows the figures, flattering or not."""

import numpy as np
import pytest

from minipref import metrics
from minipref.report import as_text, model_card, score_folds, score_logits


def rows(count=600, seed=0, shares=(0.36, 0.34, 0.30)):
    """Labels, field lengths, and logits (N, 2, 3) that know the label, from a generator with a fixed seed."""
    random = np.random.default_rng(seed)
    labels = random.choice(3, count, p=shares)
    lengths = random.integers(50, 800, (count, 3))
    lengths[:, 1] += np.where(labels == 0, 600, 0)
    lengths[:, 2] += np.where(labels == 1, 600, 0)
    logits = np.zeros((count, 2, 3))
    logits[np.arange(count), :, labels] = 3.0
    return labels, lengths, logits + random.normal(size=logits.shape)


def scored(labels, lengths, logits, **more):
    half = len(labels) // 2
    return score_logits(logits[half:], labels[half:], lengths[half:], labels[:half], lengths[:half], seed=1, **more)


def test_a_good_model_is_said_to_beat_counting_characters():
    result = scored(*rows())
    assert result["verdict"][0].startswith("Better than counting characters")
    assert "NOT" not in " ".join(result["verdict"]) and "COLLAPSED" not in " ".join(result["verdict"])


def test_a_model_that_says_the_same_of_every_row_is_said_to_have_collapsed():
    labels, lengths, logits = rows()
    said = " ".join(scored(labels, lengths, np.zeros_like(logits) + [0.1, 0.05, 0])["verdict"])
    assert "COLLAPSED" in said and "NOT better than counting characters" in said


def test_a_model_with_opinions_that_are_wrong_is_not_called_collapsed_but_worse_than_the_prior():
    labels, lengths, logits = rows(shares=(0.6, 0.25, 0.15))
    said = " ".join(scored(labels, lengths, np.roll(logits, 1, axis=0))["verdict"])
    assert "COLLAPSED" not in said and "NOT better than the class prior" in said


def test_the_best_reachable_score_is_named_with_the_share_of_the_gap_closed():
    labels, lengths, logits = rows()
    truth = np.full((len(labels), 3), 0.05)
    truth[np.arange(len(labels)), labels] = 0.9
    result = scored(labels, lengths, logits, reachable=truth[len(labels) // 2:])
    prior, best, final = (result["results"][name]["log_loss"] for name in (
        "class prior", "best reachable", "model, calibrated"))
    assert f"{(prior - final) / (prior - best):.0%} of the gap" in result["verdict"][-1]
    assert best == pytest.approx(-np.log(0.9))


def test_the_calibrated_figure_comes_from_a_temperature_fitted_on_other_rows():
    labels, lengths, logits = rows(60)
    result = scored(labels, lengths, logits)["results"]["model, calibrated"]["log_loss"]
    half, own = len(labels) // 2, metrics.fit_temperature(logits[30:], labels[30:])
    flattered = metrics.evaluate(metrics.averaged(logits[half:], own), labels[half:])["log_loss"]
    assert result > flattered


def test_out_of_fold_figures_use_each_row_once_and_baselines_that_did_not_see_it():
    labels, lengths, logits = rows()
    part = np.arange(len(labels)) % 3
    splits = [(np.flatnonzero(part != k), np.flatnonzero(part == k)) for k in range(3)]
    result = score_folds([logits[valid] for _, valid in splits], splits, labels, lengths, seed=1)["results"]
    assert all(r["rows"] == len(labels) for r in result.values())
    assert result["out of fold"]["log_loss"] < result["length only"]["log_loss"] < result["class prior"]["log_loss"]


def test_the_table_the_confusion_matrix_and_the_verdict_are_on_the_screen():
    result = scored(*rows())
    text = as_text(result)
    for name, figures in result["results"].items():
        assert f"{name} " in text and f"{figures['log_loss']:.4f}" in text
    assert "people \\ model" in text and result["verdict"][0] in text


def test_the_model_card_says_what_it_was_trained_on_and_what_it_scored():
    report = scored(*rows()) | {"train_rows": 300, "valid_rows": 300, "steps": 90, "best_step": 60}
    card = model_card(report, "minipref-tiny", ["train.csv"], "tiny", {"lr": 1e-3}, 7)
    assert f"{report['results']['model, calibrated']['log_loss']:.4f}" in card and "| lr | 0.001 |" in card
    bare = model_card({"train_rows": 300, "steps": 90, "best_step": 0}, "e", ["t.csv"], "tiny", {}, 7)
    assert "there is no score" in bare
