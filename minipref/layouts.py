"""Read preference rows from several file formats as records with the competition's columns.

    file      CSV, JSON lines or Parquet (with pyarrow); CSV and JSON lines also in gzip, bzip2, xz or a zip of one file
    texts     prompt, response_a, response_b; or conversation_a and conversation_b, lists of {"role", "content"}
    labels    winner_model_a, winner_model_b, winner_tie; or winner: model_a, model_b, tie, tie (bothbad)

What is unusual here: the format is detected from the file's first bytes, not from its name.
"""

import bz2
import codecs
import csv
import gzip
import io
import itertools
import json
import lzma
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from minipref.runtime import InputError, check_regular_file, short_repr
from minipref.tokenizer import replace_surrogates

TEXT_COLUMNS = ("prompt", "response_a", "response_b")
LABEL_COLUMNS = ("winner_model_a", "winner_model_b", "winner_tie")       # the classes 0, 1, 2
CONVERSATIONS = ("conversation_a", "conversation_b")
COLUMNS = {"id", "question_id", *TEXT_COLUMNS, *CONVERSATIONS, *LABEL_COLUMNS, "winner"}
WINNERS = {"model_a": 0, "model_b": 1, "tie": 2, "tie (bothbad)": 2, "both_bad": 2}
OTHER_PARTS = {"audio", "function_call", "refusal", "tool_calls"}        # of a turn, besides its content
PACKED = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\0": lzma.open}
SAVE_AS = "Excel saves it as 'CSV UTF-8 (comma delimited)'"
LONGEST_CELL = 1 << 22       # characters; such a cell takes 12 s to tokenize, the competition's longest has some 50,000


def read_records(path: str | Path, labels: str = "required") -> list[dict]:
    """Rows as dicts: "id" as text, prompt and responses as text or a list of turns, the label columns as text.

    A note names any layout other than the competition's CSV. `labels`: "required", or "if present".
    Errors: `InputError` naming file, row (the header is not counted) and column of the first invalid value.
    """
    path, records = Path(path), []
    check_regular_file(path, "a CSV file")
    limit = csv.field_size_limit(LONGEST_CELL)      # module-wide; its default of 131,072 is too small for some answers
    try:
        kind, header, rows = _rows(path)
        layout = _Layout(header, path, labels, kind)
        for values in rows:
            records.append(layout.record(len(records) + 1, values))
    except UnicodeDecodeError as problem:
        raise InputError(file=path, found=f"not {problem.encoding.upper()} text ({problem.reason} after row "
                         f"{len(records)})", expected=f"a CSV file in UTF-8: {SAVE_AS}") from None
    except csv.Error as problem:
        expected = "cells in double quotes, quotes inside them doubled"
        if "field limit" in str(problem):
            expected = f"cells of at most {LONGEST_CELL:,} characters; is a quote missing?"
        raise InputError(file=path, row=len(records) + 1, found=f"not CSV ({problem})", expected=expected) from None
    except (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, RuntimeError) as problem:
        raise InputError(file=path, found=f"cannot be unpacked ({problem})", expected="a whole file, without a password"
                         ) from None
    except OSError as problem:
        raise InputError(file=path, found=problem.strerror or str(problem), expected="a readable CSV file") from None
    finally:
        csv.field_size_limit(limit)
    if not records:
        raise InputError(file=path, found="a header and no rows", expected="at least one row")
    if layout.note:
        print(f"note: {path}: {layout.note}")
    if rows := layout.rows_with_other_parts:
        print(f"note: {path}: images, tool calls and other parts that are not text were left out of {len(rows):,} "
              f"row{'s' * (len(rows) > 1)}; the first: row {rows[0]}")
    return records


