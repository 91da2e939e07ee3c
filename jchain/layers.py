"""Layers that keep the shape of their input, heads, and a stem for images.

All of them are Flax linen modules: call `module.apply({"params": params}, x)` with `x` of shape
`[B, ...F]`.
"""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from jchain._typing import Array, Float, PyTree
from jchain.arguments import check_at_least_one, check_functions
from jchain.invertible import AdditiveCoupling as AdditiveCoupling
from jchain.invertible import InvertibleDense as InvertibleDense
from jchain.invertible import InvertibleResidual as InvertibleResidual
from jchain.pytree import multiply_children


class Dense(nn.Module):
    """An affine map, then an activation: `activation(x W + b)`. As a layer, it must be square.

    Attributes:
      features: size of the last axis of the output, and of the input of a layer.
      activation: elementwise function; ReLU by default.
    """

    features: int
    activation: Callable[[Array], Array] = nn.relu

    @nn.compact
    def __call__(self, x: Float[Array, "B *F"]) -> Float[Array, "B *G"]:
        check_at_least_one(features=self.features)
        check_functions(activation=self.activation)
        return self.activation(nn.Dense(self.features)(x))


class ResidualMLP(nn.Module):
    """A residual block of two affine maps: `x + activation(x W1 + b1) W2 + b2`.

    The residual connection follows He et al. 2016, arXiv:1512.03385.

    Attributes:
      features: size of the last axis of the input and the output.
      hidden: number of units between the two maps; `features` if None.
      activation: elementwise function; ReLU by default.
    """

    features: int
    hidden: int | None = None
    activation: Callable[[Array], Array] = nn.relu

    @nn.compact
    def __call__(self, x: Float[Array, "B *F"]) -> Float[Array, "B *F"]:
        units = self.features if self.hidden is None else self.hidden
        check_at_least_one(features=self.features, hidden=units)
        check_functions(activation=self.activation)
        _check_shape(x, "[B, ..., features]", x.ndim >= 2 and x.shape[-1] == self.features)
        hidden = self.activation(nn.Dense(units)(x))
        return x + nn.Dense(self.features)(hidden)

    def scale_branch(self, params: PyTree, factor: float) -> PyTree:
        """Return the params with which the added term is multiplied by a factor.

        Args:
          params: the params of this layer.
          factor: the factor.
        """
        return multiply_children(params, factor, "Dense_1")


class ConvBlock(nn.Module):
    """A pre-activation residual block of 3x3 convolutions: `x + conv(activation(...))`.

    This is the block of He et al. 2016, arXiv:1603.05027, without normalization, for images
    `[B, H, W, F]`. Borders are padded with zeros.

    Attributes:
      channels: number of channels of the input and the output.
      depth: number of convolutions, each of which follows an activation.
      activation: elementwise function; ReLU by default.
    """

    channels: int
    depth: int = 1
    activation: Callable[[Array], Array] = nn.relu

    @nn.compact
    def __call__(self, x: Float[Array, "B H W F"]) -> Float[Array, "B H W F"]:
        check_at_least_one(channels=self.channels, depth=self.depth)
        check_functions(activation=self.activation)
        _check_shape(x, "[B, H, W, channels]", x.ndim == 4 and x.shape[-1] == self.channels)
        hidden = x
        for _ in range(self.depth):
            hidden = nn.Conv(self.channels, (3, 3))(self.activation(hidden))
        return x + hidden

    def scale_branch(self, params: PyTree, factor: float) -> PyTree:
        """Return the params with which the added term is multiplied by a factor.

        Args:
          params: the params of this layer.
          factor: the factor.
        """
        return multiply_children(params, factor, f"Conv_{self.depth - 1}")


class ConvStem(nn.Module):
    """A stem for raw images: a 3x3 convolution, then max pooling if `pool` is above 1.

    It cannot be used as a layer, because it changes the shape of its input.

    Attributes:
      channels: number of output channels.
      pool: side of the pooling windows, which do not overlap. Incomplete windows are dropped.
    """

    channels: int
    pool: int = 1

    @nn.compact
    def __call__(self, x: Float[Array, "B H W F"]) -> Float[Array, "B h w G"]:
        check_at_least_one(channels=self.channels, pool=self.pool)
        _check_shape(x, "[B, H, W, C]", x.ndim == 4)
        _check_pool(x, self.pool)
        x = nn.Conv(self.channels, (3, 3), kernel_init=nn.initializers.orthogonal())(x)
        return (
            x if self.pool == 1 else nn.max_pool(x, (self.pool, self.pool), (self.pool, self.pool))
        )


