"""The output of `jchain search`, with the fields of `result.json`."""

from typing import NamedTuple, NotRequired, TypedDict

import numpy as np

from jchain._typing import Array
from jchain.bank import Bank
from jchain.search.base import Result


class Scores(TypedDict):
    """Loss and accuracy of one chain by split. The loss has no layer penalty."""

    loss: dict[str, float | None]  # None if it is not finite
    accuracy: dict[str, float]


class ScoredChain(Scores):
    """A chain and its scores."""

    chain: list[int]


class SweepRow(ScoredChain):
    """The chain that was found with at most `max_layers` layers."""

    max_layers: int
    chosen: str
    recipes: dict[str, ScoredChain]


class Controls(TypedDict):
    """Scores to compare the chain found with."""

    best_parent: Scores
    random_chain: Scores
    recipes: dict[str, ScoredChain]


class ResultRecord(Scores):
    """`result.json`."""

    best_chain: list[int]
    chosen: str  # "search", or the recipe that is better on `select`
    layers: list[str]
    layer_calls: int
    update_calls: int
    seconds: float
    optimum: float | None
    controls: Controls
    nonfinite_chains: int
    config: dict[str, object]
    versions: dict[str, str]
    sweep: NotRequired[list[SweepRow]]


class SearchOutput(NamedTuple):
    """Everything that `jchain search` writes and prints."""

    record: ResultRecord
    bank: Bank
    result: Result
    levels: dict[str, float]  # losses on `search` to compare the curve with, penalties included


def finite_or_none(loss: float | Array | np.ndarray) -> float | None:
    """A loss for JSON, which has no infinity.

    Args:
      loss: one number.
    """
    return float(loss) if np.isfinite(loss) else None
