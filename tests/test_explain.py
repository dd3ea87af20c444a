"""What `python -m minipref.explain` shows is what the model computes, for any text, in a real browser too."""

import base64
import json
import os
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from conftest import ROOT
from helpers import SMALL, large_model, padded_batch
from small import BUNDLED, write_judge

import minipref.model as model_module
from minipref import explain
from minipref.checkpoint import LoadReport, load_classifier
from minipref.data import Pair, collate, encode_pairs, to_pairs
from minipref.explain import attribution
from minipref.explain.__main__ import main
from minipref.explain.figure import alternative
from minipref.explain.page import page_data, pair_texts
from minipref.predictor import load_judge

HOSTILE = '</script><img src="https://example.org/x.png" onerror="alert(1)"> & <b>bold</b> @DATA@ <!-- é \x0b <0x41>'


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    """A small classifier with large weights, saved and loaded as train.py's."""
    folder = write_judge(tmp_path_factory.mktemp("judge"))
    return folder, load_judge(folder, fast=False)


@pytest.fixture(scope="module")
def explanation(judge):
    _, judge = judge
    return explain.explain(judge, Pair("", ("Name a fruit.",), ("An apple.",), (HOSTILE,)), 96, "a/model")


def written(tmp_path, *arguments):
    output = tmp_path / "page.html"
    assert main([*arguments, "--output", str(output)]) == 0
    return output.read_text(encoding="utf-8"), output.with_suffix(".svg").read_text(encoding="utf-8")


def as_the_page_has_it(data: dict) -> dict[str, np.ndarray]:
    """A page's matrices, unpacked as page.js does."""
    def numbers(text: str, kind: str) -> np.ndarray:
        return np.frombuffer(base64.b64decode(text), dtype=kind)

    N, H, L, d = (data["layers"], data["heads"], len(data["tokens"]), data["size"])
    found = {"means": numbers(data["means"], "<f4").reshape(N, H, 3, L),
             "probs": numbers(data["probs"], "<u2").reshape(N, H, L, L) / 65535}
    for name, stored, shape in [("scores", data["scores"], (N, H, 3, L, L)),
                                *((name, stored, (N, H, -1, d)) for name, stored in data["vectors"].items())]:
        values = numbers(stored["values"], "<i2").reshape(shape)
        found[name] = values * np.array(stored["steps"]).reshape(*shape[:-2], 1, 1)
    return found


