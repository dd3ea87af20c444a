"""Files written whole or not at all, and small files read at a bounded cost."""

import contextlib
import errno
import hashlib
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from minipref.errors import InputError

MOST_JSON = 32 << 20       # bytes; a config.json has a thousand, the index of a large checkpoint a million


def check_ordinary(path: str | Path, expected: str) -> None:
    """Refuse what is not an ordinary file: a folder, or a pipe or device that would keep us waiting without end.

    Errors: `InputError` that says what is there instead.
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


def read_json(path: str | Path, whose: str) -> dict:
    """The JSON object in a small file, of which `whose` says where it should be found.

    Errors: `InputError` for what is no such file, before it costs memory or time.
    """
    check_ordinary(path, whose)
    expected = "a JSON object"
    try:
        with open(path, "rb") as file:
            data = file.read(MOST_JSON + 1)
        if len(data) > MOST_JSON:
            raise InputError(file=path, found=f"more than {MOST_JSON:,} bytes", expected=expected)
        fields = json.loads(data.decode("utf-8"))
    except (OSError, ValueError, RecursionError) as problem:
        raise InputError(file=path, found=str(problem), expected=expected) from None
    if not isinstance(fields, dict):
        raise InputError(file=path, found=f"a JSON {type(fields).__name__}", expected=expected)
    return fields


def check_writable(path: str | Path) -> None:
    """Try now whether `replacing(path)` will work later. Errors: `InputError` for a folder or a place without leave."""
    path = Path(path)
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "a folder")
        with _temporary(path):
            pass
    except OSError as problem:
        raise InputError(file=path, found=f"cannot be written: {problem.strerror or problem}",
                         expected="a file name in a folder that can be written") from None


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it is flushed to disk and takes `path`'s place.

    Whatever happens inside the block or to the process, `path` holds its old content or the new one, whole: a rename
    within one folder is atomic, and the flush comes before it so that a power cut cannot reorder the two. On an
    exception the temporary file is removed and `path` stays as it was; after a SIGKILL `sweep` removes it.
    Errors: OSError for whatever keeps the file from being written, safetensors' own error turned into one.
    """
    path = Path(path)
    with _temporary(path) as temporary:
        usual = temporary.stat().st_mode      # what the umask gives a new file; safetensors makes its own private
        try:
            yield temporary
        except SafetensorError as problem:    # how a full disk is reported by `save_file`
            raise OSError(f"{path}: {problem}") from None
        temporary.chmod(usual)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _flush_folder(path.parent)


@contextlib.contextmanager
def _temporary(path: Path) -> Iterator[Path]:
    """An empty file beside `path`, of this process alone, and gone at the end if it is still there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.touch()
        yield temporary
    finally:
        with contextlib.suppress(OSError):    # it could not be made, or cannot be removed: the first error says why
            temporary.unlink()


def sweep(folder: str | Path) -> None:
    """Remove what killed processes left half-written in `folder`: our temporary files, and those of safetensors.

    Only for a folder in which nobody else is writing now.
    """
    for pattern in (".*.tmp", ".tmp*"):
        for leftover in Path(folder).glob(pattern):
            if leftover.is_file():
                leftover.unlink(missing_ok=True)


def _flush_folder(folder: Path) -> None:
    """Make a rename in `folder` durable. Windows has no such call, and no need of it."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_text(path: str | Path, text: str) -> None:
    """Write `text` as UTF-8 with plain newlines, atomically."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def write_json(path: str | Path, value: object) -> None:
    """Write `value` as indented JSON, atomically. NaN and infinity, which JSON has no word for, are an error."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def sha256_of(path: str | Path) -> str:
    """The file's SHA-256, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
