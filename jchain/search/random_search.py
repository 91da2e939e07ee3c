"""Random search (Bergstra and Bengio 2012, JMLR 13): chains drawn uniformly from all of them."""

from typing import NamedTuple

from jchain import chain
from jchain import memo as memo_lib
from jchain._typing import Array, Key
from jchain.memo import Memo
from jchain.problem import Problem
from jchain.pytree import pytree_dataclass, static
from jchain.search.base import Info


class State(NamedTuple):
    """Only what was scored."""

    memo: Memo


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
        return State(memo_lib.init(problem))

    def step(self, key: Key[Array, ""], state: State, problem: Problem) -> tuple[State, Info]:
        bank = problem.bank
        sizes = (bank.num_layers, bank.num_heads, problem.max_layers)
        chains = chain.sample(key, self.num_chains, *sizes, min_layers=problem.min_layers)
        memo, loss, layer_calls = memo_lib.score(state.memo, problem, chains)
        return State(memo), Info(chains, loss, layer_calls)
