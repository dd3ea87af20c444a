"""Write docs/performance.md, and README.md's table, from the measurements of bench.py."""

import statistics
from collections.abc import Iterable
from pathlib import Path

from minipref.runtime import write_text

ROOT = Path(__file__).resolve().parents[1]
PAGE, README = ROOT / "docs" / "performance.md", ROOT / "README.md"
US, THEM = "minipref", "transformers"
MARKS = "<!-- speed -->\n", "<!-- /speed -->"

INTRODUCTION = """\
# Performance

minipref beside transformers' DeBERTa: the same weights, the same rows, one process, one after the other and again;
medians. Ratios come first: 2.0 means that minipref takes half as long. `make bench` measures all of this and writes
this page from `benchmarks/performance.json`, where every single run is.
"""

WHY = """\
## What makes the difference

`minipref/fast/attention.py` derives it step by step. In short:

- **No gather.** transformers multiplies with all 512 rows of the relative table, copies the table for each row of the
  batch, and picks L x L elements one by one, twice. Laid out by distance, the table gives products of which a
  view with strides (`relative_shift`) is the bias: no index.
- **Blocks that stay in the cache.** The L x L scores of a head are made, used and overwritten in one buffer. Main
  memory sees queries, keys, values and the result.
- **Nothing kept.** The backward pass makes the probabilities again, block by block, and the dropout from its seed. The
  feed-forward keeps its hidden vectors before the GELU and not after.
- **[CLS] only.** The last layer computes one query and one feed-forward a row: that is all the classifier reads.
- **Only distances that occur.** 128 tokens need 255 rows of the table, not 512.
- **Little padding** (prediction): rows sorted by length, batches by their number of tokens.
- **Cheap dropout** (training): 16 random bits an element from a fast generator; torch's own spends a double on each,
  on one thread.

## What was tried and is not there

- torch's own fused attention with the bias as its mask, on the CPU: slower in float32 than product, softmax and
  product one after the other; in bfloat16 faster, but it knows neither dropout nor a gradient of the bias.
- Adding p2c transposed straight into the scores: slower than copying it first and letting the product add to it; in
  bfloat16 several times.
- Transposing by a product with the identity matrix, which bfloat16 units are good at: no gain over the copy.
- All 2L - 1 distances in one product a head: in float32 slower than strips of 128 queries, which waste fewer.
- One product for q, k and v: within the noise in float32; the conversion that bfloat16 saves is now done once.
- `OMP_WAIT_POLICY=PASSIVE`, with which waiting threads leave their core to others: a training step of 8 x 512 then took
  7.4 s in float32 and 3.6 s in bfloat16, and the ratios were 1.70 and 1.68. minipref has more, shorter parallel parts.
- Random bits by integer hashing, which threads could share: no faster than the generator on two cores.
"""


def write_page(figures: dict) -> None:
    """Write docs/performance.md, and the table between README.md's marks if it has them."""
    parts = [INTRODUCTION, machine_text(figures["machine"])]
    parts += [section(figures) for name, section in SECTIONS.items() if name in figures]
    missing = [name for name in SECTIONS if name not in figures]
    if missing:
        parts.append(f"Not measured yet: {', '.join(missing)}; nor what the tables above leave out.\n")
    write_text(PAGE, "\n".join([*parts, WHY]))
    text = README.read_text(encoding="utf-8") if README.exists() else ""
    if all(mark in text for mark in MARKS):
        before, after = text.split(MARKS[0])[0], text.split(MARKS[1])[1]
        write_text(README, before + MARKS[0] + readme_table(figures) + MARKS[1] + after)


def machine_text(machine: dict) -> str:
    on_gpu = machine["gpu"]
    where = on_gpu or f"{machine['cpu']}, {machine['cores']} cores, {machine['instructions']}"
    half = "" if on_gpu else f", bfloat16 products {'in' if machine['bf16_products'] else 'not in'} hardware"
    never = "" if on_gpu else ("\n**None of these figures was measured on a GPU.** There minipref takes another path "
                               "(`batched_attention`), which is\ntested for its values and whose speed is not known. "
                               "`python benchmarks/bench.py --device cuda` would tell.\n")
    return (f"Machine: {where}{half}; {machine['system']}, Python {machine['python']}, torch {machine['torch']}, "
            f"transformers {machine['transformers']}.\n{never}")


def rates_section(figures: dict) -> str:
    rows = [[row["precision"], row["threads"], f"{row['gflops']:,}"] for row in figures["rates"]]
    return ("## The machine's own rate\n\nOne product of the feed-forward's shape, (4096, 768) by (768, 3072): the "
            f"ceiling for everything below.\n\n{table(['precision', 'threads', 'GFLOP/s'], rows)}")


def forward_section(figures: dict) -> str:
    rows = [[f"{row['batch']} x {row['length']}", row["precision"], row["threads"], *compared(row["seconds"])]
            for row in figures["forward"]]
    columns = ["rows x tokens", "precision", "threads", "ratio", US, THEM]
    return (f"## Forward\n\nA classifier's logits, without gradients.\n\n{table(columns, rows)}"
            f"{others(figures['forward'], 'torch.compile, its compilation not counted')}")


def training_section(figures: dict) -> str:
    rows = [[f"{row['batch']} x {row['length']}", row["precision"], row["threads"], *compared(row["seconds"])]
            for row in figures["training"]]
    columns = ["rows x tokens", "precision", "threads", "ratio", US, THEM]
    return ("## A training step\n\nForward, backward and AdamW with v3-small's dropout of 0.1; transformers with "
            f"torch's fused AdamW, its Trainer's default.\n\n{table(columns, rows)}"
            f"{others(figures['training'], 'minipref with a switch of train.py')}")


