"""Speed and memory on a GPU beside transformers: forward, training step, and tokens a second of fine-tuning.

    python benchmarks/gpu_speed.py --output gpu.json --seconds 300       stops then, and keeps what it has
    python benchmarks/gpu_speed.py --device cpu --small --output x.json  the same without a GPU, as the tests run it

Contenders are the accelerated model, the plain one, the plain one under torch.compile, transformers' (eager), and the
kernels of FlashDeBERTa and disentangled-flash where these are installed. The most telling shapes come first. The JSON
file is written after each measurement; a Markdown table goes beside it.
"""

import argparse
import contextlib
import copy
import importlib.util
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks"), str(ROOT / "tests")]

import torch  # noqa: E402 - these need the path
from bench import THEM, US, logits_of, machine, plain_copy, random_batch  # noqa: E402
from gpu_check import PRECISIONS, seconds_and_peak, step_of  # noqa: E402
from helpers import reference_model, resized  # noqa: E402
from memory import GB, SIZES, markdown  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from minipref.config import EncoderConfig  # noqa: E402
from minipref.fast import accelerate  # noqa: E402
from minipref.model import PreferenceModel  # noqa: E402
from minipref.runtime import autocast, write_json, write_text  # noqa: E402

PLAIN, COMPILED, FLASH, DISENTANGLED = "plain", "plain, compiled", "FlashDeBERTa", "disentangled-flash"
LENGTHS = (512, 2048, 128, 1024)         # the most telling first: time may run out
TOKENS = 16_384                          # of a batch


def contenders(config: EncoderConfig, device: torch.device, compiled: bool
               ) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """The models with the same weights, and why one that is installed is not among them."""
    torch.manual_seed(0)
    ours, failed = PreferenceModel(config), {}
    found = {THEM: reference_model(ours), PLAIN: plain_copy(ours), US: accelerate(ours)}
    if compiled:
        found[COMPILED] = torch.compile(plain_copy(ours))
    for name, package, build in ((FLASH, "flashdeberta", flash_deberta),
                                 (DISENTANGLED, "disentangled_flash", disentangled_flash)):
        if device.type == "cuda" and importlib.util.find_spec(package):
            try:
                found[name] = build(found[THEM], device)
            except Exception as problem:     # other people's package, on a version of torch that it may not know
                failed[name] = f"{type(problem).__name__}: {problem}"[:300]
    return {name: model.to(device) for name, model in found.items()}, failed


def flash_deberta(reference: nn.Module, device: torch.device) -> nn.Module:
    from flashdeberta import FlashDebertaV2ForSequenceClassification
    model = FlashDebertaV2ForSequenceClassification(reference.config)
    model.load_state_dict(reference.state_dict())
    return model.to(device)


def disentangled_flash(reference: nn.Module, device: torch.device) -> nn.Module:
    from disentangled_flash import optimize_deberta
    model = copy.deepcopy(reference).to(device).eval()
    return optimize_deberta(model) or model


def forward(model: nn.Module, ids: Tensor, attention_mask: Tensor, precision: str) -> Tensor:
    with torch.no_grad(), autocast(ids.device, precision):
        return logits_of(model.eval(), ids, attention_mask)


def measure_shape(models: dict[str, nn.Module], batch: int, length: int, precision: str, what: str, options
                  ) -> dict[str, dict]:
    """Milliseconds and peak memory of each contender, or why it has none."""
    device, found = torch.device(options.device), {}
    ids, attention_mask = random_batch(batch, length, options)
    labels = torch.arange(batch, device=device) % 3
    for name, model in models.items():
        run: Callable[[], object]
        if what == "forward":
            run = partial(forward, model, ids, attention_mask, precision)
        elif name in (FLASH, DISENTANGLED):
            continue
        else:
            run = step_of(model, partial(logits_of, model, ids, attention_mask), labels, precision)
        try:
            run()                                              # compiles what has to be compiled
            seconds, peak = seconds_and_peak(run, device, options.steps)
            found[name] = {"ms": round(1000 * seconds, 3), "peak_gb": round(peak / GB, 3)}
        except Exception as problem:                           # out of memory, or a kernel that this card cannot run
            found[name] = {"failed": f"{type(problem).__name__}: {problem}"[:300]}
        model.zero_grad(set_to_none=True)
        del run
        if device.type == "cuda":
            torch.cuda.empty_cache()
    if what == "forward" and "ms" in found.get(US, {}):
        theirs = forward(models[THEM], ids, attention_mask, "fp32")
        for name, model in models.items():
            if "ms" in found[name]:
                with contextlib.suppress(RuntimeError):
                    difference = (forward(model, ids, attention_mask, precision).float() - theirs).abs().max()
                    found[name]["difference"] = float(difference)
    return found


