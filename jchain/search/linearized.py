"""Descent by linearized scores: one pass along a chain scores all its edits and joint moves.

To first order, the changes that swaps make in the outputs add up, so pairs and larger moves are
predicted without further layer calls. The most promising moves are then evaluated exactly. The
number of slots that a greedy move may change is a trust region (Conn, Gould and Toint 2000,
Trust-Region Methods). If no move is better, the search restarts from a random chain, cut at its
best prefix.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jchain._typing import Array, Bool, Float, Int, Key
from jchain.chain import PADDING
from jchain.engine import score_cache
from jchain.engine.control_flow import cond_in_sequence
from jchain.engine.score_cache import ScoreCache
from jchain.gradient.edit_scores import choose_products, score_moves
from jchain.problem import Problem
from jchain.pytree import pytree_dataclass, static
from jchain.search.base import Info
from jchain.search.descent import (
    Move,
    allocate_candidates,
    choose_move,
    sample_candidates,
    sample_start,
)

# Most swaps of a greedy move after a restart.
_START_RADIUS = 4.0


class Guide(NamedTuple):
    """A chain, and the moves from it that a pass predicts."""

    chain: Int[Array, "L"]  # [L]
    loss: Float[Array, ""]  # of the chain
    score: Float[Array, "M"]  # [M], edit scores of its neighbors; +inf if invalid or tried
    greedy: Int[Array, "L L"]  # [L, L], the chain with 1, 2, ... swaps
    is_greedy: Bool[Array, "L"]  # [L], False for greedy moves without enough swaps
    pairs: Int[Array, "Q L"]  # [Q, L], the chain with two swaps, best first
    is_pair: Bool[Array, "Q"]  # [Q], False for rows without a pair
    layer_calls: Int[Array, ""]  # cost of the pass


class State(NamedTuple):
    """What the next step needs."""

    guide: Guide
    is_new: Bool[Array, ""]  # the chain needs a pass
    is_start: Bool[Array, ""]  # the chain must be sampled first
    radius: Float[Array, ""]  # most swaps of a greedy move
    num_failed: Int[Array, ""]  # consecutive batches without a better chain
    cache: ScoreCache


@pytree_dataclass
class LinearizedSearch:
    """Descent by linearized scores, with restarts.

    Attributes:
      num_single: most promising edits that are evaluated in a step.
      num_pairs: most promising pairs of swaps that are evaluated in a step.
      num_joint: greedy moves that are evaluated in a step. The first has as many swaps as the trust
        region allows, each further one half as many.
      num_candidates: layers that a pass scores at each slot: in proportion to the sizes of the
        bank's groups, at least one of each. If the bank has more layers, candidates are sampled
        again for each pass, and every step makes a pass. Otherwise only a new chain needs one.
      num_best: swaps of each slot that pairs are made of; None for a number that depends on
        `max_layers`.
      patience: consecutive batches without a better chain before a restart.
      num_products: most vector-Jacobian products of a pass (`jchain.gradient.score_edits`); None
        for 2 if the loss is a softmax over classes, else for the default of `score_edits`.
    """

    is_deterministic = False
    needs_gradient = True
    needs_invertible = False

    num_single: int = static(default=4)
    num_pairs: int = static(default=4)
    num_joint: int = static(default=2)
    num_candidates: int = static(default=16)
    num_best: int | None = static(default=None)
    patience: int = static(default=2)
    num_products: int | None = static(default=None)

    def __post_init__(self) -> None:
        least = {
            "num_single": 1,
            "num_pairs": 0,
            "num_joint": 0,
            "num_candidates": 1,
            "patience": 1,
        }
        sizes = {name: getattr(self, name) for name in least}
        optional = {"num_best": self.num_best, "num_products": self.num_products}
        if any(sizes[name] < size for name, size in least.items()) or any(
            size is not None and size < 1 for size in optional.values()
        ):
            raise ValueError(
                f"expected sizes of at least {least}, and of 1 or None, got {sizes} and {optional}"
            )

    def init(self, key: Key[Array, ""], problem: Problem) -> State:
        """The first state: no chain, and an empty score cache.

        Args:
          key: unused.
          problem: what to minimize over.
        """
        num_slots = problem.max_layers + 1
        guide = Guide(
            jnp.full(num_slots, PADDING, jnp.int32),
            jnp.full((), jnp.inf, jnp.float32),
            jnp.full(problem.space.num_neighbors, jnp.inf, jnp.float32),
            jnp.full((num_slots, num_slots), PADDING, jnp.int32),
            jnp.zeros(num_slots, bool),
            jnp.full((self._count_pairs(problem), num_slots), PADDING, jnp.int32),
            jnp.zeros(self._count_pairs(problem), bool),
            jnp.zeros((), jnp.int32),
        )
        zero = jnp.zeros((), jnp.int32)
        radius = jnp.full((), _START_RADIUS, jnp.float32)
        return State(
            guide, jnp.array(True), jnp.array(True), radius, zero, score_cache.init(problem)
        )

    def step(self, key: Key[Array, ""], state: State, problem: Problem) -> tuple[State, Info]:
        """Evaluate the most promising moves, and move to the best chain if it is better.

        Args:
          key: consumed.
          state: from `init` or the last step.
          problem: what to minimize over.
        """
        guide = self._find_guide(key, state, problem)
        chains, rows, is_joint = self._propose(state, guide, problem)
        cache, loss, layer_calls = score_cache.evaluate_cached(state.cache, problem, chains)

        # Rows without a move hold the chain itself, whose loss may be lower here by rounding.
        is_move = (chains != guide.chain[None]).any(axis=1)
        score = guide.score.at[rows].set(jnp.inf, mode="drop")
        has_more = jnp.isfinite(score).any()
        move = choose_move(
            guide.chain,
            guide.loss,
            chains,
            loss,
            is_move,
            state.num_failed,
            self.patience,
            has_more,
        )
        num_scored = sum(allocate_candidates(problem, self.num_candidates))
        next_state = State(
            guide._replace(chain=move.chain, loss=move.loss, score=score),
            move.does_move | move.is_stuck | (num_scored < problem.bank.num_layers),
            move.is_stuck,
            _update_radius(state.radius, move, is_move, is_joint, problem.max_layers),
            move.num_failed,
            cache,
        )
        own = jnp.where(state.is_new, guide.chain, PADDING)
        info = Info(
            jnp.concatenate([own[None], chains]),
            jnp.concatenate([jnp.where(state.is_new, guide.loss, jnp.inf)[None], loss]),
            layer_calls + jnp.where(state.is_new, guide.layer_calls, 0),
        )
        return next_state, info

    def _count_best(self, problem: Problem) -> int:
        wanted = self.num_best or -(-32 // max(problem.max_layers, 1))
        return min(wanted, sum(allocate_candidates(problem, self.num_candidates)))

    def _count_pairs(self, problem: Problem) -> int:
        return min(
            self.num_pairs * self.patience,
            ((problem.max_layers + 1) * self._count_best(problem)) ** 2,
        )

    def _find_guide(self, key: Key[Array, ""], state: State, problem: Problem) -> Guide:
        """A pass if the chain is new, otherwise the last guide."""
        return cond_in_sequence(
            state.is_new,
            self._pass,
            lambda _, state, __: state.guide,
            key,
            state._replace(cache=None),
            problem,
        )

    def _pass(self, key: Key[Array, ""], state: State, problem: Problem) -> Guide:
        """Score the edits and joint moves of the chain, or of a new start chain."""
        start_key, key = jax.random.split(key)
        chain = jax.lax.cond(
            state.is_start, lambda: sample_start(start_key, problem), lambda: state.guide.chain
        )
        num_per_group = allocate_candidates(problem, self.num_candidates)
        scores, joint = score_moves(
            problem,
            chain,
            num_best=self._count_best(problem),
            num_pairs=max(self._count_pairs(problem), 1),
            num_products=self.num_products or choose_products(problem),
            members=sample_candidates(key, problem, num_per_group),
        )
        is_neighbor = problem.space.neighbors(chain)[1]
        start_loss = jnp.where(jnp.isfinite(scores.loss), scores.loss, jnp.inf).astype(jnp.float32)
        return Guide(
            chain,
            # The evaluated loss, not that of the pass: with other rounding, each of two chains of
            # equal loss could be better than the other.
            jnp.where(state.is_start, start_loss, state.guide.loss),
            jnp.where(is_neighbor & ~jnp.isnan(scores.flat), scores.flat, jnp.inf).astype(
                jnp.float32
            ),
            joint.greedy.astype(jnp.int32),
            ~jnp.isnan(joint.greedy_score),
            joint.pairs[: self._count_pairs(problem)].astype(jnp.int32),
            ~jnp.isnan(joint.pair_score)[: self._count_pairs(problem)],
            (scores.layer_calls + jnp.where(state.is_start, problem.max_layers, 0)).astype(
                jnp.int32
            ),
        )

    def _propose(self, state: State, guide: Guide, problem: Problem) -> tuple[Array, Array, Array]:
        """Chains to evaluate, the rows of neighbors that come first, and which are greedy moves.

        Rows without a move hold the chain itself.
        """
        # No pair of a new pass was tried yet.
        num_failed = jnp.where(state.is_new, 0, state.num_failed)
        neighbors, _ = problem.space.neighbors(guide.chain)
        gain, rows = jax.lax.top_k(-guide.score, min(self.num_single, guide.score.size))
        single = jnp.where(jnp.isfinite(gain)[:, None], neighbors[rows], guide.chain[None])
        sizes = jnp.floor(state.radius / 2.0 ** jnp.arange(self.num_joint)).astype(jnp.int32)
        place = jnp.clip(sizes - 1, 0, problem.max_layers)
        # A greedy move of two swaps would be a pair.
        is_joint = (sizes > 2) & guide.is_greedy[place] & (num_failed == 0)
        joint = jnp.where(is_joint[:, None], guide.greedy[place], guide.chain[None])
        turn = num_failed * self.num_pairs + jnp.arange(min(self.num_pairs, guide.is_pair.size))
        turn = jnp.minimum(turn, guide.is_pair.size - 1)
        pairs = jnp.where(guide.is_pair[turn][:, None], guide.pairs[turn], guide.chain[None])
        is_greedy = jnp.concatenate([jnp.zeros(single.shape[0] + pairs.shape[0], bool), is_joint])
        return jnp.concatenate([single, pairs, joint]).astype(jnp.int32), rows, is_greedy


def _update_radius(
    radius: Float[Array, ""],
    move: Move,
    is_move: Bool[Array, "P"],
    is_joint: Bool[Array, "P"],
    max_layers: int,
) -> Float[Array, ""]:
    """Double the trust region after a move of several swaps, halve it if such moves failed."""
    did_try = (is_move & is_joint).any()
    factor = jnp.where(did_try, jnp.where(move.does_move & is_joint[move.best], 2.0, 0.5), 1.0)
    return jnp.where(
        move.is_stuck, _START_RADIUS, jnp.clip(factor * radius, 2.0, max(max_layers, 2))
    )
