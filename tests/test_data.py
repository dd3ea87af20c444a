"""From CSV to batches: no lost rows, no leaks, fair truncation, correct labels."""

import bz2
import gzip
import io
import itertools
import json
import lzma
import zipfile

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pandas as pd
import pytest
import torch
from small import BUNDLED

from minipref.data import (
    LABEL_COLUMNS,
    MISSING,
    Pair,
    batches_by_tokens,
    character_counts,
    collate,
    count_missing,
    encode_pairs,
    epoch_batches,
    parse_turns,
    prompt_key,
    read_pairs,
    segment_texts,
    split_by_prompt,
    swap_classes,
    swap_mask,
    to_pairs,
    truncate_head_tail,
    truncation_budgets,
)
from minipref.runtime import InputError
from minipref.tokenizer import load_tokenizer

HEADER = "id,model_a,model_b,prompt,response_a,response_b,winner_model_a,winner_model_b,winner_tie\n"
GOOD = '1,x,y,"[""p""]","[""a""]","[""b""]",1,0,0\n'


class Words:
    """A tokenizer for these tests: each new word gets the next id."""

    pad_id, cls_id, sep_id, fingerprint = 0, 1, 2, "words"

    def __init__(self):
        self.ids = {}

    def encode_batch(self, texts):
        return [[self.ids.setdefault(word, len(self.ids) + 10) for word in text.split()] for text in texts]

    def words(self, ids):
        names = {i: word for word, i in self.ids.items()} | {0: "[PAD]", 1: "[CLS]", 2: "[SEP]"}
        return " ".join(names[int(i)] for i in ids)


def write(path, text, encoding="utf-8"):
    path.write_bytes(text.encode(encoding))
    return path


# --- cells and rows

@pytest.mark.parametrize(("cell", "turns"), [
    ('["one", "two"]', ("one", "two")),
    ('["a", null, "b"]', ("a", None, "b")),
    ("[null]", (None,)),
    ("[]", ()),
    ('[1, 2.50, true]', ("[1, 2.50, true]",)),
    ('["a", 5]', ('["a", 5]',)),
    ('["caf\\u00e9 \\/ \\ud83d\\ude00"]', ("café / 😀",)),
    ('[{"x": null}]', ('[{"x": null}]',)),
    ("42", ("42",)),
    ('{"a": 1}', ('{"a": 1}',)),
    ("", ("",)),
    ("plain text", ("plain text",)),
    ("[not json", ("[not json",)),
    ('["a"] and more', ('["a"] and more',)),
    ("null", ("null",)),
])
def test_a_cell_is_a_json_list_of_turns_or_one_turn_of_text(cell, turns):
    assert parse_turns(cell) == turns


def test_deeply_nested_json_is_plain_text_and_ten_thousand_turns_are_turns():
    assert parse_turns("[" * 100_000) == ("[" * 100_000,)
    assert len(parse_turns(json.dumps(["x"] * 10_000))) == 10_000


@hypothesis.given(st.lists(st.none() | st.text()))
def test_any_list_of_turns_survives_json(turns):
    assert parse_turns(json.dumps(turns)) == tuple(turns)


def read_cells(tmp_path, *rows):
    """The rows of a file of (prompt, response_a, response_b)."""
    frame = pd.DataFrame(rows, columns=["prompt", "response_a", "response_b"])
    frame.to_csv(tmp_path / "t.csv", index_label="id")
    return [(pair.prompt, pair.response_a, pair.response_b) for pair in read_pairs(tmp_path / "t.csv", "if present")]


def test_cells_are_json_lists_where_most_prompts_are_and_a_plain_answer_that_is_a_list_stays_text(tmp_path, capsys):
    lists, plain = ('["p"]', '["a", null]', "[2, 4]"), ("p", '["a", null]', "[2, 4]")
    turns, texts = (("p",), ("a", None), ("[2, 4]",)), (("p",), ('["a", null]',), ("[2, 4]",))
    others = [('["p"]', '["a"]', '["b"]')] * 3
    assert read_cells(tmp_path, *others, lists)[3] == turns and read_cells(tmp_path, plain) == [texts]
    assert read_cells(tmp_path, *others, plain, lists, lists)[3:] == [turns] * 3
    assert read_cells(tmp_path, *[("[1, 2]", "[INST] a", "b")] * 3) == [(("[1, 2]",), ("[INST] a",), ("b",))] * 3
    assert read_cells(tmp_path, *others, lists, ("", '["a", null]', "[2, 4]"))[3:] == [turns, (("",), *turns[1:])]
    capsys.readouterr()
    assert read_cells(tmp_path, plain, lists, plain) == [texts, (('["p"]',), *texts[1:]), texts]
    assert "t.csv: 4 cells that may be a list, read as text because most prompts are plain text; the first: row 1" \
        in capsys.readouterr().out


