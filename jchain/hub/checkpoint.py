"""Checkpoint folders in the format of Hugging Face, with config.json and safetensors files.

The tensors are in one file, or in several files (shards) with an index.
"""

import json
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

JsonObject = dict[str, Any]

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
# The dtypes that can be read: a map from the name in a file to the name in NumPy.
DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
# Number of bytes that are read at a time when two tensors are compared.
_CHUNK_SIZE = 1 << 24


class Checkpoint:
    """The tensors of a checkpoint folder, which are read by name on demand.

    Attributes:
      path: the checkpoint folder.
      location: path of config.json, for error messages.
      name: name of the model, which is that of the folder.
      config: content of the folder's config.json.
      shapes: map from the name of each tensor to its shape.
      dtypes: map from the name of each tensor to the name of its dtype: the name in NumPy if the
        dtype is supported, or else the name in the file.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Open the files of a folder and read their headers.

        Args:
          path: the checkpoint folder.

        Raises:
          FileNotFoundError: if the folder or one of its files is missing.
          ValueError: if a file is damaged, or the index does not match the shards.
        """
        self.path = Path(path)
        self.location, self.name = str(self.path / CONFIG), self.path.resolve().name
        self.config = read_json(self.path / CONFIG)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        self._offsets: dict[str, tuple[Path, int]] = {}
        # As in transformers, a single file takes precedence over shards, which may be older.
        index = {} if (self.path / WEIGHTS).exists() else self._read_index()
        for file_name in sorted(set(index.values())) if index else [WEIGHTS]:
            self._read_header(file_name)
        if index and index.keys() != self.shapes.keys():
            different = list_names(index.keys() ^ self.shapes.keys())
            raise ValueError(
                f"{self.path / INDEX}: expected the names of the tensors in the shards, which "
                f"differ in {different}"
            )

    def read(self, name: str, row: np.ndarray) -> None:
        """Read a tensor into an array.

        Args:
          name: name of the tensor.
          row: contiguous array of the tensor's shape, which is overwritten. If its dtype differs
            from the tensor's, the values are converted.

        Raises:
          ValueError: if the file became shorter after it was opened.
        """
        if row.dtype.name != self.dtypes[name]:
            stored = np.empty(row.shape, jnp.dtype(self.dtypes[name]))
            self.read(name, stored)
            row[...] = stored.astype(row.dtype)
            return
        path, start = self._offsets[name]
        # The pages of a memory map would stay in memory in addition to the array, so the file is
        # read without one.
        with open(path, "rb") as file:
            file.seek(start)
            if file.readinto(row.reshape(-1).view(np.uint8).data) != row.nbytes:
                raise ValueError(f"{path} is truncated: expected {row.nbytes:,} bytes of {name}")

    def are_equal(self, name: str, other: str) -> bool:
        """Check whether two tensors have the same shape, dtype, and bytes.

        Args:
          name: name of one tensor.
          other: name of the other tensor.
        """
        if (self.shapes[name], self.dtypes[name]) != (self.shapes[other], self.dtypes[other]):
            return False
        num_bytes = math.prod(self.shapes[name]) * jnp.dtype(self.dtypes[name]).itemsize
        (path, start), (other_path, other_start) = self._offsets[name], self._offsets[other]
        with open(path, "rb") as file, open(other_path, "rb") as other_file:
            file.seek(start)
            other_file.seek(other_start)
            sizes = (min(_CHUNK_SIZE, num_bytes - i) for i in range(0, num_bytes, _CHUNK_SIZE))
            return all(file.read(size) == other_file.read(size) for size in sizes)

    def _read_index(self) -> dict[str, str]:
        """Read the map from each tensor to its file; it is empty if the folder has no index."""
        path = self.path / INDEX
        if not path.exists():
            return {}
        index = read_json(path).get("weight_map")
        is_map = isinstance(index, dict) and all(isinstance(name, str) for name in index.values())
        if not is_map or not index:
            raise ValueError(
                f"{path}: expected a weight_map from tensors to files, got {index!r:.80}"
            )
        outside = [name for name in index.values() if Path(name).name != name]
        if outside:
            raise ValueError(f"{path}: expected files of this folder, got {outside[0]!r}")
        return index

    def _read_header(self, file_name: str) -> None:
        """Record the shape, dtype, and offset of each tensor of a file."""
        import safetensors

        path = self.path / file_name
        self._check_exists(path)
        try:
            # Opening the file checks offsets, shapes, and dtypes, also against the file size.
            with safetensors.safe_open(path, framework="numpy"):
                pass
        except (safetensors.SafetensorError, OSError, ValueError) as error:
            raise ValueError(f"{path} is damaged or truncated: {error}") from None
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            headers = json.loads(file.read(length))
        headers.pop("__metadata__", None)
        repeated = headers.keys() & self.shapes.keys()
        if repeated:
            raise ValueError(
                f"{path}: expected each tensor in one shard, got {list_names(repeated)} again"
            )
        for name, header in headers.items():
            dtype = str(header["dtype"])
            self.shapes[name], self.dtypes[name] = tuple(header["shape"]), DTYPES.get(dtype, dtype)
            self._offsets[name] = path, 8 + length + header["data_offsets"][0]

    def _check_exists(self, path: Path) -> None:
        if path.is_file():
            return
        suffixes = (".safetensors", ".bin", ".pt")
        found = sorted(other.name for other in self.path.iterdir() if other.suffix in suffixes)
        raise FileNotFoundError(
            f"expected weights at {path}, found {', '.join(found) or 'none'}: only safetensors "
            "are read, never pickle"
        )


def read_json(path: Path) -> JsonObject:
    """Read a JSON object from a file of a checkpoint folder.

    Args:
      path: the JSON file.

    Raises:
      FileNotFoundError: if the folder or the file is missing.
      ValueError: if the file does not contain a JSON object.
    """
    if not path.parent.is_dir():
        raise FileNotFoundError(f"expected a checkpoint folder at {path.parent}, found none")
    if not path.is_file():
        raise FileNotFoundError(f"expected {path.name} in {path.parent}, found none")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path}: expected an object, got {found!r:.80}")
    return found


def list_names(names: Iterable[str], most: int = 4) -> str:
    """Sort names and join the first few of them, for an error message.

    Args:
      names: all names.
      most: maximum number of names to list; the remaining names are only counted.
    """
    names = sorted(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
