"""Modules as values that pickle accepts.

Flax modules hold functions such as `nn.relu`, which are not picklable, as `jax.nn` wraps them. They
are replaced by their names.
"""

from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax


class Picklable:
    """A base class of objects that hold Flax modules in their fields."""

    def __getstate__(self) -> dict[str, object]:
        return {name: pack(value) for name, value in vars(self).items()}

    def __setstate__(self, state: dict[str, object]) -> None:
        vars(self).update({name: unpack(value) for name, value in state.items()})


@dataclass(frozen=True)
class _Function:
    name: str


@dataclass(frozen=True)
class _Linen:
    cls: type[nn.Module]
    fields: dict[str, Any]


def pack(value: Any) -> Any:
    """Replace linen modules, and the functions of `jax.nn` inside them, by picklable values.

    Args:
      value: a module, a field of one, or anything else, which stays as it is.
    """
    if isinstance(value, nn.Module):
        fields = {
            name: pack(getattr(value, name))
            for name, field in type(value).__dataclass_fields__.items()
            # Defaults are left out, because Flax's initializers are local functions.
            if field.init and name != "parent" and getattr(value, name) is not field.default
        }
        return _Linen(type(value), fields)
    if type(value) in (tuple, list):
        return type(value)(pack(item) for item in value)
    name = getattr(value, "__name__", "")
    is_function = isinstance(name, str) and name and getattr(jax.nn, name, None) is value
    return _Function(name) if is_function else value


def unpack(value: Any) -> Any:
    """Return what `pack` was given.

    Args:
      value: what `pack` returned.
    """
    if isinstance(value, _Linen):
        return value.cls(**{name: unpack(field) for name, field in value.fields.items()})
    if type(value) in (tuple, list):
        return type(value)(unpack(item) for item in value)
    return getattr(jax.nn, value.name) if isinstance(value, _Function) else value
