"""Flax nnx modules, which carry their own params, as modules."""

import sys
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from jchain._typing import PyTree

if TYPE_CHECKING:
    from flax import nnx

# The collection of all variables that are not params, such as the statistics of BatchNorm.
STATE = "state"


class _Stream(NamedTuple):
    """A key or a count of a stream of random numbers, which evaluation mode does not use."""

    path: tuple[Hashable, ...]
    is_key: bool


@dataclass(frozen=True)
class NnxModule:
    """The structure of an nnx module in evaluation mode, without its variables.

    Modules of equal structure share a group of a bank.

    Attributes:
      graphdef: the graph definition.
      streams: the random streams, which are constants here.
    """

    graphdef: "nnx.GraphDef[nnx.Module]"
    streams: tuple[_Stream, ...]

    @property
    def cls(self) -> type:
        """The class of the module."""
        return self.graphdef.nodes[0].type  # pyright: ignore[reportAttributeAccessIssue]

    def apply(self, variables: Mapping[str, PyTree], x: PyTree, method: str = "__call__") -> PyTree:
        """Rebuild the module and apply it.

        Args:
          variables: the collections `params` and, if the module has other variables, `state`.
          x: the activations of a batch, `[B, ...F]`, or a pytree of such arrays.
          method: the name of the method to call.
        """
        from flax import nnx

        flat = {
            stream.path: jax.random.key(0) if stream.is_key else jnp.zeros((), jnp.uint32)
            for stream in self.streams
        }
        for tree in variables.values():
            flat |= traverse_util.flatten_dict(tree)
        module = nnx.merge(self.graphdef, traverse_util.unflatten_dict(flat))
        return getattr(module, method)(x)


def is_nnx(value: object) -> bool:
    """Return whether a value is an nnx module, without importing nnx.

    Args:
      value: any object.
    """
    nnx = sys.modules.get("flax.nnx")
    return nnx is not None and isinstance(value, nnx.Module)


def split(module: "nnx.Module") -> tuple[NnxModule, dict[str, PyTree]]:
    """Split an nnx module into its structure in evaluation mode and its variables.

    The module itself does not change.

    Args:
      module: the module.
    """
    from flax import nnx

    module = nnx.clone(module)
    module.eval()
    graphdef, params, random, state = nnx.split(module, nnx.Param, nnx.RngState, ...)
    streams = tuple(
        _Stream(tuple(path), bool(jnp.issubdtype(variable.dtype, jax.dtypes.prng_key)))
        for path, variable in nnx.to_flat_state(random)
    )
    variables = {"params": _to_dict(params)}
    if len(nnx.to_flat_state(state)):
        variables[STATE] = _to_dict(state)
    return NnxModule(graphdef, streams), variables


def _to_dict(state: "nnx.State") -> PyTree:
    from flax import nnx

    return jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf)), nnx.to_pure_dict(state))
