"""The page in a real browser, live and static, and what other programs get from its server."""

import contextlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from browser import Browser
from conftest import ROOT
from small import write_judge

from minipref import explain
from minipref.data import Pair
from minipref.explain.figure import alternative, label
from minipref.explain.page import pair_texts
from minipref.explain.serve import EXAMPLES, MOST_BYTES, MOST_WAITING, Server
from minipref.predictor import load_judge

TEXTS = ("Name a fruit.", "An apple.", '</script><img src="https://example.org/x.png" onerror="alert(1)"> <b>b</b>')
ROWS = [Pair("1", ("one",), ("two",), ("three",)), Pair("2", ("red", "blue"), ("green", None), ("x", "y"))]


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    return load_judge(write_judge(tmp_path_factory.mktemp("judge")), fast=False)


@pytest.fixture(scope="module")
def server(judge):
    with Server(judge, "a/model", ROWS, max_length=96) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture
def tab(browser, server):
    """The live page with `TEXTS` on it."""
    browser.open(server.address)
    browser.wait("data !== null && !asking")
    browser.run(f"write({json.dumps(TEXTS)}); ask()")
    browser.wait("!asking && data.texts[2].length > 50")
    return browser


# The numbers that a browser shows are Python's.

def shown_probabilities(browser) -> np.ndarray:
    return np.array(browser.run("[...by('orders').tBodies[0].rows].map(row => "
                                "[...row.querySelectorAll('td')].map(cell => +cell.textContent))"))


def test_the_bars_are_the_judges_probabilities_to_1e_6(tab, judge):
    assert np.allclose(tab.run("data.prediction.averaged"), judge.compare(*TEXTS), atol=1e-6)
    shown = shown_probabilities(tab)
    assert np.allclose(shown[2], judge.compare(*TEXTS), atol=6e-4) and shown.shape == (3, 3)
    shares = tab.run("[...by('orders').querySelectorAll('.bar')].map(c => +c.style.getPropertyValue('--share'))")
    assert np.allclose(np.reshape(shares, (3, 3)), shown, atol=6e-4)


def test_typing_changes_the_bars_and_the_history_has_the_difference(tab, judge):
    before = shown_probabilities(tab)
    tab.run("by('a').focus(); by('a').setSelectionRange(99, 99)")
    tab.type(" Or a pear.")
    tab.wait("!asking && data.texts[1] === 'An apple. Or a pear.'")
    after = shown_probabilities(tab)
    assert abs(after - before).max() > 0.002
    assert np.allclose(after[2], judge.compare(TEXTS[0], "An apple. Or a pear.", TEXTS[2]), atol=6e-4)
    newest = tab.run("[...by('history').tBodies[0].rows[0].cells].map(c => c.textContent)")
    assert newest[0] == "A: “” → “ Or a pear.”"
    numbers = [[float(x) for x in re.findall(r"[+-]?\d\.\d+", text.replace("\u2212", "-"))] for text in newest[1:4]]
    assert np.allclose(numbers, np.stack([after[2], after[2] - before[2]], 1), atol=2e-3)
    tab.run("by('history').tBodies[0].rows[1].querySelector('button').click()")
    tab.wait("!asking && data.texts[1] === 'An apple.'")
    assert np.allclose(shown_probabilities(tab), before)
    for n in range(12):
        tab.run(f"by('prompt').value = 'number {n}'; ask()")
        tab.wait(f"!asking && data.texts[0] === 'number {n}'")
    assert tab.run("by('history').tBodies[0].rows.length") == 10


def test_every_token_is_on_the_page_special_ones_too_and_is_coloured_by_its_attribution(tab, judge):
    explanation = explain.explain(judge, Pair("", *((text,) for text in TEXTS)), 96)
    shown = tab.run("[...document.querySelectorAll('.token')].map(t => [t.textContent, t.className, "
                    "+t.style.getPropertyValue('--share'), t.style.getPropertyValue('--colour')])")
    assert [text for text, *_ in shown] == explanation.tokens
    assert [kind for _, kind, *_ in shown] == ["token" if s else "token special" for s in explanation.segments]
    both = explanation.attribution.attributions
    shares = np.array([share if colour == "179 74 0" else -share for *_, share, colour in shown])
    assert np.allclose(shares, both.mean(0) / abs(both).max(), atol=1e-3)
    tab.run("by('shade').value = '1'; by('shade').dispatchEvent(new Event('change'))")
    shares = tab.run("[...document.querySelectorAll('.token')].map(t => +t.style.getPropertyValue('--share'))")
    assert np.allclose(shares, abs(both[1]) / abs(both).max(), atol=1e-3)


