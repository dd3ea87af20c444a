"""minipref compared with alternatives: transformers, BERT with SDPA, ONNX Runtime and OpenVINO.

    python benchmarks/peers.py             an hour on two cores; writes benchmarks/peers.json and peers.md
    python benchmarks/peers.py --small     a toy model, to test this script

ONNX Runtime (in float32) and OpenVINO take transformers' DeBERTa, exported (`pip install .[peers]`; a peer that is not
installed is left out). BERT is another model of the same sizes and vocabulary, with torch's fused attention in the
forward pass; it computes all tokens of the last layer, not [CLS] only. All take turns in one process, with a pause in
between because idle threads spin; times are medians. Each row is written once it is measured, and a row in the file is
not measured again: remove the file to begin anew.
"""

import argparse
import importlib.util
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks"), str(ROOT / "tests")]

import torch  # noqa: E402 - these need the path
from bench import (  # noqa: E402
    BUNDLED,
    THEM,
    US,
    OperationTimes,
    autocast,
    both_models,
    forward,
    logits_of,
    machine,
    optimizer_of,
    random_batch,
    training_step,
)
from torch import Tensor, nn  # noqa: E402

from minipref.runtime import read_json, write_json, write_text  # noqa: E402

FIGURES = ROOT / "benchmarks" / "peers.json"
PAGE = ROOT / "benchmarks" / "peers.md"
BERT, ONNX, OPENVINO = "BERT, SDPA", "ONNX Runtime", "OpenVINO"
SHAPES = ((32, 128), (8, 512), (4, 1024), (2, 2048))
PROFILED = (("forward", 8, 512, "fp32"), ("forward", 2, 2048, "fp32"), ("forward", 2, 2048, "bf16"),
            ("training step", 8, 512, "bf16"))
LONGEST_STEP = 1024      # tokens: a training step of transformers with 2 rows of 2048 needs more than 24 GB
PAUSE = 0.1              # seconds between two contenders


class Bert(nn.Module):
    """transformers' BERT in minipref's sizes, called as `bench.logits_of` calls transformers' DeBERTa."""

    def __init__(self, config, longest: int):
        super().__init__()
        from transformers import BertConfig, BertForSequenceClassification
        sizes = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
        self.model = BertForSequenceClassification(BertConfig(
            **{name: getattr(config, name) for name in sizes}, max_position_embeddings=longest, num_labels=3,
            attn_implementation="sdpa"))

    def forward(self, input_ids: Tensor, attention_mask: Tensor):
        return self.model(input_ids=input_ids, attention_mask=attention_mask)


class Logits(nn.Module):
    """transformers' model with a plain tensor as its result, for an export."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.model(input_ids=input_ids, attention_mask=attention_mask).logits


def exported(model: nn.Module, ids: Tensor, attention_mask: Tensor, precision: str, threads: int, folder: str
             ) -> dict[str, Callable[[], Tensor]]:
    """transformers' model for one shape in ONNX Runtime (float32 only) and in OpenVINO, where these are installed."""
    found, inputs = {}, (ids, attention_mask.long())
    if precision == "fp32" and importlib.util.find_spec("onnxruntime") and importlib.util.find_spec("onnxscript"):
        import onnxruntime
        path = f"{folder}/{len(ids)}x{ids.shape[1]}.onnx"
        torch.onnx.export(Logits(model).eval(), inputs, path, input_names=["input_ids", "attention_mask"],
                          dynamo=True, verbose=False)
        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads = threads
        session = onnxruntime.InferenceSession(path, settings, providers=["CPUExecutionProvider"])
        feed = {"input_ids": inputs[0].numpy(), "attention_mask": inputs[1].numpy()}
        found[ONNX] = lambda: torch.from_numpy(session.run(None, feed)[0])
    if importlib.util.find_spec("openvino"):
        import openvino
        converted = openvino.convert_model(Logits(model).eval(), example_input=inputs)
        compiled = openvino.Core().compile_model(converted, "CPU", {
            "INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": "f32" if precision == "fp32" else "bf16"})
        found[OPENVINO] = lambda: torch.from_numpy(compiled([inputs[0].numpy(), inputs[1].numpy()])[0])
    return found


