"""Fetching from a fake hub on the loopback interface, without network.

Retries, tokens and the cache are tested by huggingface_hub. These tests cover how minipref uses them.
"""

import hashlib
import io
import itertools
import os
import pickle
import shutil
import socket
import subprocess
import sys
import threading
import warnings
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from conftest import ROOT
from huggingface_hub import constants
from safetensors import safe_open
from safetensors.torch import load_file, save

from minipref import hub
from minipref.runtime import InputError

REPO, DATA = "someone/deberta-v3-tiny", "someone/preferences"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
CSV = b"id,prompt,response_a,response_b\n" + b"1,\"[\\\"hi\\\"]\",a,b\n" * 20_000


def state_dict() -> dict[str, torch.Tensor]:
    """A few tensors under the published names, in float16 as published."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"deberta.embeddings.word_embeddings.weight": (400, 64), "deberta.embeddings.LayerNorm.weight": (64,),
              "deberta.encoder.rel_embeddings.weight": (16, 64), "lm_predictions.lm_head.bias": (400,),
              "deberta.encoder.layer.0.attention.self.query_proj.weight": (64, 64)}
    return {name: torch.randn(shape, generator=generator).half() for name, shape in shapes.items()}


def saved(value: object, **options) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    return buffer.getvalue()


def published_hash(content: bytes, large: bool) -> str:
    """The hub's ETag: sha256 of a large file, git's blob sha1 of a small one."""
    return (hashlib.sha256(content) if large else hashlib.sha1(b"blob %d\0" % len(content) + content)).hexdigest()


OPTIONAL = {"tokenizer_config.json", "added_tokens.json", "special_tokens_map.json"}
LARGE = {"model.safetensors", "pytorch_model.bin", "spm.model", "train.csv"}


class Handler(BaseHTTPRequestHandler):
    """The routes of the hub that fetching uses, and the storage host to which large files are redirected."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        return

    def do_HEAD(self):
        self.answer()

    def do_GET(self):
        self.answer()

    def answer(self):
        served = self.server.served
        repo, _, rest = self.path.lstrip("/").partition("/resolve/")
        stored = self.path.startswith("/storage/")
        revision, name = rest.split("/") if not stored else ("", "")
        if stored:
            repo, name = self.path.removeprefix("/storage/").split("//")
        served.log.append((self.command, name, revision))
        served.on_request(self.command, name)
        content = served.repos.get(repo, {}).get(name)
        fault = next(served.faults.get((self.command, name), iter(())), {})
        if "status" in fault:
            return self.reply(fault["status"], {}, b"refused, at some length")
        if repo not in served.repos:
            return self.reply(401, {"X-Error-Code": "RepoNotFound"}, b"")
        if content is None:
            return self.reply(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT}, b"")
        headers = {}
        if not fault.get("not a hub"):
            headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{published_hash(content, name in LARGE)}"'}
        if name in LARGE and not stored:
            port = self.server.server_address[1]
            headers |= {"X-Linked-Size": str(len(content)),
                        "Location": f"http://localhost:{port}/storage/{repo}//{name}"}
            return self.reply(302, headers, b"")
        return self.reply(200, headers, fault.get("content", content))

    def reply(self, status: int, headers: dict, body: bytes):
        self.send_response(status)
        for key, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


class Served:
    """The files of a test's hub, its simulated failures, and the log of requests."""

    def __init__(self):
        self.repos = {REPO: {"config.json": b'{"model_type": "deberta-v2"}', "spm.model": b"\x00pieces" * 3000,
                             "tokenizer_config.json": b"{}", "added_tokens.json": b"{}",
                             "special_tokens_map.json": b"{}", "model.safetensors": save(state_dict())},
                      f"datasets/{DATA}": {"train.csv": CSV}}
        self.faults: dict[tuple[str, str], object] = {}
        self.log: list[tuple] = []      # (method, file, revision) of every request
        self.on_request = lambda method, name: None

    def fail(self, method: str, name: str, *faults: dict, forever: bool = False):
        self.faults[method, name] = itertools.repeat(faults[0]) if forever else iter(faults)

    def only_a_bin(self, **options) -> dict[str, bytes]:
        """Gives the repository a .bin and no safetensors, like microsoft/deberta-v3-small."""
        files = self.repos[REPO]
        del files["model.safetensors"]
        files["pytorch_model.bin"] = saved(state_dict(), **options)
        return files


