"""Surface features, the regression on them, and its blend with a model."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from small import write_encoder

from minipref import explain
from minipref.checkpoint import load_classifier
from minipref.data import Pair, swap_classes
from minipref.metrics import cross_fit, evaluate, fit_blend, fit_temperature, score_logits, softmax, swap_averaged
from minipref.model import init_weights
from minipref.predictor import Judge, load_judge
from minipref.runtime import InputError
from minipref.surface import (
    COUNTS,
    FEATURES,
    LogisticRegression,
    counts,
    fit_surface,
    length_features,
    logistic_regression,
    surface_features,
)
from minipref.tokenizer import load_tokenizer


def test_length_features_turn_with_the_responses():
    feature = length_features(np.array([[10, 99, 9], [10, 9, 99]]))
    assert feature[0] == pytest.approx([math.log(10), math.log(10), math.log(11), math.log(100), math.log(10)])
    assert feature[1, 0] == -feature[0, 0]
    assert feature[1, 1] == feature[0, 1]


def test_logistic_regression_is_scikit_learns():
    linear_model = pytest.importorskip("sklearn.linear_model")
    rng = np.random.default_rng(0)
    x = rng.standard_normal((300, 4)) * [1, 10, .1, 1] + [0, 5, 0, 1]
    x = np.column_stack([x, np.ones(300)])                   # a column that never varies must do no harm
    y = (x[:, :3] / [1, 10, .1] + rng.gumbel(size=(300, 3))).argmax(1)
    z = (x - x.mean(0)) / np.where(x.std(0) == 0, 1, x.std(0))
    theirs = linear_model.LogisticRegression(C=1 / 2.0, tol=1e-10, max_iter=5000).fit(z, y).predict_proba(z)
    assert softmax(logistic_regression(x, y, penalty=2.0).logits(x)) == pytest.approx(theirs, abs=1e-5)


def test_a_penalty_for_each_feature_is_a_single_one_on_features_of_another_scale():
    rng = np.random.default_rng(1)
    x, y = rng.standard_normal((200, 2)), rng.integers(0, 3, 200)
    y[x[:, 0] > 0.5], y[x[:, 1] > 1] = 0, 1
    both, none_of_the_second = (logistic_regression(x, y, np.array([1.0, p])).weights for p in (1.0, 1e9))
    assert both == pytest.approx(logistic_regression(x, y).weights, abs=1e-9)
    assert abs(none_of_the_second[1]).max() < 1e-6 < 0.1 < abs(none_of_the_second[0]).max()


@pytest.mark.parametrize("turns, wanted", [
    (("abc",), [3, 0, 0, 0, 0, 0]),
    (("1. one\n 2) two\n- three\n• four\n5 five\n-six",), [41, 5, 4, 0, 3, 0]),
    (("```py\n42\n```", None, " "), [15, 4, 0, 1, 2, 2]),
    (("a", "b"), [3, 1, 0, 0, 0, 0])])
def test_counts(turns, wanted):
    assert dict(zip(COUNTS, counts(turns))) == dict(zip(COUNTS, wanted))


PAIRS = [Pair("", ("Why?",), ("- a\n- b",), ("No 1",)), Pair("", ("Why?", "And?"), ("Same.", None), ("Same.", None)),
         Pair("", ("",), ("",), ("x" * 999,))]


def test_features_are_named_and_counted_on_the_whole_text():
    named = [dict(zip(FEATURES, row)) for row in surface_features(PAIRS)]
    assert named[0]["log(list items of A / of B)"] == pytest.approx(math.log(3))
    assert named[0]["|log(list items of A / of B)|"] == named[0]["log(list items of A / of B)"]
    assert named[0]["log(digits of A / of B)"] == pytest.approx(-math.log(2))
    assert [row["identical responses"] for row in named] == [0, 1, 0]
    assert named[1]["log turns"] == math.log(2) and named[0]["log turns"] == 0
    assert named[2]["log(characters of A / of B)"] == pytest.approx(-math.log(1000))
    assert named[2]["log mean characters"] == pytest.approx(math.log(1000) / 2)


def labelled(rows: int, seed: int = 0) -> tuple[list[Pair], np.ndarray]:
    """Pairs in which the longer answer usually wins, and equal answers are ties."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 200, (rows, 2))
    sizes[rng.random(rows) < 0.2, 1] = 0
    pairs = [Pair("", ("p",), ("a" * a,), ("a" * (b or a),)) for a, b in sizes]
    longer = np.array([np.log(len(p.response_a[0]) / len(p.response_b[0])) for p in pairs])
    labels = np.where(longer == 0, 2, (longer + rng.logistic(size=rows) * 0.7 < 0).astype(int))
    return pairs, labels


