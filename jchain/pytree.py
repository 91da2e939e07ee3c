"""Frozen dataclasses that are pytrees, checked once when a person builds one and never again when JAX rebuilds one."""

import dataclasses
from typing import Any, TypeVar, dataclass_transform

import jax
from jax.core import Tracer

T = TypeVar("T")


def static(**kwargs: Any) -> Any:
    """A field that is part of the tree's structure: hashable, and a new value means a new trace."""
    return dataclasses.field(metadata={"static": True}, **kwargs)


@dataclass_transform(frozen_default=True, field_specifiers=(dataclasses.field, static))
def pytree_dataclass(cls: type[T]) -> type[T]:
    """A frozen dataclass registered as a pytree.

    Unlike `jax.tree_util.register_dataclass`, unflattening does not call `__init__`: JAX puts tracers and placeholders
    into leaves, which a `__post_init__` that checks its fields would refuse.
    """
    cls = dataclasses.dataclass(frozen=True, eq=False)(cls)
    fields = dataclasses.fields(cls)  # pyright: ignore[reportArgumentType]
    meta_names = tuple(field.name for field in fields if field.metadata.get("static"))
    data_names = tuple(field.name for field in fields if not field.metadata.get("static"))

    def flatten_with_keys(node: Any) -> tuple[Any, Any]:
        children = [(jax.tree_util.GetAttrKey(name), getattr(node, name)) for name in data_names]
        return children, tuple(getattr(node, name) for name in meta_names)

    def unflatten(meta: Any, children: Any) -> Any:
        node = object.__new__(cls)
        for name, value in zip(meta_names + data_names, (*meta, *children), strict=True):
            object.__setattr__(node, name, value)
        return node

    jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten)
    return cls


def is_concrete(tree: Any) -> bool:
    """True when every leaf has a value that the host may look at, so when nothing is being traced."""
    return not any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(tree))
