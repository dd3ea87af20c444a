"""Every figure, generated table and notebook of README.md and docs/, made again from the code.

    make docs                              or python docs/build.py: writes what has changed
    python docs/build.py --check           writes nothing; exit code 1 if anything would change

Unusual here: the figures are drawn as SVG by the few lines below and not by matplotlib, whose output changes with its
version. Equal code and weights give equal files, byte for byte, so that drift can be tested. One exception: the shades
of the heatmaps come from products of floats, and a score at the edge between two shades may fall on either side on
another processor. `drift` allows for that.
"""

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402 - these need the path
import torch  # noqa: E402

from minipref import metrics  # noqa: E402
from minipref.checkpoint import BODY_NAMES, HEAD_NAMES, load_classifier  # noqa: E402
from minipref.config import EncoderConfig  # noqa: E402
from minipref.data import Pair  # noqa: E402
from minipref.explain import explain, figure  # noqa: E402
from minipref.model import PreferenceModel, log_bucket  # noqa: E402
from minipref.optim import cosine_with_warmup  # noqa: E402
from minipref.predictor import Judge  # noqa: E402
from minipref.recipes import RECIPES, recipe  # noqa: E402
from minipref.runtime import write_text  # noqa: E402
from minipref.tokenizer import load_tokenizer  # noqa: E402

TINY = ROOT / "weights" / "minipref-tiny"
SHOWN = Pair("", ("Who wrote Hamlet?",), ("Shakespeare wrote Hamlet.",), ("I think that Dickens wrote it.",))
LEFT, TOP, WIDTH, HEIGHT = 52, 14, 480, 240            # of a chart's axes, in pixels


# --- charts -----------------------------------------------------------------------------------------------------------

def chart(title: str, lines: dict[str, tuple[Sequence[float], Sequence[float]]], x_ticks: Sequence[float],
          y_ticks: Sequence[float], x_label: str, y_label: str, dotted: str = "") -> str:
    """Lines {name: (x, y)} over axes that end at the outermost ticks, as SVG; `title` is its text alternative."""
    def at(x: float, y: float) -> str:
        right = LEFT + WIDTH * (x - x_ticks[0]) / (x_ticks[-1] - x_ticks[0])
        return f"{right:.1f},{TOP + HEIGHT * (1 - (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0])):.1f}"

    bottom, parts = TOP + HEIGHT, []
    for tick in x_ticks:
        x = float(at(tick, 0).split(",")[0])
        parts.append(f'<path class="axis" d="M{x} {bottom}v5"/><text x="{x}" y="{bottom + 18}" class="middle">{tick:g}'
                     "</text>")
    for tick in y_ticks:
        y = float(at(0, tick).split(",")[1])
        parts.append(f'<path class="axis" d="M{LEFT} {y}h-5"/><text x="{LEFT - 8}" y="{y + 4:.1f}" class="end">{tick:g}'
                     "</text>")
    for number, (name, (xs, ys)) in enumerate(lines.items()):
        points = " ".join(at(x, y) for x, y in zip(xs, ys))
        kind = "dotted" if name == dotted else f"line{number}"
        parts.append(f'<polyline class="{kind}" points="{points}"/>')
        if len(lines) > 1:
            parts.append(f'<path class="{kind}" d="M{LEFT + 14} {TOP + 8 + 16 * number}h22"/>'
                         f'<text x="{LEFT + 42}" y="{TOP + 12 + 16 * number}">{name}</text>')
    parts += [f'<path class="axis" d="M{LEFT} {TOP}V{bottom}H{LEFT + WIDTH}"/>',
              f'<text x="{LEFT + WIDTH / 2:g}" y="{bottom + 36}" class="middle">{x_label}</text>',
              f'<text transform="translate(12 {TOP + HEIGHT / 2:g}) rotate(-90)" class="middle">{y_label}</text>']
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {LEFT + WIDTH + 24} {bottom + 44}" '
            f'width="{LEFT + WIDTH + 24}" height="{bottom + 44}" role="img"><title>{title}</title>\n<style>{STYLE}'
            "</style>\n" + "\n".join(parts) + "\n</svg>\n")


STYLE = ("text{font:12px system-ui,sans-serif;fill:#24292f}.middle{text-anchor:middle}.end{text-anchor:end}"
         "path,polyline{fill:none;stroke-width:2}.axis{stroke:#57606a;stroke-width:1}"
         ".dotted{stroke:#57606a;stroke-width:1;stroke-dasharray:3 3}"
         ".line0{stroke:#c8641e}.line1{stroke:#2a78c8}.line2{stroke:#5f8f3a}"
         "@media(prefers-color-scheme:dark){text{fill:#d0d7de}.axis,.dotted{stroke:#9198a1}}")


def buckets() -> str:
    distance = torch.arange(600)
    return chart("The bucket of each distance", {
        "bucket (span 256, max_distance 512)": (distance.tolist(), log_bucket(distance).tolist()),
        "every distance its own": ([0, 256], [0, 256])}, range(0, 601, 100), range(0, 257, 64), "distance i - j",
        "bucket", dotted="every distance its own")


