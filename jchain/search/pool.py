"""The best distinct chains so far, in a fixed number of rows."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jchain._typing import Array, Float, Int
from jchain.chain import PADDING
from jchain.problem import Problem


class Pool(NamedTuple):
    """The best distinct chains so far, best first."""

    chains: Int[Array, "Q L"]  # [Q, L]; an empty row is all -1
    loss: Float[Array, "Q"]  # [Q]; +inf in an empty row


def empty_pool(size: int, problem: Problem) -> Pool:
    """Return a pool without chains.

    Args:
      size: the maximum number of chains, Q.
      problem: the problem whose chains the pool will hold.
    """
    return Pool(
        jnp.full((size, problem.max_layers + 1), PADDING, jnp.int32),
        jnp.full(size, jnp.inf, jnp.float32),
    )


def merge(pool: Pool, chains: Int[Array, "P L"], loss: Float[Array, "P"]) -> Pool:
    """Merge chains into a pool, which keeps the best distinct ones.

    Chains whose loss is not finite are left out.

    Args:
      pool: the best chains so far.
      chains: the chains to add, `[P, L]`.
      loss: the losses of these chains, `[P]`.

    Returns:
      A pool of the same size.
    """
    rows = jnp.concatenate([pool.chains, chains.astype(jnp.int32)])
    losses = jnp.concatenate([pool.loss, loss.astype(pool.loss.dtype)])
    losses = jnp.where(jnp.isfinite(losses), losses, jnp.inf)
    *columns, losses = jax.lax.sort([*rows.T, losses], num_keys=rows.shape[1] + 1)
    rows = jnp.stack(columns, axis=1)
    is_repeat = jnp.append(False, jnp.all(rows[1:] == rows[:-1], axis=1))
    losses = jnp.where(is_repeat, jnp.inf, losses)
    best = jnp.argsort(losses)[: pool.loss.shape[0]]
    is_valid = jnp.isfinite(losses[best])
    return Pool(jnp.where(is_valid[:, None], rows[best], PADDING), losses[best])
