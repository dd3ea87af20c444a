"""A run's folder: state that survives anything, and logs that equal runs write equally.

    runs/NAME/
        config.json     what was asked for
        metrics.csv     a row an evaluation; no times and no paths, so that equal runs have equal files
        timing.csv      the times that metrics.csv leaves out
        report.json     the end's figures
        model/          the best so far, in the Hugging Face layout
        state/          everything needed to go on exactly; two generations

Unusual here: a state is never overwritten. A new one is written beside the old one under a new name, flushed, and only
then does `state/current.json`, one small file with the checksums, point to it. A process killed at any instant leaves
the old pointer or the new one, and both lead to a complete state. No pickle: tensors go into safetensors, everything
else into JSON.
"""

import contextlib
import csv
import hashlib
import io
import json
import os
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from minipref.errors import InputError, shown
from minipref.files import read_json, replacing, sha256_of, sweep, write_json, write_text

try:
    import fcntl
except ModuleNotFoundError:        # Windows
    fcntl = None

LATEST = Path("runs/latest")       # a text file that names the newest run's folder, wherever it lies
CURRENT = "current.json"
PREVIOUS = "previous.json"
FORMAT = 1                         # of a state; another one is refused by this number


def newest_models() -> list[Path]:
    """The model of the newest run, or of each of its folds. Errors: `InputError` where there is none."""
    try:
        run = Path(LATEST.read_text(encoding="utf-8").strip())
        run.stat()
    except (OSError, ValueError):               # no such note, or one that names no folder
        raise InputError(file=LATEST, found="no run so far", expected="--model DIR, or train.py first") from None
    models = [run / "model"] if (run / "model").is_dir() else sorted(run.glob("fold-*/model"))
    if not models:
        raise InputError(file=run, found="no model in the newest run", expected="--model DIR")
    return models


def save_state(folder: str | Path, tensors: dict[str, Tensor], facts: dict) -> None:
    """Write a state that `load_state` gives back bit for bit: tensors of any dtype, and facts that JSON can hold.

    The state before it is kept as `previous` until the next save. Errors: OSError, with the old state intact.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    sweep(folder)                                               # a save that was killed may have left gigabytes
    pointer, previous = _read_pointer(folder / CURRENT), _read_pointer(folder / PREVIOUS)
    in_use = {p["tensors"] for p in (pointer, previous) if p}
    name = next(n for n in ("tensors-0", "tensors-1", "tensors-2") if f"{n}.safetensors" not in in_use) + ".safetensors"
    # Tensors that share memory would be refused, and an optimizer's step counters are many small ones: one pass.
    with replacing(folder / name) as temporary:
        save_file({key: t.detach().cpu().contiguous() for key, t in tensors.items()}, temporary)
        digest = sha256_of(temporary)
    facts_text = json.dumps(facts)
    if pointer:
        write_json(folder / PREVIOUS, pointer)
    write_json(folder / CURRENT, {"format": FORMAT, "tensors": name, "sha256": digest, "facts": facts_text,
                                  "facts_sha256": _digest(facts_text)})
    for leftover in folder.glob("tensors-*.safetensors"):       # the generation that nothing points to any more
        if leftover.name not in {name, pointer["tensors"] if pointer else name}:
            leftover.unlink()


def load_state(folder: str | Path, which: str = CURRENT) -> tuple[dict[str, Tensor], dict]:
    """The tensors and facts of the last complete state.

    Errors: `InputError` naming the file that is missing or damaged, and the previous state where there is a good one.
    """
    folder = Path(folder)
    try:
        return _load(folder, which)
    except InputError as problem:
        if which == CURRENT and (folder / PREVIOUS).exists():
            try:
                _, facts = _load(folder, PREVIOUS)
            except InputError:
                raise problem from None
            raise InputError(file=problem.file, found=problem.found,
                             expected=f"the file as it was written; the state before it (step {facts.get('step')}) is "
                                      f"whole: copy {folder / PREVIOUS} over {folder / CURRENT} to go on from there"
                             ) from None
        raise


def has_state(folder: str | Path) -> bool:
    """Whether there is something to go on from, damaged or not, or was: a lost pointer leaves the one before it."""
    return any((Path(folder) / name).exists() for name in (CURRENT, PREVIOUS))


@contextlib.contextmanager
def alone_in(folder: str | Path) -> Iterator[None]:
    """Keep a run's folder for this process; what killed processes left half-written in it is removed.

    The lock is on the folder itself and is the system's: it leaves no file behind and ends with the process, however
    that dies. Where the file system has no locks (some network ones), nothing is kept.
    Errors: `InputError` where another process has the folder.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY) if fcntl else None
    try:
        if fcntl:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:                    # the folder is the other process's, to remove as well
        os.close(descriptor)
        raise InputError(file=folder, found="another process at work in it",
                         expected="that one to end, or another folder") from None
    except OSError as problem:
        print(f"note: {folder} cannot be locked ({problem.strerror}): let no other run use it now")
    try:
        for part in (folder, *folder.glob("fold-*")):
            for place in (part, part / "model", part / "state"):
                sweep(place)
        yield
    finally:
        with contextlib.suppress(OSError):     # only an empty one goes: nothing came of this run
            folder.rmdir()
        if fcntl:
            os.close(descriptor)


