"""Larger changes of a chain than single edits, for searches that take a neighbor at a time.

- *edits*: the neighbors of `jchain.env.neighbors`: a layer is swapped, inserted, or deleted, or the
  head is swapped.
- *switches*: a layer is dropped, and one that the chain lacks is put at the place where its model
  has it. This is the level switch of EvoPress (Sieberling et al. 2024, arXiv:2410.14649).
- *runs*: a run of two or more layers is dropped, as in ShortGPT (Men et al. 2024,
  arXiv:2403.03853), or repeated, as in SOLAR (Kim et al. 2023, arXiv:2312.15166).
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from jchain import env
from jchain._typing import Array, Bool, Int, Key
from jchain.chain import PADDING
from jchain.problem import Problem
from jchain.stages.edits import exchange
from jchain.stages.spaces import read_positions
from jchain.stages.table import StageTable

# `read_kinds` checks the kinds itself.
if TYPE_CHECKING:
    MoveKind: TypeAlias = Literal["edits", "switches", "runs"]
else:
    MoveKind: TypeAlias = str
EDITS: tuple[MoveKind, ...] = ("edits",)
KINDS: tuple[MoveKind, ...] = ("edits", "switches", "runs")


def read_kinds(given: Sequence[str]) -> tuple[MoveKind, ...]:
    """Check kinds of moves, and return them in the order of `KINDS`.

    Args:
      given: the kinds.

    Raises:
      ValueError: if there is none, one is not known, or one is there twice.
    """
    is_list = not isinstance(given, str)
    if not is_list or not given or set(given) - set(KINDS) or len(set(given)) < len(given):
        got = list(given) if is_list else given
        raise ValueError(f"expected moves to be some of {', '.join(KINDS)}, got {got}")
    return tuple(kind for kind in KINDS if kind in given)


def check_kinds(problem: Problem, kinds: Sequence[MoveKind]) -> None:
    """Check that the layers of a problem have the positions that switches need.

    Args:
      problem: the problem to search.
      kinds: the kinds of moves.

    Raises:
      ValueError: if there are switches, and a layer has no position or several.
    """
    if "switches" in kinds and problem.space.stages is None:
        _make_table(problem)


def list_moves(
    problem: Problem, chain: Int[Array, "L"], kinds: Sequence[MoveKind]
) -> list[tuple[Int[Array, "M L"], Bool[Array, "M"]]]:
    """List the chains that moves of each kind make from a chain.

    Args:
      problem: the problem, which defines the space and the limit of the cost.
      chain: int32 `[L]`; the tokens of the chain.
      kinds: the kinds of moves.

    Returns:
      For each kind, the chains `[M, L]`, and a mask of the rows that may be used. A chain may
      appear twice if layers repeat in it.
    """
    found = []
    for kind in kinds:
        if kind == "edits":
            found.append(env.neighbors(problem, chain))
            continue
        rows, is_move = (_list_switches if kind == "switches" else _list_runs)(problem, chain)
        is_over = problem.exceeds_limit(problem.chain_cost(rows))
        found.append((rows, is_move & problem.space.contains(rows) & ~is_over))
    return found


def join_moves(
    problem: Problem, chain: Int[Array, "L"], kinds: Sequence[MoveKind]
) -> tuple[Int[Array, "M L"], Bool[Array, "M"]]:
    """List the chains that moves of all kinds make from a chain, in one array.

    Args:
      problem: the problem, which defines the space and the limit of the cost.
      chain: int32 `[L]`; the tokens of the chain.
      kinds: the kinds of moves.
    """
    rows, masks = zip(*list_moves(problem, chain, kinds), strict=True)
    return jnp.concatenate(rows), jnp.concatenate(masks)


def draw_move(
    key: Key[Array, ""], problem: Problem, chain: Int[Array, "L"], kinds: Sequence[MoveKind]
) -> Int[Array, "L"]:
    """Draw a kind of move, among those that can be made, and then a move of this kind.

    Args:
      key: the PRNG key; consumed by this call.
      problem: the problem, which defines the space and the limit of the cost.
      chain: int32 `[L]`; the tokens of the chain, which is returned if no move can be made.
      kinds: the kinds of moves.
    """
    found = list_moves(problem, chain, kinds)
    rows, masks = (jnp.concatenate(parts) for parts in zip(*found, strict=True))
    # Each kind has the same weight, however many moves it has.
    weights = [jnp.where(mask, -jnp.log(jnp.maximum(mask.sum(), 1)), -jnp.inf) for _, mask in found]
    row = jax.random.categorical(key, jnp.concatenate(weights).astype(jnp.float32))
    return jnp.where(masks.any(), rows[row], chain)


def _make_table(problem: Problem) -> StageTable:
    """Make the table of the positions of the layers in their models."""
    bank = problem.bank
    positions = read_positions("subset", bank.parents, bank.num_layers, bank.names)
    return StageTable.from_positions(positions or (), bank.num_heads)


def _list_switches(
    problem: Problem, chain: Int[Array, "L"]
) -> tuple[Int[Array, "M L"], Bool[Array, "M"]]:
    """Drop each layer, and put each layer that the chain lacks at its place."""
    num_layers, max_layers = problem.bank.num_layers, problem.max_layers
    if problem.space.stages is not None:  # the edits of a space of positions are switches
        return jnp.zeros((0, max_layers + 1), chain.dtype), jnp.zeros(0, bool)
    at, token = (
        grid.reshape(-1, 1) for grid in jnp.meshgrid(jnp.arange(max_layers), jnp.arange(num_layers))
    )
    rows, place = exchange(_make_table(problem), chain, at, token)
    is_used = (chain[None] == jnp.arange(num_layers)[:, None]).any(axis=1)
    is_layer = at[:, 0] < problem.space.count_layers(chain)
    # At the same slot, this is a swap, which is one of the edits.
    is_move = is_layer & ~is_used[token[:, 0]] & (place != at)[:, 0]
    return rows.astype(chain.dtype), is_move


def _list_runs(
    problem: Problem, chain: Int[Array, "L"]
) -> tuple[Int[Array, "M L"], Bool[Array, "M"]]:
    """Drop and repeat each run of at least two layers."""
    length, slots = problem.space.count_layers(chain), jnp.arange(chain.shape[0])[None]
    pairs = np.array([(i, j) for j in range(2, problem.max_layers + 1) for i in range(j - 1)], int)
    start, end = (jnp.asarray(ends) for ends in pairs.reshape(-1, 2).T[:, :, None])
    padded = jnp.append(chain, PADDING)
    last = chain.shape[0]
    # A dropped run is skipped; after a repeated one, the chain goes on from the run's start.
    after_drop = jnp.where(slots < start, slots, slots + end - start)
    after_repeat = jnp.where(slots < end, slots, slots - end + start)
    rows = padded[jnp.minimum(jnp.concatenate([after_drop, after_repeat]), last)]
    size = (end - start)[:, 0]
    is_run = end[:, 0] <= length
    is_drop = is_run & (length - size >= problem.min_layers)
    is_repeat = is_run & (length + size <= problem.max_layers)
    return rows.astype(chain.dtype), jnp.concatenate([is_drop, is_repeat])
