"""A run's folder: its lock, its manifest and its logs.

    runs/NAME/
        config.json     the manifest: options, hyperparameters and fingerprint of the input, with a checksum
        metrics.csv     one row per evaluation; no times and no paths, so equal runs have equal files
        timing.csv      the time and memory of each evaluation
        report.json     the final scores, the last file that a run writes; report.html is the same as a page
        model/          the best model so far, in the Hugging Face layout
        state/          everything needed to resume (state.py)
"""

import contextlib
import csv
import hashlib
import io
import json
import os
import platform
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from minipref.run import distributed
from minipref.run.state import has_state
from minipref.runtime import (
    TEMPORARY,
    InputError,
    RunError,
    Stopped,
    check_writable,
    read_json,
    remove_stale_temporaries,
    short_repr,
    write_json,
    write_text,
)

try:
    import fcntl
except ModuleNotFoundError:        # Windows
    fcntl = None

LATEST = Path("runs/latest")       # a text file with the path of the newest run
MANIFEST = {"options", "hyperparameters", "fingerprint"}        # keys of a run's config.json
RESULTS = ("model", "metrics.csv", "timing.csv", "valid_predictions.csv", "oof.csv", "report.html", "report.json")
# Parts of a fingerprint that may change on --resume. The result is then not bit for bit the same.
MAY_CHANGE = ("device", "threads", "processes", "torch", "python", "system")


def newest_models() -> list[Path]:
    """The model of the newest run, or the models of its folds. Errors: `InputError` if there is none."""
    try:
        run = Path(LATEST.read_text(encoding="utf-8").strip())
        run.stat()
    except (OSError, ValueError):               # no such file, or no such folder
        raise InputError(file=LATEST, found="no run so far", expected="--model DIR, or train.py first") from None
    if (run / "model").is_dir():
        return [run / "model"]
    models = sorted(run.glob("fold-*/model"))
    if not models:
        raise InputError(file=run, found="no model in the newest run", expected="--model DIR")
    folds = read_manifest(run, "train.py").get("options", {}).get("folds")
    if len(models) != folds:
        raise InputError(file=run, found=f"the models of {len(models)} of {folds} folds",
                         expected="all folds: resume the run, or choose models with --model")
    return models


def write_latest(folder: Path) -> None:
    """Record the newest run for predict.py; for a fold, its run. Failure, or another file there, prints a note."""
    run = folder.parent if folder.name.startswith("fold-") else folder
    try:
        before = LATEST.read_text(encoding="utf-8") if LATEST.exists() else f"{run.resolve()}\n"
        if before.count("\n") != 1 or not Path(before.strip()).is_absolute():
            raise OSError(0, "it is not a file with a run's path")
        write_text(LATEST, f"{run.resolve()}\n")
    except (OSError, UnicodeError) as problem:             # UnicodeError: a name that is not UTF-8
        why = getattr(problem, "strerror", "its path is not UTF-8")
        print(f"note: {LATEST} cannot be written ({why}): pass --model {run / 'model'} to predict.py")


def is_finished(folder: Path) -> bool:
    """Whether a run, or a fold of one, has written all its files. `--resume` then changes none of them."""
    return (folder / "report.json").exists()


def is_interim(model: Path) -> bool:
    """Whether a model's folder is that of an unfinished run: the best so far, without temperature and blend."""
    place = model.resolve().parent
    run = place.parent if place.name.startswith("fold-") else place
    return bool(_manifest_of(run)) and not is_finished(place)


def check_report(folder: Path, ended: bool) -> None:
    """Errors: `InputError` for the report of a run that has not ended: it belongs to another state."""
    if is_finished(folder) and not ended:
        raise InputError(file=folder / "report.json", found="a report, although the run has not ended",
                         expected="the folder as it was written; without this file the run resumes")


def has_checkpoint(folder: Path) -> bool:
    """Whether a run or one of its folds has a state to resume from."""
    return any(has_state(place / "state") for place in (folder, *folder.glob("fold-*")))


def can_resume(folder: Path) -> bool:
    """Whether there is a state to resume from; a run that never saved one starts from the beginning.

    Errors: `InputError` for a run whose state was removed.
    """
    results = [name for name in ("metrics.csv", "report.json") if (folder / name).exists()]   # written after a state
    if results and not has_state(folder / "state"):
        raise InputError(file=folder / "state", found=f"no state, although {results[0]} shows that one was saved",
                         expected="the complete folder, or a new run without --resume")
    return has_state(folder / "state")


