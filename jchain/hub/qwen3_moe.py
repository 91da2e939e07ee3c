"""The Qwen3-MoE family: Qwen3 whose MLPs are mixtures of experts.

A block with its router and all its experts is one layer. `jchain.hub.architecture` explains how to
add a family.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from jchain._typing import Array, Float, Key, PyTree
from jchain.hub import decoder
from jchain.hub.architecture import Architecture
from jchain.hub.config import Config
from jchain.hub.llama import Attention
from jchain.hub.modules import ACTIVATIONS, GatedMLP, Linear, check_activation
from jchain.hub.rotary import compute_rotary, read_rope_options

MODEL_TYPES = ("qwen3_moe",)


class Stem(decoder.Stem):
    """Token embeddings."""


class Block(decoder.Block):
    """A block of Qwen3-MoE."""


class Head(decoder.Head):
    """The last norm and the output layer."""


class Experts(nn.Module):
    """Gated MLPs of which each token uses some, with the weights that a router gave it.

    Every expert computes all tokens and is multiplied by a weight that is 0 for most, because the
    numbers of tokens of the experts are not known before. The experts take turns, so that the
    hidden activations of only one are in memory.

    Attributes:
      num: number of experts, E.
      hidden: width of the hidden layer of an expert.
      activation: name of the gates' activation.
    """

    num: int
    hidden: int
    activation: str

    @nn.compact
    def __call__(
        self, x: Float[Array, "*B T F"], weights: Float[Array, "*B T E"]
    ) -> Float[Array, "*B T F"]:
        wide = (self.hidden, x.shape[-1])
        shapes = {"gate_proj": wide, "up_proj": wide, "down_proj": wide[::-1]}

        def init(key: Key[Array, ""]) -> PyTree:
            keys = dict(zip(shapes, jax.random.split(key, len(shapes)), strict=True))
            draw = nn.initializers.normal(0.02)
            return {name: {"weight": draw(keys[name], shapes[name])} for name in shapes}

        # Each expert is one param, a dict with the names of the file.
        experts = [self.param(str(j), init) for j in range(self.num)]
        stacks = [jnp.stack([expert[name]["weight"] for expert in experts]) for name in shapes]

        def add_expert(
            total: Float[Array, "*B T F"], expert: tuple[Float[Array, "..."], ...]
        ) -> tuple[Float[Array, "*B T F"], None]:
            gate, up, down, weight = expert
            hidden = ACTIVATIONS[self.activation](jnp.matmul(x, gate.T)) * jnp.matmul(x, up.T)
            out = jnp.matmul(hidden, down.T) * weight[..., None]
            return total + out.astype(total.dtype), None

        per_expert = jnp.moveaxis(weights, -1, 0).astype(x.dtype)
        start = jnp.zeros(x.shape, jnp.promote_types(x.dtype, jnp.float32))
        return jax.lax.scan(add_expert, start, (*stacks, per_expert))[0].astype(x.dtype)


class MixtureMLP(nn.Module):
    """A mixture of experts (Shazeer et al. 2017, arXiv:1701.06538).

    Attributes:
      num_experts: number of experts.
      num_used: number of experts that each token uses.
      hidden: width of the hidden layer of an expert.
      activation: name of the gates' activation.
      is_normalized: whether the weights of the experts that a token uses add up to 1.
    """

    num_experts: int
    num_used: int
    hidden: int
    activation: str
    is_normalized: bool

    @nn.compact
    def __call__(self, x: Float[Array, "*B T F"]) -> Float[Array, "*B T F"]:
        logits = Linear(self.num_experts, use_bias=False, name="gate")(x)
        shares = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)
        top, chosen = jax.lax.top_k(shares, self.num_used)
        if self.is_normalized:
            top = top / jnp.sum(top, axis=-1, keepdims=True)
        is_chosen = jax.nn.one_hot(chosen, self.num_experts, dtype=top.dtype)
        weights = jnp.sum(is_chosen * top[..., None], axis=-2).astype(x.dtype)
        experts = Experts(self.num_experts, self.hidden, self.activation, name="experts")
        return experts(x, weights)


def make_architecture(config: Config) -> Architecture:
    """Make the architecture that a config describes.

    Args:
      config: the options of the model; their `model_type` is one of `MODEL_TYPES`.

    Raises:
      ValueError: if an option is missing or has a value that is not supported.
    """
    config = config.rename({"num_local_experts": "num_experts"})
    is_dense = _read_dense(config, config.require_depth("num_hidden_layers"))
    norm, vocabulary = decoder.make_norm(config), config.require("vocab_size")
    blocks = {dense: _make_block(config, norm, is_dense=dense) for dense in set(is_dense)}
    architecture = decoder.make_decoder(
        config,
        Stem(vocabulary, config.require("hidden_size")),
        [blocks[dense] for dense in is_dense],
        Head(vocabulary, norm),
    )
    return architecture._replace(
        indices_per_option={"mlp_only_layers": is_dense}, fixed_options={"decoder_sparse_step": 1}
    )


def _read_dense(config: Config, depth: int) -> tuple[bool, ...]:
    """Read which blocks have one MLP instead of experts."""
    listed = config.get("mlp_only_layers", None) or ()
    if not isinstance(listed, list | tuple):
        raise config.reject("mlp_only_layers", listed, "a list of indices")
    step = config.get("decoder_sparse_step", 1)
    if isinstance(step, bool) or not isinstance(step, int) or step < 1:
        raise config.reject("decoder_sparse_step", step, "a number of blocks")
    return tuple(
        i in listed or (i + 1) % step != 0 or config.get("num_experts", 128) in (0, None)
        for i in range(depth)
    )


def _make_block(config: Config, norm: nn.Module, *, is_dense: bool) -> Block:
    heads, has_bias = decoder.read_heads(config), config.get_flag("attention_bias", False)
    is_windowed = config.get_flag("use_sliding_window", False)
    activation = check_activation(config, "hidden_act", "silu")
    attention = Attention(
        *heads,
        *compute_rotary(config, read_rope_options(config), heads.head_size),
        window=decoder.read_window(config, 4096) if is_windowed else None,
        use_bias=has_bias,
        use_output_bias=has_bias,
        norm_epsilon=config.get_number("rms_norm_eps", 1e-6),
    )
    if is_dense:
        hidden = config.require("intermediate_size")
        return Block(attention, GatedMLP(hidden, activation, use_bias=False), norm)
    mlp = MixtureMLP(
        config.get_count("num_experts", 128, "experts"),
        config.get("num_experts_per_tok", 8),
        config.get("moe_intermediate_size", 768),
        activation,
        config.get_flag("norm_topk_prob", False),
    )
    return Block(attention, mlp, norm)