def schedule() -> str:
    total, warmup = 1000, 80
    steps = [*range(0, warmup, 8), *range(warmup, total + 1, 10)]
    lines = {"warmup and cosine": (steps, [cosine_with_warmup(step, total, warmup, 1.0) for step in steps])}
    return chart("The learning rate over a run of 1,000 steps, 80 of them warmup", lines, range(0, 1001, 200),
                 [0, 0.25, 0.5, 0.75, 1], "step", "share of the peak")


def overconfident(rows: int = 20_000, factor: float = 2.0) -> tuple[np.ndarray, np.ndarray]:
    """Made-up logits that are `factor` times too sure, and labels drawn from the honest ones: (N, 1, 3), (N,)."""
    draw = np.random.default_rng(0)
    honest = draw.normal(size=(rows, 1, 3))
    labels = (draw.random((rows, 1)) > metrics.softmax(honest)[:, 0].cumsum(1)).sum(1).clip(max=2)
    return factor * honest, labels


def reliability() -> str:
    logits, labels = overconfident()
    temperature = metrics.fit_temperature(logits, labels)
    lines = {}
    for name, t in (("as it is", 1.0), (f"divided by the fitted temperature, {temperature:.2f}", temperature)):
        bins = metrics.evaluate(metrics.swap_averaged(logits, t), labels)["calibration"]
        lines[name] = [b["confidence"] for b in bins], [b["accuracy"] for b in bins]
    lines["honest"] = [0.3, 1], [0.3, 1]
    tenths = [n / 10 for n in range(2, 11)]
    return chart("Accuracy at each confidence, before and after a temperature", lines, tenths[1:], tenths[::2],
                 "confidence in the likeliest class", "accuracy", dotted="honest")


def pretraining() -> str:
    """The bundled encoder's held-out F1 beside the baselines', from the table in its README."""
    page = (TINY / "README.md").read_text(encoding="utf-8")
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if line[:1] == "|"]
    names = next(row for row in cells if row[0] == "step")
    table = [dict(zip(names, row)) for row in cells if row[1].endswith(" M") and len(row) == len(names)]
    tokens = [float(row["tokens"].removesuffix(" M")) for row in table]
    lines = {"best F1 of the discriminator": (tokens, [float(row["best F1"]) for row in table]),
             "its F1 at even odds": (tokens, [float(row["F1"]) for row in table]),
             "best F1 of word frequency": (tokens, [float(row["word frequency"]) for row in table]),
             "'always original'": ([0, tokens[-1]], [0, 0])}
    return chart("Replaced tokens found in held-out text, by tokens read", lines, range(0, 41, 8),
                 [n / 10 for n in range(7)], "million tokens read", "F1", dotted="'always original'")


# --- one head ---------------------------------------------------------------------------------------------------------

def one_head() -> tuple[str, str]:
    """The README's figure and its caption: of the bundled encoder, the head whose weakest term is the strongest."""
    torch.manual_seed(0)                                    # for the fresh classifier, which is not used
    explanation = explain(Judge(load_classifier(TINY), load_tokenizer(TINY), 96), SHOWN, 96)
    weakest = explanation.scores.std((-1, -2)).min(-1)                                         # (N, H)
    layer, head = (int(n) for n in np.unravel_index(weakest.argmax(), weakest.shape))
    caption = f"""Layer {layer + 1}, head {head + 1} of the bundled encoder on '{SHOWN.prompt[0]}' and two responses.
Rows are queries, columns keys. Orange: a score above its row's mean; blue: below. The fourth picture is the sum of the
other three, on their scale."""
    return figure(explanation, layer, head, ("c2c", "c2p", "p2c", "sum")), caption


# --- tables and the notebook ------------------------------------------------------------------------------------------

def recipes() -> str:
    """The recipes' figures and their sources as Markdown."""
    lines = ["| hyperparameter | " + " | ".join(f"`{name}`" for name in RECIPES) + " |",
             "|---|" + "---:|" * len(RECIPES)]
    for name in dict.fromkeys(name for preset in RECIPES.values() for name in preset):
        values = [getattr(recipe(preset), name) for preset in RECIPES]
        lines.append(f"| {name} | " + " | ".join(v if isinstance(v, str) else f"{v:g}" for v in values) + " |")
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

def build() -> dict[str, str]:
    """Every generated file's content, by its path from the root."""
    head, caption = one_head()
    figures = {"buckets": buckets(), "schedule": schedule(), "reliability": reliability(), "head": head,
               "pretraining": pretraining()}
    files = {f"docs/figures/{name}.svg": text for name, text in figures.items()}
    readme = marked((ROOT / "README.md").read_text(encoding="utf-8"), "head", caption)
    files["README.md"] = marked(readme, "parity", parity())
    files["docs/training.md"] = marked((ROOT / "docs/training.md").read_text(encoding="utf-8"), "recipes", recipes())
    for page, mark, content in (("benchmarks", "parity", parity_by_length()), ("glossary", "names", parameter_names())):
        text = (ROOT / f"docs/{page}.md").read_text(encoding="utf-8")
        files[f"docs/{page}.md"] = marked(text, mark, content)
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


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing, and fail if anything would change")
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
    return 1 if options.check and changed else 0


if __name__ == "__main__":
    sys.exit(main())
