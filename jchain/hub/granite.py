"""The Granite family, which is built like Llama and scales embeddings, branches, and logits.

`jchain.hub.architecture` explains how to add a family.
"""

import flax.linen as nn

from jchain._typing import Array, Float, Int
from jchain.hub import decoder
from jchain.hub.architecture import Architecture
from jchain.hub.attention import RotaryAttention
from jchain.hub.config import Config
from jchain.hub.modules import Embedding, GatedMLP, check_activation
from jchain.hub.rotary import compute_rotary, read_rope_options

MODEL_TYPES = ("granite",)


class Stem(nn.Module):
    """Token embeddings, which are scaled.

    Attributes:
      vocabulary: number of tokens in the vocabulary.
      features: width of the embeddings.
      scale: factor of the embeddings.
    """

    vocabulary: int
    features: int
    scale: float

    @nn.compact
    def __call__(self, ids: Int[Array, "*B T"]) -> Float[Array, "*B T F"]:
        embeddings = Embedding(self.vocabulary, self.features, name="embed_tokens")(ids)
        return decoder.multiply(embeddings, self.scale)


class Block(decoder.Block):
    """A block of Granite."""


class Head(decoder.Head):
    """The last norm and the output layer."""


def make_architecture(config: Config) -> Architecture:
    """Make the architecture that a config describes.

    Args:
      config: the options of the model; their `model_type` is one of `MODEL_TYPES`.

    Raises:
      ValueError: if an option is missing or has a value that is not supported.
    """
    heads, norm = decoder.read_heads(config), decoder.make_norm(config)
    has_bias = config.get_flag("attention_bias", False)
    block = Block(
        self_attn=RotaryAttention(
            *heads,
            *compute_rotary(config, read_rope_options(config), heads.head_size),
            use_bias=has_bias,
            use_output_bias=has_bias,
            scale=config.get_number("attention_multiplier", 1.0),
        ),
        mlp=GatedMLP(
            config.require("intermediate_size"),
            check_activation(config, "hidden_act", "silu"),
            use_bias=config.get_flag("mlp_bias", False),
        ),
        norm=norm,
        residual_scale=config.get_number("residual_multiplier", 1.0),
    )
    vocabulary = config.require("vocab_size")
    scale = config.get_number("embedding_multiplier", 1.0)
    divisor = config.get_number("logits_scaling", 1.0)
    if divisor == 0:
        raise config.reject("logits_scaling", divisor, "a number other than 0")
    return decoder.make_decoder(
        config,
        Stem(vocabulary, config.require("hidden_size"), scale),
        (block,) * config.require_depth("num_hidden_layers"),
        Head(vocabulary, norm, divisor=divisor),
    )
