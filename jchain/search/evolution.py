"""Regularized evolution (Real, Aggarwal, Huang and Le 2018, arXiv:1802.01548): tournaments choose parents, the oldest die."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jchain import chain as chain_lib
from jchain._typing import Array, Float, Int, Key
from jchain.engine import score_cache
from jchain.engine.score_cache import ScoreCache
from jchain.problem import Problem
from jchain.pytree import pytree_dataclass, static
from jchain.search.base import Info


class State(NamedTuple):
    """The population, as a ring: the next child takes the place of the oldest."""

    chains: Int[Array, "Q L"]  # [Q, L]
    loss: Float[Array, "Q"]  # [Q], +inf before it is full
    num_born: Int[Array, ""]
    cache: ScoreCache


@pytree_dataclass
class Evolution:
    """Regularized (aging) evolution; a mutation is one edit, as in `jchain.chain.neighbors`.

    Attributes:
      population_size: chains alive, Q; the first ones are random.
      tournament_size: chains drawn, with replacement, of which the best is parent.
      num_chains: children per step, which are born at once.
    """

    population_size: int = static(default=64)
    tournament_size: int = static(default=16)
    num_chains: int = static(default=8)

    def __post_init__(self) -> None:
        if (
            min(self.population_size, self.tournament_size) < 1
            or not 1 <= self.num_chains <= self.population_size
        ):
            raise ValueError(
                f"expected population_size, tournament_size and num_chains of at least 1, no more children than "
                f"population_size, got {self.population_size}, {self.tournament_size} and {self.num_chains}"
            )

    def init(self, key: Key[Array, ""], problem: Problem) -> State:
        shape = (self.population_size, problem.max_layers + 1)
        chains = jnp.full(shape, chain_lib.PADDING, jnp.int32)
        return State(chains, jnp.full(shape[0], jnp.inf), jnp.array(0), score_cache.init(problem))

    def step(self, key: Key[Array, ""], state: State, problem: Problem) -> tuple[State, Info]:
        random_key, draw_key, mutate_key = jax.random.split(key, 3)
        sizes = (problem.bank.num_layers, problem.bank.num_heads, problem.max_layers)
        random = chain_lib.sample(
            random_key, self.num_chains, *sizes, min_layers=problem.min_layers
        )
        drawn = jax.random.randint(
            draw_key, (self.num_chains, self.tournament_size), 0, self.population_size
        )
        winner = jnp.take_along_axis(drawn, jnp.argmin(state.loss[drawn], axis=1)[:, None], axis=1)[
            :, 0
        ]
        keys = jax.random.split(mutate_key, self.num_chains)
        children = jax.vmap(mutate, in_axes=(0, 0, None))(keys, state.chains[winner], problem)
        chains = jnp.where(state.num_born < self.population_size, random, children)
        cache, loss, layer_calls = score_cache.evaluate_cached(state.cache, problem, chains)
        place = (state.num_born + jnp.arange(self.num_chains)) % self.population_size
        next_state = State(
            state.chains.at[place].set(chains),
            state.loss.at[place].set(loss.astype(state.loss.dtype)),
            state.num_born + self.num_chains,
            cache,
        )
        return next_state, Info(chains, loss, layer_calls)


def mutate(key: Key[Array, ""], chain: Int[Array, "L"], problem: Problem) -> Int[Array, "L"]:
    """A neighbor of a chain, each as likely; the chain itself where it has none."""
    rows, is_neighbor = chain_lib.neighbors(
        chain, problem.bank.num_layers, problem.bank.num_heads, min_layers=problem.min_layers
    )
    row = jax.random.categorical(key, jnp.where(is_neighbor, 0.0, -jnp.inf))
    return jnp.where(is_neighbor.any(), rows[row], chain)
