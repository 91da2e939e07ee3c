"""Checks of modules and functions on the host, before anything is computed."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jchain._typing import Array, PyTree
from jchain.modules.activations import count_examples, describe_shapes, is_one_array
from jchain.modules.convert import Module, apply_module, describe_module, split_variables
from jchain.pytree import describe_type, get_first_line, pick

_HOW = "change it in a stem or in a head, or pass stages= to Bank.stack for layers that change it"


def check_layer(
    module: Module,
    params: PyTree,
    state: PyTree,
    x: PyTree,
    name: str,
    *,
    allow_other_dtype: bool = False,
) -> None:
    """Check that a layer's output has the structure, shapes, and dtypes of its input.

    Args:
      module: the module of the layer.
      params: its params.
      state: its other collections of variables, or None.
      x: a batch of input, one array or a pytree of arrays, or their shapes and dtypes.
      name: what to call the layer in errors.
      allow_other_dtype: whether the output may have other dtypes, so that only shapes must agree.

    Raises:
      ValueError: if the output has another structure, shape, or dtype, the module does not accept
        the input, or it needs collections of variables that are not given.
    """
    out = infer_output(module, params, state, x, name)
    check_same_shapes(out, x, name, allow_other_dtype=allow_other_dtype)


def check_rows(variables: PyTree, num_members: int) -> None:
    """Check that stacked variables have one row per member.

    Args:
      variables: the variables; leaves without a shape are not checked.
      num_members: the number of members.

    Raises:
      ValueError: if an array has another leading size.
    """
    for leaf in jax.tree.leaves(variables):
        shape = getattr(leaf, "shape", None)
        if shape is not None and tuple(shape[:1]) != (num_members,):
            raise ValueError(
                f"expected params with {num_members} rows in each array, one per token, got an "
                f"array of shape {list(shape)}"
            )


def check_same_shapes(
    out: PyTree, x: PyTree, name: str, *, allow_other_dtype: bool = False
) -> None:
    """Check that the output of a layer has the structure, shapes, and dtypes of its input.

    Args:
      out: the output, or its shapes and dtypes.
      x: the input, or its shapes and dtypes.
      name: what to call the layer in errors.
      allow_other_dtype: whether the output may have other dtypes, so that only shapes must agree.

    Raises:
      ValueError: if the output differs from the input.
    """
    if is_one_array(x):
        check_is_array(out, name)
    leaves, structure = jax.tree_util.tree_flatten_with_path(x)
    if jax.tree.structure(out) != structure:
        raise ValueError(
            f"{name} must keep the structure of its input: expected {describe_shapes(x)}, got "
            f"{describe_shapes(out)}"
        )
    for (path, expected), found in zip(leaves, jax.tree.leaves(out), strict=True):
        where = f" at {jax.tree_util.keystr(path)}" if path else ""
        if found.shape != expected.shape:
            raise ValueError(
                f"{name} must keep the shape of its input: expected {describe_shapes(expected)}"
                f"{where}, got {describe_shapes(found)}; {_HOW}"
            )
        if found.dtype != expected.dtype and not allow_other_dtype:
            raise ValueError(
                f"{name} must keep the dtype of its input: expected {expected.dtype}{where}, got "
                f"{found.dtype}; cast the data, the params, or the output"
            )


def check_is_array(out: PyTree, name: str) -> None:
    """Check that the output of a module is a single array.

    Args:
      out: the output, or its shape and dtype.
      name: what to call the module in errors.

    Raises:
      ValueError: if the output is anything else.
    """
    if not is_one_array(out):
        raise ValueError(f"{name} must return an array, got {describe_type(out)}")


def check_stem(stem: Module | None, params: PyTree, x: PyTree) -> PyTree:
    """Check that a stem accepts an input, and return the shapes and dtypes of its output.

    Args:
      stem: the stem; None for the identity.
      params: the variables of the stem (see `jchain.modules.split_variables`).
      x: a batch of raw input, one array or a pytree of arrays, or their shapes and dtypes.

    Raises:
      ValueError: if there are params but no stem, the stem does not accept this input, or an array
        of a pytree that it returns does not have the examples on its leading axis.
    """
    if stem is None:
        if params is not None:
            raise ValueError("expected a stem with stem_params, got only stem_params")
        return x
    name = f"stem {describe_module(stem)}"
    out = infer_output(stem, *split_variables(stem, params), x, name)
    if not is_one_array(out):
        num = count_examples(x)
        for path, leaf in jax.tree_util.tree_leaves_with_path(out):
            if leaf.shape[:1] != (num,):
                raise ValueError(
                    f"{name} must keep the examples on the leading axis of each array: expected "
                    f"[{num}, ...] at {jax.tree_util.keystr(path)}, got {describe_shapes(leaf)}"
                )
    return out


def infer_output(module: Module, params: PyTree, state: PyTree, x: PyTree, name: str) -> PyTree:
    """Return the shapes and dtypes of a module's output, a pytree of at least one array.

    Args:
      module: the module.
      params: its params.
      state: its other collections of variables, or None.
      x: a batch of input, one array or a pytree of arrays, or their shapes and dtypes.
      name: what to call the module in errors.

    Raises:
      ValueError: if the module does not accept the input, returns no array, or needs collections of
        variables that are not given.
    """
    given = {"params": {} if params is None else params, **(state or {})}
    collections, out = _make_collections(module, given, x)
    missing = [
        key for key, tree in collections.items() if not given.get(key) and not _is_sown(tree)
    ]
    if missing:
        listed = ", ".join(repr(collection) for collection in missing)
        raise ValueError(
            f"{name} needs the collection{'s' if len(missing) > 1 else ''} {listed}: pass all of "
            "module.init(key, x), not only a part of it"
        )
    # A module that only has params computes the same if its collections are mutable.
    if out is None or set(collections) - {"params"}:
        try:
            out = jax.eval_shape(lambda x: apply_module(module, params, state, x), x)
        except Exception as error:  # whatever a user's module raises
            raise ValueError(
                f"{name} does not take {describe_input(x)}: {get_first_line(error)}"
            ) from None
    if not jax.tree.leaves(out):
        raise ValueError(f"{name} must return an array, got {describe_type(out)}")
    return out


def describe_input(x: PyTree) -> str:
    """Describe the input that a module does not take, for errors.

    Args:
      x: a batch of input, or its shapes and dtypes.
    """
    if is_one_array(x):
        return f"an input of shape {list(x.shape)}"
    return f"the input {describe_shapes(x)}"


def check_output_function(
    name: str, function: Callable[[Array, PyTree], Array], outputs: jax.ShapeDtypeStruct, y: PyTree
) -> None:
    """Check that a function of outputs and labels, such as a loss, takes them and returns floats.

    Args:
      name: what to call the function in errors.
      function: the function.
      outputs: the shape and dtype of a head's outputs.
      y: the labels.

    Raises:
      ValueError: if the function fails, or does not return floats, at least one per example.
    """
    try:
        found = jax.eval_shape(function, outputs, y)
    except Exception as error:  # whatever a user's function raises
        raise ValueError(
            f"{name} does not take outputs {list(outputs.shape)} "
            f"and labels {describe_shapes(y)}: {error}"
        ) from None
    if not isinstance(found, jax.ShapeDtypeStruct):
        raise ValueError(f"expected {name} to return an array, got {describe_type(found)}")
    if not jnp.issubdtype(found.dtype, jnp.floating):
        raise ValueError(f"expected {name} to return floats, got {found.dtype}")
    if found.shape[:1] != outputs.shape[:1]:
        raise ValueError(
            f"expected {name} to return one number per example, [{outputs.shape[0]}, ...], got "
            f"shape {list(found.shape)}"
        )


def check_mean_over_examples(
    name: str, function: Callable[[Array, PyTree], Array], outputs: jax.ShapeDtypeStruct, y: PyTree
) -> None:
    """Check that a function treats examples one by one, so that means over parts are exact.

    Args:
      name: what to call the function in errors.
      function: the function.
      outputs: the shape and dtype of a head's outputs.
      y: the labels of at least as many examples as are checked.

    Raises:
      ValueError: if the mean of the function over four examples is not the mean over its parts.
    """
    num = min(4, outputs.shape[0])
    drawn = np.random.default_rng(0).normal(size=(num, *outputs.shape[1:]))
    sample, y = jnp.asarray(drawn, outputs.dtype), pick(y, slice(num))
    whole = float(jnp.mean(function(sample, y)))
    single = [function(*pick((sample, y), slice(i, i + 1))) for i in range(num)]
    parts = float(jnp.mean(jnp.stack([jnp.mean(value) for value in single])))
    if not np.isclose(whole, parts, rtol=1e-3, atol=1e-5, equal_nan=True):
        raise ValueError(
            f"expected {name} to treat examples one by one, as batch_size and jc.Staged "
            f"need, but for {num} examples it is {whole:.6g} and its mean over single examples is "
            f"{parts:.6g}"
        )


def _make_collections(
    module: Module, given: dict[str, PyTree], x: PyTree
) -> tuple[dict[str, PyTree], PyTree]:
    """Return the collections of a linen module that may make what is missing, and its output.

    Without collections, some modules fail, but others, such as `nnx.bridge.ToLinen`, silently make
    new ones. If the module is not linen or fails, the result is no collections and no output.
    """
    if not isinstance(module, nn.Module):
        return {}, None

    def run(x: PyTree) -> PyTree:
        return module.apply(given, x, mutable=True)

    try:
        out, collections = jax.eval_shape(run, x)
    except Exception:  # infer_output reports it
        return {}, None
    return dict(collections), out


def _is_sown(tree: PyTree) -> bool:
    """Return whether a collection was only sown, for whoever watches: its values are tuples."""
    leaves = jax.tree.leaves(tree, is_leaf=lambda leaf: isinstance(leaf, tuple))
    return all(isinstance(leaf, tuple) for leaf in leaves)
