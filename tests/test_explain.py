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
from small import BUNDLED, write_encoder

import minipref.model as model_module
from minipref import explain
from minipref.checkpoint import LoadReport, load_classifier
from minipref.data import Pair, collate, encode_pairs
from minipref.explain import attribution
from minipref.explain.__main__ import main
from minipref.explain.figure import alternative, label
from minipref.explain.page import GAP, _page_data
from minipref.model import init_weights
from minipref.predictor import Judge, load_judge
from minipref.tokenizer import load_tokenizer

HOSTILE = '</script><img src="https://example.org/x.png" onerror="alert(1)"> & <b>bold</b> @DATA@ <!-- é \x0b <0x41>'


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    """A small classifier with large weights, saved and loaded as train.py's."""
    folder = write_encoder(tmp_path_factory.mktemp("encoder"), dropout=0.0)
    model = load_classifier(folder)
    torch.manual_seed(3)
    init_weights(model, 0.3)
    Judge(model, load_tokenizer(folder), 96, temperature=1.5).save(folder)
    return folder, load_judge(folder, fast=False)


@pytest.fixture(scope="module")
def explanation(judge):
    _, judge = judge
    return explain.explain(judge, Pair("", ("Name a fruit.",), ("An apple.",), (HOSTILE,)), 96, "a/model")


def written(tmp_path, *arguments):
    output = tmp_path / "page.html"
    assert main([*arguments, "--output", str(output)]) == 0
    return output.read_text(encoding="utf-8"), output.with_suffix(".svg").read_text(encoding="utf-8")


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

def test_forward_with_scores_changes_nothing_and_its_terms_make_the_layers_probabilities(monkeypatch):
    model = large_model(SMALL)
    input_ids, attention_mask = padded_batch(SMALL, [20])
    used = []
    softmax = model_module.masked_softmax
    monkeypatch.setattr(model_module, "masked_softmax", lambda *given: used.append(softmax(*given)) or used[-1])
    _, terms, logits = attribution.forward_with_scores(model, input_ids, attention_mask)
    assert torch.allclose(logits, model(input_ids, attention_mask), atol=1e-5)
    assert terms.shape == (SMALL.num_hidden_layers, SMALL.num_attention_heads, 3, 20, 20)
    for layer in range(SMALL.num_hidden_layers):
        assert torch.allclose(softmax(terms[layer].sum(1)[None], attention_mask), used[layer], atol=1e-5)


def test_probabilities_are_those_of_the_full_scores_though_the_means_are_subtracted(judge, explanation):
    _, judge = judge
    tokenized = encode_pairs([Pair("", ("Name a fruit.",), ("An apple.",), (HOSTILE,))], judge.tokenizer, 96)
    input_ids, attention_mask, _ = collate(tokenized, [0], [False], judge.tokenizer)
    terms = attribution.forward_with_scores(judge.model, input_ids, attention_mask)[1]
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
    page = Page(explain.page(explanation, 0, 0))
    shown = "".join(page.texts["dd"])
    assert "</script><img" in shown and "<b>bold</b>" in shown and "@DATA@" in shown and "<0x41>" in shown
    tags = [tag for tag, _ in page.elements]
    assert "img" not in tags and "b" not in tags and tags.count("script") == 2
    assert page.data["tokens"] == explanation.tokens


def test_a_token_that_is_html_by_itself_stays_text_in_page_and_figure(explanation):
    """Pieces of the bundled vocabulary are too small to be dangerous; others' need not be."""
    tokens = [HOSTILE.replace("\x0b", "") if n in (3, 9) else token for n, token in enumerate(explanation.tokens)]
    hostile = explain.Explanation(**{**vars(explanation), "tokens": tokens})
    page = Page(explain.page(hostile, 0, 0))
    tags = [tag for tag, _ in page.elements]
    assert "img" not in tags and "b" not in tags and tags.count("script") == 2
    assert page.data["tokens"] == tokens and tokens[3] in "".join(page.texts["dd"])
    assert tokens[3] in "".join(page.texts["option"])
    short = {"tokens": tokens[:20], "scores": explanation.scores[..., :20, :20],
             "probs": explanation.probs[..., :20, :20]}
    drawn = ET.fromstring(explain.figure(explain.Explanation(**{**vars(explanation), **short}), 0, 0))
    assert tokens[3].strip() in [text.text for text in drawn.iter("{http://www.w3.org/2000/svg}text")]