CHAT = '[{"role": "user", "content": "hi"}]'
REPR, CUT = "['What\\'s up?', None]", json.dumps(["word " * 8000, "second"])[:32_767]
BROKEN = [(REPR, "json.dumps"), (CUT, "spreadsheet cuts a cell at 32,767 characters"), ("['a' 'b']", "json.dumps"),
          ('[""a""]', "json.dumps"), ("[“a”]", "json.dumps"), ("[nan]", "json.dumps"), ('["a" ', "a spreadsheet cuts"),
          (CHAT, "conversation_a"), ('["a", 5]', "json.dumps")]


@pytest.mark.parametrize("column", range(3))
@pytest.mark.parametrize(("cell", "advice"), BROKEN, ids=range(len(BROKEN)))
def test_lists_that_are_not_of_texts_are_counted_and_refused_with_advice_where_most_of_a_column_are_so(
        tmp_path, capsys, cell, advice, column):
    good, bad = ['["p"]', '["a"]', "[null]"], ['["p"]', '["a"]', "[null]"]
    bad[column] = cell
    name = ("prompt", "response_a", "response_b")[column]
    assert read_cells(tmp_path, good, good, bad, good)[2][column] == (cell,)
    said = capsys.readouterr().out
    assert "t.csv: 1 cell with a list that is not a JSON list of texts, read as text" in said and advice in said
    assert f"row 3, column {name}" in said and said.count("\n") == 1
    with pytest.raises(InputError, match=rf"t\.csv, row 2, column {name}: 3 cells .* not a JSON list .*{advice}"):
        read_cells(tmp_path, good, bad, bad, bad, good)


def test_messages_where_texts_belong_are_refused_and_one_among_texts_is_counted(tmp_path, capsys):
    with pytest.raises(InputError, match=r"row 1, column prompt: 3 cells .* conversation_a and conversation_b"):
        read_cells(tmp_path, *[(CHAT, CHAT, CHAT)] * 3)
    assert read_cells(tmp_path, ("p", "a", "b"), ("p", CHAT, "b"))[1] == (("p",), (CHAT,), ("b",))
    assert "1 cell that may be a list, read as text" in capsys.readouterr().out


@pytest.mark.parametrize("word", sorted(MISSING))
def test_words_for_a_missing_value_are_counted(tmp_path, capsys, word):
    frame = pd.DataFrame({"id": [7, 8, 9], "prompt": "p", "response_a": ["a", f" {word}", word], "response_b": "b"})
    frame.to_csv(tmp_path / "t.csv", index=False)
    pairs = read_pairs(tmp_path / "t.csv", "if present")
    assert pairs[2].response_a == (word,) and count_missing(pairs) == 0
    said = capsys.readouterr().out
    assert "2 cells with only a word for a missing value" in said and "row 2, column response_a" in said


def test_quotes_after_a_space_are_counted(tmp_path, capsys):
    (tmp_path / "t.csv").write_text('id,prompt,response_a,response_b\n1, "[""hi""]", "a", b\n2,p,"a",b\n')
    assert read_pairs(tmp_path / "t.csv", "if present")[0].response_a == (' "a"',)
    said = capsys.readouterr().out
    assert "2 cells with a space before the opening quote, so the quotes are read as text" in said
    assert "row 1, column prompt" in said


def test_missing_and_blank_responses_are_counted(tmp_path):
    frame = pd.DataFrame({"id": range(4), "prompt": '["p"]', "response_a": ["[null]", "", '[" ", "a"]', '["a"]'],
                          "response_b": ['["b"]', "[]", '["b"]', '["b"]']})
    frame.to_csv(tmp_path / "t.csv", index=False)
    assert count_missing(read_pairs(tmp_path / "t.csv", "if present")) == 4


