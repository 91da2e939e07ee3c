"""Records from files of JSON, JSON lines, tables, and Parquet, one at a time.

The formats are told by the ending of the name: .json, .jsonl, .csv, .tsv, and .parquet. All but
.parquet may be compressed by gzip, with .gz added to the name. Files may be larger than memory.
"""

import contextlib
import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, TextIO

from jchain.hub.checkpoint import list_names
from jchain.pytree import get_first_line

# The endings of files with records; all other files are plain text.
JSON, TABLES, PARQUET = (".json", ".jsonl", ".ndjson"), (".csv", ".tsv"), ".parquet"
# Number of characters of JSON that are read at a time, and of rows of Parquet.
_CHUNK_SIZE, _NUM_ROWS = 1 << 20, 256
_SPACE = re.compile(r"[ \t\n\r]*")
# The longest part of a JSON value other than a string that may be cut at the end of a chunk.
_LONGEST_WORD = 16
# The start of a file in UTF-16.
_UTF_16 = (b"\xff\xfe", b"\xfe\xff")


class Record(NamedTuple):
    """A value of a file.

    Attributes:
      value: the value: a dict with the columns of a row, a list if a table has no header, or any
        value of JSON.
      location: the file and the line, for error messages.
    """

    value: object
    location: str


def get_format(path: Path) -> str:
    """Return the ending of a file's name that tells its format, in lower case, without .gz.

    Args:
      path: the file.
    """
    suffixes = [suffix.lower() for suffix in path.suffixes]
    return suffixes[-2] if suffixes[-1:] == [".gz"] and len(suffixes) > 1 else path.suffix.lower()


@contextlib.contextmanager
def open_text(path: Path, newline: str | None = None) -> Iterator[TextIO]:
    """Open a file of text in UTF-8, which may begin with a byte order mark.

    Args:
      path: the file, compressed if its name ends in .gz.
      newline: as for `open`.

    Raises:
      FileNotFoundError: if it is missing.
      ValueError: if it is damaged or not in UTF-8. What the block raises is passed on.
    """
    if not path.is_file():
        raise FileNotFoundError(f"expected a text file at {path}, found none")
    is_compressed = path.suffix.lower() == ".gz"
    with gzip.open(path) if is_compressed else path.open("rb") as file:
        with explain_damage(path):
            file = io.BufferedReader(file) if is_compressed else file  # pyright: ignore
            if file.peek(2)[:2] in _UTF_16:  # pyright: ignore[reportAttributeAccessIssue]
                raise ValueError(f"expected text in UTF-8 in {path}, got UTF-16")
        with io.TextIOWrapper(file, "utf-8-sig", newline=newline) as text:  # pyright: ignore
            yield text


@contextlib.contextmanager
def explain_damage(path: Path) -> Iterator[None]:
    """Turn what readers raise for damaged files into a ValueError that names the file.

    Args:
      path: the file that the block reads.
    """
    try:
        yield
    except UnicodeDecodeError as error:
        raise ValueError(f"expected text in UTF-8 in {path}: {error}") from None
    except (csv.Error, EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path} is damaged: {get_first_line(error)}") from None


def read_records(
    path: Path,
    columns: Sequence[str] | None = None,
    is_header: Callable[[Sequence[str]], bool] = bool,
) -> Iterator[Record]:
    """Read the records of a file, one at a time.

    Args:
      path: a file whose format `get_format` tells.
      columns: the columns to read from a Parquet file, which are then required; None for all.
      is_header: tells whether the first row of a table names its columns.

    Raises:
      FileNotFoundError: if the file is missing.
      ImportError: if it is a Parquet file and pyarrow is not installed.
      ValueError: if it is damaged, or a row has more or fewer cells than the header.
    """
    kind = get_format(path)
    if kind == PARQUET:
        yield from _read_parquet(path, columns)
        return
    is_table = kind in TABLES
    with open_text(path, "" if is_table else None) as file, explain_damage(path):
        if is_table:
            yield from _read_table(file, path, "\t" if kind == ".tsv" else ",", is_header)
        else:
            yield from _JsonReader(file, path).read_all()


