"""Random search (Bergstra and Bengio 2012, JMLR 13): chains drawn uniformly from the space."""

from typing import NamedTuple

from jchain._typing import Array, Key
from jchain.engine import score_cache
from jchain.engine.score_cache import ScoreCache
from jchain.problem import Problem
from jchain.pytree import pytree_dataclass, static
from jchain.search.base import Info


class State(NamedTuple):
    """The chains scored so far."""

    cache: ScoreCache


@pytree_dataclass
class RandomSearch:
    """Uniform random search, the baseline that every search has to beat.

    Attributes:
      num_chains: chains per step; their shared prefixes are charged once.
    """

    is_deterministic = False
    needs_gradient = False
    needs_invertible = False

    num_chains: int = static(default=64)

    def __post_init__(self) -> None:
        if self.num_chains < 1:
            raise ValueError(f"expected num_chains of at least 1, got {self.num_chains}")

    def init(self, key: Key[Array, ""], problem: Problem) -> State:
        """Return the first state.

        Args:
          key: consumed.
          problem: what to minimize over.
        """
        return State(score_cache.init(problem))

    def step(self, key: Key[Array, ""], state: State, problem: Problem) -> tuple[State, Info]:
        """Score chains drawn from the space.

        Args:
          key: consumed.
          state: from `init` or from the last step.
          problem: what to minimize over.
        """
        chains = problem.space.sample(key, self.num_chains)
        cache, loss, layer_calls = score_cache.evaluate_cached(state.cache, problem, chains)
        return State(cache), Info(chains, loss, layer_calls)
