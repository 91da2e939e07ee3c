"""What the families share: modules whose params are named and laid out as in Hugging Face checkpoints, and rotary positions.

Weights keep the layout of their file, so that a checkpoint is stacked as it lies on disk and leaves by the same names.
"""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jchain._typing import Array, Float, Int
from jchain.hub.config import Config

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
    """`x W^T + b`, `W` of shape `[features, inputs]`, or `[inputs, features]` where it `is_transposed` (GPT-2's Conv1D)."""

    features: int
    use_bias: bool = True
    is_transposed: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "*B F"]) -> Float[Array, "*B G"]:
        sizes = (x.shape[-1], self.features)
        init = nn.initializers.normal(0.02)
        weight = self.param("weight", init, sizes if self.is_transposed else sizes[::-1])
        out = jnp.matmul(x, weight if self.is_transposed else weight.T)
        if not self.use_bias:
            return out
        return out + broadcast(self.param("bias", nn.initializers.zeros, (self.features,)), out)


class Embedding(nn.Module):
    """A row of `weight` for each index."""

    num: int
    features: int

    @nn.compact
    def __call__(self, ids: Int[Array, "*B"]) -> Float[Array, "*B F"]:
        return self.param("weight", nn.initializers.normal(0.02), (self.num, self.features))[ids]


class LayerNorm(nn.Module):
    """Ba et al. 2016, arXiv:1607.06450; in float32 whatever the weights are."""

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
    """Zhang and Sennrich 2019, arXiv:1910.07467; the root mean square in float32."""

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
    """With as many axes as `like`."""
    return row.reshape((1,) * (like.ndim - 1) + row.shape)


class FeedForward(nn.Module):
    """Two affine maps and an activation between; params are called `names`."""

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
    """The last axis as heads."""
    return x.reshape(*x.shape[:-1], num_heads, -1)


def attend(
    query: Float[Array, "*B T N H"],
    key: Float[Array, "*B T K H"],
    value: Float[Array, "*B T K H"],
    *,
    is_causal: bool,
    window: int | None = None,
) -> Float[Array, "*B T F"]:
    """Scaled dot-product attention, heads joined. N is a multiple of K; a position sees `window` of them, itself included.

    As `jax.nn.dot_product_attention`, in 0.5 to 0.8 of its time on CPU where sequences are of some 100: heads go before positions
    once, not in each product; the mask is added, not selected by; sums are divided behind the last product.
    """
    dtype, (length, num_heads, size), num_kinds = query.dtype, query.shape[-3:], key.shape[-2]
    if dtype == jnp.float16:  # of which XLA on CPU makes no sums in float32
        query, key, value = (part.astype(jnp.float32) for part in (query, key, value))
    query, key, value = (jnp.swapaxes(part, -3, -2) for part in (query, key, value))
    # Heads that share a key are rows of one product.
    query = query.reshape(*query.shape[:-3], num_kinds, -1, size)
    wide = jnp.promote_types(dtype, jnp.float32)
    scores = jnp.matmul(query, jnp.swapaxes(key, -2, -1), preferred_element_type=wide) * size**-0.5
    if is_causal or window is not None:
        behind = np.subtract.outer(np.arange(length), np.arange(length))
        is_seen = (behind >= 0) & (behind < (length if window is None else window))
        by_head = scores.reshape(*scores.shape[:-2], -1, length, length)
        bias = np.where(is_seen, 0.0, -np.inf).astype(wide)
        scores = (by_head + bias.reshape((1,) * (by_head.ndim - 2) + bias.shape)).reshape(
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
    """Rotary positions (Su et al. 2021, arXiv:2104.09864) on the first `2 * len(frequencies)` numbers of each head."""
    angles = (
        jnp.arange(x.shape[-3], dtype=jnp.float32)[:, None]
        * jnp.array(frequencies, jnp.float32)[None]
    )
    axes = (1,) * (x.ndim - 3) + (x.shape[-3], 1, len(frequencies))
    cos, sin = ((scale * f(angles)).astype(x.dtype).reshape(axes) for f in (jnp.cos, jnp.sin))
    half = len(frequencies)
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1)