def test_lone_surrogates_are_mended_where_rows_are_read_and_the_cells_counted(tmp_path, capsys):
    cells = '["\\ud800 \\ud83d\\ude00"]', '["fine \\ufffd", "\\udfff"]', '[null, "a\\udc00\\ud800"]'
    rows = read_cells(tmp_path, ('["p"]', '["a"]', '["b"]'), cells)
    assert rows[1] == (("\ufffd \U0001f600",), ("fine \ufffd", "\ufffd"), (None, "a\ufffd\ufffd"))
    assert ("3 cells with invalid characters replaced (U+FFFD for half of a UTF-16 pair); the first: row 2, column "
            "prompt") in capsys.readouterr().out
    read_cells(tmp_path, ('["\\ud83d\\ude00 \\ufffd"]', "[null]", '["b"]'))
    assert capsys.readouterr().out == ""


def test_rows_of_python_are_read_as_the_rows_of_a_csv(tmp_path):
    rows = [('["p", "q"]', '["a", null]', ""), ("p", "[2, 4]", '["a"]'), ('["p"]', '["2"]', "plain"),
            ('["p"]', "['a']", '["\\ud800"]')]
    for row in rows:                                           # by themselves: a file decides by all of its prompts
        [segments] = read_cells(tmp_path, row) if "['" not in row[1] else read_cells(tmp_path, rows[0], row)[1:]
        held = pd.read_csv(tmp_path / "t.csv", index_col="id").iloc[[-1]]
        for same in (row, list(row), np.array(row), *held.itertuples(index=False), *held.to_numpy()):
            [pair] = to_pairs([same])
            assert (pair.prompt, pair.response_a, pair.response_b) == segments


def test_many_rows_of_python_decide_by_all_of_their_prompts_as_a_file_does(tmp_path):
    lists = ('["q"]', '["yes"]', '["2", "4"]')
    for rows in ([lists, ("", '["yes"]', '["no"]'), lists], [lists, ("plain", '["yes"]', '["no"]'), lists],
                 [("p", "a", "b"), lists, ("p", "[2]", "b")], [("", '["yes"]', "b")], [("p", '["yes"]', "b")]):
        segments = read_cells(tmp_path, *rows)
        held = pd.read_csv(tmp_path / "t.csv", index_col="id")                     # an empty prompt is NaN
        for same in (rows, np.array(rows), held.itertuples(index=False), held.to_numpy()):
            assert [(pair.prompt, pair.response_a, pair.response_b) for pair in to_pairs(same)] == segments
    pair = Pair("7", ("p",), ("[2]",), ("b",))
    assert to_pairs([lists, pair, (["p"], "[2]", "b")])[1:] == [pair, Pair("", ("p",), ("[2]",), ("b",))]
    assert to_pairs([(np.array("q"), "a", "b")]) == [Pair("", ("q",), ("a",), ("b",))] and to_pairs([]) == []
    with pytest.raises(InputError, match="row 2: 2 values"):
        to_pairs([lists, ("p", "a")])


def test_a_missing_value_of_python_is_an_empty_cell_and_a_missing_turn_in_a_list():
    for missing in (None, float("nan"), np.float32("nan"), pd.NA, pd.NaT):
        assert to_pairs([(missing, missing, "b")]) == [Pair("", ("",), ("",), ("b",))]
        assert to_pairs([(["p", missing], ("a",), np.array([missing, "b"], dtype=object))]) == [Pair(
            "", ("p", None), ("a",), (None, "b"))]
    assert to_pairs([("p", "nan", ["None", "\udfff"])]) == [Pair("", ("p",), ("nan",), ("None", "\ufffd"))]
    assert to_pairs([(["p"], '["a"]', "b")]) == [Pair("", ("p",), ('["a"]',), ("b",))]


FRAME = pd.DataFrame({"id": [1], "prompt": ["p"], "response_a": ["a"], "response_b": ["b"]})


@pytest.mark.parametrize("rows", [
    [("id", "p", "a", "b")], [("p", "a")], [()], "pab", ("p", "a", "b"), FRAME.to_dict("records"),
    FRAME.iterrows(), FRAME.itertuples(), [FRAME.iloc[0, 1:]], [None], [{"p", "a", "b"}]], ids=range(11))