def test_the_regression_treats_a_and_b_alike():
    pairs, labels = labelled(300)
    surface = fit_surface(surface_features(pairs), labels)
    turned = [Pair("", p.prompt, p.response_b, p.response_a) for p in pairs]
    logits = surface.logits(surface_features(pairs))
    assert surface.logits(surface_features(turned)) == pytest.approx(swap_classes(logits), abs=1e-4)
    scores = evaluate(softmax(logits), labels)
    assert scores["accuracy"] > 0.75 and scores["per_class"]["tie"]["f1"] > 0.95, "identical responses are ties"


def test_other_features_than_length_count_in_full_with_many_rows_and_hardly_with_few():
    rng = np.random.default_rng(2)
    features = rng.standard_normal((15_000, len(FEATURES)))
    digits = FEATURES.index("log(digits of A / of B)")
    labels = (rng.logistic(size=len(features)) > features[:, digits]).astype(int)
    few, many = (fit_surface(features[:n], labels[:n]).weights[digits, 0] for n in (200, 15_000))
    assert few < 0.25 and many == pytest.approx(0.5, rel=0.2)


# --- the blend

def parts(rows: int, of_model: float, of_surface: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Logits (rows, 2, 3), three times too large, surface logits (rows, 3), and labels drawn from their sum."""
    rng = np.random.default_rng(seed)
    model, surface = of_model * rng.standard_normal((rows, 3)), of_surface * rng.standard_normal((rows, 3))
    labels = (model + surface + rng.gumbel(size=(rows, 3))).argmax(1)
    noise = 0.05 * rng.standard_normal((rows, 2, 3))
    return 3 * (model[:, None] + noise), surface, labels


def test_the_blend_finds_the_temperature_and_the_weight_that_the_labels_were_drawn_with():
    temperature, weight = fit_blend(*parts(20_000, 1.0, 0.5))
    assert temperature == pytest.approx(3, rel=0.05) and weight == pytest.approx(1, rel=0.05)


def test_a_surface_that_says_nothing_hardly_counts():
    logits, _, labels = parts(5000, 1.0, 0.0)
    nothing = 0.5 * np.random.default_rng(9).standard_normal((5000, 3))
    temperature, weight = fit_blend(logits, nothing, labels)
    assert 0 <= weight < 0.1 and temperature == pytest.approx(fit_temperature(logits, labels), rel=0.01)
    logits, surface, labels = parts(5000, 1.0, 0.5)
    assert fit_blend(logits, -surface, labels) == (fit_temperature(logits, labels), 0.0), "never negative"


def test_a_model_that_says_nothing_leaves_the_surface_alone():
    logits, surface, labels = parts(5000, 0.0, 0.5)
    temperature, weight = fit_blend(logits * 40, surface, labels)
    assert temperature == pytest.approx(20, rel=0.01) and weight == pytest.approx(1, abs=0.15)


@pytest.mark.parametrize("of_model, of_surface", [(1.0, 0.3), (0.0, 0.5), (1.0, 0.0), (0.0, 0.0)])
def test_the_blend_is_never_much_worse_than_the_better_of_its_parts(of_model, of_surface):
    logits, surface, labels = parts(3000, of_model, of_surface, seed=4)
    blend, model = (evaluate(cross_fit(logits, part, labels, 0), labels)["log_loss"] for part in (surface, None))
    assert blend < min(model, evaluate(softmax(surface), labels)["log_loss"]) + 0.002


def test_no_row_of_a_blend_is_fitted_on_itself():
    logits, surface, labels = parts(10, 0.0, 0.0)
    wrong = 9 * np.eye(3)[labels] + surface
    seen = evaluate(swap_averaged(logits, 20.0, fit_blend(logits, wrong, labels)[1] * wrong), labels)["log_loss"]
    assert evaluate(cross_fit(logits, wrong, labels, 0), labels)["log_loss"] != pytest.approx(seen)
    alone = cross_fit(logits[:1], surface[:1], labels[:1], 0)
    assert alone == pytest.approx(swap_averaged(logits[:1], 1.0))


def test_the_score_is_compared_with_the_surface_and_is_the_blends_if_there_is_one():
    logits, surface, labels = parts(400, 1.0, 0.5)
    lengths = np.ones((400, 3))
    for blend, final in ((True, "blend"), (False, "model, calibrated")):
        scored = score_logits(logits, labels, lengths, labels, lengths, 0, surface=surface, blend=blend)
        loss = scored["results"][final]["log_loss"]
        assert scored["final"] == final and ("blend" in scored["results"]) == blend
        assert f"than the surface-features baseline: {loss:.4f} against" in scored["conclusions"][0]


# --- in a trained model

@pytest.fixture(scope="module")
def blended(tmp_path_factory):
    """The folder of a judge that adds a surface's logits, and the same judge without them."""
    folder = write_encoder(tmp_path_factory.mktemp("blended"), dropout=0.0)
    model = load_classifier(folder)
    torch.manual_seed(3)
    init_weights(model, 0.3)
    surface = fit_surface(surface_features(labelled(300)[0]), labelled(300)[1])
    Judge(model, load_tokenizer(folder), 96, 1.5, surface=surface).save(folder, replace=True)
    return folder, Judge(model.eval(), load_tokenizer(folder), 96, 1.5), surface


def test_a_saved_blend_predicts_the_softmax_of_the_sum(blended):
    folder, alone, surface = blended
    for pair in PAIRS:
        texts = [(pair.prompt, pair.response_a, pair.response_b)]
        both = alone.compare_many(texts, swap_average=False)
        wanted = softmax(np.log(both) + surface.logits(surface_features([pair])))
        found = load_judge(folder).compare_many(texts, swap_average=False)
        assert found == pytest.approx(wanted, abs=1e-6)
        assert abs(found - both).max() > 0.01


def test_an_explanation_has_the_blends_probabilities(blended):
    folder, _, _ = blended
    judge = load_judge(folder, fast=False)
    found = explain.explain(judge, PAIRS[0], 96).attribution.probabilities.mean(0)
    assert found == pytest.approx(judge.compare_many([PAIRS[0]])[0], abs=1e-6)


@pytest.mark.parametrize("change", [{"features": ["length"]}, {"mean": [0.0]}, {"weights": None}, {"spread": "x"},
                                    {"mean": [float("nan")] * len(FEATURES)}])
def test_a_regression_of_other_features_is_refused(blended, tmp_path, change):
    folder = shutil.copytree(blended[0], tmp_path / "model")
    settings = json.loads((folder / "minipref.json").read_text())
    settings["surface"] |= change
    (folder / "minipref.json").write_text(json.dumps(settings))
    with pytest.raises(InputError, match=r"minipref\.json: a surface regression of other features"):
        load_judge(folder)


def test_the_weight_is_part_of_the_stored_regression():
    surface = LogisticRegression(np.zeros(2), np.ones(2), np.arange(9.0).reshape(3, 3))
    x = np.ones((1, 2))
    assert surface.times(0.5).logits(x) == pytest.approx(0.5 * surface.logits(x))