def _load(folder: Path, which: str) -> tuple[dict[str, Tensor], dict]:
    pointer = _read_pointer(folder / which)
    if pointer is None:
        found = "damaged" if (folder / which).exists() else "no such file"
        raise InputError(file=folder / which, found=found, expected="the pointer to a saved state")
    if (found := pointer.get("format", FORMAT)) != FORMAT:
        raise InputError(file=folder / which, found=f"a state of format {shown(found)}",
                         expected=f"format {FORMAT}: go on with the version of minipref that wrote it")
    if _digest(pointer["facts"]) != pointer["facts_sha256"]:
        raise InputError(file=folder / which, found="the facts do not match their checksum",
                         expected="the file as it was written")
    path = folder / pointer["tensors"]
    if not path.is_file():
        raise InputError(file=path, found="no such file", expected=f"the tensors that {which} points to")
    if sha256_of(path) != pointer["sha256"]:
        raise InputError(file=path, found="the content does not match its checksum",
                         expected="the file as it was written")
    try:
        return load_file(path), json.loads(pointer["facts"])
    except (SafetensorError, ValueError, RecursionError) as problem:
        raise InputError(file=path, found=str(problem), expected="the file as it was written") from None


def _read_pointer(path: Path) -> dict | None:
    """The pointer file's content, or None where there is none that can be used."""
    try:
        pointer = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    wanted = ("tensors", "sha256", "facts", "facts_sha256")
    whole = isinstance(pointer, dict) and all(isinstance(pointer.get(key), str) for key in wanted)
    return pointer if whole and Path(pointer["tensors"]).name == pointer["tensors"] else None


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def digest_of_json(value: object) -> str:
    """A SHA-256 of what JSON can hold, the same however it is laid out."""
    return _digest(json.dumps(value, sort_keys=True))


def write_made_of(folder: Path, fields: dict) -> None:
    """A run's config.json: what it is made of, with a checksum, since nobody may change that under it."""
    write_json(folder / "config.json", fields | {"sha256": digest_of_json(fields)})


def read_made_of(folder: Path, program: str) -> dict:
    """A run's config.json as `write_made_of` wrote it. Errors: `InputError` where it is not, to the last character."""
    path = folder / "config.json"
    fields = read_json(path, f"the folder of a run that {program} began")
    if fields.pop("sha256", None) != digest_of_json(fields):
        raise InputError(file=path, found="its content does not match its checksum", expected="the file as it was "
                         "written: what a run is made of cannot be changed under it")
    return fields


def random_state() -> tuple[dict[str, Tensor], dict]:
    """Every global generator's state: torch's (and each GPU's) as tensors, Python's and numpy's as JSON facts."""
    tensors = {"random.torch": torch.get_rng_state()}
    if torch.backends.mps.is_available():
        tensors["random.mps"] = torch.mps.get_rng_state()
    if torch.cuda.is_available():
        tensors |= {f"random.cuda.{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
    version, numbers, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state()
    facts = {"python": [version, list(numbers), gauss],
             "numpy": [kind, [int(key) for key in keys], int(position), int(has_gauss), float(cached)]}
    return tensors, facts


def restore_random_state(tensors: dict[str, Tensor], facts: dict) -> None:
    """Put every generator back to where `random_state` found it."""
    torch.set_rng_state(tensors["random.torch"])
    cuda = sorted((name for name in tensors if name.startswith("random.cuda.")), key=lambda n: int(n.rsplit(".", 1)[1]))
    for device, name in zip(range(torch.cuda.device_count()), cuda):    # a machine with fewer or more goes on inexactly
        torch.cuda.set_rng_state(tensors[name], device)
    if "random.mps" in tensors and torch.backends.mps.is_available():
        torch.mps.set_rng_state(tensors["random.mps"])
    version, numbers, gauss = facts["python"]
    random.setstate((version, tuple(numbers), gauss))
    kind, keys, position, has_gauss, cached = facts["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), position, has_gauss, cached))


@contextlib.contextmanager
def random_state_kept() -> Iterator[None]:
    """Every generator is afterwards as it was, whatever was drawn or seeded inside."""
    before = random_state()
    try:
        yield
    finally:
        restore_random_state(*before)


def seed_everything(seed: int) -> None:
    """Seed torch's, Python's and numpy's global generators."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


def optimizer_tensors(optimizer: torch.optim.Optimizer, prefix: str = "optimizer.") -> dict[str, Tensor]:
    """An optimizer's per-parameter state as flat, named tensors: `optimizer.<parameter number>.<key>`."""
    return {f"{prefix}{index}.{key}": value for index, entry in optimizer.state_dict()["state"].items()
            for key, value in entry.items()}


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], prefix: str = "optimizer.") -> None:
    """The reverse of `optimizer_tensors`; groups (learning rates and all) stay as they are."""
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith(prefix):
            index, key = name[len(prefix):].split(".")
            state.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def digest_of(module: torch.nn.Module) -> str:
    """A SHA-256 over a module's parameters, by which to know them again; the same on every device."""
    digest = hashlib.sha256()
    for name, parameter in module.named_parameters():
        digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}".encode())
        digest.update(parameter.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def write_rows(path: str | Path, rows: list[dict]) -> None:
    """Write a small CSV whole: the log of a run, where a resumed run must not repeat or lose a row."""
    text = io.StringIO()
    if rows:
        writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    write_text(path, text.getvalue())
