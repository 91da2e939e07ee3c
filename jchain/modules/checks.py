"""Checks of modules and functions on the host, before anything is computed."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jchain._typing import Array, PyTree
from jchain.modules.convert import Module, apply_module, describe_module, split_variables
from jchain.pytree import describe_type, get_first_line

# A batch, or only its shape and dtype.
ArrayOrShape = Array | np.ndarray | jax.ShapeDtypeStruct
_HOW = "a layer must keep the shape of the data: change it in a stem or in a head"


def check_layer(
    module: Module,
    params: PyTree,
    state: PyTree,
    x: ArrayOrShape,
    name: str,
    *,
    allow_other_dtype: bool = False,
) -> None:
    """Check that a layer's output has the shape and dtype of its input.

    Args:
      module: the module of the layer.
      params: its params.
      state: its other collections of variables, or None.
      x: a batch of input, or its shape and dtype.
      name: what to call the layer in errors.
      allow_other_dtype: whether the output may have another dtype, so that only shapes must agree.

    Raises:
      ValueError: if the output has another shape or dtype, the module does not accept the input, or
        it needs collections of variables that are not given.
    """
    out = infer_output(module, params, state, x, name)
    if out.shape != x.shape:
        raise ValueError(
            f"{name} must keep the shape of its input: expected {x.dtype}{list(x.shape)}, got "
            f"{out.dtype}{list(out.shape)}; {_HOW}"
        )
    if out.dtype != x.dtype and not allow_other_dtype:
        raise ValueError(
            f"{name} must keep the dtype of its input: expected {x.dtype}, got {out.dtype}; cast "
            "the data, the params, or the output"
        )


def check_stem(stem: Module | None, params: PyTree, x: ArrayOrShape) -> ArrayOrShape:
    """Check that a stem accepts an input, and return the shape and dtype of its output.

    Args:
      stem: the stem; None for the identity.
      params: the variables of the stem (see `jchain.modules.split_variables`).
      x: a batch of raw input, or its shape and dtype.

    Raises:
      ValueError: if the stem does not accept this input.
    """
    if stem is None:
        return x
    return infer_output(stem, *split_variables(stem, params), x, f"stem {describe_module(stem)}")


def infer_output(
    module: Module, params: PyTree, state: PyTree, x: ArrayOrShape, name: str
) -> jax.ShapeDtypeStruct:
    """Return the shape and dtype of a module's output.

    Args:
      module: the module.
      params: its params.
      state: its other collections of variables, or None.
      x: a batch of input, or its shape and dtype.
      name: what to call the module in errors.

    Raises:
      ValueError: if the module does not accept the input, returns something that is not one array,
        or needs collections of variables that are not given.
    """
    given = {"params": {} if params is None else params, **(state or {})}
    made, out = _make_collections(module, given, x)
    missing = [key for key, tree in made.items() if not given.get(key) and not _is_sown(tree)]
    if missing:
        listed = ", ".join(repr(collection) for collection in missing)
        raise ValueError(
            f"{name} needs the collection{'s' if len(missing) > 1 else ''} {listed}: pass all of "
            "module.init(key, x), not only a part of it"
        )
    # A module that only has params computes the same if its collections are mutable.
    if out is None or set(made) - {"params"}:
        try:
            out = jax.eval_shape(lambda x: apply_module(module, params, state, x), x)
        except Exception as error:  # whatever a user's module raises
            raise ValueError(
                f"{name} does not take an input of shape {list(x.shape)}: {get_first_line(error)}"
            ) from None
    if not isinstance(out, jax.ShapeDtypeStruct):
        raise ValueError(f"{name} must return an array, got {describe_type(out)}")
    return out


def check_output_function(
    name: str, function: Callable[[Array, Array], Array], outputs: jax.ShapeDtypeStruct, y: Array
) -> None:
    """Check that a function of outputs and labels, such as a loss, takes them and returns floats.

    Args:
      name: what to call the function in errors.
      function: the function.
      outputs: the shape and dtype of a head's outputs.
      y: the labels.

    Raises:
      ValueError: if the function fails, or does not return floats.
    """
    try:
        found = jax.eval_shape(function, outputs, y)
    except Exception as error:  # whatever a user's function raises
        raise ValueError(
            f"{name} does not take outputs {list(outputs.shape)} "
            f"and labels {y.dtype}{list(y.shape)}: {error}"
        ) from None
    if not jnp.issubdtype(found.dtype, jnp.floating):
        raise ValueError(f"expected {name} to return floats, got {found.dtype}")


def _make_collections(
    module: Module, given: dict[str, PyTree], x: ArrayOrShape
) -> tuple[dict[str, PyTree], PyTree]:
    """Return the collections of a linen module that may make what is missing, and its output.

    Without collections, some modules fail, but others, such as `nnx.bridge.ToLinen`, silently make
    new ones. If the module is not linen or fails, the result is no collections and no output.
    """
    if not isinstance(module, nn.Module):
        return {}, None

    def run(x: Array) -> PyTree:
        return module.apply(given, x, mutable=True)

    try:
        out, made = jax.eval_shape(run, x)
    except Exception:  # infer_output reports it
        return {}, None
    return dict(made), out


def _is_sown(tree: PyTree) -> bool:
    """Return whether a collection was only sown, for whoever watches: its values are tuples."""
    leaves = jax.tree.leaves(tree, is_leaf=lambda leaf: isinstance(leaf, tuple))
    return all(isinstance(leaf, tuple) for leaf in leaves)
