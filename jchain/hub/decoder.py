"""What most decoders share: their parts, the names of their tensors, and how options are read.

The blocks of these families are `x + attention(x)` followed by `x + mlp(x)`, with norms before or
after each of the two. A family's module defines what differs.
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp

from jchain._typing import Array, Float, Int, PyTree
from jchain.hub.architecture import Architecture
from jchain.hub.config import Config
from jchain.hub.modules import Embedding, Linear, RMSNorm
from jchain.modules import OutputMap
from jchain.pytree import multiply_children

FULL, SLIDING = "full_attention", "sliding_attention"
# The name of a block without a window in older files.
_OLD_FULL = "attention"

# The names of the norms before and after attention, then before and after the MLP; None for none.
Norms = tuple[str | None, str | None, str | None, str | None]
PRE_NORMS: Norms = ("input_layernorm", None, "post_attention_layernorm", None)
POST_NORMS: Norms = (None, "post_attention_layernorm", None, "post_feedforward_layernorm")
ALL_NORMS: Norms = (
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
)


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


class Block(nn.Module):
    """A block of a decoder.

    Attributes:
      self_attn: attention.
      mlp: the MLP.
      norm: the norm, which is cloned for each place.
      norms: the names of the norms before and after attention, then before and after the MLP.
      residual_scale: factor of what attention and MLP add to the activations.
      has_attention: whether the block has attention; without it, it is the MLP as a layer.
      has_mlp: whether the block has the MLP.
    """

    self_attn: nn.Module
    mlp: nn.Module
    norm: nn.Module
    norms: Norms = PRE_NORMS
    residual_scale: float = 1.0
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
        return self._apply(self.self_attn, x, *self.norms[:2])

    def mlp_branch(self, x: Float[Array, "*B T F"]) -> Float[Array, "*B T F"]:
        """Compute what the MLP adds to the activations.

        Args:
          x: the activations.
        """
        return self._apply(self.mlp, x, *self.norms[2:])

    def _apply(
        self, part: nn.Module, x: Float[Array, "*B T F"], before: str | None, after: str | None
    ) -> Float[Array, "*B T F"]:
        if before is not None:
            x = self.norm.clone(parent=self, name=before)(x)
        x = part(x)
        if after is not None:
            x = self.norm.clone(parent=self, name=after)(x)
        return multiply(x, self.residual_scale)

    def scale_branch(self, params: PyTree, factor: float) -> PyTree:
        """Return the params with which what attention and MLP add is multiplied by a factor.

        A norm after attention or MLP undoes factors before it, so its weight is multiplied.

        Args:
          params: the params of this layer.
          factor: the factor.
        """
        outputs = ("self_attn/o_proj", "mlp/down_proj", "mlp/c_proj")
        experts = [f"mlp/experts/{i}/down_proj" for i in params.get("mlp", {}).get("experts", {})]
        norms = [norm for norm in (self.norms[1], self.norms[3]) if norm is not None]
        if norms:
            return multiply_children(
                params, factor, *norms, offset=getattr(self.norm, "offset", None) or 0.0
            )
        return multiply_children(params, factor, *outputs, *experts)


class Head(nn.Module):
    """The last norm and the output layer.

    Attributes:
      vocabulary: number of logits.
      norm: the norm.
      divisor: number that divides the logits.
      softcap: bound of the logits, which become `softcap * tanh(logits / softcap)`; None for none.
    """

    vocabulary: int
    norm: nn.Module
    divisor: float = 1.0
    softcap: float | None = None

    def __call__(self, x: Float[Array, "*B T F"]) -> Float[Array, "*B T V"]:
        return self.output_map(x).compute()

    @nn.compact
    def output_map(self, x: Float[Array, "*B T F"]) -> OutputMap:
        """Return the output layer and its input, for losses that read the logits in parts.

        Args:
          x: the activations.
        """
        features = self.norm(x)
        linear = Linear(self.vocabulary, use_bias=False, name="lm_head")
        weight, bias = linear.read(x.shape[-1])
        return OutputMap(features, weight, bias, 1 / self.divisor, self.softcap)


def multiply(x: Float[Array, "*B"], factor: float) -> Float[Array, "*B"]:
    """Multiply in float32 and round once, as PyTorch does, instead of rounding the factor.

    Args:
      x: the activations.
      factor: the factor.
    """
    return x if factor == 1.0 else (x.astype(jnp.float32) * factor).astype(x.dtype)


class Heads(NamedTuple):
    """The sizes of attention."""

    num_heads: int  # query heads
    num_kv_heads: int  # key and value heads
    head_size: int  # features of each head


def read_heads(config: Config, default_size: int | None = None) -> Heads:
    """Read the sizes of attention.

    Args:
      config: the options of the model.
      default_size: number of features of each head if the config does not have it; None to divide
        the width of the model by the number of heads.

    Raises:
      ValueError: if an option is missing or has a value that no model has.
    """
    num_heads, features = config.require("num_attention_heads"), config.require("hidden_size")
    num_kv_heads = config.get("num_key_value_heads", None)
    size = config.get("head_dim", default_size)
    return Heads(
        num_heads,
        num_heads if num_kv_heads is None else num_kv_heads,
        (default_size or features // num_heads) if size is None else size,
    )


def read_window(config: Config, default: int | None) -> int | None:
    """Read the number of positions that each position attends to in blocks with windows.

    Args:
      config: the options of the model.
      default: the number if the config does not have it.

    Raises:
      ValueError: if it is not a positive number or null.
    """
    window = config.get("sliding_window", default)
    if window is not None and (isinstance(window, bool) or not window >= 1):
        raise config.reject("sliding_window", window, "at least 1 position")
    return window


def read_layer_types(config: Config, default: Sequence[str]) -> tuple[str, ...]:
    """Read which blocks have windows.

    Args:
      config: the options of the model.
      default: the type of each block if the config does not have them.

    Raises:
      ValueError: if `layer_types` does not have one known type for each block.
    """
    types = config.get("layer_types", None)
    if types is None:
        return tuple(default)
    if not isinstance(types, list) or len(types) != len(default):
        raise config.reject("layer_types", types, f"{len(default)} of them")
    found = tuple(FULL if name == _OLD_FULL else name for name in types)
    for name in found:
        if name not in (FULL, SLIDING):
            raise config.reject("layer_types", name, f"{FULL} or {SLIDING}")
    return found


def make_decoder(
    config: Config,
    stem: nn.Module,
    blocks: Sequence[nn.Module],
    head: nn.Module,
    *,
    is_tied_by_default: bool = False,
    options_per_block: Mapping[str, tuple[object, ...]] = MappingProxyType({}),
) -> Architecture:
    """Make the architecture of a decoder whose tensors are named as Llama's.

    Args:
      config: the options of the model.
      stem: the embeddings.
      blocks: the blocks, in the order of the model.
      head: the last norm and the output layer.
      is_tied_by_default: whether embeddings are tied if the config does not say so.
      options_per_block: config options that list one entry for each block.

    Raises:
      ValueError: if the model is not causal.
    """
    config.check_causal()
    is_tied = config.get_flag("tie_word_embeddings", is_tied_by_default)
    return Architecture(
        stem=stem,
        blocks=tuple(blocks),
        head=head,
        prefix="model.",
        block_prefix="layers.{}.",
        stem_names={"embed_tokens": "embed_tokens"},
        head_names={"norm": "norm", "lm_head": "embed_tokens" if is_tied else "/lm_head"},
        unused_tensors=("layers.{}.self_attn.rotary_emb.inv_freq", "rotary_emb.inv_freq"),
        options_per_block=options_per_block,
        is_tied_by_default=is_tied_by_default,
        vocab_size=config.require("vocab_size"),
    )


def make_norm(
    config: Config, default_epsilon: float = 1e-6, offset: float | None = None
) -> RMSNorm:
    """Make the norm of a model from its config.

    Args:
      config: the options of the model.
      default_epsilon: the constant that is added to the mean square if the config has none.
      offset: constant added to the weights; see `RMSNorm`.

    Raises:
      ValueError: if the constant is not a number.
    """
    return RMSNorm(config.get_number("rms_norm_eps", default_epsilon), offset)