class _Layout:
    """The columns of a file, and the conversion of its rows to records."""

    def __init__(self, header: Sequence[str], path: Path, labels: str, kind: str):
        self.path, self.rows_with_other_parts = path, []
        self.id = "id" if "id" in header or "question_id" not in header else "question_id"
        self.texts = CONVERSATIONS if "prompt" not in header and set(CONVERSATIONS) <= set(header) else TEXT_COLUMNS
        self.labels = ("winner",) if "winner" in header and not set(LABEL_COLUMNS) & set(header) else LABEL_COLUMNS
        if labels != "required" and not set(self.labels) & set(header):
            self.labels = ()
        self.needed = [self.id, *self.texts, *self.labels]
        for column in self.needed:
            if header.count(column) != 1:
                times = "no column" if column not in header else "more than one column"
                raise InputError(file=path, column=column, found=f"{times} of this name among "
                                 f"{short_repr(header, 120)}", expected=", ".join(self.needed))
        said = [kind] if kind != "CSV" else []
        said += ["texts from conversation_a and conversation_b"] if self.texts == CONVERSATIONS else []
        said += ["labels from winner"] if self.labels == ("winner",) else []
        said += ["conversation_a and conversation_b are not read"] if self.texts == TEXT_COLUMNS and set(
            CONVERSATIONS) & set(header) else []
        self.note = ", ".join(said)

    def record(self, row: int, values: dict) -> dict:
        for column in self.needed:
            if column not in values:
                raise InputError(file=self.path, row=row, column=column, found="no such column in this row",
                                 expected=", ".join(self.needed))
        if isinstance(values[self.id], bool | float | None | dict | list):      # 1e5 would become '100000.0'
            raise InputError(file=self.path, row=row, column=self.id, found=short_repr(values[self.id]),
                             expected="a text or a whole number")
        record = {"id": replace_surrogates(str(values[self.id]))}
        if self.texts == TEXT_COLUMNS:
            for column in TEXT_COLUMNS:
                value = values[column]
                if not isinstance(value, str | list | None) or (isinstance(value, list) and not all(
                        isinstance(turn, str | None) for turn in value)):
                    raise InputError(file=self.path, row=row, column=column, found=short_repr(value),
                                     expected="a text or a list of texts")
                record[column] = "" if value is None else value
        else:
            (prompt, a), (other, b) = (self._conversation(row, column, values[column]) for column in CONVERSATIONS)
            if prompt != other:
                raise InputError(file=self.path, row=row, column=CONVERSATIONS[1], found="not the prompt of "
                                 "conversation_a", expected="two conversations with the same user turns")
            record |= dict(zip(TEXT_COLUMNS, (prompt, a, b)))
        winner = WINNERS.get(str(values.get("winner")).strip().lower())
        if self.labels == ("winner",):
            if winner is None:
                raise InputError(file=self.path, row=row, column="winner", found=short_repr(values["winner"]),
                                 expected=", ".join(WINNERS))
            record |= {column: str(int(n == winner)) for n, column in enumerate(LABEL_COLUMNS)}
        elif self.labels:
            record |= {column: str(int(value) if isinstance(value := values[column], bool) else value)
                       for column in LABEL_COLUMNS}
            if winner is not None and record[column := LABEL_COLUMNS[winner]].strip() in ("0", "0.0"):
                raise InputError(file=self.path, row=row, column="winner", found=short_repr(values["winner"]),
                                 expected=f"the same as {column}, which is {record[column]}")
        return record

    def _conversation(self, row: int, column: str, value: str | list) -> tuple[list[str], list[str]]:
        """The user's turns and the model's turns. A system prompt counts as a user's turn."""
        try:
            turns = json.loads(value) if isinstance(value, str) else value
            texts = [(turn["role"], _content(turn["content"])) for turn in turns]
        except (KeyError, RecursionError, TypeError, ValueError):
            texts = []
        if not texts or not all(role in ("system", "user", "assistant") for role, _ in texts):
            raise InputError(file=self.path, row=row, column=column, found=short_repr(value), expected="a JSON list of "
                             'turns, each {"role": "user" or "assistant", "content": text}')
        if any(map(_has_other_parts, turns)) and row not in self.rows_with_other_parts:
            self.rows_with_other_parts.append(row)
        answers = [text for role, text in texts if role == "assistant"]
        return [text for role, text in texts if role != "assistant"], answers or [None]       # a missing turn


def _content(content: str | list) -> str:
    """The text of a turn; newer arena files have a list of parts."""
    if isinstance(content, str):
        return content
    return "\n".join(part["text"] for part in content if part["type"] == "text")


def _has_other_parts(turn: dict) -> bool:
    """Whether a turn has more than text."""
    parts = [] if isinstance(turn["content"], str) else turn["content"]
    return any(turn.get(name) for name in OTHER_PARTS) or any(part["type"] != "text" for part in parts)


# --- files ------------------------------------------------------------------------------------------------------------

def _rows(path: Path) -> tuple[str, list[str], Iterator[dict]]:
    """The format of a file, its columns, and its rows as {column: value}, with only the columns that may be needed."""
    with open(path, "rb") as file:
        start = file.read(4)
    if start == b"PAR1":
        return "Parquet", *_parquet(path)
    with _open(path) as file:
        first = file.read(1)
        while first.isspace():
            first = file.read(1)
    if first == "{":
        rows = _json_lines(path)
        row = next(rows)
        return "JSON lines", list(row), itertools.chain([row], rows)
    rows = _csv(path)
    return "CSV", next(rows), rows


