"""Modules of banks with stages, whose activations are one flat array for all stages.

A flat array is `[B, width]`. It holds the activations of one stage, flattened and then padded with
zeros to the size of the largest stage, so that all layers of a bank map equal shapes.
"""

import math
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from jchain._typing import Array, Shaped
from jchain.modules.pickling import Picklable


@dataclass(frozen=True)
class StagedModule(Picklable):
    """A module whose input and output are flat arrays.

    Attributes:
      module: the module that is applied; None for the identity.
      reads: the shape of one example of its input; None if the input is not flat, as for a stem.
      writes: the shape of one example of its output; None if the output stays as it is, as for a
        head.
      width: the size of one example of a flat array.
    """

    module: Any
    reads: tuple[int, ...] | None
    writes: tuple[int, ...] | None
    width: int

    def read(self, x: Any) -> Any:
        """Return the input of the module.

        Args:
          x: a flat array `[B, width]`, or raw input if `reads` is None.
        """
        if self.reads is None:
            return x
        return x[:, : math.prod(self.reads)].reshape(x.shape[0], *self.reads)

    def write(self, out: Array) -> Shaped[Array, "B ..."]:
        """Return the output as a flat array, or itself if `writes` is None.

        Args:
          out: the output of the module, `[B, ...]`.
        """
        if self.writes is None:
            return out
        rows = out.reshape(out.shape[0], -1)
        return jnp.pad(rows, ((0, 0), (0, self.width - rows.shape[1])))


def unwrap(module: Any) -> Any:
    """Return the module inside a `StagedModule`, and any other module itself.

    Args:
      module: a module of a bank.
    """
    return module.module if isinstance(module, StagedModule) else module
