"""Fetch the published weights and the published rows, and verify them.

    python -m minipref.hub weights [--repo microsoft/deberta-v3-small] [--folder weights/deberta-v3-small]
    python -m minipref.hub data    [--repo lmsys/lmsys-arena-human-preference-55k] [--folder data]

What is unusual here:

- A file gets its own name only once it is whole. Bytes go to `.fetching/` inside the folder, are held against the size
  and the hash the hub publishes (sha256 for large files, git's blob sha1 for small ones), flushed, and renamed. So a
  file that is there is complete, is never overwritten, and is not asked for again: with all of them there, no network.
- A transfer goes on where it stopped, within one run and from one run to the next, and no server can keep us waiting
  as long as it likes. `huggingface_hub` 2 does neither (it drops the partial file when its download ends, and obeys any
  Retry-After), so the library gives the addresses, the metadata, the token, the proxies and the HTTP client, and the
  loop around them is ours.
- `pytorch_model.bin` is a pickle, the only one this project opens: once, with `weights_only=True`, to write the same
  tensors as safetensors. It never lies in the folder.
"""

import argparse
import email.utils
import errno
import hashlib
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import urlsplit

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from minipref.errors import InputError, shown

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")   # read once, when huggingface_hub is imported

from huggingface_hub import constants, get_hf_file_metadata, get_session, hf_hub_url, hf_raise_for_status
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    HTTPError,  # the HTTP client's own: everything that can go wrong between us and a server
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import WeakFileLock, build_hf_headers, parse_ratelimit_headers

HUB = "https://huggingface.co"
WEIGHTS_REPO, WEIGHTS_FOLDER = "microsoft/deberta-v3-small", "weights/deberta-v3-small"
DATA_REPO, DATA_FOLDER = "lmsys/lmsys-arena-human-preference-55k", "data"

# Each row is one thing that is needed, and the names it may have, the preferred one first.
WEIGHTS_FILES = (("config.json",), ("spm.model", "tokenizer.json"), ("tokenizer_config.json",),
                 ("model.safetensors", "pytorch_model.bin"))
DATA_FILES = (("train.csv",),)

# The vocabulary every token id of the published weights refers to: another file would load, and mean nothing.
KNOWN_SHA256 = {(WEIGHTS_REPO, "spm.model"): "c679fbf93643d19aab7ee10c0b99e460bdbc02fedf34b92b05af343b4af586fd"}

TRIES = 5                       # in a row without progress; the pauses between them are 1, 2, 4 and 8 seconds
PROGRESS = 1 << 20              # bytes that make a try count as progress: no server can keep us busy byte by byte
LONGEST_WAIT = 300              # seconds we wait because a server asks us to: the hub counts requests in 5 minutes
PASSING_STATUS = {408, 416, 429, 500, 502, 503, 504}   # may be gone the next time (416: the part is begun anew)


@dataclass(frozen=True)
class Published:
    """One file as the hub describes it: `size` in bytes, `etag` its hash, `commit` the repository's."""

    name: str
    url: str
    size: int
    etag: str
    commit: str


class Trouble(Exception):
    """The server answered, and the answer is not usable; the text says why. Ends as an InputError, with what to do."""


def fetch_weights(repo: str = WEIGHTS_REPO, folder: str | Path = WEIGHTS_FOLDER, say: Callable = print) -> Path:
    """Bring an encoder's config, vocabulary and weights into `folder`, for `load_encoder`; returns the folder.

    What is already in the folder stays and is not fetched again. A `pytorch_model.bin`, fetched or put there by hand,
    is converted to `model.safetensors`. `say` takes one line of progress at a time.

    Errors: InputError, naming the reason and the files to put there by hand.
    """
    folder = Path(folder)
    weights = folder / "model.safetensors"
    if not _missing(WEIGHTS_FILES, folder) and weights.is_file():
        _check_present(repo, folder)
        say(f"{folder}: complete, nothing to fetch")
        return folder
    with _filling(folder, repo, "model", WEIGHTS_FILES, say) as staging:
        _check_present(repo, folder)
        for source in _sources(repo, "model", WEIGHTS_FILES, folder, say):
            part = _transfer(source, staging, KNOWN_SHA256.get((repo, source.name)), say)
            if source.name == "pytorch_model.bin":
                convert_bin(part, weights)
                say(f"{weights}: converted from pytorch_model.bin")
            else:
                _put_in_place(part, folder / source.name)
        if not weights.is_file():
            convert_bin(folder / "pytorch_model.bin", weights)
            say(f"{weights}: converted from the pytorch_model.bin beside it, which is no longer needed")
    return folder


