"""Every figure, generated table and notebook of README.md and docs/, made again from the code.

    make docs                              writes what has changed; runs with --screenshot
    python docs/build.py --check           writes nothing; exit code 1 if anything would change
    python docs/build.py --screenshot      also the picture of explain's page, by the chromium that is installed

Unusual here: the figures are drawn as SVG by the few lines below and not by matplotlib, whose output changes with its
version. Equal code and weights give equal files, byte for byte, so that drift can be tested. One exception: the shades
of the heatmaps come from products of floats, and a score at the edge between two shades may fall on either side on
another processor. `drift` allows for that.
"""

import argparse
import importlib
import json
import re
import sys
import tempfile
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks"), str(ROOT / "tests")]

import numpy as np  # noqa: E402 - these need the path
import torch  # noqa: E402

from minipref import metrics  # noqa: E402
from minipref.checkpoint import BODY_NAMES, HEAD_NAMES, load_classifier  # noqa: E402
from minipref.config import EncoderConfig  # noqa: E402
from minipref.data import Pair  # noqa: E402
from minipref.explain import explain, figure  # noqa: E402
from minipref.explain.__main__ import load_model  # noqa: E402
from minipref.explain.page import page as explain_page  # noqa: E402
from minipref.model import PreferenceModel, log_bucket  # noqa: E402
from minipref.optim import learning_rates  # noqa: E402
from minipref.predictor import Judge  # noqa: E402
from minipref.recipes import RECIPES, recipe  # noqa: E402
from minipref.runtime import write_text  # noqa: E402
from minipref.tokenizer import load_tokenizer  # noqa: E402

TINY = ROOT / "weights" / "minipref-tiny"
SHOWN = Pair("", ("Who wrote Hamlet?",), ("Shakespeare did.",), ("I think Dickens.",))
PRINTED = re.compile(r"<!-- printed by: make train -->\n```\n(.*?)^```", re.S | re.M)
EPOCH = re.compile(r"^epoch +(?P<epoch>[\d.]+) +train loss (?P<train>[\d.]+) +log loss (?P<valid>[\d.]+)", re.M)
LEFT, TOP, WIDTH, HEIGHT = 60, 16, 620, 300            # of a chart's axes, in pixels
Lines = dict[str, tuple[Sequence[float], Sequence[float]]]


# --- charts -----------------------------------------------------------------------------------------------------------

STYLE = ("text{font:14px system-ui,sans-serif;fill:#24292f}.middle{text-anchor:middle}.end{text-anchor:end}"
         ".bold{font-weight:600}.mono{font:12px ui-monospace,monospace}.small{font-size:12px}"
         "path,polyline{fill:none;stroke-width:2}.axis{stroke:#57606a;stroke-width:1}"
         ".dotted{stroke:#57606a;stroke-width:1.5;stroke-dasharray:4 4}.tip{fill:#57606a}"
         ".line0{stroke:#c8641e}.line1{stroke:#2a78c8}.line2{stroke:#5f8f3a}.line3{stroke:#9a5fb5}"
         ".dot{fill:#24292f}.box{fill:#f6f8fa;stroke:#57606a}.frame{fill:none;stroke:#57606a;stroke-dasharray:4 4}"
         ".c2c{fill:#fbe9dd;stroke:#c8641e}.c2p{fill:#dfedfb;stroke:#2a78c8}.p2c{fill:#e6f0dd;stroke:#5f8f3a}"
         "@media(prefers-color-scheme:dark){text,.dot{fill:#d0d7de}.axis,.dotted,.frame{stroke:#9198a1}"
         ".tip{fill:#9198a1}.box{fill:#161b22;stroke:#9198a1}"
         ".c2c{fill:#3d2314}.c2p{fill:#12283f}.p2c{fill:#1f2d16}}")


def svg(title: str, width: float, height: float, parts: Sequence[str]) -> str:
    """A picture; `title` is its text alternative."""
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" width="{width:g}" '
            f'height="{height:g}" role="img"><title>{title}</title>\n<style>{STYLE}</style>\n' + "\n".join(parts)
            + "\n</svg>\n")


