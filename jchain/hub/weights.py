"""The weights of a model as stacked params, either read from checkpoints or random."""

import math
from pathlib import Path
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.typing import DTypeLike

from jchain._typing import Array, Key, PyTree
from jchain.hub.architecture import Architecture
from jchain.hub.tensor_files import DTYPES
from jchain.hub.tensor_names import ModelNames, TensorNames

# Alignment in bytes. XLA on CPU uses the memory of arrays with this alignment without copying it.
_ALIGNMENT = 64


class RandomWeights:
    """Random float32 weights with the interface of a `Checkpoint`.

    Attributes:
      path: an empty path, because no file is read.
      shapes: map from the name of each tensor to its shape.
      dtypes: map from the name of each tensor to the NumPy name of its dtype.
    """

    def __init__(self, key: Key[Array, ""], architecture: Architecture, names: ModelNames) -> None:
        """Draw the weights.

        Args:
          key: the PRNG key for the initializers of the modules.
          architecture: the architecture of the model.
          names: map from each param to the name of its tensor.
        """
        self.path = Path()
        stem_key, head_key, *keys = jax.random.split(key, 2 + len(names.blocks))
        x = jnp.zeros(architecture.example_shape, architecture.example_dtype)
        hidden, stem_params = architecture.stem.init_with_output(stem_key, x)
        modules = zip(architecture.blocks, keys, strict=True)
        # The head comes first, so that embeddings replace the weights that are tied to them.
        params = [
            architecture.head.init(head_key, hidden),
            stem_params,
            *(module.init(key, hidden) for module, key in modules),
        ]
        parts = (names.head, names.stem, *names.blocks)
        self._arrays = {
            part[path]: np.asarray(leaf, np.float32)
            for variables, part in zip(params, parts, strict=True)
            for path, leaf in traverse_util.flatten_dict(variables["params"], sep="/").items()
        }
        self.shapes = {name: array.shape for name, array in self._arrays.items()}
        self.dtypes = {name: array.dtype.name for name, array in self._arrays.items()}

    def read(self, name: str, row: np.ndarray) -> None:
        """Copy a tensor into an array.

        Args:
          name: name of the tensor.
          row: array of the tensor's shape, which is overwritten.
        """
        row[...] = self._arrays[name]


class Weights(Protocol):
    """The tensors of a model by name: a checkpoint, one with an adapter, or random weights.

    Attributes:
      path: folder or file of the model, for error messages.
      shapes: map from the name of each tensor to its shape.
      dtypes: map from the name of each tensor to the name of its dtype.
    """

    path: Path
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]

    def read(self, name: str, row: np.ndarray) -> None:
        """Read a tensor into an array.

        Args:
          name: name of the tensor.
          row: contiguous array of the tensor's shape, which is overwritten.
        """
        ...


class WeightReader:
    """Reader that converts tensors to params of one dtype and reads each tensor only once."""

    def __init__(self, dtype: np.dtype) -> None:
        """Make a reader that has not read any tensor.

        Args:
          dtype: dtype of the params.
        """
        self._dtype = dtype
        self._rows: dict[tuple[Path, str], np.ndarray] = {}

    def read(self, weights: Weights, names: TensorNames) -> PyTree:
        """Read the params of one module.

        Tensors that were read before share their memory.

        Args:
          weights: the checkpoint or the random weights that hold the tensors.
          names: map from each param to the name of its tensor.
        """
        return _nest({path: self._read_tensor(weights, name) for path, name in names.items()})

    def read_stack(self, members: list[tuple[Weights, TensorNames]]) -> PyTree:
        """Read the params of several modules as one stack, without a second copy in memory.

        Args:
          members: for each module, the weights that hold its tensors, and a map from each param to
            the name of its tensor.

        Returns:
          The params, whose leaves have shape `[n, ...]` for n members.
        """
        stacks = {}
        first_weights, first_names = members[0]
        for path, first_name in first_names.items():
            stack = _allocate((len(members), *first_weights.shapes[first_name]), self._dtype)
            for row, (weights, names) in zip(stack, members, strict=True):
                weights.read(names[path], row)
                self._rows[weights.path, names[path]] = row
            stacks[path] = stack
        return _nest(stacks)

    def _read_tensor(self, weights: Weights, name: str) -> np.ndarray:
        """Read a tensor, or reuse the array if it was read before."""
        if (weights.path, name) not in self._rows:
            row = _allocate(weights.shapes[name], self._dtype)
            weights.read(name, row)
            self._rows[weights.path, name] = row
        return self._rows[weights.path, name]


def _allocate(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Allocate an array whose memory XLA on CPU can use without copying it."""
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(shape)


def _nest(leaves: dict[str, np.ndarray]) -> PyTree:
    """Nest params by their paths."""
    # `jnp.asarray` would copy the arrays.
    return traverse_util.unflatten_dict(
        {path: jax.device_put(leaf) for path, leaf in leaves.items()}, sep="/"
    )


def choose_dtype(found: set[str], dtype: DTypeLike | None, location: str) -> np.dtype:
    """Choose the dtype of all weights.

    Args:
      found: names of the dtypes in the files.
      dtype: the requested dtype; if None, the only dtype in the files.
      location: paths of the files, for error messages.

    Raises:
      ValueError: if `dtype` is None and the files have several dtypes, or if the dtype is not
        supported.
    """
    if dtype is None and len(found) > 1:
        raise ValueError(
            f"{location}: expected weights of one dtype, got {', '.join(sorted(found))}; "
            "set dtype to choose one"
        )
    try:
        # NumPy reads a tuple as a structured dtype.
        chosen = None
        if not isinstance(dtype, tuple | list | dict):
            chosen = jnp.dtype(min(found) if dtype is None else dtype)
    except (TypeError, ValueError):  # not a dtype, such as torch.bfloat16 or "auto"
        chosen = None
    if chosen is None or chosen.name not in DTYPES.values():
        got = repr(dtype) if chosen is None else chosen.name
        raise ValueError(
            f"expected dtype to be None, for that of the file, or one of "
            f"{', '.join(DTYPES.values())}, got {got}"
        )
    return chosen
