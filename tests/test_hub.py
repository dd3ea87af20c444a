"""Fetching, against a hub that the test serves itself on the loopback interface: no test here leaves the machine."""

import gzip
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
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save

from minipref import hub
from minipref.errors import InputError

ROOT = Path(__file__).resolve().parents[1]
REPO, DATA = "someone/deberta-v3-tiny", "someone/preferences"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
CSV = b"id,prompt,response_a,response_b\n" + b"1,\"[\\\"hi\\\"]\",a,b\n" * 20_000


def state_dict() -> dict[str, torch.Tensor]:
    """A few tensors under the published names, in float16 as published."""
    made = torch.Generator().manual_seed(0)
    shapes = {"deberta.embeddings.word_embeddings.weight": (400, 64), "deberta.embeddings.LayerNorm.weight": (64,),
              "deberta.encoder.rel_embeddings.weight": (16, 64), "lm_predictions.lm_head.bias": (400,),
              "deberta.encoder.layer.0.attention.self.query_proj.weight": (64, 64)}
    return {name: torch.randn(shape, generator=made).half() for name, shape in shapes.items()}


def saved(value: object, folder: Path, **options) -> bytes:
    path = folder / "saved.bin"
    torch.save(value, path, **options)
    data = path.read_bytes()
    path.unlink()
    return data


class Handler(BaseHTTPRequestHandler):
    """The few routes of the hub that fetching uses, and the storage host that its large files are redirected to."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        return

    def do_HEAD(self):
        self.answer(head=True)

    def do_GET(self):
        self.answer(head=False)

    def answer(self, head: bool):
        served = self.server.served
        repo, _, rest = self.path.lstrip("/").partition("/resolve/")
        stored = self.path.startswith("/storage/")
        repo, name = self.path.removeprefix("/storage/").split("//") if stored else (repo, rest.partition("/")[2])
        if stored or head:
            served.log.append((self.command, name, self.headers.get("Range")))
        served.tokens.append((stored, self.headers.get("Authorization")))
        served.encodings.add(self.headers.get("Accept-Encoding"))
        if not stored:
            served.revisions.append(rest.partition("/")[0])
        content = served.repos.get(repo, {}).get(name)
        large = name in served.large
        # A fault belongs to the request that brings the answer: the HEAD, or the GET of the bytes.
        fault = served.next_fault(self.command, name) if head or stored or not large else None
        if not stored and not head and not large:
            served.log.append((self.command, name, self.headers.get("Range")))
        if fault and "status" in fault:
            return self.reply(fault["status"], fault.get("headers", {}), b"refused, at some length", head)
        if repo not in served.repos:
            return self.reply(401, {"X-Error-Code": "RepoNotFound"}, b"", head)
        if content is None:
            return self.reply(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT}, b"", head)
        if fault and fault.get("hang"):
            served.released.wait(20)
            return None
        digest = (hashlib.sha256(content) if large else hashlib.sha1(b"blob %d\0" % len(content) + content)).hexdigest()
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{digest}"'} if not (fault and fault.get("bare")) else {}
        if large and not stored:
            port = self.server.server_address[1]
            headers |= {"X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(len(content)),
                        "Location": f"http://localhost:{port}/storage/{repo}//{name}"}
            return self.reply(302, headers, b"", head)
        return self.send_content(content, headers, head, fault or {})

    def send_content(self, content: bytes, headers: dict, head: bool, fault: dict):
        content = fault.get("content", content)
        start, status = 0, 200
        if (asked := self.headers.get("Range")) and not fault.get("no_range"):
            start = int(asked.removeprefix("bytes=").rstrip("-")) + fault.get("shift", 0)
            status, headers = 206, headers | {"Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"}
        body = content[start:]
        if fault.get("gzip"):
            body, headers = gzip.compress(body), headers | {"Content-Encoding": "gzip"}
        self.reply(status, headers, body, head, cut=fault.get("cut"), length=not fault.get("no_length"))

    def reply(self, status: int, headers: dict, body: bytes, head: bool, cut: int | None = None, length: bool = True):
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header(*(("Content-Length", str(len(body))) if length else ("Connection", "close")))
        self.end_headers()
        if not head:
            self.wfile.write(body[:cut])
        self.close_connection |= cut is not None and not head


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request, client_address):
        """A client that hangs up on us is what some tests are about; anything else is a fault of the test."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class Served:
    """What the hub of a test holds, what it is told to do wrong, and what was asked of it."""

    def __init__(self):
        self.repos: dict[str, dict[str, bytes]] = {}
        self.large = {"model.safetensors", "pytorch_model.bin", "spm.model", "train.csv"}
        self.faults: dict[tuple[str, str], object] = {}
        self.log: list[tuple] = []      # (method, file, Range) of every HEAD, and of every GET that brings bytes
        self.tokens: list[tuple] = []   # (asked of the storage host?, Authorization) of every request
        self.encodings, self.revisions = set(), []
        self.released = threading.Event()
        self.lock = threading.Lock()

    def next_fault(self, method: str, name: str) -> dict | None:
        with self.lock:
            return next(self.faults.get((method, name), iter(())), None)

    def fail(self, method: str, name: str, *faults: dict, forever: bool = False):
        self.faults[method, name] = itertools.repeat(faults[0]) if forever else iter(faults)

    def gets(self, name: str) -> list:
        return [asked for method, served, asked in self.log if (method, served) == ("GET", name)]