def test_what_is_no_row_of_three_is_refused_and_the_fields_are_named(rows):
    with pytest.raises(InputError, match=r"row 1: .* expected a tuple of prompt, response_a, response_b") as caught:
        to_pairs(rows)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [4, 2.5, True, b"a", {"a": 1}, [["a"]], [1], np.int64(4), np.array([1.5]), FRAME])
def test_what_is_no_text_is_refused_by_its_column(value):
    with pytest.raises(InputError, match=r"row 2, column response_a: .* of type .* expected a text") as caught:
        to_pairs([("p", "a", "b"), ("p", value, "b")])
    assert "\n" not in str(caught.value)


def test_rows_keep_their_ids_as_text_and_their_label(tmp_path):
    path = write(tmp_path / "t.csv", HEADER + GOOD + '0012345678901,x,y,p,"[""a1"",null]","line\nbreak, ""q""",0,0,1\n')
    first, second = read_pairs(path)
    assert first == Pair("1", ("p",), ("a",), ("b",), 0)
    assert second == Pair("0012345678901", ("p",), ("a1", None), ('line\nbreak, "q"',), 2)


def test_a_byte_order_mark_windows_line_ends_and_other_column_orders_are_read(tmp_path):
    text = "response_b,id,prompt,response_a\r\nb,7,p,a\r\n\r\n"
    assert list(read_pairs(write(tmp_path / "t.csv", text, "utf-8-sig"), "if present")) == [
        Pair("7", ("p",), ("a",), ("b",), None)]


def test_an_answer_longer_than_the_csv_modules_limit_is_read(tmp_path):
    long = "word " * 50_000
    [pair] = read_pairs(write(tmp_path / "t.csv", f"id,prompt,response_a,response_b\n1,p,{long},b\n"), "if present")
    assert pair.response_a == (long,)


@pytest.mark.parametrize(("text", "said"), [
    ("", "an empty file"),
    ("\n1,2\n", "an empty first line"),
    (HEADER, "a header and no rows"),
    ("id,prompt,response_a\n1,p,a\n", "column response_b: no column of this name"),
    ("id,id,prompt,response_a,response_b\n1,1,p,a,b\n", "column id: more than one column of this name"),
    ("id,prompt,response_a,response_b\n1,p,a,b\n", "column winner_model_a: no column of this name"),
    ("id,prompt,response_a,response_b,winner_tie\n1,p,a,b,1\n", "column winner_model_a: no column of this name"),
    (HEADER + GOOD + "2,x,y,p,a\n", "row 2: 5 cells; expected 9"),
    (HEADER + GOOD + "2,x,y,p,a,b,1,0,0,9\n", "row 2: 10 cells"),
    (HEADER + GOOD.replace("1,0,0", "1,1,0"), "row 1, column winner_model_a, winner_model_b, winner_tie: '1,1,0'"),
    (HEADER + GOOD.replace("1,0,0", "0,0,0"), "exactly one 1"),
    (HEADER + GOOD.replace("1,0,0", "yes,0,0"), "row 1, column winner_model_a: 'yes'; expected 0 or 1"),
    (HEADER + GOOD.replace("1,0,0", ",0,1"), "row 1, column winner_model_a: ''"),
    (HEADER + GOOD.replace("1,0,0", "nan,0,1"), "column winner_model_a: 'nan'"),
    (HEADER + GOOD + '2,x,y,"unclosed', "row 2: not CSV"),
    (HEADER + '1,x,y,"p"q,a,b,1,0,0\n', "row 1: not CSV"),
])
def test_a_bad_file_is_named_with_row_and_column_and_what_was_expected(tmp_path, text, said):
    path = write(tmp_path / "bad.csv", text)
    with pytest.raises(InputError, match=r"bad\.csv") as caught:
        list(read_pairs(path))
    assert said in str(caught.value) and "expected" in str(caught.value) and "\n" not in str(caught.value)


def zipped(members):
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return data.getvalue()


def test_a_file_is_read_for_what_it_is_packed_or_not_whatever_its_name_and_encoding(tmp_path):
    plain = HEADER + GOOD + GOOD.replace("a", "é😀")
    wanted = read_pairs(write(tmp_path / "plain.csv", plain))
    packers = [bytes, gzip.compress, bz2.compress, lzma.compress,
               lambda data: zipped({"train.csv": data}),
               lambda data: zipped({"folder/": "", "folder/train": data, "__MACOSX/x": "x"})]
    for pack, encoding in itertools.product(packers, ("utf-8", "utf-8-sig", "utf-16")):
        (tmp_path / "t.csv").write_bytes(pack(plain.encode(encoding)))
        assert read_pairs(tmp_path / "t.csv") == wanted


