"""A training step beside busy programs: what OpenMP's wait policy costs, and what `minipref.threads` chooses.

    python benchmarks/neighbour.py      ten minutes on two cores; writes benchmarks/neighbour.json; then `make docs`

Each setting is a process of its own, since it has to be set before torch is loaded. The settings take turns. A
neighbour is a process that computes without a pause. Steps are those of the bundled encoder on 32 rows of 80 tokens.
"""

import argparse
import os
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from minipref.runtime import write_json  # noqa: E402 - this needs the path

FIGURES = ROOT / "benchmarks" / "neighbour.json"
SPINNING, SLEEPING, ONE, CHOSEN = "default", "OMP_WAIT_POLICY=PASSIVE", "one thread", "as minipref chooses"
SETTINGS = {SPINNING: {"GOMP_SPINCOUNT": "300000"}, SLEEPING: {"OMP_WAIT_POLICY": "PASSIVE"},
            ONE: {"OMP_NUM_THREADS": "1"}, CHOSEN: {}}
STEPS = """
import sys, time
sys.path.insert(0, {root!r})
import minipref.threads
import torch, torch.nn.functional as F
from minipref.checkpoint import load_classifier
from minipref.fast import accelerate
from minipref.optim import AdamW, decay_groups
torch.manual_seed(0)
model = accelerate(load_classifier({root!r} + "/weights/minipref-tiny")).train()
optimizer = AdamW(decay_groups(model, 0.01), lr=1e-5)
ids, mask, labels = torch.randint(5, 8000, (32, 80)), torch.ones(32, 80, dtype=torch.bool), torch.arange(32) % 3
for step in range({steps} + 2):
    if step == 2:
        began = time.perf_counter()
    optimizer.zero_grad(set_to_none=True)
    loss = F.cross_entropy(model(ids, mask), labels)
    loss.backward()
    optimizer.step()
print((time.perf_counter() - began) / {steps}, loss.item().hex())
"""


def measure(neighbours: int, rounds: int, steps: int) -> dict[str, list[float]]:
    """Seconds a step of each setting. Errors: SystemExit if settings other than one thread differ in loss."""
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(neighbours)]
    seconds, losses = {name: [] for name in SETTINGS}, {}
    try:
        for _ in range(rounds):
            for name, variables in SETTINGS.items():
                done = subprocess.run([sys.executable, "-c", STEPS.format(root=str(ROOT), steps=steps)], check=True,
                                      env=os.environ | variables, capture_output=True, text=True)
                time, losses[name] = float(done.stdout.split()[0]), done.stdout.split()[1]
                seconds[name].append(round(time, 4))
                print(f"{neighbours} neighbours, {name}: {time:.3f} s a step", flush=True)
    finally:
        for process in busy:
            process.kill()
            process.wait()
    if len({loss for name, loss in losses.items() if name != ONE}) > 1:
        raise SystemExit(f"the wait policy has changed a result: {losses}")
    return seconds


def table(figures: dict) -> str:
    lines = [f"| seconds per step | {' | '.join(SETTINGS)} |", "|---|" + "---:|" * len(SETTINGS)]
    for neighbours, seconds in figures["seconds"].items():
        lines.append(f"| {neighbours} busy neighbour{'' if neighbours == '1' else 's'} | "
                     + " | ".join(f"{statistics.median(seconds[name]):.2f} ({min(seconds[name]):.2f} to "
                                  f"{max(seconds[name]):.2f})" for name in SETTINGS) + " |")
    runs = len(next(iter(figures["seconds"].values()))[SPINNING])
    return "\n".join([*lines, "", f"Median (lowest to highest) of {runs} runs; the bundled encoder on 32 rows of 80 "
                      f"tokens; {figures['cores']} cores, {figures['cpu']}. `python benchmarks/neighbour.py "
                      f"--rounds {runs}`."])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--neighbours", type=int, nargs="+", default=[0, 1, os.cpu_count() or 1])
    parser.add_argument("--figures", type=Path, default=FIGURES, metavar="JSON")
    options = parser.parse_args()
    cpu = next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
                if line.startswith("model name")), "unknown processor")
    figures = {"cpu": cpu, "cores": os.cpu_count(),
               "seconds": {str(n): measure(n, options.rounds, options.steps) for n in options.neighbours}}
    write_json(options.figures, figures)
    print(table(figures))


if __name__ == "__main__":
    main()
