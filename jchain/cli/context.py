"""What all steps of `jchain search` share, and how one chain is picked of many."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jchain._typing import Int
from jchain.bank import Bank
from jchain.chain import PADDING
from jchain.cli.config import SearchConfig
from jchain.cli.scores import ExampleScores, score_chain
from jchain.cli.setup import Setup
from jchain.engine.evaluate import evaluate
from jchain.problem import Problem

# Chains that a search keeps.
_NUM_FINALISTS = 16


class Context(NamedTuple):
    """What all steps share."""

    config: SearchConfig
    setup: Setup
    made: Bank  # before updates
    problem: Problem  # on `search`, penalties included
    max_layers: int
    width: int  # most layers of a scored chain; one width shares compiled programs

    def score(self, bank: Bank, tokens: Sequence[int]) -> ExampleScores:
        """Score one chain on each example of each split.

        Args:
          bank: layers and heads.
          tokens: layers, then a head.
        """
        return score_chain(self.setup, bank, tokens, self.width)

    def pick(self, bank: Bank, chains: Int[np.ndarray, "P L"]) -> list[int]:
        """The tokens of the chain with the lowest loss on the splits that decide.

        Penalties are included. Each split counts by its number of examples.

        Args:
          bank: layers and heads.
          chains: `[P, L]`.
        """
        # One shape, so that finalists and parents share programs: the first chain fills the rest.
        shape = max(len(chains), _NUM_FINALISTS), max(chains.shape[1], self.width + 1)
        rows = np.full(shape, PADDING, np.int32)
        rows[:, : chains.shape[1]] = chains[0]
        rows[: len(chains), : chains.shape[1]] = chains
        total = np.zeros(len(rows))
        for name in self.setup.deciding_splits:
            problem = self.setup.make_problem(bank, name, rows.shape[1] - 1)
            total += len(problem.data.y) * np.asarray(evaluate(problem, rows).loss, np.float64)
        return strip(rows[int(np.argmin(total))])


def strip(row: Int[np.ndarray, "L"]) -> list[int]:
    """The tokens of a chain without padding.

    Args:
      row: tokens, `[L]`.
    """
    return [int(token) for token in row if token != PADDING]