def take_turns(contenders: dict[str, Callable[[], object]], runs: int) -> dict[str, list[float]]:
    """Seconds of each contender's runs; one run of each before does not count."""
    seconds = {name: [] for name in contenders}
    for run in range(runs + 1):
        for name, function in contenders.items():
            time.sleep(PAUSE)
            begin = time.perf_counter()
            function()
            if run:
                seconds[name].append(round(time.perf_counter() - begin, 4))
    return seconds


def measure(options) -> dict:
    figures = {"machine": machine(options), "threads": torch.get_num_threads(), "rows": []}
    if options.figures.exists():
        before = read_json(options.figures, "figures of this benchmark")
        if before["machine"] == figures["machine"] and before["threads"] == figures["threads"]:
            figures = before
        else:
            print("the stored measurements are from another machine and are dropped", flush=True)
    measured = {(row["what"], row["batch"], row["length"], row["precision"]) for row in figures["rows"]}
    models = both_models(options)
    models[BERT] = Bert(models[US].config, max(length for _, length in options.shapes)).eval()
    optimizers = {name: optimizer_of(model) for name, model in models.items()}
    precisions = ["fp32", "bf16"] if machine(options)["bf16_products"] else ["fp32"]
    threads = torch.get_num_threads()
    for what, (batch, length), precision in product(options.only, options.shapes, precisions):   # training comes last:
        if (what, batch, length, precision) in measured:                                        # it changes weights
            continue
        ids, attention_mask = random_batch(batch, length, options)
        contenders = {name: partial(forward, model, ids, attention_mask, precision) if what == "forward" else
                      partial(training_step, model, optimizers[name], ids, attention_mask, precision)
                      for name, model in models.items()
                      if what == "forward" or name != THEM or length <= LONGEST_STEP}
        differences = {}
        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            if what == "forward":
                others = exported(models[THEM].eval(), ids, attention_mask, precision, threads, folder)
                expected = models[THEM](ids, attention_mask=attention_mask.long()).logits             # in float32
                with autocast("cpu", precision):
                    logits = {name: logits_of(models[name].eval(), ids, attention_mask) for name in (THEM, US)}
                logits |= {name: other() for name, other in others.items()}
                differences = {name: float((value - expected).abs().max()) for name, value in logits.items()}
                contenders |= others
            with torch.set_grad_enabled(what != "forward"):
                seconds = take_turns(contenders, options.runs)
        figures["rows"].append({"what": what, "batch": batch, "length": length, "precision": precision,
                                "seconds": seconds, "differences": differences})
        write_json(options.figures, figures)
        ours = statistics.median(seconds[US])
        ratios = (f"{name} {statistics.median(s) / ours:.2f}" for name, s in seconds.items() if name != US)
        print(f"{what} {batch} x {length} {precision}: {ours:.3f} s; {', '.join(ratios)}", flush=True)
    if "profile" not in figures:
        figures["profile"] = profile(models, optimizers, precisions, options)
        write_json(options.figures, figures)
    return figures


def profile(models: dict[str, nn.Module], optimizers: dict, precisions: list[str], options) -> list[dict]:
    """Milliseconds of each kind of operation in minipref and in BERT, for some tasks."""
    rows = []
    for what, batch, length, precision in PROFILED:
        if precision not in precisions or what not in options.only:
            continue
        inputs = random_batch(*(options.shapes[0] if options.small else (batch, length)), options)
        for name in (US, BERT):
            run = (partial(forward, models[name], *inputs, precision) if what == "forward" else
                   partial(training_step, models[name], optimizers[name], *inputs, precision))
            run()
            with OperationTimes(optimizers[name]) as instrument:
                run()
            rows.append({"what": what, "batch": batch, "length": length, "precision": precision, "name": name,
                         "milliseconds": {kind: round(1000 * s) for kind, s in instrument.seconds.items()}})
    return rows


