"""The Phi-3 family, which includes Phi-4.

These are built like Llama, but one map computes queries, keys, and values, and one the gate and the
input of the MLP. `jchain.hub.architecture` explains how to add a family.
"""

import flax.linen as nn
import jax.numpy as jnp

from jchain._typing import Array, Float
from jchain.hub import decoder
from jchain.hub.architecture import Architecture
from jchain.hub.attention import RotaryAttention, split_heads
from jchain.hub.config import Config
from jchain.hub.modules import ACTIVATIONS, Linear, check_activation
from jchain.hub.rotary import Rotary, compute_rotary, read_rope_options

MODEL_TYPES = ("phi3",)
# Names of longrope in older files.
_LONGROPE = ("su", "yarn")


class Stem(decoder.Stem):
    """Token embeddings."""


class Block(decoder.Block):
    """A block of Phi-3."""


class Head(decoder.Head):
    """The last norm and the output layer."""


class Attention(RotaryAttention):
    """Causal self-attention with one map to queries, keys, and values."""

    def project(self, x: Float[Array, "*B T F"]) -> tuple[Float[Array, "*B T N H"], ...]:
        numbers = (self.num_heads, self.num_kv_heads, self.num_kv_heads)
        width = sum(numbers) * self.head_size
        qkv = split_heads(Linear(width, self.use_bias, name="qkv_proj")(x), sum(numbers))
        first = self.num_heads
        return tuple(jnp.split(qkv, (first, first + self.num_kv_heads), axis=-2))


class FusedMLP(nn.Module):
    """A gated MLP with one map to the gate and the input (Shazeer 2020, arXiv:2002.05202).

    Attributes:
      hidden: width of the hidden layer.
      activation: name of the gate's activation.
    """

    hidden: int
    activation: str

    @nn.compact
    def __call__(self, x: Float[Array, "*B T F"]) -> Float[Array, "*B T F"]:
        both = Linear(2 * self.hidden, use_bias=False, name="gate_up_proj")(x)
        gate, up = jnp.split(both, 2, axis=-1)
        down = Linear(x.shape[-1], use_bias=False, name="down_proj")
        return down(ACTIVATIONS[self.activation](gate) * up)


def make_architecture(config: Config) -> Architecture:
    """Make the architecture that a config describes.

    Args:
      config: the options of the model; their `model_type` is one of `MODEL_TYPES`.

    Raises:
      ValueError: if an option is missing or has a value that is not supported.
    """
    heads = decoder.read_heads(config)
    norm = decoder.make_norm(config, default_epsilon=1e-5)
    block = Block(
        self_attn=Attention(
            *heads, *_read_rotary(config, heads), window=decoder.read_window(config, None)
        ),
        mlp=FusedMLP(
            config.require("intermediate_size"), check_activation(config, "hidden_act", "silu")
        ),
        norm=norm,
    )
    vocabulary = config.require("vocab_size")
    return decoder.make_decoder(
        config,
        Stem(vocabulary, config.require("hidden_size")),
        (block,) * config.require_depth("num_hidden_layers"),
        Head(vocabulary, norm),
    )


def _read_rotary(config: Config, heads: decoder.Heads) -> Rotary:
    rope = read_rope_options(config)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind in _LONGROPE:
        rope = Config(rope.options | {"rope_type": "longrope"}, rope.location)
    elif kind not in ("default", "longrope"):
        raise rope.reject("rope_type", kind, "default or longrope")
    # Here the length that the model was first trained with has a default.
    lengths = {"original_max_position_embeddings": 4096, "max_position_embeddings": 4096}
    config = Config(lengths | config.options, config.location)
    return compute_rotary(config, rope, heads.head_size, is_partial=True)
