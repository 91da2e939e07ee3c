"""The Llama family, which includes Mistral, Ministral, Qwen2, Qwen3, and SmolLM3.

These models have rotary positions, RMS norms, gated MLPs, and grouped queries, and differ only in
their configs. `jchain.hub.architecture` explains how to add a family.
"""

import dataclasses
from collections.abc import Sequence

import flax.linen as nn

from jchain._typing import Array, Float, Int, PyTree
from jchain.hub.architecture import Architecture
from jchain.hub.attention import RotaryAttention
from jchain.hub.config import Config
from jchain.hub.decoder import (
    FULL,
    SLIDING,
    make_decoder,
    read_heads,
    read_layer_types,
    read_window,
)
from jchain.hub.modules import Embedding, GatedMLP, Linear, RMSNorm, check_activation
from jchain.hub.rotary import LongRotary, compute_rotary, read_rope_options
from jchain.modules import OutputMap
from jchain.pytree import multiply_children

# A Mistral whose config lists types of blocks is a Ministral.
MODEL_TYPES = ("llama", "mistral", "ministral", "qwen2", "qwen3", "smollm3")


class Stem(nn.Module):
    """Token embeddings.

    Attributes:
      vocabulary: number of tokens in the vocabulary.
      features: width of the embeddings.
    """

    vocabulary: int
    features: int

    @nn.compact
    def __call__(self, ids: Int[Array, "*B T"]) -> Float[Array, "*B T F"]:
        return Embedding(self.vocabulary, self.features, name="embed_tokens")(ids)


class Attention(RotaryAttention):
    """Causal self-attention whose queries and keys are normalized in Qwen3.

    Attributes:
      norm_epsilon: constant added to the mean square in the norms of queries and keys; None if
        they are not normalized.
    """

    norm_epsilon: float | None = None

    def normalize(self, x: Float[Array, "*B T N H"], name: str) -> Float[Array, "*B T N H"]:
        return x if self.norm_epsilon is None else RMSNorm(self.norm_epsilon, name=name)(x)


class Block(nn.Module):
    """A block of Llama.

    Attributes:
      num_heads: number of query heads.
      num_kv_heads: number of key and value heads.
      head_size: number of features of each head.
      hidden: width of the MLP.
      activation: name of the gate's activation.
      epsilon: constant added to the mean square in the RMS norms.
      frequencies: rotation frequency of each pair of rotated features, in radians per position;
        none if positions are not rotated.
      rotary_scale: factor that multiplies the sines and cosines.
      window: number of positions that each position attends to, including itself; None for all.
      use_bias: whether the maps to queries, keys, and values have biases.
      use_output_bias: whether the output map of attention has a bias.
      use_mlp_bias: whether the MLP has biases.
      use_qk_norm: whether queries and keys are normalized, as in Qwen3.
      long_rotary: how the frequencies change in long sequences; None if they do not.
      has_attention: whether the block has attention; without it, it is the MLP as a layer.
      has_mlp: whether the block has the MLP.
    """

    num_heads: int
    num_kv_heads: int
    head_size: int
    hidden: int
    activation: str
    epsilon: float
    frequencies: tuple[float, ...]
    rotary_scale: float = 1.0
    window: int | None = None
    use_bias: bool = False
    use_output_bias: bool = False
    use_mlp_bias: bool = False
    use_qk_norm: bool = False
    long_rotary: LongRotary | None = None
    has_attention: bool = True
    has_mlp: bool = True

    @nn.compact
    def __call__(self, x: Float[Array, "*B T F"]) -> Float[Array, "*B T F"]:
        x = x + self.attention_branch(x) if self.has_attention else x
        return x + self.mlp_branch(x) if self.has_mlp else x

    def attention_branch(self, x: Float[Array, "*B T F"]) -> Float[Array, "*B T F"]:
        """Compute what attention adds to the activations.

        Args:
          x: the activations.
        """
        attend = Attention(
            self.num_heads,
            self.num_kv_heads,
            self.head_size,
            self.frequencies,
            self.rotary_scale,
            self.long_rotary,
            self.window,
            self.use_bias,
            self.use_output_bias,
            norm_epsilon=self.epsilon if self.use_qk_norm else None,
            name="self_attn",
        )
        return attend(RMSNorm(self.epsilon, name="input_layernorm")(x))

    def mlp_branch(self, x: Float[Array, "*B T F"]) -> Float[Array, "*B T F"]:
        """Compute what the MLP adds to the activations.

        Args:
          x: the activations.
        """
        mlp = GatedMLP(self.hidden, self.activation, self.use_mlp_bias, name="mlp")
        return mlp(RMSNorm(self.epsilon, name="post_attention_layernorm")(x))

    def scale_branch(self, params: PyTree, factor: float) -> PyTree:
        """Return the params with which what attention and MLP add is multiplied by a factor.

        Args:
          params: the params of this layer.
          factor: the factor.
        """
        return multiply_children(params, factor, "self_attn/o_proj", "mlp/down_proj")


