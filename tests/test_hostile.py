"""A table of bad inputs: for each, the programs work or end with one line and exit code 2.

Each input is run through `train.main` or `predict.main`. None may raise, hang, use excessive memory or leave a file.
"""

import gzip
import json
import math
import os
import pickle
import resource
import shutil
import signal
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small import BUNDLED, write_encoder

import predict
import train
from minipref.checkpoint import load_classifier
from minipref.predictor import Judge
from minipref.tokenizer import load_tokenizer

HEADER = "id,prompt,response_a,response_b"
LABELS = ",winner_model_a,winner_model_b,winner_tie"
ROWS = 10
SECONDS, MEGABYTES = 60, 400         # what one input may cost; the good ones take a second and some tens of megabytes


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A trained model's folder, which is also an encoder's."""
    folder = tmp_path_factory.mktemp("good")
    write_encoder(folder / "encoder")
    torch.manual_seed(1)
    Judge(load_classifier(folder / "encoder"), load_tokenizer(BUNDLED), 64).save(folder / "model")
    return folder / "model"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def bounded(capsys, main, arguments: list[str]) -> tuple[int, str, str]:
    """Run a program with a time limit, and measure its memory."""
    def too_long(*_):
        raise TimeoutError(f"{arguments} took more than {SECONDS} s")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    signal.signal(signal.SIGALRM, too_long)
    signal.alarm(SECONDS)
    try:
        code = main(arguments)
    finally:
        signal.alarm(0)
    taken = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) / 1024
    assert taken < MEGABYTES, f"{taken:.0f} MB"
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def files() -> dict[str, int]:
    return {str(path): path.lstat().st_size for path in Path().rglob("*")}


def refused(capsys, main, arguments: list[str], what: str) -> None:
    """Exit code 2, one line of output, and no new file."""
    before = files()
    code, _, err = bounded(capsys, main, arguments)
    assert code == 2, err
    assert err.count("\n") == 1 and len(err) < 1500 and "Traceback" not in err and what in err, err
    assert files() == before


def rows(*cells: str, good_rows: int = ROWS, prompt: str = "p{}") -> str:
    """A labelled file: good rows, then one of the given cells."""
    lines = [f"{n},{prompt.format(n)},a,b,{'1,0,0' if n % 2 else '0,0,1'}" for n in range(good_rows)]
    return "\n".join([HEADER + LABELS, *lines, *([",".join(cells)] if cells else [])]) + "\n"


# --- refused CSV files: their content and the message

def row(label: str) -> str:
    return rows("x", "p", "a", "b", label)


CSV = {
    "an empty file": ("", "an empty file"),
    "a byte order mark and no more": (b"\xef\xbb\xbf", "an empty file"),
    "empty lines": ("\n\n\n", "an empty first line"),
    "a header only": (HEADER + LABELS + "\n", "a header and no rows"),
    "no header": ("1,p,a,b,1,0,0\n", "no column of this name"),
    "other separators": (rows().replace(",", ";"), "separated by semicolons"),
    "tabs": (rows().replace(",", "\t"), "separated by tabs"),
    "a column twice": (rows().replace("prompt", "id"), "more than one column"),
    "labels gone": ("\n".join([HEADER, "1,p,a,b"]), "winner_model_a: no column"),
    "one label column": (HEADER + ",winner_tie\n1,p,a,b,1\n", "winner_model_a: no column"),
    "half of UTF-16": (rows().encode("utf-16")[:-1], "not UTF-16"),
    "UTF-16 without its mark": (rows().encode("utf-16-le"), "UTF-16 without a byte order mark"),
    "UTF-32": (rows().encode("utf-32"), "bad.csv"),
    "Latin-1": (rows("x", "café", "a", "b", "1,0,0").encode("latin-1"), "not UTF-8"),
    "half a character at the end": (rows().encode() + b"\xe6\xa8", "not UTF-8"),
    "a surrogate in UTF-8": (rows().encode() + b"x,\xed\xa0\x80,a,b,1,0,0\n", "not UTF-8"),
    "a cut gzip": (gzip.compress(rows().encode())[:-9], "cannot be unpacked"),
    "a zip that is none": (b"PK\x03\x04" + bytes(range(256)), "cannot be unpacked"),
    "lists of Python": (rows(prompt="['p{}']"), "with json.dumps"),
    "a pickle": (pickle.dumps({"id": 1}), "bad.csv"),
    "NULs only": (bytes(5000), "a binary file"),
    "random bytes": (bytes((i * 197 + i // 7) % 256 for i in range(5000)), "bad.csv"),
    "JSON": ('[{"id": 1, "prompt": "p"}]', "no column of this name"),
    "a web page": ("<!DOCTYPE html>\n<html>not found</html>\n", "no column of this name"),
    "a quote that never closes": (rows("x", '"p', "a", "b", "1,0,0"), "not CSV (unexpected end of data)"),
    "a quote in the middle": (rows("x", '"p"q', "a", "b", "1,0,0"), f"row {ROWS + 1}: not CSV"),
    "a cell too few": (rows("x", "p", "a", "1,0,0"), f"row {ROWS + 1}: 6 cells; expected 7"),
    "a cell too many": (rows("x", "p", "a", "b", "c", "1,0,0"), f"row {ROWS + 1}: 8 cells; expected 7"),
    "a cell of five million characters": (rows("x", "p" * 5_000_000, "a", "b", "1,0,0"), "at most 4,194,304 char"),
    "a million cells": (rows("x", *["p"] * 1_000_000), f"row {ROWS + 1}: 1000001 cells"),
    "a header of a million columns": (",".join(f"c{n}" for n in range(1_000_000)), "no column of this name"),
    "no winner": (row("0,0,0"), "exactly one 1"),
    "two winners": (row("1,0,1"), "exactly one 1"),
    "a probability": (row("0.4,0.3,0.3"), "'0.4'; expected 0 or 1"),
    "a negative label": (row("-1,0,1"), "'-1'; expected 0 or 1"),
    "a label of two": (row("2,0,0"), "'2'; expected 0 or 1"),
    "a label in words": (row("yes,no,no"), "'yes'; expected 0 or 1"),
    "true and false": (row("True,False,False"), "'True'; expected 0 or 1"),
    "a label that is NaN": (row("nan,0,1"), "'nan'; expected 0 or 1"),
    "an infinite label": (row("inf,0,0"), "'inf'; expected 0 or 1"),
    "an empty label": (row(",0,1"), "''; expected 0 or 1"),
    "a full-width one": (row("１,0,0"), "expected 0 or 1"),
    "a label of ten thousand digits": (row("1" * 10_000 + ",0,0"), "(10,002 characters); expected 0 or 1"),
    "one prompt for all": (rows().replace("p1", "p").replace("p2", "p").replace("p3", "p").replace("p4", "p")
                           .replace("p5", "p").replace("p6", "p").replace("p7", "p").replace("p8", "p")
                           .replace("p9", "p").replace("p0", "p"), "cannot be split"),
    "one row": (rows(good_rows=1), "cannot be split"),
}


@pytest.mark.parametrize("name", CSV)
def test_a_bad_training_file_is_one_line(good, capsys, name):
    content, what = CSV[name]
    Path("bad.csv").write_bytes(content.encode() if isinstance(content, str) else content)
    refused(capsys, train.main, ["--train", "bad.csv", "--encoder", str(good), "--run", "run"], what)


TEST_CSV = {
    "an id twice": (HEADER + "\n1,p,a,b\n2,p,a,b\n1,p,a,b\n", "row 3, column id: '1', already the id of row 1"),
    "an id of NaN twice": (HEADER + "\nNaN,p,a,b\nNaN,p,a,b\n", "'NaN', already the id of row 1"),
    "a blank id": (HEADER + "\n ,p,a,b\n", "row 1, column id: a blank id"),
    "an id with a line's end in it": (HEADER + '\n"1\r2",p,a,b\n', "column id: '1\\r2'"),
    "no prompt": ("id,response_a,response_b\n1,a,b\n", "column prompt: no column"),
    "a header only": (HEADER + "\n", "a header and no rows"),
}


@pytest.mark.parametrize("name", TEST_CSV)
def test_a_bad_test_file_is_one_line_and_no_submission(good, capsys, name):
    content, what = TEST_CSV[name]
    Path("bad.csv").write_text(content, newline="")
    refused(capsys, predict.main, ["bad.csv", "--model", str(good)], what)


def no_file(kind: str) -> str:
    """Create something that is not a regular file. Returns its description in the message."""
    path = Path("bad.csv")
    if kind == "a directory":
        path.mkdir()
    elif kind == "a pipe":
        os.mkfifo(path)
    elif kind == "a link to nothing":
        path.symlink_to("gone")
    elif kind == "a link to itself":
        path.symlink_to("bad.csv")
    elif kind == "an endless device":
        path.symlink_to("/dev/zero")
    return {"a directory": "a directory", "a pipe": "a pipe or a device", "an endless device": "a pipe or a device",
            "a link to itself": "oo many"}.get(kind, "no such file")


@pytest.mark.parametrize("kind", ["a directory", "a pipe", "a link to nothing", "a link to itself", "an endless device",
                                  "nothing"])
def test_what_is_no_file_is_one_line_and_never_waited_for(good, capsys, kind):
    what = no_file(kind)
    refused(capsys, train.main, ["--train", "bad.csv", "--encoder", str(good), "--run", "run"], what)
    refused(capsys, predict.main, ["bad.csv", "--model", str(good)], what)


# --- unusual but valid CSV files: the printed notes

LISTS = '"[""p{}""]"'       # prompts that make a file one of JSON lists
DEEP = "[" * 100_000 + "]" * 100_000
FINE = {
    "a byte order mark": b"\xef\xbb\xbf" + rows().encode(),
    "Windows line ends": rows().replace("\n", "\r\n").encode(),
    "old Macintosh line ends": rows().replace("\n", "\r").encode(),
    "empty lines in between": rows().replace("\n", "\n\n").encode(),
    "UTF-16": rows().encode("utf-16"),
    "a gzip": gzip.compress(rows().encode()),
    "NULs in a cell": rows("x", "p\0\0", "a\0", "b", "1,0,0").encode(),
    "every control character": rows("x", '"' + "".join(map(chr, [*range(1, 32), 127])).replace('"', "") + '"', "a", "b",
                                    "1,0,0").encode(),
    "nothing in any text": rows("x", "", "", "", "0,0,1").encode(),
    "ten thousand turns": rows("x", '"' + json.dumps(["t"] * 10_000).replace('"', '""') + '"', "a", "b", "1,0,0", prompt=LISTS).encode(),  # noqa: E501
    "deeply nested JSON": rows("x", DEEP, f'"[1,{DEEP[:900]}{DEEP[-900:]}]"', "b", "1,0,0", prompt=LISTS).encode(),
    "a number of ten thousand digits in JSON": rows("x", f"[{'9' * 10_000}]", "a", "b", "1,0,0", prompt=LISTS).encode(),
    "half a million characters": rows("x", "p", "word " * 100_000, "b", "1,0,0").encode(),
    "half a million characters without a space": rows("x", "p", "x" * 500_000, "b", "1,0,0").encode(),
    "lone surrogates in JSON": rows("x", r'"[""\ud800 \udfff""]"', "a", "b", "1,0,0", prompt=LISTS).encode(),
    "special tokens as text": rows("x", "[SEP][CLS]", "<0x41>", "[MASK][PAD]", "1,0,0").encode(),
    "a formula": rows("=cmd()", "=1+1", "@a", "-b", "1,0,0").encode(),
    "labels with points": rows("x", "p", "a", "b", "1.0, 0.0 ,0").encode(),
    "an id of NaN": rows("NaN", "p", "a", "b", "1,0,0").encode(),
}


@pytest.mark.parametrize("name", FINE)
def test_a_strange_file_is_read_and_predicted_whole(good, capsys, name):
    Path("strange.csv").write_bytes(FINE[name])
    code, out, err = bounded(capsys, predict.main, ["strange.csv", "--model", str(good), "--precision", "fp32"])
    assert code == 0, err
    wanted = ROWS + (FINE[name] not in [FINE[n] for n in list(FINE)[:6]])
    assert f": {wanted}" in out and Path("submission.csv").read_bytes().count(b"\n") == wanted + 1
    assert ("1 cell with invalid characters replaced" in out) == ("surrogates" in name)


# --- checkpoints and tokenizers

def header(fields: dict, data: bytes = b"") -> bytes:
    text = json.dumps(fields).encode()
    return struct.pack("<Q", len(text)) + text + data


QUERY = "deberta.encoder.layer.0.attention.self.query_proj.weight"


def with_tensor(value: torch.Tensor | None, name: str = QUERY):
    """A change to a model's tensors: one replaced or removed."""
    return lambda tensors: {k: v for k, v in (tensors | {name: value}).items() if v is not None}


