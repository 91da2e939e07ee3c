"""The GPT-2 family.

These models have learned positions, layer norms before attention and MLP, and one fused map to
queries, keys, and values. `jchain.hub.architecture` explains how to add a family, with this module
as the example.
"""

import flax.linen as nn
import jax.numpy as jnp

from jchain._typing import Array, Float, Int, PyTree
from jchain.hub.architecture import Architecture, FoldedScale
from jchain.hub.attention import attend, split_heads
from jchain.hub.config import Config
from jchain.hub.modules import (
    Embedding,
    FeedForward,
    LayerNorm,
    Linear,
    check_activation,
)
from jchain.modules import OutputMap
from jchain.pytree import multiply_children

MODEL_TYPES = ("gpt2",)
_SCALE_OPTION = "scale_attn_by_inverse_layer_idx"
# Other names of options, which take precedence.
_OTHER_NAMES = {
    "hidden_size": "n_embd",
    "max_position_embeddings": "n_positions",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
}


class Stem(nn.Module):
    """The sum of token embeddings and position embeddings.

    Attributes:
      vocabulary: number of tokens in the vocabulary.
      num_positions: maximum length of a sequence.
      features: width of the embeddings.
    """

    vocabulary: int
    num_positions: int
    features: int

    @nn.compact
    def __call__(self, ids: Int[Array, "*B T"]) -> Float[Array, "*B T F"]:
        if ids.shape[-1] > self.num_positions:
            raise ValueError(
                f"expected sequences of at most {self.num_positions} tokens, got {ids.shape[-1]}"
            )
        indices = jnp.arange(ids.shape[-1]).reshape((1,) * (ids.ndim - 1) + (-1,))
        positions = Embedding(self.num_positions, self.features, name="wpe")(indices)
        return Embedding(self.vocabulary, self.features, name="wte")(ids) + positions


class Attention(nn.Module):
    """Causal self-attention.

    Attributes:
      num_heads: number of attention heads.
      scale: factor of the products of queries and keys; None for 1 over the root of the head size.
    """

    num_heads: int
    scale: float | None

    @nn.compact
    def __call__(self, x: Float[Array, "*B T F"]) -> Float[Array, "*B T F"]:
        features = x.shape[-1]
        qkv = Linear(3 * features, is_transposed=True, name="c_attn")(x)
        query, key, value = (
            split_heads(part, self.num_heads) for part in jnp.split(qkv, 3, axis=-1)
        )
        return Linear(features, is_transposed=True, name="c_proj")(
            attend(query, key, value, is_causal=True, scale=self.scale)
        )


class Block(nn.Module):
    """A block of GPT-2.

    Attributes:
      num_heads: number of attention heads.
      hidden: width of the MLP.
      activation: name of the MLP's activation.
      epsilon: constant added to the variance in the layer norms.
      scale: factor of the products of queries and keys; None for 1 over the root of the head size.
      has_attention: whether the block has attention; without it, it is the MLP as a layer.
      has_mlp: whether the block has the MLP.
    """

    num_heads: int
    hidden: int
    activation: str
    epsilon: float
    scale: float | None = None
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
        attention = Attention(self.num_heads, self.scale, name="attn")
        return attention(LayerNorm(self.epsilon, name="ln_1")(x))

    def mlp_branch(self, x: Float[Array, "*B T F"]) -> Float[Array, "*B T F"]:
        """Compute what the MLP adds to the activations.

        Args:
          x: the activations.
        """
        mlp = FeedForward(
            self.hidden, self.activation, ("c_fc", "c_proj"), is_transposed=True, name="mlp"
        )
        return mlp(LayerNorm(self.epsilon, name="ln_2")(x))

    def scale_branch(self, params: PyTree, factor: float) -> PyTree:
        """Return the params with which what attention and MLP add is multiplied by a factor.

        Args:
          params: the params of this layer.
          factor: the factor.
        """
        return multiply_children(params, factor, "attn/c_proj", "mlp/c_proj")


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
        features = LayerNorm(self.epsilon, name="ln_f")(x)
        linear = Linear(self.vocabulary, use_bias=False, name="lm_head")
        return OutputMap(features, *linear.read(x.shape[-1]))


def make_architecture(config: Config) -> Architecture:
    """Make the architecture that a config describes.

    Args:
      config: the options of the model; their `model_type` is one of `MODEL_TYPES`.

    Raises:
      ValueError: if an option is missing or has a value that is not supported.
    """
    depth_option = "num_hidden_layers" if "num_hidden_layers" in config.options else "n_layer"
    config = config.rename(_OTHER_NAMES)
    config.check_causal()
    config.expect("add_cross_attention", False, None)
    features, vocabulary = config.require("n_embd"), config.require("vocab_size")
    epsilon, hidden = config.get("layer_norm_epsilon", 1e-5), config.get("n_inner", None)
    block = Block(
        num_heads=config.require("n_head"),
        hidden=4 * features if hidden is None else hidden,
        activation=check_activation(config, "activation_function", "gelu_new"),
        epsilon=epsilon,
        scale=None if config.get_flag("scale_attn_weights", True) else 1.0,
    )
    depth, is_tied = config.require_depth("n_layer"), config.get_flag("tie_word_embeddings", True)
    is_scaled = config.get_flag(_SCALE_OPTION, False)
    return Architecture(
        stem=Stem(vocabulary, config.require("n_positions"), features),
        blocks=(block,) * depth,
        head=Head(vocabulary, epsilon),
        prefix="transformer.",
        block_prefix="h.{}.",
        stem_names={"wte": "wte", "wpe": "wpe"},
        head_names={"ln_f": "ln_f", "lm_head": "wte" if is_tied else "/lm_head"},
        unused_tensors=("h.{}.attn.bias", "h.{}.attn.masked_bias"),
        depth_option=depth_option,
        fixed_options={_SCALE_OPTION: False} if is_scaled else {},
        folded_scale=_fold_scales(features, depth) if is_scaled else None,
        is_tied_by_default=True,
        has_transposed_maps=True,
        vocab_size=vocabulary,
    )


def _fold_scales(features: int, depth: int) -> FoldedScale:
    """Divide the queries of block i by i + 1, so that all blocks share one module."""
    names = ("attn/c_attn/weight", "attn/c_attn/bias")
    return FoldedScale(names, features, tuple(1 / (i + 1) for i in range(depth)))
