"""Scores, baselines and calibration against scikit-learn or by hand; conclusions follow from the scores."""

import math

import numpy as np
import pytest

from minipref import metrics
from minipref.metrics import (
    baselines,
    class_prior,
    confusion_table,
    cross_fit,
    evaluate,
    fit_temperature,
    is_constant,
    results_text,
    score_folds,
    score_logits,
    score_table,
    softmax,
    swap_averaged,
)
from minipref.surface import FEATURES


def predictions(rows: int = 500, seed: int = 0, sharpness: float = 1.5) -> tuple[np.ndarray, np.ndarray]:
    """Random probabilities and correlated labels."""
    rng = np.random.default_rng(seed)
    logits = sharpness * rng.standard_normal((rows, 3))
    labels = (logits + rng.gumbel(size=(rows, 3))).argmax(1)
    return softmax(logits), labels


@pytest.mark.parametrize("rows, seed", [(1, 0), (7, 1), (500, 2), (5000, 3)])
def test_every_score_is_scikit_learns(rows, seed):
    sklearn_metrics = pytest.importorskip("sklearn.metrics")
    p, y = predictions(rows, seed)
    found, predicted = evaluate(p, y), p.argmax(1)
    named = sorted(set(y) | set(predicted))
    precision, recall, f1, _ = sklearn_metrics.precision_recall_fscore_support(
        y, predicted, labels=named, average="macro", zero_division=0)
    assert found["log_loss"] == pytest.approx(sklearn_metrics.log_loss(y, p, labels=[0, 1, 2]), abs=1e-12)
    assert found["accuracy"] == pytest.approx(sklearn_metrics.accuracy_score(y, predicted), abs=1e-12)
    assert (found["precision"], found["recall"], found["f1"]) == pytest.approx((precision, recall, f1), abs=1e-12)
    assert found["confusion"] == sklearn_metrics.confusion_matrix(y, predicted, labels=[0, 1, 2]).tolist()
    by_class = zip(*sklearn_metrics.precision_recall_fscore_support(y, predicted, labels=[0, 1, 2], zero_division=0))
    for ours, theirs in zip(found["per_class"].values(), by_class):
        assert tuple(ours.values()) == pytest.approx(theirs, abs=1e-12)


def test_a_class_that_is_never_predicted_counts_as_zero_and_one_that_never_occurs_not_at_all():
    sklearn_metrics = pytest.importorskip("sklearn.metrics")
    p = np.array([[.8, .1, .1], [.6, .3, .1], [.5, .4, .1], [.2, .7, .1]])
    for y in (np.array([0, 0, 2, 1]), np.array([0, 1, 1, 1]), np.array([0, 0, 0, 0])):
        theirs = sklearn_metrics.precision_recall_fscore_support(y, p.argmax(1), average="macro", zero_division=0)
        found = evaluate(p, y)
        assert (found["precision"], found["recall"], found["f1"]) == pytest.approx(theirs[:3], abs=1e-12)


def test_log_loss_of_known_answers():
    thirds = np.full((4, 3), 1 / 3)
    assert evaluate(thirds, np.array([0, 1, 2, 0]))["log_loss"] == pytest.approx(math.log(3), abs=1e-15)
    p = np.array([[.5, .25, .25], [.1, .8, .1]])
    assert evaluate(p, np.array([0, 2]))["log_loss"] == pytest.approx((math.log(2) + math.log(10)) / 2, abs=1e-15)