class TransformerBlock(nn.Module):
    """A pre-norm transformer block: self-attention, then an MLP, each added to its input.

    This is the pre-norm block of Xiong et al. 2020, arXiv:2002.04745, for sequences `[B, T, F]`,
    with the tanh approximation of GELU.

    Attributes:
      features: size of the last axis of the input and the output; a multiple of `num_heads`.
      num_heads: number of attention heads.
      hidden: number of hidden units of the MLP; four times `features` if None.
      is_causal: whether a position attends only to itself and earlier positions.
    """

    features: int
    num_heads: int
    hidden: int | None = None
    is_causal: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "B T F"]) -> Float[Array, "B T F"]:
        units = 4 * self.features if self.hidden is None else self.hidden
        check_at_least_one(features=self.features, num_heads=self.num_heads, hidden=units)
        if self.features % self.num_heads:
            raise ValueError(
                f"expected features to be a multiple of num_heads, got {self.features} and "
                f"{self.num_heads}"
            )
        _check_shape(x, "[B, T, features]", x.ndim >= 3 and x.shape[-1] == self.features)
        sizes = (3, self.num_heads, self.features // self.num_heads)
        # One product computes the queries, keys, and values.
        qkv = nn.DenseGeneral(sizes, name="qkv")(nn.LayerNorm(epsilon=1e-5)(x))
        query, key, value = (qkv[..., i, :, :] for i in range(3))
        mixed = jax.nn.dot_product_attention(query, key, value, is_causal=self.is_causal)
        x = x + nn.DenseGeneral(self.features, axis=(-2, -1), name="out")(mixed)
        hidden = nn.gelu(nn.Dense(units)(nn.LayerNorm(epsilon=1e-5)(x)))
        return x + nn.Dense(self.features)(hidden)

    def scale_branch(self, params: PyTree, factor: float) -> PyTree:
        """Return the params with which both added terms are multiplied by a factor.

        Args:
          params: the params of this layer.
          factor: the factor.
        """
        return multiply_children(params, factor, "out", "Dense_1")


class DenseHead(nn.Module):
    """An affine map from all features of an example to logits.

    Attributes:
      num_classes: number of logits.
    """

    num_classes: int

    @nn.compact
    def __call__(self, x: Float[Array, "B *F"]) -> Float[Array, "B C"]:
        check_at_least_one(num_classes=self.num_classes)
        return nn.Dense(self.num_classes)(jnp.reshape(x, (x.shape[0], -1)))


class ConvHead(nn.Module):
    """The dense part of LeNet-5 (LeCun et al. 1998): three dense layers on the flattened input.

    They have 120, 84, and `num_classes` units, with a ReLU after each of the first two.

    Attributes:
      num_classes: number of logits.
      pool: side of the windows of average pooling, which comes before flattening; 1 for no pooling.
    """

    num_classes: int
    pool: int = 1

    @nn.compact
    def __call__(self, x: Float[Array, "B H W F"]) -> Float[Array, "B C"]:
        check_at_least_one(num_classes=self.num_classes, pool=self.pool)
        _check_shape(x, "[B, H, W, C]", x.ndim == 4)
        _check_pool(x, self.pool)
        x = x if self.pool == 1 else nn.avg_pool(x, (self.pool, self.pool), (self.pool, self.pool))
        x = jnp.reshape(x, (x.shape[0], -1))
        for features in (120, 84):
            x = nn.relu(nn.Dense(features)(x))
        return nn.Dense(self.num_classes)(x)


class PoolHead(nn.Module):
    """Global average pooling (Lin et al. 2014, arXiv:1312.4400), then an affine map to logits.

    Attributes:
      num_classes: number of logits.
      activation: elementwise function that is applied before the mean; ReLU by default.
    """

    num_classes: int
    activation: Callable[[Array], Array] = nn.relu

    @nn.compact
    def __call__(self, x: Float[Array, "B H W F"]) -> Float[Array, "B C"]:
        check_at_least_one(num_classes=self.num_classes)
        check_functions(activation=self.activation)
        _check_shape(x, "[B, H, W, C]", x.ndim == 4)
        return nn.Dense(self.num_classes)(jnp.mean(self.activation(x), axis=(1, 2)))


def _check_shape(x: Array, expected: str, is_right: bool) -> None:
    if not is_right:
        raise ValueError(f"expected x of shape {expected}, got {list(x.shape)}")


def _check_pool(x: Array, pool: int) -> None:
    if pool > min(x.shape[1:3]):
        raise ValueError(f"expected pool to be at most the side of the images, got {pool}")
