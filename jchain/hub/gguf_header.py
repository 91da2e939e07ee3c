"""The header of a GGUF file: its metadata, and where each tensor is.

The format is described at https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Every count
and length is checked against the size of the file before anything is read, so that a damaged header
takes neither much memory nor much time.
"""

import math
import os
import struct
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from jchain.pytree import shorten

SUFFIX = ".gguf"
_MAGIC, _LFS = b"GGUF", b"version https://git-lfs"
_VERSIONS = (2, 3)  # version 1 has counts of 32 bits
# Far more than any model has. The entries of a header take several times their size in memory.
_MOST_ENTRIES = 1 << 16
_MOST_DIMENSIONS = 4
_STRING, _ARRAY = 8, 9
# The codes of struct and NumPy of the other types of values.
_NUMBERS = {
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d",
}  # fmt: skip


class StringArray(NamedTuple):
    """Strings that are still in the file."""

    offset: int  # position of the first string in the file
    num_strings: int


class TensorEntry(NamedTuple):
    """How a tensor is stored."""

    shape: tuple[int, ...]  # in the order of NumPy, which is the reverse of the file's
    type: int  # number of a `gguf.GGMLQuantizationType`
    offset: int  # position in the file
    num_bytes: int


# Arrays of numbers are NumPy arrays; arrays of strings are read by `Header.read_strings`.
Value = int | float | bool | str | np.ndarray | StringArray


class Header:
    """The header of a GGUF file.

    Attributes:
      path: the file.
      metadata: the values by key.
      tensors: the entries of the tensors by the names that they have in the file.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Read the header of a file.

        Args:
          path: the file.

        Raises:
          FileNotFoundError: if the file is missing, or is a link to a missing file.
          ImportError: if gguf is not installed.
          ValueError: if the file is not a GGUF file of version 2 or 3 in little-endian order, or if
            it is damaged or truncated.
        """
        self.path = Path(path)
        gguf = import_gguf()
        if not self.path.is_file():
            state = "a link to a missing file" if self.path.is_symlink() else "none"
            raise FileNotFoundError(f"expected a GGUF file at {self.path}, found {state}")
        with self.path.open("rb") as file:
            cursor = _Cursor(file, self.path)
            num_tensors, num_values = _read_counts(cursor)
            self.metadata = _read_metadata(cursor, num_values)
            entries = _read_entries(cursor, num_tensors)
            self.tensors = _locate(entries, cursor, self.metadata, gguf)

    def get(self, key: str, default: float | bool | str | None = None) -> Any:
        """Return a value of the metadata that is not an array.

        Args:
          key: key of the value.
          default: value to return if the file does not have the key.

        Raises:
          ValueError: if the file has an array under this key.
        """
        value = self.metadata.get(key, default)
        if isinstance(value, np.ndarray | StringArray):
            raise ValueError(f"{self.path}: expected one value of {key}, got {shorten(value)}")
        return value

    def read_strings(self, key: str) -> list[str]:
        """Read an array of strings.

        Args:
          key: key of the array in the metadata.

        Raises:
          ValueError: if the file does not have the array, or has something else under this key.
        """
        array = self.metadata.get(key)
        if not isinstance(array, StringArray):
            got = "none" if array is None else shorten(array)
            raise ValueError(f"{self.path}: expected {key}, an array of strings, got {got}")
        with self.path.open("rb") as file:
            cursor = _Cursor(file, self.path)
            cursor.seek(array.offset)
            return [cursor.read_string(key) for _ in range(array.num_strings)]