def test_no_character_that_html_or_xml_forbids_is_in_page_or_figure(judge, explanation, tmp_path):
    forbidden = "\0\x01\x0b\x0c\x1b\x7f\x85\ud800\udfff\ufdd0\ufffe\uffff\U0010ffff"
    tokens = [f"{token}{forbidden}" for token in explanation.tokens]
    hostile = explain.Explanation(**{**vars(explanation), "tokens": tokens, "model": f"run{forbidden}/model"})
    for text in (explain.page(hostile, 0, 0), explain.figure(hostile, 0, 0)):
        assert not set(forbidden) & set(text) and len(forbidden) * "\ufffd" in text
    explained = explain.explain(judge[1], Pair("", (forbidden,), ("a",), (f"b{forbidden}",)), 96)
    assert not set(forbidden) & set("".join(explained.tokens))
    frame = "id,prompt,response_a,response_b\n1," + ",".join(3 * [r'"[""\ud800 \u0000\u000b""]"']) + "\n"
    (tmp_path / "rows.csv").write_text(frame)
    for text in written(tmp_path, str(tmp_path / "rows.csv"), "--model", str(judge[0])):
        assert not set(forbidden) & set(text)


def test_the_page_refers_to_nothing_outside_itself(explanation):
    page = Page(explain.page(explanation, 0, 0))
    assert not [(tag, attributes) for tag, attributes in page.elements
                if tag in ("link", "iframe", "object", "embed", "base")
                or attributes.keys() & {"src", "href", "srcset"}]
    policy = next(a["content"] for _, a in page.elements if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'") and "http" not in policy
    assert "url(" not in explain.page(explanation, 0, 0) and "@import" not in explain.page(explanation, 0, 0)


def test_every_control_has_a_label_and_the_pictures_have_words(explanation):
    page = Page(explain.page(explanation, 1, 1))
    text = explain.page(explanation, 1, 1)
    for name in ("layer", "head", "query"):
        assert re.search(rf"<label>\w+ <select id=\"{name}\">", text)
    assert 'setAttribute("role", "img")' in text and "aria-live" in text
    assert alternative(explanation, 1, 1) in "".join(page.texts["p"])
    assert "prefers-color-scheme: dark" in text and dict(page.elements)["html"] == {"lang": "en"}


def test_the_pages_bytes_are_the_scores_within_half_a_step(explanation):
    assert Page(explain.page(explanation, 0, 0)).data == _page_data(explanation)
    rounded, steps = as_the_page_has_it(explanation), abs(explanation.scores).max((-1, -2), keepdims=True) / 127
    assert (abs(rounded.scores - explanation.scores) <= 0.501 * steps + 1e-6).all()
    assert abs(rounded.probs - explanation.probs).max() < 0.004


@pytest.mark.parametrize("length", [40, 41])
def test_truncation_is_marked_where_it_was_and_the_untruncated_prediction_stands_beside(judge, length):
    _, judge = judge
    pair = Pair("", ("short",), (" ".join(f"one{n}" for n in range(60)),), ("two",))
    explanation = explain.explain(judge, pair, length)
    untruncated = explain.explain(judge, pair, 2000)
    (gap,) = explanation.gaps
    assert explanation.segments[gap] == "A" and untruncated.gaps == [] and untruncated.num_truncated == 0
    assert untruncated.attribution.untruncated_probs is None
    assert explanation.tokens[:gap] == untruncated.tokens[:gap]
    assert explanation.tokens[gap:] == untruncated.tokens[gap + explanation.num_truncated:]
    assert np.allclose(explanation.attribution.untruncated_probs, judge.compare("short", pair.response_a[0], "two"))
    page = explain.page(explanation, 0, 0)
    a = re.search("<dt>A</dt><dd>(.*?)</dd>", page)[1]
    assert len(re.findall("<span", a.split(GAP)[0])) == gap - explanation.segments.index("A")
    assert f"{explanation.num_truncated:,} tokens did not fit" in page and "without truncation" in page
    assert "without truncation" not in explain.page(untruncated, 0, 0) and GAP not in explain.page(untruncated, 0, 0)


def test_the_longest_page_of_the_defaults_is_small(judge):
    _, judge = judge
    words = " ".join(["several words in a row"] * 60)
    explanation = explain.explain(judge, Pair("", (words,), (words,), (words,)), 128)
    per_head = len(explain.page(explanation, 0, 0)) / explanation.probs.shape[0] / explanation.probs.shape[1]
    assert len(explanation.tokens) == 128 and explanation.num_truncated > 0 and per_head < 100_000
    assert f"{explanation.num_truncated:,} tokens did not fit" in explain.page(explanation, 0, 0)
    assert len(explain.figure(explanation, 0, 0)) < 1_000_000


def test_an_order_that_changes_the_prediction_is_reported(explanation):
    found = explain.Attribution(0, np.array([[.6, .3, .1], [.4, .5, .1]]), explanation.attribution.attributions, None)
    turned = explain.Explanation(**{**vars(explanation), "attribution": found})
    assert "The order decides</strong>: with A first the prediction is 'A is better', with B first 'B is better'." in \
        explain.page(turned, 0, 0)


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
    assert "no trained classifier here" in text and "Prediction:" not in text and str(BUNDLED) not in text
    assert "minipref-tiny, an encoder" in text and "Layer 2, head 1" in svg
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
    for name in ("explain/page.html", "run/report.html", "synthetic/words.toml"):
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
    assert [float(line.split()[-1]) for line in out.splitlines()[1:4]] == [round(p, 4) for p in wanted]
    assert "Prediction:" in text and "The swap check" in text and "green" in text


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


# A real browser.

PROBE = """<script>
const choose = (id, value) => { by(id).value = value; by(id).dispatchEvent(new Event("change")); };
const pixel = (name, i, j) => [...by("panel-" + name).getContext("2d").getImageData(j, i, 1, 1).data];
const found = {start: by("words").textContent, canvases: document.querySelectorAll("canvas").length};
choose("layer", 1); choose("head", 1); choose("query", 3);
Object.assign(found, {words: by("words").textContent, caption: by("caption").textContent,
  keys: [...by("keys").rows].map(row => [...row.cells].map(cell => cell.textContent)),
  c2c: pixel("c2c", 3, 5), probs: pixel("probs", 3, 5), fetched: performance.getEntriesByType("resource").length,
  paper: getComputedStyle(document.body).backgroundColor, images: document.images.length, errors});
const out = document.createElement("pre");
out.id = "found";
out.textContent = JSON.stringify(found);
document.body.append(out);
</script>"""


def in_browser(path, page: str, *options: str) -> dict:
    """What the probe finds in the page once its scripts have run, in headless chromium without a network."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("chromium is not installed: the page was not opened in a browser")
    opening = '<script>\n"use strict";'
    assert page.count(opening) == 1
    page = page.replace(opening, f"<script>var errors = 0; onerror = () => {{ errors += 1; }};</script>{opening}")
    path.write_text(page.replace("</body>", f"{PROBE}</body>"), encoding="utf-8")
    command = [browser, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
               "--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={path.parent / 'profile'}", *options,
               "--dump-dom", path.as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=100, check=True)
    return json.loads(re.search(r'<pre id="found">(.*?)</pre>', dom.stdout, re.S)[1].replace("&lt;", "<")
                      .replace("&gt;", ">").replace("&amp;", "&"))


def as_the_page_has_it(explanation):
    """The same explanation with every number rounded as the page rounds it, so that ties are the same ties."""
    data = _page_data(explanation)
    scores = np.frombuffer(base64.b64decode(data["scores"]), dtype=np.int8).reshape(explanation.scores.shape)
    steps = np.array(data["steps"]).reshape(*explanation.scores.shape[:3], 1, 1)
    probs = (np.frombuffer(base64.b64decode(data["probs"]), dtype=np.uint8).reshape(explanation.probs.shape) / 255.0)**2
    return explain.Explanation(**{**vars(explanation), "scores": scores * steps, "probs": probs})


def test_a_browser_shows_the_head_that_was_chosen_and_fetches_nothing(explanation, tmp_path):
    found = in_browser(tmp_path / "page.html", explain.page(explanation, 0, 1))
    rounded = as_the_page_has_it(explanation)
    assert found["start"] == alternative(rounded, 0, 1) and found["words"] == alternative(rounded, 1, 1)
    assert found["canvases"] == 5 and found["fetched"] == found["images"] == found["errors"] == 0
    assert f"{label(explanation.tokens[3])} (token 4)" in found["caption"] and "layer 2, head 2" in found["caption"]

    panels = rounded.panels(1, 1)
    best = np.argsort(-panels["probs"][3])[:10]
    assert {int(row[1]) - 1 for row in found["keys"][:3]} <= set(best.tolist()) and len(found["keys"]) == 10
    for row in found["keys"]:
        j = int(row[1]) - 1
        assert row[0] == label(explanation.tokens[j])
        numbers = [panels[name][3, j] for name in ("c2c", "c2p", "p2c", "sum", "probs")]
        assert np.allclose([float(text) for text in row[2:]], numbers, atol=0.006)

    limit = max(abs(panels[name]).max() for name in ("c2c", "c2p", "p2c", "sum"))
    share = panels["c2c"][3, 5] / limit
    end = np.array([179, 74, 0] if share > 0 else [20, 84, 170])
    assert np.allclose(found["c2c"][:3], 246 + (end - 246) * abs(share), atol=4)
    assert found["paper"] == "rgb(255, 255, 255)"


def test_a_browser_in_dark_mode_shows_a_dark_page(explanation, tmp_path):
    found = in_browser(tmp_path / "page.html", explain.page(explanation, 0, 0), "--force-dark-mode")
    assert found["paper"] == "rgb(13, 17, 23)" and found["errors"] == 0
    share = float(np.sqrt(explanation.panels(1, 1)["probs"][3, 5]))
    mean, most = np.array([32, 37, 44]), np.array([255, 160, 70])
    assert np.allclose(found["probs"][:3], mean + (most - mean) * share, atol=4)
