"""The front of a run: the chains that no other scored chain beats in both cost and loss.

If the problem has no `token_costs`, the cost of a chain is its number of layers, and the front has
one row for each number. Otherwise it has 64 rows. When more chains are on the front, the chains
that improve the loss least over the next cheaper chain are dropped, but the cheapest chain and the
one with the lowest loss are always kept.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jchain._typing import Array, Float, Int
from jchain.chain import PADDING
from jchain.problem import Problem

_NUM_ROWS = 64


class Front(NamedTuple):
    """Chains by cost; each costs more than the one before it and has a lower loss.

    While a run keeps it, the losses of rows without a chain are +inf, and if costs are numbers of
    layers, a row may have a higher loss than the row before it.

    Attributes:
      chains: the tokens of the chains, `[F, L]`, cheapest first.
      cost: the cost of each chain, `[F]`, in the unit of `Problem.token_costs`, or its number of
        layers.
      loss: the loss of each chain, `[F]`, with the layer penalty.
    """

    chains: Int[np.ndarray, "F L"] | Int[Array, "F L"]
    cost: Float[np.ndarray, "F"] | Float[Array, "F"]
    loss: Float[np.ndarray, "F"] | Float[Array, "F"]


def find_front(
    chains: Int[np.ndarray, "R L"], cost: Float[np.ndarray, "R"], loss: Float[np.ndarray, "R"]
) -> Front:
    """Return the rows that no other row beats, on the host.

    Args:
      chains: the chains, `[R, L]`.
      cost: the cost of each chain, `[R]`.
      loss: the loss of each chain, `[R]`; +inf in rows without a chain.
    """
    order = np.lexsort((loss, cost))
    best = np.minimum.accumulate(np.append(np.inf, loss[order]))
    kept = order[loss[order] < best[:-1]]
    return Front(chains[kept], cost[kept], loss[kept])


def empty_front(problem: Problem) -> Front:
    """Return a front without chains, for a run.

    Args:
      problem: the problem, which defines what chains cost.
    """
    num_slots = problem.max_layers + 1
    num_rows = num_slots if problem.token_costs is None else _NUM_ROWS
    cost = jnp.arange(num_rows, dtype=jnp.float32)
    return Front(
        jnp.full((num_rows, num_slots), PADDING, jnp.int32),
        cost if problem.token_costs is None else jnp.full(num_rows, jnp.inf, jnp.float32),
        jnp.full(num_rows, jnp.inf, jnp.float32),
    )


def merge_front(
    old: Front, problem: Problem, chains: Int[Array, "P L"], loss: Float[Array, "P"]
) -> Front:
    """Merge chains into the front of a run. Works under `jit`.

    Args:
      old: the front so far, from `empty_front` or this function.
      problem: the problem, which defines what chains cost.
      chains: the chains to add, `[P, L]`.
      loss: their losses, `[P]`; a chain whose loss is not finite is left out.
    """
    loss = jnp.where(jnp.isfinite(loss), loss, jnp.inf).astype(jnp.float32)
    chains = chains.astype(jnp.int32)
    if problem.token_costs is None:
        return _merge_by_length(old, problem, chains, loss)
    rows = jnp.concatenate([jnp.asarray(old.chains), chains])
    losses = jnp.concatenate([jnp.asarray(old.loss), loss])
    costs = jnp.concatenate([jnp.asarray(old.cost), problem.chain_cost(chains)])
    costs = jnp.where(jnp.isfinite(losses), costs, jnp.inf)
    # The sort is stable, so of equal rows the first one that was found comes first.
    costs, losses, order = jax.lax.sort([costs, losses, jnp.arange(losses.size)], num_keys=2)
    lowest = jax.lax.cummin(losses)
    cheaper = jnp.append(jnp.inf, lowest[:-1])
    is_kept = losses < cheaper
    # The cheapest chain has an infinite gain, and the chain with the lowest loss gets one.
    gain = jnp.where(losses == lowest[-1], jnp.inf, cheaper - losses)
    gain = jnp.where(is_kept, gain, -jnp.inf)
    top = jax.lax.top_k(gain, old.loss.shape[0])[1]
    # Put the rows that are kept in the order of their costs, and the others last.
    top = jnp.sort(jnp.where(is_kept[top], top, losses.size))
    return Front(
        rows[order].at[top].get(mode="fill", fill_value=PADDING),
        costs.at[top].get(mode="fill", fill_value=jnp.inf),
        losses.at[top].get(mode="fill", fill_value=jnp.inf),
    )


def _merge_by_length(
    old: Front, problem: Problem, chains: Int[Array, "P L"], loss: Float[Array, "P"]
) -> Front:
    """Keep the best chain of each number of layers; of equal losses, the first that was found."""
    length = problem.space.count_layers(chains)
    is_own = length[None] == jnp.arange(problem.max_layers + 1)[:, None]
    losses = jnp.where(is_own, loss[None], jnp.inf)
    best = jnp.argmin(losses, axis=1)
    lowest = jnp.min(losses, axis=1)
    is_better = lowest < old.loss
    return Front(
        jnp.where(is_better[:, None], chains[best], old.chains),
        old.cost,
        jnp.where(is_better, lowest, old.loss),
    )
