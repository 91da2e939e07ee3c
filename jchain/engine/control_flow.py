"""Branches that stay branches under `vmap`."""

from collections.abc import Callable
from typing import TypeVar

import jax

from jchain._typing import Array, Bool, PyTree

T = TypeVar("T")


def cond_in_sequence(
    predicate: Bool[Array, ""],
    true_fn: Callable[..., T],
    false_fn: Callable[..., T],
    *operands: object,
) -> T:
    """Apply `jax.lax.cond` so that `vmap` runs it for one element at a time.

    A plain `vmap` turns the branch into a select, which computes both sides for every element. Use
    this function if one side is expensive and rarely taken.

    Args:
      predicate: whether to call `true_fn`.
      true_fn: the function to call with the operands if the predicate holds. It must not close over
        batched arrays.
      false_fn: the function to call with the operands otherwise. It must return the same structure,
        shapes, and dtypes as `true_fn`.
      *operands: pytrees of arrays.

    Returns:
      The value that the called function returns.
    """

    @jax.custom_batching.sequential_vmap
    def branch(predicate: Array, *operands: object) -> T:
        return jax.lax.cond(predicate, true_fn, false_fn, *operands)

    return branch(predicate, *operands)


def vmap_unless_one(fn: Callable[..., T], rows: PyTree) -> T:
    """Vmap over the leading axis, unless it has a single row.

    A plain `vmap` over one row would turn its branches into selects, too.

    Args:
      fn: the function to apply to each row.
      rows: a pytree of arrays with the same leading axis.
    """
    if jax.tree.leaves(rows)[0].shape[0] > 1:
        return jax.vmap(fn)(rows)
    return jax.tree.map(lambda leaf: leaf[None], fn(jax.tree.map(lambda leaf: leaf[0], rows)))