def test_what_is_no_csv_file_at_all_is_one_line_with_advice(tmp_path):
    plain = (HEADER + GOOD * 50).encode()
    gz, archive, text = gzip.compress(plain), zipped({"t.csv": plain}), plain.decode()
    files = {
        "a whole file, without a password": [
            gz[:3], gz[:-12], gz[:40] + b"\xff" * 9 + gz[49:], bz2.compress(plain)[:-12], lzma.compress(plain)[:-12],
            archive[:-12], archive[:60] + b"\xff" * 9 + archive[69:], b"PK\3\4" + bytes(99),
            archive.replace(b"\0\0\x08\0", b"\x01\0\x08\0")],                               # the bit for a password
        r"a zip of 2 files, \['a.csv', 'b.csv'\]; expected .* zip with nothing else in it": [
            zipped({"a.csv": plain, "b.csv": plain})],
        "a zip of 0 files": [zipped({})],
        "an Excel workbook; expected a CSV file: Excel saves": [
            zipped({"[Content_Types].xml": "", "xl/workbook.xml": ""})],
        "not UTF-8 text .* expected .*Excel saves": [
            "café,".encode("latin-1"), bytes.fromhex("d0cf11e0a1b11ae1") + plain, gzip.compress(gz),
            zipped({"t.csv.zip": archive})],
        "not UTF-16-LE text": [text.encode("utf-16")[:-1]],
        "a binary file, or UTF-16 without a byte order mark": [
            text.encode("utf-16-be"), text.encode("utf-32"), bytes(99)],
        "separated by tabs; expected by commas: Excel saves": [text.replace(",", "\t").encode("utf-16")],
        "separated by semicolons; expected by commas": [plain.replace(b",", b";")],
        "an empty file; expected a header": [b"", gzip.compress(b""), zipped({"t": ""})],
    }
    for said, content in [(said, content) for said, contents in files.items() for content in contents]:
        (tmp_path / "t.csv").write_bytes(content)
        with pytest.raises(InputError, match=said) as caught:
            read_pairs(tmp_path / "t.csv")
        assert "t.csv" in str(caught.value) and "\n" not in str(caught.value)
    for path, said in ((tmp_path, "irectory"), (tmp_path / "none.csv", "no such file")):
        with pytest.raises(InputError, match=said):
            read_pairs(path)


def test_a_packed_line_without_an_end_costs_no_memory_without_end(tmp_path, monkeypatch):
    monkeypatch.setattr("minipref.layouts.LONGEST_CELL", 1000)
    lengths, wrapper = [], io.TextIOWrapper
    class Watched(wrapper):
        def readline(self, *size):
            lengths.append(len(line := wrapper.readline(self, *size)))
            return line
    monkeypatch.setattr("io.TextIOWrapper", Watched)
    (tmp_path / "bomb").write_bytes(gzip.compress(b"x" * 1_000_000))
    with pytest.raises(InputError, match="at most 1,000 characters"):
        read_pairs(tmp_path / "bomb")
    assert max(lengths) <= 16_000


@pytest.mark.parametrize(("ids", "said"), [(["1", "2", "1"], "row 3, column id: '1', already the id of row 1"),
                                           (["1", " "], "row 2, column id: a blank id")])
def test_a_test_file_needs_ids_that_are_unique_and_not_blank(tmp_path, ids, said):
    path = write(tmp_path / "t.csv", "id,prompt,response_a,response_b\n" + "".join(f"{i},p,a,b\n" for i in ids))
    with pytest.raises(InputError, match=said):
        list(read_pairs(path, "if present", unique_ids=True))
    assert len(list(read_pairs(path, "if present"))) == len(ids)


def test_characters_are_counted_over_all_turns_and_missing_answers_count_nothing():
    pair = Pair("1", ("ab", "c"), (None, "dé"), ())
    assert character_counts([pair]).tolist() == [[3, 2, 0]]


# --- the split

def rows_with_shared_prompts(count, seed=0):
    random = np.random.default_rng(seed)
    prompts = [(f"Prompt  {random.integers(count // 3)}",) for _ in range(count)]
    return prompts, random.choice(3, count, p=[0.36, 0.34, 0.30])