def test_choosing_a_head_changes_the_matrices_and_they_are_pythons(tab, judge):
    explanation = explain.explain(judge, Pair("", *((text,) for text in TEXTS)), 96)
    L = len(explanation.tokens)
    assert tab.run("document.querySelectorAll('#heads button').length") == explanation.probs.shape[0] * (
        explanation.probs.shape[1] + 1)
    first = tab.run("[...matrices.c2c]")
    tab.point("#head-1-1", click=True)
    assert tab.run("by('head-title').textContent") == "Layer 2, head 2"
    assert tab.run("by('head-1-1').getAttribute('aria-pressed')") == "true"
    panels = explanation.panels(1, 1)
    limit = max(abs(panels[name]).max() for name in ("c2c", "c2p", "p2c", "sum"))
    for name, matrix in panels.items():
        assert np.allclose(np.reshape(tab.run(f"[...matrices['{name}']]"), (L, L)), matrix, atol=limit / 5000)
        pixel = tab.run(f"""(() => {{ const c = by('panel-{name}'), k = window.devicePixelRatio, cell = +c.dataset.cell;
            const place = n => (+c.dataset.margin + cell * (n + 0.5)) * k;
            return [...c.getContext('2d').getImageData(place(5), place(4), 1, 1).data].slice(0, 3); }})()""")
        share = np.sqrt(matrix[4, 5]) if name == "probs" else matrix[4, 5] / limit
        end = np.array([179, 74, 0] if share > 0 else [20, 84, 170])
        assert np.allclose(pixel, 246 + (end - 246) * abs(share), atol=4)
    assert not np.allclose(first, panels["c2c"].ravel(), atol=0.1)
    assert tab.run("by('words').textContent") == alternative(explanation, 1, 1)
    tab.point("#head-1-2", click=True)                                   # the mean over heads has no terms
    assert np.allclose(tab.run("[...matrices.probs]"), explanation.probs[1].mean(0).ravel(), atol=1e-4)
    assert tab.run("by('query-section').hidden") and tab.run("by('panel-c2c').parentElement.hidden")


def test_pointing_at_a_token_shows_where_it_looks_and_through_which_term(tab, judge):
    explanation = explain.explain(judge, Pair("", *((text,) for text in TEXTS)), 96)
    layer, head = tab.run("[chosen.layer, chosen.head]")
    panels = explanation.panels(layer, head)
    tab.point("#token-3")
    words = tab.run("by('looks').textContent")
    best = int(panels["probs"][3].argmax())
    terms = ", ".join(f"{name} {panels[name][3, best]:+.2f}".replace("-", "\u2212") for name in ("c2c", "c2p", "p2c"))
    assert words.startswith(f"{label(explanation.tokens[3])} (token 4) looks at {label(explanation.tokens[best])} "
                            f"(token {best + 1}) with {panels['probs'][3, best] * 100:.0f}% ({terms})")
    shares = tab.run("[...document.querySelectorAll('.token')].map(t => +t.style.getPropertyValue('--share'))")
    assert np.allclose(shares, np.sqrt(panels["probs"][3]), atol=2e-3)


