"""The synthetic dataset: a known rule, exact probabilities, no shortcut by length or by words."""

import hashlib
import json
import math
import random
import re

import numpy as np
import pandas as pd
import pytest
from scipy.sparse import hstack
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from minipref import synthetic
from minipref.metrics import baselines, evaluate
from minipref.runtime import InputError
from minipref.synthetic import generator, rule, texts
from minipref.synthetic.__main__ import main


@pytest.fixture(scope="module")
def split() -> tuple[synthetic.SyntheticRows, synthetic.SyntheticRows]:
    return synthetic.train_and_test(train_rows=5000, test_rows=3000, train_seed=31, test_seed=32)


@pytest.fixture(scope="module")
def rows(split) -> synthetic.SyntheticRows:
    return split[0]


def last_turns(rows: synthetic.SyntheticRows, column: str) -> list[str]:
    return [json.loads(cell)[-1] for cell in rows.frame[column]]


def answers_with_flaws(rows: synthetic.SyntheticRows):
    """(kind, prompt, answer, flaws) of every answer."""
    for side in "ab":
        columns = [f"{side}_{flaw}" for flaw in synthetic.FLAWS]
        replies = last_turns(rows, f"response_{side}")
        for kind, prompt, reply, marks in zip(rows.flaws["kind"], last_turns(rows, "prompt"), replies,
                                              rows.flaws[columns].to_numpy()):
            yield kind, prompt, reply, {flaw for flaw, mark in zip(synthetic.FLAWS, marks) if mark}


# --- The files ---

@pytest.mark.parametrize(("train_rows", "test_rows", "train_seed", "test_seed", "digests"), [
    (200, 50, 1, 2, {
        "train": "519fd5ce4973fa128420ff344e32801f304c17254a692ce96e6493b55b3b798c",
        "test": "69ca381ed0da0205f59664d32f1a93795bfada4071b23aaf9db9ab172fc4cea3",
        "test_labelled": "3aa9027bcf4bddb39871231f4fa76d318da293d62c7151602e9afd441e3ef028",
        "truth": "e1b510428e01c2ca337952f156291e7882bb13a9878fff907dd22ae7bf6bf94e",
    }),
    (2000, 500, 101, 202, {
        "train": "65256061603b7af16c511cc073e0ad09f9d2146300e4d18ac5b2a9095da34170",
        "test": "f7619c7f6b622984a1c6e4c31cecdb1bff7c7aeaafe655b88c628206334996ee",
        "test_labelled": "067042a9a42d924832f28ad8c8a40539f82f5f5a375b11cdef019b98e26c5b9e",
        "truth": "47ae5c2c810016c1bb3f8f24cd193b79157d84cdf53dabcf5273bc8ed1a343e8",
    }),
    pytest.param(45_000, 1500, 1, 2, {                                      # the files that `make train` writes
        "train": "038cbc1d11aa0d5b29117368384611b32fa45c76e5d3ad37f534c09a59d1d5a2",
        "test": "df809f3e9649512d217bedc7272d2c1c8f9ff75fbc9e757fafbecacb1c5627b2",
        "test_labelled": "49900da0ae44761925535809f4a59b656f66c77596af70b91a24fad0b696d9f1",
        "truth": "20cafac5a60f5d5f46dce09e46790eb9e416506ec84749b26d70423859963758",
    }, marks=pytest.mark.slow),
])
def test_equal_seeds_give_equal_bytes_today_and_in_years(tmp_path, train_rows, test_rows, train_seed, test_seed,
                                                         digests):
    paths = synthetic.write_dataset(tmp_path, train_rows=train_rows, test_rows=test_rows, train_seed=train_seed,
                                    test_seed=test_seed)
    assert {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in paths.items()} == digests


def test_other_seeds_give_other_rows():
    assert not synthetic.generate(20, 1).frame.equals(synthetic.generate(20, 2).frame)


def test_only_random_is_drawn_from_whose_sequence_python_keeps(monkeypatch):
    class OnlyRandom(random.Random):
        def refuse(self, *args, **kwargs):
            raise AssertionError("a method whose sequence may change between Python versions")
        choice = choices = sample = shuffle = randint = randrange = uniform = getrandbits = refuse

    expected = synthetic.generate(200, 5)
    monkeypatch.setattr(generator, "Random", OnlyRandom)
    assert synthetic.generate(200, 5).frame.equals(expected.frame)


