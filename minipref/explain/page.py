"""An explanation as one HTML file that needs no server and fetches nothing. The template is page.html."""

import base64
import json
import re
from pathlib import Path

import numpy as np

from minipref.config import LABELS
from minipref.explain.attribution import Attribution, Explanation
from minipref.explain.figure import PANELS, alternative, label
from minipref.runtime import html_text

TEMPLATE = Path(__file__).with_name("page.html")
PAGE_MARK = "<title>One pair explained</title>"          # of the template: another file is not written over
GAP = "[...]"                # where tokens were left out
OUTCOMES = ("A is better", "B is better", "a tie")


def page(explanation: Explanation, layer: int, head: int) -> str:
    """The page, opening on one head (from 0). Every text is escaped: a response may hold HTML."""
    parts = {"MODEL": html_text(explanation.model), "PREDICTION": _prediction_html(explanation),
             "LAYERS": _options(explanation.probs.shape[0], layer), "HEADS": _options(explanation.probs.shape[1], head),
             "QUERIES": "".join(f"<option value={i}>{i + 1}: {html_text(label(token))}</option>"
                                for i, token in enumerate(explanation.tokens)),
             "ALTERNATIVE": html_text(alternative(explanation, layer, head)),
             "DATA": json.dumps(_page_data(explanation)).replace("<", "\\u003c")}    # so no text can end its <script>
    template = TEMPLATE.read_text(encoding="utf-8")
    return re.sub(r"@([A-Z]+)@", lambda mark: parts[mark[1]], template)    # in one pass: texts may hold marks as well


def _options(count: int, chosen: int) -> str:
    return "".join(f"<option value={n}{' selected' * (n == chosen)}>{n + 1}</option>" for n in range(count))


def _page_data(explanation: Explanation) -> dict:
    """Scores as signed bytes, each matrix with its own step; probabilities as the square root's share of 255.

    A score is off by at most half a step, a 254th of the matrix's largest; a probability by at most 0.4%.
    """
    steps = np.abs(explanation.scores).max((-1, -2), keepdims=True) / 127
    scores = np.rint(explanation.scores / np.where(steps > 0, steps, 1)).astype(np.int8)
    probs = np.rint(np.sqrt(explanation.probs) * 255).astype(np.uint8)
    return {"tokens": explanation.tokens, "segments": explanation.segments, "heads": explanation.probs.shape[1],
            "panels": PANELS, "steps": [float(f"{step:.6g}") for step in steps.ravel()],
            "scores": base64.b64encode(scores.tobytes()).decode(), "probs": base64.b64encode(probs.tobytes()).decode()}


def _prediction_html(explanation: Explanation) -> str:
    """The upper half of the page: prediction, swap check, and the tokens shaded by their attributions."""
    attribution, parts = explanation.attribution, []
    if explanation.num_truncated:
        parts.append(f"<p>{explanation.num_truncated:,} tokens did not fit and were left out, where {GAP} stands. This "
                     "page describes what is left.</p>")
    if attribution is None:
        parts.append("<p><strong>There is no trained classifier here</strong>, so there is no prediction to explain: "
                     "this is what an encoder attends to before fine-tuning. <code>train.py</code> trains a classifier."
                     "</p>" + _tokens_html(explanation, None, "the pair"))
    else:
        parts += [_swap_check_html(attribution),
                  *(_tokens_html(explanation, values, name)
                    for values, name in zip(attribution.attributions, ("A first", "B first"))),
                  _strongest_html(explanation)]
    return "\n".join(parts)


def _swap_check_html(attribution: Attribution) -> str:
    probs, averaged, prediction = attribution.probabilities, attribution.averaged, OUTCOMES[attribution.prediction]
    a_first, b_first = (OUTCOMES[c] for c in probs.argmax(1))
    rows = [("A first", probs[0]), ("B first", probs[1]), ("averaged", averaged)]
    if attribution.untruncated_probs is not None:
        rows.append(("averaged, without truncation", attribution.untruncated_probs))
    table = "".join(f"<tr><th scope=row>{name}</th>" + "".join(f"<td>{p:.3f}</td>" for p in row) + "</tr>"
                    for name, row in rows)
    agreement = (f"Both orders agree; their probabilities differ by at most {abs(probs[0] - probs[1]).max():.3f}."
                 if a_first == b_first else
                 f"<strong>The order decides</strong>: with A first the prediction is '{a_first}', with B first "
                 f"'{b_first}'.")
    return (f"<p>Prediction: <strong>{prediction}</strong>, {averaged[attribution.prediction]:.0%}. {agreement}</p>"
            "<table><caption>The swap check</caption><tr><td></td>" +
            "".join(f"<th scope=col>{label}</th>" for label in LABELS) + f"</tr>{table}</table>"
            f"<h3>Token attributions</h3><p>Orange: for '{prediction}'; blue: against it (gradient times input: "
            "a local sensitivity of the prediction's log odds, not a causal explanation). Underlined tokens change "
            "sides with the order.</p>")


def _strongest_html(explanation: Explanation) -> str:
    attributions = explanation.attribution.attributions
    strongest = np.argsort(-abs(attributions).max(0), kind="stable")[:10]
    rows = "".join(f"<tr><th scope=row>{html_text(label(explanation.tokens[t]))}</th><td>{t + 1}</td>"
                   f"<td>{explanation.segments[t]}</td><td>{attributions[0, t]:+.3f}</td>"
                   f"<td>{attributions[1, t]:+.3f}</td></tr>" for t in strongest)
    return ("<table><caption>The ten largest attributions, in nats of log odds</caption><tr><th scope=col>token</th>"
            "<th scope=col>place</th><th scope=col>in</th><th scope=col>A first</th><th scope=col>B first</th></tr>"
            f"{rows}</table>")


def _tokens_html(explanation: Explanation, attributions: np.ndarray | None, name: str) -> str:
    """The sequence as text, a line a segment, each token shaded by its attribution."""
    both = explanation.attribution.attributions if explanation.attribution else np.zeros((2, len(explanation.tokens)))
    limit = abs(both).max() or 1.0
    lines = {"prompt": [], "A": [], "B": []}
    for t, (token, segment) in enumerate(zip(explanation.tokens, explanation.segments)):
        if not segment:
            continue
        if t in explanation.gaps:
            lines[segment].append(f" {GAP} ")
        share = 0.0 if attributions is None else attributions[t] / limit
        turns = both[0, t] * both[1, t] < 0 and abs(both[:, t]).min() > 0.1 * limit
        kind = f'{"for" if share > 0 else "against"}{" turns" if turns else ""}'
        lines[segment].append(f'<span class="{kind}" style="--share:{abs(share):.2f}" title="{share * limit:+.3f}">'
                              f"{html_text(token)}</span>")
    rows = "".join(f"<dt>{segment}</dt><dd>{''.join(spans)}</dd>" for segment, spans in lines.items())
    return f'<figure><figcaption>{name}</figcaption><dl class="tokens">{rows}</dl></figure>'
