"""The StarCoder2 family: layer norms, biases, and an MLP without a gate.

`jchain.hub.architecture` explains how to add a family.
"""

from jchain.hub import decoder
from jchain.hub.architecture import Architecture
from jchain.hub.attention import RotaryAttention
from jchain.hub.config import Config
from jchain.hub.modules import FeedForward, LayerNorm, check_activation
from jchain.hub.rotary import compute_rotary, read_rope_options

MODEL_TYPES = ("starcoder2",)


class Stem(decoder.Stem):
    """Token embeddings."""


class Block(decoder.Block):
    """A block of StarCoder2."""


class Head(decoder.Head):
    """The last norm and the output layer."""


def make_architecture(config: Config) -> Architecture:
    """Make the architecture that a config describes.

    Args:
      config: the options of the model; their `model_type` is one of `MODEL_TYPES`.

    Raises:
      ValueError: if an option is missing or has a value that is not supported.
    """
    heads, has_bias = decoder.read_heads(config), config.get_flag("use_bias", True)
    norm = LayerNorm(config.get_number("norm_epsilon", 1e-5))
    block = Block(
        self_attn=RotaryAttention(
            *heads,
            *compute_rotary(config, read_rope_options(config), heads.head_size),
            window=decoder.read_window(config, None),
            use_bias=has_bias,
            use_output_bias=has_bias,
        ),
        mlp=FeedForward(
            config.require("intermediate_size"),
            check_activation(config, "hidden_act", "gelu_pytorch_tanh"),
            ("c_fc", "c_proj"),
            has_bias,
        ),
        norm=norm,
    )
    vocabulary = config.require("vocab_size")
    return decoder.make_decoder(
        config,
        Stem(vocabulary, config.require("hidden_size")),
        (block,) * config.require_depth("num_hidden_layers"),
        Head(vocabulary, norm),
        is_tied_by_default=True,
    )
