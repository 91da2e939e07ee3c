"""Frozen dataclasses that are pytrees and that JAX can rebuild without their `__post_init__`."""

import dataclasses
from collections.abc import Iterable
from typing import Any, TypeVar, dataclass_transform

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import NamedSharding
from jax.typing import ArrayLike

from jchain._typing import Array, PyTree

T = TypeVar("T")


def static(*, default: Any = dataclasses.MISSING) -> Any:
    """Declare a field that is part of the tree's structure rather than one of its leaves.

    Its values must be hashable, and jitted functions are traced again for each new value.

    Args:
      default: default value of the field; the field is required if not given.
    """
    return dataclasses.field(default=default, metadata={"static": True})


@dataclass_transform(frozen_default=True, field_specifiers=(dataclasses.field, static))
def pytree_dataclass(cls: type[T]) -> type[T]:
    """Make a frozen dataclass that is registered as a pytree.

    Unlike with `jax.tree_util.register_dataclass`, unflattening does not call `__init__`: JAX puts
    tracers and placeholders into leaves, and a `__post_init__` that checks fields would reject
    them. If the class defines `__repr__`, it must accept such leaves.

    Args:
      cls: the class to convert, with annotated fields.
    """
    cls = dataclasses.dataclass(frozen=True, eq=False)(cls)
    fields = dataclasses.fields(cls)  # pyright: ignore[reportArgumentType]
    meta_names = tuple(field.name for field in fields if field.metadata.get("static"))
    data_names = tuple(field.name for field in fields if not field.metadata.get("static"))

    def flatten_with_keys(node: T) -> tuple[list[tuple[object, object]], tuple[object, ...]]:
        children = [(jax.tree_util.GetAttrKey(name), getattr(node, name)) for name in data_names]
        return children, tuple(getattr(node, name) for name in meta_names)

    def unflatten(meta: Iterable[object], children: Iterable[object]) -> T:
        node = object.__new__(cls)
        for name, value in zip(meta_names + data_names, (*meta, *children), strict=True):
            object.__setattr__(node, name, value)
        return node

    register = jax.tree_util.register_pytree_with_keys
    register(cls, flatten_with_keys, unflatten)  # pyright: ignore[reportArgumentType]
    return cls


def is_concrete(tree: object) -> bool:
    """Return whether no leaf is traced, so that the host can read every value.

    Args:
      tree: any pytree.
    """
    return not any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(tree))


def pick(tree: PyTree, index: object) -> PyTree:
    """Index the leading axis of every leaf, for example to take some rows of each.

    Args:
      tree: a pytree of arrays, or a single array.
      index: what to index the arrays with: a number, a slice, an array of indices, or a tuple.
    """
    return jax.tree.map(lambda leaf: leaf[index], tree)


def get_first_line(error: BaseException) -> str:
    """Return the first line of an error's text, or its type if it has no text.

    Args:
      error: what a user's code raised.
    """
    return next(iter(str(error).splitlines()), type(error).__name__)


def shorten(value: object, num_characters: int = 60) -> str:
    """Return the text of a value, for error messages, cut at some length.

    Args:
      value: any object.
      num_characters: the length.
    """
    text = repr(value)
    return text if len(text) <= num_characters else f"{text[:num_characters]}..."


def describe_type(value: object) -> str:
    """Describe what a value is, for error messages: `the class Dense`, or `tuple of 3`.

    Args:
      value: any object.
    """
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if isinstance(value, np.ndarray | jax.Array):
        return f"an array {value.dtype}{list(value.shape)}"
    if isinstance(value, tuple | list):
        return f"{type(value).__name__} of {len(value)}"
    module = type(value).__module__.partition(".")[0]
    is_plain = module in ("builtins", "jchain", "numpy", "jax", "jaxlib", "__main__")
    return type(value).__name__ if is_plain else f"{module}.{type(value).__name__}"


def replicate(leaf: ArrayLike, everywhere: NamedSharding) -> Array:
    """Put a copy of a leaf on each device of a replicated sharding.

    Args:
      leaf: an array or a number.
      everywhere: the sharding.
    """
    if isinstance(leaf, jax.Array) and leaf.sharding == everywhere:
        return leaf
    if everywhere.is_fully_addressable:
        return jax.device_put(leaf, everywhere)
    # Other processes hold the same values and put them on their own devices.
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(
            replicate(jax.random.key_data(leaf), everywhere), impl=jax.random.key_impl(leaf)
        )
    value = np.asarray(leaf)
    return jax.make_array_from_callback(value.shape, everywhere, lambda index: value[index])


def upcast(array: Array) -> Array:
    """Cast a half-precision array to float32.

    In half precision, squares overflow and small differences vanish.

    Args:
      array: an array of any dtype; float32 and wider dtypes are unchanged.
    """
    return array.astype(jnp.promote_types(jnp.float32, array.dtype))


def multiply_children(params: PyTree, factor: float, *children: str, offset: float = 0.0) -> PyTree:
    """Multiply the params of some children of a module.

    Args:
      params: the params of the module, a dict.
      factor: the factor.
      *children: paths of the children, such as `mlp/down_proj`.
      offset: number that the module adds to these params; the sum is multiplied.
    """
    paths = [path.split("/") for path in children]

    def change(path: tuple[object, ...], leaf: Array) -> Array:
        keys = [getattr(key, "key", None) for key in path]
        if not any(keys[: len(child)] == child for child in paths):
            return leaf
        wide = leaf.astype(jnp.float32)
        return ((wide + offset) * factor - offset).astype(leaf.dtype)

    return jax.tree_util.tree_map_with_path(change, params)


def vary_like(tree: T, *references: PyTree) -> T:
    """Let new arrays vary over the mesh axes that others vary over, inside `jax.shard_map`.

    A loop whose carry begins as a constant would otherwise change the type of its carry. Outside
    `jax.shard_map`, nothing changes.

    Args:
      tree: a pytree of arrays.
      *references: pytrees of arrays that the loop reads.
    """
    axes = frozenset().union(*(_get_varying(leaf) for leaf in jax.tree.leaves(references)))
    if not axes:
        return tree

    def vary(leaf: Array) -> Array:
        missing = tuple(axes - _get_varying(leaf))
        return jax.lax.pcast(leaf, missing, to="varying") if missing else leaf

    return jax.tree.map(vary, tree)


def _get_varying(leaf: Array) -> frozenset[str]:
    """Return the mesh axes over which an array varies."""
    aval = jax.typeof(leaf)
    manual = getattr(aval, "manual_axis_type", aval)  # its name changed in JAX 0.10
    return getattr(manual, "varying", None) or getattr(manual, "vma", frozenset())
