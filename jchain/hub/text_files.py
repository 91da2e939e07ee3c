"""Documents of text from files of several formats, in parts of a bounded length."""

import itertools
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from jchain.hub.record_files import (
    JSON,
    PARQUET,
    TABLES,
    Record,
    describe_missing,
    explain_damage,
    get_format,
    open_text,
    read_records,
)
from jchain.pytree import shorten

# The field, or the column, that holds the text of a document unless another one is named.
FIELD = "text"
# The number of characters in which a JSON value should begin.
_NUM_FIRST = 1024


class Part(NamedTuple):
    """A part of a document.

    Attributes:
      text: the text of the part.
      is_start: whether the document begins with it.
      is_end: whether the document ends with it.
      location: the file, for error messages.
    """

    text: str
    is_start: bool
    is_end: bool
    location: str


def read_parts(path: Path, field: str | None, size: int) -> Iterator[Part]:
    """Read the documents of a file in parts.

    A file of plain text is one document.

    Args:
      path: the file.
      field: name of the field or column that holds the text; None for `FIELD`.
      size: maximum number of characters in a part.

    Raises:
      FileNotFoundError: if the file is missing.
      ImportError: if it is a Parquet file and pyarrow is not installed.
      ValueError: if it is damaged, or a record has no text.
    """
    if get_format(path) not in (*JSON, *TABLES, PARQUET):
        yield from _read_plain(path, size)
        return
    if field is None and get_format(path) == ".json" and _is_no_data(path):
        warnings.warn(
            f"{path} is one JSON object without the field {FIELD!r}: it is read as plain text",
            stacklevel=2,
        )
        yield from _read_plain(path, size)
        return
    columns = [field or FIELD] if get_format(path) == PARQUET else None
    for record in read_records(path, columns):
        yield from _cut(_get_text(record, field), size, str(path))


def _is_no_data(path: Path) -> bool:
    """Tell whether a file is one JSON object that holds no documents, such as a config."""
    with open_text(path) as file, explain_damage(path):
        if not file.read(_NUM_FIRST).lstrip().startswith("{"):
            return False
    first = [record.value for record in itertools.islice(read_records(path), 2)]
    if len(first) != 1 or not isinstance(first[0], dict) or FIELD in first[0]:
        return False
    lists = [value for value in first[0].values() if isinstance(value, list)]
    return not any(isinstance(item, dict) for items in lists for item in items)


def _get_text(record: Record, field: str | None) -> str:
    value, name = record.value, field or FIELD
    if isinstance(value, str):
        return value
    if isinstance(value, dict):
        if name not in value:
            words = describe_missing(name, [*map(str, value)], record.location)
            raise ValueError(f"{words}; name another one with field= or --field")
        value = value[name]
        if isinstance(value, str):
            return value
    raise ValueError(
        f"{record.location}: expected text, or an object with the field {name!r} that holds text, "
        f"got {shorten(value)}"
    )


def _read_plain(path: Path, size: int) -> Iterator[Part]:
    with open_text(path) as file, explain_damage(path):
        text, is_start = file.read(size), True
        while text:
            following = file.read(size)
            yield Part(text, is_start, not following, str(path))
            text, is_start = following, False


def _cut(text: str, size: int, location: str) -> Iterator[Part]:
    for start in range(0, len(text), size):
        end = start + size
        yield Part(text[start:end], start == 0, end >= len(text), location)
