"""Regularized evolution (Real, Aggarwal, Huang, and Le 2018, arXiv:1802.01548).

Parents are chosen by tournaments, and the oldest chains leave the population.
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
from jchain.search.moves import EDITS, MoveKind, check_kinds, draw_move, read_kinds
from jchain.search.protocol import Info


class State(NamedTuple):
    """The population as a ring buffer, in which a new child replaces the oldest chain."""

    chains: Int[Array, "Q L"]  # [Q, L]
    loss: Float[Array, "Q"]  # [Q], +inf in rows that are not yet filled
    num_born: Int[Array, ""]  # the number of chains added so far
    cache: ScoreCache


@pytree_dataclass
class Evolution:
    """Regularized (aging) evolution, whose mutations are single edits or larger moves.

    Attributes:
      population_size: number of chains in the population, Q; the first ones are random.
      tournament_size: number of chains that are drawn, with replacement, for a tournament. The best
        of them becomes the parent.
      num_chains: number of children per step; all are added to the population at once.
      moves: the kinds of mutations, which are equally likely: some of "edits", "switches", and
        "runs" (`jchain.search.moves`).

    Raises:
      ValueError: if a size is below 1, `num_chains` exceeds `population_size`, or `moves` is
        invalid.
    """

    is_deterministic = False
    needs_gradient = False
    needs_invertible = False
    reads_activations = False

    population_size: int = static(default=64)
    tournament_size: int = static(default=16)
    num_chains: int = static(default=8)
    moves: Sequence[MoveKind] = static(default=EDITS)

    def __post_init__(self) -> None:
        check_at_least_one(
            population_size=self.population_size,
            tournament_size=self.tournament_size,
            num_chains=self.num_chains,
        )
        if self.num_chains > self.population_size:
            raise ValueError(
                "expected num_chains to be at most population_size, got "
                f"{self.num_chains} and {self.population_size}"
            )
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
        """Return the first state, with an empty population.

        Args:
          key: the PRNG key; consumed by this call.
          problem: the problem to search.
        """
        shape = (self.population_size, problem.max_layers + 1)
        chains = jnp.full(shape, PADDING, jnp.int32)
        return State(chains, jnp.full(shape[0], jnp.inf), jnp.array(0), score_cache.init(problem))

    @checked
    def start(
        self,
        key: Key[Array, ""],
        state: State,
        problem: Problem,
        chains: Int[Array, "C L"],
        loss: Float[Array, "C"],
    ) -> State:
        """Put the best starts into the population; see `jchain.search.protocol.Startable`.

        Args:
          key: the PRNG key; not used.
          state: the state that `init` returned.
          problem: the problem to search.
          chains: the starts, `[C, L]`.
          loss: their losses, `[C]`.
        """
        size = min(len(chains), self.population_size)
        best = jnp.argsort(loss)[:size]
        return State(
            state.chains.at[:size].set(chains[best]),
            state.loss.at[:size].set(loss[best].astype(state.loss.dtype)),
            jnp.full_like(state.num_born, size),
            score_cache.add(state.cache, problem, chains, loss),
        )

    @checked
    def step(self, key: Key[Array, ""], state: State, problem: Problem) -> tuple[State, Info]:
        """Score children of tournament winners, or random chains until the population is full.

        Args:
          key: the PRNG key; consumed by this call.
          state: the state that `init` or the last step returned.
          problem: the problem to search.
        """
        random_key, draw_key, mutate_key = jax.random.split(key, 3)
        random = env.sample_chains(random_key, problem, self.num_chains)
        shape = (self.num_chains, self.tournament_size)
        drawn = jax.random.randint(draw_key, shape, 0, self.population_size, jnp.int32)
        best = jnp.argmin(state.loss[drawn], axis=1)
        winner = jnp.take_along_axis(drawn, best[:, None], axis=1)[:, 0]
        keys = jax.random.split(mutate_key, self.num_chains)
        children = jax.vmap(self._mutate, in_axes=(0, 0, None))(keys, state.chains[winner], problem)
        chains = jnp.where(state.num_born < self.population_size, random, children)
        cache, loss, layer_calls = score_cache.evaluate_cached(state.cache, problem, chains)
        row = (state.num_born + jnp.arange(self.num_chains)) % self.population_size
        next_state = State(
            state.chains.at[row].set(chains),
            state.loss.at[row].set(loss.astype(state.loss.dtype)),
            state.num_born + self.num_chains,
            cache,
        )
        return next_state, Info(chains, loss, layer_calls)

    def _mutate(
        self, key: Key[Array, ""], chain: Int[Array, "L"], problem: Problem
    ) -> Int[Array, "L"]:
        return draw_move(key, problem, chain, self.moves)
