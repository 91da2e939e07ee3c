"""Frozen dataclasses that are pytrees, checked when a user builds one, not when JAX rebuilds it."""

import dataclasses
from collections.abc import Iterable
from typing import Any, TypeVar, dataclass_transform

import jax
from jax.core import Tracer

T = TypeVar("T")


def static(*, default: Any = dataclasses.MISSING) -> Any:
    """Declare a field that is part of the tree's structure: hashable; a new value is a new trace.

    Args:
      default: the value of the field when none is given.
    """
    return dataclasses.field(default=default, metadata={"static": True})


@dataclass_transform(frozen_default=True, field_specifiers=(dataclasses.field, static))
def pytree_dataclass(cls: type[T]) -> type[T]:
    """Make a frozen dataclass that is registered as a pytree.

    Unlike `jax.tree_util.register_dataclass`, unflattening does not call `__init__`: JAX puts
    tracers and placeholders into leaves, which a `__post_init__` that checks its fields would
    refuse. A `__repr__` that the class defines is kept, and it too must accept such leaves.

    Args:
      cls: a class with annotated fields.
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

    jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten)  # pyright: ignore[reportArgumentType]
    return cls


def is_concrete(tree: object) -> bool:
    """Whether every leaf has a value that the host can read, which is not so while tracing.

    Args:
      tree: a pytree.
    """
    return not any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(tree))