def test_a_probability_of_zero_for_the_truth_costs_36_nats_and_is_counted():
    sklearn_metrics = pytest.importorskip("sklearn.metrics")
    p = np.array([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    found = evaluate(p, np.array([1, 1]))
    assert found["clipped"] == 1
    assert found["log_loss"] == pytest.approx(sklearn_metrics.log_loss([1, 1], p, labels=[0, 1, 2]), abs=1e-12)
    assert found["log_loss"] == pytest.approx(-math.log(np.finfo(np.float64).eps) / 2)
    assert evaluate(p, np.array([0, 1]))["clipped"] == 0


def test_float32_probabilities_are_scored_in_float64():
    p, y = predictions(2000)
    wanted = -np.log(p.astype(np.float32).astype(np.float64)[np.arange(2000), y]).mean()
    assert evaluate(p.astype(np.float32), y)["log_loss"] == pytest.approx(wanted, abs=1e-14)


def test_confusion_has_truth_in_rows_and_prediction_in_columns():
    p = np.array([[.1, .8, .1], [.1, .8, .1], [.1, .1, .8]])
    assert evaluate(p, np.array([0, 0, 2]))["confusion"] == [[0, 2, 0], [0, 0, 0], [0, 0, 1]]
    table = confusion_table(evaluate(p, np.array([0, 0, 2]))).splitlines()
    assert table[1].split() == ["A", "0", "2", "0"]


def test_calibration_error_by_hand():
    # Confidence .9 in three rows, two right: |.9 - 2/3|. Confidence .5 in one row, right: |.5 - 1|.
    p = np.array([[.9, .05, .05]] * 3 + [[.25, .5, .25]])
    found = evaluate(p, np.array([0, 0, 1, 1]))
    assert found["ece"] == pytest.approx(3 / 4 * abs(.9 - 2 / 3) + 1 / 4 * abs(.5 - 1))
    assert [bin["rows"] for bin in found["calibration"]] == [1, 3]
    assert found["calibration"][1] == pytest.approx({"confidence": .9, "accuracy": 2 / 3, "rows": 3})


def test_calibration_error_is_small_for_honest_and_large_for_boastful_probabilities():
    p, y = predictions(20_000, sharpness=1.0)
    boastful = softmax(3 * np.log(p))
    assert evaluate(p, y)["ece"] < 0.015
    assert evaluate(boastful, y)["ece"] > 0.15
    certain = np.eye(3)[[0, 1, 2]]
    assert evaluate(certain, np.array([0, 1, 2]))["ece"] == 0


@pytest.mark.parametrize("p, y", [
    (np.full((2, 2), .5), np.array([0, 1])), (np.full((2, 3), 1 / 3), np.array([0])),
    (np.full(3, 1 / 3), np.array([0])), (np.full((2, 3), 1 / 3), np.array([0, 3])),
    (np.full((2, 3), 1 / 3), np.array([0, -1])),
    (np.empty((0, 3)), np.empty(0, dtype=int)), (np.array([[.5, .5, .5]]), np.array([0])),
    (np.array([[1.5, -.25, -.25]]), np.array([0])), (np.array([[np.nan, .5, .5]]), np.array([0])),
])
def test_what_is_no_prediction_is_a_value_error(p, y):
    with pytest.raises(ValueError):
        evaluate(p, y)


# Baselines.

def test_the_class_prior_counts_every_class_once_more():
    assert class_prior(np.array([0, 0, 1])) == pytest.approx([3 / 6, 2 / 6, 1 / 6])


def test_the_baselines_of_the_competitions_labels_are_the_known_scores():
    labels = np.repeat([0, 1, 2], [20_064, 19_652, 17_761])
    lengths = np.tile([[50, 100, 100]], (len(labels), 1))
    scores = baselines(lengths, labels, lengths, labels)
    assert scores["uniform"]["log_loss"] == pytest.approx(1.0986, abs=5e-5)
    assert scores["class prior"]["log_loss"] == pytest.approx(1.0972, abs=5e-5)
    assert scores["length only"]["log_loss"] == pytest.approx(1.0972, abs=5e-5), "equal lengths say nothing"


def test_the_length_baseline_learns_that_longer_responses_win():
    rng = np.random.default_rng(0)
    lengths = rng.integers(10, 1000, (2000, 3))
    labels = np.where(lengths[:, 1] > lengths[:, 2], 0, 1)
    scores = baselines(lengths[:1000], labels[:1000], lengths[1000:], labels[1000:])
    assert scores["length only"]["accuracy"] > 0.95
    assert scores["length only"]["log_loss"] < scores["class prior"]["log_loss"] / 2


def test_constant_predictions_are_those_that_hardly_vary_between_rows():
    p, _ = predictions()
    assert not is_constant(p)
    assert is_constant(np.tile([.35, .34, .31], (500, 1)) + 1e-4 * p)
    assert is_constant([[.35, .34, .31]] * 2) and not is_constant([[.35, .34, .31]]), "one row cannot tell"


# The temperature.

def test_softmax_takes_any_logits():
    assert softmax([[1000., 0., -1000.]]) == pytest.approx(np.array([[1., 0., 0.]]))
    assert softmax([[.1, .2, .3]]).sum() == pytest.approx(1, abs=1e-15)


def test_averaging_takes_the_mean_of_the_orders_probabilities_not_of_their_logits():
    logits = np.array([[[4., 0., 0.], [0., 2., 0.]]])
    wanted = (softmax([[2., 0., 0.]]) + softmax([[0., 1., 0.]])) / 2
    assert swap_averaged(logits, 2.0) == pytest.approx(wanted, abs=1e-15)


@pytest.mark.parametrize("too_sharp", [0.3, 1.0, 2.5, 8.0])
def test_the_temperature_undoes_the_sharpening(too_sharp):
    rng = np.random.default_rng(1)
    honest = rng.standard_normal((30_000, 1, 3))
    labels = (honest[:, 0] + rng.gumbel(size=(30_000, 3))).argmax(1)
    assert fit_temperature(too_sharp * honest, labels) == pytest.approx(too_sharp, rel=0.05)


def test_the_temperature_has_the_least_log_loss_of_a_fine_grid_but_for_its_weak_prior():
    rng = np.random.default_rng(2)
    logits = 3 * rng.standard_normal((400, 2, 3))
    labels = (logits.mean(1) / 2 + rng.gumbel(size=(400, 3))).argmax(1)

    def loss(temperature):
        return 400 * evaluate(swap_averaged(logits, temperature), labels)["log_loss"] + np.log(temperature) ** 2 / 2
    best = loss(fit_temperature(logits, labels))
    assert min(map(loss, np.geomspace(1 / 20, 20, 400))) > best - 1e-6


def test_a_few_rows_that_are_all_right_do_not_ask_for_boundless_confidence_but_many_have_their_way():
    right = np.array([[[3., 0., 0.]]])
    few, many = (fit_temperature(right.repeat(n, 0), np.zeros(n, dtype=int)) for n in (5, 100_000))
    assert 0.5 < few < 1 and many < 0.3


def test_the_temperature_stays_between_a_twentieth_and_twenty():
    sure = 9 * np.array([[[1., 0., 0.]]]).repeat(100_000, 0)
    assert 1 / 20 <= fit_temperature(sure, np.zeros(100_000, dtype=int)) < 1
    assert fit_temperature(sure, np.ones(100_000, dtype=int)) == pytest.approx(20, rel=1e-3)


def test_cross_fitting_uses_no_row_to_calibrate_itself(monkeypatch):
    rng = np.random.default_rng(3)
    logits, labels = rng.standard_normal((103, 2, 3)), rng.integers(0, 3, 103)
    logits[:, 0, 0] = np.arange(103)                         # a row's name
    logits[:, 0, 1:] += np.arange(103)[:, None]              # and yet no certainty
    seen = []

    def remember(rows, _labels):
        seen.append(set(rows[:, 0, 0].astype(int)))
        return len(seen) + 1                                 # 2 for the first fold, 3 for the second, ...

    monkeypatch.setattr(metrics, "fit_temperature", remember)
    probabilities = cross_fit(logits, None, labels, seed=5)
    assert len(seen) == 5
    assert set.union(*seen) == set(range(103))
    for row in range(103):
        folds = [f for f in range(5)
                 if np.allclose(probabilities[row], swap_averaged(logits[[row]], f + 2)[0], atol=1e-12)]
        assert len(folds) == 1, f"row {row} was calibrated in one fold"
        assert row not in seen[folds[0]], f"row {row} was calibrated by itself"


def test_cross_fitting_is_repeatable_and_differs_by_seed():
    rng = np.random.default_rng(4)
    logits = 2 * rng.standard_normal((60, 1, 3))
    labels = (logits[:, 0] + rng.gumbel(size=(60, 3))).argmax(1)
    first, again, other = (cross_fit(logits, None, labels, seed=seed) for seed in (1, 1, 2))
    assert np.array_equal(first, again) and not np.array_equal(first, other)


def test_cross_fitting_a_single_row_leaves_it_as_it_is():
    logits = np.array([[[1., 2., 3.]]])
    assert cross_fit(logits, None, np.array([0]), seed=0) == pytest.approx(softmax(logits[:, 0]), abs=1e-12)


# The tables.

def test_the_score_table_has_a_line_for_each_result():
    p, y = predictions(50)
    result = evaluate(p, y)
    lines = score_table({"model": result, "a longer name": result}).splitlines()
    assert len(lines) == 3
    assert lines[2].startswith("a longer name")
    assert f"{result['log_loss']:.4f}" in lines[1]
    assert len({len(line) for line in lines}) == 1


# --- conclusions

def preference_rows(count=600, seed=0, shares=(0.36, 0.34, 0.30)):
    """Labels, segment lengths, and logits (N, 2, 3) that depend on the label, from a fixed seed."""
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


def test_a_good_model_is_said_to_beat_the_length_only_baseline():
    result = scored(*preference_rows())
    assert result["conclusions"][0].startswith("Better than the length-only baseline")
    text = " ".join(result["conclusions"])
    assert "NOT" not in text and "CONSTANT" not in text


def test_a_model_that_predicts_the_same_for_every_row_is_said_to_have_learnt_only_the_prior():
    labels, lengths, logits = preference_rows()
    said = " ".join(scored(labels, lengths, np.zeros_like(logits) + [0.1, 0.05, 0])["conclusions"])
    assert "CONSTANT PREDICTIONS" in said and "NOT better than the length-only baseline" in said
    assert "(docs/troubleshooting.md)" in said


def test_confident_and_wrong_predictions_are_not_called_constant_but_worse_than_the_prior():
    labels, lengths, logits = preference_rows(shares=(0.6, 0.25, 0.15))
    said = " ".join(scored(labels, lengths, np.roll(logits, 1, axis=0))["conclusions"])
    assert "CONSTANT PREDICTIONS" not in said and "NOT better than the class-prior baseline" in said


def test_the_gap_closed_to_the_bayes_optimal_score_is_given():
    labels, lengths, logits = preference_rows()
    truth = np.full((len(labels), 3), 0.05)
    truth[np.arange(len(labels)), labels] = 0.9
    result = scored(labels, lengths, logits, bayes_optimal=truth[len(labels) // 2:])
    prior, best, final = (result["results"][name]["log_loss"] for name in (
        "class prior", "Bayes-optimal", "model, calibrated"))
    assert f"Bayes-optimal score: {(prior - final) / (prior - best):.0%}." in result["conclusions"][-1]
    assert best == pytest.approx(-np.log(0.9))


def test_the_calibrated_score_comes_from_a_temperature_fitted_on_other_preference_rows():
    labels, lengths, logits = preference_rows(60)
    result = scored(labels, lengths, logits)["results"]["model, calibrated"]["log_loss"]
    half, own = len(labels) // 2, fit_temperature(logits[30:], labels[30:])
    flattered = evaluate(swap_averaged(logits[half:], own), labels[half:])["log_loss"]
    assert result > flattered


def test_out_of_fold_scores_use_each_row_once_and_baselines_that_did_not_see_it():
    labels, lengths, logits = preference_rows()
    part = np.arange(len(labels)) % 3
    splits = [(np.flatnonzero(part != k), np.flatnonzero(part == k)) for k in range(3)]
    features = np.zeros((len(labels), len(FEATURES)))
    result = score_folds([logits[valid] for _, valid in splits], splits, labels, lengths, 1, features, True)["results"]
    assert all(r["rows"] == len(labels) for r in result.values())
    assert result["out of fold"]["log_loss"] < result["length only"]["log_loss"] < result["class prior"]["log_loss"]


def test_the_table_the_confusion_matrix_and_the_conclusions_are_printed():
    result = scored(*preference_rows())
    text = results_text(result)
    for name, scores in result["results"].items():
        assert f"{name} " in text and f"{scores['log_loss']:.4f}" in text
    assert "label \\ prediction" in text and result["conclusions"][0] in text
