"""Fetch the published weights and the competition's rows with huggingface_hub, and check them.

    python -m minipref.hub weights [--repo microsoft/deberta-v3-small] [--folder weights/deberta-v3-small]
    python -m minipref.hub data    [--repo lmsys/lmsys-arena-human-preference-55k] [--folder data]

huggingface_hub downloads into its own cache, with its usual retries, tokens, HF_HOME, HF_ENDPOINT and HF_HUB_OFFLINE. A
cached file needs no network. Each file is compared with its published hash, copied into the folder under a temporary
name, and renamed, so the folder holds only complete files. Existing files are never overwritten. `pytorch_model.bin` is
a pickle, the only one that this project opens: once, to convert its tensors to safetensors.
"""

import hashlib
import logging
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file

from minipref.runtime import (
    ArgumentParser,
    InputError,
    atomic_write,
    check_regular_file,
    run_program,
    sha256_of,
    short_repr,
)

HUB = "https://huggingface.co"
WEIGHTS_REPO, WEIGHTS_FOLDER = "microsoft/deberta-v3-small", "weights/deberta-v3-small"
DATA_REPO, DATA_FOLDER = "lmsys/lmsys-arena-human-preference-55k", "data"

# Each row is one file with its possible names, the preferred one first.
WEIGHTS_FILES = (("config.json",), ("spm.model", "tokenizer.json"), ("model.safetensors", "pytorch_model.bin"))
OPTIONAL = (("tokenizer_config.json",), ("added_tokens.json",), ("special_tokens_map.json",))   # of added tokens

# The published weights belong to this vocabulary. Another one would load and give wrong results.
KNOWN_SHA256 = {(WEIGHTS_REPO, "spm.model"): "c679fbf93643d19aab7ee10c0b99e460bdbc02fedf34b92b05af343b4af586fd"}

HINTS = {401: " (no such repository, or one that needs a login: set HF_TOKEN)",
         403: " (accept the repository's terms on its page, then set HF_TOKEN)", 404: " (no such repository)"}


class FetchError(InputError):
    """A file could not be fetched. The message gives the reason and the files to place by hand."""


def fetch_weights(repo: str = WEIGHTS_REPO, folder: str | Path = WEIGHTS_FOLDER, log: Callable = print) -> Path:
    """Complete `folder` with an encoder's config, vocabulary and weights, for `load_encoder`; returns the folder.

    Existing files are kept and not fetched; a `pytorch_model.bin` is converted. `log` is called with lines of progress.
    Errors: FetchError; InputError for a wrong vocabulary or a damaged file; OSError for a folder that is not writable.
    """
    folder = Path(folder)
    missing = _missing(WEIGHTS_FILES, folder)
    if kept := [name for names in WEIGHTS_FILES + OPTIONAL for name in names if os.path.lexists(folder / name)]:
        log(f"{folder}: {', '.join(kept)} kept, not fetched from {repo}")
    if (folder / "spm.model").is_file():
        _verify(repo, folder / "spm.model")
    if missing:
        _fetch(repo, "model", missing + _missing(OPTIONAL, folder), folder, log)
    if not os.path.lexists(folder / "model.safetensors"):
        _install(folder / "pytorch_model.bin", folder, log)
    return folder


def fetch_data(repo: str = DATA_REPO, folder: str | Path = DATA_FOLDER, log: Callable = print) -> Path:
    """Fetch the labelled rows into `folder`/train.csv; returns that path. Otherwise as `fetch_weights`."""
    rows = Path(folder) / "train.csv"
    if os.path.lexists(rows):
        log(f"{rows}: kept, not fetched from {repo}")
    else:
        _fetch(repo, "dataset", [(rows.name,)], rows.parent, log)
    return rows


def convert_bin(bin_path: str | Path, safetensors_path: str | Path) -> None:
    """Write the tensors of a `torch.save`d state dict as safetensors: same names, same dtypes, same bits.

    No code in the file is executed: `weights_only=True` refuses every object but tensors and containers.
    Errors: InputError if the file is damaged, is not a flat dict of dense tensors, or would execute code.
    """
    expected = "a state dict saved by torch.save, tensors and nothing else"
    check_regular_file(bin_path, expected)
    try:
        state = torch.load(bin_path, map_location="cpu", weights_only=True)
    except Exception as error:   # a damaged or hostile pickle can raise anything
        raise InputError(file=bin_path, found=f"refused ({_reason(error)})", expected=expected) from None
    if not isinstance(state, dict) or not state:
        raise InputError(file=bin_path, found=f"a {type(state).__name__}", expected=expected)
    for name, value in state.items():
        if not (isinstance(name, str) and isinstance(value, torch.Tensor) and value.layout == torch.strided
                and value.device.type == "cpu" and not value.is_quantized):
            raise InputError(file=bin_path, found=f"{short_repr(name)} is not a named dense tensor", expected=expected)
    # Copies, because safetensors refuses tensors that share memory; metadata, because transformers requires it.
    tensors = {name: value.detach().clone(memory_format=torch.contiguous_format) for name, value in state.items()}
    with atomic_write(safetensors_path) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})


def _missing(wanted: tuple, folder: Path) -> list[tuple]:
    """The rows of `wanted` that `folder` lacks. Anything of that name counts, also a broken link: it is the user's."""
    return [names for names in wanted if not any(os.path.lexists(folder / name) for name in names)]


