"""Tensors of checkpoints as params, stacked as they lie in the file, each read once; or random ones in their place."""

import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from jchain._typing import Array, PyTree
from jchain.hub.architecture import Architecture
from jchain.hub.checkpoint import DTYPES
from jchain.hub.places import Leaves

# XLA on CPU takes arrays that begin at such an address as they are.
_ALIGNMENT = 64


class Untrained:
    """Random weights, by the names that they would have in a checkpoint."""

    def __init__(
        self, key: Array, architecture: Architecture, places: tuple[Leaves, list[Leaves], Leaves]
    ) -> None:
        self.path = Path()
        stem, blocks, head = places
        stem_key, head_key, *keys = jax.random.split(key, 2 + len(blocks))
        x = jnp.zeros(architecture.example, architecture.example_dtype)
        hidden, stem_params = architecture.stem.init_with_output(stem_key, x)
        modules = zip(architecture.blocks, keys, strict=True)
        # The head first: where its weights are those of the embeddings, these stay.
        params = [
            architecture.head.init(head_key, hidden),
            stem_params,
            *(module.init(key, hidden) for module, key in modules),
        ]
        self._arrays = {
            names[path]: np.asarray(leaf)
            for variables, names in zip(params, (head, stem, *blocks), strict=True)
            for path, leaf in traverse_util.flatten_dict(variables["params"], sep="/").items()
        }
        self.shapes = {name: array.shape for name, array in self._arrays.items()}
        self.dtypes = {name: array.dtype.name for name, array in self._arrays.items()}

    def read(self, name: str, row: np.ndarray) -> None:
        row[...] = self._arrays[name]


class Reader:
    """Tensors of checkpoints as arrays, each read once."""

    def __init__(self, dtype: Any) -> None:
        self._dtype = dtype
        self._rows: dict[tuple[Path, str], np.ndarray] = {}

    def one(self, checkpoint: Any, places: Leaves) -> PyTree:
        """The params of one module, which share memory with what was read before of the same tensors."""
        return _nest({path: self._read(checkpoint, name) for path, name in places.items()})

    def stack(self, members: list[tuple[Any, Leaves]]) -> PyTree:
        """The params of several modules, each leaf `[n, ...]`, without a second copy of any."""
        stacks = {}
        for path in members[0][1]:
            checkpoint, places = members[0]
            stacks[path] = _allocate((len(members), *checkpoint.shapes[places[path]]), self._dtype)
            for row, (checkpoint, places) in zip(stacks[path], members, strict=True):
                checkpoint.read(places[path], row)
                self._rows[checkpoint.path, places[path]] = row
        return _nest(stacks)

    def _read(self, checkpoint: Any, name: str) -> np.ndarray:
        if (checkpoint.path, name) not in self._rows:
            row = _allocate(checkpoint.shapes[name], self._dtype)
            checkpoint.read(name, row)
            self._rows[checkpoint.path, name] = row
        return self._rows[checkpoint.path, name]


def _allocate(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Memory that XLA on CPU takes as it is."""
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(shape)


def _nest(leaves: dict[str, np.ndarray]) -> PyTree:
    # Without a copy, which `jnp.asarray` would make.
    return traverse_util.unflatten_dict(
        {path: jax.device_put(leaf) for path, leaf in leaves.items()}, sep="/"
    )


def choose_dtype(found: set[str], dtype: Any, where: str) -> np.dtype:
    """The dtype of all weights, of those that are found or the one that is asked for.

    Raises:
      ValueError: several are found and none is asked for, or weights are not of this dtype.
    """
    if dtype is None and len(found) > 1:
        raise ValueError(
            f"{where}: expected weights of one dtype, got {', '.join(sorted(found))}: pass dtype="
        )
    chosen = jnp.dtype(min(found) if dtype is None else dtype)
    if chosen.name not in DTYPES.values():
        raise ValueError(f"expected a dtype of {', '.join(DTYPES.values())}, got {chosen.name}")
    return chosen
