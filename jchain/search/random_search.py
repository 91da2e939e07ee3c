"""Random search (Bergstra and Bengio 2012, JMLR 13): chains drawn uniformly from the space."""

from typing import NamedTuple

from jchain import env
from jchain._typing import Array, Float, Int, Key
from jchain.arguments import check_at_least_one, checked
from jchain.engine import score_cache
from jchain.engine.score_cache import ScoreCache
from jchain.problem import Problem
from jchain.pytree import pytree_dataclass, static
from jchain.search.protocol import Info


class State(NamedTuple):
    """The losses of the chains that were scored so far."""

    cache: ScoreCache


@pytree_dataclass
class RandomSearch:
    """Uniform random search, the baseline that every other search must beat.

    Attributes:
      num_chains: number of chains per step; the prefixes that they share are charged once.

    Raises:
      ValueError: if `num_chains` is below 1.
    """

    is_deterministic = False
    needs_gradient = False
    needs_invertible = False
    reads_activations = False

    num_chains: int = static(default=64)

    def __post_init__(self) -> None:
        check_at_least_one(num_chains=self.num_chains)

    @checked
    def init(self, key: Key[Array, ""], problem: Problem) -> State:
        """Return the first state, with an empty score cache.

        Args:
          key: the PRNG key; consumed by this call.
          problem: the problem to search.
        """
        return State(score_cache.init(problem))

    @checked
    def start(
        self,
        key: Key[Array, ""],
        state: State,
        problem: Problem,
        chains: Int[Array, "C L"],
        loss: Float[Array, "C"],
    ) -> State:
        """Store the losses of the starts; see `jchain.search.protocol.Startable`.

        Args:
          key: the PRNG key; not used.
          state: the state that `init` returned.
          problem: the problem to search.
          chains: the starts, `[C, L]`.
          loss: their losses, `[C]`.
        """
        return State(score_cache.add(state.cache, problem, chains, loss))

    @checked
    def step(self, key: Key[Array, ""], state: State, problem: Problem) -> tuple[State, Info]:
        """Score chains that are drawn uniformly from the space.

        Args:
          key: the PRNG key; consumed by this call.
          state: the state that `init` or the last step returned.
          problem: the problem to search.
        """
        chains = env.sample_chains(key, problem, self.num_chains)
        cache, loss, layer_calls = score_cache.evaluate_cached(state.cache, problem, chains)
        return State(cache), Info(chains, loss, layer_calls)