def test_no_prompt_is_on_both_sides_of_the_split():
    prompts, labels = rows_with_shared_prompts(3000)
    prompts = [(p[0].upper() if i % 2 else p[0].replace("  ", " "),) for i, p in enumerate(prompts)]
    part = split_by_prompt(prompts, labels, (0.9, 0.1), seed=1)
    sides = [{prompt_key(p) for p, side in zip(prompts, part) if side == s} for s in (0, 1)]
    assert not sides[0] & sides[1] and all(sides)


def test_the_split_has_its_size_and_its_balance_of_labels():
    prompts, labels = rows_with_shared_prompts(3000)
    for shares in ((0.9, 0.1), (0.2,) * 5):
        part = split_by_prompt(prompts, labels, shares, seed=1)
        for k, share in enumerate(shares):
            assert abs((part == k).mean() - share) < 0.01
            for c in range(3):
                assert abs((labels[part == k] == c).mean() - (labels == c).mean()) < 0.02


def test_the_split_is_the_seeds():
    prompts, labels = rows_with_shared_prompts(500)
    first = split_by_prompt(prompts, labels, (0.8, 0.2), seed=1)
    assert (first == split_by_prompt(prompts, labels, (0.8, 0.2), seed=1)).all()
    assert (first != split_by_prompt(prompts, labels, (0.8, 0.2), seed=2)).any()


def test_prompts_differ_by_their_turns_not_only_by_their_text():
    assert prompt_key(("a b",)) != prompt_key(("a", "b"))
    assert prompt_key(("Ａ  B\n",)) == prompt_key(("a b",))


# --- the budget

lengths = st.tuples(*[st.integers(0, 3000)] * 3)


@hypothesis.given(lengths, st.integers(3, 1020))
def test_budgets_fit_the_room_waste_at_most_one_token_and_treat_responses_alike(whole, room):
    budgets = truncation_budgets(whole, room)
    assert all(0 <= kept <= length for kept, length in zip(budgets, whole))
    assert sum(budgets) <= room
    if sum(whole) <= room:
        assert list(whole) == budgets
    else:
        assert sum(budgets) >= room - 1
    prompt, a, b = whole
    assert truncation_budgets((prompt, b, a), room) == [budgets[0], budgets[2], budgets[1]]


def test_long_segments_share_one_to_two_to_two_and_short_ones_leave_theirs_to_the_others():
    assert truncation_budgets((9999, 9999, 9999), 500) == [100, 200, 200]
    assert truncation_budgets((10, 9999, 9999), 500) == [10, 245, 245]
    assert truncation_budgets((9999, 20, 9999), 500) == [160, 20, 320]
    assert truncation_budgets((9999, 20, 30), 500) == [450, 20, 30]


def test_a_segment_that_is_truncated_keeps_its_head_and_its_tail():
    assert truncate_head_tail([0, 1, 2, 3, 4, 5, 6, 7, 8, 9], 5) == [0, 1, 2, 8, 9]
    assert truncate_head_tail([0, 1, 2], 3) == [0, 1, 2]
    assert truncate_head_tail([0, 1, 2], 1) == [0]
    assert truncate_head_tail([0, 1, 2], 0) == []


def test_several_turns_are_numbered_and_a_missing_answer_is_words():
    assert segment_texts(("only",)) == ["only"]
    assert segment_texts(("one", None)) == ["Turn 1:", "one", "Turn 2:", "(no answer)"]


# --- sequences and batches

def encoded(rows, max_length=64, tokenizer=None):
    tokenizer = tokenizer or Words()
    return encode_pairs(rows, tokenizer, max_length), tokenizer


ROWS = [Pair("1", ("what is up",), ("the sky",), ("not much dear",), 0),
        Pair("2", ("count",), ("one two three four five six seven eight nine ten",), (None,), 1),
        Pair("3", ("hi", "and bye"), ("hello", "so long"), ("hey", "ciao"), 2)]