def test_one_query_and_key_are_numbers_that_add_up_to_the_score(tab, judge):
    explanation = explain.explain(judge, Pair("", *((text,) for text in TEXTS)), 96)
    tab.point("#head-0-0", click=True)
    tab.point("#token-4", click=True)
    tab.run("by('keys').rows[1].querySelector('button').click()")
    key = tab.run("chosen.key")
    panels = explanation.panels(0, 0)
    assert key == np.argsort(-panels["probs"][4])[1]
    cells = tab.run("[...by('keys').rows[1].cells].map(c => c.textContent.replaceAll('\u2212', '-'))")
    assert cells[:3] == [label(explanation.tokens[key]), str(key + 1), str(4 - key)]
    assert int(cells[3]) == explanation.buckets[explanation.rows[4 - key + len(explanation.tokens) - 1]]
    assert np.allclose([float(x) for x in cells[4:]], [panels[n][4, key] for n in panels], atol=6e-3)
    words = tab.run("by('adds-up').textContent").replace("\u2212", "-")
    c2c, c2p, p2c, total, mean, less, prob = map(float, re.findall(r"[+-]?\d+\.\d+", words))
    raw = explanation.scores[0, 0, :, 4, key] + explanation.means[0, 0, :, 4]
    assert np.allclose([c2c, c2p, p2c], raw, atol=2e-3) and np.isclose(total, raw.sum(), atol=2e-3)
    assert np.isclose(less, panels["sum"][4, key], atol=2e-3) and np.isclose(prob, panels["probs"][4, key], atol=6e-4)
    assert np.isclose(mean, total - less, atol=2e-3)
    assert tab.run("document.querySelectorAll('#neuron canvas').length") == 9


def test_the_keyboard_reaches_tokens_and_heads(tab):
    tab.run("by('tokens').focus()")
    tab.press("Home")
    for _ in range(3):
        tab.press("ArrowRight")
    assert tab.run("chosen.query") == 3 and tab.run("by('token-3').getAttribute('aria-selected')") == "true"
    assert tab.run("by('tokens').getAttribute('aria-activedescendant')") == "token-3"
    tab.point("#head-0-0", click=True)
    for key in ("ArrowRight", "ArrowDown", "ArrowUp", "ArrowUp"):        # the last has nowhere to go
        tab.press(key)
    assert tab.run("document.activeElement.id") == "head-0-1" and tab.run("[chosen.layer, chosen.head]") == [0, 1]
    unnamed = tab.run("""[...document.querySelectorAll('button, select, input, textarea, canvas, [tabindex="0"]')]
        .filter(e => !(e.closest('button') ?? e).getAttribute('aria-label') && !(e.labels && e.labels.length))
        .map(e => e.outerHTML)""")
    assert unnamed == []


def test_truncated_text_is_shown_as_such(tab, judge):
    long = " ".join(f"word{n}" for n in range(200))
    tab.run(f"write(['p', {json.dumps(long)}, 'b']); ask()")
    tab.wait("!asking && data.texts[1].length > 500")
    (left,) = tab.run("[...document.querySelectorAll('.left-out')].map(e => e.textContent)")
    explanation = explain.explain(judge, Pair("", ("p",), (long,), ("b",)), 96)
    assert left.strip() == f"[{explanation.num_truncated} tokens left out]"
    assert tab.run("document.querySelector('.left-out').nextSibling.id") == f"token-{next(iter(explanation.gaps))}"
    assert tab.run("by('orders').tBodies[0].rows.length") == 4 and len(explanation.tokens) == 96
    assert np.allclose(shown_probabilities(tab)[3], judge.compare("p", long, "b"), atol=6e-4)


def test_examples_and_rows_of_the_file_can_be_chosen(tab, judge):
    tab.run("by('example').value = '1'; by('example').dispatchEvent(new Event('change'))")
    tab.wait(f"!asking && data.texts[0] === {json.dumps(EXAMPLES[1][1][0])}")
    tab.run("by('row').value = '2'; by('row').dispatchEvent(new Event('change'))")
    tab.wait(f"!asking && data.texts[0] === {json.dumps(pair_texts(ROWS[1])[0])}")
    assert np.allclose(shown_probabilities(tab)[2], judge.compare_many([ROWS[1]])[0], atol=6e-4)
    tab.run("by('row').value = '3'; by('row').dispatchEvent(new Event('change'))")
    tab.wait("by('status').textContent === 'no such row; the file has 2'")


def test_hostile_text_stays_text_and_nothing_is_requested_from_elsewhere(tab, server):
    assert tab.run("document.images.length") == 0 and tab.run("document.querySelectorAll('b').length") == 0
    assert "</script><img" in tab.run("by('tokens').textContent")
    assert tab.errors == [] and tab.requests
    assert all(address.startswith(server.address) for address in tab.requests)


