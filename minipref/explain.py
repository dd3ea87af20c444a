"""What one head attends to, split into its three terms, and which tokens moved the decision.

    python -m minipref.explain --prompt "Name a fruit." --a "An apple." --b "A chair."
    python -m minipref.explain data/train.csv --row 3 --model runs/first/model --output row3.html

Writes a page, one HTML file that needs no server and fetches nothing, and a figure beside it, the same name with .svg.
Without --model it takes the newest run's model, else the encoder that ships with minipref: that one has no trained
head, so the page shows what it attends to and no decision.

What is unusual here:
- Scores are shown less their row's mean. Adding a number to all of a query's scores changes no probability, and in
  trained heads that number is often larger than everything that matters.
- A token's part in the decision is gradient times input: how the log odds of the verdict would change if the token's
  vector were scaled up a little. That is the decision's slope at this one point, not what deleting the token would do.
- The swap check. The pair is judged in both orders; tokens that matter in one order only are reasons that the
  model does not stand by.
"""

import base64
import html
import json
import re
import sys
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from minipref import runs
from minipref.attention import disentangled_scores, masked_softmax
from minipref.checkpoint import load_classifier
from minipref.classifier import PreferenceModel
from minipref.config import LABELS
from minipref.data import Pair, encode_pairs, make_batch, read_pairs
from minipref.errors import ArgumentParser, InputError
from minipref.files import write_text
from minipref.judge import (
    LONGEST,
    SETTINGS,
    Judge,
    add_rows_or_pair,
    check_rows_or_pair,
    check_vocabulary,
    load_judge,
)
from minipref.positions import relative_index
from minipref.tokenizer import BYTE_PIECES, SPACE, Tokenizer, load_tokenizer

BUNDLED = Path(__file__).resolve().parents[1] / "weights" / "minipref-tiny"
TEMPLATE = Path(__file__).with_name("explain.html")
TERMS = ("c2c", "c2p", "p2c")
PANELS = {"c2c": "content to content", "c2p": "content to position", "p2c": "position to content",
          "sum": "the three together", "probs": "probabilities"}
GAP = "[...]"                # where tokens were left out
LEVELS = 10                  # shades of a figure on each side of zero


# --- looking inside ---------------------------------------------------------------------------------------------------

@dataclass
class Decision:
    """What a trained model says of the pair. Contributions are in nats of log odds of `verdict`, one for each token."""

    verdict: int                   # 0 A, 1 B, 2 tie
    probabilities: np.ndarray      # (2, 3): A first, B first; both speak of A, B, tie
    contributions: np.ndarray      # (2, L): the same tokens in both orders, in the order that has A first
    whole: np.ndarray | None       # (3,) the model's answer to the pair at its own budget; None where nothing was cut

    @property
    def averaged(self) -> np.ndarray:
        """(3,) the model's answer: the mean of both orders."""
        return self.probabilities.mean(0)


@dataclass
class Explanation:
    """Everything that the page shows of one pair, whose sequence has A first."""

    model: str                     # what was looked at, in words
    tokens: list[str]              # L, as people read them
    fields: list[str]              # L: prompt, A, B, or "" for a special token
    scores: np.ndarray             # (N, H, 3, L, L): c2c, c2p, p2c, each row less its mean
    probs: np.ndarray              # (N, H, L, L)
    cut: int                       # tokens that did not fit
    gaps: list[int]                # the tokens in front of which some of those were left out
    decision: Decision | None      # None without a trained head

    def panels(self, layer: int, head: int) -> dict[str, np.ndarray]:
        """The matrices of one head, counted from 0, under the names of `PANELS`."""
        scores = self.scores[layer, head]
        return dict(zip(TERMS, scores)) | {"sum": scores.sum(0), "probs": self.probs[layer, head]}