def test_a_sequence_is_cls_prompt_sep_a_sep_b_sep_padded_to_the_longest_of_its_batch():
    tokenized, words = encoded(ROWS)
    ids, attention_mask, labels = collate(tokenized, [0, 1], [False, False], words)
    assert words.words(ids[0]) == "[CLS] what is up [SEP] the sky [SEP] not much dear [SEP]" + " [PAD]" * 5
    assert words.words(ids[1]) == ("[CLS] count [SEP] one two three four five six seven eight nine ten [SEP] "
                                   "(no answer) [SEP]")
    assert attention_mask.sum(1).tolist() == tokenized.lengths[:2].tolist() == [12, 17]
    assert labels.tolist() == [0, 1]
    further, is_token_there, _ = collate(tokenized, [0, 1], [False, False], words, multiple_of=8)
    assert further.shape == (2, 24) and (further[:, :17] == ids).all() and (further[:, 17:] == words.pad_id).all()
    assert (is_token_there[:, :17] == attention_mask).all() and not is_token_there[:, 17:].any()


def test_a_swapped_row_shows_b_first_and_turns_its_label():
    tokenized, words = encoded(ROWS)
    ids, _, labels = collate(tokenized, [0, 1, 2], [True, True, True], words)
    assert words.words(ids[0]).startswith("[CLS] what is up [SEP] not much dear [SEP] the sky [SEP]")
    assert labels.tolist() == [1, 0, 2]


def test_turns_stay_in_order_and_apart():
    tokenized, words = encoded(ROWS)
    ids, _, _ = collate(tokenized, [2], [False], words)
    assert words.words(ids[0]) == ("[CLS] Turn 1: hi Turn 2: and bye [SEP] Turn 1: hello Turn 2: so long [SEP] "
                                   "Turn 1: hey Turn 2: ciao [SEP]")


def test_answer_b_is_there_whatever_the_length_of_prompt_and_a():
    long = " ".join(f"w{i}" for i in range(500))
    tokenized, words = encoded([Pair("1", (long,), (long,), (" ".join(f"b{i}" for i in range(300)),), 0)])
    ids, attention_mask, _ = collate(tokenized, [0], [False], words)
    text = words.words(ids[0])
    assert ids.shape[1] == 64 and attention_mask.all()
    assert " b0 b1 " in text and text.endswith("b298 b299 [SEP]") and text.count("[SEP]") == 3
    assert tokenized.num_truncated[0] == 1300 - 60
    assert "1 of 1 rows (100%) truncated to 64 tokens" in tokenized.truncation()


def test_rows_taken_are_the_rows_asked_for():
    tokenized, words = encoded(ROWS)
    some = tokenized.take(np.array([2, 0]))
    assert some.labels.tolist() == [2, 0]
    assert words.words(some.segments(1)[1]) == "the sky"