def test_the_static_page_is_the_same_page_and_asks_for_nothing(browser, judge, tmp_path):
    explanation = explain.explain(judge, Pair("", *((text,) for text in TEXTS)), 96, "a/model")
    (tmp_path / "page.html").write_text(explain.page(explanation, 1, 0), encoding="utf-8")
    browser.open((tmp_path / "page.html").as_uri())
    assert browser.run("document.title") == "Name a fruit. · minipref" and browser.run("by('form').hidden")
    assert np.allclose(shown_probabilities(browser)[2], explanation.attribution.averaged, atol=6e-4)
    assert browser.run("by('head-title').textContent") == "Layer 2, head 1"
    assert browser.run("by('words').textContent") == alternative(explanation, 1, 0)
    browser.point("#head-0-1", click=True)
    assert browser.run("by('words').textContent") == alternative(explanation, 0, 1)
    assert browser.run("document.images.length") == 0 and browser.errors == []
    assert browser.requests == [(tmp_path / "page.html").as_uri()]
    browser.open((tmp_path / "page.html").as_uri() + "#layer=1&head=2&query=5")
    browser.run("window.before = true")
    browser.run("location.reload()")
    browser.wait("!window.before && document.readyState === 'complete'")
    assert browser.run("[chosen.layer, chosen.head, chosen.query]") == [0, 1, 4]


def test_in_dark_mode_the_page_is_dark_and_drawn_again(browser, judge, tmp_path):
    explanation = explain.explain(judge, Pair("", *((text,) for text in TEXTS)), 96)
    (tmp_path / "page.html").write_text(explain.page(explanation, 0, 0), encoding="utf-8")
    browser.dark(False)
    browser.open((tmp_path / "page.html").as_uri())
    pixel = "[...document.querySelector('#head-0-0 canvas').getContext('2d').getImageData(9, 3, 1, 1).data].slice(0, 3)"
    share = float(np.sqrt(explanation.probs[0, 0, 3, 9]))
    try:
        for dark, paper, mean, most in ((False, "rgb(255, 255, 255)", (246, 246, 246), (179, 74, 0)),
                                        (True, "rgb(13, 17, 23)", (32, 37, 44), (255, 160, 70))):
            browser.dark(dark)
            browser.wait(f"getComputedStyle(document.body).backgroundColor === '{paper}'")
            colour = (np.array(mean) + (np.array(most) - mean) * share).tolist()
            browser.wait(f"{pixel}.every((value, i) => Math.abs(value - {colour}[i]) <= 4)")     # drawn in an event
    finally:
        browser.dark(False)


# What other programs get.

def request(server, method="POST", path=None, body: bytes | None = None, **headers: str) -> tuple[int, dict | str]:
    if body is None and method == "POST":
        body = json.dumps(TEXTS).encode()
    path = f"/{server.token}/{'explain' if method == 'POST' else ''}" if path is None else path
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=60)) as connection:
        connection.request(method, path, body, {"Content-Type": "application/json"} | {
            name.replace("_", "-"): value for name, value in headers.items()})
        answer = connection.getresponse()
        text = answer.read().decode()
    for name in ("Content-Security-Policy", "X-Content-Type-Options", "Cache-Control"):
        assert answer.getheader(name) or answer.status == 501
    return answer.status, json.loads(text) if answer.getheader("Content-Type") == "application/json" else text


def test_the_servers_answer_is_the_explanation(server, judge):
    status, data = request(server)
    assert status == 200 and data["texts"] == list(TEXTS)
    assert np.allclose(data["prediction"]["averaged"], judge.compare(*TEXTS), atol=1e-6)


@pytest.mark.parametrize("headers", [
    {"Host": "evil.example"}, {"Host": "127.0.0.1"}, {"Host": "127.0.0.1:1"}, {"Host": "localhost.evil.example"},
    {"Host": ""}, {"Origin": "https://evil.example"}, {"Origin": "null"}, {"Sec_Fetch_Site": "cross-site"},
    {"Sec_Fetch_Site": "same-site"}])
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_other_pages_of_the_browser_are_refused(server, method, headers):
    status, answer = request(server, method, **headers)
    assert (status, answer) == (403, {"error": "not from this server's own page"})


