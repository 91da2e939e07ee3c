"""Modules that the model families share.

Their params have the names and layouts of Hugging Face checkpoints, so that a checkpoint is read
directly into its stack and an exported chain has the original names.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jchain._typing import Array, Float, Int
from jchain.hub.config import Config

_MAX_HEAD_SIZE = 2**16

ACTIVATIONS = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_new": jax.nn.gelu,
    "gelu_fast": jax.nn.gelu,
    "gelu_pytorch_tanh": jax.nn.gelu,
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
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
    """

    epsilon: float

    @nn.compact
    def __call__(self, x: Float[Array, "*B F"]) -> Float[Array, "*B F"]:
        weight = self.param("weight", nn.initializers.ones, x.shape[-1:])
        wide = x.astype(jnp.float32)
        wide = wide * jax.lax.rsqrt(
            jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.epsilon
        )
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


def split_heads(x: Float[Array, "*B T F"], num_heads: int) -> Float[Array, "*B T N H"]:
    """Split the last axis into heads.

    Args:
      x: queries, keys, or values of all heads.
      num_heads: number of heads, N.
    """
    return x.reshape(*x.shape[:-1], num_heads, -1)


def attend(
    query: Float[Array, "*B T N H"],
    key: Float[Array, "*B T K H"],
    value: Float[Array, "*B T K H"],
    *,
    is_causal: bool,
    window: int | None = None,
) -> Float[Array, "*B T F"]:
    """Compute scaled dot-product attention and join the heads in the result.

    This function computes the same result as `jax.nn.dot_product_attention` in 0.5 to 0.8 of the
    time, on CPU for sequences of about 100 tokens. It is faster because the axes of heads and
    positions are swapped once instead of in each product, the mask is added instead of selecting
    values, and the softmax is normalized after the last product.

    Args:
      query: the queries of all positions and heads.
      key: the keys of all positions and heads; N must be a multiple of K, and `N / K` query heads
        share a key head.
      value: the values, one for each key.
      is_causal: whether a position attends only to itself and to earlier positions.
      window: number of positions that each position attends to, including itself; None for all. A
        window implies causal attention.
    """
    dtype, (length, num_heads, size), num_kv_heads = query.dtype, query.shape[-3:], key.shape[-2]
    if dtype == jnp.float16:  # XLA on CPU cannot sum products of float16 in float32.
        query, key, value = (part.astype(jnp.float32) for part in (query, key, value))
    query, key, value = (jnp.swapaxes(part, -3, -2) for part in (query, key, value))
    # Queries that share a key become the rows of one product.
    query = query.reshape(*query.shape[:-3], num_kv_heads, -1, size)
    wide = jnp.promote_types(dtype, jnp.float32)
    scores = jnp.matmul(query, jnp.swapaxes(key, -2, -1), preferred_element_type=wide) * size**-0.5
    if is_causal or window is not None:
        distance = np.subtract.outer(np.arange(length), np.arange(length))
        is_visible = (distance >= 0) & (distance < (length if window is None else window))
        per_head = scores.reshape(*scores.shape[:-2], -1, length, length)
        bias = np.where(is_visible, 0.0, -np.inf).astype(wide)
        scores = (per_head + bias.reshape((1,) * (per_head.ndim - 2) + bias.shape)).reshape(
            scores.shape
        )
    weights = jnp.exp(
        scores - jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))
    ).astype(value.dtype)
    mixed = jnp.matmul(weights, value, preferred_element_type=wide)
    mixed = mixed / jnp.sum(weights, axis=-1, keepdims=True, dtype=wide)
    mixed = jnp.swapaxes(mixed.reshape(*mixed.shape[:-3], num_heads, length, size), -3, -2)
    return mixed.reshape(*mixed.shape[:-2], -1).astype(dtype)


def rotate(
    x: Float[Array, "*B T N H"], frequencies: tuple[float, ...], scale: float
) -> Float[Array, "*B T N H"]:
    """Apply rotary positions (Su et al. 2021, arXiv:2104.09864).

    The first `2 * len(frequencies)` features of each head rotate, and the others stay unchanged.

    Args:
      x: queries or keys.
      frequencies: rotation frequency of each pair of features, in radians per position.
      scale: factor that multiplies the sines and cosines.
    """
    angles = (
        jnp.arange(x.shape[-3], dtype=jnp.float32)[:, None]
        * jnp.array(frequencies, jnp.float32)[None]
    )
    axes = (1,) * (x.ndim - 3) + (x.shape[-3], 1, len(frequencies))
    cos, sin = ((scale * f(angles)).astype(x.dtype).reshape(axes) for f in (jnp.cos, jnp.sin))
    half = len(frequencies)
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1)