@contextlib.contextmanager
def resume_hint(folder: Path, command: str) -> Iterator[None]:
    """Add the command that resumes the run to an exception that ends this block."""
    try:
        yield
    except (OSError, RuntimeError, RunError, Stopped) as problem:
        if has_checkpoint(folder):
            whole = "" if isinstance(problem, Stopped) else "the last saved state is intact; "
            problem.add_note(f"{whole}to resume: {command} '{folder}'")
        raise


@contextlib.contextmanager
def lock_run(folder: str | Path, program: str, resume: bool = False, encoder: str | None = None) -> Iterator[None]:
    """Lock the folder of a run of `program` for this process, and remove the temporary files of killed processes.

    Rank 0 takes an flock on the folder itself: it leaves no file, and the system releases it when the process ends. If
    the file system has no locks, a note is printed.
    Errors: `InputError` if another process has the lock, if the folder is not a run's, if it contains the encoder,
    which the run would overwrite, and without `resume` if it has a state or a result.
    """
    if encoder and Path(encoder).resolve().is_relative_to(Path(folder).resolve()):
        raise InputError(file=encoder, found="an encoder inside the run's folder, which the run would overwrite",
                         expected="another folder for the run")
    check_writable(Path(folder) / "config.json")
    distributed.barrier()                      # until no other rank is in check_writable
    if not distributed.is_main_process():
        yield
        return
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY) if fcntl else None
    try:
        if fcntl:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:                    # not in the `try` below: the folder is not ours to remove
        os.close(descriptor)
        raise InputError(file=folder, found="in use by another process",
                         expected="the end of that process, or another folder") from None
    except OSError as problem:
        print(f"note: {folder} cannot be locked ({problem.strerror}): make sure that no other run uses it")
    try:
        check_own(folder, program)
        if not resume and has_checkpoint(folder):
            raise InputError(file=folder, found="a run that can be resumed", expected="--resume, or another folder")
        results = [place / name for place in (folder, *folder.glob("fold-*")) for name in RESULTS]
        if not resume and (kept := [str(path.relative_to(folder)) for path in results if path.exists()]):
            raise InputError(file=folder, found=f"a run's {', '.join(kept)} without its state",
                             expected="another folder")
        for part in (folder, *folder.glob("fold-*")):
            if (part / "model").is_symlink():
                raise InputError(file=part / "model", found="a link, whose target the run would replace",
                                 expected="a folder of the run's own")
            for place in (part, part / "model", part / "state"):
                remove_stale_temporaries(place)
        yield
    finally:
        with contextlib.suppress(OSError):     # removes only an empty folder, that of a failed run
            folder.rmdir()
        if fcntl:
            os.close(descriptor)


def check_own(folder: Path, program: str) -> None:
    """Errors: `InputError` for a non-empty folder without a run's config.json, and for a run of another program."""
    others = sorted(path.name for path in folder.iterdir() if not path.name.startswith(TEMPORARY))
    if manifest := _manifest_of(folder):
        _check_program(manifest, folder, program)
    elif others:
        raise InputError(file=folder, found=f"a folder that contains {short_repr(others[0])} and is not a run's",
                         expected="a new or an empty folder, or that of a run")


def _manifest_of(folder: Path) -> dict:
    """The config.json of a run's folder, checked for its keys only; empty for any other folder."""
    try:
        manifest = read_json(folder / "config.json", "")
    except InputError:
        return {}
    return manifest if manifest.keys() >= MANIFEST else {}


def _check_program(manifest: dict, folder: Path, program: str) -> None:
    if (other := manifest.get("program")) != program:
        raise InputError(file=folder, found=f"a run of {other or 'another version of minipref'}",
                         expected=f"a new folder, or that of a run of {program}")


# --- what a run was started with --------------------------------------------------------------------------------------

def machine_fingerprint(device: torch.device) -> dict:
    """Properties of the machine that change the order of additions or the dropout masks."""
    return {"device": device.type, "threads": torch.get_num_threads(), "processes": distributed.world_size(),
            "torch": torch.__version__, "python": platform.python_version(), "system": platform.machine()}