@pytest.fixture
def server(monkeypatch):
    """A hub with one encoder and one data set; `minipref.hub` is pointed at it and naps without sleeping."""
    served = Served()
    served.repos[REPO] = {"config.json": b'{"model_type": "deberta-v2"}', "spm.model": b"\x00pieces" * 3000,
                          "tokenizer_config.json": b"{}", "model.safetensors": save(state_dict())}
    served.repos[f"datasets/{DATA}"] = {"train.csv": CSV}
    http = Server(("127.0.0.1", 0), Handler)
    http.served = served
    thread = threading.Thread(target=http.serve_forever, args=(.02,), daemon=True)
    thread.start()
    served.url = f"http://127.0.0.1:{http.server_address[1]}"
    served.naps = []
    monkeypatch.setenv("HF_ENDPOINT", served.url)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "time", SimpleNamespace(sleep=served.naps.append))
    huggingface_hub.close_session()
    yield served
    served.released.set()
    huggingface_hub.close_session()
    http.shutdown()
    http.server_close()
    thread.join(5)


def command(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess:
    """`python -m minipref.hub ...` in a process of its own."""
    return subprocess.run([sys.executable, "-m", "minipref.hub", *map(str, arguments)], cwd=ROOT, text=True,
                          capture_output=True, timeout=120, env=os.environ | {"HF_HUB_OFFLINE": "0"} | environment)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} if folder.exists() else set()


def refusal(call, *arguments) -> str:
    """The one line a failing call ends in."""
    with pytest.raises(InputError) as caught:
        call(*arguments)
    line = str(caught.value)
    assert "\n" not in line
    return line


# What works ----------------------------------------------------------------------------------------------------------

def test_a_repository_with_safetensors_arrives_whole_and_is_not_fetched_twice(server, tmp_path, capsys):
    folder = tmp_path / "mit Leerzeichen, 模型"
    assert hub.fetch_weights(REPO, folder) == folder
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == server.repos[REPO]
    assert server.revisions == ["main"] + [COMMIT] * 7   # 4 looked up, 4 fetched: all at one commit
    said = capsys.readouterr().out
    assert "model.safetensors: 0.1 MB, sha256 verified" in said and "config.json: 0.0 MB, git sha1 verified" in said

    asked = len(server.log)
    hub.fetch_weights(REPO, folder)
    assert len(server.log) == asked and "nothing to fetch" in capsys.readouterr().out


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_repository_with_only_a_bin_is_converted_once_bit_for_bit(server, tmp_path, zipped):
    files = server.repos[REPO]
    del files["model.safetensors"]
    files["pytorch_model.bin"] = saved(state_dict(), tmp_path, _use_new_zipfile_serialization=zipped)
    folder = tmp_path / "weights"
    hub.fetch_weights(REPO, folder)
    assert names(folder) == {"config.json", "spm.model", "tokenizer_config.json", "model.safetensors"}
    same_tensors(load_file(folder / "model.safetensors"), state_dict())
    hub.fetch_weights(REPO, folder)
    assert len(server.gets("pytorch_model.bin")) == 1


