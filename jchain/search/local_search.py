"""Local search: move to the first better neighbor; restart from a random chain if there is none.

White, Nolen, and Savani 2021, arXiv:2005.02960, find that local search is a strong baseline for
architecture search. By default, a neighbor differs from the chain by one edit: a layer is swapped,
inserted, or deleted, or the head is swapped (`jchain.chain.ChainSpace.neighbors`).
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jchain import env
from jchain._typing import Array, Float, Int, Key
from jchain.arguments import check_at_least_one, check_fields, checked
from jchain.chain import PADDING
from jchain.engine import score_cache
from jchain.engine.score_cache import ScoreCache
from jchain.problem import Problem
from jchain.pytree import pytree_dataclass, static
from jchain.search.moves import EDITS, MoveKind, check_kinds, join_moves, list_moves, read_kinds
from jchain.search.protocol import Info


class State(NamedTuple):
    """The current chain, and how many of its neighbors have been scored."""

    chain: Int[Array, "L"]  # [L]
    loss: Float[Array, ""]  # +inf for a random start chain, which is not scored
    order: Int[Array, "M"]  # [M], rows of the neighbors in random order, invalid rows last
    num_tried: Int[Array, ""]  # neighbors scored so far
    cache: ScoreCache


@pytree_dataclass
class LocalSearch:
    """Local search that takes the first improvement, with random restarts.

    Attributes:
      num_chains: number of neighbors to score per step. The search moves to the first of them, in
        random order, that is better than the current chain.
      moves: what makes a neighbor: some of "edits", "switches", and "runs" (`jchain.search.moves`).

    Raises:
      ValueError: if `num_chains` is below 1, or `moves` is invalid.
    """

    is_deterministic = False
    needs_gradient = False
    needs_invertible = False
    reads_activations = False

    num_chains: int = static(default=8)
    moves: Sequence[MoveKind] = static(default=EDITS)

    def __post_init__(self) -> None:
        check_at_least_one(num_chains=self.num_chains)
        check_fields(self)
        object.__setattr__(self, "moves", read_kinds(self.moves))

    @checked
    def check(self, problem: Problem) -> None:
        """Check that the layers have the positions that switches need.

        Args:
          problem: the problem to search.

        Raises:
          ValueError: if `moves` has switches, and a layer has no position or several.
        """
        check_kinds(problem, self.moves)

    @checked
    def init(self, key: Key[Array, ""], problem: Problem) -> State:
        """Return the first state.

        Args:
          key: the PRNG key; consumed by this call.
          problem: the problem to search.
        """
        start_key, order_key = jax.random.split(key)
        start = env.sample_chains(start_key, problem, 1)[0]
        return State(
            start,
            jnp.full((), jnp.inf, jnp.float32),
            _shuffle(order_key, start, problem, self.moves),
            jnp.array(0),
            score_cache.init(problem),
        )

    @checked
    def start(
        self,
        key: Key[Array, ""],
        state: State,
        problem: Problem,
        chains: Int[Array, "C L"],
        loss: Float[Array, "C"],
    ) -> State:
        """Begin at the best start; see `jchain.search.protocol.Startable`.

        Args:
          key: the PRNG key; consumed by this call.
          state: the state that `init` returned.
          problem: the problem to search.
          chains: the starts, `[C, L]`.
          loss: their losses, `[C]`.
        """
        best = jnp.argmin(loss)
        return state._replace(
            chain=chains[best],
            loss=loss[best].astype(state.loss.dtype),
            order=_shuffle(key, chains[best], problem, self.moves),
            cache=score_cache.add(state.cache, problem, chains, loss),
        )

    @checked
    def step(self, key: Key[Array, ""], state: State, problem: Problem) -> tuple[State, Info]:
        """Score the next neighbors, and move to a better one or restart.

        Args:
          key: the PRNG key; consumed by this call.
          state: the state that `init` or the last step returned.
          problem: the problem to search.
        """
        start_key, order_key = jax.random.split(key)
        chains, num_neighbors = self._choose_chains(state, problem)
        # A start chain that is not scored is no rival.
        rival = jnp.where(jnp.isfinite(state.loss), state.chain, PADDING)
        cache, loss, layer_calls = score_cache.evaluate_cached(state.cache, problem, chains, rival)

        is_better = loss < state.loss
        first = jnp.argmax(is_better)
        should_move = is_better.any()
        num_tried = state.num_tried + self.num_chains
        should_restart = ~should_move & (num_tried >= num_neighbors)
        kept = jnp.where(should_restart, env.sample_chains(start_key, problem, 1)[0], state.chain)
        chain = jnp.where(should_move, chains[first], kept)
        kept_loss = jnp.where(should_restart, jnp.inf, state.loss)
        has_new_chain = should_move | should_restart
        order = _shuffle(order_key, chain, problem, self.moves)
        next_state = State(
            chain,
            jnp.where(should_move, loss[first], kept_loss),
            jnp.where(has_new_chain, order, state.order),
            jnp.where(has_new_chain, 0, num_tried),
            cache,
        )
        return next_state, Info(chains, loss, layer_calls)

    def _choose_chains(
        self, state: State, problem: Problem
    ) -> tuple[Int[Array, "P L"], Int[Array, ""]]:
        """Return the neighbors to score, and the number of all neighbors."""
        neighbors, is_neighbor = join_moves(problem, state.chain, self.moves)
        num_neighbors = is_neighbor.sum()
        position = state.num_tried + jnp.arange(self.num_chains)
        row = state.order[jnp.minimum(position, state.order.shape[0] - 1)]
        is_valid = position < num_neighbors
        return jnp.where(is_valid[:, None], neighbors[row], state.chain[None]), num_neighbors


def _shuffle(
    key: Key[Array, ""], chain: Int[Array, "L"], problem: Problem, moves: Sequence[MoveKind]
) -> Int[Array, "M"]:
    """Return the rows of a chain's neighbors in random order, invalid rows last.

    If there are several kinds of moves, each is as likely as the others to come first.
    """
    masks = [mask for _, mask in list_moves(problem, chain, moves)]
    is_neighbor = jnp.concatenate(masks)
    draws = jax.random.uniform(key, is_neighbor.shape, jnp.float32)
    if len(masks) == 1:
        return jnp.argsort(draws + ~is_neighbor)
    # Rows come in the order of a race of exponential clocks, which run at the rate of their weight.
    size = jnp.concatenate([jnp.full(mask.shape, mask.sum()) for mask in masks])
    return jnp.argsort(jnp.where(is_neighbor, -jnp.log1p(-draws) * size, jnp.inf))
