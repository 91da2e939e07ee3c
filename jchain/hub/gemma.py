"""The Gemma family: Gemma 1, Gemma 2, and the text models of Gemma 3.

Embeddings are scaled, the weights of norms are offset by 1, and from Gemma 2 on there are norms
after attention and the MLP too. Some blocks have windows; in Gemma 3, these rotate positions by
other frequencies. `jchain.hub.architecture` explains how to add a family.
"""

import flax.linen as nn
import jax.numpy as jnp

from jchain._typing import Array, Float, Int
from jchain.hub import decoder
from jchain.hub.architecture import Architecture
from jchain.hub.attention import RotaryAttention
from jchain.hub.config import Config
from jchain.hub.decoder import ALL_NORMS, FULL, PRE_NORMS, SLIDING
from jchain.hub.modules import Embedding, GatedMLP, RMSNorm, check_activation
from jchain.hub.rotary import Rotary, compute_rotary, read_rope_options

MODEL_TYPES = ("gemma", "gemma2", "gemma3_text")
_BASES = {FULL: ("rope_theta", 1e6), SLIDING: ("rope_local_base_freq", 1e4)}


class Stem(nn.Module):
    """Token embeddings, multiplied by the root of their width, which is rounded to their dtype.

    Attributes:
      vocabulary: number of tokens in the vocabulary.
      features: width of the embeddings.
    """

    vocabulary: int
    features: int

    @nn.compact
    def __call__(self, ids: Int[Array, "*B T"]) -> Float[Array, "*B T F"]:
        embeddings = Embedding(self.vocabulary, self.features, name="embed_tokens")(ids)
        return embeddings * jnp.asarray(self.features**0.5, embeddings.dtype)


class Block(decoder.Block):
    """A block of Gemma."""


class Head(decoder.Head):
    """The last norm and the output layer."""


class Attention(RotaryAttention):
    """Causal self-attention whose queries and keys are normalized in Gemma 3.

    Attributes:
      norm: the norm of queries and keys, which is cloned; None if they are not normalized.
    """

    norm: nn.Module | None = None

    def normalize(self, x: Float[Array, "*B T N H"], name: str) -> Float[Array, "*B T N H"]:
        return x if self.norm is None else self.norm.clone(parent=self, name=name)(x)


def make_architecture(config: Config) -> Architecture:
    """Make the architecture that a config describes.

    Args:
      config: the options of the model; their `model_type` is one of `MODEL_TYPES`.

    Raises:
      ValueError: if an option is missing or has a value that is not supported.
    """
    kind = config.require("model_type")
    config.expect("use_bidirectional_attention", None, False)
    norm = decoder.make_norm(config, offset=1.0)
    types, rotary = _read_types(config, kind)
    window = decoder.read_window(config, 4096) if SLIDING in types else None
    if SLIDING in types and window is None:
        raise config.reject("sliding_window", None, "a number of positions")
    blocks = {
        name: _make_block(config, norm, rotary[name], window if name == SLIDING else None)
        for name in set(types)
    }
    vocabulary, features = config.require("vocab_size"), config.require("hidden_size")
    softcap = None if kind == "gemma" else _read_softcap(config, "final_logit_softcapping", kind)
    return decoder.make_decoder(
        config,
        Stem(vocabulary, features),
        [blocks[name] for name in types],
        Head(vocabulary, norm, softcap=softcap),
        is_tied_by_default=True,
        options_per_block={} if kind == "gemma" else {"layer_types": types},
    )


def _make_block(config: Config, norm: RMSNorm, rotary: Rotary, window: int | None) -> Block:
    kind = config.require("model_type")
    scale = softcap = None
    if kind != "gemma":
        scale = config.get_number("query_pre_attn_scalar", 256) ** -0.5
    if kind == "gemma2":
        softcap = _read_softcap(config, "attn_logit_softcapping", kind)
    key = "hidden_act" if kind == "gemma" else "hidden_activation"
    activation = check_activation(config, key, "gelu_pytorch_tanh")
    if kind == "gemma" and activation == "gelu":  # what the first files say, but do not mean
        activation = "gelu_pytorch_tanh"
    has_bias = config.get_flag("attention_bias", False)
    return Block(
        self_attn=Attention(
            *decoder.read_heads(config, default_size=256),
            *rotary,
            window=window,
            use_bias=has_bias,
            use_output_bias=has_bias,
            scale=scale,
            softcap=softcap,
            norm=norm if kind == "gemma3_text" else None,
        ),
        mlp=GatedMLP(config.require("intermediate_size"), activation, use_bias=False),
        norm=norm,
        norms=PRE_NORMS if kind == "gemma" else ALL_NORMS,
    )


def _read_softcap(config: Config, key: str, kind: str) -> float | None:
    defaults = {"final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0}
    softcap = config.get(key, defaults[key] if kind == "gemma2" else None)
    if softcap is None:
        return None
    if config.get_number(key, softcap) <= 0:
        raise config.reject(key, softcap, "a positive number or null")
    return float(softcap)


def _read_types(config: Config, kind: str) -> tuple[tuple[str, ...], dict[str, Rotary]]:
    """Read the type of each block, and the rotary positions of each type."""
    depth, heads = config.require_depth("num_hidden_layers"), decoder.read_heads(config, 256)
    if kind == "gemma3_text":
        period = config.get("sliding_window_pattern", 6)
        types = [FULL if (i + 1) % period == 0 else SLIDING for i in range(depth)]
        found = decoder.read_layer_types(config, types)
        ropes = {name: _read_rope(config, name) for name in set(found)}
    else:
        types = [SLIDING if kind == "gemma2" and i % 2 == 0 else FULL for i in range(depth)]
        found = tuple(types) if kind == "gemma" else decoder.read_layer_types(config, types)
        ropes = dict.fromkeys(found, read_rope_options(config))
    # A head size that is null would be divided from the width, which transformers does not do.
    return found, {
        name: compute_rotary(config, rope, heads.head_size) for name, rope in ropes.items()
    }


def _read_rope(config: Config, name: str) -> Config:
    """Read the options of rotary positions of one type of blocks of Gemma 3.

    As in transformers, `rope_scaling` changes the blocks without a window only, and
    `rope_parameters` has options for each type.
    """
    both = config.get("rope_parameters", None) or {}
    scaling = (config.get("rope_scaling", None) or {}) if name == FULL else {}
    own = (both.get(name) or {}) if isinstance(both, dict) else both
    for key, given in (("rope_parameters", own), ("rope_scaling", scaling)):
        if not isinstance(given, dict):
            raise config.reject(key, given, "an object")
    key, base = _BASES[name]
    length = config.get("max_position_embeddings", None)
    options = {
        "rope_theta": config.options.get(key, base),
        "original_max_position_embeddings": length,
        **own,
        **scaling,
        "truncate": both.get("truncate", True),
    }
    return config.inner(f"rotary positions of {name}", options)
