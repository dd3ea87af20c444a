"""All supported layouts and file formats give the same rows as the competition's CSV."""

import gzip
import json

import pytest

from minipref.data import Pair, read_pairs
from minipref.runtime import InputError

PAIRS = [Pair("1", ("Why?",), ("Because.",), ("No idea.",), 0), Pair("2", ("a", "b"), ("c", "d"), ("e", "f"), 1),
         Pair("3", ("x, \"y\"\nz",), ("[1]",), ("",), 2)]
ONE_HOT = ("winner_model_a", "winner_model_b", "winner_tie")
WINNERS = ("model_a", "model_b", "tie (bothbad)")


def conversation(prompt, response) -> list[dict]:
    return [{"role": role, "content": text} for pair in zip(prompt, response)
            for role, text in zip(("user", "assistant"), pair)]


def rows(texts: str, labels: str) -> list[dict]:
    """PAIRS as records in a layout."""
    found = []
    for pair in PAIRS:
        row = {"id": int(pair.id)} if texts == "columns" else {"question_id": pair.id}
        if texts == "columns":
            row |= {name: list(getattr(pair, name)) for name in ("prompt", "response_a", "response_b")}
        else:
            row |= {"conversation_a": conversation(pair.prompt, pair.response_a),
                    "conversation_b": conversation(pair.prompt, pair.response_b)}
        row |= {"winner": WINNERS[pair.label]} if labels == "winner" else {
            column: int(n == pair.label) for n, column in enumerate(ONE_HOT)}
        found.append(row | {"model_a": "x"})
    return found


def written(path, records: list[dict]):
    """Write records in the format of the file's name."""
    if path.suffix == ".csv":
        pd = pytest.importorskip("pandas")
        cells = [{name: json.dumps(value) if isinstance(value, list) else value for name, value in row.items()}
                 for row in records]
        pd.DataFrame(cells).to_csv(path, index=False)
    elif path.suffix == ".parquet":
        pa = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
        from pyarrow import parquet
        parquet.write_table(pa.Table.from_pylist(records), path)
    else:
        text = "\n".join(map(json.dumps, records)) + "\n"
        path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


@pytest.mark.parametrize("labels", ["one-hot", "winner"])
@pytest.mark.parametrize("texts", ["columns", "conversations"])
@pytest.mark.parametrize("name", ["rows.csv", "rows.jsonl", "rows.parquet", "rows.gz"])
def test_every_layout_gives_the_rows_of_the_competitions_csv(tmp_path, capsys, name, texts, labels):
    found = read_pairs(written(tmp_path / name, rows(texts, labels)))
    assert found == PAIRS
    said = capsys.readouterr().out
    assert ("conversation_a" in said) == (texts == "conversations") and ("labels from winner" in said) == (
        labels == "winner")
    assert ("JSON lines" in said) == (name in ("rows.jsonl", "rows.gz")) and ("Parquet" in said) == ("parquet" in name)


def test_conversations_beside_the_three_columns_are_not_read_and_the_note_says_so(tmp_path, capsys):
    both = [columns | conversations for columns, conversations in zip(rows("columns", "winner"),
                                                                      rows("conversations", "winner"))]
    for name in ("rows.csv", "rows.jsonl"):
        assert read_pairs(written(tmp_path / name, both)) == PAIRS
        assert "conversation_a and conversation_b are not read" in capsys.readouterr().out


def test_a_conversation_without_an_answer_has_a_missing_turn(tmp_path):
    record = rows("conversations", "winner")[0]
    record["conversation_a"] = record["conversation_b"] = record["conversation_b"][:1]
    [pair] = read_pairs(written(tmp_path / "rows.jsonl", [record]))
    assert pair.response_a == pair.response_b == (None,)


def test_a_kind_of_file_is_known_by_its_content(tmp_path):
    path = written(tmp_path / "rows.jsonl", rows("columns", "winner"))
    assert read_pairs(path.rename(tmp_path / "rows.csv")) == PAIRS


def test_newer_arena_files_have_parts_in_a_turn_and_a_system_prompt(tmp_path):
    record = rows("conversations", "winner")[0]
    for column in ("conversation_a", "conversation_b"):
        record[column] = [{"role": "system", "content": "Be brief."}] + [
            {"role": turn["role"], "content": [{"type": "text", "text": turn["content"]}, {"type": "image"}]}
            for turn in record[column]]
    pair = read_pairs(written(tmp_path / "rows.jsonl", [record]))[0]
    assert (pair.prompt, pair.response_a) == (("Be brief.", "Why?"), ("Because.",))


def test_rows_without_labels_are_read_where_none_are_needed(tmp_path):
    records = [{name: value for name, value in row.items() if name != "winner"} for row in rows("columns", "winner")]
    path = written(tmp_path / "rows.jsonl", records)
    assert [pair.label for pair in read_pairs(path, "if present")] == [None] * 3
    with pytest.raises(InputError, match="winner_model_a"):
        read_pairs(path)


