"""The Llama family, which includes Mistral, Qwen2, and Qwen3.

These models have rotary positions, RMS norms, gated MLPs, and grouped queries, and differ only in
their configs. `jchain.hub.architecture` explains how to add a family.
"""

import flax.linen as nn

from jchain._typing import Array, Float, Int
from jchain.hub.architecture import Architecture
from jchain.hub.config import Config
from jchain.hub.modules import (
    ACTIVATIONS,
    Embedding,
    Linear,
    RMSNorm,
    attend,
    check_activation,
    compute_frequencies,
    read_rope_options,
    rotate,
    split_heads,
)
from jchain.modules import OutputMap

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")


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


class Attention(nn.Module):
    """Causal self-attention with rotary positions and grouped queries.

    Attributes:
      num_heads: number of query heads.
      num_kv_heads: number of key and value heads; each serves `num_heads / num_kv_heads` queries.
      head_size: number of features of each head.
      frequencies: rotation frequency of each pair of rotated features, in radians per position.
      rotary_scale: factor that multiplies the sines and cosines.
      window: number of positions that each position attends to, including itself; None for all.
      use_bias: whether the maps to queries, keys, and values have biases.
      use_output_bias: whether the output map has a bias.
      norm_epsilon: constant added to the mean square in the norms of queries and keys; None if
        they are not normalized.
    """

    num_heads: int
    num_kv_heads: int
    head_size: int
    frequencies: tuple[float, ...]
    rotary_scale: float
    window: int | None
    use_bias: bool
    use_output_bias: bool
    norm_epsilon: float | None

    @nn.compact
    def __call__(self, x: Float[Array, "*B T F"]) -> Float[Array, "*B T F"]:
        def project(name: str, num_heads: int) -> Float[Array, "*B T N H"]:
            linear = Linear(num_heads * self.head_size, self.use_bias, name=name)
            return split_heads(linear(x), num_heads)

        query, key = project("q_proj", self.num_heads), project("k_proj", self.num_kv_heads)
        value = project("v_proj", self.num_kv_heads)
        if self.norm_epsilon is not None:
            query, key = (
                RMSNorm(self.norm_epsilon, name="q_norm")(query),
                RMSNorm(self.norm_epsilon, name="k_norm")(key),
            )
        query, key = (rotate(part, self.frequencies, self.rotary_scale) for part in (query, key))
        mixed = attend(query, key, value, is_causal=True, window=self.window)
        return Linear(x.shape[-1], self.use_output_bias, name="o_proj")(mixed)


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


class Block(nn.Module):
    """A block of Llama.

    Attributes:
      num_heads: number of query heads.
      num_kv_heads: number of key and value heads.
      head_size: number of features of each head.
      hidden: width of the MLP.
      activation: name of the gate's activation.
      epsilon: constant added to the mean square in the RMS norms.
      frequencies: rotation frequency of each pair of rotated features, in radians per position.
      rotary_scale: factor that multiplies the sines and cosines.
      window: number of positions that each position attends to, including itself; None for all.
      use_bias: whether the maps to queries, keys, and values have biases.
      use_output_bias: whether the output map of attention has a bias.
      use_mlp_bias: whether the MLP has biases.
      use_qk_norm: whether queries and keys are normalized, as in Qwen3.
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

    @nn.compact
    def __call__(self, x: Float[Array, "*B T F"]) -> Float[Array, "*B T F"]:
        attention = Attention(
            self.num_heads,
            self.num_kv_heads,
            self.head_size,
            self.frequencies,
            self.rotary_scale,
            self.window,
            self.use_bias,
            self.use_output_bias,
            self.epsilon if self.use_qk_norm else None,
            name="self_attn",
        )
        x = x + attention(RMSNorm(self.epsilon, name="input_layernorm")(x))
        mlp = GatedMLP(self.hidden, self.activation, self.use_mlp_bias, name="mlp")
        return x + mlp(RMSNorm(self.epsilon, name="post_attention_layernorm")(x))


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
    features, vocabulary = config.require("hidden_size"), config.require("vocab_size")
    depth = config.require_depth("num_hidden_layers")
    num_heads = config.require("num_attention_heads")
    head_size = config.get("head_dim", None) or (128 if kind == "qwen3" else features // num_heads)
    epsilon = config.get("rms_norm_eps", 1e-6)
    has_bias = kind != "mistral" and bool(config.get("attention_bias", False))
    rope = read_rope_options(config)
    rope.expect("partial_rotary_factor", None, 1.0)
    frequencies, rotary_scale = compute_frequencies(config, rope, head_size)
    config.get("max_position_embeddings", None)
    blocks = tuple(
        Block(
            num_heads=num_heads,
            num_kv_heads=config.get("num_key_value_heads", None) or num_heads,
            head_size=head_size,
            hidden=config.require("intermediate_size"),
            activation=check_activation(config, "hidden_act", "silu"),
            epsilon=epsilon,
            frequencies=frequencies,
            rotary_scale=rotary_scale,
            window=window,
            use_bias=kind == "qwen2" or has_bias,
            use_output_bias=has_bias and kind != "qwen2",
            use_mlp_bias=kind == "llama" and bool(config.get("mlp_bias", False)),
            use_qk_norm=kind == "qwen3",
        )
        for window in read_windows(config, kind, depth)
    )
    is_tied = config.get("tie_word_embeddings", False)
    return Architecture(
        stem=Stem(vocabulary, features),
        blocks=blocks,
        head=Head(vocabulary, epsilon),
        prefix="model.",
        block_prefix="layers.{}.",
        stem_names={"embed_tokens": "embed_tokens"},
        head_names={"norm": "norm", "lm_head": "embed_tokens" if is_tied else "/lm_head"},
        unused_tensors=("layers.{}.self_attn.rotary_emb.inv_freq", "rotary_emb.inv_freq"),
        options_per_block={
            "layer_types": tuple(
                "sliding_attention" if b.window else "full_attention" for b in blocks
            )
        },
        vocab_size=vocabulary,
    )


def read_windows(config: Config, kind: str, depth: int) -> list[int | None]:
    """Read the attention window of each block.

    Args:
      config: the options of the model.
      kind: the `model_type` of the model.
      depth: number of blocks.

    Returns:
      For each block, the number of positions that each position attends to, including itself, or
      None for all.

    Raises:
      ValueError: if `layer_types` does not have one known type for each block.
    """
    window = None if kind == "llama" else config.get("sliding_window", 4096)
    if kind == "mistral":
        return [window] * depth
    is_used = kind != "llama" and bool(config.get("use_sliding_window", False))
    first = config.get("max_window_layers", 28) if kind != "llama" else depth
    types = config.get("layer_types", None)
    if types is None:
        return [window if is_used and i >= first else None for i in range(depth)]
    if len(types) != depth:
        raise config.reject("layer_types", types, f"{depth} of them")
    for name in types:
        if name not in ("full_attention", "sliding_attention"):
            raise config.reject("layer_types", name, "full_attention or sliding_attention")
    return [window if is_used and name == "sliding_attention" else None for name in types]