TENSORS = {
    "a tensor gone": (with_tensor(None), f"no tensor {QUERY}"),
    "a tensor more": (with_tensor(torch.zeros(2), "deberta.extra"), "tensor deberta.extra, which DeBERTa-v3"),
    "another shape": (with_tensor(torch.zeros(32, 33)), "has shape (32, 33); expected (32, 32)"),
    "turned round": (with_tensor(torch.zeros(32 * 32)), "has shape (1024,)"),
    "no dimension": (with_tensor(torch.tensor(1.0)), "has shape ()"),
    "empty": (with_tensor(torch.zeros(0, 32)), "has shape (0, 32)"),
    "whole numbers": (with_tensor(torch.zeros(32, 32, dtype=torch.int64)), "is of type torch.int64"),
    "bytes": (with_tensor(torch.zeros(32, 32, dtype=torch.uint8)), "is of type U8"),
    "NaN": (with_tensor(torch.full((32, 32), math.nan)), "holds NaN or infinity"),
    "infinity": (with_tensor(torch.full((32, 32), math.inf)), "holds NaN or infinity"),
    "two classes": (with_tensor(torch.zeros(2, 32), "classifier.weight"), "classifier.weight has shape (2, 32)"),
    "no head": (lambda tensors: {k: v for k, v in tensors.items() if not k.startswith(("pooler", "classifier"))},
                "no pooler and no classifier"),
}
CHECKPOINTS = {
    "empty": b"",
    "a header of exabytes": struct.pack("<Q", 1 << 62) + b"{}",
    "a header of the whole file": struct.pack("<Q", 10**9) + b"{" * 1000,
    "a header that is no JSON": struct.pack("<Q", 8) + b"notjson!",
    "a header nested without end": struct.pack("<Q", 100_000) + b"[" * 100_000,
    "a tensor of exabytes": header({QUERY: {"dtype": "F32", "shape": [1 << 31, 1 << 31], "data_offsets": [0, 1 << 62]}}),  # noqa: E501
    "a shape whose product overflows": header({QUERY: {"dtype": "F32", "shape": [1 << 63, 2], "data_offsets": [0, 0]}}),
    "offsets turned round": header({QUERY: {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}, bytes(4)),
    "a kind of number that is none": header({QUERY: {"dtype": "F7", "shape": [1], "data_offsets": [0, 4]}}, bytes(4)),
    "a pickle": pickle.dumps({"deberta": 1}),
    "a pickle that asks for a command": b"cos\nsystem\n(S'touch hacked'\ntR.",
    "a zip": b"PK\x03\x04" + bytes(200),
    "a web page": b"<!DOCTYPE html><html>not found</html>",
}
LINKS = {"a link to nothing": "gone", "a link to itself": "model.safetensors", "a link to a folder": ".",
         "a link to an endless device": "/dev/zero"}


@pytest.fixture
def model(good, tmp_path):
    """A copy of the good model, to be damaged."""
    return Path(shutil.copytree(good, tmp_path / "model"))


def refused_by_both(capsys, model: Path, what: str, head: bool = True) -> None:
    """Refused by predict.py as a model and by train.py as an encoder."""
    Path("t.csv").write_text(rows())
    refused(capsys, predict.main, ["t.csv", "--model", str(model)], what)
    if head:
        refused(capsys, train.main, ["--train", "t.csv", "--encoder", str(model), "--run", "run"], what)


@pytest.mark.parametrize("name", TENSORS)
def test_a_checkpoint_of_wrong_tensors_is_one_line(model, capsys, name):
    change, what = TENSORS[name]
    save_file(change(load_file(model / "model.safetensors")), model / "model.safetensors")
    refused(capsys, predict.main, [*write_test(), "--model", str(model)], what)


def write_test() -> list[str]:
    Path("t.csv").write_text(rows())
    return ["t.csv"]


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_checkpoint_that_is_none_is_one_line(model, capsys, name):
    (model / "model.safetensors").write_bytes(CHECKPOINTS[name])
    refused(capsys, predict.main, [*write_test(), "--model", str(model)], "model.safetensors: not a complete safetensors")  # noqa: E501
    assert not Path("hacked").exists()


@pytest.mark.parametrize("name", LINKS)
def test_a_checkpoint_that_links_to_no_file_is_one_line(model, capsys, name):
    (model / "model.safetensors").unlink()
    (model / "model.safetensors").symlink_to(LINKS[name])
    refused(capsys, predict.main, [*write_test(), "--model", str(model)], "model.safetensors: no such file")


def test_a_checkpoint_that_is_a_link_to_a_good_one_is_good(model, capsys):
    (model / "model.safetensors").rename("elsewhere")
    (model / "model.safetensors").symlink_to(Path("elsewhere").resolve())
    assert bounded(capsys, predict.main, [*write_test(), "--model", str(model)])[0] == 0


@pytest.mark.parametrize("file", ["model.safetensors", "tokenizer.json", "config.json", "minipref.json"])
def test_a_models_file_cut_at_every_sixteenth_is_one_line(model, capsys, file):
    content = (model / file).read_bytes()
    for part in range(16):
        (model / file).write_bytes(content[:len(content) * part // 16])
        refused(capsys, predict.main, [*write_test(), "--model", str(model)], file)


CONFIGS = [(field, wrong) for field in ("vocab_size", "hidden_size", "num_attention_heads", "num_hidden_layers",
                                        "intermediate_size", "position_buckets", "max_position_embeddings")
           for wrong in (0, 2**31 - 1, "12")] + [
    (field, wrong) for field in ("layer_norm_eps", "hidden_dropout_prob", "attention_probs_dropout_prob", "cls_dropout",
                                 "initializer_range") for wrong in (-1, 10**400, [])] + [
    ("model_type", "bert"), ("relative_attention", False), ("share_att_key", 1), ("norm_rel_ebd", None),
    ("pos_att_type", {}), ("position_biased_input", True), ("type_vocab_size", 2), ("conv_kernel_size", 3),
    ("hidden_act", "relu"), ("pooler_hidden_act", ["gelu"]), ("pad_token_id", 10**9), ("pooler_hidden_size", 5),
    ("attention_head_size", 10**9), ("attention_head_size", []), ("num_hidden_layers", 500)]


@pytest.mark.parametrize(("field", "wrong"), CONFIGS, ids=lambda value: str(value)[:20])
def test_a_configuration_with_any_field_wrong_is_one_line(model, capsys, field, wrong):
    path = model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: wrong}))
    refused(capsys, predict.main, [*write_test(), "--model", str(model)], str(model))