def _csv(path: Path) -> Iterator:
    """Yields the header, then each row."""
    with _open(path) as file:
        # Lines are read in parts of bounded length, so a huge line cannot exhaust memory.
        reader = csv.reader(iter(lambda: file.readline(16 * LONGEST_CELL), ""), strict=True)
        header = next(reader, None)
        _check_header(header, path)
        yield header
        places = {column: place for place, column in enumerate(header) if column in COLUMNS}
        row = 0
        for cells in reader:
            if not cells:                       # an empty line, usually the last
                continue
            row += 1
            if cells == header:
                raise InputError(file=path, row=row, found="the header again", expected="it once, as the first line")
            if len(cells) != len(header):
                raise InputError(file=path, row=row, found=f"{len(cells)} cells",
                                 expected=f"{len(header)}, as in the header; is a quote missing?")
            yield {column: cells[place] for column, place in places.items()}


def _check_header(header: list[str] | None, path: Path) -> None:
    if not header:
        raise InputError(file=path, found="an empty file" if header is None else "an empty first line",
                         expected="a header with id, prompt, response_a, response_b")
    if "\0" in "".join(header):
        raise InputError(file=path, found="a binary file, or UTF-16 without a byte order mark",
                         expected=f"a CSV file in UTF-8: {SAVE_AS}")
    for mark, name in (("\t", "tabs"), (";", "semicolons")):
        if len(header) == 1 and mark in header[0]:
            raise InputError(file=path, found=f"columns separated by {name}", expected=f"by commas: {SAVE_AS}")


def _json_lines(path: Path) -> Iterator[dict]:
    with _open(path) as file:
        lines = iter(lambda: file.readline(16 * LONGEST_CELL), "")
        for row, line in enumerate(filter(str.strip, lines), 1):
            try:
                values = json.loads(line, object_pairs_hook=unique_keys)
            except (ValueError, RecursionError) as problem:
                raise InputError(file=path, row=row, found=f"not JSON ({problem})",
                                 expected="a JSON object in each line") from None
            if not isinstance(values, dict):
                raise InputError(file=path, row=row, found=short_repr(values), expected="a JSON object in each line")
            yield {column: value for column, value in values.items() if column in COLUMNS} or values


def unique_keys(pairs: list[tuple]) -> dict:
    """A JSON object. Errors: ValueError for a repeated key, of which json would keep the last value."""
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError(f"a repeated key, among {short_repr([key for key, _ in pairs], 120)}")
    return values


def _parquet(path: Path) -> tuple[list[str], Iterator[dict]]:
    try:
        from pyarrow import ArrowException, parquet
    except ModuleNotFoundError:
        raise InputError(file=path, found="a Parquet file, and pyarrow is not installed",
                         expected="pip install .[parquet], or the same rows as CSV or JSON lines") from None
    try:
        file = parquet.ParquetFile(path)
        header = file.schema_arrow.names
        batches = file.iter_batches(columns=[column for column in header if column in COLUMNS])
        return header, (row for batch in batches for row in batch.to_pylist())
    except ArrowException as problem:
        raise InputError(file=path, found=f"not a Parquet file ({problem})", expected="a whole one") from None


def _open(path: Path) -> io.TextIOWrapper:
    """Open a file as text: UTF-8, or UTF-16 with a byte order mark, compressed or not.

    Errors: `InputError` for a zip that does not hold one file; any exception of the decompression.
    """
    with open(path, "rb") as file:
        start = file.read(6)
    if start.startswith((b"PK\3\4", b"PK\5\6")):
        archive = zipfile.ZipFile(path)
        names = [name for name in archive.namelist() if not name.endswith("/") and not name.startswith("__MACOSX/")]
        if "[Content_Types].xml" in names:
            raise InputError(file=path, found="an Excel workbook", expected=f"a CSV file: {SAVE_AS}")
        if len(names) != 1:
            raise InputError(file=path, found=f"a zip of {len(names)} files, {short_repr(names, 200)}",
                             expected="a CSV file, or a zip with nothing else in it")
        binary = archive.open(names[0])
    else:
        binary = next((unpack for magic, unpack in PACKED.items() if start.startswith(magic)), open)(path, "rb")
    utf16 = binary.peek(2)[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    return io.TextIOWrapper(binary, encoding="utf-16" if utf16 else "utf-8-sig", newline="")