class _Cursor:
    """A position in a file, which reads no more than the file has."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self._file, self.path = file, path
        self.size = os.fstat(file.fileno()).st_size
        self.position = 0

    def seek(self, position: int) -> None:
        self._file.seek(position)
        self.position = position

    def read(self, size: int, what: str) -> bytes:
        self._claim(size, what)
        found = self._file.read(size)
        if len(found) != size:  # the file became shorter
            raise ValueError(f"{self.path} is truncated: expected {size:,} bytes of {what}")
        return found

    def read_number(self, code: str, what: str) -> int | float | bool:
        return struct.unpack("<" + code, self.read(struct.calcsize(code), what))[0]

    def read_count(self, what: str, item_size: int, most: int | None = None) -> int:
        """Read how many items of at least `item_size` bytes follow, which must fit in the file."""
        found = int(self.read_number("Q", what))
        most = (self.size - self.position) // item_size if most is None else most
        if found > most:
            raise ValueError(
                f"{self.path} is damaged or truncated: expected at most {most:,} {what}, got "
                f"{found:,}"
            )
        return found

    def read_string(self, what: str) -> str:
        length = self.read_count(f"bytes of {what}", 1)
        try:
            return self.read(length, what).decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{self.path}: expected UTF-8 in {what}: {error}") from None

    def skip_strings(self, count: int, what: str) -> None:
        # A vocabulary has hundreds of thousands of strings, so this loop does little else.
        read, seek, position = self._file.read, self._file.seek, self.position
        for _ in range(count):
            length = int.from_bytes(read(8), "little")
            position += 8 + length
            if position > self.size:
                break
            seek(length, os.SEEK_CUR)
        self._claim(position - self.position, what)

    def _claim(self, size: int, what: str) -> None:
        if size > self.size - self.position:
            raise ValueError(
                f"{self.path} is truncated: expected {size:,} bytes of {what} at position "
                f"{self.position:,}, got a file of {self.size:,}"
            )
        self.position += size


def import_gguf() -> ModuleType:
    """Import the package gguf.

    Raises:
      ImportError: if gguf is not installed.
    """
    try:
        import gguf
    except ImportError as error:
        raise ImportError(f'GGUF files need gguf: pip install -e ".[gguf]" ({error})') from None
    return gguf


def _read_counts(cursor: _Cursor) -> tuple[int, int]:
    """Read the numbers of tensors and of values, after checks of what kind of file it is."""
    start = cursor.read(min(len(_LFS), cursor.size), "the header")
    if start == _LFS:
        raise ValueError(
            f"{cursor.path} is a pointer of git-lfs, not the file: get it with git lfs pull"
        )
    if not start.startswith(_MAGIC):
        raise ValueError(f"{cursor.path} is not a GGUF file: it starts with {start[:4]!r}")
    cursor.seek(len(_MAGIC))
    version = int(cursor.read_number("I", "the version"))
    if version % (1 << 16) == 0 and version > 0:
        raise ValueError(
            f"{cursor.path} is a big-endian GGUF file, expected little-endian: convert the model "
            "again without --bigendian"
        )
    if version not in _VERSIONS:
        raise ValueError(
            f"{cursor.path} is a GGUF file of version {version}, expected 2 or 3: convert the "
            "model again"
        )
    num_tensors = cursor.read_count("tensors", 1, _MOST_ENTRIES)
    return num_tensors, cursor.read_count("metadata values", 1, _MOST_ENTRIES)


def _read_metadata(cursor: _Cursor, num_values: int) -> dict[str, Value]:
    metadata: dict[str, Value] = {}
    for _ in range(num_values):
        key = cursor.read_string("a metadata key")
        if key in metadata:
            raise ValueError(f"{cursor.path} is damaged: it has {shorten(key)} twice")
        metadata[key] = _read_value(cursor, shorten(key))
    return metadata


def _read_value(cursor: _Cursor, what: str) -> Value:
    kind = int(cursor.read_number("I", what))
    if kind in _NUMBERS:
        return cursor.read_number(_NUMBERS[kind], what)
    if kind == _STRING:
        return cursor.read_string(what)
    if kind == _ARRAY:
        return _read_array(cursor, what)
    raise ValueError(f"{cursor.path} is damaged: {what} has a value of unknown type {kind}")


def _read_array(cursor: _Cursor, what: str) -> np.ndarray | StringArray:
    kind = int(cursor.read_number("I", what))
    if kind in _NUMBERS:
        dtype = np.dtype(_NUMBERS[kind]).newbyteorder("<")
        count = cursor.read_count(f"values of {what}", dtype.itemsize)
        return np.frombuffer(cursor.read(count * dtype.itemsize, what), dtype)
    if kind == _STRING:
        # Each string begins with its length, in 8 bytes.
        count = cursor.read_count(f"values of {what}", 8)
        array = StringArray(cursor.position, count)
        cursor.skip_strings(count, what)
        return array
    raise ValueError(
        f"{cursor.path}: expected {what} to be an array of numbers or strings, got type {kind}"
    )


def _read_entries(cursor: _Cursor, num_tensors: int) -> dict[str, TensorEntry]:
    """Read the entries of the tensors; offsets are still relative, and sizes unknown."""
    entries: dict[str, TensorEntry] = {}
    for _ in range(num_tensors):
        name = cursor.read_string("a tensor name")
        if name in entries:
            raise ValueError(f"{cursor.path} is damaged: it has tensor {shorten(name)} twice")
        num_dimensions = int(cursor.read_number("I", shorten(name)))
        if not 1 <= num_dimensions <= _MOST_DIMENSIONS:
            raise ValueError(
                f"{cursor.path} is damaged: expected 1 to {_MOST_DIMENSIONS} dimensions of "
                f"{shorten(name)}, got {num_dimensions}"
            )
        *shape, kind, offset = struct.unpack(
            f"<{num_dimensions}QIQ", cursor.read(8 * num_dimensions + 12, shorten(name))
        )
        entries[name] = TensorEntry(tuple(reversed(shape)), kind, offset, 0)
    return entries


def _locate(
    entries: dict[str, TensorEntry],
    cursor: _Cursor,
    metadata: dict[str, Value],
    gguf: ModuleType,
) -> dict[str, TensorEntry]:
    """Compute positions and sizes, and check that tensors are in the file and do not overlap."""
    alignment = metadata.get("general.alignment", gguf.GGUF_DEFAULT_ALIGNMENT)
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
        raise ValueError(
            f"{cursor.path} is damaged: expected general.alignment to be a power of 2, got "
            f"{shorten(alignment)}"
        )
    start = math.ceil(cursor.position / alignment) * alignment
    sizes = {int(kind): size for kind, size in gguf.GGML_QUANT_SIZES.items()}
    located, end = {}, 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1].offset):
        if entry.type not in sizes:
            raise ValueError(
                f"{cursor.path}: {shorten(name)} has type {entry.type}, which gguf "
                "does not know: a newer version of the package may know it"
            )
        block_size, block_bytes = sizes[entry.type]
        if 0 in entry.shape or entry.shape[-1] % block_size:
            raise ValueError(
                f"{cursor.path} is damaged: expected rows of {block_size} values or a multiple in "
                f"{shorten(name)}, got shape {list(entry.shape)}"
            )
        num_bytes = math.prod(entry.shape) // block_size * block_bytes
        if entry.offset < end or start + entry.offset + num_bytes > cursor.size:
            raise ValueError(
                f"{cursor.path} is damaged or truncated: expected {num_bytes:,} bytes of "
                f"{shorten(name)} at position {start + entry.offset:,} that no other tensor has, "
                f"got a file of {cursor.size:,}"
            )
        end = entry.offset + num_bytes
        located[name] = entry._replace(offset=start + entry.offset, num_bytes=num_bytes)
    return located