@pytest.mark.parametrize("change, what", [
    ({"winner": "model_c"}, "row 2, column winner: 'model_c'; expected model_a, model_b, tie"),
    ({"winner": None}, "row 2, column winner: None"),
    ({"conversation_b": conversation(("other",), ("f",))}, "row 2, column conversation_b: not the prompt"),
    ({"conversation_a": "[{'role': 'user'}]"}, "row 2, column conversation_a"),
    ({"conversation_a": [{"role": "judge", "content": "x"}]}, "row 2, column conversation_a"),
    ({"conversation_a": None}, "row 2, column conversation_a"),
    ({"conversation_a": [7]}, "row 2, column conversation_a")])
def test_a_bad_value_is_named_with_its_row(tmp_path, change, what):
    records = rows("conversations", "winner")
    records[1] |= change
    with pytest.raises(InputError) as caught:
        read_pairs(written(tmp_path / "rows.jsonl", records))
    assert what in str(caught.value)


@pytest.mark.parametrize("line, what", [
    ('{"id": 2', "row 2: not JSON"), ("[1]", "row 2: [1]; expected a JSON object"),
    ('{"id": 2}', "row 2, column prompt"),
    ('{"id": 2, "prompt": "p", "response_a": "a", "response_a": "b"}', "row 2: not JSON (a repeated key, among"),
    (json.dumps({**rows("columns", "winner")[0], "prompt": {"a": 1}}), "row 2, column prompt: {'a': 1}")])
def test_a_bad_line_is_named(tmp_path, line, what):
    path = written(tmp_path / "rows.jsonl", rows("columns", "winner")[:1])
    path.write_text(path.read_text() + "\n" + line + "\n")
    with pytest.raises(InputError) as caught:
        read_pairs(path)
    assert what in str(caught.value)


def test_a_damaged_parquet_file_and_one_without_pyarrow_are_one_line(tmp_path, monkeypatch):
    path = tmp_path / "rows.parquet"
    path.write_bytes(b"PAR1 and nothing else PAR1")
    with pytest.raises(InputError, match=r"not a Parquet file|pyarrow is not installed"):
        read_pairs(path)
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(InputError, match=r"pip install \.\[parquet\]"):
        read_pairs(path)


def test_a_winner_that_contradicts_the_other_columns_is_named(tmp_path):
    records = [row | {"winner": WINNERS[pair.label]} for row, pair in zip(rows("columns", "one-hot"), PAIRS)]
    assert read_pairs(written(tmp_path / "rows.jsonl", records)) == PAIRS
    records[1]["winner"] = "model_a"
    with pytest.raises(InputError, match="row 2, column winner: 'model_a'; expected the same as winner_model_a"):
        read_pairs(written(tmp_path / "rows.jsonl", records))


@pytest.mark.parametrize("id", [None, True, 1e5, ["7"], {"x": 7}])
def test_an_id_that_is_neither_text_nor_a_whole_number_is_refused(tmp_path, id):
    records = rows("columns", "columns")
    with pytest.raises(InputError, match=r"row 2, column id: .* expected a text or a whole number"):
        read_pairs(written(tmp_path / "rows.jsonl", [records[0], records[1] | {"id": id}]))
    assert read_pairs(written(tmp_path / "rows.jsonl", [records[0] | {"id": 10**20}]))[0].id == str(10**20)


def test_parts_of_a_conversation_that_are_not_text_are_counted(tmp_path, capsys):
    records = rows("conversations", "winner")
    picture = {"type": "image_url", "image_url": {"url": "https://example.com/x.png"}}
    for record in records[1:]:
        for column in ("conversation_a", "conversation_b"):
            turns = record[column]
            record[column] = [turns[0] | {"content": [{"type": "text", "text": "t"}, picture]}, *turns[1:]]
    records[0]["conversation_a"][-1] |= {"refusal": None, "tool_calls": None}
    read_pairs(written(tmp_path / "rows.jsonl", records))
    said = capsys.readouterr().out
    assert f"not text were left out of {len(records) - 1} rows; the first: row 2" in said
    records = rows("conversations", "winner")
    records[0]["conversation_a"][-1] |= {"tool_calls": [{"id": "x"}]}
    read_pairs(written(tmp_path / "rows.jsonl", records))
    assert "left out of 1 row; the first: row 1" in capsys.readouterr().out


def test_a_header_among_the_rows_is_refused(tmp_path):
    (tmp_path / "rows.csv").write_text("id,prompt,response_a,response_b\n1,p,a,b\nid,prompt,response_a,response_b\n")
    with pytest.raises(InputError, match="row 2: the header again"):
        read_pairs(tmp_path / "rows.csv", "if present")
