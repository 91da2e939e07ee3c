"""The state that all steps of `jchain search` share, and the choice of one chain among many."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jchain._typing import Float, Int
from jchain.bank import Bank
from jchain.chain import PADDING
from jchain.cli.config import SearchConfig
from jchain.cli.progress import evaluate_in_parts
from jchain.cli.scores import ExampleScores, score_chain
from jchain.cli.setup import Setup
from jchain.problem import Problem

# The number of chains that a search keeps, which is the default of `num_finalists`.
_NUM_FINALISTS = 16
# The number of chains of pretrained blocks that are evaluated between two updates of the progress.
_PART_SIZE = 8


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

    @property
    def part_size(self) -> int | None:
        """The number of chains that are evaluated at a time, so that progress can be shown.

        It is None if all of them take seconds.
        """
        return _PART_SIZE if self.config.checkpoint else None

    def pick(self, bank: Bank, chains: Int[np.ndarray, "P L"]) -> list[int]:
        """Pick the chain with the lowest loss on the splits in `Setup.deciding_splits`.

        Args:
          bank: the layers and heads.
          chains: int32[P, L]; the padded chains.

        Returns:
          The tokens of the chain, without padding.
        """
        return strip(chains[int(np.argmin(self.rank(bank, chains)))])

    def rank(self, bank: Bank, chains: Int[np.ndarray, "P L"]) -> Float[np.ndarray, "P"]:
        """Compute the losses of chains on the splits in `Setup.deciding_splits`.

        The losses include layer penalties. Each split is weighted by its number of examples.

        Args:
          bank: the layers and heads.
          chains: int32[P, L]; the padded chains.
        """
        # All calls evaluate arrays of one shape, so that finalists and parents share compiled
        # programs. Copies of the first chain fill the remaining rows.
        shape = max(len(chains), _NUM_FINALISTS), max(chains.shape[1], self.padded_layers + 1)
        rows = np.full(shape, PADDING, np.int32)
        rows[:, : chains.shape[1]] = chains[0]
        rows[: len(chains), : chains.shape[1]] = chains
        total, num_examples = np.zeros(len(rows)), 0
        for name in self.setup.deciding_splits:
            problem = self.setup.make_problem(bank, name, rows.shape[1] - 1)
            title = f"Scoring {len(chains)} chains on {name}"
            scores = evaluate_in_parts(problem, rows, title, self.part_size)
            total += problem.num_examples * scores.loss.astype(np.float64)
            num_examples += problem.num_examples
        return total[: len(chains)] / num_examples


def strip(row: Int[np.ndarray, "L"]) -> list[int]:
    """Remove the padding from a chain.

    Args:
      row: int32[L]; the tokens of the padded chain.
    """
    return [int(token) for token in row if token != PADDING]