def fine_tuning(name: str, config: EncoderConfig, precision: str, options) -> dict:
    """Tokens a second of whole training steps of 16 rows of 512 tokens, embeddings and AdamW included."""
    device = torch.device(options.device)
    ids, attention_mask = random_batch(options.batch, options.longest, options)
    model = accelerate(PreferenceModel(config)).to(device)
    step = step_of(model, lambda: model(ids, attention_mask), torch.arange(len(ids), device=device) % 3, precision)
    seconds, peak = seconds_and_peak(step, device, options.steps)
    return {"what": "fine-tuning", "encoder": name, "precision": precision, "batch": len(ids), "length": ids.shape[1],
            "tokens_per_second": round(ids.numel() / seconds), "peak_gb": round(peak / GB, 3)}


def tables(figures: dict) -> str:
    columns = (US, PLAIN, COMPILED, THEM, FLASH, DISENTANGLED)
    rows = [["ms", *columns, f"{THEM} / {US}"], ["---"] * (len(columns) + 2)]
    for row in figures["shapes"]:
        cells = [f"{row['times'][name]['ms']:.1f}" if "ms" in row["times"].get(name, {}) else "" for name in columns]
        both = [row["times"][name].get("ms") for name in (THEM, US)]
        rows.append([f"{row['what']}, {row['batch']} x {row['length']}, {row['precision']}", *cells,
                     f"{both[0] / both[1]:.2f}" if all(both) else ""])
    tuned = [["fine-tuning", "precision", "tokens a second", "peak GB"], ["---"] * 4]
    tuned += [[row["encoder"], row["precision"], f"{row['tokens_per_second']:,}", f"{row['peak_gb']:.2f}"]
              for row in figures["fine_tuning"]]
    notes = "".join(f"\n{name}: {reason}\n" for name, reason in figures["failed"].items())
    where = figures["machine"]
    return (f"{where['gpu'] or where['cpu']}, torch {where['torch']}, transformers {where['transformers']}, "
            f"{figures['date']}.\n\n{markdown(rows)}\n\n{markdown(tuned)}\n{notes}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--output", type=Path, required=True, metavar="JSON")
    parser.add_argument("--seconds", type=float, default=300, help="start nothing after this many seconds")
    parser.add_argument("--small", action="store_true", help="a toy model, for this script's test")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("this machine, or this build of torch, has no CUDA; --device cpu --small runs the same code")
    began = time.monotonic()
    options.steps, options.batch, options.longest, options.sizes = 10, 16, 512, {}
    sizes, lengths, tokens, precisions = SIZES, LENGTHS, TOKENS, ("bf16", "fp16", "fp32")
    if options.small:
        toy = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 128}
        sizes = {"v3-small": resized(SIZES["v3-small"], vocab_size=1000, **toy)}
        options.sizes, options.steps, options.batch, options.longest = {"vocab_size": 1000}, 1, 2, 32
        lengths, tokens, precisions = (32,), 64, PRECISIONS[:1]
    figures = {"machine": machine(options), "date": time.strftime("%Y-%m-%d"), "shapes": [], "fine_tuning": [],
               "failed": {}}

    def keep() -> None:
        write_json(options.output, figures)
        write_text(options.output.with_suffix(".md"), tables(figures))

    models, figures["failed"] = contenders(sizes["v3-small"], torch.device(options.device), compiled=not options.small)
    for precision in precisions:
        for length in lengths:
            for what in ("forward", "training step"):
                if time.monotonic() - began > options.seconds:
                    break
                some = models if length == lengths[0] or COMPILED not in models else {
                    name: model for name, model in models.items() if name != COMPILED}     # it compiles for each shape
                times = measure_shape(some, tokens // length, length, precision, what, options)
                figures["shapes"].append({"what": what, "batch": tokens // length, "length": length,
                                          "precision": precision, "times": times})
                print(figures["shapes"][-1], flush=True)
                keep()
    del models
    for name, config in sizes.items():
        for precision in precisions[:1]:
            if time.monotonic() - began < options.seconds + 30 and name != "v3-large":
                figures["fine_tuning"].append(fine_tuning(name, config, precision, options))
                print(figures["fine_tuning"][-1], flush=True)
                keep()
    return 0


if __name__ == "__main__":
    sys.exit(main())
