"""The one exception for everything a user can cause: the programs print it as one line and exit with code 2."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path


class InputError(Exception):
    """What a user gave is wrong.

    The message is one line that says where (file, row, column), what was found and what was expected, as far as
    each applies. A row is the record's number in the file, the header not counted: the first record is row 1.
    """

    def __init__(self, *, found: str, expected: str = "", file: str | Path | None = None,
                 row: int | None = None, column: str | None = None):
        self.file, self.row, self.column, self.found, self.expected = file, row, column, found, expected
        where = [str(file)] if file is not None else []
        where += [f"row {row}"] if row is not None else []
        where += [f"column {column}"] if column is not None else []
        message = f"{', '.join(where)}: {found}" if where else found
        message += f"; expected {expected}" if expected else ""
        super().__init__(" ".join(message.split()))


def shown(value: object, limit: int = 60) -> str:
    """`value` as an error message may quote it: its repr on one line, cut to `limit` characters."""
    text = repr(value)
    return text if len(text) <= limit else f"{text[:limit]}... ({len(text):,} characters)"


def print_anything() -> None:
    """Let print() take any text: a terminal that lacks a character of a file's name gets its number instead."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):         # pytest and notebooks put streams of their own there
            stream.reconfigure(errors="backslashreplace")


class ArgumentParser(argparse.ArgumentParser):
    """argparse, but for a wrong argument it raises `InputError`: one line, as for every other mistake."""

    def parse_args(self, arguments: Sequence[str] | None = None, namespace=None):
        for text in sys.argv[1:] if arguments is None else arguments:
            if any("\ud800" <= character <= "\udfff" for character in text):
                self.error(f"{shown(text)}, which is not UTF-8")
        return super().parse_args(arguments, namespace)

    def error(self, message: str):
        raise InputError(found=message, expected=f"what {self.prog} --help describes")
