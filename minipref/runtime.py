"""Shared by all commands: errors and exit codes, devices and precision, atomic file writes."""

import argparse
import contextlib
import errno
import hashlib
import html
import json
import os
import re
import shutil
import signal
import stat
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, TextIO

import torch
from safetensors import SafetensorError

MAX_JSON_BYTES = 32 << 20       # a config.json has about 1,000, the index of a large checkpoint 1,000,000
FORBIDDEN = re.compile("[\0-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef" + "".join(   # in HTML or XML
    f"{chr(plane + 0xfffe)}{chr(plane + 0xffff)}" for plane in range(0, sys.maxunicode, 1 << 16)) + "]")
TEMPORARY = ".minipref-tmp-"    # prefix of our temporary folders; tempfile adds eight characters


# --- errors and commands ----------------------------------------------------------------------------------------------

class InputError(Exception):
    """The user's input is wrong: exit code 2.

    The message is one line with the place (file, row, column), what was found and what was expected, as far as known.
    Rows are counted from 1, without the header.
    """

    def __init__(self, *, found: str, expected: str = "", file: str | Path | None = None,
                 row: int | None = None, column: str | None = None):
        self.file, self.row, self.column, self.found, self.expected = file, row, column, found, expected
        where = [str(file)] if file is not None else []
        where += [f"row {row}"] if row is not None else []
        where += [f"column {column}"] if column is not None else []
        message = f"{', '.join(where)}: {found}" if where else found
        message += f"; expected {expected}" if expected else ""
        super().__init__(" ".join(message.split()))


class RunError(Exception):
    """A run failed with valid input: exit code 1. The message is one line."""


class Stopped(Exception):
    """A signal stopped the run and its state is saved: exit code 128 + the signal's number."""

    def __init__(self, signal_number: int):
        super().__init__("stopped; the state is saved")
        self.signal_number = signal_number


def exit_code(problem: BaseException) -> int:
    """1 the run failed, 2 the input or an argument is wrong, 128 + N stopped by signal N."""
    if isinstance(problem, Stopped):
        return 128 + problem.signal_number
    if isinstance(problem, KeyboardInterrupt):
        return 128 + signal.SIGINT
    return 2 if isinstance(problem, InputError) else 1


def run_program(name: str, body: Callable[[], None], out_of_memory_advice: str = "", process: str = "") -> int:
    """Run a command's body and return its exit code. Errors that a user can cause give one line and no traceback.

    Notes of an exception (`add_note`) become part of its line. `process` follows the name in errors that concern only
    this process.
    """
    with escape_unencodable():
        try:
            body()
        except Stopped as problem:
            with contextlib.suppress(OSError):                 # the reader of a pipe may have got the same signal
                print("; ".join([str(problem), *getattr(problem, "__notes__", [])]))
            return exit_code(problem)
        except (InputError, RunError, OSError, RuntimeError, KeyboardInterrupt) as problem:
            message, where = str(problem), process if isinstance(problem, OSError | RuntimeError) else ""
            if isinstance(problem, KeyboardInterrupt):
                message = "interrupted"
            elif isinstance(problem, RuntimeError):
                first_line = message.splitlines()[0].rstrip(". ") if message else ""
                if is_out_of_memory(problem):
                    message = f"out of memory: {first_line}{out_of_memory_advice} (docs/troubleshooting.md)"
                elif is_compile_failure(problem):
                    message = (f"{first_line}; --compile needs a C++ compiler, and on a GPU Triton "
                               "(docs/troubleshooting.md)")
                else:
                    raise
            line = " ".join("; ".join([message, *getattr(problem, "__notes__", [])]).split())
            with contextlib.suppress(OSError):
                print(f"{name}{where}: {line}", file=sys.stderr)
            return exit_code(problem)
    return 0


class ArgumentParser(argparse.ArgumentParser):
    """argparse, but a wrong argument raises `InputError`, so the message is one line like all others."""

    text_options: tuple[str, ...] = ()      # their value may begin with '-', which argparse takes for an option

    def parse_args(self, arguments: Sequence[str] | None = None, namespace=None):
        others, texts = [], {}
        for text in sys.argv[1:] if arguments is None else arguments:
            if any("\ud800" <= character <= "\udfff" for character in text):
                self.error(f"{short_repr(text)}, which is not UTF-8")
            if others and others[-1] in self.text_options:
                texts[others.pop().removeprefix("--")] = text
            else:
                others.append(text)
        options = super().parse_args(others, namespace)
        vars(options).update(texts)
        return options

    def error(self, message: str):
        raise InputError(found=message, expected=f"what {self.prog} --help describes")


def number(kind: type, lowest: float, highest: float = 10**9) -> Callable[[str], float]:
    """An argument's type for argparse: an int or float within bounds."""
    def parse(text: str):
        value = kind(text)
        if not lowest <= value <= highest:          # also false for NaN
            raise ValueError
        return value
    parse.__name__ = f"number from {lowest} to {highest}"
    return parse


def short_repr(value: object, limit: int = 60) -> str:
    """The repr of `value` for an error message, cut to `limit` characters."""
    text = repr(value)
    return text if len(text) <= limit else f"{text[:limit]}... ({len(text):,} characters)"