@hypothesis.given(st.integers(1, 400), st.integers(1, 33), st.integers(0, 5))
def test_an_epoch_shows_every_row_once(rows, batch_size, epoch):
    lengths = np.random.default_rng(0).integers(4, 500, rows)
    batches = epoch_batches(lengths, batch_size, seed=3, epoch=epoch)
    assert sorted(np.concatenate(batches)) == list(range(rows))
    assert all(len(b) <= batch_size for b in batches) and len(batches) == -(-rows // batch_size)


def test_epochs_differ_seeds_differ_and_the_same_comes_again():
    lengths = np.random.default_rng(0).integers(4, 500, 1000)
    def order(seed, epoch):
        return np.concatenate(epoch_batches(lengths, 8, seed, epoch)).tolist()
    assert order(1, 0) == order(1, 0) and order(1, 0) != order(1, 1) and order(1, 0) != order(2, 0)
    assert (swap_mask(1000, 1, 0) == swap_mask(1000, 1, 0)).all()
    assert 0.4 < (swap_mask(1000, 1, 0) != swap_mask(1000, 1, 1)).mean() < 0.6


def test_batches_of_similar_lengths_need_little_padding_and_come_shuffled():
    lengths = np.random.default_rng(0).integers(4, 500, 4000)
    batches = epoch_batches(lengths, 8, 0, 0)
    padded = sum(len(b) * lengths[b].max() for b in batches)
    assert padded / lengths.sum() < 1.05
    means = np.array([lengths[b].mean() for b in batches])
    assert abs(np.corrcoef(means[:-1], means[1:])[0, 1]) < 0.15


@hypothesis.given(st.lists(st.integers(4, 600), min_size=1, max_size=200), st.integers(1, 5000))
def test_prediction_batches_hold_every_row_within_the_token_budget(row_lengths, budget):
    row_lengths = np.array(row_lengths)
    batches = list(batches_by_tokens(row_lengths, budget))
    assert sorted(np.concatenate(batches)) == list(range(len(row_lengths)))
    assert all(len(b) == 1 or len(b) * row_lengths[b].max() <= budget for b in batches)


def test_swapping_classes_exchanges_a_and_b_and_leaves_the_tie():
    assert swap_classes(np.array([[0.5, 0.2, 0.3]])).tolist() == [[0.2, 0.5, 0.3]]


# --- real rows

def test_the_competitions_own_rows_are_read_without_loss(reference_dir):
    path = reference_dir / "data" / "arena" / "train.csv"
    frame = pd.read_csv(path, dtype=str, keep_default_na=False)
    pairs = list(read_pairs(path))
    assert len(pairs) == len(frame) == 100
    assert np.bincount([p.label for p in pairs]).tolist() == [31, 33, 36]
    assert sum(len(p.prompt) > 1 for p in pairs) == 16
    for pair, row in zip(pairs, frame.to_dict("records")):
        assert pair.id == row["id"] and row[LABEL_COLUMNS[pair.label]] == "1"
        assert [list(turns) for turns in (pair.prompt, pair.response_a, pair.response_b)] == [
            json.loads(row[column]) for column in ("prompt", "response_a", "response_b")]


def test_every_real_file_is_read_and_split_without_a_leak(reference_dir):
    for name, rows in (("autoj", 1392), ("llmeval2", 2553), ("qa_feedback", 3000)):
        pairs = list(read_pairs(reference_dir / "data" / "preferences" / f"{name}.csv"))
        assert len(pairs) == rows
        part = split_by_prompt([p.prompt for p in pairs], [p.label for p in pairs], (0.9, 0.1), seed=42)
        keys = [{prompt_key(p.prompt) for p, side in zip(pairs, part) if side == s} for s in (0, 1)]
        assert not keys[0] & keys[1]


# --- soft labels

SOFT_HEADER = "id,prompt,response_a,response_b,winner_model_a,winner_model_b,winner_tie\n"


def test_soft_labels_are_targets_that_turn_with_the_responses_and_one_hot_ones_are_labels(tmp_path):
    path = tmp_path / "soft.csv"
    path.write_text(SOFT_HEADER + "1,p,a,b,0.7,0.2,0.1\n2,p,a,b,0,0,1\n")
    pairs, tokenizer = read_pairs(path, soft=True), load_tokenizer(BUNDLED)
    assert [pair.label for pair in pairs] == [0, 2] and pairs[0].target == pytest.approx((0.7, 0.2, 0.1))
    tokenized = encode_pairs(pairs, tokenizer, 32)
    for rows in (tokenized, tokenized.take(np.arange(2))):
        _, _, targets = collate(rows, [0, 1, 0], [False, False, True], tokenizer)
        assert targets.dtype == torch.float32 and targets.tolist() == [
            pytest.approx([0.7, 0.2, 0.1]), [0, 0, 1], pytest.approx([0.2, 0.7, 0.1])]
    path.write_text(SOFT_HEADER + "1,p,a,b,1.0,0.0,0\n2,p,a,b,0,0,1\n")
    assert encode_pairs(read_pairs(path, soft=True), tokenizer, 32).targets is None
    assert [p.label for p in read_pairs(path, soft=True)] == [p.label for p in read_pairs(path)]


@pytest.mark.parametrize("cells", ["0.7,0.2,0.2", "1,-0.5,0.5", "0.5,x,0.5", "nan,0.5,0.5", "0,0,0", "inf,0,0"])
def test_what_is_no_soft_label_is_named(tmp_path, cells):
    (tmp_path / "soft.csv").write_text(SOFT_HEADER + f"1,p,a,b,1,0,0\n2,p,a,b,{cells}\n")
    with pytest.raises(InputError, match=r"soft\.csv, row 2, .*three probabilities that sum to 1"):
        read_pairs(tmp_path / "soft.csv", soft=True)


def test_without_the_flag_a_label_that_is_not_one_hot_is_an_error(tmp_path):
    (tmp_path / "soft.csv").write_text(SOFT_HEADER + "1,p,a,b,0.7,0.2,0.1\n")
    with pytest.raises(InputError, match="expected 0 or 1"):
        read_pairs(tmp_path / "soft.csv")
