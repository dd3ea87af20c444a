"""A run's state on disk, from which a run that was killed at any moment can be resumed.

What is unusual here: a state is never overwritten. A new state is written under a new name and flushed. Only then is
`state/current.json`, a small file with the checksums, replaced to point to it. If the process is killed, this pointer
is the old or the new one, and both lead to a complete state. There is no pickle: tensors are in safetensors files,
everything else in JSON.
"""

import contextlib
import hashlib
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from minipref.run import distributed
from minipref.runtime import (
    InputError,
    atomic_write,
    remove_stale_temporaries,
    sha256_of,
    short_repr,
    write_json,
)

GENERATIONS = tuple(f"tensors-{n}.safetensors" for n in range(3))     # two are pointed to, the third is being written
CURRENT = "current.json"
PREVIOUS = "previous.json"
FORMAT = 3                         # states of other formats are refused


# --- a training run's state -------------------------------------------------------------------------------------------

def save_state(folder: Path, state, model: nn.Module, optimizers: Sequence[torch.optim.Optimizer],
               scaler: torch.amp.GradScaler | None = None) -> None:
    """Write the training state atomically. `state` is a dataclass of JSON values.

    Rank 0 writes. It collects the random generators of the other ranks; everything else is the same on all ranks.
    """
    generators, rng_facts = rng_state()
    all_generators = distributed.gather(generators)
    if not distributed.is_main_process():
        return
    tensors = {f"model.{name}": parameter for name, parameter in model.named_parameters()} | generators
    for i, optimizer in enumerate(optimizers):
        tensors |= optimizer_tensors(optimizer, f"optimizer.{i}.")
    for rank, others in enumerate(all_generators[1:], 1):
        tensors |= {f"rank.{rank}.{name}": value for name, value in others.items()}
    write_state(folder, tensors, {"state": asdict(state), "rng": rng_facts, "step": state.step,
                                  "scaler": scaler.state_dict() if scaler else {}})


def load_state(folder: Path, fresh, model: nn.Module, optimizers: Sequence[torch.optim.Optimizer],
               scaler: torch.amp.GradScaler | None = None):
    """Restore what `save_state` wrote. `fresh` is the state of a new run; returns one of the same class.

    Errors: `InputError` naming what is damaged, or for a state with another `split` than that of `fresh`.
    """
    tensors, facts = read_state(folder)
    if facts["state"].get("split") != getattr(fresh, "split", None):
        raise InputError(file=folder, found="the state of a run or fold with other training and validation rows",
                         expected="the folder as it was written")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(tensors[f"model.{name}"])
    for i, optimizer in enumerate(optimizers):
        restore_optimizer(optimizer, tensors, f"optimizer.{i}.")
    if scaler:
        scaler.load_state_dict(facts["scaler"])
    prefix = f"rank.{distributed.rank()}." if distributed.rank() else ""
    if f"{prefix}rng.torch" in tensors:                   # a rank that the saved run did not have keeps its own
        restore_rng({name.removeprefix(prefix): value for name, value in tensors.items()
                     if name.startswith(f"{prefix}rng.")}, facts["rng"])
    return type(fresh)(**facts["state"])


# --- tensors and facts on disk ----------------------------------------------------------------------------------------

def write_state(folder: str | Path, tensors: dict[str, Tensor], facts: dict) -> None:
    """Write a state of tensors and JSON values. The last state is kept as `previous` until the next save.

    Errors: OSError, with the old state intact.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    remove_stale_temporaries(folder)                            # a killed save may have left gigabytes
    pointer, previous = _read_pointer(folder / CURRENT), _read_pointer(folder / PREVIOUS)
    in_use = {p["tensors"] for p in (pointer, previous) if p}
    name = next(name for name in GENERATIONS if name not in in_use)
    with atomic_write(folder / name) as temporary:
        save_file({key: t.detach().cpu().contiguous() for key, t in tensors.items()}, temporary)
        digest = sha256_of(temporary)
    facts_text = json.dumps(facts)
    if pointer:
        write_json(folder / PREVIOUS, pointer)
    write_json(folder / CURRENT, {"format": FORMAT, "tensors": name, "sha256": digest, "facts": facts_text,
                                  "facts_sha256": _digest(facts_text)})
    for leftover in set(GENERATIONS) - {name, pointer["tensors"] if pointer else name}:
        (folder / leftover).unlink(missing_ok=True)             # no pointer refers to it now


def drop_previous(folder: str | Path) -> None:
    """Delete the state before the last one, which a finished run does not need: it is as large as three models."""
    (Path(folder) / PREVIOUS).unlink(missing_ok=True)
    pointer = _read_pointer(Path(folder) / CURRENT)
    for leftover in set(GENERATIONS) - {pointer["tensors"]} if pointer else ():
        (Path(folder) / leftover).unlink(missing_ok=True)


def read_state(folder: str | Path, which: str = CURRENT) -> tuple[dict[str, Tensor], dict]:
    """The tensors and facts of the last complete state.

    Errors: `InputError` naming the missing or damaged file, and the previous state if that is intact.
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
                                      f"intact: copy {folder / PREVIOUS} over {folder / CURRENT} to resume from it"
                             ) from None
        raise


