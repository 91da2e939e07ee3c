"""Where a descent starts, and the layers that it looks at: drawn."""

import jax
import jax.numpy as jnp

from jchain import env
from jchain._typing import Array, Int, Key
from jchain.chain import PADDING
from jchain.engine import apply_token
from jchain.problem import Problem


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
    return tuple(draw(k, len(group.tokens), share) for k, group, share in zip(keys, groups, shares, strict=True))


def draw_start(key: Key[Array, ""], problem: Problem) -> Int[Array, "L"]:
    """The best of all stops of a chain of random layers by all heads, for a layer call each."""
    bank, slots = problem.bank, jnp.arange(problem.max_layers + 1)
    tokens = jax.random.randint(key, slots.shape, 0, bank.num_layers).at[-1].set(PADDING)

    def extend(hidden: Array, token: Array) -> tuple[Array, Array]:
        made = apply_token(bank.layers, token, hidden)
        return made, env.stop_losses(problem, made)

    hidden = bank.embed(problem.data.x)
    losses = jax.lax.scan(extend, hidden, tokens[:-1])[1]
    losses = jnp.concatenate([env.stop_losses(problem, hidden)[None], losses])
    prefixes = jnp.where(slots[None] < slots[:, None], tokens[None], PADDING)
    losses += problem.price(prefixes)[:, None]
    length, head = jnp.divmod(jnp.argmin(jnp.where(jnp.isfinite(losses), losses, jnp.inf)), bank.num_heads)
    return prefixes[length].at[length].set(bank.num_layers + head).astype(jnp.int32)
