"""The ViT family for image classification (Dosovitskiy et al. 2021, arXiv:2010.11929).

These models split an image into patches, prepend a class token, and have layer norms before
attention and MLP. `jchain.hub.architecture` explains how to add a family.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from jchain._typing import Array, Float, PyTree
from jchain.hub.architecture import Architecture
from jchain.hub.attention import attend, split_heads
from jchain.hub.config import Config
from jchain.hub.modules import ACTIVATIONS, LayerNorm, Linear, check_activation
from jchain.pytree import multiply_children

MODEL_TYPES = ("vit",)


class Projection(nn.Module):
    """A convolution whose kernel `[features, channels, patch, patch]` is as large as its stride.

    Attributes:
      features: number of output channels.
      patch: height and width of the kernel.
    """

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
    """A sequence of embeddings of the patches of an image.

    Attributes:
      features: width of the embeddings.
      patch: height and width of a patch.
    """

    features: int
    patch: int

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B T F"]:
        return Projection(self.features, self.patch, name="projection")(x).reshape(
            x.shape[0], -1, self.features
        )


class Stem(nn.Module):
    """A class token followed by patch embeddings, with position embeddings added to all of them.

    Images are `[B, H, W, C]` and must be standardized as they were for the training of the model.

    Attributes:
      size: height and width of an image.
      channels: number of channels of an image.
      patch: height and width of a patch.
      features: width of the embeddings.
    """

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
    """An affine map whose params are one level deeper in the file, under `dense`.

    Attributes:
      features: width of the output.
    """

    features: int

    @nn.compact
    def __call__(self, x: Float[Array, "B T F"]) -> Float[Array, "B T G"]:
        return Linear(self.features, name="dense")(x)


class SelfAttention(nn.Module):
    """Self-attention between all tokens, without the output map.

    Attributes:
      num_heads: number of attention heads.
      use_bias: whether the maps to queries, keys, and values have biases.
      head_size: number of features of each head; None to divide the width of the block.
    """

    num_heads: int
    use_bias: bool
    head_size: int | None

    @nn.compact
    def __call__(self, x: Float[Array, "B T F"]) -> Float[Array, "B T F"]:
        width = x.shape[-1] if self.head_size is None else self.num_heads * self.head_size
        query, key, value = (
            split_heads(Linear(width, self.use_bias, name=name)(x), self.num_heads)
            for name in ("query", "key", "value")
        )
        return attend(query, key, value, is_causal=False)


class Attention(nn.Module):
    """Self-attention followed by the output map.

    Attributes:
      num_heads: number of attention heads.
      use_bias: whether the maps to queries, keys, and values have biases.
      head_size: number of features of each head; None to divide the width of the block.
    """

    num_heads: int
    use_bias: bool
    head_size: int | None

    @nn.compact
    def __call__(self, x: Float[Array, "B T F"]) -> Float[Array, "B T F"]:
        attention = SelfAttention(self.num_heads, self.use_bias, self.head_size, name="attention")
        return Within(x.shape[-1], name="output")(attention(x))


class Block(nn.Module):
    """A block of ViT.

    Attributes:
      num_heads: number of attention heads.
      hidden: width of the MLP.
      activation: name of the MLP's activation.
      epsilon: constant added to the variance in the layer norms.
      use_bias: whether the maps to queries, keys, and values have biases.
      head_size: number of features of each head; None to divide the width of the block.
      has_attention: whether the block has attention; without it, it is the MLP as a layer.
      has_mlp: whether the block has the MLP.
    """

    num_heads: int
    hidden: int
    activation: str
    epsilon: float
    use_bias: bool = True
    head_size: int | None = None
    has_attention: bool = True
    has_mlp: bool = True

    @nn.compact
    def __call__(self, x: Float[Array, "B T F"]) -> Float[Array, "B T F"]:
        x = x + self.attention_branch(x) if self.has_attention else x
        return x + self.mlp_branch(x) if self.has_mlp else x

    def attention_branch(self, x: Float[Array, "B T F"]) -> Float[Array, "B T F"]:
        """Compute what attention adds to the activations.

        Args:
          x: the activations.
        """
        attention = Attention(self.num_heads, self.use_bias, self.head_size, name="attention")
        return attention(LayerNorm(self.epsilon, name="layernorm_before")(x))

    def mlp_branch(self, x: Float[Array, "B T F"]) -> Float[Array, "B T F"]:
        """Compute what the MLP adds to the activations.

        Args:
          x: the activations.
        """
        hidden = Within(self.hidden, name="intermediate")(
            LayerNorm(self.epsilon, name="layernorm_after")(x)
        )
        return Within(x.shape[-1], name="output")(ACTIVATIONS[self.activation](hidden))

    def scale_branch(self, params: PyTree, factor: float) -> PyTree:
        """Return the params with which what attention and MLP add is multiplied by a factor.

        Args:
          params: the params of this layer.
          factor: the factor.
        """
        return multiply_children(params, factor, "attention/output", "output")


class Head(nn.Module):
    """The last norm, and the output layer, which reads the class token.

    Attributes:
      num_classes: number of logits.
      epsilon: constant added to the variance in the layer norm.
    """

    num_classes: int
    epsilon: float

    @nn.compact
    def __call__(self, x: Float[Array, "B T F"]) -> Float[Array, "B C"]:
        x = LayerNorm(self.epsilon, name="layernorm")(x)
        return Linear(self.num_classes, name="classifier")(x[:, 0])


def make_architecture(config: Config) -> Architecture:
    """Make the architecture that a config describes.

    Args:
      config: the options of the model; their `model_type` is one of `MODEL_TYPES`.

    Raises:
      ValueError: if an option is missing or has a value that is not supported.
    """
    features, epsilon = config.require("hidden_size"), config.get("layer_norm_eps", 1e-12)
    size, patch, channels = (
        config.require("image_size"),
        config.require("patch_size"),
        config.get("num_channels", 3),
    )
    size = tuple(size) if isinstance(size, list) else (size, size)
    if isinstance(patch, list):
        if len(set(patch)) != 1:
            raise config.reject("patch_size", patch, "square patches")
        patch = patch[0]
    labels = config.get("id2label", None)
    block = Block(
        num_heads=config.require("num_attention_heads"),
        hidden=config.require("intermediate_size"),
        activation=check_activation(config, "hidden_act", "gelu"),
        epsilon=epsilon,
        use_bias=config.get_flag("qkv_bias", True),
        head_size=config.get("head_dim", None),
    )
    return Architecture(
        stem=Stem(size, channels, patch, features),
        blocks=(block,) * config.require_depth("num_hidden_layers"),
        head=Head(len(labels) if labels else config.get("num_labels", 2), epsilon),
        prefix="vit.",
        block_prefix="encoder.layer.{}.",
        stem_names={
            "cls_token": "embeddings.cls_token",
            "position_embeddings": "embeddings.position_embeddings",
            "patch_embeddings": "embeddings.patch_embeddings",
        },
        head_names={"layernorm": "layernorm", "classifier": "/classifier"},
        example_shape=(1, *size, channels),
        example_dtype=jnp.float32,
    )
