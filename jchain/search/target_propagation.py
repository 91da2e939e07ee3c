"""Target propagation: try the layers whose outputs are nearest to the targets of their slots.

The targets are pulled back from the target of the loss (Lee et al. 2015, arXiv:1412.7525;
`jchain.inverse.target_scores`). The paper trains the layers, whereas this search chooses them from
a bank. If no move is better, it restarts from a random chain that is cut at its best prefix.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jchain import env
from jchain._typing import Array, Bool, Float, Int, Key
from jchain.arguments import check_at_least_one, check_flags, check_numbers, checked
from jchain.chain import PADDING
from jchain.engine import score_cache
from jchain.engine.control_flow import cond_in_sequence
from jchain.engine.layer_calls import infer_hidden
from jchain.engine.score_cache import ScoreCache
from jchain.inverse.target_scores import score_candidates_by_target
from jchain.modules.activations import check_one_array
from jchain.problem import Problem
from jchain.pytree import pytree_dataclass, static
from jchain.search.descent import (
    allocate_candidates,
    choose_move,
    sample_candidates,
    sample_start,
)
from jchain.search.protocol import Info


class State(NamedTuple):
    """The state that one step passes to the next."""

    chain: Int[Array, "L"]  # [L], the current chain
    loss: Float[Array, ""]  # the loss of the chain
    score: Float[Array, "M"]  # [M], edit scores of its neighbors; +inf if invalid or tried
    is_new: Bool[Array, ""]  # whether the edits of the chain are not scored yet
    is_start: Bool[Array, ""]  # whether the chain must first be sampled
    num_failed: Int[Array, ""]  # consecutive batches without a better chain
    cache: ScoreCache


@pytree_dataclass
class TargetPropagation:
    """Descent by the distance of layer outputs to their targets, with restarts.

    Attributes:
      num_chains: number of edits to evaluate per step.
      num_candidates: number of layers that are compared at each slot, sampled again for each chain.
        Each group of the bank gets a share in proportion to its size, and at least one.
      patience: number of consecutive batches without a better chain before a restart.
      step_size: step from the outputs toward the target; 1 for the target itself
        (`jchain.inverse.target_scores.score_edits_by_target`).
      is_exact: whether invertible layers are inverted exactly.

    Raises:
      ValueError: if `num_chains`, `num_candidates`, or `patience` is below 1.
    """

    is_deterministic = False
    needs_gradient = True
    needs_invertible = False
    reads_activations = True

    num_chains: int = static(default=8)
    num_candidates: int = static(default=16)
    patience: int = static(default=3)
    step_size: float = 1.0
    is_exact: bool = static(default=False)

    def __post_init__(self) -> None:
        check_at_least_one(
            num_chains=self.num_chains, num_candidates=self.num_candidates, patience=self.patience
        )
        check_flags(is_exact=self.is_exact)
        check_numbers(above=0, step_size=self.step_size)

    @checked
    def check(self, problem: Problem) -> None:
        """Check that activations are one array.

        Args:
          problem: the problem to search.

        Raises:
          ValueError: if they are a pytree of several arrays.
        """
        check_one_array(activations=infer_hidden(problem))

    @checked
    def init(self, key: Key[Array, ""], problem: Problem) -> State:
        """Return the first state, with no chain and an empty score cache.

        Args:
          key: the PRNG key; not used.
          problem: the problem to search.
        """
        return State(
            jnp.full(problem.max_layers + 1, PADDING, jnp.int32),
            jnp.full((), jnp.inf, jnp.float32),
            jnp.full(problem.space.num_neighbors, jnp.inf, jnp.float32),
            jnp.array(True),
            jnp.array(True),
            jnp.zeros((), jnp.int32),
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
          key: the PRNG key; not used.
          state: the state that `init` returned.
          problem: the problem to search.
          chains: the starts, `[C, L]`.
          loss: their losses, `[C]`.
        """
        best = jnp.argmin(loss)
        return state._replace(
            chain=chains[best],
            loss=loss[best].astype(jnp.float32),
            is_start=jnp.array(False),
            cache=score_cache.add(state.cache, problem, chains, loss),
        )

    @checked
    def step(self, key: Key[Array, ""], state: State, problem: Problem) -> tuple[State, Info]:
        """Evaluate the edits with the best scores, and move to the best chain if it is better.

        Args:
          key: the PRNG key; consumed by this call.
          state: the state that `init` or the last step returned.
          problem: the problem to search.
        """
        here, scoring_calls = cond_in_sequence(
            state.is_new,
            self._score_edits,
            lambda _, here, *__: (here, jnp.int32(0)),
            key,
            state._replace(cache=None),
            problem,
            jnp.asarray(self.step_size),
        )
        neighbors, _ = env.neighbors(problem, here.chain)
        gain, rows = jax.lax.top_k(-here.score, min(self.num_chains, here.score.size))
        is_move = jnp.isfinite(gain)
        chains = jnp.where(is_move[:, None], neighbors[rows], here.chain[None]).astype(jnp.int32)
        cache, loss, layer_calls = score_cache.evaluate_cached(state.cache, problem, chains)

        score = here.score.at[rows].set(jnp.inf)
        has_more = jnp.isfinite(score).any()
        move = choose_move(
            here.chain, here.loss, chains, loss, is_move, here.num_failed, self.patience, has_more
        )
        is_new = move.is_better | move.is_stuck
        next_state = State(
            move.chain, move.loss, score, is_new, move.is_stuck, move.num_failed, cache
        )
        own = jnp.where(state.is_new, here.chain, PADDING)
        info = Info(
            jnp.concatenate([own[None], chains]),
            jnp.concatenate([jnp.where(state.is_new, here.loss, jnp.inf)[None], loss]),
            layer_calls + scoring_calls,
        )
        return next_state, info

    def _score_edits(
        self, key: Key[Array, ""], here: State, problem: Problem, step_size: Float[Array, ""]
    ) -> tuple[State, Int[Array, ""]]:
        """Score the edits of the chain, or of a new start chain, and count the layer calls."""
        start_key, key = jax.random.split(key)
        chain = jax.lax.cond(
            here.is_start, lambda: sample_start(start_key, problem), lambda: here.chain
        )
        num_per_group = allocate_candidates(problem, self.num_candidates)
        members = sample_candidates(key, problem, num_per_group)
        scores = score_candidates_by_target(
            problem, chain, members, step_size=step_size, is_exact=self.is_exact
        )
        is_neighbor = env.neighbors(problem, chain)[1]
        start_loss = jnp.where(jnp.isfinite(scores.loss), scores.loss, jnp.inf).astype(jnp.float32)
        found = here._replace(
            chain=chain,
            # Keep the evaluated loss, not the loss from this pass. The two round differently, and
            # then each of two chains with equal losses could seem better than the other.
            loss=jnp.where(here.is_start, start_loss, here.loss),
            score=jnp.where(is_neighbor & ~jnp.isnan(scores.flat), scores.flat, jnp.inf).astype(
                jnp.float32
            ),
        )
        calls = scores.layer_calls + jnp.where(here.is_start, problem.max_layers, 0)
        return found, calls.astype(jnp.int32)
