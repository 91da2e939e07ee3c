"""Local search: to the first better neighbor, from a random chain again where there is none; first from chains that are known.

White, Nolen and Savani 2021, arXiv:2005.02960, find it a strong baseline of architecture search. A neighbor differs by one
swapped, inserted or deleted layer or by the head (`jchain.chain.neighbors`).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jchain import chain as chain_lib
from jchain._typing import Array, Float, Int, Key
from jchain.engine import score_cache
from jchain.engine.score_cache import ScoreCache
from jchain.problem import Problem
from jchain.pytree import pytree_dataclass, static
from jchain.search.base import Info


class State(NamedTuple):
    """Where the search stands."""

    chain: Int[Array, "L"]  # [L]
    loss: Float[Array, ""]  # +inf at a random start, which is not scored itself
    order: Int[Array, "M"]  # [M], rows of its neighbors, those that are there first
    num_tried: Int[Array, ""]  # how many of them were
    num_started: Int[Array, ""]  # how many of `starts` were scored
    cache: ScoreCache


@pytree_dataclass
class LocalSearch:
    """First improvement, with random restarts.

    Attributes:
      num_chains: neighbors that are scored together; the first better one in random order is taken.
      starts: chains that are scored before all others, `[S, L]` with `L = max_layers + 1`, as the models of a bank (`Bank.parents`)
        or what is done by hand (`jc.hub.recipes`); the search begins at the best of them. None: at a random chain.
    """

    num_chains: int = static(default=8)
    starts: Any = None

    def __post_init__(self) -> None:
        if self.num_chains < 1:
            raise ValueError(f"expected num_chains of at least 1, got {self.num_chains}")

    def check(self, problem: Problem) -> None:
        """As `jchain.search.base.Checked`.

        Raises:
          ValueError: `starts` are no chains of the problem.
        """
        if self.starts is None:
            return
        sizes = (problem.bank.num_layers, problem.bank.num_heads, problem.max_layers)
        rows = chain_lib.validate(np.asarray(self.starts), *sizes)
        if rows.ndim != 2 or len(rows) == 0:
            raise ValueError(
                f"expected starts of shape [S, {problem.max_layers + 1}], got {list(rows.shape)}"
            )
        lengths = (rows >= 0).sum(axis=1) - 1
        if (lengths < problem.min_layers).any():
            raise ValueError(
                f"expected starts of at least {problem.min_layers} layers, got one of {lengths.min()}"
            )

    def init(self, key: Key[Array, ""], problem: Problem) -> State:
        start_key, order_key = jax.random.split(key)
        start = _sample(start_key, problem)
        return State(
            start,
            jnp.full((), jnp.inf, jnp.float32),
            _shuffle(order_key, start, problem),
            jnp.array(0),
            jnp.array(0),
            score_cache.init(problem),
        )

    def step(self, key: Key[Array, ""], state: State, problem: Problem) -> tuple[State, Info]:
        start_key, order_key = jax.random.split(key)
        neighbors, is_neighbor = _find_neighbors(state.chain, problem)
        num_neighbors = is_neighbor.sum()
        turn = state.num_tried + jnp.arange(self.num_chains)
        row = state.order[jnp.minimum(turn, state.order.shape[0] - 1)]
        chains = jnp.where((turn < num_neighbors)[:, None], neighbors[row], state.chain[None])
        is_starting = jnp.array(False)
        if self.starts is not None:
            starts = jnp.asarray(self.starts, jnp.int32)
            is_starting = state.num_started < starts.shape[0]
            given = jnp.minimum(
                state.num_started + jnp.arange(self.num_chains), starts.shape[0] - 1
            )
            chains = jnp.where(is_starting, starts[given], chains)
        cache, loss, layer_calls = score_cache.evaluate_cached(state.cache, problem, chains)

        is_better = loss < state.loss
        first = jnp.where(
            is_starting, jnp.argmin(jnp.where(is_better, loss, jnp.inf)), jnp.argmax(is_better)
        )
        does_move = is_better.any()
        num_tried = state.num_tried + jnp.where(is_starting, 0, self.num_chains)
        does_restart = ~does_move & ~is_starting & (num_tried >= num_neighbors)
        kept = jnp.where(does_restart, _sample(start_key, problem), state.chain)
        chain = jnp.where(does_move, chains[first], kept)
        kept_loss = jnp.where(does_restart, jnp.inf, state.loss)
        does_change = does_move | does_restart
        next_state = State(
            chain,
            jnp.where(does_move, loss[first], kept_loss),
            jnp.where(does_change, _shuffle(order_key, chain, problem), state.order),
            jnp.where(does_change, 0, num_tried),
            state.num_started + jnp.where(is_starting, self.num_chains, 0),
            cache,
        )
        return next_state, Info(chains, loss, layer_calls)


def _sample(key: Key[Array, ""], problem: Problem) -> Int[Array, "L"]:
    sizes = (problem.bank.num_layers, problem.bank.num_heads, problem.max_layers)
    return chain_lib.sample(key, 1, *sizes, min_layers=problem.min_layers)[0]


def _find_neighbors(chain: Int[Array, "L"], problem: Problem) -> tuple[Array, Array]:
    return chain_lib.neighbors(
        chain, problem.bank.num_layers, problem.bank.num_heads, min_layers=problem.min_layers
    )


def _shuffle(key: Key[Array, ""], chain: Int[Array, "L"], problem: Problem) -> Int[Array, "M"]:
    """Rows of the neighbors of a chain in random order, those that are none last."""
    is_neighbor = _find_neighbors(chain, problem)[1]
    return jnp.argsort(jax.random.uniform(key, is_neighbor.shape) + ~is_neighbor)