def same_tensors(found: dict, expected: dict):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


def test_the_data_set_arrives_under_its_own_name(server, tmp_path):
    assert hub.fetch_data(DATA, tmp_path / "data") == tmp_path / "data" / "train.csv"
    assert (tmp_path / "data" / "train.csv").read_bytes() == CSV and names(tmp_path / "data") == {"train.csv"}


def test_files_put_there_by_hand_are_kept_and_only_the_rest_is_fetched(server, tmp_path):
    (tmp_path / "config.json").write_text("mine")
    torch.save(state_dict(), tmp_path / "pytorch_model.bin")
    hub.fetch_weights(REPO, tmp_path)
    assert (tmp_path / "config.json").read_text() == "mine"
    assert {name for _, name, _ in server.log} == {"spm.model", "tokenizer_config.json"}
    same_tensors(load_file(tmp_path / "model.safetensors"), state_dict())
    assert (tmp_path / "pytorch_model.bin").is_file()


def test_a_bin_put_there_by_hand_is_converted_without_a_network(server, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    for name in ("config.json", "spm.model", "tokenizer_config.json"):
        (tmp_path / name).write_bytes(server.repos[REPO][name])
    torch.save(state_dict(), tmp_path / "pytorch_model.bin")
    hub.fetch_weights(REPO, tmp_path)
    same_tensors(load_file(tmp_path / "model.safetensors"), state_dict())


def test_two_runs_at_once_fetch_each_file_once(server, tmp_path):
    runs = [threading.Thread(target=hub.fetch_weights, args=(REPO, tmp_path / "weights")) for _ in range(3)]
    for run in runs:
        run.start()
    for run in runs:
        run.join(30)
    assert {path.name: path.read_bytes() for path in (tmp_path / "weights").iterdir()} == server.repos[REPO]
    assert all(len(server.gets(name)) == 1 for name in server.repos[REPO])


def test_importing_minipref_does_not_touch_the_environment():
    code = "import minipref, os, sys; " \
           "sys.exit('minipref.hub' in sys.modules or 'HF_HUB_DISABLE_TELEMETRY' in os.environ)"
    environment = {key: value for key, value in os.environ.items() if key != "HF_HUB_DISABLE_TELEMETRY"}
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, check=True, timeout=120)


