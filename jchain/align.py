"""Hidden units of layers in the same order, so that their weights can be compared index by index.

A layer computes the same with its hidden units in another order, so two layers that do alike may have weights that are far apart.
The order is that of the largest inner product of weights with those of one layer: git re-basin's weight matching (Ainsworth et
al. 2022, arXiv:2209.04836), which for one hidden layer is a linear assignment and solved exactly.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from jchain._typing import Array, Int, Key
from jchain.bank import Bank
from jchain.groups import LayerGroup
from jchain.layers import ResidualMLP

# The axis of hidden units of each tensor.
_AXES: dict[type[nn.Module], dict[str, int]] = {
    ResidualMLP: {"Dense_0/kernel": 1, "Dense_0/bias": 0, "Dense_1/kernel": 0}
}


def align(bank: Bank, token: int) -> Bank:
    """The bank with the hidden units of each layer in the order that is closest to those of layer `token`.

    Every chain computes the same, up to the order of sums. Layers of other groups stay as they are.

    Raises:
      ValueError: `token` is no layer of this bank, or its module has no hidden units that jchain knows.
    """
    from scipy.optimize import linear_sum_assignment

    group = _find_group(bank, token)
    place = group.tokens.index(token)
    units = _stack_units(group)
    orders = []
    for rows in units:
        # [hidden units of the layer, those of this one]
        _, order = linear_sum_assignment(units[place] @ rows.T, maximize=True)
        orders.append(order)
    return _reorder(bank, group, jnp.asarray(np.stack(orders)))


def shuffle(key: Key[Array, ""], bank: Bank, token: int = 0) -> Bank:
    """The bank with the hidden units of each layer of the group of `token` in a random order.

    Raises:
      ValueError: as `align`.
    """
    group = _find_group(bank, token)
    num_units = _stack_units(group).shape[1]
    keys = jax.random.split(key, len(group.tokens))
    return _reorder(bank, group, jax.vmap(lambda k: jax.random.permutation(k, num_units))(keys))


def _find_group(bank: Bank, token: int) -> LayerGroup:
    group = next((group for group in bank.layers if token in group.tokens), None)
    if group is None:
        raise ValueError(f"expected a layer token in 0..{bank.num_layers - 1}, got {token}")
    if type(group.module) not in _AXES:
        known = ", ".join(module.__name__ for module in _AXES)
        raise ValueError(
            f"expected a layer whose hidden units are known, {known}, got {type(group.module).__name__}"
        )
    return group


def _stack_units(group: LayerGroup) -> np.ndarray:
    """All weights of each hidden unit in one row, `[n, hidden, W]`."""
    flat = traverse_util.flatten_dict(group.params, sep="/")
    parts: list[Any] = []
    for path, axis in _AXES[type(group.module)].items():
        tensor = np.moveaxis(np.asarray(flat[path], np.float64), 1 + axis, 1)
        parts.append(tensor.reshape(*tensor.shape[:2], -1))
    return np.concatenate(parts, axis=2)


def _reorder(bank: Bank, group: LayerGroup, orders: Int[Array, "n H"]) -> Bank:
    flat = dict(traverse_util.flatten_dict(group.params, sep="/"))
    for path, axis in _AXES[type(group.module)].items():
        flat[path] = jax.vmap(lambda leaf, order, axis=axis: jnp.take(leaf, order, axis=axis))(
            flat[path], orders
        )
    new = LayerGroup(traverse_util.unflatten_dict(flat, sep="/"), group.module, group.tokens)
    return dataclasses.replace(
        bank, layers=tuple(new if other is group else other for other in bank.layers)
    )
