"""Descent by linearized scores: one pass along a chain scores all its edits, and joint moves of several swaps.

What swaps change in the outputs adds up to first order, so pairs and larger moves are predicted for no further layer call; the
most promising moves are then evaluated exactly. How many slots a greedy move may change is a trust region (Conn, Gould and Toint
2000, Trust-Region Methods). Where no move is better, the search starts again from a random chain,
cut where a head is best.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jchain import chain as chain_lib
from jchain._typing import Array, Bool, Float, Int, Key
from jchain.chain import PADDING
from jchain.engine import score_cache
from jchain.engine.score_cache import ScoreCache
from jchain.gradient.edit_scores import choose_products, score_moves
from jchain.problem import Problem
from jchain.pytree import pytree_dataclass, static
from jchain.search.base import Info
from jchain.search.descent import decide, draw_members, draw_start, share_members

_START_RADIUS = 4.0


class Guide(NamedTuple):
    """A chain, and what a pass predicts of moves from it."""

    chain: Int[Array, "L"]
    loss: Float[Array, ""]  # of the chain
    score: Float[Array, "M"]  # [M], of its neighbors; +inf where there is none, or it was tried
    greedy: Int[Array, "L L"]  # [L, L], the chain with 1, 2, ... swaps
    is_greedy: Bool[Array, "L"]
    pairs: Int[Array, "Q L"]  # [Q, L], with two swaps, best first
    is_pair: Bool[Array, "Q"]
    layer_calls: Int[Array, ""]


class State(NamedTuple):
    """What the next step needs."""

    guide: Guide
    is_new: Bool[Array, ""]  # the chain is yet to be passed
    is_start: Bool[Array, ""]  # and yet to be drawn
    radius: Float[Array, ""]  # most swaps of a greedy move
    num_failed: Int[Array, ""]  # batches without a better chain
    cache: ScoreCache


@pytree_dataclass
class LinearizedSearch:
    """Descent by linearized scores, with restarts.

    Attributes:
      num_single: most promising edits that are evaluated in a step.
      num_pairs: likewise pairs of swaps.
      num_joint: likewise greedy moves, of as many swaps as the trust region allows, half as many, and so on.
      num_candidates: layers that a pass scores at each slot, of each module its share and at least one. Where the bank has more
        they are drawn anew for each pass, and every step makes one; where it has not, a step makes one only of a chain that is
        new.
      num_best: swaps of each slot that pairs are made of.
      num_products: vector-Jacobian products of a pass, at most (`jchain.gradient.score_edits`); 2 when None, where the loss is a
        softmax over classes.
      patience: batches in a row without a better chain before a restart.
    """

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
        num_slots = problem.max_layers + 1
        num_rows = problem.max_layers * (2 * problem.bank.num_layers + 1) + problem.bank.num_heads
        guide = Guide(
            jnp.full(num_slots, PADDING, jnp.int32),
            jnp.full((), jnp.inf, jnp.float32),
            jnp.full(num_rows, jnp.inf, jnp.float32),
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
        guide = self._find_guide(key, state, problem)
        chains, rows, is_joint = self._propose(state, guide, problem)
        cache, loss, layer_calls = score_cache.evaluate_cached(state.cache, problem, chains)

        # The chain itself stands where there is no move, and its loss may be lower here by a rounding error.
        is_move = (chains != guide.chain[None]).any(axis=1)
        score = guide.score.at[rows].set(jnp.inf, mode="drop")
        has_more = jnp.isfinite(score).any()
        move = decide(
            guide.chain,
            guide.loss,
            chains,
            loss,
            is_move,
            state.num_failed,
            self.patience,
            has_more,
        )
        did_try = (is_move & is_joint).any()
        radius = (
            jnp.where(did_try, jnp.where(move.does_move & is_joint[move.best], 2.0, 0.5), 1.0)
            * state.radius
        )
        next_state = State(
            guide._replace(chain=move.chain, loss=move.loss, score=score),
            move.does_move
            | move.is_stuck
            | (sum(share_members(problem, self.num_candidates)) < problem.bank.num_layers),
            move.is_stuck,
            jnp.where(
                move.is_stuck, _START_RADIUS, jnp.clip(radius, 2.0, max(problem.max_layers, 2))
            ),
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
        return min(wanted, sum(share_members(problem, self.num_candidates)))

    def _count_pairs(self, problem: Problem) -> int:
        return min(
            self.num_pairs * self.patience,
            ((problem.max_layers + 1) * self._count_best(problem)) ** 2,
        )

    def _find_guide(self, key: Key[Array, ""], state: State, problem: Problem) -> Guide:
        """A pass where the chain is new, what it said before else."""

        @jax.custom_batching.sequential_vmap
        def find(problem: Problem, key: Array, state: State) -> Guide:
            return jax.lax.cond(
                state.is_new, self._pass, lambda *_: state.guide, key, state, problem
            )

        return find(problem, key, state._replace(cache=None))

    def _pass(self, key: Key[Array, ""], state: State, problem: Problem) -> Guide:
        start_key, key = jax.random.split(key)
        chain = jax.lax.cond(
            state.is_start, lambda: draw_start(start_key, problem), lambda: state.guide.chain
        )
        scores, joint = score_moves(
            problem,
            chain,
            num_best=self._count_best(problem),
            num_pairs=max(self._count_pairs(problem), 1),
            num_products=self.num_products or choose_products(problem),
            members=draw_members(key, problem, share_members(problem, self.num_candidates)),
        )
        sizes = (problem.bank.num_layers, problem.bank.num_heads)
        is_neighbor = chain_lib.neighbors(chain, *sizes, min_layers=problem.min_layers)[1]
        start_loss = jnp.where(jnp.isfinite(scores.loss), scores.loss, jnp.inf).astype(jnp.float32)
        return Guide(
            chain,
            # As it was evaluated: with the pass's rounding two chains of equal loss could each be better than the other.
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
        """Chains, which of them are neighbors, and which are greedy moves; the chain itself where there is no move."""
        # What a new pass says was not tried yet.
        num_failed = jnp.where(state.is_new, 0, state.num_failed)
        neighbors, _ = chain_lib.neighbors(
            guide.chain, problem.bank.num_layers, problem.bank.num_heads
        )
        gain, rows = jax.lax.top_k(-guide.score, min(self.num_single, guide.score.size))
        single = jnp.where(jnp.isfinite(gain)[:, None], neighbors[rows], guide.chain[None])
        sizes = jnp.floor(state.radius / 2.0 ** jnp.arange(self.num_joint)).astype(jnp.int32)
        place = jnp.clip(sizes - 1, 0, problem.max_layers)
        # Of two swaps there are pairs.
        is_joint = (sizes > 2) & guide.is_greedy[place] & (num_failed == 0)
        joint = jnp.where(is_joint[:, None], guide.greedy[place], guide.chain[None])
        turn = num_failed * self.num_pairs + jnp.arange(min(self.num_pairs, guide.is_pair.size))
        turn = jnp.minimum(turn, guide.is_pair.size - 1)
        pairs = jnp.where(guide.is_pair[turn][:, None], guide.pairs[turn], guide.chain[None])
        is_greedy = jnp.concatenate([jnp.zeros(single.shape[0] + pairs.shape[0], bool), is_joint])
        return jnp.concatenate([single, pairs, joint]).astype(jnp.int32), rows, is_greedy
