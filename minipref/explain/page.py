"""The page: page.html with page.js and one explanation inside. It needs no server and fetches nothing.

`serve.py` sends the same page without an explanation; the page then asks for one whenever a text changes.
"""

import base64
import json
import re
from pathlib import Path

import numpy as np

from minipref.config import LABELS
from minipref.data import Pair, to_pairs
from minipref.explain.attribution import Explanation
from minipref.explain.figure import PANELS
from minipref.runtime import html_text

TEMPLATE, SCRIPT = (Path(__file__).with_name(name) for name in ("page.html", "page.js"))
PAGE_MARK = '<meta name="generator" content="minipref.explain">'      # another file is not written over
TITLE_LENGTH = 60


def page(explanation: Explanation, layer: int, head: int) -> str:
    """The static page, opening on one head (from 0)."""
    title = " ".join(" ".join(filter(None, explanation.pair.prompt)).split()) or "no prompt"
    return fill_template(f"{title[:TITLE_LENGTH]} \u00b7 minipref", layer, head, {"data": page_data(explanation)})


def fill_template(title: str, layer: int, head: int, content: dict) -> str:
    """The template with its script and a JSON object for it. All texts are escaped: a response may hold HTML."""
    settings = {"layer": layer, "head": head, "panels": PANELS, "labels": LABELS} | content
    parts = {"TITLE": html_text(title), "SCRIPT": SCRIPT.read_text(encoding="utf-8"), "PAGE": to_json(settings)}
    return re.sub("@(TITLE|SCRIPT|PAGE)@", lambda mark: parts[mark[1]], TEMPLATE.read_text(encoding="utf-8"))


def to_json(value: object) -> str:
    """JSON in ASCII in which no text can end the <script> that holds it."""
    return json.dumps(value).replace("<", "\\u003c")


def page_data(explanation: Explanation) -> dict:
    """What the page shows of a pair. A number of `_int16` is off by at most a 65,534th of its matrix's largest.

    Each row of scores is centred, with its mean beside it; probabilities are in units of 1/65,535.
    """
    attribution = explanation.attribution
    probs = np.rint(explanation.probs * 65535).astype("<u2")
    return {
        "model": explanation.model, "texts": pair_texts(explanation.pair), "tokens": explanation.tokens,
        "segments": explanation.segments, "gaps": explanation.gaps,
        "layers": probs.shape[0], "heads": probs.shape[1], "size": explanation.vectors["q"].shape[-1],
        "buckets": explanation.buckets.tolist(), "rows": explanation.rows.tolist(), "exact": explanation.exact,
        "scores": _int16(explanation.scores), "means": _base64(explanation.means.astype("<f4")),
        "probs": _base64(probs), "vectors": {name: _int16(v) for name, v in explanation.vectors.items()},
        "prediction": attribution and {
            "outcome": attribution.outcome, "order_sensitive": attribution.order_sensitive,
            "label": attribution.prediction, "orders": attribution.probabilities.tolist(),
            "averaged": attribution.averaged.tolist(), "attributions": attribution.attributions.tolist(),
            "untruncated": None if attribution.untruncated_probs is None else attribution.untruncated_probs.tolist()}}


def pair_texts(pair: Pair) -> list[str]:
    """Prompt, A and B as texts that `to_pairs` reads back as the same turns: JSON lists if one turn is not enough."""
    segments = pair.prompt, pair.response_a, pair.response_b
    if all(len(turns) == 1 for turns in segments):
        texts = [turns[0] or "" for turns in segments]
        if to_pairs([texts]) == [Pair("", *((text,) for text in texts))]:
            return texts
    return [json.dumps(turns, ensure_ascii=False) for turns in segments]


def _int16(matrices: np.ndarray) -> dict:
    """(..., rows, columns) as signed 16-bit numbers, each matrix in steps of its own."""
    steps = np.abs(matrices).max((-1, -2), keepdims=True) / 32767
    values = np.rint(matrices / np.where(steps > 0, steps, 1)).astype("<i2")
    return {"steps": [float(f"{step:.8g}") for step in steps.ravel()], "values": _base64(values)}


def _base64(array: np.ndarray) -> str:
    return base64.b64encode(array.tobytes()).decode()
