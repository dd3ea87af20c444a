"""Write benchmarks/performance.md and the short tables of docs/benchmarks.md and README.md, from bench.py's results."""

import statistics
from collections.abc import Iterable
from pathlib import Path

from minipref.runtime import write_text

ROOT = Path(__file__).resolve().parents[1]
PAGE, SUMMARY, README = ROOT / "benchmarks" / "performance.md", ROOT / "docs" / "benchmarks.md", ROOT / "README.md"
US, THEM = "minipref", "transformers"
MARKS = "<!-- speed -->\n", "<!-- /speed -->"

INTRODUCTION = """\
# Performance: every table

Written by `make bench` from `benchmarks/performance.json`, which holds every single run; docs/benchmarks.md has the
summary and explains it. Both programs have the same weights and the same rows and run in one process, in turns; times
are medians. A ratio of 2.0 means that minipref takes half as long.
"""


def write_page(figures: dict) -> None:
    """Write benchmarks/performance.md, and the tables between the marks of docs/benchmarks.md and README.md, if any."""
    parts = [INTRODUCTION, machine_text(figures["machine"])]
    parts += [section(figures) for name, section in SECTIONS.items() if name in figures]
    missing = [name for name in SECTIONS if name not in figures]
    if missing:
        parts.append(f"Not measured yet: {', '.join(missing)}; nor what the tables above leave out.\n")
    write_text(PAGE, "\n".join(parts))
    machine = machine_text(figures["machine"]).split("\n")[0]
    for path, content in ((SUMMARY, f"{machine}\n\n{summary_table(figures)}"), (README, readme_table(figures))):
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        if all(mark in text for mark in MARKS):
            before, after = text.split(MARKS[0])[0], text.split(MARKS[1])[1]
            write_text(path, before + MARKS[0] + content + MARKS[1] + after)


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
    return ("## Peak GEMM throughput\n\nOne product of the feed-forward's shape, (4096, 768) by (768, 3072): the "
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
    return ("## Memory\n\nPeak memory of a separate process, interpreter and weights included, and its ratio to "
            "transformers'. Here\nminipref gives freed memory back at once, as train.py does; the times above "
            f"are without that.\n\n{table(['task', 'rows x tokens', 'precision', 'ratio', US, THEM], rows)}")


def start_section(figures: dict) -> str:
    seconds = figures["start-up"][0]["seconds"]
    imports = {name: seconds[f"{name}, import alone"] for name in (US, THEM)}
    rows = [["from nothing to the first prediction", *compared(seconds)], ["the imports alone", *compared(imports)]]
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
    columns = ["task", "program", "time", "of the peak", *kinds, "between"]
    return ("## Where the time goes\n\n*Of the peak* is the fraction of the measured peak GEMM throughput that the "
            "whole task reaches (as MFU): the\noperations of its matrix products, divided by its time and by that "
            "peak. The other columns are shares of the time.\n*Between* is Python, and in minipref's training "
            "random number generation. transformers does more\n"
            f"arithmetic for the same logits.\n\n{table(columns, rows)}")


def share(part: float) -> str:
    return f"{part:.0%}" if part >= 0.005 else ""


def summary_table(figures: dict) -> str:
    """One table: forward, a training step and prediction, with the measured memory where there is one."""
    memory = {(row["task"], row["batch"], row["length"], row["precision"]):
              row["bytes"][US] / row["bytes"][THEM] for row in figures.get("memory", [])}
    rows = []
    for task in ("forward", "training"):
        for row in figures.get(task, []):
            shape = row["batch"], row["length"]
            if shape in ((32, 128), (8, 512), (2, 2048)) and row["threads"] == figures[task][0]["threads"]:
                part = memory.get((task, *shape, row["precision"]))
                rows.append([f"{task}, {shape[0]} x {shape[1]} tokens", row["precision"], *compared(row["seconds"]),
                             f"{part:.2f}" if part else ""])
    for row in figures.get("prediction", []):
        for name, precision in ((US, "fp32"), (f"{US}, bf16", "bf16 (transformers: fp32)")):
            rows.append([f"predicting {row['rows']:,} rows of {row['file']}", precision,
                         *compared(row["seconds"], name), ""])
    return table(["task", "precision", "speed-up", US, THEM, "peak memory, ratio"], rows)


def readme_table(figures: dict) -> str:
    """A selection of rows."""
    rows = []
    for title, name, shapes in (("forward", "forward", [(8, 512), (2, 2048)]),
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
