"""Kill a training run with SIGKILL many times, resume it each time, and compare the result with an uninterrupted run.

    make kill                        some 300 kills, minutes; writes the results into docs/reliability.md
    python tests/killing.py --small  the smaller number that tests/test_reliability.py runs

There are three ways of killing, all by SIGKILL, which no program can catch:
- *at a chosen event*: a run is killed there once and resumed to its end. An event is a call that matters to the
  files on disk or to the random generators: a file half written, flushed, moved; a micro-batch; AdamW in the middle of
  its parameters; a batch of an evaluation.
- *at random events*: one run is killed at random events, ten times or more, before it may end.
- *at a random time*: a run is killed after a random time. Half of these are separate processes (`python train.py`), so
  start-up and imports are killed too.

Every run must end with the same bytes as an uninterrupted one: weights, metrics.csv, submission, and the state with its
moments and generators. For speed, a process that has imported everything forks a child for each attempt. It computes
nothing itself, so that the children start without threads.
"""

import argparse
import contextlib
import filecmp
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):        # before the import of torch: a forked child has one thread
    os.environ[name] = "1"
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402 - these need the path
import torch._dynamo  # noqa: E402 - building a module on the meta device imports it: once here, not in each child
from small import write_encoder, write_rows  # noqa: E402

import minipref.checkpoint  # noqa: E402
import minipref.predictor  # noqa: E402
import predict  # noqa: E402
import train  # noqa: E402
from minipref.optim import AdamW  # noqa: E402
from minipref.run import state  # noqa: E402
from minipref.runtime import TEMPORARY, write_text  # noqa: E402

PAGE = ROOT / "docs" / "reliability.md"
BEGIN, END = "<!-- written by make kill -->", "<!-- to here -->"
SAME = ("metrics.csv", "valid_predictions.csv", "submission.csv", "model/model.safetensors", "model/minipref.json")

BASE = ["--train", "train.csv", "--encoder", "encoder", "--recipe", "tiny", "--precision", "fp32", "--lr", "3e-3",
        "--batch-size", "4", "--accumulate", "2", "--max-length", "32"]
FIFTH = ["--valid-fraction", "0.2"]
SETTINGS = {
    "a state after each step": [*BASE, *FIFTH, "--epochs", "2", "--evals-per-epoch", "2", "--patience", "0",
                                "--save-every", "0"],
    "a state after each evaluation, early stop": [*BASE, *FIFTH, "--epochs", "6", "--evals-per-epoch", "1",
                                                  "--patience", "1", "--lr", "3e-2"],
    "two folds": [*BASE, "--epochs", "1", "--folds", "2", "--evals-per-epoch", "2", "--save-every", "0"],
}
LONG = [*BASE, *FIFTH, "--epochs", "150", "--evals-per-epoch", "1", "--patience", "0", "--save-every", "0.002"]


# Functions of train.py and the names of their phases.
PARTS = {"load_state": "resuming", "fit": "the training loop",
         "predict_logits": "an evaluation", "record_evaluation": "an evaluation", "save_state": "saving a state",
         "save_best": "writing model/, best so far", "final_report": "writing model/ and the report, at the end"}
WRITING = HALF_WRITTEN, BEFORE_FLUSH, BEFORE_MOVE, AFTER_MOVE = ("tensors half written", "before a flush",
                                                                 "before a file is moved", "after a file is moved")

# --- a sitting: one process that works on a run until it ends or is killed --------------------------------------------

