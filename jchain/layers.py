"""Layers that keep the shape of their input, and heads. Flax linen modules: `module.apply({"params": p}, x [B, ...F])`."""

from collections.abc import Callable

import flax.linen as nn
import jax.numpy as jnp

from jchain._typing import Array, Float


class Dense(nn.Module):
    """A square affine map and an activation: `activation(x W + b)`.

    Attributes:
      features: size of the last axis, in and out.
      activation: elementwise, by default ReLU.
    """

    features: int
    activation: Callable[[Array], Array] = nn.relu

    @nn.compact
    def __call__(self, x: Float[Array, "B *F"]) -> Float[Array, "B *G"]:
        return self.activation(nn.Dense(self.features)(x))


class ResidualMLP(nn.Module):
    """A residual block of two affine maps, `x + activation(x W1 + b1) W2 + b2` (He et al. 2016, arXiv:1512.03385).

    Attributes:
      features: size of the last axis, in and out.
      hidden: width between the two maps; `features` when None.
      activation: elementwise, by default ReLU.
    """

    features: int
    hidden: int | None = None
    activation: Callable[[Array], Array] = nn.relu

    @nn.compact
    def __call__(self, x: Float[Array, "B *F"]) -> Float[Array, "B *G"]:
        hidden = self.activation(nn.Dense(self.hidden or self.features)(x))
        return x + nn.Dense(self.features)(hidden)


class DenseHead(nn.Module):
    """An affine map from all features of an example to the logits of `num_classes` classes.

    Attributes:
      num_classes: size of the output.
    """

    num_classes: int

    @nn.compact
    def __call__(self, x: Float[Array, "B *F"]) -> Float[Array, "B C"]:
        return nn.Dense(self.num_classes)(jnp.reshape(x, (x.shape[0], -1)))