class Page(HTMLParser):
    """A page's elements and their attributes, the text of each, and the page's data."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.elements, self.texts = [], [], {}
        self.feed(text)
        self.close()
        self.data = json.loads(self.texts["script"][0])

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        self.open.append(tag)
        self.texts.setdefault(tag, []).append("")

    def handle_endtag(self, tag):
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data):
        for tag in self.open:
            self.texts[tag][-1] += data


# The numbers.

def test_watching_changes_nothing_and_the_terms_make_the_layers_probabilities(monkeypatch):
    model = large_model(SMALL)
    input_ids, attention_mask = padded_batch(SMALL, [20])
    used = []
    softmax = model_module.masked_softmax
    monkeypatch.setattr(model_module, "masked_softmax", lambda *given: used.append(softmax(*given)) or used[-1])
    watched = attribution.watch(model, input_ids, attention_mask)
    terms, probs = attribution.attention_terms(model, watched.inputs)[0], list(used)
    assert torch.equal(watched.logits, model(input_ids, attention_mask))
    assert terms.shape == (SMALL.num_hidden_layers, SMALL.num_attention_heads, 3, 20, 20)
    for layer in range(SMALL.num_hidden_layers):
        assert torch.allclose(softmax(terms[layer].sum(1)[None], attention_mask), probs[layer], atol=1e-5)


def test_the_vectors_products_add_up_to_each_term(judge, explanation):
    """q . k, q . pos_k and k . pos_q over sqrt(3 d), as the page multiplies them, for every query and key."""
    q, k, pos_q, pos_k = (explanation.vectors[name].astype(np.float64) for name in attribution.VECTORS)
    L, d = q.shape[2:]
    rows = explanation.rows[np.arange(L)[:, None] - np.arange(L) + L - 1]                    # (L, L)
    c2c = np.einsum("nhid,nhjd->nhij", q, k)
    c2p = np.einsum("nhid,nhijd->nhij", q, pos_k[:, :, rows])
    p2c = np.einsum("nhjd,nhijd->nhij", k, pos_q[:, :, rows])
    terms = explanation.scores + explanation.means[..., None]
    assert np.allclose(np.stack([c2c, c2p, p2c], 2) / np.sqrt(3 * d), terms, atol=1e-4)
    config = judge[1].model.config
    buckets = model_module.log_bucket(torch.arange(1 - L, L), config.position_buckets, config.max_distance)
    assert (explanation.buckets[explanation.rows] == buckets.numpy()).all()


def test_probabilities_are_those_of_the_full_scores_though_the_means_are_subtracted(judge, explanation):
    _, judge = judge
    tokenized = encode_pairs([Pair("", ("Name a fruit.",), ("An apple.",), (HOSTILE,))], judge.tokenizer, 96)
    input_ids, attention_mask, _ = collate(tokenized, [0], [False], judge.tokenizer)
    watched = attribution.watch(judge.model, input_ids, attention_mask)
    terms = attribution.attention_terms(judge.model, watched.inputs)[0]
    assert np.allclose(explanation.probs, torch.softmax(terms.sum(2), -1).numpy(), atol=1e-6)
    assert np.allclose(explanation.scores.mean(-1), 0, atol=1e-5)
    assert np.allclose(explanation.probs.sum(-1), 1, atol=1e-5)


def test_the_prediction_is_the_judges_in_both_orders(judge, explanation):
    _, judge = judge
    texts = "Name a fruit.", "An apple.", HOSTILE
    assert np.allclose(explanation.attribution.averaged, judge.compare(*texts), atol=1e-6)
    alone = judge.compare_many([texts, (texts[0], texts[2], texts[1])], swap_average=False)
    assert np.allclose(explanation.attribution.probabilities, [alone[0], alone[1][[1, 0, 2]]], atol=1e-6)


def test_attributions_are_the_slope_of_the_log_odds_along_each_tokens_embedding(judge, explanation):
    """Scale one token's embedding by 1 +- h, in either order, and compare the change of the prediction's log odds."""
    _, judge = judge
    tokenized = encode_pairs([Pair("", ("Name a fruit.",), ("An apple.",), (HOSTILE,))], judge.tokenizer, 96)
    places = attribution.swapped_places([len(segment) for segment in tokenized.segments(0)])
    model = judge.model.double()
    try:
        for order, swapped in enumerate((False, True)):
            input_ids, attention_mask, _ = collate(tokenized, [0], [swapped], judge.tokenizer)
            embeddings = model.encoder.embed(input_ids, attention_mask).detach()

            def log_odds(token, share, swapped=swapped, embeddings=embeddings, attention_mask=attention_mask):
                moved = embeddings.clone()
                moved[0, token] *= 1 + share
                with pytest.MonkeyPatch.context() as patch:
                    patch.setattr(model.encoder, "embed", lambda *_: moved)
                    z = model(torch.zeros(embeddings.shape[:2], dtype=torch.long), attention_mask)[0]
                z = (z[[1, 0, 2]] if swapped else z) / judge.temperature
                prediction = explanation.attribution.prediction
                return z[prediction] - torch.logsumexp(z[[c for c in range(3) if c != prediction]], 0)

            for token in (0, 2, 7, len(explanation.tokens) - 2):
                place = places[token] if swapped else token
                slope = (log_odds(place, 1e-4) - log_odds(place, -1e-4)).item() / 2e-4
                assert abs(explanation.attribution.attributions[order, token] - slope) < 1e-3 + 0.01 * abs(slope)
    finally:
        model.float()


@pytest.mark.parametrize(("orders", "outcome", "sensitive"), [
    ([[.6, .3, .1], [.4, .5, .1]], "A is better", True),
    ([[.60, .30, .10], [.50, .35, .15]], "A is better", False),
    ([[.388, .373, .239], [.373, .388, .239]], "undecided", False),        # another winner, but by nothing
    ([[.6, .3, .1], [.3, .6, .1]], "undecided", True),
    ([[.1, .1, .8], [.2, .1, .7]], "a tie", False),
    ([[.3, .36, .34], [.3, .36, .34]], "undecided", False),
])
def test_the_words_fit_the_probabilities(explanation, orders, outcome, sensitive):
    orders = np.array(orders)
    found = explain.Attribution(int(orders.mean(0).argmax()), orders, explanation.attribution.attributions, None)
    assert (found.outcome, found.order_sensitive) == (outcome, sensitive)


def test_swapped_places_find_each_token_again(judge):
    _, judge = judge
    tokenized = encode_pairs([Pair("", ("one two",), ("three four five",), ("six",))], judge.tokenizer, 64)
    first, _, _ = collate(tokenized, [0], [False], judge.tokenizer)
    second, _, _ = collate(tokenized, [0], [True], judge.tokenizer)
    places = attribution.swapped_places([len(segment) for segment in tokenized.segments(0)])
    assert sorted(places) == list(range(len(places))) and torch.equal(second[0, places], first[0])


def test_segments_and_tokens_belong_together(explanation):
    pairs = list(zip(explanation.tokens, explanation.segments))
    text = {name: "".join(token for token, segment in pairs if segment == name) for name in ("prompt", "A")}
    assert text["prompt"].strip() == "Name a fruit." and text["A"].strip() == "An apple."
    assert [token for token, segment in pairs if not segment] == ["[CLS]", "[SEP]", "[SEP]", "[SEP]"]


# The page.

def test_what_a_text_holds_stays_text(explanation):
    """Also of a token that is HTML by itself: the bundled vocabulary has none, others may."""
    tokens = [HOSTILE.replace("\x0b", "") if n in (3, 9) else token for n, token in enumerate(explanation.tokens)]
    hostile = explain.Explanation(**{**vars(explanation), "tokens": tokens, "pair": Pair("", (HOSTILE,), ("",), ("",))})
    page = Page(explain.page(hostile, 0, 0))
    tags = [tag for tag, _ in page.elements]
    assert "img" not in tags and "b" not in tags and tags.count("script") == 2
    assert page.data["data"]["tokens"] == tokens and page.data["data"]["texts"][0] == HOSTILE
    assert page.texts["title"][0].startswith("</script><img src=") and page.texts["title"][0].endswith("minipref")
    short = {"tokens": tokens[:20], "scores": explanation.scores[..., :20, :20],
             "probs": explanation.probs[..., :20, :20]}
    drawn = ET.fromstring(explain.figure(explain.Explanation(**{**vars(explanation), **short}), 0, 0))
    assert tokens[3].strip() in [text.text for text in drawn.iter("{http://www.w3.org/2000/svg}text")]


def test_no_character_that_html_or_xml_forbids_is_in_page_or_figure(judge, explanation, tmp_path):
    forbidden = "\0\x01\x0b\x0c\x1b\x7f\x85\ud800\udfff\ufdd0\ufffe\uffff\U0010ffff"
    tokens = [f"{token}{forbidden}" for token in explanation.tokens]
    pair = Pair("", (forbidden,), ("",), ("",))
    hostile = explain.Explanation(**{**vars(explanation), "tokens": tokens, "pair": pair})
    for text in (explain.page(hostile, 0, 0), explain.figure(hostile, 0, 0)):
        assert not set(forbidden) & set(text) and 5 * "\ufffd" in text
    explained = explain.explain(judge[1], Pair("", (forbidden,), ("a",), (f"b{forbidden}",)), 96)
    assert not set(forbidden) & set("".join(explained.tokens))
    frame = "id,prompt,response_a,response_b\n1," + ",".join(3 * [r'"[""\ud800 \u0000\u000b""]"']) + "\n"
    (tmp_path / "rows.csv").write_text(frame)
    for text in written(tmp_path, str(tmp_path / "rows.csv"), "--model", str(judge[0])):
        assert not set(forbidden) & set(text)


def test_the_page_refers_to_nothing_outside_itself(explanation):
    text = explain.page(explanation, 0, 0)
    page = Page(text)
    assert not [(tag, attributes) for tag, attributes in page.elements
                if tag in ("link", "iframe", "object", "embed", "base")
                or attributes.keys() & {"src", "href", "srcset"}]
    policy = next(a["content"] for _, a in page.elements if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'") and "http" not in policy
    assert "url(" not in text and "@import" not in text and "innerHTML" not in text


def test_every_control_has_a_label(explanation):
    page = Page(explain.page(explanation, 1, 1))
    text = explain.page(explanation, 1, 1)
    for name in ("example", "row"):
        assert f'<label for="{name}">' in text
    for name in ("shade", "prompt", "a", "b"):
        assert re.search(rf"<label[^>]*>[\w ]+<\w+ id=\"{name}\"", text)
    assert "prefers-color-scheme: dark" in text and dict(page.elements)["html"] == {"lang": "en"}


def test_the_pages_numbers_are_the_explanations(explanation):
    data = Page(explain.page(explanation, 0, 0)).data["data"]
    assert data == json.loads(json.dumps(page_data(explanation)))
    rounded = as_the_page_has_it(data)
    scale = abs(explanation.scores).max((-1, -2), keepdims=True)
    assert (abs(rounded["scores"] - explanation.scores) <= scale / 60_000).all()
    assert abs(rounded["probs"] - explanation.probs).max() < 1e-5
    assert np.array_equal(rounded["means"], explanation.means)
    for name, vectors in explanation.vectors.items():
        assert (abs(rounded[name] - vectors) <= abs(vectors).max((-1, -2), keepdims=True) / 60_000).all()
    assert np.allclose(data["prediction"]["orders"], explanation.attribution.probabilities, atol=1e-12)


@pytest.mark.parametrize("pair", [
    Pair("", ("one",), ("two",), ("three",)), Pair("", ("a", None), ("b", "c"), ("", "é")), Pair("", (), ("x",), ("",)),
    Pair("", ("one",), ("[1, 2]",), (None,)), Pair("", ("",), ('["a"]',), ("b",)),
    Pair("", ('["a"]',), ("b",), ("c",))])
def test_a_pairs_texts_are_read_back_as_the_same_pair(pair):
    def turns(pair: Pair) -> list[list[str]]:
        return [[turn or "" for turn in turns] for turns in (pair.prompt, pair.response_a, pair.response_b)]

    assert turns(*to_pairs([pair_texts(pair)])) == turns(pair)


@pytest.mark.parametrize("length", [40, 41])
def test_truncation_is_marked_where_it_was_and_the_untruncated_prediction_stands_beside(judge, length):
    _, judge = judge
    pair = Pair("", ("short",), (" ".join(f"one{n}" for n in range(60)),), ("two",))
    explanation = explain.explain(judge, pair, length)
    untruncated = explain.explain(judge, pair, 2000)
    ((gap, count),) = explanation.gaps.items()
    assert explanation.segments[gap] == "A" and untruncated.gaps == {} and untruncated.num_truncated == 0
    assert untruncated.attribution.untruncated_probs is None
    assert explanation.tokens[:gap] == untruncated.tokens[:gap]
    assert explanation.tokens[gap:] == untruncated.tokens[gap + count:] and count == explanation.num_truncated
    assert np.allclose(explanation.attribution.untruncated_probs, judge.compare("short", pair.response_a[0], "two"))


def test_the_longest_page_of_the_defaults_is_small(judge):
    _, judge = judge
    words = " ".join(["several words in a row"] * 60)
    explanation = explain.explain(judge, Pair("", (words,), (words,), (words,)), 128)
    per_head = len(explain.page(explanation, 0, 0)) / explanation.probs.shape[0] / explanation.probs.shape[1]
    assert len(explanation.tokens) == 128 and explanation.num_truncated > 0 and per_head < 300_000
    assert len(explain.figure(explanation, 0, 0)) < 1_000_000


# The figure.

def test_the_figure_is_well_formed_and_has_a_cell_for_every_score_that_is_not_the_mean(explanation):
    root = ET.fromstring(explain.figure(explanation, 1, 0))
    ns = "{http://www.w3.org/2000/svg}"
    assert alternative(explanation, 1, 0) == root.find(f"{ns}desc").text
    titles = [t.text for t in root.iter(f"{ns}text") if t.get("class") == "title"]
    assert [t.split(",")[0] for t in titles] == ["c2c", "c2p", "p2c", "sum", "probabilities"]
    groups = list(root.iter(f"{ns}g"))
    cell, L = 11 if len(explanation.tokens) <= 38 else 420 // len(explanation.tokens), len(explanation.tokens)
    panels = explanation.panels(1, 0)
    limit = max(abs(panels[name]).max() for name in ("c2c", "c2p", "p2c", "sum"))
    for name, group in zip(panels, groups):
        drawn = np.zeros((L, L), dtype=int)
        for path in group.iter(f"{ns}path"):
            shade = int(path.get("class")[1:]) * (1 if path.get("class")[0] == "s" else -1)
            for x, y, width in re.findall(r"M(\d+) (\d+)h(\d+)v", path.get("d")):
                drawn[int(y) // cell, int(x) // cell:(int(x) + int(width)) // cell] += shade
        wanted = np.sqrt(panels[name]) * 10 if name == "probs" else panels[name] / limit * 10
        assert abs(drawn - wanted).max() <= 0.5 + 1e-6


def test_the_four_panels_of_scores_add_up(explanation):
    panels = explanation.panels(0, 1)
    assert np.allclose(panels["c2c"] + panels["c2p"] + panels["p2c"], panels["sum"], atol=1e-6)


# The program.

def test_the_bundled_encoder_has_attention_to_show_and_says_that_it_predicts_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    text, svg = written(tmp_path, "--prompt", "Name a fruit.", "--a", "An apple.", "--b", "A chair.", "--layer", "2")
    data = Page(text).data
    assert data["data"]["prediction"] is None and data["layer"] == 1 and str(BUNDLED) not in text
    assert "minipref-tiny, an encoder" in data["data"]["model"] and "Layer 2, head 1" in svg
    assert "no prediction" in capsys.readouterr().out


def test_an_installed_minipref_says_in_one_line_where_the_bundled_encoder_is(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("minipref.explain.__main__.BUNDLED", tmp_path / "site-packages" / "weights")
    assert main(["--prompt", "p", "--a", "a", "--b", "b"]) == 2
    assert capsys.readouterr().err == (
        "explain: no run so far, and an installed minipref has no bundled encoder; expected --model DIR: a run's "
        "model/, or an encoder like weights/minipref-tiny of the repository\n")


@pytest.mark.slow
def test_an_installed_minipref_explains_and_has_its_data_files(tmp_path):
    pytest.importorskip("setuptools", minversion="77")
    source, installed, elsewhere = (tmp_path / name for name in ("source", "installed", "elsewhere"))
    shutil.copytree(ROOT / "minipref", source / "minipref")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "--target", installed, source], check=True, timeout=300)
    elsewhere.mkdir()
    explain_pair = [sys.executable, "-m", "minipref.explain", "--prompt", "p", "--a", "a", "--b", "b"]
    environment = os.environ | {"PYTHONPATH": str(installed)}
    done = subprocess.run(explain_pair, cwd=elsewhere, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and "weights/minipref-tiny of the repository" in done.stderr
    for name in ("explain/page.html", "explain/page.js", "run/report.html", "synthetic/words.toml"):
        assert (installed / "minipref" / name).read_bytes() == (ROOT / "minipref" / name).read_bytes()


def test_a_row_of_a_csv_is_explained_with_the_newest_runs_model(judge, tmp_path, monkeypatch, capsys):
    folder, judge = judge
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "model").symlink_to(folder)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "latest").write_text(f"{tmp_path / 'run'}\n")
    (tmp_path / "rows.csv").write_text("id,prompt,response_a,response_b\n1,one,two,three\n2,red,green,blue\n")
    text, _ = written(tmp_path, "rows.csv", "--row", "2")
    out = capsys.readouterr().out
    wanted = judge.compare("red", "green", "blue")
    assert [float(line.split()[-1]) for line in out.splitlines()[2:5]] == [round(p, 4) for p in wanted]
    data = Page(text).data["data"]
    assert np.allclose(data["prediction"]["averaged"], wanted, atol=1e-6) and data["texts"] == ["red", "green", "blue"]


@pytest.mark.parametrize(("arguments", "message"), [
    ([], "neither a CSV nor all of --prompt"),
    (["--prompt", "p", "--a", "a"], "neither a CSV nor all of --prompt"),
    (["x.csv", "--prompt", "p"], "both a CSV and"),
    (["x.csv"], "no such file"),
    (["--prompt", "p", "--a", "a", "--b", "b", "--layer", "9"], "--layer 9; expected from 1 to"),
    (["--prompt", "p", "--a", "a", "--b", "b", "--head", "0"], "--head 0; expected from 1 to"),
    (["--prompt", "p", "--a", "a", "--b", "b", "--tokens", "4"], "a maximum length of 4"),
    (["--prompt", "p", "--a", "a", "--b", "b", "--output", "page.txt"], "ends in .html"),
    (["--prompt", "p", "--a", "a", "--b", "b", "--model", "nowhere"], "nowhere"),
    (["--serve", "--output", "page.html"], "both --serve and --output"),
    (["--serve", "--prompt", "p"], "neither a CSV nor all of --prompt"),
    (["--serve", "--tokens", "4"], "a maximum length of 4"),
    (["--serve", "--port", "70000"], "--port"),
])
def test_wrong_arguments_get_one_line_and_exit_code_2(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    code = main(arguments)
    error = capsys.readouterr().err
    assert code == 2 and message in error and error.count("\n") == 1 and not list(tmp_path.iterdir())


def test_a_row_that_is_not_there_is_an_input_error(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.csv").write_text("id,prompt,response_a,response_b\n1,one,two,three\n")
    assert main(["rows.csv", "--row", "2"]) == 2 and "no row 2" in capsys.readouterr().err


def test_a_new_classifier_is_recognised_by_the_load_report(judge):
    folder, _ = judge
    assert load_classifier(folder).load_report.new == [] and load_classifier(BUNDLED).load_report.new
    assert isinstance(load_classifier(folder).load_report, LoadReport)