class Watch:
    """Counts a sitting's events, reports each to the parent, and kills the process at the chosen one.

    An event's name is "part: moment", the phase of the run and the event in it.
    """

    def __init__(self, pipe: int, die_at: int | None):
        self.pipe, self.die_at, self.events, self.part = pipe, die_at, 0, "start-up"

    def here(self, moment: str, before_death=lambda: None) -> None:
        self.events += 1
        os.write(self.pipe, f"{self.part}: {moment}\n".encode())
        if self.events == self.die_at:
            before_death()
            os.kill(os.getpid(), signal.SIGKILL)

    def around(self, module, name: str, part: str = "", before: str = "", after: str = "") -> None:
        """Name the phase in which a function of `module` runs, with events at its beginning and its end."""
        real = getattr(module, name)

        def watched(*args, **kwargs):
            outer, self.part = self.part, part or self.part
            if before:
                self.here(before)
            value = real(*args, **kwargs)
            if after:
                self.here(after)
            self.part = outer
            return value
        setattr(module, name, watched)

    def install(self) -> None:
        """Insert an event at every place where a kill could matter."""
        self._inside_a_step()
        self._inside_a_write()
        self.around(train, "clip_gradients", before="after backward", after="gradients clipped, AdamW not begun")
        self.around(train, "record_evaluation", before="predicted, not scored", after="recorded, not saved")
        self.around(minipref.predictor, "collate", before="before a batch")
        for name, part in PARTS.items():
            self.around(train, name, part)
        self.around(predict, "predict_file", "the submission")
        for module in (state, minipref.checkpoint):
            self._half_written(module)

    def _inside_a_step(self) -> None:
        """Events between micro-batches, in the middle of AdamW, and before and after the step is counted.

        A step of the loop in `train.fit` begins with `learning_rates` and ends with `log_eta`.
        """
        calls, real_lr, real_eta = Counter(), train.learning_rates, train.log.log_eta
        real_batch, real_update, real_scaler = train.collate, AdamW._update, torch.amp.GradScaler.update

        def learning_rates(*args):
            calls.clear()
            self.part = "a step"
            return real_lr(*args)

        def scaler_update(*args):
            real_scaler(*args)
            self.here("taken, not counted")

        def log_eta(*args):
            real_eta(*args)
            self.here("counted, not saved")
            self.part = PARTS["fit"]

        def collate(*args):
            calls["batch"] += 1
            self.here("begun" if calls["batch"] == 1 else "one micro-batch accumulated, one to come")
            return real_batch(*args)

        def update(*args):
            calls["update"] += 1
            if calls["update"] == 7:
                self.here("AdamW has moved six parameters and not the others")
            return real_update(*args)

        train.learning_rates, train.log.log_eta = learning_rates, log_eta
        train.collate, AdamW._update, torch.amp.GradScaler.update = collate, update, scaler_update

    def _inside_a_write(self) -> None:
        """Events before each flush, and before and after each rename."""
        real_replace, real_fsync = os.replace, os.fsync

        def replace(source, target):
            self.here(BEFORE_MOVE)
            real_replace(source, target)
            self.here(AFTER_MOVE)

        def fsync(descriptor):
            self.here(BEFORE_FLUSH)
            real_fsync(descriptor)

        os.replace, os.fsync = replace, fsync

    def _half_written(self, module) -> None:
        """A kill while safetensors is writing, after half of the file."""
        real = module.save_file

        def save_file(tensors, path, *args, **kwargs):
            real(tensors, path, *args, **kwargs)
            self.here(HALF_WRITTEN, lambda: os.truncate(path, Path(path).stat().st_size // 2))
        module.save_file = save_file


@dataclass
class Sitting:
    """The exit code of a process (-9 if it was killed) and the names of its events in order."""

    code: int
    events: list[str]


def sit(folder: Path, arguments: list[str], die_at: int | None = None, seconds: float | None = None) -> Sitting:
    """Begin or resume the run in `folder`/run, in a child process that is killed at an event or after some seconds."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.close(reading)
        try:
            os.chdir(folder)
            with open("said.txt", "a") as said, contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
                watch = Watch(writing, die_at)
                watch.install()
                code = work(arguments)
        except BaseException as problem:
            os.write(writing, f"{type(problem).__name__}: {problem}\n".encode())
            code = 99
        os._exit(code)
    os.close(writing)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    with open(reading, encoding="utf-8") as pipe:
        events = pipe.read().splitlines()
    _, status = os.waitpid(child, 0)
    return Sitting(os.waitstatus_to_exitcode(status), events)


def command_for(arguments: list[str]) -> list[str]:
    """The command that begins the run, or resumes it if it has a config.json."""
    return ["--resume", "--run", "run"] if Path("run/config.json").exists() else [*arguments, "--run", "run"]


def work(arguments: list[str]) -> int:
    """What a user does after a crash: the same command, with --resume if the run has begun; then predict."""
    code = train.main(command_for(arguments))
    models = [str(path) for path in (*Path("run").glob("model"), *sorted(Path("run").glob("fold-*/model")))]
    return code or predict.main(["test.csv", "--model", *models, "--precision", "fp32",
                                 "--output", "run/submission.csv"])


# --- what must be equal -----------------------------------------------------------------------------------------------

def differences(found: Path, wanted: Path) -> list[str]:
    """Files of a run's folder that differ from the uninterrupted run, and temporary files."""
    wrong = []
    for file in sorted(wanted.rglob("*")):
        name = str(file.relative_to(wanted))
        if name.endswith(SAME) and not ((found / name).is_file() and filecmp.cmp(found / name, file, shallow=False)):
            wrong.append(name)
        if file.name == state.CURRENT and not same_state(found / name, file):
            wrong.append(name)
    return wrong + [str(file.relative_to(found)) for file in sorted(found.rglob("*"))
                    if file.name.startswith((TEMPORARY, ".tmp"))]


def same_state(found: Path, wanted: Path) -> bool:
    """Whether tensors and facts are equal, without times."""
    (tensors, facts), (wanted_tensors, wanted_facts) = (state.read_state(path.parent) for path in (found, wanted))
    for progress in (facts["state"], wanted_facts["state"]):
        del progress["seconds"], progress["timing"]
    return (facts == wanted_facts and tensors.keys() == wanted_tensors.keys()
            and all(torch.equal(tensors[name], wanted_tensors[name]) for name in tensors))


# --- the kills --------------------------------------------------------------------------------------------------------

@dataclass
class Tally:
    """Counts of the kills and their results."""

    places: Counter = field(default_factory=Counter)       # event at the kill -> number of kills
    ways: Counter = field(default_factory=Counter)         # at a chosen event, ... -> kills
    runs: int = 0                                          # killed and resumed to their end
    failures: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def kills(self) -> int:
        return sum(self.ways.values())

    def note(self, way: str, sitting: Sitting) -> None:
        if sitting.code != -signal.SIGKILL:
            return                                          # it ended before the kill
        self.ways[way] += 1
        self.places[sitting.events[-1] if sitting.events else "start-up: imports, arguments, reading"] += 1

    def end(self, what: str, sitting: Sitting, found: Path, wanted: Path) -> None:
        """Compare a finished run with the uninterrupted one."""
        self.runs += 1
        wrong = differences(found, wanted) if sitting.code == 0 else [f"exit code {sitting.code} {sitting.events[-1:]}"]
        if wrong:
            self.failures.append(f"{what}: {', '.join(wrong)}")


def fresh(folder: Path) -> Path:
    """A folder with links to the inputs of a run: rows, test rows, encoder."""
    folder.mkdir()
    for name in ("train.csv", "test.csv", "encoder"):
        (folder / name).symlink_to(folder.parent / name)
    return folder


def kill_everywhere(place: Path, setting: str, wanted: Path, events: list[str], times: int, tally: Tally) -> None:
    """One run for each chosen event: first kinds of events without a kill so far, then any."""
    numbers = random.Random(0).sample(range(len(events)), len(events))
    kinds = {events[number]: number for number in numbers if events[number] not in tally.places}
    for number in list(dict.fromkeys([*kinds.values(), *numbers]))[:times]:
        folder = fresh(place / f"everywhere {setting} {number}")
        tally.note("at a chosen event", sit(folder, SETTINGS[setting], die_at=number + 1))
        tally.end(f"{setting}, killed at event {number + 1} ({events[number]})", sit(folder, SETTINGS[setting]),
                  folder / "run", wanted)


def kill_often(place: Path, setting: str, wanted: Path, times: int, seed: int, tally: Tally) -> None:
    """One run, killed at random events many times, then resumed to its end."""
    draw, folder = random.Random(seed), fresh(place / f"often {setting} {seed}")
    for _ in range(times):
        sitting = sit(folder, SETTINGS[setting], die_at=draw.randint(1, 60))
        tally.note("at random events", sitting)
        if sitting.code == 0:
            break
    tally.end(f"{setting}, killed often, seed {seed}", sit(folder, SETTINGS[setting]), folder / "run", wanted)


def kill_at_any_moment(place: Path, wanted: Path, seconds: float, forked: int, processes: int, tally: Tally) -> None:
    """One long run, killed after random times: first in forked children, then in separate processes."""
    draw, folder = random.Random(0), fresh(place / "any moment")
    for _ in range(forked):
        tally.note("at a random time", sit(folder, LONG, seconds=draw.uniform(0.05, seconds)))
    for number in range(processes):
        before = (folder / "said.txt").stat().st_size
        begun = (folder / "run/config.json").exists()
        with open(folder / "said.txt", "a") as said:
            arguments = ["--resume", "--run", "run"] if begun else [*LONG, "--run", "run"]
            process = subprocess.Popen([sys.executable, "-u", ROOT / "train.py", *arguments], cwd=folder, stdout=said,
                                       stderr=said)
            if number % 4:                                 # three of four reach the loop
                wait_for(folder / "said.txt", before, "steps  ", process)
            time.sleep(draw.uniform(0, seconds))
            process.kill()
            process.wait()
        begun = "steps  " in (folder / "said.txt").read_text()[before:]
        places = ["the training loop: not known: a separate process"] if begun else []
        tally.note("at a random time", Sitting(process.returncode, places))
    tally.end("killed at any moment", sit(folder, LONG), folder / "run", wanted)


def wait_for(file: Path, position: int, text: str, process: subprocess.Popen) -> None:
    """Until a process has printed a text, or has ended."""
    while text not in file.read_text()[position:] and process.poll() is None:
        time.sleep(0.02)


def kill_all(place: Path, small: bool) -> Tally:
    """Every way to die, in the folder `place`."""
    started, tally = time.monotonic(), Tally()
    write_encoder(place / "encoder")
    write_rows(place / "train.csv", 40)
    write_rows(place / "test.csv", 7, seed=1, labels=False)
    for setting, arguments in SETTINGS.items():
        folder = fresh(place / setting)
        whole = sit(folder, arguments)
        if whole.code:
            raise SystemExit(f"the run that nobody kills ends with {whole.code}: {(folder / 'said.txt').read_text()}")
        kill_everywhere(place, setting, folder / "run", whole.events, 20 if small else 60, tally)
        for seed in range(1 if small else 4):
            kill_often(place, setting, folder / "run", 12, seed, tally)
    folder, began = fresh(place / "long"), time.monotonic()
    sit(folder, LONG)
    seconds = (time.monotonic() - began) / (8 if small else 20)        # of a sitting at most; half of it on average
    kill_at_any_moment(place, folder / "run", seconds, 24 if small else 40, 3 if small else 12, tally)
    tally.seconds = time.monotonic() - started
    return tally


# --- the report -------------------------------------------------------------------------------------------------------

def report(tally: Tally) -> str:
    """The figures as the page has them: the kills inside a write by part and moment, the others one by one."""
    ways = ", ".join(f"{count} {way}" for way, count in tally.ways.items())
    said = ("every one ended with the same bytes as an uninterrupted run, times aside" if not tally.failures else
            f"{len(tally.failures)} ended differently")
    lines = [f"{tally.kills} kills ({ways}) in {tally.runs} runs; {said}.", "",
             f"| killed while | {' | '.join(WRITING)} |", f"|---|{'---:|' * len(WRITING)}"]
    split = {place: place.split(": ", 1) for place in sorted(tally.places)}
    for part in dict.fromkeys(part for part, moment in split.values() if moment in WRITING):
        lines.append(f"| {part} | {' | '.join(str(tally.places[f'{part}: {moment}']) for moment in WRITING)} |")
    lines += ["", "| killed in | last event before the kill | kills |", "|---|---|---:|"]
    lines += [f"| {part} | {moment} | {tally.places[place]} |" for place, (part, moment) in split.items()
              if moment not in WRITING]
    return "\n".join(lines)


def write_page(tally: Tally) -> None:
    """Put the figures between the two marks of docs/reliability.md."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    write_text(PAGE, f"{before}{BEGIN}\n\n{report(tally)}\n\n{END}{after}")


def main() -> int:
    parser = argparse.ArgumentParser(description="Kill a training run again and again.")
    parser.add_argument("--small", action="store_true", help="fewer kills; the page stays as it is")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        tally = kill_all(Path(place).resolve(), options.small)
    print(report(tally))
    print("\n".join(tally.failures))
    print(f"{tally.seconds:.0f} s")
    if not options.small and not tally.failures:
        write_page(tally)
    return bool(tally.failures)


if __name__ == "__main__":
    sys.exit(main())
