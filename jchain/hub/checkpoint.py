"""Checkpoint folders as Hugging Face writes them: config.json and safetensors, in one file or in shards with an index."""

import json
import math
import os
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
# Bytes of two tensors that are compared at a time.
_PIECE = 1 << 24


class Checkpoint:
    """The tensors of a folder by name, read when they are asked for.

    Attributes:
      path: the folder.
      config: what its config.json holds.
      shapes: of each tensor.
      dtypes: of each tensor, as NumPy calls it.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Open the files and read their headers.

        Raises:
          FileNotFoundError: there is no such folder, or a file of it is missing.
          ValueError: a file is damaged, or the index and the shards disagree.
        """
        self.path = Path(path)
        self.config = read_json(self.path / CONFIG)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        self._places: dict[str, tuple[Path, int]] = {}
        # As transformers: a whole file comes before shards, which may be older.
        index = {} if (self.path / WEIGHTS).exists() else self._read_index()
        for file_name in sorted(set(index.values())) if index else [WEIGHTS]:
            self._open(file_name)
        if index and index.keys() != self.shapes.keys():
            raise ValueError(
                f"{self.path / INDEX} does not name the tensors of its shards: {list_names(index.keys() ^ self.shapes.keys())}"
            )

    def read(self, name: str, row: np.ndarray) -> None:
        """One tensor into an array of its shape, of its own dtype or another one.

        Raises:
          ValueError: the file has become shorter since it was opened.
        """
        if row.dtype.name != self.dtypes[name]:
            own = np.empty(row.shape, jnp.dtype(self.dtypes[name]))
            self.read(name, own)
            row[...] = own.astype(row.dtype)
            return
        path, start = self._places[name]
        # Not by the mapped file, whose pages would stay in memory beside the array.
        with open(path, "rb") as file:
            file.seek(start)
            memory: Any = row.reshape(-1).view(np.uint8)
            if file.readinto(memory) != row.nbytes:
                raise ValueError(f"{path} is truncated: expected {row.nbytes:,} bytes of {name}")

    def are_equal(self, name: str, other: str) -> bool:
        """Whether two tensors are of the same numbers."""
        if (self.shapes[name], self.dtypes[name]) != (self.shapes[other], self.dtypes[other]):
            return False
        num_bytes = math.prod(self.shapes[name]) * jnp.dtype(self.dtypes[name]).itemsize
        (path, start), (other_path, other_start) = self._places[name], self._places[other]
        with open(path, "rb") as file, open(other_path, "rb") as other_file:
            file.seek(start)
            other_file.seek(other_start)
            for i in range(0, num_bytes, _PIECE):
                size = min(_PIECE, num_bytes - i)
                if file.read(size) != other_file.read(size):
                    return False
        return True

    def _read_index(self) -> dict[str, str]:
        if not (self.path / INDEX).exists():
            return {}
        index = read_json(self.path / INDEX).get("weight_map")
        if (
            not isinstance(index, dict)
            or not index
            or not all(isinstance(name, str) for name in index.values())
        ):
            raise ValueError(
                f"{self.path / INDEX}: expected a weight_map from tensors to files, got {index!r:.80}"
            )
        outside = [name for name in index.values() if Path(name).name != name]
        if outside:
            raise ValueError(
                f"{self.path / INDEX}: expected files of this folder, got {outside[0]!r}"
            )
        return index

    def _open(self, file_name: str) -> None:
        import safetensors

        path = self.path / file_name
        if not path.is_file():
            found = sorted(
                other.name
                for other in self.path.iterdir()
                if other.suffix in (".safetensors", ".bin", ".pt")
            )
            raise FileNotFoundError(
                f"expected weights at {path}, found {', '.join(found) or 'none'}: only safetensors are read, never pickle"
            )
        try:
            # Checks offsets, shapes and dtypes against each other and against the size of the file.
            with safetensors.safe_open(path, framework="numpy"):
                pass
        except (safetensors.SafetensorError, OSError, ValueError) as error:
            raise ValueError(f"{path} is damaged or truncated: {error}") from None
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            headers = json.loads(file.read(length))
        headers.pop("__metadata__", None)
        twice = headers.keys() & self.shapes.keys()
        if twice:
            raise ValueError(
                f"{path}: expected tensors in one shard each, got {list_names(twice)} again"
            )
        for name, header in headers.items():
            dtype = str(header["dtype"])
            self.shapes[name], self.dtypes[name] = tuple(header["shape"]), DTYPES.get(dtype, dtype)
            self._places[name] = path, 8 + length + header["data_offsets"][0]


def read_json(path: Path) -> dict[str, Any]:
    """An object of a JSON file.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it holds no JSON object.
    """
    if not path.parent.is_dir():
        raise FileNotFoundError(f"expected a checkpoint folder at {path.parent}, found none")
    if not path.is_file():
        raise FileNotFoundError(f"expected {path.name} in {path.parent}, found none")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path}: expected an object, got {found!r:.80}")
    return found


def list_names(names: Any, most: int = 4) -> str:
    """The first few names."""
    names = sorted(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