def read_rope_options(config: Config, base_key: str = "rope_theta") -> Config:
    """Read the options of rotary positions, which older files store under other names.

    Args:
      config: the options of the model.
      base_key: name of the option that holds the base in older files, which do not store it with
        the other options of rotary positions.

    Raises:
      ValueError: if the options are not an object.
    """
    key = "rope_parameters" if config.get("rope_parameters", None) is not None else "rope_scaling"
    given = config.get(key, None) or {}
    if not isinstance(given, dict):
        raise config.reject(key, given, "an object")
    if key == "rope_scaling":
        given = {"rope_theta": config.get(base_key, 10000.0)} | given
    return config.inner(key, given)


def compute_frequencies(config: Config, rope: Config, size: int) -> tuple[tuple[float, ...], float]:
    """Compute the frequencies of rotary positions, as transformers does.

    The supported kinds of scaling are `linear`, `llama3`, and `yarn` (Peng et al. 2023,
    arXiv:2309.00071).

    Args:
      config: the options of the model.
      rope: the options of rotary positions, which `read_rope_options` returned.
      size: number of features of each head that are rotated.

    Returns:
      The rotation frequency of each pair of features in radians per position, and the factor that
      multiplies the sines and cosines.

    Raises:
      ValueError: if the kind of scaling or one of its options is not supported.
    """
    if not isinstance(size, int) or not 1 <= size <= _MAX_HEAD_SIZE:
        raise config.reject("head_dim", size, f"1 to {_MAX_HEAD_SIZE:,} features of each head")
    kind = rope.get("rope_type", rope.get("type", "default"))
    base = float(rope.get("rope_theta", 10000.0))
    pairs = np.arange(0, size, 2, dtype=np.float64)
    unscaled = base ** (-pairs / size)
    if kind == "default":
        found, scale = unscaled, 1.0
    elif kind == "linear":
        found, scale = unscaled / rope.require("factor"), 1.0
    elif kind == "llama3":
        found, scale = _scale_by_wavelength(unscaled, rope), 1.0
    elif kind == "yarn":
        found, scale = _scale_by_yarn(unscaled, base, size, rope, config)
    else:
        raise config.reject("rope_type", kind, "default, linear, llama3, or yarn")
    rope.finish()
    return tuple(found.astype(np.float32).tolist()), float(scale)


def _scale_by_wavelength(unscaled: np.ndarray, rope: Config) -> np.ndarray:
    """Scale as in Llama 3.1: divide low frequencies by a factor, and keep high ones unchanged."""
    factor, length = rope.require("factor"), rope.require("original_max_position_embeddings")
    low, high = rope.require("low_freq_factor"), rope.require("high_freq_factor")
    turns = length * unscaled / (2 * math.pi)
    share = np.clip((turns - low) / (high - low), 0, 1)
    return unscaled * (share + (1 - share) / factor)


def _scale_by_yarn(
    unscaled: np.ndarray, base: float, size: int, rope: Config, config: Config
) -> tuple[np.ndarray, float]:
    """Scale as in YaRN; also return the factor that multiplies the sines and cosines."""
    length = rope.get("original_max_position_embeddings", None) or config.require(
        "max_position_embeddings"
    )
    factor = rope.get("factor", None) or config.require("max_position_embeddings") / length
    fast, slow = rope.get("beta_fast", None) or 32, rope.get("beta_slow", None) or 1

    def compute_pair(num_turns: float) -> float:
        return size * math.log(length / (num_turns * 2 * math.pi)) / (2 * math.log(base))

    low, high = compute_pair(fast), compute_pair(slow)
    if rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    share = 1 - np.clip((np.arange(size // 2) - low) / (high - low or 0.001), 0, 1)
    scale, mscale, over_all = (
        rope.get(key, None) for key in ("attention_factor", "mscale", "mscale_all_dim")
    )

    def compute_scale(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    if scale is None:
        scale = (
            compute_scale(mscale) / compute_scale(over_all)
            if mscale and over_all
            else compute_scale(1.0)
        )
    return unscaled * (share + (1 - share) / factor), scale


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