SETTINGS = [("format", 3), ("shares", [1, 1, 1]), ("max_length", 10**9), ("max_length", 3), ("max_length", "64"),
            ("temperature", 0), ("temperature", math.nan), ("temperature", 10**400), ("temperature", "1")]


@pytest.mark.parametrize(("field", "wrong"), SETTINGS, ids=lambda value: str(value)[:20])
def test_wrong_settings_of_a_model_are_one_line(model, capsys, field, wrong):
    path = model / "minipref.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: wrong}))
    refused(capsys, predict.main, [*write_test(), "--model", str(model)], "minipref.json")


@pytest.mark.parametrize("file", ["config.json", "minipref.json", "tokenizer.json"])
@pytest.mark.parametrize("kind", ["a pipe", "ten gigabytes of nothing", "a directory", "nested without end", "a list"])
def test_a_models_small_file_that_is_no_small_file_is_one_line(model, capsys, file, kind):
    (model / file).unlink()
    if kind == "a pipe":
        os.mkfifo(model / file)
    elif kind == "a directory":
        (model / file).mkdir()
    else:
        (model / file).write_bytes({"nested without end": b"[" * 1_000_000, "a list": b"[]"}.get(kind, b""))
        if kind.startswith("ten"):
            os.truncate(model / file, 10 << 30)
    refused(capsys, predict.main, [*write_test(), "--model", str(model)], file)


