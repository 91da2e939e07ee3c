"""Weights that are multiplied as they are read, for options that have no module of their own."""

from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np

from jchain.hub.architecture import Architecture
from jchain.hub.tensor_names import ModelNames


class Tensors(Protocol):
    """What a `Checkpoint` and random weights have in common."""

    path: Path
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]

    def read(self, name: str, row: np.ndarray) -> None:
        """Read a tensor into an array."""


Own = TypeVar("Own", bound=Tensors)


class FoldedWeights:
    """Weights with the scales of an architecture folded in, with the interface of a `Checkpoint`.

    Attributes:
      path: path of the weights.
      shapes: map from the name of each tensor to its shape.
      dtypes: map from the name of each tensor to the NumPy name of its dtype.
    """

    def __init__(self, weights: Tensors, architecture: Architecture, names: ModelNames) -> None:
        """Wrap weights.

        Args:
          weights: the checkpoint or the random weights.
          architecture: the architecture of the model, which has a folded scale.
          names: map from each param to the name of its tensor.
        """
        self._weights, folded = weights, architecture.folded_scale
        self.path, self.shapes, self.dtypes = weights.path, weights.shapes, weights.dtypes
        self._size = folded.size if folded is not None else 0
        self._scales = (
            {}
            if folded is None
            else {
                block[path]: scale
                for block, scale in zip(names.blocks, folded.scales, strict=True)
                for path in folded.params
            }
        )

    def read(self, name: str, row: np.ndarray) -> None:
        """Read a tensor into an array, and multiply its first features if they are scaled.

        Args:
          name: name of the tensor.
          row: contiguous array of the tensor's shape, which is overwritten.
        """
        self._weights.read(name, row)
        if name in self._scales:
            first = row[..., : self._size]
            first[...] = (first.astype(np.float32) * self._scales[name]).astype(row.dtype)


def fold_scales(weights: Own, architecture: Architecture, names: ModelNames) -> Own | FoldedWeights:
    """Fold the scales of an architecture into weights, if it has any.

    Args:
      weights: the checkpoint or the random weights.
      architecture: the architecture of the model.
      names: map from each param to the name of its tensor.
    """
    if architecture.folded_scale is None:
        return weights
    return FoldedWeights(weights, architecture, names)