def has_state(folder: str | Path) -> bool:
    """Whether there is a state, even a damaged one. If the current pointer is lost, the previous one remains."""
    return any((Path(folder) / name).exists() for name in (CURRENT, PREVIOUS))


def _load(folder: Path, which: str) -> tuple[dict[str, Tensor], dict]:
    pointer = _read_pointer(folder / which)
    if pointer is None:
        found = "damaged" if (folder / which).exists() else "no such file"
        raise InputError(file=folder / which, found=found, expected="the pointer to a saved state")
    if (found := pointer.get("format", FORMAT)) != FORMAT:
        raise InputError(file=folder / which, found=f"a state of format {short_repr(found)}",
                         expected=f"format {FORMAT}: resume with the version of minipref that wrote it "
                                  "(docs/troubleshooting.md)")
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
    """The content of a pointer file, or None if it is missing or invalid."""
    try:
        pointer = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    wanted = ("tensors", "sha256", "facts", "facts_sha256")
    whole = isinstance(pointer, dict) and all(isinstance(pointer.get(key), str) for key in wanted)
    return pointer if whole and Path(pointer["tensors"]).name == pointer["tensors"] else None


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


# --- random generators, optimizers, weights ---------------------------------------------------------------------------

def rng_state() -> tuple[dict[str, Tensor], dict]:
    """The states of all global random generators: torch's as tensors, Python's and numpy's as JSON values."""
    tensors = {"rng.torch": torch.get_rng_state()}
    if torch.backends.mps.is_available():
        tensors["rng.mps"] = torch.mps.get_rng_state()
    if torch.cuda.is_initialized():
        tensors |= {f"rng.cuda.{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
    version, numbers, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state()
    facts = {"python": [version, list(numbers), gauss],
             "numpy": [kind, [int(key) for key in keys], int(position), int(has_gauss), float(cached)]}
    return tensors, facts


def restore_rng(tensors: dict[str, Tensor], facts: dict) -> None:
    """Restore the generators to the states that `rng_state` returned."""
    torch.set_rng_state(tensors["rng.torch"])
    cuda = sorted((name for name in tensors if name.startswith("rng.cuda.")), key=lambda n: int(n.rsplit(".", 1)[1]))
    for device, name in zip(range(torch.cuda.device_count()), cuda):    # another number of GPUs is not exact
        torch.cuda.set_rng_state(tensors[name], device)
    if "rng.mps" in tensors and torch.backends.mps.is_available():
        torch.mps.set_rng_state(tensors["rng.mps"])
    version, numbers, gauss = facts["python"]
    random.setstate((version, tuple(numbers), gauss))
    kind, keys, position, has_gauss, cached = facts["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), position, has_gauss, cached))


def make_deterministic(device: torch.device) -> None:
    """On a CPU, use deterministic algorithms, so that a run can be repeated bit for bit."""
    if device.type == "cpu":
        torch.set_deterministic_debug_mode("error")     # use_deterministic_algorithms(True) imports for 2 s
        torch.utils.deterministic.fill_uninitialized_memory = False


@contextlib.contextmanager
def keep_globals() -> Iterator[None]:
    """Restore global settings at the end, for programs that run in a notebook: random generators, deterministic mode,
    number of threads."""
    generators, mode, threads = rng_state(), torch.get_deterministic_debug_mode(), torch.get_num_threads()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    try:
        yield
    finally:
        restore_rng(*generators)
        torch.set_deterministic_debug_mode(mode)
        torch.utils.deterministic.fill_uninitialized_memory = fill
        torch.set_num_threads(threads)


def seed_everything(seed: int) -> None:
    """Seed torch's, Python's and numpy's global random generators."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


def optimizer_tensors(optimizer: torch.optim.Optimizer, prefix: str) -> dict[str, Tensor]:
    """An optimizer's per-parameter state as flat, named tensors: `<prefix><parameter number>.<key>`."""
    return {f"{prefix}{index}.{key}": value for index, entry in optimizer.state_dict()["state"].items()
            for key, value in entry.items()}


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], prefix: str) -> None:
    """The reverse of `optimizer_tensors`. Parameter groups keep their values."""
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith(prefix):
            index, key = name[len(prefix):].split(".")
            state.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def weights_sha256(module: torch.nn.Module) -> str:
    """SHA-256 of a module's parameters; the same on every device."""
    digest = hashlib.sha256()
    for name, parameter in module.named_parameters():
        digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}".encode())
        digest.update(parameter.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
