"""A split in host memory, which programs read in parts.

Splits that are larger than a device's memory, or whose activations are, stay in NumPy arrays (or
memory-mapped files). A program asks the host for one part at a time.
"""

import zlib
from collections.abc import Iterator
from functools import cached_property, partial

import jax
import jax.numpy as jnp
import numpy as np

from jchain._typing import Array, Int, PyTree


class HostArrays:
    """Arrays in host memory with the examples first, compared by identity."""

    def __init__(self, x: PyTree, y: PyTree) -> None:
        self.leaves, self.structure = jax.tree.flatten((x, y))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, HostArrays) or self.structure != other.structure:
            return False
        return all(a is b for a, b in zip(self.leaves, other.leaves, strict=True))

    def __hash__(self) -> int:
        return hash((self.structure, *map(id, self.leaves)))

    def take(self, rows: slice | np.ndarray) -> tuple[PyTree, PyTree]:
        """Take some examples and their labels.

        Args:
          rows: the examples, as a slice or indices.
        """
        return self.structure.unflatten([np.asarray(leaf[rows]) for leaf in self.leaves])

    @cached_property
    def fingerprint(self) -> int:
        """A checksum of all examples and labels."""
        value = 0
        for leaf in self.leaves:
            for start in range(0, len(leaf), 4096):
                value = zlib.crc32(np.asarray(leaf[start : start + 4096]).tobytes(), value)
        return value


@jax.tree_util.register_pytree_node_class
class HostBatch:
    """A split in host memory, of which programs see one part at a time.

    Only the first part is on the device. To read `x` or `y` is an error, because it would load the
    whole split.

    Attributes:
      first: the examples and labels of the first part.
      source: the arrays of the whole split.
      size: the number of examples in a part, the last of which may be smaller.
    """

    def __init__(self, first: PyTree, source: HostArrays, size: int) -> None:
        self.first, self.source, self.size = first, source, size

    @staticmethod
    def make(source: HostArrays, size: int) -> "HostBatch":
        """Make a split that is read in parts.

        Args:
          source: the arrays of the whole split.
          size: the number of examples in a part.
        """
        # Arrays get the dtypes that JAX would give them, such as float32 for float64.
        first = jax.tree.map(jnp.asarray, source.take(slice(size)))
        return HostBatch(first, source, size)

    def tree_flatten(self) -> tuple[tuple[PyTree], tuple[HostArrays, int]]:
        return (self.first,), (self.source, self.size)

    @classmethod
    def tree_unflatten(cls, static: tuple[HostArrays, int], children: tuple[PyTree]) -> "HostBatch":
        return cls(*children, *static)

    @property
    def num_examples(self) -> int:
        """The number of examples in the whole split, B."""
        return self.source.leaves[-1].shape[0]

    @property
    def x(self) -> PyTree:
        """Refuse to load all examples."""
        raise ValueError(self._refusal)

    @property
    def y(self) -> Array:
        """Refuse to load all labels."""
        raise ValueError(self._refusal)

    def __iter__(self) -> Iterator[PyTree]:
        """Refuse to load all examples and labels."""
        raise ValueError(self._refusal)

    @property
    def _refusal(self) -> str:
        return (
            "expected a problem whose examples are read at once, got one with "
            f"batch_size={self.size} and {self.num_examples} examples: use problem.first_part(), "
            "or problem.take(rows)"
        )

    def read(self, start: Int[Array, ""] | int, size: int) -> tuple[PyTree, PyTree]:
        """Read a part of the split. Works while tracing.

        Args:
          start: the index of the first example.
          size: the number of examples.
        """
        shapes = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct((size, *leaf.shape[1:]), leaf.dtype), self.first
        )
        return jax.pure_callback(
            partial(_read, self.source, size, shapes), shapes, start, vmap_method="sequential"
        )

    def iterate(self) -> Iterator[tuple[PyTree, PyTree]]:
        """Iterate over the parts on the host."""
        for start in range(0, self.num_examples, self.size):
            yield self.source.take(slice(start, start + self.size))


def _read(source: HostArrays, size: int, shapes: PyTree, start: Array) -> PyTree:
    begin = int(start)
    rows = source.take(slice(begin, begin + size))
    return jax.tree.map(lambda leaf, shape: leaf.astype(shape.dtype, copy=False), rows, shapes)