def chart(title: str, lines: Lines, x_ticks: Sequence[float], y_ticks: Sequence[float], x_label: str, y_label: str,
          dotted: Sequence[str] = (), legend: tuple[float, float] | None = None, notes: Sequence[tuple] = (),
          guides: Sequence[tuple] = (), marks: Sequence[tuple] = (), dots: bool = False) -> str:
    """Lines {name: (x, y)} over axes that end at the outermost ticks. `title` is the text alternative.

    The names stand in a legend whose first line begins at `legend`, in the axes' units. Guides are dotted lines (x, y)
    without a name, marks single dots (x, y). A note is (x, y, text, anchor, right, down): a text, offset in pixels.
    """
    def at(x: float, y: float) -> tuple[float, float]:
        x_share, y_share = ((value - ticks[0]) / (ticks[-1] - ticks[0])
                            for value, ticks in ((x, x_ticks), (y, y_ticks)))
        return LEFT + WIDTH * x_share, TOP + HEIGHT * (1 - y_share)

    bottom, parts = TOP + HEIGHT, []
    for tick in x_ticks:
        x, _ = at(tick, y_ticks[0])
        parts.append(f'<path class="axis" d="M{x:.1f} {bottom}v5"/>'
                     f'<text x="{x:.1f}" y="{bottom + 20}" class="middle">{tick:,g}</text>')
    for tick in y_ticks:
        _, y = at(x_ticks[0], tick)
        parts.append(f'<path class="axis" d="M{LEFT} {y:.1f}h-5"/>'
                     f'<text x="{LEFT - 9}" y="{y + 5:.1f}" class="end">{tick:,g}</text>')
    for xs, ys in guides:
        points = " ".join("{:.1f},{:.1f}".format(*at(x, y)) for x, y in zip(xs, ys))
        parts.append(f'<polyline class="dotted" points="{points}"/>')
    kinds, full = {}, 0
    for name in lines:
        kinds[name] = "dotted" if name in dotted else f"line{full}"
        full += name not in dotted
    for name, (xs, ys) in lines.items():
        points = [at(x, y) for x, y in zip(xs, ys)]
        parts.append(f'<polyline class="{kinds[name]}" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in points)}"/>')
        if dots and name not in dotted:
            parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" class="dot"/>' for x, y in points]
    if legend:
        x, y = at(*legend)
        for number, name in enumerate(lines):
            parts.append(f'<path class="{kinds[name]}" d="M{x:.1f} {y + 20 * number:.1f}h24"/>'
                         f'<text x="{x + 32:.1f}" y="{y + 5 + 20 * number:.1f}">{name}</text>')
    parts += ['<circle cx="{:.1f}" cy="{:.1f}" r="4.5" class="dot"/>'.format(*at(x, y)) for x, y in marks]
    for note_x, note_y, text, anchor, right, down in notes:
        x, y = at(note_x, note_y)
        parts.append(f'<text x="{x + right:.1f}" y="{y + down:.1f}" class="{anchor}">{text}</text>')
    parts += [f'<path class="axis" d="M{LEFT} {TOP}V{bottom}H{LEFT + WIDTH}"/>',
              f'<text x="{LEFT + WIDTH / 2:g}" y="{bottom + 42}" class="middle">{x_label}</text>',
              f'<text transform="translate({LEFT - 44} {TOP + HEIGHT / 2:g}) rotate(-90)" class="middle">'
              f"{y_label}</text>"]
    return svg(title, LEFT + WIDTH + 30, TOP + HEIGHT + 54, parts)


def buckets() -> str:
    distance = torch.arange(513)
    return chart("The bucket of each distance: a straight line to 128, then steps that grow longer, to 255 at 511", {
        "log_bucket, position_buckets 256, max_distance 512": (distance.tolist(), log_bucket(distance).tolist()),
        "one bucket for each distance": ([0, 256], [0, 256])}, range(0, 513, 64), range(0, 257, 64), "distance i - j",
        "bucket", dotted=["one bucket for each distance"], legend=(200, 46), marks=[(128, 128), (511, 255)],
        notes=[(128, 128, "to distance 128: one bucket for each", "", 14, 14),
               (511, 255, "511: bucket 255, the last", "end", -2, 54)])


