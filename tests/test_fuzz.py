"""Fuzzing the readers of rows and configurations: damaged files give a one-line error with the file's name.

For tokenizers see test_tokenizer.py and test_sentencepiece_model.py.
"""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_config import PUBLISHED

from minipref.config import EncoderConfig
from minipref.data import Pair, encode_pairs, read_pairs
from minipref.runtime import InputError
from minipref.tokenizer import load_tokenizer

ROWS = (b'id,prompt,response_a,response_b,winner_model_a,winner_model_b,winner_tie\r\n'
        b'7,"[""Two and two?""]","[""4"", null]","[""It is \\ud83d\\ude00 5,\\nI think""]",1,0,0\r\n'
        b'8,plain,"with ""quotes"", and\na line",,0,0,1\r\n')
PIECES = st.sampled_from([b'"', b'""', b",", b"\r\n", b"\n", b"\x00", b"\xff", b"\xef\xbb\xbf", b"[", b"]", b'["',
                          b"null", b"1e999", b"\\ud800", b"0.5", b" "]) | st.binary(max_size=4)
EDITS = st.lists(st.tuples(st.integers(0, 1 << 20), st.integers(0, 12), PIECES), min_size=1, max_size=4)
TEXT_OR_FILE = settings(max_examples=400, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("weights/minipref-tiny")


def read_or_refuse(path, tokenizer) -> None:
    """The file gives rows that can be encoded, or a one-line error with its name."""
    for labels in ("required", "if present"):
        try:
            pairs = list(read_pairs(path, labels, unique_ids=labels != "required"))
        except InputError as problem:
            assert path.name in str(problem) and "\n" not in str(problem)
        else:
            assert pairs and all(isinstance(pair, Pair) and pair.label in (0, 1, 2, None) for pair in pairs)
            assert (encode_pairs(pairs, tokenizer, 32).lengths <= 32).all()


@TEXT_OR_FILE
@given(edits=EDITS)
def test_the_reader_of_rows_takes_any_damage(edits, tmp_path, tokenizer):
    data = ROWS
    for place, length, new in edits:
        place %= len(data) + 1
        data = data[:place] + new + data[place + length:]
    path = tmp_path / "rows.csv"
    path.write_bytes(data)
    read_or_refuse(path, tokenizer)


@TEXT_OR_FILE
@given(cells=st.lists(st.text(max_size=12) | st.sampled_from(["[]", "[null]", '["a", 1, {"b": []}]', "[" * 5000]),
                      min_size=3, max_size=3))
def test_the_reader_of_rows_takes_any_text_in_a_cell(cells, tmp_path, tokenizer):
    path = tmp_path / "rows.csv"
    quoted = ('"' + cell.replace('"', '""') + '"' for cell in cells)
    path.write_bytes(f"id,prompt,response_a,response_b\n1,{','.join(quoted)}\n".encode("utf-8", "surrogatepass"))
    read_or_refuse(path, tokenizer)


SCALARS = (st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6)
           | st.sampled_from([0, -1, 1, 2**31, 2**63, 10**400, 0.5, 1e308, "768", "gelu", "c2p"]))
VALUES = SCALARS | st.lists(SCALARS, max_size=3) | st.dictionaries(st.text(max_size=4), SCALARS, max_size=2)


@TEXT_OR_FILE
@given(changes=st.dictionaries(st.sampled_from(sorted(PUBLISHED)) | st.text(max_size=8), VALUES, min_size=1,
                               max_size=4))
def test_the_reader_of_configurations_takes_any_value_in_any_field(changes, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(PUBLISHED | changes))
    configured_or_refused(path)


@TEXT_OR_FILE
@given(data=st.binary(max_size=60) | EDITS)
def test_the_reader_of_configurations_takes_any_bytes(data, tmp_path):
    path = tmp_path / "config.json"
    if isinstance(data, list):
        edits, data = data, json.dumps(PUBLISHED).encode()
        for place, length, new in edits:
            place %= len(data) + 1
            data = data[:place] + new + data[place + length:]
    path.write_bytes(data)
    configured_or_refused(path)


def configured_or_refused(path) -> None:
    try:
        config = EncoderConfig.from_json(path)
    except InputError as problem:
        assert "config.json" in str(problem) and "\n" not in str(problem)
    else:
        assert config.hidden_size % config.num_attention_heads == 0 and config.num_hidden_layers >= 1
        assert 0 <= config.pad_token_id < config.vocab_size
        assert 0 <= config.hidden_dropout_prob < 1 and config.max_distance - 1 > config.position_buckets // 2
