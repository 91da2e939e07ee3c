"""The OLMo family: OLMo 1 and OLMo 2.

OLMo 1 has norms without weights and may clip queries, keys, and values. OLMo 2 has norms after
attention and the MLP, and normalizes all queries and all keys of a position together.
`jchain.hub.architecture` explains how to add a family.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from jchain._typing import Array, Float
from jchain.hub import decoder
from jchain.hub.architecture import Architecture
from jchain.hub.attention import RotaryAttention, split_heads
from jchain.hub.config import Config
from jchain.hub.modules import GatedMLP, Linear, check_activation
from jchain.hub.rotary import compute_rotary, read_rope_options

MODEL_TYPES = ("olmo", "olmo2")


class Stem(decoder.Stem):
    """Token embeddings."""


class Block(decoder.Block):
    """A block of OLMo."""


class Head(decoder.Head):
    """The last norm and the output layer."""


class PlainNorm(nn.Module):
    """Layer normalization without weights, computed in float32 for every dtype.

    Attributes:
      epsilon: constant added to the variance.
    """

    epsilon: float = 1e-5

    @nn.compact
    def __call__(self, x: Float[Array, "*B F"]) -> Float[Array, "*B F"]:
        wide = x.astype(jnp.float32)
        wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
        variance = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
        return (wide * jax.lax.rsqrt(variance + self.epsilon)).astype(x.dtype)


class Attention(RotaryAttention):
    """Causal self-attention whose projections are normalized or clipped before they are split.

    Attributes:
      norm: the norm of queries and keys, which is cloned; None if they are not normalized.
      clip: bound of the absolute values of queries, keys, and values; None for no bound.
    """

    norm: nn.Module | None = None
    clip: float | None = None

    def project(self, x: Float[Array, "*B T F"]) -> tuple[Float[Array, "*B T N H"], ...]:
        parts = []
        for name, num in zip("qkv", (self.num_heads, *2 * (self.num_kv_heads,)), strict=True):
            part = Linear(num * self.head_size, self.use_bias, name=f"{name}_proj")(x)
            if self.norm is not None and name != "v":
                part = self.norm.clone(parent=self, name=f"{name}_norm")(part)
            if self.clip is not None:
                part = jnp.clip(part, -self.clip, self.clip)
            parts.append(split_heads(part, num))
        return tuple(parts)


def make_architecture(config: Config) -> Architecture:
    """Make the architecture that a config describes.

    Args:
      config: the options of the model; their `model_type` is one of `MODEL_TYPES`.

    Raises:
      ValueError: if an option is missing or has a value that is not supported.
    """
    is_first = config.require("model_type") == "olmo"
    norm = PlainNorm() if is_first else decoder.make_norm(config, 1e-5, offset=0.0)
    heads, has_bias = decoder.read_heads(config), config.get_flag("attention_bias", False)
    clip = config.get("clip_qkv", None) if is_first else None
    block = Block(
        self_attn=Attention(
            *heads,
            *compute_rotary(config, read_rope_options(config), heads.head_size),
            use_bias=has_bias,
            use_output_bias=has_bias,
            norm=None if is_first else norm,
            clip=None if clip is None else config.get_number("clip_qkv", clip),
        ),
        mlp=GatedMLP(
            config.require("intermediate_size"),
            check_activation(config, "hidden_act", "silu"),
            use_bias=False,
        ),
        norm=norm,
        norms=decoder.PRE_NORMS if is_first else decoder.POST_NORMS,
    )
    vocabulary = config.require("vocab_size")
    return decoder.make_decoder(
        config,
        Stem(vocabulary, config.require("hidden_size")),
        (block,) * config.require_depth("num_hidden_layers"),
        Head(vocabulary, norm),
    )
