"""Compare speed, memory and start-up of minipref and transformers, with the same weights on the same rows.

    make bench                                            all sections, and peers.py: two hours on two cores
    python benchmarks/bench.py --only forward training    some sections; the others keep their measurements
    python benchmarks/bench.py --rows train.csv --tokenizer weights/deberta-v3-small      also predict these rows
    python benchmarks/bench.py --page                     write the page again without measuring

Both libraries run in one process and alternate, so that other load on the machine affects both. Times are medians. Peak
memory and start-up are measured in separate processes. Measurements are stored in benchmarks/performance.json;
benchmarks/performance.md, and the tables between the speed marks of docs/benchmarks.md and README.md, are written from
that file. With `--device cuda` the sections run on a GPU.
"""

import argparse
import contextlib
import copy
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks"), str(ROOT / "tests")]

import numpy as np  # noqa: E402 - these need the path
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from performance_page import write_page  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

from minipref.runtime import write_json  # noqa: E402

BUNDLED = ROOT / "weights" / "minipref-tiny"
FIGURES = ROOT / "benchmarks" / "performance.json"
US, THEM = "minipref", "transformers"
LENGTHS = (64, 128, 256, 512, 1024, 2048, 4096)
TOKENS = 4096            # of a batch, for all lengths
MAX_LENGTH = 512         # tokens of a pair in prediction


# --- the two libraries ------------------------------------------------------------------------------------------------

def both_models(options) -> dict[str, nn.Module]:
    """A random v3-small, and transformers' model with the same weights. Errors: SystemExit if their logits differ."""
    from helpers import reference_model

    from minipref.config import EncoderConfig
    from minipref.fast import accelerate
    from minipref.model import PreferenceModel, init_weights
    torch.manual_seed(0)
    ours = PreferenceModel(EncoderConfig(**options.sizes)).eval()
    init_weights(ours, ours.config.initializer_range)
    models = {THEM: reference_model(ours), US: accelerate(ours)}
    ids, attention_mask = random_batch(2, min(options.lengths), options, device="cpu")
    logits = [logits_of(model, ids, attention_mask).detach() for model in models.values()]
    if (logits[0] - logits[1]).abs().max() > 1e-5:
        raise SystemExit("the logits of the two libraries differ: see `make parity`")
    return {name: model.to(options.device) for name, model in models.items()}


def random_batch(batch: int, length: int, options, device: str = "") -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, options.sizes.get("vocab_size", 128_000), (batch, length), generator=generator)
    attention_mask = torch.ones(batch, length, dtype=torch.bool)
    return ids.to(device or options.device), attention_mask.to(device or options.device)


def logits_of(model: nn.Module, ids: Tensor, attention_mask: Tensor) -> Tensor:
    """The logits (B, 3) of a model of either library."""
    out = model(ids, attention_mask) if is_ours(model) else model(input_ids=ids, attention_mask=attention_mask.long())
    return out if is_ours(model) else out.logits


def is_ours(model: nn.Module) -> bool:
    return hasattr(model, "classify")


def autocast(device: str, precision: str):
    return torch.autocast(device, torch.bfloat16) if precision == "bf16" else contextlib.nullcontext()


def forward(model: nn.Module, ids: Tensor, attention_mask: Tensor, precision: str) -> None:
    model.eval()
    with torch.no_grad(), autocast(ids.device.type, precision):
        logits_of(model, ids, attention_mask)


def training_step(model: nn.Module, optimizer, ids: Tensor, attention_mask: Tensor, precision: str) -> None:
    """Forward, backward and AdamW, with v3-small's dropout."""
    model.train()
    labels = torch.arange(len(ids), device=ids.device) % 3
    with autocast(ids.device.type, precision):
        logits = logits_of(model, ids, attention_mask)
    F.cross_entropy(logits.float(), labels).backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    """minipref's AdamW, or the default of transformers' Trainer."""
    if is_ours(model):
        from minipref.optim import AdamW
        return AdamW(model.parameters(), lr=1e-5)
    return torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)


# --- times ------------------------------------------------------------------------------------------------------------

