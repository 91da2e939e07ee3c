"""The GPT-2 family.

These models have learned positions, layer norms before attention and MLP, and one fused map to
queries, keys, and values. `jchain.hub.architecture` explains how to add a family, with this module
as the example.
"""

import flax.linen as nn
import jax.numpy as jnp

from jchain._typing import Array, Float, Int
from jchain.hub.architecture import Architecture
from jchain.hub.config import Config
from jchain.hub.modules import (
    Embedding,
    FeedForward,
    LayerNorm,
    Linear,
    attend,
    check_activation,
    split_heads,
)
from jchain.modules import OutputMap

MODEL_TYPES = ("gpt2",)


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
    """

    num_heads: int

    @nn.compact
    def __call__(self, x: Float[Array, "*B T F"]) -> Float[Array, "*B T F"]:
        features = x.shape[-1]
        qkv = Linear(3 * features, is_transposed=True, name="c_attn")(x)
        query, key, value = (
            split_heads(part, self.num_heads) for part in jnp.split(qkv, 3, axis=-1)
        )
        return Linear(features, is_transposed=True, name="c_proj")(
            attend(query, key, value, is_causal=True)
        )


class Block(nn.Module):
    """A block of GPT-2.

    Attributes:
      num_heads: number of attention heads.
      hidden: width of the MLP.
      activation: name of the MLP's activation.
      epsilon: constant added to the variance in the layer norms.
    """

    num_heads: int
    hidden: int
    activation: str
    epsilon: float

    @nn.compact
    def __call__(self, x: Float[Array, "*B T F"]) -> Float[Array, "*B T F"]:
        x = x + Attention(self.num_heads, name="attn")(LayerNorm(self.epsilon, name="ln_1")(x))
        mlp = FeedForward(
            self.hidden, self.activation, ("c_fc", "c_proj"), is_transposed=True, name="mlp"
        )
        return x + mlp(LayerNorm(self.epsilon, name="ln_2")(x))


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
    config.expect("scale_attn_weights", True)
    for key in (
        "scale_attn_by_inverse_layer_idx",
        "reorder_and_upcast_attn",
        "add_cross_attention",
    ):
        config.expect(key, False)
    features, vocabulary = config.require("n_embd"), config.require("vocab_size")
    epsilon = config.get("layer_norm_epsilon", 1e-5)
    block = Block(
        num_heads=config.require("n_head"),
        hidden=config.get("n_inner", None) or 4 * features,
        activation=check_activation(config, "activation_function", "gelu_new"),
        epsilon=epsilon,
    )
    is_tied = config.get("tie_word_embeddings", True)
    return Architecture(
        stem=Stem(vocabulary, config.require("n_positions"), features),
        blocks=(block,) * config.require_depth("n_layer"),
        head=Head(vocabulary, epsilon),
        prefix="transformer.",
        block_prefix="h.{}.",
        stem_names={"wte": "wte", "wpe": "wpe"},
        head_names={"ln_f": "ln_f", "lm_head": "wte" if is_tied else "/lm_head"},
        unused_tensors=("h.{}.attn.bias", "h.{}.attn.masked_bias"),
        depth_option="n_layer",
        is_tied_by_default=True,
        vocab_size=vocabulary,
    )
