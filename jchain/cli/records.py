"""What a main job leaves behind, as `result.json` has it."""

from typing import NamedTuple, NotRequired, TypedDict

from jchain.bank import Bank
from jchain.search.base import Result


class Scores(TypedDict):
    """Loss, None if it is not finite, and accuracy of one chain by split, without layer penalty."""

    loss: dict[str, float | None]
    accuracy: dict[str, float]


class ScoredChain(Scores):
    """A chain and its scores."""

    chain: list[int]


class SweepRow(ScoredChain):
    """What was found with at most `max_layers` layers."""

    max_layers: int
    chosen: str
    recipes: dict[str, ScoredChain]


class Controls(TypedDict):
    """What the chain found is compared with."""

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


class Job(NamedTuple):
    """Everything that a search leaves behind."""

    record: ResultRecord
    bank: Bank
    run: Result
    levels: dict[str, float]  # losses on `search` to compare the curve with, penalties included