def table(figures: dict) -> str:
    """The times of each peer, over minipref's: one cell has float32 and, where it was measured, bfloat16."""
    peers, cells = (THEM, BERT, ONNX, OPENVINO), {}
    for row in figures["rows"]:
        middle = {name: statistics.median(times) for name, times in row["seconds"].items()}
        found = cells.setdefault(f"{row['what']}, {row['batch']} x {row['length']}", {peer: [] for peer in peers})
        for peer in middle.keys() - {US}:
            found[peer].append(f"{middle[peer] / middle[US]:.2f}")
    lines = [f"| their time over minipref's | {' | '.join(peers)} |", "|---|" + "---:|" * len(peers)]
    lines += [f"| {what} | {' | '.join(', '.join(found[peer]) for peer in peers)} |" for what, found in cells.items()]
    short = [row for row in figures["rows"]
             if row["differences"] and row["length"] <= 512]             # beyond, transformers does not clamp
    worst = max(max(row["differences"].values()) for row in short if row["precision"] == "fp32")
    half = {name: max(row["differences"][name] for row in short if row["precision"] == "bf16")
            for row in short if row["precision"] == "bf16" for name in row["differences"]}
    accuracy = f"{worst:.0e} in float32"
    if half:
        accuracy += ", in bfloat16 " + ", ".join(f"{value:.0e} ({name})" for name, value in half.items())
    found = figures["machine"]
    return "\n".join([*lines, "", f"v3-small with random weights, {figures['threads']} threads of {found['cpu']} "
                      f"({found['instructions']}), torch {found['torch']}, transformers {found['transformers']}. "
                      f"First float32, then bfloat16. Largest difference of the logits from transformers' "
                      f"float32, up to 512 tokens: {accuracy}. `python benchmarks/peers.py --runs 3 --figures "
                      "mine.json`."])


def profile_page(figures: dict) -> str:
    """Where minipref and BERT spend their time, as a page."""
    kinds = ("matrix products", "fused attention", "softmax", "moving and adding", "AdamW")
    lines = [f"| milliseconds | | {' | '.join(kinds)} | other |", "|---|---|" + "---:|" * (len(kinds) + 1)]
    for row in figures["profile"]:
        times = [row["milliseconds"].get(kind, 0) for kind in kinds]
        cells = [f"{time:,}" if time else "" for time in (*times, sum(row["milliseconds"].values()) - sum(times))]
        lines.append(f"| {row['what']}, {row['batch']} x {row['length']}, {row['precision']} | {row['name']} | "
                        f"{' | '.join(cells)} |")
    found = figures["machine"]
    return "\n".join([
        "# Where minipref and BERT spend their time", "",
        "Milliseconds of one run, by kind of operation, written by `python benchmarks/peers.py` beside the times in "
        "[docs/benchmarks.md](../docs/benchmarks.md#beside-other-ways-to-run-it). The profile itself takes time.", "",
        *lines, "",
        f"{found['cpu']} ({found['instructions']}), {figures['threads']} threads, torch {found['torch']}.", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--runs", type=int, default=5, help="timed runs of everything")
    parser.add_argument("--figures", type=Path, default=FIGURES, metavar="JSON")
    parser.add_argument("--only", nargs="+", choices=("forward", "training step"), default=["forward", "training step"])
    parser.add_argument("--small", action="store_true", help="a toy model, for this script's test")
    options = parser.parse_args()
    options.device, options.tokenizer, options.lengths = "cpu", str(BUNDLED), (128, 512)
    options.shapes, options.sizes = SHAPES, {}
    if options.small:
        options.shapes, options.runs = ((2, 64),), 1
        options.sizes = {"vocab_size": 1000, "hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2,
                         "intermediate_size": 64}
    warnings.filterwarnings("ignore", module="torch.onnx|onnxscript|openvino|transformers")
    figures = measure(options)
    print(table(figures))
    print(profile_page(figures))
    if options.figures == FIGURES:
        write_text(PAGE, profile_page(figures))


if __name__ == "__main__":
    main()
