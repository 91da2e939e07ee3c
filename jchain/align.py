"""Align the hidden units of layers, so that their weights can be compared index by index.

Permuting the hidden units of a layer does not change what it computes, so layers that compute
similar functions may have very different weights. This module permutes the hidden units of each
layer to maximize the inner product of its weights with a reference layer's weights. This is the
weight matching of Git Re-Basin (Ainsworth et al. 2022, arXiv:2209.04836). For one hidden layer, it
is a linear assignment problem, which is solved exactly.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from jchain._typing import Array, Int, Key
from jchain.arguments import checked
from jchain.bank import Bank
from jchain.groups import LayerGroup
from jchain.layers import ResidualMLP

# For each known module, the axis of hidden units in each of its tensors.
_AXES: dict[type, dict[str, int]] = {
    ResidualMLP: {"Dense_0/kernel": 1, "Dense_0/bias": 0, "Dense_1/kernel": 0}
}


@checked
def match_units(bank: Bank, token: int) -> Bank:
    """Permute the hidden units of each layer to match the hidden units of layer `token`.

    Every chain computes the same outputs as before, up to the order of sums. Layers of other
    groups are unchanged.

    Args:
      bank: the bank whose layers are permuted.
      token: the token of the reference layer; the layers of its group are permuted.

    Raises:
      ValueError: if `token` is not a layer of this bank, or if the hidden units of its module are
        unknown to jchain.
    """
    from scipy.optimize import linear_sum_assignment

    group, index = _find_layer(bank, token)
    units = _stack_units(group)
    orders = []
    for rows in units:
        # The matrix is [hidden units of `token`, hidden units of this layer].
        _, order = linear_sum_assignment(units[index] @ rows.T, maximize=True)
        orders.append(order)
    return _reorder(bank, group, jnp.asarray(np.stack(orders)))


@checked
def shuffle(key: Key[Array, ""], bank: Bank, token: int = 0) -> Bank:
    """Put the hidden units of each layer of a group in a random order.

    Args:
      key: the PRNG key; consumed by this call.
      bank: the bank whose layers are shuffled.
      token: the token of any layer of the group to shuffle. Other groups are unchanged.

    Raises:
      ValueError: if `token` is invalid; see `match_units`.
    """
    group, _ = _find_layer(bank, token)
    num_units = _stack_units(group).shape[1]
    keys = jax.random.split(key, len(group.tokens))
    return _reorder(bank, group, jax.vmap(lambda k: jax.random.permutation(k, num_units))(keys))


def _find_layer(bank: Bank, token: int) -> tuple[LayerGroup, int]:
    if not 0 <= token < bank.num_layers:
        raise ValueError(f"expected a layer token in 0..{bank.num_layers - 1}, got {token}")
    group, index = bank.find(token)
    if type(group.module) not in _AXES:
        known = ", ".join(module.__name__ for module in _AXES)
        raise ValueError(
            f"expected a layer whose hidden units are known, {known}, "
            f"got {type(group.module).__name__}"
        )
    return group, index


def _stack_units(group: LayerGroup) -> np.ndarray:
    """Return the weights of each hidden unit as one row, `[n, hidden, W]`."""
    flat = traverse_util.flatten_dict(group.params, sep="/")
    parts: list[np.ndarray] = []
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
    new = dataclasses.replace(group, params=traverse_util.unflatten_dict(flat, sep="/"))
    return bank._replace_group(group, new)
