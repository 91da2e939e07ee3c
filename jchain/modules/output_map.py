"""Heads that end in a linear map, whose outputs need not be computed all at once.

A head of a large vocabulary is a norm and a matrix of one row per output. A loss that reads its
outputs in parts needs the input of the matrix and the matrix, and not the outputs.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jchain._typing import Array, Float, PyTree
from jchain.modules.convert import Module
from jchain.modules.nnx import NnxModule
from jchain.modules.staged import StagedModule


class OutputMap(NamedTuple):
    """The last step of a head: `softcap * tanh(scale * (features @ weight.T + bias) / softcap)`.

    A module that ends in such a map offers it by a method `output_map(x)`, which returns one of
    these, or None if it cannot. Its `__call__` must then return `output_map(x).compute()`.

    Attributes:
      features: the input of the map, `[*B, F]`.
      weight: the matrix, `[V, F]`: one row per output.
      bias: what is added, `[V]`, or None.
      scale: the number that multiplies the outputs.
      softcap: the limit of the outputs (Gemma 2, arXiv:2408.00118, section 2); None for no limit.
    """

    features: Float[Array, "*B F"]
    weight: Float[Array, "V F"]
    bias: Float[Array, "V"] | None = None
    scale: float = 1.0
    softcap: float | None = None

    def compute(self) -> Float[Array, "*B V"]:
        """Compute all outputs."""
        out = jnp.matmul(self.features, self.weight.T)
        if self.bias is not None:
            out = out + self.bias.reshape((1,) * (out.ndim - 1) + self.bias.shape)
        return squash(out, self.scale, self.softcap)


def squash(
    outputs: Float[Array, "*B V"], scale: float, softcap: float | None
) -> Float[Array, "*B V"]:
    """Apply the scale and the limit of an `OutputMap` to the outputs of its linear part.

    Args:
      outputs: the outputs of the linear part.
      scale: the number that multiplies them.
      softcap: their limit; None for no limit.
    """
    if scale != 1:
        outputs = scale * outputs
    return outputs if softcap is None else softcap * jnp.tanh(outputs / softcap)


def read_output_map(module: Module, params: PyTree, state: PyTree, x: PyTree) -> OutputMap | None:
    """Apply a head up to its last step.

    Args:
      module: the module of the head.
      params: its params.
      state: its other collections of variables by name, or None.
      x: the activations of a batch, `[B, ...F]`, or a pytree of such arrays.

    Returns:
      The last step, or None if the module does not offer it.
    """
    if isinstance(module, StagedModule):
        x, module = module.read(x), module.module
    owner = module.cls if isinstance(module, NnxModule) else type(module)
    if not callable(getattr(owner, "output_map", None)):
        return None
    variables = {"params": {} if params is None else params, **(state or {})}
    own = jax.tree.map(lambda leaf: leaf, x)
    return module.apply(variables, own, method="output_map")  # pyright: ignore
