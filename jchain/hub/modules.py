"""Modules that the model families share.

Their params have the names and layouts of Hugging Face checkpoints, so that a checkpoint is read
directly into its stack and an exported chain has the original names.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from jchain._typing import Array, Float, Int
from jchain.hub.config import Config

ACTIVATIONS = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_new": jax.nn.gelu,
    "gelu_fast": jax.nn.gelu,
    "gelu_pytorch_tanh": jax.nn.gelu,
    "gelu_accurate": jax.nn.gelu,
    "gelu_python": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_python_tanh": jax.nn.gelu,
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "relu": jax.nn.relu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
    "relu6": jax.nn.relu6,
    "mish": jax.nn.mish,
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "sigmoid": jax.nn.sigmoid,
    "tanh": jnp.tanh,
}


class Linear(nn.Module):
    """An affine map `x W^T + b`.

    Attributes:
      features: width of the output.
      use_bias: whether b is added.
      is_transposed: whether the file stores W as `[inputs, features]`, as in the Conv1D of GPT-2,
        instead of `[features, inputs]`.
    """

    features: int
    use_bias: bool = True
    is_transposed: bool = False

    def __call__(self, x: Float[Array, "*B F"]) -> Float[Array, "*B G"]:
        weight, bias = self.read(x.shape[-1])
        out = jnp.matmul(x, weight if self.is_transposed else weight.T)
        return out if bias is None else out + broadcast(bias, out)

    @nn.compact
    def read(self, num_inputs: int) -> tuple[Float[Array, "..."], Float[Array, "G"] | None]:
        """Return W as the file stores it, and b or None.

        Args:
          num_inputs: width of the input.
        """
        sizes = (num_inputs, self.features)
        init = nn.initializers.normal(0.02)
        weight = self.param("weight", init, sizes if self.is_transposed else sizes[::-1])
        if not self.use_bias:
            return weight, None
        return weight, self.param("bias", nn.initializers.zeros, (self.features,))


class Embedding(nn.Module):
    """A lookup table that maps each index to a row of `weight`.

    Attributes:
      num: number of rows.
      features: width of a row.
    """

    num: int
    features: int

    @nn.compact
    def __call__(self, ids: Int[Array, "*B"]) -> Float[Array, "*B F"]:
        return self.param("weight", nn.initializers.normal(0.02), (self.num, self.features))[ids]


class LayerNorm(nn.Module):
    """Layer normalization (Ba et al. 2016, arXiv:1607.06450), computed in float32 for every dtype.

    Attributes:
      epsilon: constant added to the variance.
    """

    epsilon: float

    @nn.compact
    def __call__(self, x: Float[Array, "*B F"]) -> Float[Array, "*B F"]:
        weight = self.param("weight", nn.initializers.ones, x.shape[-1:])
        bias = self.param("bias", nn.initializers.zeros, x.shape[-1:])
        wide = x.astype(jnp.float32)
        wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
        wide = wide * jax.lax.rsqrt(
            jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.epsilon
        )
        return (broadcast(weight, wide) * wide + broadcast(bias, wide)).astype(x.dtype)


class RMSNorm(nn.Module):
    """Root mean square normalization (Zhang and Sennrich 2019, arXiv:1910.07467).

    The root mean square is computed in float32 for every dtype.

    Attributes:
      epsilon: constant added to the mean square.
      offset: constant added to the weights, which multiply in float32, as in Gemma (1) and OLMo 2
        (0); None if the weights multiply the result in the dtype of the input, as in Llama.
    """

    epsilon: float
    offset: float | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "*B F"]) -> Float[Array, "*B F"]:
        init = nn.initializers.constant(1.0 - (self.offset or 0.0))
        weight = self.param("weight", init, x.shape[-1:])
        wide = x.astype(jnp.float32)
        wide = wide * jax.lax.rsqrt(
            jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.epsilon
        )
        if self.offset is not None:
            weight = broadcast(weight.astype(jnp.float32), wide)
            return ((self.offset + weight) * wide).astype(x.dtype)
        return (broadcast(weight, x) * wide.astype(x.dtype)).astype(x.dtype)


def broadcast(row: Float[Array, "F"], like: Float[Array, "*B F"]) -> Float[Array, "*B F"]:
    """Add leading axes of size 1, so that a vector has as many axes as another array.

    Args:
      row: the vector.
      like: the other array.
    """
    return row.reshape((1,) * (like.ndim - 1) + row.shape)


class FeedForward(nn.Module):
    """An MLP of two affine maps with an activation between them.

    Attributes:
      hidden: width of the hidden layer.
      activation: name of the activation, one of `ACTIVATIONS`.
      names: names of the params of the first and the second map.
      use_bias: whether the maps have biases.
      is_transposed: whether the weights are transposed, as in `Linear`.
    """

    hidden: int
    activation: str
    names: tuple[str, str]
    use_bias: bool = True
    is_transposed: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "*B T F"]) -> Float[Array, "*B T F"]:
        up, down = self.names
        hidden = Linear(self.hidden, self.use_bias, self.is_transposed, name=up)(x)
        return Linear(x.shape[-1], self.use_bias, self.is_transposed, name=down)(
            ACTIVATIONS[self.activation](hidden)
        )


class GatedMLP(nn.Module):
    """A gated MLP (Shazeer 2020, arXiv:2002.05202).

    Attributes:
      hidden: width of the hidden layer.
      activation: name of the gate's activation.
      use_bias: whether the affine maps have biases.
    """

    hidden: int
    activation: str
    use_bias: bool

    @nn.compact
    def __call__(self, x: Float[Array, "*B T F"]) -> Float[Array, "*B T F"]:
        gate, up = (
            Linear(self.hidden, self.use_bias, name=name)(x) for name in ("gate_proj", "up_proj")
        )
        return Linear(x.shape[-1], self.use_bias, name="down_proj")(
            ACTIVATIONS[self.activation](gate) * up
        )


def check_activation(config: Config, key: str, default: str) -> str:
    """Read the name of an activation and check that it is supported.

    Args:
      config: the options of the model.
      key: name of the option.
      default: name of the activation if the config does not have the option.

    Raises:
      ValueError: if the activation is not one of `ACTIVATIONS`.
    """
    name = config.get(key, default)
    if name not in ACTIVATIONS:
        raise config.reject(key, name, ", ".join(ACTIVATIONS))
    return name
