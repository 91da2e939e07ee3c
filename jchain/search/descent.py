"""What descents share: where they start, which layers they look at, and whether they move, go on or start again."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jchain import env
from jchain._typing import Array, Bool, Float, Int, Key
from jchain.chain import PADDING
from jchain.engine.layer_calls import apply_token
from jchain.problem import Problem


class Move(NamedTuple):
    """What a batch of chains led to."""

    best: Int[Array, ""]  # its best chain
    does_move: Bool[Array, ""]  # that is better than the one before
    is_stuck: Bool[Array, ""]  # nothing is left to wait for
    chain: Int[Array, "L"]  # where the descent stands
    loss: Float[Array, ""]
    num_failed: Int[Array, ""]  # batches without a better chain; 0 of a descent that starts again


def decide(
    chain: Int[Array, "L"],
    own_loss: Float[Array, ""],
    chains: Int[Array, "P L"],
    loss: Float[Array, "P"],
    is_move: Bool[Array, "P"],
    num_failed: Int[Array, ""],
    patience: int,
    has_more: Bool[Array, ""],
) -> Move:
    """To the best chain of a batch where it is better; stuck after so many batches that are not, or with none left.

    Args:
      chain: where the descent stands.
      own_loss: its loss.
      chains: what was evaluated.
      loss: their losses.
      is_move: which of them are others.
      num_failed: batches before this one without a better chain.
      patience: how many are waited for.
      has_more: whether something is left to be evaluated.
    """
    best = jnp.argmin(jnp.where(is_move, loss, jnp.inf))
    does_move = is_move[best] & (loss[best] < own_loss)
    num_failed = jnp.where(does_move, 0, num_failed + 1)
    is_stuck = ~does_move & ((num_failed >= patience) | ~has_more)
    return Move(
        best,
        does_move,
        is_stuck,
        jnp.where(does_move, chains[best], chain),
        jnp.where(does_move, loss[best], own_loss),
        jnp.where(is_stuck, 0, num_failed).astype(jnp.int32),
    )


def share_members(problem: Problem, num_candidates: int) -> list[int]:
    """How many layers of each group make up so many: each its share, and at least one."""
    sizes = [len(group.tokens) for group in problem.bank.layers]
    return [min(size, max(1, num_candidates * size // sum(sizes))) for size in sizes]


def draw_members(key: Key[Array, ""], problem: Problem, shares: list[int]) -> tuple[Array, ...]:
    """Places in each group of so many of its layers."""

    def draw(key: Array, size: int, share: int) -> Array:
        places = jnp.arange(size)
        return places if share == size else jax.random.choice(key, places, (share,), replace=False)

    groups = problem.bank.layers
    keys = jax.random.split(key, len(groups))
    return tuple(
        draw(k, len(group.tokens), share)
        for k, group, share in zip(keys, groups, shares, strict=True)
    )


def draw_start(key: Key[Array, ""], problem: Problem) -> Int[Array, "L"]:
    """The best of all stops of a chain of random layers, from `min_layers` on, by all heads, for a layer call each."""
    bank, slots = problem.bank, jnp.arange(problem.max_layers + 1)
    tokens = jax.random.randint(key, slots.shape, 0, bank.num_layers).at[-1].set(PADDING)

    def extend(hidden: Array, token: Array) -> tuple[Array, Array]:
        made = apply_token(bank.layers, token, hidden)
        return made, env.head_losses(problem, made)

    hidden = bank.embed(problem.data.x)
    losses = jax.lax.scan(extend, hidden, tokens[:-1])[1]
    losses = jnp.concatenate([env.head_losses(problem, hidden)[None], losses])
    prefixes = jnp.where(slots[None] < slots[:, None], tokens[None], PADDING)
    losses = (losses + problem.layer_penalty(prefixes)[:, None])[problem.min_layers :]
    stop, head = jnp.divmod(
        jnp.argmin(jnp.where(jnp.isfinite(losses), losses, jnp.inf)), bank.num_heads
    )
    length = problem.min_layers + stop
    return prefixes[length].at[length].set(bank.num_layers + head).astype(jnp.int32)
