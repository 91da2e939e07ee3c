"""Checks of modules on the host, before anything is computed."""

import flax.linen as nn
import jax
import numpy as np

from jchain._typing import Array, PyTree
from jchain.modules.convert import Module, apply_module, describe_module, split_variables
from jchain.pytree import describe_type

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
    missing = _find_missing(module, params, state, x)
    if missing:
        listed = ", ".join(repr(collection) for collection in missing)
        raise ValueError(
            f"{name} needs the collection{'s' if len(missing) > 1 else ''} {listed}: pass all of "
            "module.init(key, x), not only a part of it"
        )
    try:
        out = jax.eval_shape(lambda x: apply_module(module, params, state, x), x)
    except Exception as error:  # whatever a user's module raises
        raise ValueError(
            f"{name} does not take an input of shape {list(x.shape)}: {str(error).splitlines()[0]}"
        ) from None
    if not isinstance(out, jax.ShapeDtypeStruct):
        raise ValueError(f"{name} must return an array, got {describe_type(out)}")
    return out


def _find_missing(module: Module, params: PyTree, state: PyTree, x: ArrayOrShape) -> list[str]:
    """Name the collections that a linen module would make anew, because they are not given.

    Some modules fail without them, others, such as `nnx.bridge.ToLinen`, silently use new values.
    """
    if not isinstance(module, nn.Module):
        return []
    given = {"params": {} if params is None else params, **(state or {})}

    def run(x: Array) -> PyTree:
        return module.apply(given, x, mutable=True)[1]

    try:
        made = jax.eval_shape(run, x)
    except Exception:  # infer_output reports it
        return []
    # Values that are sown for whoever watches the module are tuples.
    return [
        name
        for name, tree in made.items()
        if (name not in given or not given[name])
        and not all(
            isinstance(leaf, tuple)
            for leaf in jax.tree.leaves(tree, is_leaf=lambda leaf: isinstance(leaf, tuple))
        )
    ]