def test_files_read_as_kaggle_rows(tmp_path):
    paths = synthetic.write_dataset(tmp_path, train_rows=300, test_rows=100)
    train, test, labelled, truth = (pd.read_csv(paths[name], dtype={"id": str})
                                    for name in ("train", "test", "test_labelled", "truth"))
    assert list(train) == list(labelled) == ["id", "model_a", "model_b", "prompt", "response_a", "response_b",
                                             "winner_model_a", "winner_model_b", "winner_tie"]
    assert list(test) == ["id", "prompt", "response_a", "response_b"]
    assert test.equals(labelled[list(test)])
    for frame in (train, labelled):
        assert (frame[generator.WINNERS].sum(axis=1) == 1).all()
        assert frame[generator.WINNERS].isin([0, 1]).all(axis=None)
        assert (frame["model_a"] != frame["model_b"]).all()
    for frame in (train, test):
        turns = frame[["prompt", "response_a", "response_b"]].map(json.loads)
        assert turns.map(lambda cell: all(isinstance(turn, str) and turn for turn in cell)).all(axis=None)
        assert turns.map(len).nunique(axis=1).eq(1).all()
        assert 0.02 < (turns["prompt"].map(len) == 2).mean() < 0.15
    assert (train["id"].astype(int) > 2**31 - 1).mean() == pytest.approx(0.5, abs=0.1)
    assert list(truth["id"]) == [*train["id"], *test["id"]] and truth["id"].is_unique
    np.testing.assert_allclose(truth[["p_a", "p_b", "p_tie"]].sum(axis=1), 1.0, atol=1e-9)
    expected = synthetic.generate(300, generator.TRAIN_SEED).probabilities
    np.testing.assert_allclose(truth[["p_a", "p_b", "p_tie"]][:300], expected, atol=1e-9)


def test_training_and_test_rows_share_no_prompt_and_no_id(split):
    train, test = split
    for column in ("prompt", "id"):
        assert not set(train.frame[column]) & set(test.frame[column])


def test_apart_from_is_what_keeps_prompts_and_ids_apart():
    first = synthetic.generate(300, 7)
    assert synthetic.generate(300, 7).frame.equals(first.frame)
    apart = synthetic.generate(300, 7, apart_from=first)
    assert not set(first.frame["prompt"]) & set(apart.frame["prompt"])
    assert not set(first.frame["id"]) & set(apart.frame["id"])


def test_seeds_on_their_own_share_few_prompts(rows):
    other = synthetic.generate(2000, 33).frame["prompt"]
    assert other.isin(set(rows.frame["prompt"])).mean() < 0.10


def test_some_rows_share_their_prompt_so_that_grouped_splits_have_work(rows):
    shared = rows.frame["prompt"].duplicated(keep=False).mean()
    assert 0.10 < shared < 0.40
    assert rows.frame["id"].is_unique
    answers = rows.frame[["prompt", "response_a", "response_b"]]
    assert answers.duplicated().mean() < 0.01


# --- The rule ---

def test_the_three_logits_are_linear_in_the_difference():
    for d in (-3.0, 0.0, 1.5, 6.0):
        p_a, p_b, p_tie = rule.outcome_probabilities(d)
        assert math.log(p_a / p_b) == pytest.approx(d, abs=0.01)
        assert math.log(p_a / p_tie) == pytest.approx(d / 2 - math.log(rule.TIE), abs=0.01)
    assert rule.outcome_probabilities(0.0) == (0.2, 0.2, 0.6)


def test_probabilities_are_a_distribution_at_any_difference():
    for d in np.linspace(-40, 40, 401):
        p = rule.outcome_probabilities(d)
        assert min(p) >= 0 and sum(p) == pytest.approx(1.0, abs=1e-12)


def test_exchanging_the_answers_exchanges_the_probabilities():
    for d in np.linspace(0, 30, 61):
        p_a, p_b, p_tie = rule.outcome_probabilities(d)
        assert rule.outcome_probabilities(-d) == (p_b, p_a, p_tie)