def html_text(text: str) -> str:
    """`text` escaped for HTML or SVG, with U+FFFD for each character that HTML or XML forbids."""
    return html.escape(FORBIDDEN.sub("\ufffd", text))


@contextlib.contextmanager
def escape_unencodable() -> Iterator[None]:
    """Let print() accept any text: characters that the terminal's encoding lacks are printed as escapes."""
    before = [(stream, stream.errors) for stream in (sys.stdout, sys.stderr)
              if hasattr(stream, "reconfigure")]       # pytest and notebooks replace the streams
    for stream, _ in before:
        stream.reconfigure(errors="backslashreplace")
    try:
        yield
    finally:
        for stream, errors in before:
            try:
                stream.reconfigure(errors=errors)              # this flushes
            except OSError:
                _mute(stream)


def mute_closed_terminal() -> None:
    """Discard output if the terminal was closed: each print() would raise OSError. Safe in signal handlers."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, ValueError):  # a stream without a file, as in a notebook
            try:
                os.write(stream.fileno(), b"")
            except OSError:
                _mute(stream)


def _mute(stream: TextIO) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


# --- devices and precision --------------------------------------------------------------------------------------------

DEVICES, PRECISIONS = ("auto", "cpu", "cuda", "mps"), ("auto", "fp32", "bf16", "fp16")


def choose_device(name: str) -> torch.device:
    """The device; `auto` takes a GPU if there is one. Errors: `InputError` for a device that this machine lacks."""
    have = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        name = next(kind for kind in ("cuda", "mps", "cpu") if have[kind])
    if not have[name]:
        raise InputError(found=f"--device {name}, which this machine or this build of torch does not have",
                         expected=f"auto or one of {', '.join(kind for kind, there in have.items() if there)}")
    return torch.device(name)


def choose_precision(name: str, device: torch.device) -> str:
    """The precision. `auto`: bf16 if its products are fast (GPUs since Ampere, CPUs with AMX or AVX-512 bf16), fp16 on
    older CUDA GPUs, else fp32. On a CPU fp16 has a thirtieth of float32's speed.
    """
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    if device.type == "cpu" and (torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()):
        return "bf16"
    return "fp32"


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager:
    """The context of a forward pass in `precision`; parameters stay float32."""
    if precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, torch.bfloat16 if precision == "bf16" else torch.float16)


def is_out_of_memory(problem: RuntimeError) -> bool:
    """Whether a GPU or the system ran out of memory."""
    messages = "can't allocate memory", "not enough memory"              # the CPU's allocator has no error class
    return isinstance(problem, torch.OutOfMemoryError) or any(message in str(problem) for message in messages)


def is_compile_failure(problem: RuntimeError) -> bool:
    """Whether torch.compile failed. Its errors are known by their modules, whose import would take seconds."""
    modules = "torch._dynamo.", "torch._inductor."
    return type(problem).__module__.startswith(modules) or "torch.compile" in str(problem)


# --- files ------------------------------------------------------------------------------------------------------------

def check_regular_file(path: str | Path, expected: str) -> None:
    """Check that `path` is a regular file. Reading a pipe or a device could block for ever.

    Errors: `InputError` that names what `path` is instead.
    """
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        raise InputError(file=path, found="no such file", expected=expected) from None
    except OSError as problem:
        raise InputError(file=path, found=problem.strerror or str(problem), expected=expected) from None
    if not stat.S_ISREG(mode):
        found = "a directory" if stat.S_ISDIR(mode) else "a pipe or a device, not a file"
        raise InputError(file=path, found=found, expected=expected)


def check_folder(path: str | Path, expected: str) -> None:
    """Check that `path` is a folder. Errors: `InputError`; for a Hub-like name it has the command that fetches it."""
    path = Path(path)
    if not path.is_dir():
        if re.fullmatch(r"[\w.-]+/[\w.-]+", path.as_posix()) and not path.parent.is_dir():
            expected += f'; a repository of the Hub: make weights ARGS="--repo {path} --folder weights/{path.name}"'
        raise InputError(file=path, found="not a folder" if path.exists() else "no such folder", expected=expected)


def read_json(path: str | Path, expected: str) -> dict:
    """The JSON object in a small file; `expected` describes the file in error messages.

    Errors: `InputError` for any other content, and for a file that is too large, before reading all of it.
    """
    check_regular_file(path, expected)
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_JSON_BYTES + 1)
        if len(data) > MAX_JSON_BYTES:
            raise ValueError(f"more than {MAX_JSON_BYTES:,} bytes")
        fields = json.loads(data.decode("utf-8"))
    except (OSError, ValueError, RecursionError) as problem:
        raise InputError(file=path, found=str(problem), expected="a JSON object") from None
    if not isinstance(fields, dict):
        raise InputError(file=path, found=f"a JSON {type(fields).__name__}", expected="a JSON object")
    return fields


def check_writable(path: str | Path, inputs: Iterable[str | Path] = ()) -> None:
    """Check that `atomic_write(path)` can work later, without changing anything.

    Errors: `InputError` for a folder, for a missing permission, and for a file that is one of `inputs` or lies in one,
    also through a link.
    """
    try:
        for source in inputs if os.path.exists(path) else ():
            for file in Path(source).iterdir() if os.path.isdir(source) else [source]:
                if os.path.exists(file) and os.path.samefile(path, file):
                    raise InputError(file=path, found=f"the same file as the input {file}", expected="another file")
        target, is_stream = _destination(path)
        if is_stream and not os.access(target, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        with _temporary(target, is_stream):
            pass
    except OSError as problem:
        raise InputError(file=path, found=f"cannot be written: {problem.strerror or problem}",
                         expected="a file name in a folder that can be written") from None


def check_replaceable(path: str | Path, mark: str, kind: str) -> None:
    """Errors: `InputError` for a non-empty file in which no line after the first begins with `mark`."""
    if not os.path.isfile(path):
        return
    with open(path, "rb") as file:
        start = file.read(1 << 16)
    if start and b"\n" + mark.encode() not in start:
        raise InputError(file=path, found=f"a file that is not {kind}", expected="a new name, or this file moved away")


@contextlib.contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path; on success it is flushed to disk and renamed to `path`, or to the target of a link.

    At any time `path` holds the complete old or the complete new content: a rename within one folder is atomic, and the
    flush comes first so that a power cut cannot reorder the two. On an exception the temporary file is removed; after a
    SIGKILL `remove_stale_temporaries` removes it. If `path` is a pipe or a device, the finished content is written to
    it.
    Errors: OSError if the file cannot be written, also in place of safetensors' own error.
    """
    target, is_stream = _destination(path)
    with _temporary(target, is_stream) as temporary:
        usual = temporary.stat().st_mode      # permissions by the umask; safetensors creates private files
        try:
            yield temporary
        except SafetensorError as problem:    # raised by `save_file` when the disk is full
            raise OSError(f"{path}: {problem}") from None
        if is_stream:
            with open(temporary, "rb") as file, _open_stream(target) as stream:
                shutil.copyfileobj(file, stream)
            return
        temporary.chmod(usual)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, target)
        _flush_folder(target.parent)