def test_the_token_goes_to_the_hub_and_not_to_where_it_redirects(server, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    hub.fetch_data(DATA, tmp_path)
    assert set(server.tokens) == {(False, "Bearer hf_secret"), (True, None)}


def test_the_published_vocabulary_passes_its_checksum(server, tmp_path):
    reference = os.environ.get("MINIPREF_REFERENCE_DIR")
    if not reference:
        pytest.skip("the real spm.model: MINIPREF_REFERENCE_DIR is not set")
    real = (Path(reference) / "deberta-v3-small" / "spm.model").read_bytes()
    server.repos[hub.WEIGHTS_REPO] = server.repos[REPO] | {"spm.model": real}
    hub.fetch_weights(hub.WEIGHTS_REPO, tmp_path / "weights")
    assert (tmp_path / "weights" / "spm.model").read_bytes() == real


# What is cut, slow or refused for a while ----------------------------------------------------------------------------

def test_a_cut_connection_goes_on_where_it_stopped(server, tmp_path):
    server.fail("GET", "train.csv", {"cut": 100_000}, {"cut": 50_000})
    hub.fetch_data(DATA, tmp_path)
    assert (tmp_path / "train.csv").read_bytes() == CSV
    assert server.gets("train.csv") == [None, "bytes=100000-", "bytes=150000-"] and server.naps == [1, 2]


def test_the_next_run_goes_on_where_a_failed_one_stopped_and_nothing_looks_fetched_before(server, tmp_path):
    server.fail("GET", "train.csv", {"cut": 100_000}, {"status": 403})
    line = refusal(hub.fetch_data, DATA, tmp_path)
    assert "403" in line and not (tmp_path / "train.csv").exists() and names(tmp_path) == {".fetching"}
    hub.fetch_data(DATA, tmp_path)
    assert server.gets("train.csv")[-1] == "bytes=100000-" and names(tmp_path) == {"train.csv"}
    assert (tmp_path / "train.csv").read_bytes() == CSV


def test_a_part_of_another_version_of_the_file_is_not_gone_on_with(server, tmp_path):
    server.fail("GET", "train.csv", {"cut": 100_000}, {"status": 403})
    refusal(hub.fetch_data, DATA, tmp_path)
    server.repos[f"datasets/{DATA}"]["train.csv"] = other = CSV.replace(b"hi", b"ho")
    hub.fetch_data(DATA, tmp_path)
    assert server.gets("train.csv")[-1] is None and (tmp_path / "train.csv").read_bytes() == other


def test_a_server_that_ignores_ranges_is_let_begin_anew(server, tmp_path):
    server.fail("GET", "train.csv", {"cut": 100_000}, {"no_range": True})
    hub.fetch_data(DATA, tmp_path)
    assert server.gets("train.csv") == [None, "bytes=100000-"] and (tmp_path / "train.csv").read_bytes() == CSV


def test_a_server_that_ignores_ranges_and_then_refuses_them_is_asked_for_the_whole(server, tmp_path):
    server.fail("GET", "train.csv", {"cut": 100_000}, {"no_range": True, "cut": 150_000}, {"status": 416})
    hub.fetch_data(DATA, tmp_path)
    assert server.gets("train.csv") == [None, "bytes=100000-", "bytes=150000-", None]
    assert (tmp_path / "train.csv").read_bytes() == CSV


def test_a_body_that_comes_compressed_is_unpacked(server, tmp_path):
    server.fail("GET", "train.csv", {"gzip": True})
    hub.fetch_data(DATA, tmp_path)
    assert (tmp_path / "train.csv").read_bytes() == CSV
    assert server.encodings == {"identity"}   # although nobody had asked for it


def test_an_interrupted_command_says_so_and_goes_on_the_next_time(server, tmp_path, monkeypatch, capsys):
    def interrupt(_seconds):
        raise KeyboardInterrupt
    monkeypatch.setattr(hub.time, "sleep", interrupt)
    server.fail("GET", "train.csv", {"cut": 100_000})
    arguments = ["data", "--repo", DATA, "--folder", str(tmp_path)]
    assert hub.main(arguments) == 130 and names(tmp_path) == {".fetching"}
    assert capsys.readouterr().err == "interrupted; the same command goes on from here\n"
    assert hub.main(arguments) == 0 and server.gets("train.csv")[-1] == "bytes=100000-"
    assert (tmp_path / "train.csv").read_bytes() == CSV


def test_a_range_that_does_not_start_where_it_should_is_refused(server, tmp_path):
    server.fail("GET", "train.csv", {"cut": 100_000}, {"shift": 7})
    assert "asked for the bytes from 100,000 on" in refusal(hub.fetch_data, DATA, tmp_path)
    assert not (tmp_path / "train.csv").exists()


def test_a_server_that_sends_too_little_forever_is_given_up(server, tmp_path):
    server.fail("GET", "train.csv", {"cut": 10}, forever=True)
    refusal(hub.fetch_data, DATA, tmp_path)
    assert len(server.gets("train.csv")) == hub.TRIES and server.naps == [1, 2, 4, 8]


def test_progress_between_cuts_renews_the_patience(server, tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "PROGRESS", 30_000)
    server.fail("GET", "train.csv", {"cut": 30_000}, forever=True)
    hub.fetch_data(DATA, tmp_path)
    assert (tmp_path / "train.csv").read_bytes() == CSV
    assert len(server.gets("train.csv")) == -(-len(CSV) // 30_000) > hub.TRIES and set(server.naps) == {1}


@pytest.mark.parametrize("method", ["HEAD", "GET"])
def test_a_passing_server_error_is_tried_again(server, tmp_path, method, capsys):
    server.fail(method, "train.csv", {"status": 503}, {"status": 502})
    hub.fetch_data(DATA, tmp_path)
    assert (tmp_path / "train.csv").read_bytes() == CSV and server.naps == [1, 2]
    assert "train.csv: 503 Service Unavailable; trying again in 1 s" in capsys.readouterr().out


@pytest.mark.parametrize("method", ["HEAD", "GET"])
def test_a_lasting_server_error_ends_in_one_line(server, tmp_path, method):
    server.fail(method, "train.csv", {"status": 503}, forever=True)
    line = refusal(hub.fetch_data, DATA, tmp_path)
    assert "503 Service Unavailable" in line and "train.csv in this folder" in line
    assert f"by hand from {hub.HUB}/datasets/{DATA}" in line
    assert server.naps == [1, 2, 4, 8] and not (tmp_path / "train.csv").exists()


@pytest.mark.parametrize("method", ["HEAD", "GET"])
def test_retry_after_is_obeyed_and_said(server, tmp_path, method, capsys):
    server.fail(method, "train.csv", {"status": 429, "headers": {"Retry-After": "17"}},
                {"status": 429, "headers": {"RateLimit": '"resolvers";r=0;t=55'}},
                {"status": 429, "headers": {"Retry-After": "soon"}})
    hub.fetch_data(DATA, tmp_path)
    assert server.naps == [17, 55, 4]
    assert "429 Too Many Requests, asking to wait 17 s; trying again in 17 s" in capsys.readouterr().out


def test_retry_after_may_be_a_date(server, tmp_path):
    date = format_datetime(datetime.now(UTC) + timedelta(seconds=100), usegmt=True)
    server.fail("HEAD", "train.csv", {"status": 429, "headers": {"Retry-After": date}})
    hub.fetch_data(DATA, tmp_path)
    assert len(server.naps) == 1 and 80 < server.naps[0] <= 100


def test_a_server_that_asks_for_an_hour_is_not_waited_for(server, tmp_path):
    server.fail("HEAD", "train.csv", {"status": 429, "headers": {"Retry-After": "3600"}})
    assert "429 Too Many Requests, asking to wait 3600 s" in refusal(hub.fetch_data, DATA, tmp_path)
    assert server.naps == []


@pytest.mark.parametrize("method,constant", [("HEAD", "HF_HUB_ETAG_TIMEOUT"), ("GET", "HF_HUB_DOWNLOAD_TIMEOUT")])
def test_a_server_that_hangs_times_out(server, tmp_path, method, constant, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, constant, .1)
    server.fail(method, "train.csv", {"hang": True}, forever=True)
    assert "too slow to answer" in refusal(hub.fetch_data, DATA, tmp_path)
    assert server.naps == [1, 2, 4, 8] and not (tmp_path / "train.csv").exists()


# What does not work, and what it ends in -----------------------------------------------------------------------------

@pytest.mark.parametrize("content", [CSV[:-1] + b"!", CSV + b"1", b"<html>Please log in</html>"],
                         ids=["other", "longer", "shorter"])
def test_wrong_bytes_never_get_the_name(server, tmp_path, content):
    server.fail("GET", "train.csv", {"content": content}, forever=True)
    line = refusal(hub.fetch_data, DATA, tmp_path)
    assert "wrong checksum" in line or "bytes come instead of 340,032" in line
    assert names(tmp_path) == set()
    server.faults.clear()
    hub.fetch_data(DATA, tmp_path)   # wrong bytes of the right length are thrown away: the next run starts clean
    assert (tmp_path / "train.csv").read_bytes() == CSV


def test_a_body_of_no_announced_length_is_counted(server, tmp_path):
    server.fail("GET", "train.csv", {"no_length": True, "cut": 100_000},
                {"no_length": True, "no_range": True, "content": CSV + b"1"})
    assert "more than the 340,032 bytes" in refusal(hub.fetch_data, DATA, tmp_path)
    assert server.gets("train.csv") == [None, "bytes=100000-"] and names(tmp_path) == set()


def test_small_files_are_held_against_gits_own_hash(server, tmp_path):
    server.fail("GET", "config.json", {"content": b'{"model_type": "deberta-v3"}'})
    assert "config.json: wrong checksum, git sha1" in refusal(hub.fetch_weights, REPO, tmp_path)


def test_another_vocabulary_is_refused_for_the_published_weights(server, tmp_path):
    server.repos[hub.WEIGHTS_REPO] = server.repos[REPO]
    assert "spm.model: wrong checksum" in refusal(hub.fetch_weights, hub.WEIGHTS_REPO, tmp_path / "fetched")
    for name, content in server.repos[REPO].items():
        (tmp_path / name).write_bytes(content)
    assert "spm.model: sha256" in refusal(hub.fetch_weights, hub.WEIGHTS_REPO, tmp_path)
    assert (tmp_path / "spm.model").read_bytes() == server.repos[REPO]["spm.model"]


def test_a_torn_copy_of_the_weights_is_named_and_left_alone(server, tmp_path):
    for name, content in server.repos[REPO].items():
        (tmp_path / name).write_bytes(content[:-100] if name == "model.safetensors" else content)
    assert "not a whole safetensors file" in refusal(hub.fetch_weights, REPO, tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == server.repos[REPO]["model.safetensors"][:-100]


def test_an_unknown_repository_ends_in_one_line_with_what_to_do(server, tmp_path):
    line = refusal(hub.fetch_weights, "nobody/nothing", tmp_path)
    assert "401 Unauthorized (no such repository" in line and f"by hand from {hub.HUB}/nobody/nothing" in line
    assert "config.json, spm.model or tokenizer.json, tokenizer_config.json, model.safetensors or pytorch_mo" in line
    assert server.naps == []


def test_a_repository_without_the_file_ends_in_one_line(server, tmp_path):
    del server.repos[REPO]["model.safetensors"]
    line = refusal(hub.fetch_weights, REPO, tmp_path)
    assert "404: the repository has no model.safetensors or pytorch_model.bin" in line
    assert names(tmp_path) == set() and not server.gets("config.json")


def test_something_that_is_not_a_hub_is_recognised(server, tmp_path):
    server.large.clear()
    server.fail("HEAD", "train.csv", {"bare": True})
    assert "does not answer as a hub does" in refusal(hub.fetch_data, DATA, tmp_path)


def test_nobody_there_ends_at_once(server, tmp_path, monkeypatch):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{closed.getsockname()[1]}")
        line = refusal(hub.fetch_weights, REPO, tmp_path)
    assert "no answer from 127.0.0.1" in line and "refused" in line and server.naps == []
    assert not (tmp_path / "config.json").exists()


def test_offline_mode_is_named(server, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE" in refusal(hub.fetch_data, DATA, tmp_path)


@pytest.mark.parametrize("repo", ["", "a/b/c", "with space/x", "../up"])
def test_a_name_that_is_no_repository_is_refused(server, tmp_path, repo):
    assert "expected owner/name" in refusal(hub.fetch_data, repo, tmp_path)


@pytest.mark.parametrize("address", ["hub.example", "ftp://hub.example", "http://", "http://host:port"])
def test_an_address_that_is_none_is_refused(server, tmp_path, monkeypatch, address):
    monkeypatch.setenv("HF_ENDPOINT", address)
    assert "HF_ENDPOINT is" in refusal(hub.fetch_data, DATA, tmp_path)


def test_too_little_room_is_noticed_before_anything_moves(server, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    line = refusal(hub.fetch_data, DATA, tmp_path)
    assert "No space left on device: 0.3 MB needed, 0.0 MB free" in line and not server.gets("train.csv")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a disk that fills up: this system has no /dev/full")
def test_a_disk_that_fills_up_ends_in_one_line(server, tmp_path):
    (tmp_path / ".fetching").mkdir()
    name = f"train.csv.{hashlib.sha256(hashlib.sha256(CSV).hexdigest().encode()).hexdigest()[:16]}.part"
    (tmp_path / ".fetching" / name).symlink_to("/dev/full")
    assert "No space left on device" in refusal(hub.fetch_data, DATA, tmp_path)
    assert not (tmp_path / "train.csv").exists() and server.naps == []


def test_a_real_full_disk_leaves_what_was_there(server, small_disk, monkeypatch):
    disk = small_disk("128k")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10**9))
    (disk / "notes").write_text("mine")
    assert "No space left on device" in refusal(hub.fetch_data, DATA, disk)
    assert names(disk) == {".fetching", "notes"} and (disk / "notes").read_text() == "mine"


def test_a_conversion_without_room_leaves_nothing_half_done(small_disk, tmp_path):
    disk = small_disk("128k")
    torch.save({"w": torch.zeros(100_000)}, tmp_path / "model.bin")
    assert "could not be written" in refusal(hub.convert_bin, tmp_path / "model.bin", disk / "model.safetensors")
    assert names(disk) == set()


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
               else saved(value, tmp_path, _use_new_zipfile_serialization=form == "zip"))
    del server.repos[REPO]["model.safetensors"]
    server.repos[REPO]["pytorch_model.bin"] = hostile
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
    whole = saved(state_dict(), tmp_path)
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


def test_a_conversion_that_cannot_be_put_in_place_leaves_nothing_behind(tmp_path):
    torch.save(state_dict(), tmp_path / "in.bin")
    (tmp_path / "out.safetensors").mkdir()
    assert "could not be written" in refusal(hub.convert_bin, tmp_path / "in.bin", tmp_path / "out.safetensors")
    assert names(tmp_path) == {"in.bin", "out.safetensors"}


def test_the_converted_file_says_it_comes_from_torch(tmp_path):
    torch.save(state_dict(), tmp_path / "in.bin")
    hub.convert_bin(tmp_path / "in.bin", tmp_path / "out.safetensors")
    with safe_open(tmp_path / "out.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


@pytest.mark.skipif(os.name == "nt", reason="who may read a file: this system has no modes")
def test_whoever_may_read_the_bin_may_read_what_it_becomes(tmp_path):
    torch.save(state_dict(), tmp_path / "in.bin")
    (tmp_path / "in.bin").chmod(0o640)
    hub.convert_bin(tmp_path / "in.bin", tmp_path / "out.safetensors")
    assert (tmp_path / "out.safetensors").stat().st_mode & 0o777 == 0o640


# The command line ----------------------------------------------------------------------------------------------------

def test_the_command_fetches_quietly_and_fails_in_one_line_with_exit_code_2(server, tmp_path):
    done = command("data", "--repo", DATA, "--folder", tmp_path / "my data")
    assert done.returncode == 0, done.stderr
    assert done.stderr == "" and (tmp_path / "my data" / "train.csv").read_bytes() == CSV
    assert f"train.csv: {len(CSV) / 1e6:.1f} MB, sha256 verified" in done.stdout

    failed = command("weights", "--folder", tmp_path / "w", HF_ENDPOINT="http://127.0.0.1:9")
    assert failed.returncode == 2 and failed.stdout == "" and failed.stderr.count("\n") == 1
    assert f"could not fetch from {hub.WEIGHTS_REPO}" in failed.stderr and hub.HUB in failed.stderr