def alternated(contenders: dict[str, Callable[[], object]], runs: int, device: str, warm_up: bool = True
               ) -> dict[str, list[float]]:
    """Seconds of each contender's runs, alternating; with `warm_up` the first run of each is not counted."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    seconds = {name: [] for name in contenders}
    for run in range(0 if warm_up else 1, runs + 1):
        for name, function in contenders.items():
            wait()
            begin = time.perf_counter()
            function()
            wait()
            if run > 0:
                seconds[name].append(round(time.perf_counter() - begin, 5))
    return seconds


def announce(what: str, seconds: dict[str, list[float]]) -> None:
    middle = {name: statistics.median(times) for name, times in seconds.items()}
    ratio = f"{middle[THEM] / middle[US]:.2f} times: " if THEM in middle else ""
    print(f"{what:<44}{ratio}{', '.join(f'{name} {value:.3f} s' for name, value in middle.items())}", flush=True)


def product_rates(options) -> list[dict]:
    """The machine's GEMM throughput at the feed-forward's shape, the upper limit for all other measurements."""
    rows = []
    for threads in options.threads:
        torch.set_num_threads(threads)
        for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
            x, weight = (torch.randn(n, 768, device=options.device, dtype=dtype) for n in (TOKENS, 3072))
            contender = {US: lambda x=x, weight=weight: F.linear(x, weight)}
            seconds = statistics.median(alternated(contender, 5 * options.runs, options.device)[US])
            rows.append({"threads": threads, "precision": precision,
                         "gflops": round(2 * TOKENS * 768 * 3072 / seconds / 1e9)})
            print(f"products {precision}, {threads} threads: {rows[-1]['gflops']:,} GFLOP/s", flush=True)
    return rows


def forward_times(options) -> list[dict]:
    rows, models = [], both_models(options)
    for threads in options.threads:
        torch.set_num_threads(threads)
        for length in options.lengths if threads == options.threads[0] else (MAX_LENGTH,):
            batch = random_batch(options.tokens // length, length, options)
            for precision in ("fp32", "bf16"):
                compiled = options.compile and (threads, length, precision) == (options.threads[0], MAX_LENGTH, "fp32")
                contenders = {name: partial(forward, model, *batch, precision)
                              for name, model in with_compiled(models, compiled)}
                seconds = alternated(contenders, options.runs, options.device)
                rows.append({"batch": len(batch[0]), "length": length, "precision": precision, "threads": threads,
                             "seconds": seconds})
                announce(f"forward {len(batch[0])} x {length} {precision}, {threads} threads", seconds)
    return rows


def with_compiled(models: dict[str, nn.Module], compiled: bool) -> Iterator[tuple[str, nn.Module]]:
    """The models and, if `compiled` and there is a C++ compiler, each with torch.compile.

    For minipref the plain model is compiled, as in train.py --compile.
    """
    yield from models.items()
    if compiled and (shutil.which("c++") or shutil.which("g++")):
        for name, model in models.items():
            yield f"{name}, compiled", torch.compile(plain_copy(model) if is_ours(model) else model)


def plain_copy(model: nn.Module) -> nn.Module:
    """A plain model with the weights of an accelerated one."""
    from minipref.model import PreferenceModel
    plain = PreferenceModel(model.config).to(next(model.parameters()).device)
    plain.load_state_dict(model.state_dict())
    return plain


def training_times(options) -> list[dict]:
    """Complete training steps of both, and of minipref with options of train.py that trade time for memory."""
    from minipref.fast import checkpoint_activations
    models = both_models(options)
    variants = models | {"--checkpoint-activations": copy.deepcopy(models[US])}
    checkpoint_activations(variants["--checkpoint-activations"])
    for _, compiled in list(with_compiled({US: models[US]}, options.compile))[1:]:
        variants["--compile"] = compiled
    optimizers = {name: optimizer_of(model) for name, model in variants.items()}
    rows = []

    def step(name: str, batch: tuple, precision: str, freeze: bool = False) -> None:
        variants[US].encoder.word_embeddings.weight.requires_grad_(not freeze)
        training_step(variants[name], optimizers[name], *batch, precision)

    torch.set_num_threads(options.threads[0])
    for length in (128, 512):
        batch = random_batch(options.tokens // length, length, options)
        for precision in ("fp32", "bf16"):
            contenders = {name: partial(step, name, batch, precision) for name in models}
            if length == MAX_LENGTH:
                contenders["--freeze-embeddings"] = partial(step, US, batch, precision, freeze=True)
                contenders |= {name: partial(step, name, batch, precision) for name in variants.keys() - models.keys()}
            seconds = alternated(contenders, options.runs, options.device)
            rows.append({"batch": len(batch[0]), "length": length, "precision": precision,
                         "threads": options.threads[0], "seconds": seconds})
            announce(f"training step {len(batch[0])} x {length} {precision}", seconds)
    return rows


# --- rows of a file, end to end ---------------------------------------------------------------------------------------

def prediction_times(options) -> list[dict]:
    """From texts to probabilities, in one order: `Judge.compare_many` against transformers in typical use.

    Typical use: batches of 32 rows in the file's order, padded to the longest, float32. Both use the same tokenizer and
    truncation, so both models get the same sequences.
    """
    from minipref.data import collate, encode_pairs, read_pairs
    from minipref.predictor import Judge
    from minipref.tokenizer import load_tokenizer
    torch.set_num_threads(options.threads[0])
    models, tokenizer = both_models(options), load_tokenizer(options.tokenizer)
    judges = {kind: Judge(models[US], tokenizer, MAX_LENGTH, precision=kind) for kind in ("fp32", "bf16")}

    def usual(pairs: list) -> np.ndarray:
        examples, found = encode_pairs(pairs, tokenizer, MAX_LENGTH), []
        for begin in range(0, len(examples), 32):
            rows = range(begin, min(begin + 32, len(examples)))
            ids, attention_mask, _ = collate(examples, rows, [False] * len(rows), tokenizer)
            with torch.no_grad():
                logits = logits_of(models[THEM], ids.to(options.device), attention_mask.to(options.device))
                found.append(logits.softmax(-1))
        return torch.cat(found).cpu().numpy()

    rows = []
    for path in options.rows:
        pairs = list(read_pairs(path, labels="if present"))[:options.limit]
        lengths = encode_pairs(pairs, tokenizer, MAX_LENGTH).lengths
        outputs = {}

        def keep(name: str, function: Callable, outputs: dict = outputs) -> None:
            outputs[name] = function()

        judge = {kind: partial(judges[kind].compare_many, pairs, swap_average=False) for kind in judges}
        contenders = {US: partial(keep, US, judge["fp32"]), f"{US}, bf16": partial(keep, f"{US}, bf16", judge["bf16"]),
                      THEM: partial(keep, THEM, partial(usual, pairs))}
        seconds = alternated(contenders, max(1, options.runs // 3), options.device, warm_up=False)
        differences = {name: float(abs(found - outputs[THEM]).max()) for name, found in outputs.items() if name != THEM}
        rows.append({"file": Path(path).name, "rows": len(pairs), "mean_tokens": round(float(lengths.mean())),
                     "longest_tokens": int(lengths.max()), "threads": options.threads[0], "seconds": seconds,
                     "largest_difference": differences})
        announce(f"prediction of {len(pairs):,} rows of {Path(path).name}", seconds)
    return rows


# --- in separate processes --------------------------------------------------------------------------------------------

MEMORY = (("forward", 8, 512, "fp32"), ("forward", 8, 512, "bf16"), ("forward", 2, 2048, "fp32"),
          ("training", 8, 512, "fp32"), ("training", 8, 512, "bf16"))


def peak_memory(options) -> list[dict]:
    """Peak memory of a process that loads the model and runs three forward passes or training steps."""
    rows = []
    with saved_model(options) as folder:
        for task, batch, length, precision in MEMORY:
            bytes_of = {}
            for name in (US, THEM):
                arguments = {"name": name, "folder": folder, "task": task, "precision": precision, "batch": batch,
                             "length": length if not options.sizes else 64, "threads": options.threads[0],
                             "device": options.device}
                bytes_of[name] = int(child("--in-own-process", json.dumps(arguments)))
            rows.append({"task": task, "batch": batch, "length": length, "precision": precision, "bytes": bytes_of})
            print(f"memory {task} {batch} x {length} {precision:<24} {bytes_of[US] / bytes_of[THEM]:.2f} of theirs: "
                  f"{', '.join(f'{name} {value / 2**30:.2f} GB' for name, value in bytes_of.items())}", flush=True)
    return rows


def in_own_process(arguments: dict) -> int:
    """Run the task; return the process's peak resident memory in bytes (on a GPU, the allocator's peak)."""
    torch.set_num_threads(arguments["threads"])
    device = arguments["device"]
    if arguments["name"] == US:
        from minipref import accelerate, load_classifier
        from minipref.fast import tune_malloc
        tune_malloc()                            # as train.py does
        model = accelerate(load_classifier(arguments["folder"], device=device))
    else:
        from transformers import AutoModelForSequenceClassification
        model = AutoModelForSequenceClassification.from_pretrained(arguments["folder"], dtype=torch.float32).to(device)
    ids = torch.randint(5, model.config.vocab_size, (arguments["batch"], arguments["length"]), device=device)
    attention_mask = torch.ones_like(ids, dtype=torch.bool)
    optimizer = optimizer_of(model)
    for _ in range(3):
        if arguments["task"] == "training":
            training_step(model, optimizer, ids, attention_mask, arguments["precision"])
        else:
            forward(model, ids, attention_mask, arguments["precision"])
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return 1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))


START = {
    US: ("import minipref; judge = minipref.load_judge({folder!r}); judge.compare('Hello?', 'Hello!', 'Bye.')"),
    THEM: ("from transformers import AutoModelForSequenceClassification, AutoTokenizer; import torch; "
           "model = AutoModelForSequenceClassification.from_pretrained({folder!r}, dtype=torch.float32); "
           "tokenizer = AutoTokenizer.from_pretrained({folder!r}); "
           "model(**tokenizer('Hello? Hello! Bye.', return_tensors='pt'))"),
    f"{US}, import alone": "import minipref",
    f"{THEM}, import alone": "from transformers import AutoModelForSequenceClassification, AutoTokenizer",
}


def start_up(options) -> list[dict]:
    """Time to the first prediction: interpreter, imports, weights, tokenizer and one pair."""
    with saved_model(options) as folder:
        contenders = {name: partial(subprocess.run, [sys.executable, "-c", code.format(folder=folder)], cwd=ROOT,
                                    check=True) for name, code in START.items()}
        seconds = alternated(contenders, options.runs, "cpu")
    announce("start-up", seconds)
    return [{"seconds": seconds}]


@contextlib.contextmanager
def saved_model(options) -> Iterator[str]:
    """A folder with a random model and the bundled tokenizer (for an spm.model transformers needs another package)."""
    from minipref.predictor import Judge
    from minipref.tokenizer import load_tokenizer
    with tempfile.TemporaryDirectory() as folder:
        Judge(both_models(options)[US], load_tokenizer(BUNDLED), MAX_LENGTH).save(folder)
        yield folder


def child(*arguments: str) -> str:
    """The output of this script with other arguments."""
    command = [sys.executable, str(Path(__file__).resolve()), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


# --- where the time goes ----------------------------------------------------------------------------------------------

PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "baddbmm_")
KINDS = {"softmax": "softmax", "gelu": "GELU", "layer_norm": "LayerNorm", "bernoulli": "random numbers",
         "gather": "gathering", "scatter": "gathering", "scaled_dot_product": "fused attention"}


class OperationTimes(TorchDispatchMode):
    """The seconds of all torch operations in the block, by kind, and the operations of the matrix products."""

    def __init__(self, optimizer: torch.optim.Optimizer):
        super().__init__()
        self.seconds, self.operations, self.in_optimizer = defaultdict(float), 0, False
        optimizer.register_step_pre_hook(lambda *_: setattr(self, "in_optimizer", True))
        optimizer.register_step_post_hook(lambda *_: setattr(self, "in_optimizer", False))

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        begin = time.perf_counter()
        result = function(*args, **(kwargs or {}))
        self.seconds[self.kind(function.overloadpacket.__name__)] += time.perf_counter() - begin
        if function.overloadpacket.__name__ in PRODUCTS:
            *_, left, right = [x for x in args if isinstance(x, Tensor)]
            self.operations += 2 * left.numel() * right.shape[-1]
        return result

    def kind(self, name: str) -> str:
        if self.in_optimizer:
            return "AdamW"
        if name in PRODUCTS:
            return "matrix products"
        return next((kind for part, kind in KINDS.items() if part in name), "moving and adding")


def profiles(options) -> list[dict]:
    """For some tasks, the time of each kind of operation and the GEMM throughput reached.

    The rest of the time is Python, random numbers and waiting. The total is measured without the instrumentation,
    which itself takes time.
    """
    torch.set_num_threads(options.threads[0])
    rows = []
    for name, model in both_models(options).items():
        optimizer = optimizer_of(model)
        for task, count, length in (("forward", 8, 512), ("training", 8, 512), ("forward", 32, 128)):
            batch = random_batch(count, length if not options.sizes else 64, options)
            for precision in ("fp32", "bf16"):
                run = (partial(forward, model, *batch, precision) if task == "forward" else
                       partial(training_step, model, optimizer, *batch, precision))
                whole = statistics.median(alternated({name: run}, options.runs, options.device)[name])
                with OperationTimes(optimizer) as instrument:
                    run()
                rows.append({"name": name, "task": task, "batch": count, "length": length, "precision": precision,
                             "threads": options.threads[0], "seconds": whole,
                             "gflop": round(instrument.operations / 1e9, 1),
                             "by_kind": {kind: round(s, 4) for kind, s in instrument.seconds.items()}})
                print(f"profile {name} {task} {count} x {length} {precision}: {whole:.3f} s, "
                      f"{instrument.operations / whole / 1e9:,.0f} GFLOP/s in products", flush=True)
    return rows


# --- the command ------------------------------------------------------------------------------------------------------

SECTIONS = {"rates": product_rates, "forward": forward_times, "training": training_times,
            "prediction": prediction_times, "memory": peak_memory, "start-up": start_up, "profiles": profiles}


def machine(options) -> dict:
    """The hardware and software of the measurements."""
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), cpu)
    import transformers
    return {"cpu": cpu, "cores": os.cpu_count(), "instructions": torch.backends.cpu.get_cpu_capability(),
            "bf16_products": torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported(),
            "gpu": torch.cuda.get_device_name() if options.device == "cuda" else None, "system": platform.system(),
            "python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="the sections to measure")
    add("--runs", type=int, default=5, help="number of timed runs")
    add("--threads", type=int, nargs="+", default=sorted({1, os.cpu_count() or 1}, reverse=True))
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--rows", nargs="*", default=[], metavar="CSV", help="files of pairs to predict end to end")
    add("--limit", type=int, metavar="N", help="only the first N rows of each file")
    add("--tokenizer", default=str(BUNDLED), metavar="DIR")
    add("--figures", type=Path, default=FIGURES, metavar="JSON")
    add("--page", action="store_true", help="only write the page from the stored measurements")
    add("--tiny", action="store_true", help="use a toy model, to test this script")
    add("--in-own-process", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.lengths, options.tokens, options.sizes, options.compile = LENGTHS, TOKENS, {}, not options.tiny
    if options.tiny:
        options.sizes = {"vocab_size": 128_100, "hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2,
                         "intermediate_size": 64}
        options.lengths, options.tokens = (128, 512), 1024
    return options


def main() -> None:
    options = parse_arguments()
    if options.in_own_process:
        print(in_own_process(options.in_own_process))
        return
    figures = json.loads(options.figures.read_text(encoding="utf-8")) if options.figures.exists() else {}
    if not options.page:
        if figures.get("machine", machine(options)) != machine(options):
            print("the stored measurements are from another machine and are dropped", flush=True)
            figures = {}
        figures["machine"] = machine(options)
        for name in options.only:
            if name != "prediction" or options.rows:
                figures[name] = SECTIONS[name](options)
                write_json(options.figures, figures)
    if options.figures == FIGURES:
        write_page(figures)


if __name__ == "__main__":
    main()