class Head(nn.Module):
    """The last norm and the output layer.

    Attributes:
      vocabulary: number of logits.
      epsilon: constant added to the mean square in the RMS norm.
    """

    vocabulary: int
    epsilon: float

    def __call__(self, x: Float[Array, "*B T F"]) -> Float[Array, "*B T V"]:
        return self.output_map(x).compute()

    @nn.compact
    def output_map(self, x: Float[Array, "*B T F"]) -> OutputMap:
        """Return the output layer and its input, for losses that read the logits in parts.

        Args:
          x: the activations.
        """
        features = RMSNorm(self.epsilon, name="norm")(x)
        linear = Linear(self.vocabulary, use_bias=False, name="lm_head")
        return OutputMap(features, *linear.read(x.shape[-1]))


def make_architecture(config: Config) -> Architecture:
    """Make the architecture that a config describes.

    Args:
      config: the options of the model; their `model_type` is one of `MODEL_TYPES`.

    Raises:
      ValueError: if an option is missing or has a value that is not supported.
    """
    kind = config.require("model_type")
    depth = config.require_depth("num_hidden_layers")
    heads = read_heads(config, default_size=128 if kind == "qwen3" else None)
    has_bias = kind in ("llama", "qwen3", "smollm3") and config.get_flag("attention_bias", False)
    rope = read_rope_options(config, default_base=2e6 if kind == "smollm3" else 10000.0)
    rotary = compute_rotary(config, rope, heads.head_size)
    block = Block(
        *heads,
        hidden=config.require("intermediate_size"),
        activation=check_activation(config, "hidden_act", "silu"),
        epsilon=config.get_number("rms_norm_eps", 1e-6),
        frequencies=rotary.frequencies,
        rotary_scale=rotary.scale,
        long_rotary=rotary.long,
        use_bias=kind == "qwen2" or has_bias,
        use_output_bias=has_bias,
        use_mlp_bias=kind in ("llama", "smollm3") and config.get_flag("mlp_bias", False),
        use_qk_norm=kind == "qwen3",
    )
    is_rotated = read_rotated(config, depth) if kind == "smollm3" else (True,) * depth
    windows, options = read_windows(config, kind, is_rotated)
    blocks = [
        dataclasses.replace(
            block, window=window, frequencies=rotary.frequencies if has_positions else ()
        )
        for window, has_positions in zip(windows, is_rotated, strict=True)
    ]
    if kind == "smollm3":
        options |= {"no_rope_layers": tuple(map(int, is_rotated))}
    vocabulary, is_tied = config.require("vocab_size"), kind == "smollm3"
    stem, head = Stem(vocabulary, config.require("hidden_size")), Head(vocabulary, block.epsilon)
    return make_decoder(
        config, stem, blocks, head, is_tied_by_default=is_tied, options_per_block=options
    )


def read_rotated(config: Config, depth: int) -> tuple[bool, ...]:
    """Read which blocks of SmolLM3 have rotary positions.

    Args:
      config: the options of the model.
      depth: number of blocks.

    Raises:
      ValueError: if `no_rope_layers` does not have one entry for each block.
    """
    given = config.get("no_rope_layers", None)
    if given is None:
        interval = config.get("no_rope_layer_interval", 4)
        return tuple((i + 1) % interval != 0 for i in range(depth))
    if not isinstance(given, list) or len(given) < depth:
        raise config.reject("no_rope_layers", given, f"{depth} of them")
    return tuple(bool(entry) for entry in given[:depth])


def read_windows(
    config: Config, kind: str, is_rotated: Sequence[bool]
) -> tuple[Sequence[int | None], dict[str, tuple[object, ...]]]:
    """Read the attention window of each block.

    Args:
      config: the options of the model.
      kind: the `model_type` of the model.
      is_rotated: for each block, whether it has rotary positions.

    Returns:
      For each block, the number of positions that each position attends to, including itself, or
      None for all. Also the options that describe them block by block.

    Raises:
      ValueError: if `layer_types` does not have one known type for each block.
    """
    depth = len(is_rotated)
    if kind == "llama":
        return (None,) * depth, {}
    if kind in ("mistral", "ministral"):
        window = read_window(config, 4096)
        has_window = [window is not None] * depth
        if kind == "mistral" and "layer_types" not in config.options:
            return (window,) * depth, {}
    elif kind == "smollm3":
        window, is_used = read_window(config, None), config.get_flag("use_sliding_window", False)
        has_window = [is_used and window is not None and not rotated for rotated in is_rotated]
    else:
        is_used = config.get_flag("use_sliding_window", False)
        window = read_window(config, 4096) if is_used else None
        first = config.get("max_window_layers", 28)
        has_window = [window is not None and i >= first for i in range(depth)]
    types = read_layer_types(config, [SLIDING if has else FULL for has in has_window])
    return [window if name == SLIDING else None for name in types], {"layer_types": types}
