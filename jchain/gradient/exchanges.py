"""Scores of exchanges, where the positions of layers must rise along a chain."""

import jax.numpy as jnp

from jchain._typing import Array, Float, Int
from jchain.stages.edits import find_places
from jchain.stages.table import StageTable


def score_exchanges(
    stages: StageTable,
    chain: Int[Array, "L"],
    swap: Float[Array, "L N"],
    insert: Float[Array, "L N"],
    delete: Float[Array, "L"],
) -> Float[Array, "L N"]:
    """Score the exchange of each layer of a chain for each layer of the bank.

    If the new layer takes the slot of the old one, this is a swap. Otherwise the score is the sum
    of those of a deletion and of an insertion. An insertion behind a chain of `max_layers` layers
    is not scored, and counts as 0.

    Args:
      stages: the table of positions, from `StageTable.from_positions`.
      chain: int32 `[L]`; the tokens of the chain.
      swap: the scores of swaps within a slot, `[L, N]`.
      insert: the scores of insertions, `[L, N]`, also for a chain of `max_layers` layers.
      delete: the scores of deletions, `[L]`.
    """
    place = find_places(stages, chain)
    own = jnp.take_along_axis(insert, place[None], axis=0)[0]
    own = jnp.where(place == chain.shape[0] - 1, 0.0, own)
    slots = jnp.arange(chain.shape[0])[:, None]
    is_swap = (place[None] == slots) | (place[None] == slots + 1)
    return jnp.where(is_swap, swap, delete[:, None] + own[None])