@pytest.fixture
def server(monkeypatch, tmp_path):
    """A hub with one encoder and one data set, huggingface_hub pointed at it, and an empty cache."""
    served = Served()
    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.served, http.daemon_threads = served, True
    thread = threading.Thread(target=http.serve_forever, args=(.02,), daemon=True)
    thread.start()
    served.url = f"http://127.0.0.1:{http.server_address[1]}"
    point_at(served.url, monkeypatch)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "home" / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "home" / "token"))
    monkeypatch.setattr("time.sleep", lambda seconds: None)          # huggingface_hub's pauses between retries
    huggingface_hub.close_session()
    yield served
    huggingface_hub.close_session()
    http.shutdown()
    http.server_close()
    thread.join(5)


def point_at(url: str, monkeypatch):
    """As HF_ENDPOINT does, which huggingface_hub reads when it is imported."""
    monkeypatch.setenv("HF_ENDPOINT", url)
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")


def cached(home: Path, repo: str, files: dict[str, bytes]) -> Path:
    """Fill the cache in `home` as another program, such as transformers, would."""
    folder = home / "hub" / f"models--{repo.replace('/', '--')}"
    for name in ("blobs", "refs", f"snapshots/{COMMIT}"):
        (folder / name).mkdir(parents=True)
    (folder / "refs" / "main").write_text(COMMIT)
    for name, content in files.items():
        digest = published_hash(content, name in LARGE)
        (folder / "blobs" / digest).write_bytes(content)
        (folder / "snapshots" / COMMIT / name).symlink_to(f"../../blobs/{digest}")
    return folder


def command(*arguments: str | Path, home: Path, **environment: str) -> subprocess.CompletedProcess:
    """`python -m minipref.hub ...` in a separate process."""
    environment = os.environ | {"HF_HUB_OFFLINE": "0", "HF_HOME": str(home)} | environment
    return subprocess.run([sys.executable, "-m", "minipref.hub", *map(str, arguments)], cwd=ROOT, text=True,
                          capture_output=True, timeout=120, env=environment)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} if folder.exists() else set()


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def same_tensors(found: dict, expected: dict):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


def refusal(call, *arguments, error: type[Exception] = InputError) -> str:
    """The message of a failing call."""
    with pytest.raises(error) as caught:
        call(*arguments)
    line = str(caught.value)
    assert "\n" not in line
    return line


# What is fetched -----------------------------------------------------------------------------------------------------

def test_a_repository_with_safetensors_arrives_whole_and_is_not_fetched_twice(server, tmp_path, capsys):
    folder = tmp_path / "mit Leerzeichen, 模型"
    assert hub.fetch_weights(REPO, folder) == folder
    assert contents(folder) == server.repos[REPO]
    out = capsys.readouterr().out
    assert "model.safetensors: 0.1 MB, sha256 verified" in out and "config.json: 0.0 MB, git sha1 verified" in out

    server.log.clear()
    hub.fetch_weights(REPO, folder)
    assert not server.log and capsys.readouterr().out == (
        f"{folder}: config.json, spm.model, model.safetensors, tokenizer_config.json, added_tokens.json, "
        f"special_tokens_map.json kept, not fetched from {REPO}\n")


def test_all_files_come_from_one_commit(server, tmp_path):
    hub.fetch_weights(REPO, tmp_path / "weights")
    assert {name for _, name, revision in server.log if revision == "main"} == {"config.json"}
    assert {revision for _, name, revision in server.log if name == "spm.model"} == {COMMIT, ""}    # "": the storage


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_repository_with_only_a_bin_is_converted_once_bit_for_bit(server, tmp_path, zipped):
    server.only_a_bin(_use_new_zipfile_serialization=zipped)
    folder = tmp_path / "weights"
    hub.fetch_weights(REPO, folder)
    assert names(folder) == {"config.json", "spm.model", "model.safetensors", *OPTIONAL}
    same_tensors(load_file(folder / "model.safetensors"), state_dict())
    server.log.clear()
    hub.fetch_weights(REPO, folder)
    assert not server.log