def standard_stream(path: str | Path) -> int | None:
    """1 if `path` is the file or terminal of stdout, 2 for stderr, else None."""
    for descriptor in (1, 2):
        with contextlib.suppress(OSError):    # no such file yet, or a closed stream
            if os.path.samestat(os.stat(path), os.fstat(descriptor)):
                return descriptor
    return None


def _destination(path: str | Path) -> tuple[Path, bool]:
    """The target of a write to `path`, links followed, and whether it is a stream (a pipe or a device)."""
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:                 # a new file, or the missing target of a link
        return Path(os.path.realpath(path)), False
    if stat.S_ISFIFO(mode) or stat.S_ISCHR(mode) or standard_stream(path):
        return Path(path), True
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "a folder" if stat.S_ISDIR(mode) else "neither a file nor a pipe")
    return Path(os.path.realpath(path)), False


def _open_stream(path: Path) -> BinaryIO:
    """Open a stream for writing. stdout keeps its position; O_NOCTTY: no terminal becomes the controlling one."""
    if descriptor := standard_stream(path):
        (sys.stdout if descriptor == 1 else sys.stderr).flush()
        return open(os.dup(descriptor), "wb")
    return open(os.open(path, os.O_WRONLY | getattr(os, "O_NOCTTY", 0)), "wb")


@contextlib.contextmanager
def _temporary(target: Path, is_stream: bool) -> Iterator[Path]:
    """An empty file in a temporary folder next to `target`. A folder, because safetensors has temporary files too."""
    if not is_stream:
        target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=TEMPORARY, dir=None if is_stream else target.parent,
                                     ignore_cleanup_errors=True) as own:
        temporary = Path(own, target.name)
        temporary.touch()
        yield temporary


def remove_stale_temporaries(folder: str | Path) -> None:
    """Remove the temporary folders that killed processes left in `folder`. No other process may be writing there."""
    for leftover in Path(folder).glob(f"{TEMPORARY}????????"):
        shutil.rmtree(leftover, ignore_errors=True)       # does not remove a link or a file of that name


def _flush_folder(folder: Path) -> None:
    """Make a rename in `folder` durable. Windows needs no such call."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_text(path: str | Path, text: str) -> None:
    """Write `text` as UTF-8 with plain newlines, atomically."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def write_json(path: str | Path, value: object) -> None:
    """Write `value` as indented JSON, atomically. Errors: ValueError for NaN and infinity, which JSON lacks."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    # A surrogate is part of a path that is not UTF-8.
    write_text(path, re.sub("[\ud800-\udfff]", lambda found: f"\\u{ord(found[0]):04x}", text) + "\n")


def folder_sha256(folder: str | Path) -> dict[str, str]:
    """The SHA-256 of each file of a model's folder that minipref reads."""
    return {file.name: sha256_of(file) for file in sorted(Path(folder).iterdir())
            if file.suffix in (".safetensors", ".json", ".model") and file.is_file()}


def sha256_of(path: str | Path) -> str:
    """The file's SHA-256, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
