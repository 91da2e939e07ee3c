"""Random search (Bergstra and Bengio 2012, JMLR 13): chains drawn uniformly from all of them."""

from typing import NamedTuple

from jchain import chain
from jchain._typing import Array, Key
from jchain.evaluate import evaluate
from jchain.problem import Problem
from jchain.pytree import pytree_dataclass, static
from jchain.search.base import Info


class State(NamedTuple):
    """Nothing is remembered."""


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
        return State()

    def step(self, key: Key[Array, ""], state: State, problem: Problem) -> tuple[State, Info]:
        bank = problem.bank
        chains = chain.sample(key, self.num_chains, bank.num_layers, bank.num_heads, problem.max_layers)
        out = evaluate(problem, chains)
        return state, Info(chains, out.loss, out.layer_calls)