def test_every_row_has_the_probabilities_of_its_flaws_and_words(rows):
    weights = {"off": 8.0, "cut": 5.0, "form": 4.0, "amount": 4.0, "wrong": 5.0}
    utilities = {}
    for side in "ab":
        words = np.array([len(reply.split()) for reply in last_turns(rows, f"response_{side}")])
        utilities[side] = 0.03 * words - sum(weight * rows.flaws[f"{side}_{flaw}"] for flaw, weight in weights.items())
    half = (utilities["a"] - utilities["b"]).to_numpy() / 2
    shares = np.stack([np.exp(half), np.exp(-half), np.full(len(half), 3.0)], axis=1)
    np.testing.assert_allclose(rows.probabilities, shares / shares.sum(axis=1, keepdims=True), atol=1.1e-6)


def test_labels_come_as_often_as_their_probabilities_say():
    rows = synthetic.generate(12_000, 41)
    for outcome in range(3):
        p, won = rows.probabilities[:, outcome], rows.labels == outcome
        for low, high in ((0, 0.05), (0.05, 0.25), (0.25, 0.5), (0.5, 0.7), (0.7, 0.9), (0.9, 1.01)):
            inside = (p >= low) & (p < high)
            if inside.sum() >= 100:
                spread = math.sqrt((p[inside] * (1 - p[inside])).sum())
                assert abs(won[inside].sum() - p[inside].sum()) < 4 * spread, (outcome, low)


def test_class_shares_are_like_those_of_real_votes(rows):
    shares = np.bincount(rows.labels) / len(rows.labels)
    np.testing.assert_allclose(shares, [0.355, 0.355, 0.29], atol=0.025)


def test_the_bayes_optimal_log_loss_is_the_mean_entropy():
    p = np.array([[0.5, 0.25, 0.25], [1.0, 0.0, 0.0]])
    assert synthetic.bayes_optimal_log_loss(p) == pytest.approx(0.75 * math.log(2))


def test_the_rule_beats_its_own_distortions_and_leaves_a_wide_gap():
    rows = synthetic.generate(12_000, 42)
    best = log_loss(rows.probabilities, rows.labels)
    assert best == pytest.approx(synthetic.bayes_optimal_log_loss(rows.probabilities), abs=0.025)
    assert 0.5 < best < 0.65 and prior_log_loss(rows, rows) - best > 0.45
    for power in (0.8, 1.25):
        bent = np.maximum(rows.probabilities, 1e-9) ** power
        assert log_loss(bent / bent.sum(axis=1, keepdims=True), rows.labels) > best


def test_the_easy_qualities_make_most_of_the_gap_and_the_right_answer_the_rest():
    rows = synthetic.generate(20_000, 43)
    prior = synthetic.bayes_optimal_log_loss(rows.probabilities.mean(axis=0, keepdims=True))
    best = synthetic.bayes_optimal_log_loss(rows.probabilities)

    def closed(*flaws):
        """Gap closed by knowing only these flaws of both answers."""
        known = rows.flaws[[f"{side}_{flaw}" for flaw in flaws for side in "ab"]]
        group = known.groupby(list(known)).ngroup().to_numpy()
        means = pd.DataFrame(rows.probabilities).groupby(group).mean().to_numpy()[group]
        return (prior - synthetic.bayes_optimal_log_loss(means)) / (prior - best)

    assert closed("off", "cut", "form", "amount") > 0.80
    assert closed("off", "cut", "form", "amount") < 0.90     # correctness matters too
    assert closed(*synthetic.FLAWS) > 0.99                      # length is next to nothing
    assert all(closed(flaw) < 0.50 for flaw in synthetic.FLAWS)


# --- The texts have their flaws, as derived from the texts ---

def test_an_answer_is_cut_exactly_if_it_has_no_full_stop(rows):
    for _, _, reply, flaws in answers_with_flaws(rows):
        assert reply.endswith(".") != ("cut" in flaws)


def test_an_answer_is_a_list_exactly_if_asked_for_one_unless_flawed(rows):
    for kind, _, reply, flaws in answers_with_flaws(rows):
        is_list = re.search(r"^([-*]|\d[.)]) ", reply, flags=re.MULTILINE) is not None
        assert is_list == ((kind == "list") != ("form" in flaws))


def test_a_brief_answer_is_one_sentence_unless_flawed(rows):
    for kind, _, reply, flaws in answers_with_flaws(rows):
        if kind in ("brief", "detail"):
            assert (". " not in reply) == ((kind == "brief") != ("amount" in flaws))


