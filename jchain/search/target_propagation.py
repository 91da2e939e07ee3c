"""Target propagation: what each slot should give is taken back from the loss's target, and layers that come nearest are tried.

Lee et al. 2015, arXiv:1412.7525, with layers that are chosen where theirs are trained (`jchain.inverse.target_scores`). Where no such move is better,
the search starts again from a random chain, cut where a head is best.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jchain import chain as chain_lib
from jchain._typing import Array, Bool, Float, Int, Key
from jchain.chain import PADDING
from jchain.engine import score_cache
from jchain.engine.score_cache import ScoreCache
from jchain.inverse.target_scores import score_edits_by_target
from jchain.problem import Problem
from jchain.pytree import pytree_dataclass, static
from jchain.search.base import Info
from jchain.search.descent import decide, draw_members, draw_start, share_members


class State(NamedTuple):
    """What the next step needs."""

    chain: Int[Array, "L"]
    loss: Float[Array, ""]
    score: Float[Array, "M"]  # [M], of its neighbors; +inf where there is none, or it was tried
    is_new: Bool[Array, ""]  # the chain is yet to be looked at
    is_start: Bool[Array, ""]  # and yet to be drawn
    num_failed: Int[Array, ""]  # batches without a better chain
    cache: ScoreCache


@pytree_dataclass
class TargetPropagation:
    """Descent by how near layers come to what is wanted of them, with restarts.

    Attributes:
      num_moves: edits that are evaluated in a step.
      num_candidates: layers that are compared at each slot, of each module its share and at least one, drawn anew for each chain.
      patience: batches in a row without a better chain before a restart.
      rate: how much of the way from the outputs to the target is wanted (`jchain.inverse.target_scores.score_edits_by_target`).
      is_exact: whether layers that can be undone are undone exactly.
    """

    num_moves: int = static(default=8)
    num_candidates: int = static(default=16)
    patience: int = static(default=3)
    rate: float = 1.0
    is_exact: bool = static(default=False)

    def __post_init__(self) -> None:
        sizes = {name: getattr(self, name) for name in ("num_moves", "num_candidates", "patience")}
        if min(sizes.values()) < 1:
            raise ValueError(f"expected sizes of at least 1, got {sizes}")

    def init(self, key: Key[Array, ""], problem: Problem) -> State:
        num_rows = problem.max_layers * (2 * problem.bank.num_layers + 1) + problem.bank.num_heads
        return State(
            jnp.full(problem.max_layers + 1, PADDING, jnp.int32),
            jnp.full((), jnp.inf, jnp.float32),
            jnp.full(num_rows, jnp.inf, jnp.float32),
            jnp.array(True),
            jnp.array(True),
            jnp.zeros((), jnp.int32),
            score_cache.init(problem),
        )

    def step(self, key: Key[Array, ""], state: State, problem: Problem) -> tuple[State, Info]:
        @jax.custom_batching.sequential_vmap
        def look(problem: Problem, key: Array, here: State, rate: Array) -> tuple[State, Array]:
            return jax.lax.cond(
                here.is_new,
                self._look,
                lambda _, here, *__: (here, jnp.int32(0)),
                key,
                here,
                problem,
                rate,
            )

        here, looking_calls = look(problem, key, state._replace(cache=None), jnp.asarray(self.rate))
        neighbors, _ = chain_lib.neighbors(
            here.chain, problem.bank.num_layers, problem.bank.num_heads
        )
        gain, rows = jax.lax.top_k(-here.score, min(self.num_moves, here.score.size))
        is_move = jnp.isfinite(gain)
        chains = jnp.where(is_move[:, None], neighbors[rows], here.chain[None]).astype(jnp.int32)
        cache, loss, layer_calls = score_cache.evaluate_cached(state.cache, problem, chains)

        score = here.score.at[rows].set(jnp.inf)
        has_more = jnp.isfinite(score).any()
        move = decide(
            here.chain, here.loss, chains, loss, is_move, here.num_failed, self.patience, has_more
        )
        is_new = move.does_move | move.is_stuck
        next_state = State(
            move.chain, move.loss, score, is_new, move.is_stuck, move.num_failed, cache
        )
        own = jnp.where(state.is_new, here.chain, PADDING)
        info = Info(
            jnp.concatenate([own[None], chains]),
            jnp.concatenate([jnp.where(state.is_new, here.loss, jnp.inf)[None], loss]),
            layer_calls + looking_calls,
        )
        return next_state, info

    def _look(
        self, key: Key[Array, ""], here: State, problem: Problem, rate: Float[Array, ""]
    ) -> tuple[State, Int[Array, ""]]:
        start_key, key = jax.random.split(key)
        chain = jax.lax.cond(
            here.is_start, lambda: draw_start(start_key, problem), lambda: here.chain
        )
        members = draw_members(key, problem, share_members(problem, self.num_candidates))
        scores = score_edits_by_target(
            problem, chain, rate=rate, is_exact=self.is_exact, members=members
        )
        sizes = (problem.bank.num_layers, problem.bank.num_heads)
        is_neighbor = chain_lib.neighbors(chain, *sizes, min_layers=problem.min_layers)[1]
        start_loss = jnp.where(jnp.isfinite(scores.loss), scores.loss, jnp.inf).astype(jnp.float32)
        found = here._replace(
            chain=chain,
            # As it was evaluated: with the rounding of a pass two chains of equal loss could each be better than the other.
            loss=jnp.where(here.is_start, start_loss, here.loss),
            score=jnp.where(is_neighbor & ~jnp.isnan(scores.flat), scores.flat, jnp.inf).astype(
                jnp.float32
            ),
        )
        calls = scores.layer_calls + jnp.where(here.is_start, problem.max_layers, 0)
        return found, calls.astype(jnp.int32)
