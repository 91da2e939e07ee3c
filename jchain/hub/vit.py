"""ViT for image classification (Dosovitskiy et al. 2021, arXiv:2010.11929): patches, a class token, layer norms before each part."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from jchain._typing import Array, Float
from jchain.hub.architecture import Architecture
from jchain.hub.config import Config
from jchain.hub.modules import ACTIVATIONS, LayerNorm, Linear, attend, check_activation, split_heads

MODEL_TYPES = ("vit",)


class Projection(nn.Module):
    """A convolution whose stride is the size of its kernel, `[features, channels, patch, patch]`."""

    features: int
    patch: int

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w F"]:
        shape = (self.features, x.shape[-1], self.patch, self.patch)
        weight = self.param("weight", nn.initializers.normal(0.02), shape)
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        strides, order = (self.patch, self.patch), ("NHWC", "OIHW", "NHWC")
        return jax.lax.conv_general_dilated(
            x, weight, strides, "VALID", dimension_numbers=order
        ) + bias.reshape(1, 1, 1, -1)


class Patches(nn.Module):
    """Patches as tokens."""

    features: int
    patch: int

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B T F"]:
        return Projection(self.features, self.patch, name="projection")(x).reshape(
            x.shape[0], -1, self.features
        )


class Stem(nn.Module):
    """A class token and patches, with positions added. Images are `[B, H, W, C]`, standardized as the model was trained."""

    size: tuple[int, int]
    channels: int
    patch: int
    features: int

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B T F"]:
        expected = (*self.size, self.channels)
        if x.shape[1:] != expected:
            raise ValueError(f"expected images of shape {list(expected)}, got {list(x.shape[1:])}")
        num = 1 + (self.size[0] // self.patch) * (self.size[1] // self.patch)
        token = self.param("cls_token", nn.initializers.zeros, (1, 1, self.features))
        positions = self.param(
            "position_embeddings", nn.initializers.normal(0.02), (1, num, self.features)
        )
        patches = Patches(self.features, self.patch, name="patch_embeddings")(x.astype(token.dtype))
        first = jnp.broadcast_to(token, (x.shape[0], 1, self.features))
        return jnp.concatenate([first, patches], axis=1) + positions


class Within(nn.Module):
    """An affine map that the file calls `dense` within this one's name."""

    features: int

    @nn.compact
    def __call__(self, x: Float[Array, "B T F"]) -> Float[Array, "B T G"]:
        return Linear(self.features, name="dense")(x)


class SelfAttention(nn.Module):
    """Attention of all tokens to all, without the output's map."""

    num_heads: int
    use_bias: bool

    @nn.compact
    def __call__(self, x: Float[Array, "B T F"]) -> Float[Array, "B T F"]:
        query, key, value = (
            split_heads(Linear(x.shape[-1], self.use_bias, name=name)(x), self.num_heads)
            for name in ("query", "key", "value")
        )
        return attend(query, key, value, is_causal=False)


class Attention(nn.Module):
    """Attention with the output's map."""

    num_heads: int
    use_bias: bool

    @nn.compact
    def __call__(self, x: Float[Array, "B T F"]) -> Float[Array, "B T F"]:
        mixed = SelfAttention(self.num_heads, self.use_bias, name="attention")(x)
        return Within(x.shape[-1], name="output")(mixed)


class Block(nn.Module):
    """A block of ViT.

    Attributes:
      num_heads: of attention.
      hidden: width of the MLP.
      activation: its name.
      epsilon: of the norms.
      use_bias: of queries, keys and values.
    """

    num_heads: int
    hidden: int
    activation: str
    epsilon: float
    use_bias: bool = True

    @nn.compact
    def __call__(self, x: Float[Array, "B T F"]) -> Float[Array, "B T F"]:
        attention = Attention(self.num_heads, self.use_bias, name="attention")
        x = x + attention(LayerNorm(self.epsilon, name="layernorm_before")(x))
        hidden = Within(self.hidden, name="intermediate")(
            LayerNorm(self.epsilon, name="layernorm_after")(x)
        )
        return x + Within(x.shape[-1], name="output")(ACTIVATIONS[self.activation](hidden))


class Head(nn.Module):
    """The last norm, and logits of the class token."""

    num_classes: int
    epsilon: float

    @nn.compact
    def __call__(self, x: Float[Array, "B T F"]) -> Float[Array, "B C"]:
        x = LayerNorm(self.epsilon, name="layernorm")(x)
        return Linear(self.num_classes, name="classifier")(x[:, 0])


def describe(config: Config) -> Architecture:
    """The modules of a config, and where their params stand in the file."""
    features, epsilon = config.require("hidden_size"), config.get("layer_norm_eps", 1e-12)
    size, patch, channels = (
        config.require("image_size"),
        config.require("patch_size"),
        config.get("num_channels", 3),
    )
    size = tuple(size) if isinstance(size, list) else (size, size)
    if isinstance(patch, list):
        if len(set(patch)) != 1:
            raise config.refuse("patch_size", patch, "squares")
        patch = patch[0]
    for key in (
        "pooler_act",
        "pooler_output_size",
        "num_labels",
    ):  # the classifier reads the class token as it is
        config.get(key, None)
    labels = config.get("id2label", None)
    block = Block(
        num_heads=config.require("num_attention_heads"),
        hidden=config.require("intermediate_size"),
        activation=check_activation(config, "hidden_act", "gelu"),
        epsilon=epsilon,
        use_bias=config.get("qkv_bias", True),
    )
    return Architecture(
        stem=Stem(size, channels, patch, features),
        blocks=(block,) * config.require("num_hidden_layers"),
        head=Head(len(labels) if labels else config.get("num_labels", 2), epsilon),
        base="vit.",
        block="encoder.layer.{}.",
        stem_places={
            "cls_token": "embeddings.cls_token",
            "position_embeddings": "embeddings.position_embeddings",
            "patch_embeddings": "embeddings.patch_embeddings",
        },
        head_places={"layernorm": "layernorm", "classifier": "/classifier"},
        example=(1, *size, channels),
        example_dtype=jnp.float32,
    )