def write_manifest(folder: Path, manifest: dict) -> None:
    """Write a run's config.json with the directory of its relative paths, and a checksum to detect edits."""
    manifest = {"directory": os.getcwd()} | manifest
    if distributed.is_main_process():
        write_json(folder / "config.json", manifest | {"sha256": json_sha256(manifest)})


def read_manifest(folder: Path, program: str) -> dict:
    """Read the config.json of a run of `program`. Errors: `InputError` for another program's, and if it was changed."""
    path = folder / "config.json"
    manifest = read_json(path, f"the folder of a run that {program} began")
    if manifest.pop("sha256", None) != json_sha256(manifest):
        raise InputError(file=path, found="its content does not match its checksum",
                         expected="the unchanged file: the settings of a run cannot be edited")
    _check_program(manifest, folder, program)
    return manifest


def resumed_options(folder: Path, program: str, overrides: Mapping, free: set[str], paths: set[str]) -> dict:
    """The options of the run to resume. Those in `free` and `paths` may be given again. A stored relative path keeps
    the meaning that it had when the run began. Errors: `InputError` for other changes."""
    manifest = read_manifest(folder, program)
    stored = manifest["options"]
    stored |= {name: _seen_from_here(stored[name], manifest.get("directory", "")) for name in paths & stored.keys()}
    free = free | {name for name in paths if stored.get(name)}
    for name in sorted(overrides.keys() - free):
        if overrides[name] != stored.get(name):
            raise InputError(file=folder / "config.json", found=f"--{name.replace('_', '-')} {overrides[name]}, where "
                             f"the run has {stored.get(name, 'that of its recipe')}", expected="the same, or a new run")
    return stored | {name: overrides[name] for name in free if name in overrides}


def _seen_from_here(paths: str | list[str] | None, directory: str):
    """Paths that were stored in `directory`. A relative path is looked for there first, then here."""
    if isinstance(paths, list):
        return [_seen_from_here(path, directory) for path in paths]
    there = Path(directory, paths or "")
    return str(there) if paths and Path(directory) != Path.cwd() and there.exists() else paths


def check_manifest(folder: Path, program: str, hyperparameters: dict, fingerprint: dict, paths: dict) -> None:
    """Compare hyperparameters and fingerprint with the manifest of the run to resume. Files are compared by content.

    A change in `MAY_CHANGE` prints a note. `paths` are the options that name files; changed ones are stored in the
    manifest. Errors: `InputError` naming any other change.
    """
    manifest = read_manifest(folder, program)
    before = manifest["hyperparameters"] | manifest["fingerprint"]
    now = hyperparameters | fingerprint
    for name in sorted(before.keys() | now.keys(), key=lambda name: (name in MAY_CHANGE, name)):
        if before.get(name) == now.get(name):
            continue
        change = f"it was {short_repr(before.get(name))} and is {short_repr(now.get(name))}"
        if name not in MAY_CHANGE:
            is_hash = isinstance(now.get(name), list | dict)             # means nothing to a reader
            raise InputError(file=folder / "config.json",
                             found=f"{name} has changed since the run began{'' if is_hash else f': {change}'}",
                             expected="the same, or a new run")
        print(f"note: {name} has changed ({change}): the run resumes, but not bit for bit")
    stored = {name: _seen_from_here(manifest["options"][name], manifest.get("directory", "")) for name in paths}
    if paths != stored and not is_finished(folder):
        write_manifest(folder, manifest | {"options": manifest["options"] | paths, "directory": os.getcwd()})


def json_sha256(value: object) -> str:
    """SHA-256 of a JSON value, independent of its formatting."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


# --- logs -------------------------------------------------------------------------------------------------------------

def write_logs(folder: Path, state) -> None:
    """Write metrics.csv and timing.csv from the `history` and `timing` of an unfinished run's state."""
    if distributed.is_main_process() and not is_finished(folder):
        write_csv(folder / "metrics.csv", state.history)
        write_csv(folder / "timing.csv", state.timing)


def write_csv(path: str | Path, rows: list[dict]) -> None:
    """Write a complete CSV: appending could repeat or lose rows when a run is resumed."""
    text = io.StringIO()
    if rows:
        writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    write_text(path, text.getvalue())
