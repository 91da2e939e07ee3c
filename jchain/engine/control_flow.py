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
    """`jax.lax.cond` that runs its batch in sequence under `vmap`, one branch for each.

    A plain `vmap` turns the branch into a select, which computes both sides for every element. Use this if one side
    is expensive and rarely taken.

    Args:
      predicate: which branch to take.
      true_fn: called with the operands if the predicate holds. It must not close over arrays that are batched.
      false_fn: called with the operands otherwise; it returns the same structure, shapes, and dtypes.
      *operands: pytrees of arrays.
    """

    @jax.custom_batching.sequential_vmap
    def run(predicate: Array, operands: tuple[object, ...]) -> T:
        return jax.lax.cond(predicate, true_fn, false_fn, *operands)

    return run(predicate, operands)