@pytest.mark.parametrize("optional", sorted(OPTIONAL))
def test_a_repository_without_an_optional_file_is_complete_and_the_log_says_so(server, tmp_path, capsys, optional):
    del server.repos[REPO][optional]
    hub.fetch_weights(REPO, tmp_path / "weights")
    assert contents(tmp_path / "weights") == server.repos[REPO]
    assert f"{optional} was not fetched, and most encoders need none: " in capsys.readouterr().out


@pytest.mark.parametrize("optional", sorted(OPTIONAL))
def test_a_network_that_fails_at_an_optional_file_leaves_no_encoder_without_it(server, tmp_path, capsys, optional):
    server.fail("HEAD", optional, {"status": 503}, forever=True)
    line = refusal(hub.fetch_weights, REPO, tmp_path / "weights", error=hub.FetchError)
    assert "503 Service Unavailable" in line and "run the same command again" in line
    assert names(tmp_path / "weights") == set()
    hub.fetch_weights(REPO, tmp_path / "weights")                  # all that is required is in the cache: good enough
    assert optional not in names(tmp_path / "weights")
    assert f"{optional} was not fetched" in capsys.readouterr().out


def test_the_data_set_arrives_under_its_own_name(server, tmp_path, capsys):
    assert hub.fetch_data(DATA, tmp_path / "data") == tmp_path / "data" / "train.csv"
    assert contents(tmp_path / "data") == {"train.csv": CSV}
    assert capsys.readouterr().out.splitlines() == [f"{DATA} at {COMMIT[:12]} -> {tmp_path / 'data'}",
                                                    "train.csv: 0.3 MB, sha256 verified"]
    server.log.clear()
    hub.fetch_data(DATA, tmp_path / "data")
    assert not server.log
    assert capsys.readouterr().out == (
        f"{tmp_path / 'data' / 'train.csv'}: kept, not fetched from {DATA}\n")


def test_a_bin_put_there_by_hand_is_converted_without_a_network(server, tmp_path):
    files = server.only_a_bin()
    for name in ("config.json", "spm.model", "pytorch_model.bin"):
        (tmp_path / name).write_bytes(files[name])
    hub.fetch_weights(REPO, tmp_path)
    assert not server.log and names(tmp_path) == {"config.json", "spm.model", "pytorch_model.bin", "model.safetensors"}
    same_tensors(load_file(tmp_path / "model.safetensors"), state_dict())


def test_files_put_there_by_hand_are_kept_and_only_the_rest_is_fetched(server, tmp_path):
    folder = tmp_path / "weights"
    folder.mkdir()
    (folder / "config.json").write_text("mine")
    torch.save(state_dict(), folder / "pytorch_model.bin")
    hub.fetch_weights(REPO, folder)
    assert (folder / "config.json").read_text() == "mine"
    assert {name for _, name, _ in server.log} == {"spm.model", *OPTIONAL}
    same_tensors(load_file(folder / "model.safetensors"), state_dict())


def test_a_file_put_there_during_the_download_is_kept(server, tmp_path, capsys):
    folder = tmp_path / "weights"

    def put(method, name):
        if (method, name) == ("GET", "spm.model"):
            folder.mkdir()
            (folder / "config.json").write_text("mine")
            (folder / "model.safetensors").write_text("mine too")

    server.on_request = put
    hub.fetch_weights(REPO, folder)
    assert contents(folder) == server.repos[REPO] | {"config.json": b"mine", "model.safetensors": b"mine too"}
    assert f"{folder / 'config.json'}: created during the download, and kept" in capsys.readouterr().out


def test_files_of_the_users_cache_need_no_network(server, tmp_path):
    files = server.only_a_bin()
    cached(tmp_path / "home", REPO, files)
    hub.fetch_weights(REPO, tmp_path / "weights")
    assert not server.log                                                       # not even asked for a newer commit
    same_tensors(load_file(tmp_path / "weights" / "model.safetensors"), state_dict())
    assert (tmp_path / "weights" / "spm.model").read_bytes() == files["spm.model"]


