"""The state that all steps of `jchain search` share, and the choice of one chain among many."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from jchain import chain as chain_lib
from jchain._typing import Float, Int
from jchain.bank import Bank
from jchain.chain import PADDING
from jchain.cli.config import SearchConfig
from jchain.cli.scores import ExampleScores, Scorer
from jchain.cli.setup import Setup
from jchain.problem import Problem


class Context(NamedTuple):
    """The state that all steps share."""

    config: SearchConfig
    setup: Setup
    original_bank: Bank  # the bank before any update
    problem: Problem  # the problem on `search`, with layer penalties
    max_layers: int
    # Maximum number of layers in any chain that is compared with the one that was found. They are
    # padded to this number of layers, so that they share compiled programs.
    padded_layers: int
    # The chains that searches begin at: the parents that are chains of the problem and, for
    # checkpoints, recipes applied to them.
    starts: Int[np.ndarray, "C L"]
    scorer: Scorer
    folder: Path | None = None  # where the bank and the run are saved

    def score(self, bank: Bank, tokens: Sequence[int]) -> ExampleScores:
        """Score one chain on each example of each split, unless it was scored before.

        Args:
          bank: the layers and heads.
          tokens: tokens of the chain's layers, then of its head.
        """
        return self.scorer.score(bank, [tokens])[0]

    def pick(self, bank: Bank, chains: Sequence[Sequence[int]]) -> list[int]:
        """Pick the chain with the lowest loss on the splits in `Setup.deciding_splits`.

        Args:
          bank: the layers and heads.
          chains: the tokens of each chain, without padding.
        """
        return [*chains[int(np.argmin(self.rank(bank, chains)))]]

    def rank(self, bank: Bank, chains: Sequence[Sequence[int]]) -> Float[np.ndarray, "P"]:
        """Compute the losses of chains on the splits in `Setup.deciding_splits`.

        The losses include layer penalties, and are `+inf` if they are not finite. Each split is
        weighted by its number of examples.

        Args:
          bank: the layers and heads.
          chains: the tokens of each chain, without padding.
        """
        splits = self.setup.deciding_splits
        scores = self.scorer.score(bank, chains, splits)
        means = [np.concatenate([one.loss[name] for name in splits]).mean() for one in scores]
        longest = max(1, *(len(tokens) - 1 for tokens in chains))
        problem = self.setup.make_problem(bank, splits[0], longest)
        penalty = problem.penalty(jnp.asarray(chain_lib.pad(chains, longest)))
        losses = np.array(means) + np.asarray(penalty, np.float64)
        return np.where(np.isfinite(losses), losses, np.inf)


def strip(row: Int[np.ndarray, "L"]) -> list[int]:
    """Remove the padding from a chain.

    Args:
      row: int32[L]; the tokens of the padded chain.
    """
    return [int(token) for token in row if token != PADDING]