def find_rope(config: Config, base_key: str = "rope_theta") -> Config:
    """Options of rotary positions, which older files have in two places.

    Args:
      config: of the model.
      base_key: option of the longest wave where it does not stand among the others.

    Raises:
      ValueError: they are no object.
    """
    key = "rope_parameters" if config.get("rope_parameters", None) is not None else "rope_scaling"
    given: Any = config.get(key, None) or {}
    if not isinstance(given, dict):
        raise config.refuse(key, given, "an object")
    if key == "rope_scaling":
        given = {"rope_theta": config.get(base_key, 10000.0)} | given
    return config.inner(key, given)


def find_frequencies(config: Config, rope: Config, size: int) -> tuple[tuple[float, ...], float]:
    """Radians per position of each pair of the `size` numbers that rotate, and the factor of their sines and cosines.

    Scaling by `linear`, `llama3` or `yarn` (Peng et al. 2023, arXiv:2309.00071), as transformers computes it.

    Raises:
      ValueError: another kind of scaling, or an option of it that was not asked for.
    """
    kind = rope.get("rope_type", rope.get("type", "default"))
    base = float(rope.get("rope_theta", 10000.0))
    pairs = np.arange(0, size, 2, dtype=np.float64)
    own = base ** (-pairs / size)
    if kind == "default":
        found, scale = own, 1.0
    elif kind == "linear":
        found, scale = own / rope.require("factor"), 1.0
    elif kind == "llama3":
        found, scale = _scale_by_wavelength(own, rope), 1.0
    elif kind == "yarn":
        found, scale = _scale_by_yarn(own, base, size, rope, config)
    else:
        raise config.refuse("rope_type", kind, "default, linear, llama3 or yarn")
    rope.finish()
    return tuple(found.astype(np.float32).tolist()), float(scale)


def _scale_by_wavelength(own: np.ndarray, rope: Config) -> np.ndarray:
    """As Llama 3.1: long waves are slowed, short ones stay."""
    factor, length = rope.require("factor"), rope.require("original_max_position_embeddings")
    low, high = rope.require("low_freq_factor"), rope.require("high_freq_factor")
    turns = length * own / (2 * math.pi)
    share = np.clip((turns - low) / (high - low), 0, 1)
    return own * (share + (1 - share) / factor)


def _scale_by_yarn(
    own: np.ndarray, base: float, size: int, rope: Config, config: Config
) -> tuple[np.ndarray, float]:
    length = rope.get("original_max_position_embeddings", None) or config.require(
        "max_position_embeddings"
    )
    factor = rope.get("factor", None) or config.require("max_position_embeddings") / length
    fast, slow = rope.get("beta_fast", None) or 32, rope.get("beta_slow", None) or 1

    def find_place(num_turns: float) -> float:
        return size * math.log(length / (num_turns * 2 * math.pi)) / (2 * math.log(base))

    low, high = find_place(fast), find_place(slow)
    if rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    share = 1 - np.clip((np.arange(size // 2) - low) / (high - low or 0.001), 0, 1)
    scale, mscale, over_all = (
        rope.get(key, None) for key in ("attention_factor", "mscale", "mscale_all_dim")
    )

    def find_scale(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    if scale is None:
        scale = (
            find_scale(mscale) / find_scale(over_all) if mscale and over_all else find_scale(1.0)
        )
    return own * (share + (1 - share) / factor), scale


def check_activation(config: Config, key: str, default: str) -> str:
    """The name of the activation.

    Raises:
      ValueError: it is none of `ACTIVATIONS`.
    """
    name = config.get(key, default)
    if name not in ACTIVATIONS:
        raise config.refuse(key, name, ", ".join(ACTIVATIONS))
    return name
