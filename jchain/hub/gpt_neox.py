"""The GPT-NeoX family, for example Pythia.

In these models, attention and the MLP run in parallel, rotary positions apply to a part of each
head, and one fused map computes queries, keys, and values. `jchain.hub.architecture` explains how
to add a family.
"""

import flax.linen as nn
import jax.numpy as jnp

from jchain._typing import Array, Float, Int, PyTree
from jchain.hub.architecture import Architecture
from jchain.hub.attention import attend, split_heads
from jchain.hub.config import Config
from jchain.hub.modules import (
    Embedding,
    FeedForward,
    LayerNorm,
    Linear,
    check_activation,
)
from jchain.hub.rotary import (
    LongRotary,
    compute_rotary,
    read_rope_options,
    rotate,
    select_frequencies,
)
from jchain.modules import OutputMap
from jchain.pytree import multiply_children

MODEL_TYPES = ("gpt_neox",)


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
        return Embedding(self.vocabulary, self.features, name="embed_in")(ids)


class Attention(nn.Module):
    """Causal self-attention with rotary positions.

    Attributes:
      num_heads: number of attention heads.
      frequencies: rotation frequency of each pair of rotated features, in radians per position.
      rotary_scale: factor that multiplies the sines and cosines.
      use_bias: whether the affine maps have biases.
      long_rotary: how the frequencies change in long sequences; None if they do not.
    """

    num_heads: int
    frequencies: tuple[float, ...]
    rotary_scale: float
    use_bias: bool
    long_rotary: LongRotary | None

    @nn.compact
    def __call__(self, x: Float[Array, "*B T F"]) -> Float[Array, "*B T F"]:
        features = x.shape[-1]
        # The features of each head hold its query, key, and value next to each other.
        qkv = split_heads(
            Linear(3 * features, self.use_bias, name="query_key_value")(x), self.num_heads
        )
        query, key, value = jnp.split(qkv, 3, axis=-1)
        frequencies = select_frequencies(self.frequencies, self.long_rotary, x.shape[-2])
        query, key = (rotate(part, frequencies, self.rotary_scale) for part in (query, key))
        return Linear(features, self.use_bias, name="dense")(
            attend(query, key, value, is_causal=True)
        )


class Block(nn.Module):
    """A block of GPT-NeoX.

    Attributes:
      num_heads: number of attention heads.
      hidden: width of the MLP.
      activation: name of the MLP's activation.
      epsilon: constant added to the variance in the layer norms.
      frequencies: rotation frequency of each pair of rotated features, in radians per position.
      rotary_scale: factor that multiplies the sines and cosines.
      is_parallel: whether the MLP reads the input of the block instead of the output of attention.
      use_bias: whether the affine maps of attention have biases.
      long_rotary: how the frequencies change in long sequences; None if they do not.
      has_attention: whether the block has attention; without it, it is the MLP as a layer.
      has_mlp: whether the block has the MLP.
    """

    num_heads: int
    hidden: int
    activation: str
    epsilon: float
    frequencies: tuple[float, ...]
    rotary_scale: float = 1.0
    is_parallel: bool = True
    use_bias: bool = True
    long_rotary: LongRotary | None = None
    has_attention: bool = True
    has_mlp: bool = True

    @nn.compact
    def __call__(self, x: Float[Array, "*B T F"]) -> Float[Array, "*B T F"]:
        attended = x + self.attention_branch(x) if self.has_attention else x
        if not self.has_mlp:
            return attended
        return attended + self.mlp_branch(x if self.is_parallel else attended)

    def attention_branch(self, x: Float[Array, "*B T F"]) -> Float[Array, "*B T F"]:
        """Compute what attention adds to the activations.

        Args:
          x: the activations.
        """
        attention = Attention(
            self.num_heads,
            self.frequencies,
            self.rotary_scale,
            self.use_bias,
            self.long_rotary,
            name="attention",
        )
        return attention(LayerNorm(self.epsilon, name="input_layernorm")(x))

    def mlp_branch(self, x: Float[Array, "*B T F"]) -> Float[Array, "*B T F"]:
        """Compute what the MLP adds to the activations.

        Args:
          x: the activations, before attention if the two are parallel.
        """
        mlp = FeedForward(
            self.hidden, self.activation, ("dense_h_to_4h", "dense_4h_to_h"), name="mlp"
        )
        return mlp(LayerNorm(self.epsilon, name="post_attention_layernorm")(x))

    def scale_branch(self, params: PyTree, factor: float) -> PyTree:
        """Return the params with which what attention and MLP add is multiplied by a factor.

        Args:
          params: the params of this layer.
          factor: the factor.
        """
        return multiply_children(params, factor, "attention/dense", "mlp/dense_4h_to_h")


class Head(nn.Module):
    """The last norm and the output layer.

    Attributes:
      vocabulary: number of logits.
      epsilon: constant added to the variance in the layer norm.
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
        features = LayerNorm(self.epsilon, name="final_layer_norm")(x)
        linear = Linear(self.vocabulary, use_bias=False, name="embed_out")
        return OutputMap(features, *linear.read(x.shape[-1]))


def make_architecture(config: Config) -> Architecture:
    """Make the architecture that a config describes.

    Args:
      config: the options of the model; their `model_type` is one of `MODEL_TYPES`.

    Raises:
      ValueError: if an option is missing or has a value that is not supported.
    """
    config.check_causal()
    features, vocabulary = config.require("hidden_size"), config.require("vocab_size")
    num_heads, epsilon = config.require("num_attention_heads"), config.get("layer_norm_eps", 1e-5)
    rotary = compute_rotary(config, _read_rope(config), features // num_heads, is_partial=True)
    block = Block(
        num_heads=num_heads,
        hidden=config.require("intermediate_size"),
        activation=check_activation(config, "hidden_act", "gelu"),
        epsilon=epsilon,
        frequencies=rotary.frequencies,
        rotary_scale=rotary.scale,
        long_rotary=rotary.long,
        is_parallel=config.get_flag("use_parallel_residual", True),
        use_bias=config.get_flag("attention_bias", True),
    )
    is_tied = config.get_flag("tie_word_embeddings", False)
    return Architecture(
        stem=Stem(vocabulary, features),
        blocks=(block,) * config.require_depth("num_hidden_layers"),
        head=Head(vocabulary, epsilon),
        prefix="gpt_neox.",
        block_prefix="layers.{}.",
        stem_names={"embed_in": "embed_in"},
        head_names={
            "final_layer_norm": "final_layer_norm",
            "embed_out": "embed_in" if is_tied else "/embed_out",
        },
        unused_tensors=(
            "layers.{}.attention.bias",
            "layers.{}.attention.masked_bias",
            "layers.{}.attention.rotary_emb.inv_freq",
        ),
        vocab_size=vocabulary,
    )


def _read_rope(config: Config) -> Config:
    """Read the options of rotary positions; a head size that only these use is not supported."""
    size = config.require("hidden_size") // config.require("num_attention_heads")
    config.expect("head_dim", None, size)
    return read_rope_options(
        config, base_key="rotary_emb_base", share_key="rotary_pct", default_share=0.25
    )
