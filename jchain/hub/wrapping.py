"""Blocks that every chain has, as part of its embeddings or its output layer, and embeddings that a chain chooses.

Embeddings of several models are side by side in what layers read, `[..., F M]`: the first F numbers are those that blocks work on,
behind them stand the embeddings of all models but the first. A chain begins with the first model's; a `Restart` puts others there.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from jchain._typing import Array, Float, PyTree, Shaped
from jchain.bank import Bank


class Entry(nn.Module):
    """Embeddings and the blocks that every chain begins with.

    Attributes:
      stem: the embeddings.
      blocks: behind them.
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
    """What several models make of the same input, side by side."""

    entries: tuple[Entry, ...]

    def __call__(self, x: Shaped[Array, "..."]) -> Float[Array, "*B G"]:
        return jnp.concatenate([entry(x) for entry in self.entries], axis=-1)


class Within(nn.Module):
    """A block on the first `features` numbers."""

    block: nn.Module
    features: int

    def __call__(self, x: Float[Array, "*B G"]) -> Float[Array, "*B G"]:
        return jnp.concatenate(
            [self.block(x[..., : self.features]), x[..., self.features :]], axis=-1
        )


class Restart(nn.Module):
    """The embeddings of another model in place of all that was computed: their sum by `shares`, one of which is 1."""

    features: int

    @nn.compact
    def __call__(self, x: Float[Array, "*B G"]) -> Float[Array, "*B G"]:
        kept = x[..., self.features :]
        others = kept.reshape(*kept.shape[:-1], -1, self.features)
        # Which model it is, not a weight.
        shares = jax.lax.stop_gradient(
            self.param("shares", nn.initializers.zeros, others.shape[-2:-1])
        )
        hidden = jnp.sum(others * shares.reshape((1,) * (others.ndim - 2) + (-1, 1)), axis=-2)
        return jnp.concatenate([hidden.astype(x.dtype), kept], axis=-1)

    def project(self, params: PyTree) -> PyTree:
        """The same choice after a step of an optimizer, which may have decayed it as a weight."""
        return {"shares": jnp.round(params["shares"])}


def find_restarts(bank: Bank) -> set[int]:
    """The tokens that are embeddings."""
    return {
        token
        for group in bank.layers
        if isinstance(group.module, Restart)
        for token in group.tokens
    }


class Exit(nn.Module):
    """The blocks that every chain ends with, and an output layer, on the first `features` numbers."""

    head: nn.Module
    blocks: tuple[nn.Module, ...]
    features: int

    def __call__(self, x: Float[Array, "*B G"]) -> Float[Array, "..."]:
        hidden = x[..., : self.features]
        for block in self.blocks:
            hidden = block(hidden)
        return self.head(hidden)
