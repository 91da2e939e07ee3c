"""Random search (Bergstra and Bengio 2012, JMLR 13): chains drawn uniformly from all of them."""

from typing import NamedTuple

from jchain import chain
from jchain._typing import Array, Key
from jchain.engine import score_cache
from jchain.engine.score_cache import ScoreCache
from jchain.problem import Problem
from jchain.pytree import pytree_dataclass, static
from jchain.search.base import Info


class State(NamedTuple):
    """Only what was scored."""

    cache: ScoreCache


@pytree_dataclass
class RandomSearch:
    """The control that every search has to beat.

    Attributes:
      num_chains: chains per step; their shared prefixes are charged once.
    """

    num_chains: int = static(default=64)

    def __post_init__(self) -> None:
        if self.num_chains < 1:
            raise ValueError(f"expected num_chains of at least 1, got {self.num_chains}")

    def init(self, key: Key[Array, ""], problem: Problem) -> State:
        return State(score_cache.init(problem))

    def step(self, key: Key[Array, ""], state: State, problem: Problem) -> tuple[State, Info]:
        bank = problem.bank
        sizes = (bank.num_layers, bank.num_heads, problem.max_layers)
        chains = chain.sample(key, self.num_chains, *sizes, min_layers=problem.min_layers)
        cache, loss, layer_calls = score_cache.evaluate_cached(state.cache, problem, chains)
        return State(cache), Info(chains, loss, layer_calls)
