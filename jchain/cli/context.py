"""The state that all steps of `jchain search` share, and the choice of one chain among many."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jchain._typing import Int
from jchain.bank import Bank
from jchain.chain import PADDING
from jchain.cli.config import SearchConfig
from jchain.cli.scores import ExampleScores, score_chain
from jchain.cli.setup import Setup
from jchain.engine.evaluation import evaluate
from jchain.problem import Problem

# The number of chains that a search keeps, which is the default of `num_finalists`.
_NUM_FINALISTS = 16


class Context(NamedTuple):
    """The state that all steps share."""

    config: SearchConfig
    setup: Setup
    original_bank: Bank  # the bank before any update
    problem: Problem  # the problem on `search`, with layer penalties
    max_layers: int
    # Maximum number of layers in any chain that is scored. All chains are padded to this number of
    # layers, so that they share compiled programs.
    padded_layers: int
    # The chains that searches begin at: the parents that are chains of the problem and, for
    # checkpoints, recipes applied to them.
    starts: Int[np.ndarray, "C L"]
    folder: Path | None = None  # where the bank and the run are saved

    def score(self, bank: Bank, tokens: Sequence[int]) -> ExampleScores:
        """Score one chain on each example of each split.

        Args:
          bank: the layers and heads.
          tokens: tokens of the chain's layers, then of its head.
        """
        return score_chain(self.setup, bank, tokens, self.padded_layers)

    def pick(self, bank: Bank, chains: Int[np.ndarray, "P L"]) -> list[int]:
        """Pick the chain with the lowest loss on the splits in `Setup.deciding_splits`.

        The loss includes layer penalties. Each split is weighted by its number of examples.

        Args:
          bank: the layers and heads.
          chains: int32[P, L]; the padded chains.

        Returns:
          The tokens of the chain, without padding.
        """
        # All calls evaluate arrays of one shape, so that finalists and parents share compiled
        # programs. Copies of the first chain fill the remaining rows.
        shape = max(len(chains), _NUM_FINALISTS), max(chains.shape[1], self.padded_layers + 1)
        rows = np.full(shape, PADDING, np.int32)
        rows[:, : chains.shape[1]] = chains[0]
        rows[: len(chains), : chains.shape[1]] = chains
        total = np.zeros(len(rows))
        for name in self.setup.deciding_splits:
            problem = self.setup.make_problem(bank, name, rows.shape[1] - 1)
            total += len(problem.data.y) * np.asarray(evaluate(problem, rows).loss, np.float64)
        return strip(rows[int(np.argmin(total))])


def strip(row: Int[np.ndarray, "L"]) -> list[int]:
    """Remove the padding from a chain.

    Args:
      row: int32[L]; the tokens of the padded chain.
    """
    return [int(token) for token in row if token != PADDING]