def fetch_data(repo: str = DATA_REPO, folder: str | Path = DATA_FOLDER, say: Callable = print) -> Path:
    """Bring the labelled rows into `folder`/train.csv; returns that path. Otherwise as `fetch_weights`."""
    folder = Path(folder)
    if not _missing(DATA_FILES, folder):
        say(f"{folder / 'train.csv'}: there, nothing to fetch")
        return folder / "train.csv"
    with _filling(folder, repo, "dataset", DATA_FILES, say) as staging:
        for source in _sources(repo, "dataset", DATA_FILES, folder, say):
            _put_in_place(_transfer(source, staging, None, say), folder / source.name)
    return folder / "train.csv"


def convert_bin(bin_path: str | Path, safetensors_path: str | Path) -> None:
    """Write the tensors of a `torch.save`d state dict as safetensors: same names, same dtypes, same bits.

    Nothing in the file is executed: `weights_only=True` builds tensors and containers and refuses every other object.
    Tensors that share memory are written out one by one (safetensors has no aliases). `safetensors_path` is written to
    the side and renamed, so it is there whole or not at all.

    Errors: InputError where the file is damaged, is not a flat dict of dense tensors, or asks for code to be run.
    """
    bin_path, safetensors_path = Path(bin_path), Path(safetensors_path)
    expected = "a state dict saved by torch.save, tensors and nothing else"
    try:
        state = torch.load(bin_path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(file=bin_path, found="no such file", expected=expected) from None
    except Exception as error:   # a damaged or hostile pickle makes the unpickler fail in any way there is
        raise InputError(file=bin_path, found=f"refused ({_first_line(error)})", expected=expected) from None
    if not isinstance(state, dict) or not state:
        raise InputError(file=bin_path, found=f"a {type(state).__name__}", expected=expected)

    tensors, seen = {}, set()
    for name, tensor in state.items():
        if not _is_dense(tensor) or not isinstance(name, str):
            raise InputError(file=bin_path, found=f"{shown(name)} is not a named dense tensor", expected=expected)
        tensor = tensor.detach().contiguous()
        address = tensor.untyped_storage().data_ptr()
        tensors[name] = tensor.clone() if address in seen else tensor
        seen.add(address)

    beside = safetensors_path.with_name(f".{safetensors_path.name}.{os.getpid()}")
    try:
        save_file(tensors, beside, metadata={"format": "pt"})   # transformers refuses a file without the metadata
        shutil.copymode(bin_path, beside)   # safetensors makes it readable for its owner alone
        _put_in_place(beside, safetensors_path)
    except (SafetensorError, OSError) as error:
        raise InputError(file=safetensors_path, found=f"could not be written ({_first_line(error)})",
                         expected=f"{_mega(sum(t.nbytes for t in tensors.values()))} of room in a writable folder",
                         ) from None
    finally:
        beside.unlink(missing_ok=True)


def _is_dense(value: object) -> bool:
    return (isinstance(value, torch.Tensor) and value.layout == torch.strided and value.device.type == "cpu"
            and not value.is_quantized)


# What is there, and what is to come ----------------------------------------------------------------------------------

def _missing(wanted: tuple, folder: Path) -> list[tuple]:
    """The rows of `wanted` of which the folder holds no file under any of its names."""
    return [names for names in wanted if not any((folder / name).is_file() for name in names)]


def _check_present(repo: str, folder: Path) -> None:
    """Files somebody put there are taken as they are, but not a torn one and not another model's vocabulary."""
    weights, vocabulary = folder / "model.safetensors", folder / "spm.model"
    if weights.is_file():
        try:
            with safe_open(weights, "pt"):   # opening reads the header and holds it against the file's length
                pass
        except (SafetensorError, OSError) as error:
            raise InputError(file=weights, found=f"not a whole safetensors file ({_first_line(error)})",
                             expected="a complete copy; remove this one and run the same command again") from None
    known = KNOWN_SHA256.get((repo, vocabulary.name))
    if known and vocabulary.is_file() and (digest := _sha256(vocabulary)) != known:
        raise InputError(file=vocabulary, found=f"sha256 {digest}",
                         expected=f"{known}, as published by {repo}; remove this one and run the same command again")


def _sources(repo: str, repo_type: str, wanted: tuple, folder: Path, say: Callable) -> list[Published]:
    """Look up all that is missing before anything is moved, at one commit of the repository, and see that it fits."""
    sources, revision = [], "main"
    for names in _missing(wanted, folder):
        found = None
        for name in names:
            found = found or _look_up(repo, repo_type, name, revision, say)
        if found is None:
            raise Trouble(f"404: the repository has no {' or '.join(names)}")
        revision = found.commit
        sources.append(found)
    # A .bin needs its room twice: once as it comes, once converted.
    needed = sum(source.size * (2 if source.name == "pytorch_model.bin" else 1)
                 - _size(_part(source, folder / ".fetching")) for source in sources)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(errno.ENOSPC, f"No space left on device: {_mega(needed)} needed, {_mega(free)} free")
    if sources:
        say(f"{repo} at {revision[:12]} -> {folder}")
    return sources


def _look_up(repo: str, repo_type: str, name: str, revision: str, say: Callable) -> Published | None:
    """What the hub says about one file; None where the repository has no file of that name."""
    def address(at: str) -> str:
        return hf_hub_url(repo, name, repo_type=repo_type, revision=at, endpoint=_endpoint())

    try:
        timeout = constants.HF_HUB_ETAG_TIMEOUT
        seen = _persist(lambda: get_hf_file_metadata(address(revision), timeout=timeout), name, say)
    except HfHubHTTPError as error:
        no_such_repo = isinstance(error, RepositoryNotFoundError | RevisionNotFoundError)
        if error.response.status_code == 404 and not no_such_repo:
            return None
        raise
    if not seen.commit_hash or not seen.etag or seen.size is None or seen.size < 0:
        raise Trouble(f"{_endpoint()} does not answer as a hub does (no commit, hash or size for {name}); "
                      "a proxy or a login page may stand in between")
    return Published(name, address(seen.commit_hash), seen.size, seen.etag, seen.commit_hash)


# One file over the wire ----------------------------------------------------------------------------------------------

def _transfer(source: Published, staging: Path, known_sha256: str | None, say: Callable) -> Path:
    """Fetch one file into `staging`, going on from what an earlier try left there; returns it, whole and verified."""
    part = _part(source, staging)
    _persist(lambda: _receive(source, part), source.name, say, part)
    how = _verify(source, part, known_sha256)
    say(f"{source.name}: {_mega(source.size)}, {how}")
    return part


def _part(source: Published, staging: Path) -> Path:
    """Where a file's bytes gather; its name holds a hash of the etag, so that two versions' bytes never meet."""
    return staging / f"{source.name}.{hashlib.sha256(source.etag.encode()).hexdigest()[:16]}.part"


def _receive(source: Published, part: Path) -> None:
    """One try: append to `part` what it lacks. Returns when it has its full size; raises with the part kept if not."""
    have = _size(part)
    if have == source.size and part.exists():
        return
    headers = build_hf_headers() | {"Accept-Encoding": "identity"}   # compressed bytes could not be resumed by position
    if have:
        headers["Range"] = f"bytes={have}-"
    timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT   # seconds without a byte, not for the whole
    with get_session().stream("GET", source.url, headers=headers, timeout=timeout) as response:
        if response.status_code == 416:
            part.unlink(missing_ok=True)
        hf_raise_for_status(response)
        resumed = response.status_code == 206
        if resumed and not response.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
            raise Trouble(f"{source.name}: asked for the bytes from {have:,} on and got "
                          f"{shown(response.headers.get('Content-Range'))}")
        total = _announced(response)
        if total not in (None, source.size):
            raise Trouble(f"{source.name}: {total:,} bytes come instead of {source.size:,}; "
                          "a proxy or a login page may stand in between")
        have = have if resumed else 0   # a server without Range starts over, and so do we
        with (part.open("ab" if resumed else "wb") as out,
              tqdm(desc=source.name, total=source.size, initial=have, unit="B", unit_scale=True, leave=False,
                   disable=None) as bar):
            for chunk in response.iter_bytes():
                have += len(chunk)
                if have > source.size:
                    break
                out.write(chunk)
                bar.update(len(chunk))
    if have > source.size:
        part.unlink()
        raise Trouble(f"{source.name}: more than the {source.size:,} bytes the hub announced came")
    if have < source.size:
        raise ConnectionError(f"the connection ended after {have:,} of {source.size:,} bytes")


def _announced(response) -> int | None:
    """The whole file's size as the server sending it sees it, None where it does not say."""
    if response.headers.get("Content-Encoding", "identity") != "identity":
        return None   # then it is the compressed size
    if response.status_code == 206:
        total = response.headers.get("Content-Range", "").rpartition("/")[2]
    else:
        total = response.headers.get("Content-Length", "")
    return int(total) if total.isascii() and total.isdigit() else None


def _verify(source: Published, part: Path, known_sha256: str | None) -> str:
    """Hold a fetched part against what the hub says of it; a wrong one is removed. Returns what was checked."""
    checks = []
    if len(source.etag) == 64:       # stored in LFS: the etag is the content's sha256
        checks.append(("sha256", _sha256(part), source.etag))
    elif len(source.etag) == 40:     # stored in git: the etag is the blob's sha1
        checks.append(("git sha1", _git_sha1(part), source.etag))
    if known_sha256:
        checks.append(("sha256 of the published vocabulary", _sha256(part), known_sha256))
    for kind, found, expected in checks:
        if found != expected:
            part.unlink()
            raise Trouble(f"{source.name}: wrong checksum, {kind} {found} instead of {expected}; "
                          "what was fetched is thrown away")
    return f"{', '.join(kind for kind, *_ in checks)} verified" if checks else "only its size verified: no hash given"


def _put_in_place(part: Path, final: Path) -> None:
    """Flush to the disk and rename: after a power cut there is the whole file or none."""
    with part.open("rb+") as file:
        os.fsync(file.fileno())
    part.replace(final)


# What goes wrong -----------------------------------------------------------------------------------------------------

def _persist(attempt: Callable, what: str, say: Callable, part: Path | None = None):
    """`attempt()` until it succeeds: at most TRIES times in a row without progress of `part`, with growing pauses.

    Without `part` it is a first contact: a hub that cannot be reached at all is then not tried again.
    """
    tries, before = 1, _size(part)
    while True:
        try:
            return attempt()
        except (HTTPError, ConnectionError) as error:
            if _size(part) >= before + PROGRESS:
                tries, before = 1, _size(part)
            pause = _pause(error, tries)
            if pause is None or tries == TRIES or (part is None and _unreachable(error)):
                raise
            say(f"{what}: {_reason(error)}; trying again in {pause:.0f} s")
        time.sleep(pause)
        tries += 1


def _pause(error: Exception, tries: int) -> float | None:
    """Seconds to wait after the `tries`-th failure in a row, None where waiting does not help or is asked too long."""
    response = _response(error)
    if isinstance(error, OfflineModeIsEnabled) or (response is not None and response.status_code not in PASSING_STATUS):
        return None
    asked = _asked_to_wait(response)
    if asked is None:
        return 2.0 ** (tries - 1)
    return asked if asked <= LONGEST_WAIT else None


def _asked_to_wait(response) -> float | None:
    """Seconds a refusing server asks for: Retry-After (a number or a date), or the hub's own rate-limit header."""
    if response is None:
        return None
    value = response.headers.get("Retry-After", "").strip()
    if value.isascii() and value.isdigit():
        return float(value)
    if value:
        try:
            when = email.utils.parsedate_to_datetime(value)
        except ValueError:   # neither a number nor a date: as if nothing had been asked
            return None
        when = when if when.tzinfo else when.replace(tzinfo=UTC)
        return max(0.0, (when - datetime.now(UTC)).total_seconds())
    limit = parse_ratelimit_headers(response.headers)
    return float(limit.reset_in_seconds) if limit is not None and limit.remaining == 0 else None


def _reason(error: Exception) -> str:
    """What happened, in a phrase for someone who does not know how the hub talks."""
    response = _response(error)
    if response is None:
        if isinstance(error, OfflineModeIsEnabled):
            return "offline mode is on (HF_HUB_OFFLINE)"
        if isinstance(error, HTTPError):
            host = urlsplit(_endpoint()).netloc
            return f"{host} is too slow to answer" if _timed_out(error) else f"no answer from {host} ({_root(error)})"
        if isinstance(error, OSError) and error.strerror:
            return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
        return str(error)
    status = response.status_code
    asked = _asked_to_wait(response)
    hint = {
        401: " (no such repository, or one that wants a login; or a token in HF_TOKEN that is not valid)",
        403: " (the repository wants its terms accepted, or the token may not read it)",
        404: " (no such repository)",
    }.get(status, f", asking to wait {asked:.0f} s" if asked is not None else "")
    return f"{status} {response.reason_phrase}".strip() + hint


def _response(error: Exception):
    """The server's answer that an error came with, None where there was none."""
    return error.response if isinstance(error, HfHubHTTPError) else None


def _root(error: BaseException) -> BaseException:
    """The first cause: of a connection error, what the operating system said."""
    while error.__cause__ or error.__context__:
        error = error.__cause__ or error.__context__
    return error


def _timed_out(error: Exception) -> bool:
    return isinstance(_root(error), TimeoutError)


def _unreachable(error: Exception) -> bool:
    """Nobody answers at that address: no network, an unknown name, a closed port, a certificate that is not trusted."""
    root = _root(error)
    passing = isinstance(root, TimeoutError | ConnectionResetError)
    return _response(error) is None and isinstance(root, OSError) and not passing


@contextmanager
def _filling(folder: Path, repo: str, repo_type: str, wanted: tuple, say: Callable) -> Iterator[Path]:
    """A staging folder inside `folder`, for this process alone; removed on success, kept to go on from on failure.

    Whatever goes wrong between here and the hub leaves as one InputError that says how to do it by hand.
    """
    staging, lock = folder / ".fetching", folder / ".fetching.lock"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            try:
                stack.enter_context(WeakFileLock(lock, timeout=1))
            except TimeoutError:
                say(f"{folder}: another run is fetching into it; waiting for it to end")
                stack.enter_context(WeakFileLock(lock))
            stack.callback(_unlink_held, lock)
            staging.mkdir(exist_ok=True)
            stack.callback(_remove_if_empty, staging)
            yield staging
            shutil.rmtree(staging)
    except HFValidationError as error:
        raise InputError(found=f"--repo {shown(repo)}", expected=f"owner/name ({_first_line(error)})") from None
    except (HTTPError, OSError, Trouble) as error:
        page = f"{HUB}/{'datasets/' if repo_type == 'dataset' else ''}{repo}"
        names = ", ".join(" or ".join(names) for names in _missing(wanted, folder))
        raise InputError(file=folder, found=f"could not fetch from {repo}: {_reason(error)}",
                         expected=f"{names or 'nothing more'} in this folder: run the same command again to go on, or "
                                  f"put them there by hand from {page}") from None


def _remove_if_empty(folder: Path) -> None:
    if folder.exists() and not any(folder.iterdir()):
        folder.rmdir()


def _unlink_held(lock: Path) -> None:
    """Remove a lock's file while holding it: who waits for it notices and locks a new one."""
    with suppress(PermissionError):   # Windows keeps files that are open; an empty hidden file then stays
        lock.unlink(missing_ok=True)


def _endpoint() -> str:
    """The hub's address: HF_ENDPOINT, for mirrors, or the public one."""
    endpoint = os.environ.get("HF_ENDPOINT", "").rstrip("/") or HUB
    try:
        usable = urlsplit(endpoint).scheme in ("http", "https") and urlsplit(endpoint).hostname
        usable = usable and urlsplit(endpoint).port != 0
    except ValueError:   # a port that is no number, a bracket that does not close
        usable = False
    if not usable:
        raise InputError(found=f"HF_ENDPOINT is {shown(endpoint)}", expected="an address such as https://host")
    return endpoint


# Small change --------------------------------------------------------------------------------------------------------

def _size(path: Path | None) -> int:
    """Bytes in a file, 0 where there is none."""
    return path.stat().st_size if path is not None and path.exists() else 0


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _git_sha1(path: Path) -> str:
    """The name git gives a file's content: the sha1 of a short header and the bytes."""
    header = hashlib.sha1(b"blob %d\0" % path.stat().st_size)
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: header).hexdigest()


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:120]}" if lines else type(error).__name__


def _mega(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code: 0 done, 2 with one line on stderr, 130 when interrupted."""
    parser = argparse.ArgumentParser(prog="python -m minipref.hub", description="Fetch published weights and data.")
    what = parser.add_subparsers(dest="what", required=True)
    for name, fetch, repo, folder in (("weights", fetch_weights, WEIGHTS_REPO, WEIGHTS_FOLDER),
                                      ("data", fetch_data, DATA_REPO, DATA_FOLDER)):
        command = what.add_parser(name, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        command.add_argument("--repo", default=repo, help="the repository on the hub")
        command.add_argument("--folder", default=folder, type=Path, help="where to put the files")
        command.set_defaults(fetch=fetch)
    options = parser.parse_args(arguments)
    try:
        options.fetch(options.repo, options.folder, say=lambda line: print(line, flush=True))
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
