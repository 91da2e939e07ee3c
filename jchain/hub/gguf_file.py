"""GGUF files as checkpoints: one file with config, tokenizer, and weights that can be quantized."""

import math
import os
from collections.abc import Iterator

import jax.numpy as jnp
import numpy as np

from jchain.hub.checkpoint import Checkpoint
from jchain.hub.gguf_config import read_config
from jchain.hub.gguf_header import Header, TensorEntry, import_gguf
from jchain.hub.gguf_metadata import Options
from jchain.hub.gguf_names import ROPE_FACTORS, Layout, get_layout, translate

# The types that are not quantized, by their numbers in the file.
_FLOATS = {0: "float32", 1: "float16", 30: "bfloat16"}
# Number of values that are dequantized at a time; a few arrays of this size are needed for it.
_CHUNK_SIZE = 1 << 20


class GGUFCheckpoint(Checkpoint):
    """The tensors of a GGUF file, under their names and in their layouts in Hugging Face's files.

    Tensors are dequantized when they are read, a part at a time. All have one dtype: if all tensors
    of the file are stored in one of float32, bfloat16, and float16, it is this one. Otherwise it is
    float32, because files of quantized or half-precision weights have norms in float32.

    Attributes:
      path: the file.
      location: the file, for error messages about the config.
      config: the config, made from the metadata of the file.
      shapes: map from the name of each tensor to its shape.
      dtypes: map from the name of each tensor to the name of its dtype.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Open a file and read its header.

        Args:
          path: the file.

        Raises:
          FileNotFoundError: if the file is missing.
          ImportError: if gguf is not installed.
          ValueError: if the file is damaged, is not a whole model of a supported family, or has a
            type of quantization that gguf cannot dequantize.
        """
        self.header = Header(path)
        self.path = self.header.path
        self.location = str(self.path)
        options = Options(self.header)
        self.config = read_config(self.header)
        self._gguf = import_gguf()
        self._entries: dict[str, TensorEntry] = {}
        self._layouts: dict[str, Layout] = {}
        self.shapes = {}
        heads = options.num_heads, options.num_kv_heads
        for gguf_name, entry in self.header.tensors.items():
            if gguf_name == ROPE_FACTORS:
                continue
            name = translate(gguf_name, options.architecture)
            layout = get_layout(gguf_name, entry.shape, options.architecture, *heads)
            self._entries[name], self._layouts[name] = entry, layout
            self.shapes[name] = entry.shape[::-1] if layout.is_transposed else entry.shape
        types = {entry.type: name for name, entry in self._entries.items()}
        for kind, name in types.items():
            self._check_type(kind, name)
        dtype = _FLOATS.get(min(types), "float32") if len(types) == 1 else "float32"
        self.dtypes = dict.fromkeys(self.shapes, dtype)

    def read(self, name: str, row: np.ndarray) -> None:
        """Read a tensor into an array, and dequantize it.

        Args:
          name: name of the tensor.
          row: array of the tensor's shape, which is overwritten. If its dtype differs from the
            tensor's, the values are converted.

        Raises:
          ValueError: if the file became shorter after it was opened.
        """
        order, is_transposed = self._layouts[name]
        target = row.T if is_transposed else row
        if target.ndim == 1:
            for values in self._read_parts(name):
                target[slice(None) if order is None else order] = values[0].astype(row.dtype)
            return
        start = 0
        for values in self._read_parts(name):
            rows = slice(start, start + len(values))
            target[rows if order is None else order[rows]] = values.astype(row.dtype)
            start += len(values)

    def are_equal(self, name: str, other: str) -> bool:
        """Check whether two tensors have the same shape and values.

        Args:
          name: name of one tensor.
          other: name of the other tensor.
        """
        if self.shapes[name] != self.shapes[other]:
            return False
        first, second = (
            np.empty(self.shapes[key], jnp.dtype(self.dtypes[key])) for key in (name, other)
        )
        self.read(name, first)
        self.read(other, second)
        return np.array_equal(first, second)

    def _read_parts(self, name: str) -> Iterator[np.ndarray]:
        """Read groups of rows, as they are in the file, in float32 or the dtype of the file."""
        entry = self._entries[name]
        width = entry.shape[-1]
        num_rows = math.prod(entry.shape) // width
        row_bytes = entry.num_bytes // num_rows
        step = max(1, _CHUNK_SIZE // width)
        with self.path.open("rb") as file:
            file.seek(entry.offset)
            for start in range(0, num_rows, step):
                count = min(step, num_rows - start)
                data = np.fromfile(file, np.uint8, count * row_bytes)
                if data.size != count * row_bytes:
                    raise ValueError(
                        f"{self.path} is truncated: expected {entry.num_bytes:,} bytes of {name}"
                    )
                yield self._decode(data.reshape(count, row_bytes), entry.type)

    def _decode(self, rows: np.ndarray, kind: int) -> np.ndarray:
        """Turn the bytes of rows into values."""
        if kind in _FLOATS:
            return rows.view(jnp.dtype(_FLOATS[kind]))
        # Blocks may hold infinite scales.
        with np.errstate(all="ignore"):
            return self._gguf.dequantize(rows, self._gguf.GGMLQuantizationType(kind))

    def _check_type(self, kind: int, name: str) -> None:
        """Check that a type can be dequantized, by doing it for one block of zeros."""
        if kind in _FLOATS:
            return
        known = self._gguf.GGMLQuantizationType(kind)
        block = np.zeros((1, self._gguf.GGML_QUANT_SIZES[known][1]), np.uint8)
        try:
            self._gguf.dequantize(block, known)
        except NotImplementedError:
            raise ValueError(
                f"{self.path}: {name} has type {known.name}, which gguf cannot dequantize: take "
                "a file with another quantization"
            ) from None
