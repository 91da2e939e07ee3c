"""Descent by linearized scores: one pass along a chain scores all its edits and joint moves.

To first order, swaps change the outputs additively, so pairs of swaps and larger moves are
predicted without further layer calls. The most promising moves are then evaluated exactly. The
number of slots that a greedy move may change is a trust region (Conn, Gould, and Toint 2000,
Trust-Region Methods). If no move is better, the search restarts from a random chain that is cut at
its best prefix.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jchain import env
from jchain._typing import Array, Bool, Float, Int, Key
from jchain.arguments import check_at_least_one, check_integers, checked
from jchain.chain import PADDING
from jchain.engine import score_cache
from jchain.engine.control_flow import cond_in_sequence
from jchain.engine.score_cache import ScoreCache
from jchain.gradient.edit_scores import choose_products, score_candidates
from jchain.problem import Problem
from jchain.pytree import pytree_dataclass, static
from jchain.search.descent import (
    Move,
    allocate_candidates,
    choose_move,
    sample_candidates,
    sample_start,
)
from jchain.search.protocol import Info

# The maximum number of swaps of a greedy move after a restart.
_START_RADIUS = 4.0


class LinearizedChain(NamedTuple):
    """A chain, and the moves that a pass along it predicts."""

    chain: Int[Array, "L"]  # [L]
    loss: Float[Array, ""]  # the loss of the chain
    score: Float[Array, "M"]  # [M], edit scores of its neighbors; +inf if invalid or tried
    greedy: Int[Array, "L L"]  # [L, L], the chain after 1, 2, ... swaps
    is_greedy: Bool[Array, "L"]  # [L], False for greedy moves without enough swaps
    pairs: Int[Array, "Q L"]  # [Q, L], the chain after two swaps, best first
    is_pair: Bool[Array, "Q"]  # [Q], False for rows without a pair
    layer_calls: Int[Array, ""]  # the cost of the pass


class State(NamedTuple):
    """The state that one step passes to the next."""

    linearized: LinearizedChain
    is_new: Bool[Array, ""]  # whether the chain needs a pass
    is_start: Bool[Array, ""]  # whether the chain must first be sampled
    radius: Float[Array, ""]  # the maximum number of swaps of a greedy move
    num_failed: Int[Array, ""]  # consecutive batches without a better chain
    cache: ScoreCache


@pytree_dataclass
class LinearizedSearch:
    """Descent by linearized scores, with restarts.

    Attributes:
      num_single: number of single edits to evaluate per step, most promising first.
      num_pairs: number of pairs of swaps to evaluate per step, most promising first.
      num_greedy: number of greedy moves to evaluate per step. The first makes as many swaps as the
        trust region allows, and each further move makes half as many as the one before.
      num_candidates: number of layers that a pass scores at each slot. Each group of the bank gets
        a share in proportion to its size, and at least one. If the bank has more layers than
        candidates, every step makes a pass with newly sampled candidates. Otherwise, only a new
        chain needs a pass.
      num_best: number of swaps at each slot from which pairs are made; None to derive the number
        from `max_layers`.
      patience: number of consecutive batches without a better chain before a restart.
      num_products: maximum number of vector-Jacobian products of a pass
        (`jchain.gradient.score_edits`). None to use 2 if the loss is a softmax over classes, and
        the default of `score_edits` otherwise.

    Raises:
      ValueError: if a size is too small; only `num_pairs` and `num_greedy` may be 0.
    """

    is_deterministic = False
    needs_gradient = True
    needs_invertible = False
    reads_activations = True

    num_single: int = static(default=4)
    num_pairs: int = static(default=4)
    num_greedy: int = static(default=2)
    num_candidates: int = static(default=16)
    num_best: int | None = static(default=None)
    patience: int = static(default=2)
    num_products: int | None = static(default=None)

    def __post_init__(self) -> None:
        check_at_least_one(
            num_single=self.num_single, num_candidates=self.num_candidates, patience=self.patience
        )
        check_integers(at_least=0, num_pairs=self.num_pairs, num_greedy=self.num_greedy)
        optional = {"num_best": self.num_best, "num_products": self.num_products}
        check_at_least_one(**{name: size for name, size in optional.items() if size is not None})

    @checked
    def init(self, key: Key[Array, ""], problem: Problem) -> State:
        """Return the first state, with no chain and an empty score cache.

        Args:
          key: the PRNG key; not used.
          problem: the problem to search.
        """
        num_slots = problem.max_layers + 1
        linearized = LinearizedChain(
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
            linearized, jnp.array(True), jnp.array(True), radius, zero, score_cache.init(problem)
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
          key: the PRNG key; not used.
          state: the state that `init` returned.
          problem: the problem to search.
          chains: the starts, `[C, L]`.
          loss: their losses, `[C]`.
        """
        best = jnp.argmin(loss)
        linearized = state.linearized._replace(
            chain=chains[best], loss=loss[best].astype(jnp.float32)
        )
        return state._replace(
            linearized=linearized,
            is_start=jnp.array(False),
            cache=score_cache.add(state.cache, problem, chains, loss),
        )

    @checked
    def step(self, key: Key[Array, ""], state: State, problem: Problem) -> tuple[State, Info]:
        """Evaluate the most promising moves, and move to the best chain if it is better.

        Args:
          key: the PRNG key; consumed by this call.
          state: the state that `init` or the last step returned.
          problem: the problem to search.
        """
        linearized = self._update_linearized(key, state, problem)
        chains, rows, is_joint = self._propose(state, linearized, problem)
        cache, loss, layer_calls = score_cache.evaluate_cached(state.cache, problem, chains)

        # Rows without a move hold the chain itself, whose loss here may be lower due to rounding.
        is_move = (chains != linearized.chain[None]).any(axis=1)
        score = linearized.score.at[rows].set(jnp.inf, mode="drop")
        has_more = jnp.isfinite(score).any()
        move = choose_move(
            linearized.chain,
            linearized.loss,
            chains,
            loss,
            is_move,
            state.num_failed,
            self.patience,
            has_more,
        )
        num_candidates = sum(allocate_candidates(problem, self.num_candidates))
        next_state = State(
            linearized._replace(chain=move.chain, loss=move.loss, score=score),
            move.is_better | move.is_stuck | (num_candidates < problem.bank.num_layers),
            move.is_stuck,
            _update_radius(state.radius, move, is_move, is_joint, problem.max_layers),
            move.num_failed,
            cache,
        )
        own = jnp.where(state.is_new, linearized.chain, PADDING)
        info = Info(
            jnp.concatenate([own[None], chains]),
            jnp.concatenate([jnp.where(state.is_new, linearized.loss, jnp.inf)[None], loss]),
            layer_calls + jnp.where(state.is_new, linearized.layer_calls, 0),
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

    def _update_linearized(
        self, key: Key[Array, ""], state: State, problem: Problem
    ) -> LinearizedChain:
        """Make a pass along a new chain; otherwise, return the result of the last pass."""
        return cond_in_sequence(
            state.is_new,
            self._pass,
            lambda _, state, __: state.linearized,
            key,
            state._replace(cache=None),
            problem,
        )

    def _pass(self, key: Key[Array, ""], state: State, problem: Problem) -> LinearizedChain:
        """Score the edits and joint moves of the current chain, or of a new start chain."""
        start_key, key = jax.random.split(key)
        chain = jax.lax.cond(
            state.is_start, lambda: sample_start(start_key, problem), lambda: state.linearized.chain
        )
        num_per_group = allocate_candidates(problem, self.num_candidates)
        scores, joint = score_candidates(
            problem,
            chain,
            sample_candidates(key, problem, num_per_group),
            num_best=self._count_best(problem),
            num_pairs=max(self._count_pairs(problem), 1),
            num_products=self.num_products or choose_products(problem),
        )
        is_neighbor = env.neighbors(problem, chain)[1]
        start_loss = jnp.where(jnp.isfinite(scores.loss), scores.loss, jnp.inf).astype(jnp.float32)

        def is_allowed(chains: Array, score: Array) -> Array:
            is_over = problem.exceeds_limit(problem.chain_cost(chains))
            # Each swap may be legal, but not both together, if positions must rise.
            return ~jnp.isnan(score) & ~is_over & problem.space.contains(chains)

        return LinearizedChain(
            chain,
            # Keep the evaluated loss, not the loss from the pass. The two round differently, and
            # then each of two chains with equal losses could seem better than the other.
            jnp.where(state.is_start, start_loss, state.linearized.loss),
            jnp.where(is_neighbor & ~jnp.isnan(scores.flat), scores.flat, jnp.inf).astype(
                jnp.float32
            ),
            joint.greedy.astype(jnp.int32),
            is_allowed(joint.greedy, joint.greedy_score),
            joint.pairs[: self._count_pairs(problem)].astype(jnp.int32),
            is_allowed(joint.pairs, joint.pair_score)[: self._count_pairs(problem)],
            (scores.layer_calls + jnp.where(state.is_start, problem.max_layers, 0)).astype(
                jnp.int32
            ),
        )

    def _propose(
        self, state: State, linearized: LinearizedChain, problem: Problem
    ) -> tuple[Array, Array, Array]:
        """Propose chains to evaluate.

        Returns the chains, the neighbor rows of the single edits, which come first, and a mask of
        the greedy moves. Rows without a move hold the chain itself.
        """
        # No pair of a new pass has been tried yet.
        num_failed = jnp.where(state.is_new, 0, state.num_failed)
        neighbors, _ = env.neighbors(problem, linearized.chain)
        gain, rows = jax.lax.top_k(-linearized.score, min(self.num_single, linearized.score.size))
        single = jnp.where(jnp.isfinite(gain)[:, None], neighbors[rows], linearized.chain[None])
        sizes = jnp.floor(state.radius / 2.0 ** jnp.arange(self.num_greedy)).astype(jnp.int32)
        place = jnp.clip(sizes - 1, 0, problem.max_layers)
        # A greedy move of two swaps would only repeat a pair.
        is_joint = (sizes > 2) & linearized.is_greedy[place] & (num_failed == 0)
        joint = jnp.where(is_joint[:, None], linearized.greedy[place], linearized.chain[None])
        num_pairs = linearized.is_pair.size
        row = num_failed * self.num_pairs + jnp.arange(min(self.num_pairs, num_pairs))
        row = jnp.minimum(row, num_pairs - 1)
        is_pair = linearized.is_pair[row][:, None]
        pairs = jnp.where(is_pair, linearized.pairs[row], linearized.chain[None])
        is_greedy = jnp.concatenate([jnp.zeros(single.shape[0] + pairs.shape[0], bool), is_joint])
        return jnp.concatenate([single, pairs, joint]).astype(jnp.int32), rows, is_greedy


def _update_radius(
    radius: Float[Array, ""],
    move: Move,
    is_move: Bool[Array, "P"],
    is_joint: Bool[Array, "P"],
    max_layers: int,
) -> Float[Array, ""]:
    """Double the trust region after a successful greedy move, and halve it after failed ones."""
    has_greedy_move = (is_move & is_joint).any()
    is_success = move.is_better & is_joint[move.best]
    factor = jnp.where(has_greedy_move, jnp.where(is_success, 2.0, 0.5), 1.0)
    return jnp.where(
        move.is_stuck, _START_RADIUS, jnp.clip(factor * radius, 2.0, max(max_layers, 2))
    )