def test_an_answer_is_about_the_asked_topic_unless_flawed(rows):
    topic_of = {fact: topic for topic, facts in texts.FACTS.items() for fact in facts}
    assert len(topic_of) == 6 * len(texts.TOPICS), "six things to say about each topic, none said of two"
    opening = re.compile("|".join(re.escape(fact[1:]) + r"\b" for fact in topic_of))
    full = {fact[1:]: topic for fact, topic in topic_of.items()}
    for kind, prompt, reply, flaws in answers_with_flaws(rows):
        if kind in ("list", "prose", "brief", "detail"):
            said = {full[fact] for fact in opening.findall(reply)}
            assert len(said) == 1
            asked = re.search(rf"\b{re.escape(said.pop())}\b", prompt) is not None
            assert asked == ("off" not in flaws), (prompt, reply)


def test_a_choice_is_right_unless_flawed(rows):
    category_of = {thing: name for name, things in texts.CATEGORIES.items() for thing in things}
    assert len(category_of) == sum(map(len, texts.CATEGORIES.values())), "a thing of two categories"
    for kind, prompt, reply, flaws in answers_with_flaws(rows):
        if kind == "choice":
            first = reply.split(". ")[0].lower()
            named = [thing for thing in category_of if re.search(rf"\b{thing.lower()}\b", first.rstrip("."))]
            around = prompt.split(", ")[0] + prompt[-20:]     # where a prompt names the category, the four things apart
            asked = [name for name in texts.CATEGORIES if re.search(rf"\b{name}\b", around)]
            shown = [thing for thing in named if re.search(rf"\b{thing}\b", prompt)]
            right = any(category_of[thing] in asked and category_of[thing] in first for thing in shown)
            assert right == (not flaws & {"off", "wrong"}), (prompt, reply)


def test_an_answer_on_a_passage_says_what_the_passage_says_unless_flawed():
    rng = random.Random(3)
    for world in texts.WORLDS:
        facts = texts.draw_facts(rng, world)
        for asked in range(3):
            for flaws in ((), ("wrong",), ("off",)):
                for _ in range(20):
                    first = texts.answer_passage(rng, flaws, world, facts, asked).split(". ")[0]
                    truths = [texts.capital(say.format(*facts[asked])) for say in world["say"]]
                    assert (first in truths) == (flaws == ())
                    if flaws == ("wrong",):   # wrong about the subject of the question
                        assert facts[asked][0].lower() in first.lower()


def test_the_given_word_is_used_unless_flawed(rows):
    for kind, prompt, reply, flaws in answers_with_flaws(rows):
        if kind == "word":
            used = any(re.search(rf"\b{noun}\b", prompt) and re.search(rf"\b{noun}\b", reply) for noun in texts.NOUNS)
            assert used == ("wrong" not in flaws), (prompt, reply)


def test_being_cut_costs_no_words_on_average(rows):
    for kind in synthetic.KINDS:
        of_kind = rows.flaws[rows.flaws["kind"] == kind]
        words, cut = (pd.concat([of_kind[f"a_{name}"], of_kind[f"b_{name}"]]) for name in ("words", "cut"))
        assert abs(words[cut == 1].mean() - words[cut == 0].mean()) < 2.0


def test_every_kind_of_prompt_comes_in_its_share(rows):
    for name, kind in synthetic.KINDS.items():
        assert (rows.flaws["kind"] == name).mean() == pytest.approx(kind.share, abs=0.03)


def test_pairs_are_short(rows):
    words = sum(rows.frame[column].str.split().str.len() for column in ("prompt", "response_a", "response_b"))
    assert 40 <= words.median() <= 60 and words.max() <= 120


# --- No shortcut: what sees no meaning closes next to nothing of the gap ---

def log_loss(probabilities: np.ndarray, labels: np.ndarray) -> float:
    return evaluate(probabilities, labels)["log_loss"]


def prior_log_loss(train: synthetic.SyntheticRows, test: synthetic.SyntheticRows) -> float:
    shares = np.bincount(train.labels, minlength=3) / len(train.labels)
    return log_loss(np.tile(shares, (len(test.labels), 1)), test.labels)


def share_closed(split, features, strengths=(0.01, 0.1, 0.5)) -> float:
    """Gap closed by logistic regression, with the penalty that is best on the test rows."""
    train, test = split
    x_train, x_test = features(train), features(test)
    losses = [log_loss(LogisticRegression(C=c, tol=1e-2, max_iter=300).fit(x_train, train.labels)
                                   .predict_proba(x_test), test.labels) for c in strengths]
    prior = prior_log_loss(train, test)
    return (prior - min(losses)) / (prior - log_loss(test.probabilities, test.labels))