def explain(judge: Judge, pair: Pair, max_length: int, name: str = "") -> Explanation:
    """Look at one pair, cut to `max_length` tokens. A model without a trained head (`load_report.new`) decides nothing.

    Errors: `InputError` for fewer than 7 tokens.
    """
    model, tokenizer = judge.model, judge.tokenizer
    examples, uncut = (encode_pairs([pair], tokenizer, length) for length in (max_length, LONGEST))
    ids, is_token, _ = make_batch(examples, [0], [False], tokenizer)
    swapped_ids, _, _ = make_batch(examples, [0], [True], tokenizer)
    _, terms, _ = look(model, ids, is_token)

    terms = terms - terms.mean(-1, keepdim=True)
    probs = masked_softmax(terms.sum(2), is_token)                       # (N, H, L, L)
    decision = None
    if not model.load_report.new:
        places = swapped_places([len(field) for field in examples.fields(0)])
        whole = judge.compare_many([pair])[0] if examples.cut[0] else None
        decision = decide(model, ids, swapped_ids, places, judge.temperature, whole)
    fields, gaps = [""], []
    for field, tokens, all_tokens in zip(("prompt", "A", "B"), examples.fields(0), uncut.fields(0)):
        if len(tokens) < len(all_tokens):
            gaps.append(len(fields) + len(tokens) - len(tokens) // 2)    # as `head_and_tail` cuts
        fields += [field] * len(tokens) + [""]
    return Explanation(name, readable(tokenizer, ids[0].tolist()), fields, terms.numpy(), probs.numpy(),
                       int(examples.cut[0]), gaps, decision)


def look(model: PreferenceModel, ids: Tensor, is_token: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`PreferenceModel.forward` once more, in the open: word vectors, every layer's scores, logits.

    The word vectors are a leaf that the logits have a gradient in.
    Shapes: ids, is_token (1, L) -> (1, L, D), (N, H, 3, L, L), (1, 3).
    """
    encoder = model.encoder
    with torch.no_grad():
        words = encoder.embed(ids, is_token)
        rel, rows = encoder.relative_table(ids.shape[1])
    x, terms = words.requires_grad_(), []
    for layer in encoder.layers:
        with torch.no_grad():
            q, k, _, pos_q, pos_k = layer.attention.project(x, rel)
            scores = disentangled_scores(q, k, pos_q, pos_k, relative_index(rows))
            terms.append(torch.cat(scores).transpose(0, 1))              # (H, 3, L, L)
        x = layer(x, is_token, rel, rows)
    logits = model.head(F.gelu(model.pooler(x[:, 0])))
    return words, torch.stack(terms), logits


def decide(model: PreferenceModel, ids: Tensor, swapped_ids: Tensor, places: list[int], temperature: float,
           whole: np.ndarray | None) -> Decision:
    """Both orders' probabilities and contributions. `places` says where a token of the first order is in the other."""
    is_token = torch.ones_like(ids, dtype=torch.bool)
    looks = [look(model, order, is_token) for order in (ids, swapped_ids)]
    logits = torch.cat([logits for _, _, logits in looks]) / temperature
    logits = torch.stack([logits[0], logits[1, [1, 0, 2]]])              # both orders speak of A, B, tie
    probabilities = torch.softmax(logits.detach().double(), -1).numpy()
    verdict = int(probabilities.mean(0).argmax())
    others = [c for c in range(len(LABELS)) if c != verdict]
    log_odds = logits[:, verdict] - torch.logsumexp(logits[:, others], -1)
    vectors = [words for words, _, _ in looks]
    gradients = torch.autograd.grad(log_odds.sum(), vectors)
    a_first, b_first = ((g * x.detach())[0].sum(-1).numpy() for g, x in zip(gradients, vectors))
    return Decision(verdict, probabilities, np.stack([a_first, b_first[places]]), whole)


def swapped_places(lengths: list[int]) -> list[int]:
    """For each token of `[CLS] prompt [SEP] A [SEP] B [SEP]`, its place in the sequence that has B before A.

    The first [SEP] behind an answer stays the first. `lengths` are the fields', without special tokens.
    """
    prompt, a, b = lengths
    before = prompt + 2                                                  # [CLS], the prompt and its [SEP]
    first_sep, last_sep = before + b, before + b + 1 + a
    return [*range(before), *range(first_sep + 1, last_sep), first_sep, *range(before, before + b), last_sep]


def readable(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    """The pieces as people read them: spaces and ASCII bytes as themselves, and nothing that no page can hold."""
    pieces = [chr(BYTE_PIECES[piece]) if BYTE_PIECES.get(piece, 128) < 128 else piece.replace(SPACE, " ")
              for piece in tokenizer.tokens(ids)]
    return [re.sub("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "\ufffd", piece) for piece in pieces]


# --- the figure -------------------------------------------------------------------------------------------------------

def figure(seen: Explanation, layer: int, head: int, panels: tuple[str, ...] = tuple(PANELS)) -> str:
    """One head's matrices side by side as an SVG, rows the queries, columns the keys; layer and head from 0.

    Orange draws the query's attention to the key, blue keeps it away; white is the row's mean. All scores share one
    scale, so that the panels can be compared and the fourth is the sum of what one sees in the other three.
    """
    matrices = {name: matrix for name, matrix in seen.panels(layer, head).items() if name in panels}
    L, columns = len(seen.tokens), 2 if len(matrices) <= 4 else 3
    cell, margin = max(2, min(11, 420 // L)), 66 if L <= 48 else 0       # longer sequences go without names
    side = cell * L
    limit = max([abs(m).max() for name, m in matrices.items() if name != "probs"], default=1.0) or 1.0
    parts = []
    for number, (name, matrix) in enumerate(matrices.items()):
        row, column = divmod(number, columns)
        left, top = margin + column * (side + 18), 20 + margin + row * (side + margin + 34)
        shades = np.rint(np.sqrt(matrix) * LEVELS if name == "probs" else matrix / limit * LEVELS).astype(int)
        said = PANELS[name] if name == "probs" else f"{name}, {PANELS[name]}"
        parts += [f'<text x="{left}" y="{top - margin - 6}" class="title">{said}</text>',
                  f'<g transform="translate({left} {top})"><rect width="{side}" height="{side}" class="s0"/>',
                  _shaded(shades, cell), "</g>"]
        names = [html.escape(label(token)) for token in seen.tokens] if margin else []
        for n, text in enumerate(names):
            middle = cell * (n + .5) + 3
            parts.append(f'<text transform="translate({left + middle:g} {top - 5}) rotate(-90)">{text}</text>')
            if column == 0:
                parts.append(f'<text x="{left - 5}" y="{top + middle:g}" text-anchor="end">{text}</text>')
    width, height = margin + min(columns, len(matrices)) * (side + 18), top + side + 8
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
            f'role="img"><title>Layer {layer + 1}, head {head + 1}: {", ".join(matrices)}</title>'
            f'<desc>{html.escape(alternative(seen, layer, head))}</desc>\n<style>{STYLE}</style>\n'
            + "\n".join(parts) + "\n</svg>\n")


def label(token: str) -> str:
    """A token's name where white space would not be seen."""
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


def alternative(seen: Explanation, layer: int, head: int, most: int = 5) -> str:
    """The figure in words: the pairs with the highest probabilities, and which term is the largest in each."""
    probs, scores = seen.probs[layer, head], seen.scores[layer, head]
    said = []
    for place in np.argsort(-probs, axis=None, kind="stable")[:most]:
        i, j = divmod(int(place), len(seen.tokens))
        term = TERMS[int(scores[:, i, j].argmax())]
        said.append(f"{label(seen.tokens[i])} (token {i + 1}) attends to {label(seen.tokens[j])} (token {j + 1}) with "
                    f"{probs[i, j]:.0%}, mostly through {term}")
    return "The strongest: " + "; ".join(said) + "."


# --- the page ---------------------------------------------------------------------------------------------------------

def page(seen: Explanation, layer: int, head: int) -> str:
    """The whole page, opening on one head (from 0). Every text is escaped: an answer may hold HTML."""
    N, H = seen.probs.shape[:2]
    title = "What minipref looked at"
    parts = {"TITLE": title, "MODEL": html.escape(seen.model), "DECISION": _decision_html(seen),
             "LAYERS": _options(N, layer), "HEADS": _options(H, head),
             "QUERIES": "".join(f"<option value={i}>{i + 1}: {html.escape(label(token))}</option>"
                                for i, token in enumerate(seen.tokens)),
             "ALTERNATIVE": html.escape(alternative(seen, layer, head)),
             "DATA": _as_json(_page_data(seen))}
    template = TEMPLATE.read_text(encoding="utf-8")
    return re.sub(r"@([A-Z]+)@", lambda mark: parts[mark[1]], template)    # in one pass: texts may hold marks as well


def _options(count: int, chosen: int) -> str:
    return "".join(f"<option value={n}{' selected' * (n == chosen)}>{n + 1}</option>" for n in range(count))


def _as_json(value: object) -> str:
    """JSON that can stand inside <script>: no text in it can end the element."""
    return json.dumps(value).replace("<", "\\u003c")


def _page_data(seen: Explanation) -> dict:
    """Scores as signed bytes, each matrix with its own step; probabilities as the square root's share of 255.

    A score is off by at most half a step, a 254th of the matrix's largest; a probability by at most 0.4%.
    """
    steps = np.abs(seen.scores).max((-1, -2), keepdims=True) / 127
    scores = np.rint(seen.scores / np.where(steps > 0, steps, 1)).astype(np.int8)
    probs = np.rint(np.sqrt(seen.probs) * 255).astype(np.uint8)
    return {"tokens": seen.tokens, "fields": seen.fields, "heads": seen.probs.shape[1], "panels": PANELS,
            "steps": [float(f"{step:.6g}") for step in steps.ravel()],
            "scores": base64.b64encode(scores.tobytes()).decode(), "probs": base64.b64encode(probs.tobytes()).decode()}


def _decision_html(seen: Explanation) -> str:
    """The upper half of the page: verdict, swap check, and the tokens shaded by what they contributed."""
    found, said = seen.decision, []
    if seen.cut:
        said.append(f"<p>{seen.cut:,} tokens did not fit and were left out, where {GAP} stands. All on this page is "
                    "about what is left.</p>")
    if found is None:
        said.append("<p><strong>There is no trained head here</strong>, so there is no decision to explain: this is "
                    "what an encoder attends to before fine-tuning. <code>train.py</code> makes a model that decides."
                    "</p>" + _tokens_html(seen, None, "the pair"))
        return "\n".join(said)
    verdict = [("A is better", "B is better", "a tie")[c] for c in (found.verdict, *found.probabilities.argmax(1))]
    rows = [("A first", found.probabilities[0]), ("B first", found.probabilities[1]), ("averaged", found.averaged)]
    if found.whole is not None:
        rows.append(("averaged, of the whole pair", found.whole))
    table = "".join(f"<tr><th scope=row>{name}</th>" + "".join(f"<td>{p:.3f}</td>" for p in row) + "</tr>"
                    for name, row in rows)
    apart = abs(found.probabilities[0] - found.probabilities[1]).max()
    agree = (f"Both orders say so; their probabilities differ by at most {apart:.3f}." if verdict[1] == verdict[2] else
             f"<strong>The order decides</strong>: with A first it says '{verdict[1]}', with B first '{verdict[2]}'.")
    said.append(f"<p>The verdict: <strong>{verdict[0]}</strong>, with {found.averaged[found.verdict]:.0%}. {agree}</p>"
                f"<table><caption>The swap check</caption><tr><td></td>" +
                "".join(f"<th scope=col>{label}</th>" for label in LABELS) + f"</tr>{table}</table>"
                f"<h3>Which tokens moved it</h3><p>Orange speaks for '{verdict[0]}', blue against it: gradient times "
                "input, the slope of the verdict's log odds. Underlined tokens change sides with the order.</p>")
    said += [_tokens_html(seen, found.contributions[order], name) for order, name in enumerate(("A first", "B first"))]
    strongest = np.argsort(-abs(found.contributions).max(0), kind="stable")[:10]
    rows = "".join(f"<tr><th scope=row>{html.escape(label(seen.tokens[t]))}</th><td>{t + 1}</td>"
                   f"<td>{seen.fields[t]}</td><td>{found.contributions[0, t]:+.3f}</td>"
                   f"<td>{found.contributions[1, t]:+.3f}</td></tr>" for t in strongest)
    said.append("<table><caption>The ten that moved it most, in nats of log odds</caption><tr><th scope=col>token</th>"
                "<th scope=col>place</th><th scope=col>in</th><th scope=col>A first</th><th scope=col>B first</th></tr>"
                f"{rows}</table>")
    return "\n".join(said)


def _tokens_html(seen: Explanation, contributions: np.ndarray | None, name: str) -> str:
    """The sequence as text, a line a field, each token shaded by its contribution."""
    both = seen.decision.contributions if seen.decision else np.zeros((2, len(seen.tokens)))
    limit = abs(both).max() or 1.0
    lines = {"prompt": [], "A": [], "B": []}
    for t, (token, field) in enumerate(zip(seen.tokens, seen.fields)):
        if not field:
            continue
        if t in seen.gaps:
            lines[field].append(f" {GAP} ")
        share = 0.0 if contributions is None else contributions[t] / limit
        turns = both[0, t] * both[1, t] < 0 and abs(both[:, t]).min() > 0.1 * limit
        kind = f'{"for" if share > 0 else "against"}{" turns" if turns else ""}'
        lines[field].append(f'<span class="{kind}" style="--share:{abs(share):.2f}" title="{share * limit:+.3f}">'
                            f"{html.escape(token)}</span>")
    rows = "".join(f"<dt>{field}</dt><dd>{''.join(spans)}</dd>" for field, spans in lines.items())
    return f'<figure><figcaption>{name}</figcaption><dl class="tokens">{rows}</dl></figure>'


# --- the program ------------------------------------------------------------------------------------------------------

def parse_arguments(arguments: list[str] | None):
    parser = ArgumentParser(prog="python -m minipref.explain", description="What one head attends to, and what moved "
                            "the decision: a page and a figure.")
    add = parser.add_argument
    add_rows_or_pair(parser)
    add("--row", type=int, default=1, metavar="N", help="which row of the CSV, counted from 1")
    add("--model", metavar="DIR", help="a trained model or an encoder (default: the newest run's, else what ships)")
    add("--layer", type=int, default=1, metavar="N", help="the layer to open with, counted from 1")
    add("--head", type=int, default=1, metavar="N", help="the head to open with, counted from 1")
    add("--tokens", type=int, default=128, metavar="N", help="cut the pair to this many tokens: the page grows with "
        "their square")
    add("--output", default="explain.html", metavar="HTML", help="the page; the figure goes beside it")
    options = parser.parse_args(arguments)
    check_rows_or_pair(parser, options)
    if options.row < 1:
        parser.error(f"--row {options.row}")
    if not options.output.endswith(".html"):
        parser.error(f"--output {options.output}: the page's name ends in .html")
    return options


def main(arguments: list[str] | None = None) -> int:
    try:
        options = parse_arguments(arguments)
        if options.csv is None:
            pair = Pair("", (options.prompt,), (options.a,), (options.b,))
        else:
            pair = next(islice(read_pairs(options.csv, "if present"), options.row - 1, None), None)
            if pair is None:
                raise InputError(file=options.csv, found=f"no row {options.row}", expected="a row of the file")
        judge, name = load(Path(options.model) if options.model else newest_model())
        for what, number, count in (("layer", options.layer, judge.model.config.layers),
                                    ("head", options.head, judge.model.config.heads)):
            if not 1 <= number <= count:
                raise InputError(found=f"--{what} {number}", expected=f"from 1 to {count} with this model")
        seen = explain(judge, pair, options.tokens, name)
        output = Path(options.output)
        write_text(output, page(seen, options.layer - 1, options.head - 1))
        write_text(output.with_suffix(".svg"), figure(seen, options.layer - 1, options.head - 1))
        print(f"looked at  {name}, {len(seen.tokens)} tokens, {seen.cut:,} left out")
        if seen.decision is None:
            print("           no trained head here, so no decision: train.py makes a model that decides")
        else:
            for label, p in zip(LABELS, seen.decision.averaged):
                print(f"           {label:<4} {p:.4f}")
        print(f"wrote      {output} and {output.with_suffix('.svg')}")
    except InputError as problem:
        print(f"explain: {problem}", file=sys.stderr)
        return 2
    except OSError as problem:
        print(f"explain: {' '.join(str(problem).split())}", file=sys.stderr)
        return 1
    return 0


def newest_model() -> Path:
    """The newest run's model (its first fold's), or the bundled encoder where nothing was trained yet."""
    try:
        return runs.newest_models()[0]
    except InputError:
        return BUNDLED


def load(folder: Path) -> tuple[Judge, str]:
    """A trained model, or an encoder with a fresh head, and its name without what lies above the folder.

    Errors: `InputError`.
    """
    name = "/".join(folder.resolve().parts[-2:])
    if (folder / SETTINGS).exists():
        return load_judge(folder), name
    tokenizer, model = load_tokenizer(folder), load_classifier(folder)
    check_vocabulary(tokenizer, model.config.vocab_size, folder)
    return (Judge(model, tokenizer, model.config.max_distance),
            f"{name}, an encoder" if model.load_report.new else name)


if __name__ == "__main__":
    sys.exit(main())