def _read_table(
    file: TextIO, path: Path, delimiter: str, is_header: Callable[[Sequence[str]], bool]
) -> Iterator[Record]:
    reader = csv.reader(file, delimiter=delimiter, strict=True)
    header: list[str] | None = None
    limit = csv.field_size_limit(2**31 - 1)  # the default refuses documents of 128 KiB
    try:
        for number, row in enumerate(row for row in reader if row):
            if number == 0 and is_header(row):
                header = [name.strip() for name in row]
                continue
            location = f"{path}, line {reader.line_num}"
            if header is None:
                yield Record(row, location)
                continue
            if len(row) != len(header):
                raise ValueError(f"{location}: expected {len(header)} cells, got {len(row)}")
            yield Record(dict(zip(header, row, strict=True)), location)
    finally:
        csv.field_size_limit(limit)


def _read_parquet(path: Path, columns: Sequence[str] | None) -> Iterator[Record]:
    if not path.is_file():
        raise FileNotFoundError(f"expected a text file at {path}, found none")
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError(
            f'.parquet files need pyarrow: pip install -e ".[parquet]" ({error})'
        ) from None
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            for column in columns or ():
                if column not in names:
                    raise ValueError(describe_missing(column, names, str(path)))
            for batch in file.iter_batches(_NUM_ROWS, columns=columns and [*columns]):
                for value in batch.to_pylist():
                    number += 1
                    yield Record(value, f"{path}, row {number}")
    except (pyarrow.ArrowException, ArithmeticError, LookupError, OSError, ValueError) as error:
        reason = get_first_line(error)
        named = reason if str(path) in reason else f"{path} is damaged: {reason}"
        raise ValueError(named) from None


def describe_missing(field: str, found: Sequence[str], location: str) -> str:
    """Describe a record that lacks a field.

    Args:
      field: the field.
      found: the fields that it has.
      location: where it is from.
    """
    return f"{location}: expected the field {field!r}, found {list_names(found, 12) or 'none'}"


class _JsonReader:
    """Reads JSON values from a file in parts: the items of one array, or one after another."""

    def __init__(self, file: TextIO, path: Path):
        self._file, self._path = file, path
        self._text, self._start, self._is_complete = "", 0, False
        # The number of the line up to a position of the text.
        self._line, self._counted = 1, 0
        self._decoder = json.JSONDecoder()

    def read_all(self) -> Iterator[Record]:
        is_array = self._peek() == "["
        if is_array:
            self._start += 1
        is_first = True
        while (character := self._peek()) and not (is_array and character == "]"):
            if is_array and not is_first:
                self._expect(",")
            is_first = False
            location = self._locate()
            yield Record(self._read_value(), location)
        if is_array:
            self._expect("]")
            if self._peek():
                raise ValueError(f"{self._locate()}: expected the end after the array")

    def _peek(self) -> str:
        """Skip white space, and return the next character; empty at the end of the file."""
        while True:
            match = _SPACE.match(self._text, self._start)
            self._start = match.end() if match else self._start
            if self._start < len(self._text) or self._is_complete:
                return self._text[self._start : self._start + 1]
            self._read_more()

    def _expect(self, character: str) -> None:
        if self._peek() != character:
            raise ValueError(f"{self._locate()}: expected {character!r} in the array")
        self._start += 1
        self._peek()

    def _read_value(self) -> object:
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self._start)
                # A number may go on in the next part.
                if self._is_complete or end < len(self._text) or self._text[end - 1] in '"]}':
                    self._start = end
                    return value
            except json.JSONDecodeError as error:
                is_cut = error.pos >= len(self._text) - _LONGEST_WORD
                is_cut |= error.msg.startswith("Unterminated string")
                if self._is_complete or not is_cut:
                    raise ValueError(f"{self._locate()}: expected JSON, got {error}") from None
            except (ValueError, RecursionError) as error:  # of a huge integer, of deep lists
                raise ValueError(f"{self._locate()}: {get_first_line(error)}") from None
            self._read_more()

    def _read_more(self) -> None:
        """Read as much again as is left, so that a long value is not parsed many times."""
        self._locate()
        rest = self._text[self._start :]
        more = self._file.read(max(_CHUNK_SIZE, len(rest)))
        self._text, self._start, self._counted = rest + more, 0, 0
        self._is_complete = not more

    def _locate(self) -> str:
        self._line += self._text.count("\n", self._counted, self._start)
        self._counted = self._start
        return f"{self._path}, line {self._line}"