def schedule() -> str:
    """Every recipe's learning rate, over the rows it is meant for, and a run that stops early."""
    competition, bundled = 51_729, 40_499              # training rows: of the competition, of the synthetic dataset
    shares, lines = [n / 200 for n in range(201)], {}
    for name in RECIPES:
        config = recipe(name)
        total = config.epochs * -(-(bundled if name == "tiny" else competition) // config.batch_size)
        warmup = min(config.warmup_steps(total), max(1, total // 10))                  # as train.py has it
        lines[f"{name}: {config.epochs} epochs, {config.schedule}"] = shares, [
            learning_rates(config.schedule, round(share * total), total, warmup, [1.0])[0] for share in shares]
    epochs, stop = recipe("baseline").epochs, 5
    share = stop / epochs
    height = np.interp(share, *next(iter(lines.values())))
    return chart("The learning rate of each recipe over its run, and where an early stop would leave it", lines,
                 [n / 10 for n in range(0, 11, 2)], [0, 0.25, 0.5, 0.75, 1], "share of the planned steps",
                 "learning rate / peak", legend=(0.62, 0.94), marks=[(share, height)],
                 guides=[([share, share], [0, height])], notes=[
                     (share, 0.17, f"baseline stopped after epoch {stop} of {epochs}:", "", 10, 5),
                     (share, 0.10, f"the learning rate is still {height:.0%} of its peak", "", 10, 5)])


def overconfident(rows: int = 20_000, factor: float = 2.0) -> tuple[np.ndarray, np.ndarray]:
    """Synthetic logits `factor` times too large, and labels drawn from the calibrated ones: (N, 1, 3), (N,)."""
    draw = np.random.default_rng(0)
    calibrated = draw.normal(size=(rows, 1, 3))
    labels = (draw.random((rows, 1)) > metrics.softmax(calibrated)[:, 0].cumsum(1)).sum(1).clip(max=2)
    return factor * calibrated, labels


def reliability() -> str:
    logits, labels = overconfident()
    temperature = metrics.fit_temperature(logits, labels)
    lines = {}
    for name, t in (("uncalibrated", 1.0), (f"divided by the fitted temperature, {temperature:.2f}", temperature)):
        bins = metrics.evaluate(metrics.swap_averaged(logits, t), labels)["calibration"]
        lines[name] = [b["confidence"] for b in bins], [b["accuracy"] for b in bins]
    lines["perfect calibration"] = [0.3, 1], [0.3, 1]
    tenths = [n / 10 for n in range(2, 11)]
    return chart("Accuracy at each confidence of synthetic logits, before and after a temperature", lines, tenths[1:],
                 tenths[::2], "confidence: the probability of the likeliest class", "accuracy",
                 dotted=["perfect calibration"], legend=(0.32, 0.95), dots=True,
                 notes=[(1, 0.23, "20,000 synthetic rows, logits twice too large", "end", 0, 5)])


def pretraining() -> str:
    """The bundled encoder's held-out F1 beside the baselines', from the table in its README."""
    page = (TINY / "README.md").read_text(encoding="utf-8")
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if line[:1] == "|"]
    names = next(row for row in cells if row[0] == "step")
    table = [dict(zip(names, row)) for row in cells if row[1].endswith(" M") and len(row) == len(names)]
    tokens = [float(row["tokens"].removesuffix(" M")) for row in table]
    steps = [int(row["step"].replace(",", "")) for row in table]
    restart = next(tokens[n - 1] for n in range(1, len(steps)) if steps[n] < steps[n - 1])
    lines = {"discriminator, best threshold": (tokens, [float(row["best F1"]) for row in table]),
             "discriminator, threshold 0.5": (tokens, [float(row["F1"]) for row in table]),
             "word frequency, best threshold": (tokens, [float(row["word frequency"]) for row in table])}
    return chart("F1 of replaced-token detection on held-out text, by tokens of pretraining", lines, range(0, 41, 8),
                 [n / 10 for n in range(7)], "million tokens of pretraining", "F1", legend=(1, 0.57),
                 guides=[([restart, restart], [0, 0.6])], notes=[
                     (restart, 0.57, "second run, new generator:", "", 8, 5),
                     (restart, 0.53, "easier replacements at first", "", 8, 5)])


def training() -> str:
    """README's run of `make train`: the losses of each evaluation, from the lines that README has of it."""
    printed = PRINTED.search((ROOT / "README.md").read_text(encoding="utf-8"))[1]
    found = [{name: float(value) for name, value in match.groupdict().items()} for match in EPOCH.finditer(printed)]
    epochs = [row["epoch"] for row in found]
    prior, best = (float(re.search(rf"^{name} +([\d.]+)", printed, re.M)[1]) for name in ("class prior",
                                                                                        "Bayes-optimal"))
    lines = {"validation": (epochs, [row["valid"] for row in found]),
             "training, mean since the last evaluation": (epochs, [row["train"] for row in found])}
    return chart("Training and validation log loss of README's run on the synthetic dataset", lines,
                 [n / 4 for n in range(0, int(4 * epochs[-1]) + 1)], [n / 10 for n in range(5, 13)],
                 "epochs of the synthetic dataset", "log loss", legend=(1.05, 1.0), dots=True,
                 guides=[([0, epochs[-1]], [level, level]) for level in (prior, best)], notes=[
                     (0, level, f"{name} {level}", "", 10, -8)
                     for name, level in (("class prior", prior), ("Bayes-optimal", best))])


# --- the model --------------------------------------------------------------------------------------------------------

def box(left: float, top: float, width: float, height: float, lines: Sequence[str], kind: str = "box") -> str:
    """A box with lines of text in its middle; a line that begins with a parenthesis is a shape."""
    texts = "".join(
        f'<text x="{left + width / 2:g}" y="{top + height / 2 + 5 + 17 * (n - (len(lines) - 1) / 2):g}" '
        f'class="middle{" mono" if line[0] == "(" else ""}">{line}</text>' for n, line in enumerate(lines))
    return f'<rect x="{left}" y="{top}" width="{width}" height="{height}" rx="5" class="{kind}"/>{texts}'


def arrow(*points: tuple[float, float], kind: str = "axis") -> str:
    """A line through points, with its tip at the last; the last piece is vertical or horizontal."""
    (x0, y0), (x, y) = points[-2:]
    dx, dy = (x > x0) - (x < x0), (y > y0) - (y < y0)
    line = " ".join(f"{a:g},{b:g}" for a, b in [*points[:-1], (x - 6 * dx, y - 6 * dy)])
    return (f'<polyline class="{kind}" points="{line}"/><path class="tip" d="M{x:g} {y:g}L{x - 7 * dx - 4 * dy:g} '
            f'{y - 7 * dy - 4 * dx:g}L{x - 7 * dx + 4 * dy:g} {y - 7 * dy + 4 * dx:g}z"/>')


def model() -> str:
    """The classifier from token ids to logits on the left, one layer of its encoder on the right."""
    parts, left, middle = [], 306, 125
    column = [(44, ["input_ids", "(B, L)"]), (130, ["word_embeddings, LayerNorm", "(B, L, D)"]),
              (250, ["N encoder layers", "(B, L, D)"]), (370, ["hidden state of [CLS]", "(B, D)"]),
              (456, ["pooler: Linear, GELU", "(B, D)"]), (542, ["classifier: A, B, tie", "(B, 3)"])]
    parts += [box(10, top, 2 * middle - 20, 50, lines) for top, lines in column]
    parts += [arrow((middle, above + 50), (middle, below)) for (above, _), (below, _) in pairwise(column)]
    parts += ['<text x="10" y="26" class="bold">the classifier</text>',
              f'<text x="{left}" y="26" class="bold">one encoder layer</text>',
              f'<rect x="{left}" y="40" width="584" height="552" rx="8" class="frame"/>',
              f'<path class="dotted" d="M{2 * middle - 10} 250L{left} 48M{2 * middle - 10} 300L{left} 584"/>']

    def at(x: float, top: float, width: float, lines: list[str], kind: str = "box", height: float = 48) -> None:
        parts.append(box(left + x, top, width, height, lines, kind))

    def to(*points: tuple[float, float], kind: str = "axis") -> None:
        parts.append(arrow(*((left + x, y) for x, y in points), kind=kind))

    at(16, 56, 304, ["x: hidden states", "(B, L, D)"])
    at(350, 56, 218, ["rel_embeddings, LayerNorm", "(R, D), one for all layers"])
    for x, width, weights, name, shape in (
            (16, 96, "v_proj", "v", "(B, H, L, d)"), (120, 96, "k_proj", "k", "(B, H, L, d)"),
            (224, 96, "q_proj", "q", "(B, H, L, d)"), (350, 100, "k_proj", "pos_k", "(H, R, d)"),
            (468, 100, "q_proj", "pos_q", "(H, R, d)")):
        at(x, 140, width, [name, shape])
        to((x + width / 2, 104), (x + width / 2, 140))
        parts.append(f'<text x="{left + x + width / 2 + 6}" y="126" class="mono">{weights}</text>')
    for x, name, query, key in ((122, "c2c", "q", "k"), (276, "c2p", "q", "pos_k"), (430, "p2c", "k", "pos_q")):
        at(x, 256, 138, [f"{name}: {query} &#183; {key}", "(B, H, L, L)"], name)
    at(122, 344, 446, ["(c2c + c2p + p2c) / &#8730;(3 d), softmax over the keys", "(B, H, L, L)"])
    at(16, 430, 552, ["probs @ v, Linear, + x, LayerNorm", "(B, L, D)"])
    at(16, 516, 552, ["Linear to (B, L, F), GELU, Linear to D, + its input, LayerNorm", "(B, L, D)"], height=56)
    to((160, 188), (160, 256), kind="line0")
    to((262, 188), (262, 214), (230, 214), (230, 256), kind="line0")
    to((282, 188), (282, 214), (310, 214), (310, 256), kind="line1")
    to((400, 188), (400, 256), kind="line1")
    to((180, 188), (180, 234), (452, 234), (452, 256), kind="line2")
    to((518, 188), (518, 256), kind="line2")
    for x in (191, 345, 499):
        to((x, 304), (x, 344))
    to((345, 392), (345, 430))
    to((64, 188), (64, 430))
    to((292, 478), (292, 516))
    small = EncoderConfig()
    sizes = (f"B rows, L tokens. v3-small: N {small.num_hidden_layers}, D {small.hidden_size}, H "
             f"{small.num_attention_heads}, d {small.hidden_size // small.num_attention_heads}, F "
             f"{small.intermediate_size:,}, R {2 * small.position_buckets} rows for the buckets of i - j.")
    parts.append(f'<text x="10" y="622">{sizes}</text>')
    return svg("The classifier from token ids to logits, and one encoder layer with its three score terms, with every "
               "tensor's shape", left + 594, 636, parts)


# --- one head ---------------------------------------------------------------------------------------------------------

def one_head() -> tuple[str, str]:
    """The README's figure and caption: the bundled encoder's head with the largest minimum std of its three terms."""
    torch.manual_seed(0)                                    # for the fresh classifier, which is not used
    explanation = explain(Judge(load_classifier(TINY), load_tokenizer(TINY), 96), SHOWN, 96)
    weakest = explanation.scores.std((-1, -2)).min(-1)                                         # (N, H)
    layer, head = (int(n) for n in np.unravel_index(weakest.argmax(), weakest.shape))
    probs, terms = explanation.probs[layer, head], explanation.scores[layer, head]
    queries = np.arange(1, len(probs))                                           # those with a token before them
    hits = int((probs.argmax(-1)[queries] == queries - 1).sum())
    largest = np.bincount(terms[:, queries, queries - 1].argmax(0), minlength=3)
    caption = f"""Layer {layer + 1}, head {head + 1} of the bundled encoder is a previous-token head: {hits} of \
{len(queries)} queries attend most to the token before them.
The colours show each term minus its mean over the query's keys: orange above the mean, blue below, all on one scale.
At the previous token the term most above its mean is c2p for {largest[1]} queries, p2c for {largest[2]}, c2c for \
{largest[0]}."""
    return figure(explanation, layer, head), caption


# --- tables and the notebook ------------------------------------------------------------------------------------------

def recipes() -> str:
    """The recipes' figures and their sources as Markdown."""
    lines = ["| hyperparameter | " + " | ".join(f"`{name}`" for name in RECIPES) + " |",
             "|---|" + "---:|" * len(RECIPES)]
    for name in dict.fromkeys(name for preset in RECIPES.values() for name in preset):
        values = [getattr(recipe(preset), name) for preset in RECIPES]
        lines.append(f"| {name} | " + " | ".join(v if isinstance(v, str) else f"{v:g}" for v in values) + " |")
    return "\n".join(lines)


def results() -> str:
    """The README's table: means over seeds from benchmarks/experiments.json."""
    tables = json.loads((ROOT / "benchmarks" / "experiments.json").read_text(encoding="utf-8"))
    synthetic, real = (tables[name]["rows"] for name in ("batch-32", "real"))

    def mean(runs: dict[str, dict], value: str = "log_loss") -> float:
        return float(np.mean([run[value] for run in runs.values()]))

    prior, best = mean(synthetic["class prior"]), mean(synthetic["class prior"], "bayes_optimal")
    lines = ["| | synthetic: log loss | gap closed | real: log loss |", "|---|---:|---:|---:|"]
    for title, name in (("class prior", "class prior"), ("random weights, fine-tuned", "random"),
                        ("bundled encoder, fine-tuned", "bundled")):
        loss = mean(synthetic[name])
        lines.append(f"| {title} | {loss:.4f} | {(prior - loss) / (prior - best):.0%} | {mean(real[name]):.4f} |")
    lines.append(f"| class prior of each task, without the text | | | {mean(real['class prior by model_a']):.4f} |")
    lines.append(f"| Bayes-optimal, known for the synthetic dataset alone | {best:.4f} | 100% | |")
    return "\n".join(lines)


PARITY = {"minipref, float32": "minipref against transformers, float32",      # a row's name: the heading of its table
          "minipref, float64": "minipref against transformers, float64",
          "transformers, float32 against its own float64": "transformers' float32 against its own float64"}


def parity_tables() -> dict[str, dict[str, dict[str, float]]]:
    """From benchmarks/parity.md, which `make parity` writes: row's name -> length -> worst of "values", "gradients"."""
    text = (ROOT / "benchmarks" / "parity.md").read_text(encoding="utf-8")
    found = {}
    for name, heading in PARITY.items():
        header, _, *rows = re.search(rf"^### {re.escape(heading)}\n\n(.*?)\n\n", text, re.S | re.M)[1].split("\n")
        worst = {length.strip(): {"values": 0.0, "gradients": 0.0} for length in header.strip("|").split("|")[1:]}
        for row in rows:
            title, *cells = (cell.strip() for cell in row.strip("|").split("|"))
            kind = "gradients" if "gradient" in title else "values"
            for by_kind, cell in zip(worst.values(), cells, strict=True):
                by_kind[kind] = max(by_kind[kind], float(cell))
        found[name] = worst
    return found


def parity() -> str:
    """The README's box: the worst figures of all layers and lengths."""
    lines = ["| | hidden states and logits | gradients |", "|---|---:|---:|"]
    for name, by_length in parity_tables().items():
        worst = [max(by_kind[kind] for by_kind in by_length.values()) for kind in ("values", "gradients")]
        lines.append(f"| {name} | {worst[0]:.1e} | {worst[1]:.1e} |")
    return "\n".join(lines)


def parity_by_length() -> str:
    """The same for docs/benchmarks.md, a column for each length."""
    tables = parity_tables()
    lengths = list(next(iter(tables.values())))
    lines = [f"| | | {' | '.join(lengths)} |", "|---|---|" + "---:|" * len(lengths)]
    for name, by_length in tables.items():
        for kind, title in (("values", "hidden states and logits"), ("gradients", "gradients")):
            cells = [f"{by_length[length][kind]:.1e}" for length in lengths]
            lines.append(f"| {name} | {title} | {' | '.join(cells)} |")
    return "\n".join(lines)


def parameter_names() -> str:
    """The rename table of checkpoint.py as Markdown, with shapes in letters."""
    letters = {97: "V", 12: "D", 20: "F", 8: "R", 3: "C"}
    config = EncoderConfig(vocab_size=97, hidden_size=12, num_attention_heads=2, num_hidden_layers=1,
                           intermediate_size=20, position_buckets=4, max_distance=12)
    with torch.device("meta"):
        model = PreferenceModel(config)
    names = {name: (f"encoder.{name}", theirs) for name, theirs in BODY_NAMES.items()}
    lines = ["| minipref | transformers | shape |", "|---|---|---|"]
    for name, (full, theirs) in (names | {name: (name, theirs) for name, theirs in HEAD_NAMES.items()}).items():
        shape = model.get_parameter(f"{full.format(0)}.weight").shape
        axes = ", ".join(letters[size] for size in shape)
        lines.append(f"| `{name}` | `{theirs}` | ({axes}{',' * (len(shape) == 1)}) |")
    return "\n".join(lines)


def notebook(source: str) -> str:
    """A Jupyter notebook from a script whose cells begin with `# %%`, or `# %% [markdown]` for text behind '# '."""
    cells = []
    for number, (kind, text) in enumerate(re.findall(r"^# %%( \[markdown\])?\n(.*?)(?=^# %%|\Z)", source, re.S | re.M)):
        lines = text.strip("\n").split("\n")
        if kind:
            lines = [re.sub("^# ?", "", line) for line in lines]
        cell = {"cell_type": "markdown" if kind else "code", "id": f"cell-{number}", "metadata": {},
                "source": [f"{line}\n" for line in lines[:-1]] + lines[-1:]}
        cells.append(cell if kind else cell | {"execution_count": None, "outputs": []})
    about = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
             "language_info": {"name": "python"}}
    return json.dumps({"cells": cells, "metadata": about, "nbformat": 4, "nbformat_minor": 5}, indent=1,
                      ensure_ascii=False) + "\n"


def marked(text: str, mark: str, content: str) -> str:
    """`text` with `content` between its <!-- mark --> and <!-- /mark -->, which must be there once."""
    found = re.findall(rf"<!-- {mark} -->.*?<!-- /{mark} -->", text, re.S)
    if len(found) != 1:
        raise ValueError(f"{len(found)} places marked {mark}")
    return text.replace(found[0], f"<!-- {mark} -->\n{content}\n<!-- /{mark} -->")


# --- all of it --------------------------------------------------------------------------------------------------------

def measured(name: str) -> str:
    """The table of benchmarks/NAME.json, as benchmarks/NAME.py formats it."""
    figures = json.loads((ROOT / "benchmarks" / f"{name}.json").read_text(encoding="utf-8"))
    return importlib.import_module(name).table(figures)


def experiments(text: str) -> str:
    """The page with the tables that it has marks for, from benchmarks/experiments.json, as experiments.py formats them.

    Other tables of that file are a reader's own.
    """
    figures = json.loads((ROOT / "benchmarks" / "experiments.json").read_text(encoding="utf-8"))
    for name in re.findall(r"<!-- /(\S+) -->", text):
        text = marked(text, name, importlib.import_module("experiments").table(figures[name]))
    return text


def build() -> dict[str, str]:
    """Every generated file's content, by its path from the root."""
    head, caption = one_head()
    figures = {"buckets": buckets(), "schedule": schedule(), "reliability": reliability(), "head": head,
               "pretraining": pretraining(), "training": training(), "model": model()}
    files = {f"docs/figures/{name}.svg": text for name, text in figures.items()}
    readme = marked((ROOT / "README.md").read_text(encoding="utf-8"), "head", caption)
    files["README.md"] = marked(marked(readme, "parity", parity()), "results", results())
    files["docs/training.md"] = marked((ROOT / "docs/training.md").read_text(encoding="utf-8"), "recipes", recipes())
    for page, mark, content in (("benchmarks", "parity", parity_by_length()),
                                *(("benchmarks", name, measured(name)) for name in ("peers", "int8", "neighbour")),
                                ("glossary", "names", parameter_names())):
        path = f"docs/{page}.md"
        files[path] = marked(files.get(path) or (ROOT / path).read_text(encoding="utf-8"), mark, content)
    files["docs/experiments.md"] = experiments((ROOT / "docs/experiments.md").read_text(encoding="utf-8"))
    files["docs/kaggle.ipynb"] = notebook((ROOT / "docs/kaggle_notebook.py").read_text(encoding="utf-8"))
    return files


def drift(path: str, wanted: str) -> str:
    """Why the file at `path` is not what would be built now; "" where it is."""
    try:
        found = (ROOT / path).read_text(encoding="utf-8")
    except FileNotFoundError:
        return f"{path} is missing"
    if found == wanted or (path.endswith("head.svg") and same_shades(found, wanted)):
        return ""
    return f"{path} differs from what `make docs` makes"


def same_shades(found: str, wanted: str) -> bool:
    """Whether two heatmap figures have the same texts, and in every cell shades at most one apart."""
    texts = [re.sub(r"<desc>.*?</desc>|<path .*?/>", "", svg, flags=re.S).split() for svg in (found, wanted)]
    one, other = (shades(svg) for svg in (found, wanted))
    return texts[0] == texts[1] and all(abs(one.get(cell, 0) - other.get(cell, 0)) <= 1 for cell in one.keys() | other)


def shades(svg: str) -> dict[tuple[int, int, int], int]:
    """The shade of every cell (panel, left, top) of a figure that `minipref.explain.figure` drew, 0 left out."""
    cells = {}
    for panel, group in enumerate(re.findall(r"<g .*?</g>", svg, re.S)):
        for sign, shade, path in re.findall(r'<path class="([sm])(\d+)" d="(.*?)"/>', group):
            for left, top, width, side in re.findall(r"M(\d+) (\d+)h(\d+)v(\d+)", path):
                for x in range(int(left), int(left) + int(width), int(side)):
                    cells[panel, x, int(top)] = int(shade) if sign == "s" else -int(shade)
    return cells


def screenshot(path: Path) -> None:
    """A picture of explain's page, with the newest run's model if there is one. `--check` leaves it out: every version
    of a browser draws another picture."""
    from browser import Browser, is_installed
    if not is_installed():
        print("no chromium: the picture of the page is not made again")
        return
    judge, name = load_model(None)
    with tempfile.TemporaryDirectory() as folder:
        page_file = Path(folder) / "page.html"
        page_file.write_text(explain_page(explain(judge, SHOWN, 96, name), 1, 0), encoding="utf-8")
        browser = Browser(Path(folder) / "profile")
        try:
            browser.open(page_file.as_uri())
            browser.wait("data !== null")
            browser.screenshot(path, 1250, 1500)
        finally:
            browser.close()
    print(f"wrote {path.relative_to(ROOT)}")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing, and fail if anything would change")
    parser.add_argument("--screenshot", action="store_true", help="also docs/figures/page.png, with chromium")
    options = parser.parse_args(arguments)
    changed = [(path, text, why) for path, text in build().items() if (why := drift(path, text))]
    for path, text, why in changed:
        if options.check:
            print(why)
        else:
            write_text(ROOT / path, text)
            print(f"wrote {path}")
    if not changed:
        print("docs and figures are up to date")
    if options.screenshot and not options.check:
        screenshot(ROOT / "docs" / "figures" / "page.png")
    return 1 if options.check and changed else 0


if __name__ == "__main__":
    sys.exit(main())
