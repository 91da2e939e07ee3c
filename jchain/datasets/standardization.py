"""Standardization of features with statistics that are kept for new examples."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jchain._typing import Array, PyTree
from jchain.modules.activations import is_floating, is_one_array


class Statistics(NamedTuple):
    """The mean and the standard deviation of each feature, or of each channel of an image.

    For examples with several inputs, both are pytrees like the examples.
    """

    mean: PyTree
    std: PyTree


def choose_statistics(train: PyTree, given: tuple[PyTree, PyTree] | None = None) -> Statistics:
    """Choose the statistics that standardize a data set.

    Args:
      train: the examples that make the statistics: NumPy arrays `[B, ...F]`, or a pytree of them.
        Inputs of integers and booleans of such a pytree get a mean of 0 and a deviation of 1.
      given: the mean and the standard deviation to use instead, each a pytree like `train`, or one
        value for all inputs.

    Returns:
      The statistics, whose standard deviations are 1 where they would be 0.
    """
    inputs, structure = jax.tree.flatten(train)
    chosen = [None] * len(inputs)
    if given is not None:
        is_one = is_one_array(train)
        parts = (
            [part] if is_one else jax.tree.leaves(jax.tree.broadcast(part, train)) for part in given
        )
        chosen = [*zip(*parts, strict=True)]
    scales = [
        _choose(leaf, own) if is_one_array(train) or is_floating(leaf) else (0.0, 1.0)
        for leaf, own in zip(inputs, chosen, strict=True)
    ]
    return Statistics(*(structure.unflatten(parts) for parts in zip(*scales, strict=True)))


def _choose(train: np.ndarray, given: tuple[PyTree, PyTree] | None) -> tuple[PyTree, PyTree]:
    if given is not None:
        mean, std = given
        return mean, np.where(std > 0, std, 1)
    # All positions of an image share the statistics of their channel.
    axes, dtype = ((0, 1, 2), np.float64) if train.ndim == 4 else (0, np.float32)
    mean, std = (fn(train, axis=axes, dtype=dtype).astype(np.float32) for fn in (np.mean, np.std))
    # The standard deviation of a constant feature is only rounding error. Dividing by it would
    # give huge values in other splits.
    is_constant = np.equal(train.max(axis=axes), train.min(axis=axes))
    return mean, np.where((std > 0) & ~is_constant, std, 1)


def standardize(x: PyTree, statistics: Statistics) -> PyTree:
    """Subtract the mean and divide by the standard deviation.

    Args:
      x: examples as NumPy arrays, or a pytree of them, in which integers and booleans stay as they
        are.
      statistics: the statistics, for a pytree those of `choose_statistics`.
    """
    if is_one_array(x):
        return _standardize(x, *statistics)

    def convert(leaf: np.ndarray, mean: PyTree, std: PyTree) -> Array:
        return _standardize(leaf, mean, std) if is_floating(leaf) else jnp.asarray(leaf)

    return jax.tree.map(convert, x, *statistics)


def _standardize(x: np.ndarray, mean: PyTree, std: PyTree) -> Array:
    return jnp.asarray((x - mean) / std, jnp.float32)
