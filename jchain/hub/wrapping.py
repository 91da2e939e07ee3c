"""Modules that wrap the blocks of a model, for pinned blocks and for a choice of embeddings.

Pinned blocks are in every chain, as part of the stem (`Entry`) or of the head (`Exit`).

If a bank has several models whose embeddings differ, the stem (`Entries`) concatenates the
embeddings of all M models. Layers then read `[..., F * M]`. A block (`Within`) changes the first F
features, which begin as the embeddings of the first model, and passes the others on unchanged. A
`Restart` layer replaces the first F features with the embeddings of another model.

Saved banks contain the names of these classes and of their fields, so neither may be renamed.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from jchain._typing import Array, Float, PyTree, Shaped
from jchain.bank import Bank
from jchain.modules import OutputMap


class Entry(nn.Module):
    """The embeddings of a model, followed by the pinned blocks that start every chain.

    Elsewhere, an entry is any layer or head of a bank.

    Attributes:
      stem: the embeddings.
      blocks: pinned blocks, applied in order.
      source: name of the model.
    """

    stem: nn.Module
    blocks: tuple[nn.Module, ...]
    source: str

    def __call__(self, x: Shaped[Array, "..."]) -> Float[Array, "*B F"]:
        hidden = self.stem(x)
        for block in self.blocks:
            hidden = block(hidden)
        return hidden


class Entries(nn.Module):
    """The embeddings of the same input in several models, concatenated along the last axis.

    Attributes:
      entries: the embeddings and pinned first blocks of each model.
    """

    entries: tuple[Entry, ...]

    def __call__(self, x: Shaped[Array, "..."]) -> Float[Array, "*B G"]:
        return jnp.concatenate([entry(x) for entry in self.entries], axis=-1)


class Within(nn.Module):
    """A block that changes the first features and passes the others on unchanged.

    The other features are the embeddings of the other models, which a later `Restart` may read.

    Attributes:
      block: the block, which is applied to the first `features` features.
      features: width of the block, F.
    """

    block: nn.Module
    features: int

    def __call__(self, x: Float[Array, "*B G"]) -> Float[Array, "*B G"]:
        return jnp.concatenate(
            [self.block(x[..., : self.features]), x[..., self.features :]], axis=-1
        )

    def scale_branch(self, params: PyTree, factor: float) -> PyTree:
        """Return the params with which what the block adds is multiplied by a factor.

        Args:
          params: the params of this layer.
          factor: the factor.
        """
        return {"block": self.block.scale_branch(params["block"], factor)}


class Restart(nn.Module):
    """A layer that discards the result so far and starts again from another model's embeddings.

    A restart replaces the first `features` features with a sum of the embeddings in the other
    features, weighted by the param `shares [M - 1]`. One share is 1 and the others are 0. The
    choice is a param, so that the restarts of all models share one module and their params stack. A
    restart belongs at the beginning of a chain, because layers before it have no effect.

    Attributes:
      features: width of the embeddings of one model, F.
    """

    features: int

    @nn.compact
    def __call__(self, x: Float[Array, "*B G"]) -> Float[Array, "*B G"]:
        kept = x[..., self.features :]
        others = kept.reshape(*kept.shape[:-1], -1, self.features)
        # The shares select a model and must not be trained.
        shares = jax.lax.stop_gradient(
            self.param("shares", nn.initializers.zeros, others.shape[-2:-1])
        )
        hidden = jnp.sum(others * shares.reshape((1,) * (others.ndim - 2) + (-1, 1)), axis=-2)
        return jnp.concatenate([hidden.astype(x.dtype), kept], axis=-1)

    def project(self, params: PyTree) -> PyTree:
        """Restore the selection after an optimizer step, which may have shrunk it by weight decay.

        Args:
          params: the params of this layer after the step.
        """
        return {"shares": jnp.round(params["shares"])}


class Exit(nn.Module):
    """The pinned blocks that end every chain, followed by the output layer of a model.

    Attributes:
      head: the last norm and the output layer.
      blocks: pinned blocks, applied in order.
      features: width of the blocks, F; they read the first F features.
    """

    head: nn.Module
    blocks: tuple[nn.Module, ...]
    features: int

    def __call__(self, x: Float[Array, "*B G"]) -> Float[Array, "..."]:
        return self.head(self._apply_blocks(x))

    def output_map(self, x: Float[Array, "*B G"]) -> OutputMap | None:
        """Return the output layer and its input if the head has them, for losses that need no more.

        Args:
          x: the activations.
        """
        if not hasattr(self.head, "output_map"):
            return None
        return self.head.output_map(self._apply_blocks(x))

    def _apply_blocks(self, x: Float[Array, "*B G"]) -> Float[Array, "*B F"]:
        hidden = x[..., : self.features]
        for block in self.blocks:
            hidden = block(hidden)
        return hidden


def find_restarts(bank: Bank) -> set[int]:
    """Find the tokens of the layers that are embeddings.

    Args:
      bank: a bank of pretrained blocks.
    """
    return {
        token
        for group in bank.layers
        if isinstance(group.module, Restart)
        for token in group.tokens
    }
