"""Branches that stay branches under `vmap`."""

from collections.abc import Callable
from typing import TypeVar

import jax

from jchain._typing import Array, Bool

T = TypeVar("T")


def cond_in_sequence(
    predicate: Bool[Array, ""],
    true_fn: Callable[..., T],
    false_fn: Callable[..., T],
    *operands: object,
) -> T:
    """`jax.lax.cond` that runs a batch one element at a time under `vmap`.

    A plain `vmap` turns the branch into a select, which computes both sides for every element. Use
    this if one side is expensive and rarely taken.

    Args:
      predicate: which branch to take.
      true_fn: called with the operands if the predicate holds. It must not close over arrays that
        are batched.
      false_fn: called with the operands otherwise. It returns the same structure, shapes, and
        dtypes.
      *operands: pytrees of arrays.

    Returns:
      What the called function returns.
    """

    @jax.custom_batching.sequential_vmap
    def branch(predicate: Array, *operands: object) -> T:
        return jax.lax.cond(predicate, true_fn, false_fn, *operands)

    return branch(predicate, *operands)