@pytest.mark.parametrize("path", ["/", "//", "/wrong/", "/wrong/explain", "", "/../", "/%C3%A9/"])
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_without_the_token_nothing_is_there(server, method, path):
    assert request(server, method, path)[0] in (404, 400)


def test_no_other_path_is_there(server):
    for path in ("x", "explain", "row?n=0", "row?n=-1", "row?n=9", "row?n=%C2%B2", "row",
                 "../page.js", f"row?n={'9' * 9000}"):
        assert request(server, "GET", f"/{server.token}/{path}")[0] == 404
    assert request(server, "POST", f"/{server.token}/x")[0] == 404
    assert request(server, "PUT", body=b"x")[0] == 501


@pytest.mark.parametrize("body", [b"", b"x", b"{}", b"[1, 2, 3]", b'["a", "b"]', b'["a", "b", null]', b"\xff\xfe",
                                  b"[" * 100_000])
def test_a_body_that_is_no_pair_is_refused(server, body):
    assert request(server, body=body)[0] == 400


def test_a_failure_of_torch_is_an_answer_and_the_server_goes_on(server, monkeypatch):
    def fail(texts):
        raise RuntimeError("not enough memory: 5 GB\nat line 3")
    with monkeypatch.context() as patch:
        patch.setattr(server, "explain", fail)
        assert request(server) == (500, {"error": "not enough memory: 5 GB"})
    assert request(server)[0] == 200


@pytest.mark.parametrize(("headers", "status"), [
    ({"Content_Type": "text/plain"}, 415), ({"Content_Type": "multipart/form-data"}, 415),
    ({"Content_Length": "-1"}, 411), ({"Content_Length": "x"}, 411)])
def test_a_form_of_another_page_and_wrong_lengths_are_refused(server, headers, status):
    assert request(server, **headers)[0] == status


def test_ten_megabytes_are_refused_with_a_sentence_and_a_megabyte_of_text_is_explained(server):
    status, answer = request(server, body=json.dumps(["x" * 10_000_000, "a", "b"]).encode())
    assert status == 413 and "bytes of text" in answer["error"]
    status, answer = request(server, body=json.dumps(["word " * (MOST_BYTES // 5 - 10), "a", "b"]).encode())
    assert status == 200 and len(answer["tokens"]) == 96


def test_fifty_requests_at_once_are_answered_or_refused_and_the_server_goes_on(server):
    found = []
    threads = [threading.Thread(target=lambda: found.append(request(server)[0])) for _ in range(50)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 50 and set(found) <= {200, 503} and found.count(200) >= MOST_WAITING
    assert request(server)[0] == 200


def test_a_connection_that_says_nothing_holds_nobody_up(server, monkeypatch):
    monkeypatch.setattr("minipref.explain.serve.Handler.timeout", 0.3)
    silent = [socket.create_connection(("127.0.0.1", server.server_port)) for _ in range(20)]
    silent[0].sendall(f"POST /{server.token}/explain HTTP/1.0\r\nHost: 127.0.0.1:{server.server_port}\r\n"
                      "Content-Type: application/json\r\nContent-Length: 50\r\n\r\n[".encode())
    assert request(server)[0] == 200
    for connection in silent:
        connection.settimeout(10)
        assert connection.recv(100) == b""                               # closed by the server
        connection.close()


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_the_program_serves_until_it_is_told_to_stop(tmp_path, number):
    process = subprocess.Popen([sys.executable, "-m", "minipref.explain", "--serve"], stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"})
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith("serving"):
            break
    address = re.search(r"http://127\.0\.0\.1:(\d+)/([\w-]+)/", lines[-1])
    connection = http.client.HTTPConnection("127.0.0.1", int(address[1]), timeout=60)
    connection.request("GET", f"/{address[2]}/")
    assert "What the model sees" in connection.getresponse().read().decode()
    connection.close()
    time.sleep(0.1)
    process.send_signal(number)
    rest, errors = process.communicate(timeout=60)
    assert process.returncode == 0 and rest == "stopped\n" and errors == ""