def others(measured: list[dict], title: str) -> str:
    """A table of the other contenders, or an empty string."""
    rows = [[f"{row['batch']} x {row['length']}", row["precision"], name, *compared(row["seconds"], name)[:2]]
            for row in measured for name in row["seconds"] if name not in (US, THEM)]
    columns = ["rows x tokens", "precision", "what", "ratio to transformers", "time"]
    return f"\n{title.capitalize() if title[0] == 'm' else title}:\n\n{table(columns, rows)}" if rows else ""


def prediction_section(figures: dict) -> str:
    rows = []
    for row in figures["prediction"]:
        for name, precision in ((US, "fp32"), (f"{US}, bf16", "bf16")):
            rows.append([row["file"], f"{row['rows']:,}", row["mean_tokens"], precision,
                         *compared(row["seconds"], name), f"{row['largest_difference'][name]:.0e}"])
    columns = ["file", "rows", "mean tokens", "precision", "ratio", US, THEM, "largest difference"]
    return ("## Rows of a file, end to end\n\nTexts in, probabilities out, in one order, cut to 512 tokens. "
            "transformers is fed as it usually is: batches of 32\nrows in the file's order, padded to the longest, in "
            "float32 whatever minipref's precision. The tokenizer and its cuts are\nthe same for both. The last column "
            f"is the largest difference of a probability from transformers'.\n\n{table(columns, rows)}")


def memory_section(figures: dict) -> str:
    rows = []
    for row in figures["memory"]:
        ours, theirs = (row["bytes"][name] / 2**30 for name in (US, THEM))
        rows.append([row["task"], f"{row['batch']} x {row['length']}", row["precision"], f"**{ours / theirs:.2f}**",
                     f"{ours:.2f} GB", f"{theirs:.2f} GB"])
    return ("## Memory\n\nThe most that a process of its own ever held, interpreter and weights included, and the "
            "part of transformers'. Here\nminipref gives freed memory back at once, as train.py does; the times above "
            f"are without that.\n\n{table(['task', 'rows x tokens', 'precision', 'part', US, THEM], rows)}")


def start_section(figures: dict) -> str:
    seconds = figures["start-up"][0]["seconds"]
    imports = {name: seconds[f"{name}, import alone"] for name in (US, THEM)}
    rows = [["from nothing to the first verdict", *compared(seconds)], ["the imports alone", *compared(imports)]]
    return f"## Start-up\n\n{table(['', 'ratio', US, THEM], rows)}"


def profile_section(figures: dict) -> str:
    rates = {(row["precision"], row["threads"]): row["gflops"] for row in figures.get("rates", [])}
    kinds = ["matrix products", "softmax", "GELU", "LayerNorm", "gathering", "random numbers", "moving and adding",
             "AdamW"]
    rows = []
    for row in figures["profiles"]:
        by_kind, seconds = row["by_kind"], row["seconds"]
        rate, ceiling = row["gflop"] / seconds, rates.get((row["precision"], row["threads"]))
        between = max(0.0, seconds - sum(by_kind.values()))
        rows.append([f"{row['task']} {row['batch']} x {row['length']} {row['precision']}", row["name"],
                     duration(seconds), f"{rate / ceiling:.0%}" if ceiling else "",
                     *(share(by_kind.get(kind, 0) / seconds) for kind in kinds), share(between / seconds)])
    columns = ["task", "program", "time", "of the rate", *kinds, "between"]
    return ("## Where the time goes\n\n*Of the rate* is the part of the machine's own matrix-product rate that is "
            "reached: the\nproducts' arithmetic, divided by the whole time and that rate. The other columns are shares "
            "of the time. *Between* is\nPython, and in minipref's training the drawing of random numbers. transformers "
            f"does more arithmetic for the same logits.\n\n{table(columns, rows)}")


def share(part: float) -> str:
    return f"{part:.0%}" if part >= 0.005 else ""


def readme_table(figures: dict) -> str:
    """A selection of rows."""
    rows = []
    for title, name, shapes in (("forward", "forward", [(8, 512), (2, 2048), (32, 128)]),
                                ("training step", "training", [(8, 512)])):
        for batch, length in shapes:
            found = {row["precision"]: row["seconds"] for row in figures.get(name, []) if row["batch"] == batch
                     and row["length"] == length and row["threads"] == figures[name][0]["threads"]}
            if found:
                rows.append([f"{title}, {batch} rows of {length} tokens",
                             *(compared(found[precision])[0] for precision in ("fp32", "bf16"))])
    machine = figures["machine"]
    where = machine["gpu"] or f"{machine['cpu']}, {machine['cores']} cores, {machine['instructions']}"
    versions = f"torch {machine['torch']}, transformers {machine['transformers']}"
    return (table(["times as fast as transformers", "fp32", "bf16"], rows)
            + f"\nv3-small with random weights; {where}; {versions}.\n")


def compared(seconds: dict[str, list[float]], name: str = US) -> list[str]:
    """Table cells: the ratio, our median and theirs."""
    ours, theirs = statistics.median(seconds[name]), statistics.median(seconds[THEM])
    return [f"**{theirs / ours:.2f}**", duration(ours), duration(theirs)]


def duration(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.0f} ms"


def table(columns: list[str], rows: Iterable[Iterable]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join("| " + " | ".join(map(str, line)) + " |\n" for line in lines)


SECTIONS = {"rates": rates_section, "forward": forward_section, "training": training_section,
            "prediction": prediction_section, "memory": memory_section, "start-up": start_section,
            "profiles": profile_section}