def test_the_command_uses_the_cache_offline(tmp_path):
    files = {"config.json": b"{}", "tokenizer.json": b"{}", "pytorch_model.bin": saved(state_dict())}
    cached(tmp_path / "home", REPO, files)
    done = command("weights", "--repo", REPO, "--folder", tmp_path / "w", home=tmp_path / "home", HF_HUB_OFFLINE="1")
    assert (done.returncode, done.stderr) == (0, "")
    assert names(tmp_path / "w") == {"config.json", "tokenizer.json", "model.safetensors"}
    assert "tokenizer_config.json was not fetched" in done.stdout and "HF_HUB_OFFLINE" in done.stdout


def test_importing_minipref_does_not_touch_the_environment():
    code = "import minipref, os, sys; there = 'minipref.hub' in sys.modules; import minipref.hub; " \
           "sys.exit(there or 'HF_HUB_DISABLE_TELEMETRY' in os.environ)"
    environment = {key: value for key, value in os.environ.items() if key != "HF_HUB_DISABLE_TELEMETRY"}
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, check=True, timeout=120)


def test_the_published_vocabulary_passes_its_checksum(server, tmp_path, reference_dir):
    real = (reference_dir / "deberta-v3-small" / "spm.model").read_bytes()
    server.repos[hub.WEIGHTS_REPO] = server.repos[REPO] | {"spm.model": real}
    hub.fetch_weights(hub.WEIGHTS_REPO, tmp_path / "weights")
    assert (tmp_path / "weights" / "spm.model").read_bytes() == real


# What cannot be fetched ----------------------------------------------------------------------------------------------

def test_a_passing_server_error_is_tried_again_and_logged(server, tmp_path, capsys):
    server.fail("HEAD", "train.csv", {"status": 503}, {"status": 502})
    hub.fetch_data(DATA, tmp_path / "data")
    assert contents(tmp_path / "data") == {"train.csv": CSV}
    out, err = capsys.readouterr()
    assert "HTTP Error 502 thrown" in out and "[Retry 1/5]" in out and err == ""


@pytest.mark.parametrize(("status", "hint"), [
    (401, "401 Unauthorized (no such repository, or one that needs a login: set HF_TOKEN)"),
    (403, "403 Forbidden (accept the repository's terms on its page, then set HF_TOKEN)"),
    (404, "404 Not Found (no such repository)"), (503, "503 Service Unavailable")])
@pytest.mark.parametrize("method", ["HEAD", "GET"])
def test_a_refusal_says_why_and_what_to_put_where(server, tmp_path, method, status, hint):
    server.fail(method, "train.csv", {"status": status}, forever=True)
    line = refusal(hub.fetch_data, DATA, tmp_path / "data", error=hub.FetchError)
    assert line.startswith(f"{tmp_path / 'data'}: could not fetch {DATA} from {server.url}: {hint}; expected train.csv")
    assert f"by hand from {hub.HUB}/datasets/{DATA}" in line and names(tmp_path / "data") == set()


def test_an_unknown_repository_ends_in_one_line_with_what_to_do(server, tmp_path):
    line = refusal(hub.fetch_weights, "nobody/nothing", tmp_path / "weights", error=hub.FetchError)
    assert "401 Unauthorized (no such repository" in line and f"by hand from {hub.HUB}/nobody/nothing" in line
    assert "config.json, spm.model or tokenizer.json, model.safetensors or pytorch_model.bin in this folder" in line


def test_a_repository_without_the_file_ends_in_one_line(server, tmp_path):
    del server.repos[REPO]["model.safetensors"]
    line = refusal(hub.fetch_weights, REPO, tmp_path / "weights", error=hub.FetchError)
    assert "404, the repository has no model.safetensors or pytorch_model.bin" in line
    assert names(tmp_path / "weights") == set()


def test_something_that_is_not_a_hub_is_recognised(server, tmp_path):
    server.fail("HEAD", "config.json", {"not a hub": True}, forever=True)
    line = refusal(hub.fetch_weights, REPO, tmp_path / "weights", error=hub.FetchError)
    assert "does not seem to be served by a Hugging Face Hub endpoint" in line


def test_no_network_ends_in_one_line(server, tmp_path, monkeypatch):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}"
        point_at(url, monkeypatch)
        line = refusal(hub.fetch_weights, REPO, tmp_path / "weights", error=hub.FetchError)
    assert f"from {url}: ConnectError: " in line and "refused" in line