def length_differences(rows: synthetic.SyntheticRows) -> np.ndarray:
    counts = []
    for a, b in zip(last_turns(rows, "response_a"), last_turns(rows, "response_b")):
        words, characters = len(a.split()) - len(b.split()), len(a) - len(b)
        counts.append([words, abs(words), characters, abs(characters), len(a) + len(b)])
    return np.array(counts, dtype=float)


def full_stops(rows: synthetic.SyntheticRows) -> np.ndarray:
    ends = np.array([[reply.endswith(".") for reply in last_turns(rows, f"response_{side}")] for side in "ab"]).T
    return np.column_stack([length_differences(rows), ends, ends[:, 0] != ends[:, 1]]).astype(float)


def test_length_alone_closes_less_than_15_percent(split):
    scale = StandardScaler().fit(length_differences(split[0]))
    assert share_closed(split, lambda rows: scale.transform(length_differences(rows))) < 0.15
    train, test = split
    prior, best = prior_log_loss(train, test), log_loss(test.probabilities, test.labels)
    fitted = baselines(train.lengths, train.labels, test.lengths, test.labels)
    assert (prior - fitted["length only"]["log_loss"]) / (prior - best) < 0.15


def test_lengths_and_final_full_stops_close_less_than_a_third(split):
    """Cut answers can be recognised without the prompt. This shortcut must close a part of the gap, but only a part."""
    scale = StandardScaler().fit(full_stops(split[0]))
    assert 0.10 < share_closed(split, lambda rows: scale.transform(full_stops(rows))) < 0.33


def test_a_bag_of_words_closes_less_than_15_percent(split):
    replies = [last_turns(split[0], f"response_{side}") for side in "ab"]
    bag = TfidfVectorizer(ngram_range=(1, 2), min_df=3, sublinear_tf=True).fit(replies[0] + replies[1])
    prompts = TfidfVectorizer(ngram_range=(1, 2), min_df=2).fit(last_turns(split[0], "prompt"))

    def difference(rows):
        return bag.transform(last_turns(rows, "response_a")) - bag.transform(last_turns(rows, "response_b"))

    def with_prompt(rows):
        return hstack([difference(rows), prompts.transform(last_turns(rows, "prompt"))]).tocsr()

    assert share_closed(split, difference) < 0.15
    assert share_closed(split, with_prompt, strengths=(0.03,)) < 0.15


# --- What a user can cause ---

@pytest.mark.parametrize("wrong", [{"train_rows": 0}, {"test_rows": -3}, {"train_seed": -1},
                                   {"train_seed": 4, "test_seed": 4}])
def test_impossible_arguments_are_input_errors_and_write_nothing(tmp_path, wrong):
    with pytest.raises(InputError):
        synthetic.write_dataset(tmp_path / "new", **{"train_rows": 10, "test_rows": 10, **wrong})
    assert not (tmp_path / "new").exists()


def test_a_folder_that_cannot_be_is_one_line_and_exit_code_2(tmp_path, capsys):
    (tmp_path / "taken").write_text("a file where the folder should be")
    assert main(["--folder", str(tmp_path / "taken"), "--rows", "10", "--test-rows", "5"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "taken" in error


def test_the_command_line_writes_the_files_and_prints_the_bayes_optimal_score(tmp_path, capsys):
    arguments = {"--folder": str(tmp_path), "--rows": "400", "--test-rows": "300", "--seed": "8", "--test-seed": "9"}
    assert main([word for pair in arguments.items() for word in pair]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"test.csv", "test_labelled.csv", "train.csv", "truth.csv"}
    train, test = synthetic.train_and_test(train_rows=400, test_rows=300, train_seed=8, test_seed=9)
    said = capsys.readouterr().out
    fitted = baselines(train.lengths, train.labels, test.lengths, test.labels)
    expected = {name: score["log_loss"] for name, score in fitted.items()}
    expected["Bayes-optimal"] = log_loss(test.probabilities, test.labels)
    for name, figure in expected.items():
        assert re.search(rf"{name} +{figure:.4f}\b", said), name


def test_the_summary_holds_for_a_handful_of_rows(tmp_path, capsys):
    assert main(["--folder", str(tmp_path), "--rows", "1", "--test-rows", "1"]) == 0
    assert "nan" not in capsys.readouterr().out
