"""The single edits of a chain: swaps, insertions, and deletions of a layer, and swaps of the head.

If the positions of layers must increase (`StageTable.from_positions`), a layer has one place in a
chain, so a layer can be swapped for any layer whose position is free: the new one is put at its
place. This is the level switch of EvoPress (Sieberling et al. 2024, arXiv:2410.14649), which keeps
the number of layers.
"""

from typing import NamedTuple

import jax.numpy as jnp

from jchain._typing import Array, Bool, Int
from jchain.stages.table import StageTable

_PADDING = -1


class Sizes(NamedTuple):
    """The sizes of a space of chains; see `jchain.chain.ChainSpace`."""

    num_layers: int
    num_heads: int
    max_layers: int
    min_layers: int


def list_edits(
    chain: Int[Array, "L"], length: Int[Array, ""], sizes: Sizes, stages: StageTable | None
) -> tuple[Int[Array, "M L"], Bool[Array, "M"]]:
    """List every chain that is one edit away from a chain, as `ChainSpace.neighbors` does.

    Args:
      chain: int32 `[L]`; the tokens of the chain.
      length: the number of its layers.
      sizes: the sizes of the space.
      stages: the stages, or positions, that chains must follow; None if there are none.

    Returns:
      The chains, `[M, L]`, and a mask, `[M]`, of those that belong to the space and are new.
    """
    num_layers, num_heads, max_layers, min_layers = sizes
    slots, row = jnp.arange(max_layers + 1)[None], chain[None]
    at, token = (
        grid.reshape(-1, 1) for grid in jnp.meshgrid(jnp.arange(max_layers), jnp.arange(num_layers))
    )
    earlier = jnp.roll(chain, 1)

    if stages is not None and stages.is_ordered:
        swaps, _ = exchange(stages, chain, at, token)
    else:
        swaps = jnp.where(slots == at, token, row)
    is_swap = (at[:, 0] < length) & (token[:, 0] != chain[at[:, 0]])

    head = num_layers + jnp.arange(num_heads)[:, None]
    head_swaps = jnp.where(slots == length, head, row)
    is_head_swap = head[:, 0] != chain[length]

    inserts = jnp.where(slots < at, row, jnp.where(slots == at, token, earlier[None]))
    # Inserting or deleting a layer in a run of equal layers gives the same chain at each slot of
    # the run, so only the first one is kept.
    is_repeat = (at[:, 0] > 0) & (token[:, 0] == earlier[at[:, 0]])
    is_insert = (at[:, 0] <= length) & (length < max_layers) & ~is_repeat

    gap = jnp.arange(max_layers)
    later = jnp.roll(chain, -1).at[-1].set(_PADDING)
    deletes = jnp.where(slots < gap[:, None], row, later[None])
    is_repeat = (gap > 0) & (chain[gap] == earlier[gap])
    is_delete = (gap < length) & (length > min_layers) & ~is_repeat

    chains = jnp.concatenate([swaps, head_swaps, inserts, deletes]).astype(chain.dtype)
    is_neighbor = jnp.concatenate([is_swap, is_head_swap, is_insert, is_delete])
    if stages is not None:
        is_neighbor &= stages.is_legal(chains)
    return chains, is_neighbor


def find_places(stages: StageTable, chain: Int[Array, "L"]) -> Int[Array, "N"]:
    """Find the slot at which each layer would be inserted into a chain.

    Args:
      stages: the table of positions, from `StageTable.from_positions`.
      chain: int32 `[L]`; the tokens of the chain.
    """
    num_layers = len(stages.layer_stages)
    positions = jnp.asarray(stages.reads[:num_layers])
    is_layer = (chain >= 0) & (chain < num_layers)
    own = jnp.where(is_layer, positions[jnp.clip(chain, 0, num_layers - 1)], stages.num_stages)
    return jnp.sum(own[None] < positions[:, None], axis=1, dtype=jnp.int32)


def exchange(
    stages: StageTable, chain: Int[Array, "L"], at: Int[Array, "S 1"], token: Int[Array, "S 1"]
) -> tuple[Int[Array, "S L"], Int[Array, "S 1"]]:
    """Take the layer at a slot out of a chain, and put another at its place.

    Args:
      stages: the table of positions, from `StageTable.from_positions`.
      chain: int32 `[L]`; the tokens of the chain.
      at: the slots of the layers to take out, `[S, 1]`.
      token: the layers to put in, `[S, 1]`.

    Returns:
      The chains, `[S, L]`, and the slots of the new layers.
    """
    slots, place = jnp.arange(chain.shape[0])[None], find_places(stages, chain)[token]
    # Without the layer of an earlier slot, the place is one slot earlier.
    place = place - (at < place)
    shorter = jnp.where(slots < at, chain[None], jnp.append(chain[1:], _PADDING)[None])
    longer = jnp.roll(shorter, 1, axis=1)
    return jnp.where(slots < place, shorter, jnp.where(slots == place, token, longer)), place
