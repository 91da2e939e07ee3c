"""Tensors in safetensors files, which are read by name on demand."""

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from jchain.hub.file_kinds import check_exists, name_kind

# The dtypes that can be read: a map from the name in a file to the name in NumPy.
DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
# Number of bytes that are read at a time when two tensors are compared.
_CHUNK_SIZE = 1 << 24


class TensorFiles:
    """The tensors of one or several safetensors files.

    Attributes:
      shapes: map from the name of each tensor to its shape.
      dtypes: map from the name of each tensor to the name of its dtype: the name in NumPy if the
        dtype is supported, or else the name in the file.
    """

    def __init__(self, paths: Iterable[Path], places: Mapping[str, str] | None = None) -> None:
        """Read the headers of the files.

        Args:
          paths: the files.
          places: map from the name of a tensor to the name of its file, which decides if several
            files contain the tensor; None if there is no such map.

        Raises:
          FileNotFoundError: if a file is missing.
          ValueError: if a file is damaged, or two files contain the same tensor.
        """
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        self._offsets: dict[str, tuple[Path, int]] = {}
        for path in paths:
            self._read_header(path, places or {})

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

    def _read_header(self, path: Path, places: Mapping[str, str]) -> None:
        """Record the shape, dtype, and offset of each tensor of a file."""
        import safetensors

        check_exists(path)
        try:
            # Opening the file checks offsets, shapes, and dtypes, also against the file size.
            with safetensors.safe_open(path, framework="numpy"):
                pass
        except (safetensors.SafetensorError, OSError, ValueError) as error:
            if kind := name_kind(path):
                raise ValueError(f"expected a safetensors file at {path}, got {kind}") from None
            raise ValueError(f"{path} is damaged or truncated: {error}") from None
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            headers = json.loads(file.read(length))
        headers.pop("__metadata__", None)
        for name, header in headers.items():
            if places.get(name, path.name) != path.name:
                continue
            if name in self.shapes:
                raise ValueError(
                    f"{path}: expected each tensor in one file, got {name} also in "
                    f"{self._offsets[name][0].name}"
                )
            dtype = str(header["dtype"])
            self.shapes[name], self.dtypes[name] = tuple(header["shape"]), DTYPES.get(dtype, dtype)
            self._offsets[name] = path, 8 + length + header["data_offsets"][0]
