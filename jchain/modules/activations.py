"""Activations: one array, or a pytree of arrays, each with the examples on its leading axis.

Most code maps over the leaves with `jax.tree.map`, for which a single array is the whole tree. Only
floating-point leaves have gradients. Gradients and other quantities of these leaves alone are
trees of the same structure, with None in place of the other leaves.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jchain._typing import Activations, Array, PyTree, Shaped


class _Words(str):
    """Words that are printed without quotation marks inside a tree."""

    def __repr__(self) -> str:
        return str(self)


def is_one_array(x: PyTree) -> bool:
    """Return whether activations are a single array, which is not inside a container.

    Args:
      x: the activations, or their shapes and dtypes.
    """
    structure = jax.tree.structure(x)
    return structure.num_nodes == structure.num_leaves == 1


def check_one_array(**values: PyTree) -> None:
    """Check that activations are a single array, for methods that need one.

    Args:
      **values: the activations, or their shapes and dtypes, by the name to call them in the error.

    Raises:
      ValueError: if they are a pytree of several arrays, or a container with one.
    """
    for name, x in values.items():
        if not is_one_array(x):
            kind = type(x).__name__
            raise ValueError(f"expected {name} of one array, got a {kind}: {describe_shapes(x)}")


def to_one_array(x: object, name: str) -> Array:
    """Convert numbers to an array.

    Args:
      x: an array, or nested lists of numbers.
      name: what to call it in the error.

    Raises:
      ValueError: if it is a container of several arrays.
    """
    try:
        return jnp.asarray(x)  # pyright: ignore[reportArgumentType]
    except (TypeError, ValueError):
        check_one_array(**{name: x})
        raise


def describe_shapes(x: PyTree) -> str:
    """Describe arrays by their dtypes and shapes, as in `{'mask': bool[9], 'x': float32[9, 5]}`.

    Args:
      x: a pytree of arrays, or of their shapes and dtypes.
    """
    return str(jax.tree.map(lambda leaf: _Words(f"{leaf.dtype}{list(leaf.shape)}"), x))


def count_examples(x: PyTree) -> int:
    """Return the number of examples.

    Args:
      x: examples or activations, or their shapes and dtypes.
    """
    return jax.tree.leaves(x)[0].shape[0]


def make_buffer(sizes: tuple[int, ...], x: PyTree) -> PyTree:
    """Make zeros that have room for several activations.

    Args:
      sizes: the leading axes of each array.
      x: the activations, or their shapes and dtypes.

    Returns:
      The buffer, whose leaves are `[*sizes, *shape]`.
    """
    return jax.tree.map(lambda leaf: jnp.zeros((*sizes, *leaf.shape), leaf.dtype), x)


def put_row(buffer: PyTree, index: object, x: PyTree) -> PyTree:
    """Write activations into a row of a buffer.

    Args:
      buffer: a buffer with room for several activations.
      index: the row, or the indices of several leading axes.
      x: the activations.
    """
    return jax.tree.map(lambda leaf, new: leaf.at[index].set(new), buffer, x)


def is_floating(leaf: Array | np.ndarray | jax.ShapeDtypeStruct) -> bool:
    """Return whether an array has floating-point numbers, which have a gradient.

    Args:
      leaf: an array, or its shape and dtype.
    """
    return jnp.issubdtype(leaf.dtype, jnp.floating)


def check_floating(x: PyTree) -> None:
    """Check that at least one array has floating-point numbers.

    Args:
      x: the activations, or their shapes and dtypes.

    Raises:
      ValueError: if there are only integers and booleans.
    """
    if not jax.tree.leaves(take_floating(x)):
        found = x.dtype if is_one_array(x) else describe_shapes(x)
        raise ValueError(f"expected floating-point activations, which have a gradient, got {found}")


def take_floating(x: PyTree) -> PyTree:
    """Take the floating-point leaves; the others become None. A floating array is returned itself.

    Args:
      x: the activations, or their shapes and dtypes.
    """
    return jax.tree.map(lambda leaf: leaf if is_floating(leaf) else None, x)


def put_floating(x: PyTree, floating: PyTree) -> PyTree:
    """Replace the floating-point leaves, and keep the others.

    Args:
      x: the activations.
      floating: the new floating-point leaves, as from `take_floating`.
    """
    leaves, structure = jax.tree.flatten(x)
    new = iter(jax.tree.leaves(floating))
    return structure.unflatten([next(new) if is_floating(leaf) else leaf for leaf in leaves])


def pull_back_floating(
    layer_fn: Callable[[PyTree], PyTree], x: PyTree
) -> Callable[[PyTree], PyTree]:
    """Return the vector-Jacobian product of a layer, between floating-point leaves only.

    Args:
      layer_fn: a function from activations to activations.
      x: the activations at which the layer is differentiated.

    Returns:
      A function from the cotangents of the floating-point leaves of the output to those of `x`.
    """

    def apply(floating: PyTree) -> PyTree:
        return take_floating(layer_fn(put_floating(x, floating)))

    vjp_fn = jax.vjp(apply, take_floating(x))[1]
    return lambda cotangents: vjp_fn(cotangents)[0]


def join_floating(x: Activations) -> Shaped[Array, "B ..."]:
    """Join the floating-point leaves of each example into one row. A single array is unchanged.

    Args:
      x: the activations.

    Raises:
      ValueError: if no leaf is floating-point.
    """
    if is_one_array(x):
        return x
    check_floating(x)
    leaves = jax.tree.leaves(take_floating(x))
    return jnp.concatenate([leaf.reshape(leaf.shape[0], -1) for leaf in leaves], axis=1)
