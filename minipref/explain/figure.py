"""One head's scores and probabilities as an SVG, and as text."""

from itertools import pairwise

import numpy as np

from minipref.explain.attribution import TERMS, Explanation
from minipref.runtime import html_text

PANELS = {"c2c": "content to content", "c2p": "content to position", "p2c": "position to content",
          "sum": "the three together", "probs": "probabilities"}
LEVELS = 10                  # shades of a figure on each side of zero


def figure(explanation: Explanation, layer: int, head: int, panels: tuple[str, ...] = tuple(PANELS)) -> str:
    """One head's matrices side by side as an SVG, rows the queries, columns the keys; layer and head from 0.

    Orange: a score above the row's mean; blue: below. All scores share one scale, so the panels can be compared. The
    colour bars stand in the first free place.
    """
    matrices = {name: matrix for name, matrix in explanation.panels(layer, head).items() if name in panels}
    L, columns = len(explanation.tokens), 2 if len(matrices) <= 4 else 3
    cell, margin = max(2, min(14, 420 // L)), 104 if L <= 48 else 18      # longer sequences go without names
    side = cell * L
    limit = max([abs(m).max() for name, m in matrices.items() if name != "probs"], default=1.0) or 1.0
    parts = []
    for number, (name, matrix) in enumerate(matrices.items()):
        left, top = _corner(number, columns, side, margin)
        shades = np.rint(np.sqrt(matrix) * LEVELS if name == "probs" else matrix / limit * LEVELS).astype(int)
        title = "probabilities, softmax of the sum" if name == "probs" else f"{name}, {PANELS[name]}"
        parts += [f'<text x="{left}" y="{top - margin - 6}" class="title">{title}</text>',
                  f'<text x="{left + side}" y="{top - margin - 6}" class="axis" text-anchor="end">key</text>',
                  f'<g transform="translate({left} {top})"><rect width="{side}" height="{side}" class="s0"/>',
                  _shaded(shades, cell), "</g>"]
        if number % columns == 0:
            parts.append(f'<text transform="translate(13 {top + side // 2}) rotate(-90)" class="axis" '
                         'text-anchor="middle">query</text>')
        for n, token in enumerate(explanation.tokens if margin > 18 else ()):
            text, middle = html_text(label(token)), cell * (n + .5) + 4
            parts.append(f'<text transform="translate({left + middle:g} {top - 5}) rotate(-90)">{text}</text>')
            if number % columns == 0:
                parts.append(f'<text x="{left - 5}" y="{top + middle:g}" text-anchor="end">{text}</text>')
    left, top = _corner(len(matrices), columns, side, margin)            # the next free place
    parts.append(_colour_bars(left, top - margin, limit, "probs" in matrices))
    width = margin + min(columns, len(matrices)) * (side + 18)
    height = max(top - margin + 140, _corner(len(matrices) - 1, columns, side, margin)[1] + side + 8)
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
            f'role="img"><title>Layer {layer + 1}, head {head + 1}: {", ".join(matrices)}</title>'
            f'<desc>{html_text(alternative(explanation, layer, head))}</desc>\n<style>{STYLE}'
            f'text{{font-size:{min(12, max(9, cell))}px}}.axis,.title{{font:13px system-ui,sans-serif}}</style>\n'
            + "\n".join(parts) + "\n</svg>\n")


def _corner(number: int, columns: int, side: int, margin: int) -> tuple[int, int]:
    """(left, top) of a panel's matrix."""
    row, column = divmod(number, columns)
    return margin + column * (side + 18), 20 + margin + row * (side + margin + 34)


def _colour_bars(left: int, top: int, limit: float, has_probs: bool) -> str:
    """What the shades mean: the scores' scale, and the probabilities' if they are shown."""
    def bar(y: int, title: str, classes: list[str], width: int, ticks: dict[float, str]) -> list[str]:
        cells = [f'<rect x="{left + width * n}" y="{y}" width="{width}" height="14" class="{shade}"/>'
                 for n, shade in enumerate(classes)]
        marks = [f'<text x="{left + width * (n + .5):g}" y="{y + 30}" text-anchor="middle">{text}</text>'
                 for n, text in ticks.items()]
        return [f'<text x="{left}" y="{y - 8}" class="axis">{title}</text>', *cells, *marks]

    scores = [f"m{n}" for n in range(LEVELS, 0, -1)] + [f"s{n}" for n in range(LEVELS + 1)]
    half = f"{limit / 2:.2g}"
    parts = bar(top + 14, "score minus the mean of its row", scores, 11,
                {0.5: f"-{limit:.2g}", 5: f"-{half}", 10: "0", 15: half, 19.5: f"{limit:.2g}"})
    if has_probs:
        parts += bar(top + 84, "probability", [f"s{n}" for n in range(LEVELS + 1)], 21,
                     {0: "0", 2: "0.04", 5: "0.25", 7: "0.49", 10: "1"})
    return "\n".join(parts)


def label(token: str) -> str:
    """A token's name; white space alone is shown as an open box."""
    return token.strip() or "\u2423"


def _shaded(shades: np.ndarray, cell: int) -> str:
    """Cells of one shade as one path, neighbours in a row as one rectangle. `shades` (L, L) in -LEVELS..LEVELS."""
    paths: dict[int, list[str]] = {}
    for i, row in enumerate(shades):
        edges = [0, *(np.flatnonzero(np.diff(row)) + 1), len(row)]
        for begin, end in pairwise(edges):
            if row[begin]:
                paths.setdefault(int(row[begin]), []).append(
                    f"M{begin * cell} {i * cell}h{(end - begin) * cell}v{cell}h-{(end - begin) * cell}z")
    return "\n".join(f'<path class="{"s" if shade > 0 else "m"}{abs(shade)}" d="{"".join(pieces)}"/>'
                     for shade, pieces in sorted(paths.items()))


def _palette(mean: tuple, most: tuple, least: tuple) -> str:
    """CSS for every shade: from `least` over `mean` to `most`, colours as (red, green, blue)."""
    def mixed(end: tuple, share: float) -> str:
        return "#" + "".join(f"{round(m + (e - m) * share):02x}" for m, e in zip(mean, end))
    return "".join(f".{name}{n}{{fill:{mixed(end, n / LEVELS)}}}" for n in range(LEVELS + 1)
                   for name, end in (("s", most), ("m", least)))


STYLE = ("text{font:9px ui-monospace,monospace;fill:#24292f;white-space:pre}.title{font:12px system-ui,sans-serif}"
         + _palette((246, 246, 246), (179, 74, 0), (20, 84, 170))
         + "@media(prefers-color-scheme:dark){text{fill:#d0d7de}"
         + _palette((32, 37, 44), (255, 160, 70), (90, 165, 255)) + "}")


def alternative(explanation: Explanation, layer: int, head: int, count: int = 5) -> str:
    """The figure as text: the `count` highest probabilities, and which term is the largest in each."""
    probs, scores = explanation.probs[layer, head], explanation.scores[layer, head]
    sentences = []
    for place in np.argsort(-probs, axis=None, kind="stable")[:count]:
        i, j = divmod(int(place), len(explanation.tokens))
        term = TERMS[int(scores[:, i, j].argmax())]
        query, key = (f"{label(explanation.tokens[n])} (token {n + 1})" for n in (i, j))
        sentences.append(f"{query} attends to {key} with {probs[i, j]:.0%}, mostly through {term}")
    return "The strongest: " + "; ".join(sentences) + "."