def test_offline_mode_is_named(server, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    line = refusal(hub.fetch_data, DATA, tmp_path / "data", error=hub.FetchError)
    assert "HF_HUB_OFFLINE" in line and not server.log


@pytest.mark.parametrize("repo", ["", "a/b/c", "with space/x", "../up"])
def test_a_name_that_is_no_repository_is_refused(server, tmp_path, repo):
    assert "HFValidationError: Repo id must" in refusal(hub.fetch_data, repo, tmp_path / "data", error=hub.FetchError)
    assert not server.log


@pytest.mark.parametrize("content", [CSV[:-1] + b"!", CSV[:-1], CSV + b"1", b"<html>Please log in</html>"],
                         ids=["other", "shorter", "longer", "page"])
def test_wrong_bytes_never_get_the_name(server, tmp_path, content):
    server.fail("GET", "train.csv", {"content": content}, forever=True)
    line = refusal(hub.fetch_data, DATA, tmp_path / "data")
    assert names(tmp_path / "data") == set()
    server.faults.clear()
    if len(content) == len(CSV):
        assert "wrong checksum of train.csv, sha256" in line and "remove this file" in line
        Path(line.partition(": wrong checksum")[0]).unlink()                    # as the message advises
    else:
        assert "Consistency check failed" in line
    hub.fetch_data(DATA, tmp_path / "data")
    assert contents(tmp_path / "data") == {"train.csv": CSV}


def test_a_damaged_small_file_of_the_cache_is_noticed(server, tmp_path):
    folder = cached(tmp_path / "home", REPO, server.repos[REPO])
    (folder / "snapshots" / COMMIT / "config.json").write_bytes(b'{"model_type": "deberta-v3"}')
    assert "wrong checksum of config.json, git sha1" in refusal(hub.fetch_weights, REPO, tmp_path / "weights")
    assert names(tmp_path / "weights") == set()


def test_a_cache_without_links_is_used_and_the_log_says_what_was_not_verified(server, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_SYMLINKS", True)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_SYMLINKS_WARNING", True)
    hub.fetch_data(DATA, tmp_path / "data")
    assert contents(tmp_path / "data") == {"train.csv": CSV}
    assert "train.csv: 0.3 MB, only its size verified: no hash given" in capsys.readouterr().out


def test_another_vocabulary_is_refused_for_the_published_weights(server, tmp_path):
    server.repos[hub.WEIGHTS_REPO] = files = server.repos[REPO]
    fetched, by_hand = tmp_path / "fetched", tmp_path / "by hand"
    known = hub.KNOWN_SHA256[hub.WEIGHTS_REPO, "spm.model"]
    line = refusal(hub.fetch_weights, hub.WEIGHTS_REPO, fetched)
    assert "wrong checksum of spm.model" in line and known in line and "spm.model" not in names(fetched)

    by_hand.mkdir()
    for name, content in files.items():
        (by_hand / name).write_bytes(content)
    line = refusal(hub.fetch_weights, hub.WEIGHTS_REPO, by_hand)
    assert line.startswith(f"{by_hand / 'spm.model'}: wrong checksum") and contents(by_hand) == files


def test_too_little_room_is_noticed_before_anything_moves(server, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with warnings.catch_warnings(action="ignore"):                              # pytest makes every warning an error
        line = refusal(hub.fetch_data, DATA, tmp_path / "data", error=hub.FetchError)
    assert "Not enough free disk space" in line and not [log for log in server.log if log[0] == "GET"]


# The converter -------------------------------------------------------------------------------------------------------

class Hostile:
    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch '{self.marker}'",)


@pytest.mark.parametrize("form", ["zip", "legacy", "bare pickle"])
def test_a_hostile_pickle_is_refused_and_never_run(server, tmp_path, form):
    marker = tmp_path / "executed"
    value = state_dict() | {"deberta.x": Hostile(marker)}
    hostile = (pickle.dumps(value) if form == "bare pickle"
               else saved(value, _use_new_zipfile_serialization=form == "zip"))
    server.only_a_bin()["pytorch_model.bin"] = hostile
    line = refusal(hub.fetch_weights, REPO, tmp_path / "weights")
    assert "refused" in line and "expected a state dict" in line
    assert not marker.exists() and "model.safetensors" not in names(tmp_path / "weights")
    # The bait is real: a loader that runs what a pickle asks for takes it.
    if form == "bare pickle":
        pickle.loads(hostile)
    else:
        torch.load(io.BytesIO(hostile), weights_only=False)
    assert marker.exists()


@pytest.mark.parametrize("value", [[torch.zeros(2)], {}, {"a": 1}, {1: torch.zeros(2)}, {"a": {"b": torch.zeros(2)}},
                                   {"a": torch.eye(2).to_sparse()}, {"a": torch.zeros(2, device="meta")}],
                         ids=["list", "empty", "number", "number as name", "nested", "sparse", "meta"])
def test_what_is_not_a_flat_dict_of_dense_tensors_is_refused(tmp_path, value):
    torch.save(value, tmp_path / "in.bin")
    assert "expected a state dict" in refusal(hub.convert_bin, tmp_path / "in.bin", tmp_path / "out.safetensors")
    assert names(tmp_path) == {"in.bin"}


def test_a_bin_cut_anywhere_is_refused(tmp_path):
    whole = saved(state_dict())
    for sixteenth in range(16):
        (tmp_path / "in.bin").write_bytes(whole[:len(whole) * sixteenth // 16])
        refusal(hub.convert_bin, tmp_path / "in.bin", tmp_path / "out.safetensors")
    assert "no such file" in refusal(hub.convert_bin, tmp_path / "none.bin", tmp_path / "out.safetensors")
    assert names(tmp_path) == {"in.bin"}


def test_shared_and_strided_tensors_are_written_out_one_by_one(tmp_path):
    table = torch.arange(24.).reshape(4, 6).half()
    state = {"a": table, "b": table, "row": table[1], "turned": table.T, "int": torch.arange(3), "none": table[:0]}
    torch.save(state, tmp_path / "in.bin")
    hub.convert_bin(tmp_path / "in.bin", tmp_path / "out.safetensors")
    same_tensors(load_file(tmp_path / "out.safetensors"), state)


def test_the_converted_file_says_it_comes_from_torch(tmp_path):
    torch.save(state_dict(), tmp_path / "in.bin")
    hub.convert_bin(tmp_path / "in.bin", tmp_path / "out.safetensors")
    with safe_open(tmp_path / "out.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_a_conversion_without_room_leaves_nothing_half_done(small_disk, tmp_path):
    disk = small_disk("128k")
    torch.save({"w": torch.zeros(100_000)}, tmp_path / "model.bin")
    assert "No space" in refusal(hub.convert_bin, tmp_path / "model.bin", disk / "model.safetensors", error=OSError)
    assert names(disk) == set()


# The command line ----------------------------------------------------------------------------------------------------

def test_the_command_fetches_quietly_and_fails_in_one_line_with_exit_code_2(server, tmp_path):
    arguments = ["data", "--repo", DATA, "--folder", tmp_path / "my data"]
    done = command(*arguments, home=tmp_path / "home")
    assert done.returncode == 0, done.stderr
    assert done.stderr == "" and contents(tmp_path / "my data") == {"train.csv": CSV}
    assert f"train.csv: {len(CSV) / 1e6:.1f} MB, sha256 verified" in done.stdout

    failed = command("weights", home=tmp_path / "home", HF_ENDPOINT="http://host:port")
    assert failed.returncode == 2 and failed.stderr.count("\n") == 1
    assert f"could not fetch {hub.WEIGHTS_REPO} from http://host:port: " in failed.stderr and hub.HUB in failed.stderr


def test_wrong_arguments_and_a_folder_that_cannot_be_written_are_one_line(server, tmp_path, capsys):
    (tmp_path / "file").write_text("no folder")
    for code, arguments in ((2, ["weigths"]), (2, []), (2, ["data", "--folders", "x"]),
                            (1, ["data", "--repo", DATA, "--folder", str(tmp_path / "file" / "data")])):
        assert hub.main(arguments) == code
        assert capsys.readouterr().err.count("\n") == 1


def test_an_interrupted_command_says_so(server, tmp_path, monkeypatch, capsys):
    def interrupt(*_, **__):
        raise KeyboardInterrupt
    monkeypatch.setattr(huggingface_hub.file_download, "http_get", interrupt)
    assert hub.main(["data", "--repo", DATA, "--folder", str(tmp_path / "data")]) == 130
    assert capsys.readouterr().err == "hub: interrupted\n"
    assert names(tmp_path / "data") == set()
