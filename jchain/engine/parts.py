"""Means over the parts of a split that is read in parts (`Problem(batch_size=)`)."""

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp

from jchain._typing import Array, Int
from jchain.problem import Problem

T = TypeVar("T")


def average_over_parts(problem: Problem, fn: Callable[[Problem], T]) -> T:
    """Compute the mean over examples of what a function computes as means over examples.

    Args:
      problem: the problem. If it has no `batch_size`, the result is `fn(problem)`.
      fn: a function from the problem on one part to a pytree of means over its examples.

    Returns:
      The means over the parts, weighted by their numbers of examples.
    """
    size, num_examples = problem.batch_size, problem.num_examples
    if size is None:
        return fn(problem)
    size = min(size, num_examples)

    def add(i: Int[Array, ""], total: T) -> T:
        means = fn(problem.read_part(i * size, size))
        return jax.tree.map(lambda a, b: a + size * b.astype(a.dtype), total, means)

    shapes = jax.eval_shape(lambda: fn(problem.read_part(0, size)))
    total = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, _sum_dtype(leaf)), shapes)
    total = jax.lax.fori_loop(0, num_examples // size, add, total)
    if rest := num_examples % size:
        means = fn(problem.read_part(num_examples - rest, rest))
        total = jax.tree.map(lambda a, b: a + rest * b.astype(a.dtype), total, means)

    def divide(total: Array, shape: jax.ShapeDtypeStruct) -> Array:
        mean = total / num_examples
        is_integer = jnp.issubdtype(shape.dtype, jnp.integer)  # a count, equal in all parts
        return (jnp.round(mean) if is_integer else mean).astype(shape.dtype)

    return jax.tree.map(divide, total, shapes)


def _sum_dtype(leaf: jax.ShapeDtypeStruct) -> jnp.dtype:
    return jnp.promote_types(leaf.dtype, jnp.float32)