def _fetch(repo: str, repo_type: str, wanted: Sequence[tuple], folder: Path, log: Callable) -> None:
    """Fetch one file for each row of `wanted`, all from one commit; copy them into `folder` once all are cached."""
    found, revision, online = [], "main", False
    for names in wanted:
        try:
            path, downloaded = _find(repo, repo_type, names, revision, log)      # the cache has snapshots/COMMIT/NAME
            found, revision, online = [*found, path], path.parent.name, online or downloaded
        except Exception as error:                   # the library, its HTTP client and hf_xet share no base class
            if names in OPTIONAL and (isinstance(error, LookupError) or not online):
                log(f"{names[0]} was not fetched, and most encoders need none: {_reason(error)}")
                continue
            files = ", ".join(" or ".join(names) for names in wanted if names not in OPTIONAL)
            page = f"{HUB}/{'datasets/' if repo_type == 'dataset' else ''}{repo}"
            raise FetchError(
                file=folder, found=f"could not fetch {repo} from {os.getenv('HF_ENDPOINT', HUB)}: {_reason(error)}",
                expected=f"{files} in this folder: run the same command again, or put them there by hand from {page}",
            ) from error
    log(f"{repo} at {revision[:12]} -> {folder}")
    for source in found:
        log(f"{source.name}: {source.stat().st_size / 1e6:,.1f} MB, {_verify(repo, source)}")
        _install(source, folder, log)


def _find(repo: str, repo_type: str, names: tuple, revision: str, log: Callable) -> tuple[Path, bool]:
    """The first of `names` in the Hugging Face cache, else on the hub; and whether it was downloaded into the cache."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    # Imported here, because the import reads HF_ENDPOINT and fails if it is malformed.
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import RemoteEntryNotFoundError
    for name in names:
        cached = try_to_load_from_cache(repo, name, repo_type=repo_type, revision=revision)
        if isinstance(cached, str):                  # otherwise None, or a marker for a file that the hub lacks
            return Path(cached), False
    with _warnings_to(log):
        for name in names:
            with suppress(RemoteEntryNotFoundError):
                return Path(hf_hub_download(repo, name, repo_type=repo_type, revision=revision)), True
    raise LookupError(f"404, the repository has no {' or '.join(names)}")


@contextmanager
def _warnings_to(log: Callable) -> Iterator[None]:
    """Send huggingface_hub's messages about retries to `log`, and turn its warning of a full disk into an error."""
    logger, handler = logging.getLogger("huggingface_hub"), logging.Handler()
    handler.emit = lambda record: log(record.getMessage())
    before, logger.handlers = logger.handlers, [handler]
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="Not enough free disk space")
            yield
    finally:
        logger.handlers = before


def _reason(error: Exception) -> str:
    error = error.__cause__ or error                 # for a file that is not cached, the cause is the network error
    if response := getattr(error, "response", None):
        return f"{response.status_code} {response.reason_phrase}{HINTS.get(response.status_code, '')}"
    return f"{type(error).__name__}: {str(error).strip()}".splitlines()[0][:300]


def _install(source: Path, folder: Path, log: Callable) -> None:
    """Copy a file into `folder`, a pytorch_model.bin as model.safetensors. An existing file is kept."""
    target = folder / source.name.replace("pytorch_model.bin", "model.safetensors")
    if os.path.lexists(target):
        log(f"{target}: created during the download, and kept")
    elif target.name != source.name:
        convert_bin(source, target)
        log(f"{target}: converted from {source}")
    else:
        with atomic_write(target) as temporary:
            shutil.copyfile(source, temporary)


def _verify(repo: str, path: Path) -> str:
    """Compare a file with its published hash (huggingface_hub compares only sizes); returns the kind of hash.

    In the cache a file is a link whose target is named by the hash: sha256 for large files, git's blob sha1 for small.
    """
    published = KNOWN_SHA256.get((repo, path.name)) or (Path(os.readlink(path)).name if path.is_symlink() else "")
    if len(published) == 64:
        kind, found = "sha256", sha256_of(path)
    elif len(published) == 40:
        content = path.read_bytes()
        kind, found = "git sha1", hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    else:                                            # on Windows, where the cache has no links
        return "only its size verified: no hash given"
    if found != published:
        raise InputError(file=path.resolve(), found=f"wrong checksum of {path.name}, {kind} {found}",
                         expected=f"{published}, as published; remove this file and run the same command again")
    return f"{kind} verified"


def main(arguments: list[str] | None = None) -> int:
    def body() -> None:
        parser = ArgumentParser(prog="python -m minipref.hub", description="Fetch published weights and data.")
        parser.add_argument("what", choices=("weights", "data"))
        parser.add_argument("--repo", help=f"the repository on the hub (default: {WEIGHTS_REPO} or {DATA_REPO})")
        parser.add_argument("--folder", help=f"where to put the files (default: {WEIGHTS_FOLDER} or {DATA_FOLDER})")
        options = parser.parse_args(arguments)
        given = {name: value for name in ("repo", "folder") if (value := getattr(options, name)) is not None}
        (fetch_weights if options.what == "weights" else fetch_data)(**given, log=partial(print, flush=True))

    return run_program("hub", body)


if __name__ == "__main__":
    sys.exit(main())