TOKENIZERS = {
    "cut off": b"\x0a\x80",
    "a length of exabytes": b"\x0a\x80\x80\x80\x80\x80\x80\x80\x80\x40",
    "a number without end": b"\xff" * 30,
    "empty": b"",
    "NULs": bytes(1000),
    "a web page": b"<!DOCTYPE html>",
    "sixteen megabytes": b"\x0a\x01a" * 5_600_000,
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_damaged_sentencepiece_model_is_one_line(model, capsys, name):
    (model / "spm.model").write_bytes(TOKENIZERS[name])
    refused_by_both(capsys, model, "spm.model: ")


# --- arguments

@pytest.mark.parametrize(("arguments", "what"), [
    (["--epochs", "1" + "0" * 400], "--epochs"), (["--epochs", "9999999"], "--epochs"), (["--lr", "1e300"], "--lr"),
    (["--lr", "inf"], "--lr"), (["--seed", str(2**64)], "--seed"), (["--max-length", "100000"], "--max-length"),
    (["--folds", "1000000"], "--folds"), (["--evals-per-epoch", "1000000"], "--evals-per-epoch"),
    (["--weight-decay", "1e300"], "--weight-decay"), (["--save-every", "nan"], "--save-every"),
    (["--batch-size", "８.5"], "--batch-size"), (["--train", "t\udce9.csv"], "not UTF-8"),
    (["--run", "t.csv"], "t.csv"), (["--run", "t.csv/run"], "cannot be written"),
])
def test_absurd_arguments_are_one_line(good, capsys, arguments, what):
    Path("t.csv").write_text(rows())
    refused(capsys, train.main, ["--train", "t.csv", "--encoder", str(good), "--run", "run", *arguments], what)


def test_the_note_of_the_newest_run_may_hold_anything(capsys):
    Path("runs").mkdir()
    for content in (b"", b"\xff\xfe", b"nowhere\n", b"\0", b"x" * 10_000):
        Path("runs/latest").write_bytes(content)
        refused(capsys, predict.main, write_test(), "run")


def test_the_tables_hold_more_than_a_hundred_and_thirty_bad_inputs():
    tables = (CSV, TEST_CSV, TENSORS, CHECKPOINTS, LINKS, CONFIGS, SETTINGS, TOKENIZERS)
    assert sum(map(len, tables)) > 130
