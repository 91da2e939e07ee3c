"""Types of what `jchain search` writes: the fields of `result.json` and `summary.json`."""

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple, NotRequired, TypeVar, get_type_hints

import numpy as np
from typing_extensions import TypedDict  # pydantic needs it before Python 3.12

from jchain._typing import Array
from jchain.bank import Bank
from jchain.pytree import get_first_line, shorten
from jchain.runs.result import Result

T = TypeVar("T")

# The row of the chain that the search found, in tables and figures.
FOUND = "best chain found"


class Difference(TypedDict):
    """Loss of the best chain found minus loss of a control on `test`, paired by example."""

    mean: float | None
    standard_error: float | None


class Scores(TypedDict):
    """The loss and accuracy of one chain on each split. The loss excludes the layer penalty."""

    loss: dict[str, float | None]  # None if it is not finite
    accuracy: dict[str, float]
    standard_error: NotRequired[dict[str, float | None]]  # of the loss, over examples
    difference: NotRequired[Difference]  # only in controls


class ScoredChain(Scores):
    """A chain and its scores."""

    chain: list[int]


class RandomChains(Scores):
    """Median loss and accuracy of random chains on `test`, and the quartiles of the loss."""

    num_chains: int
    quartiles: list[float | None]


class SweepRow(ScoredChain):
    """The best chain found with at most `max_layers` layers."""

    max_layers: int
    chosen: str
    recipes: dict[str, ScoredChain]


class FinalistRow(TypedDict):
    """One of the best chains of the search. Losses include layer penalties."""

    chain: list[int]
    layers: list[str]
    search_loss: float
    deciding_loss: float | None  # on the splits that decide among finalists, by default `select`
    cost: float  # number of layers, as the command line sets no other costs


class Controls(TypedDict):
    """The scores of the baselines. Controls that do not apply are missing."""

    recipes: dict[str, ScoredChain]
    reference: NotRequired[ScoredChain]  # built by hand, knowing how the data was made
    best_parent: NotRequired[Scores]
    best_edit: NotRequired[ScoredChain]  # of the best parent
    plain_net: NotRequired[Scores]
    tuned_plain_net: NotRequired[Scores]  # trained further on `search`
    random_chains: NotRequired[RandomChains]
    parent_ensemble: NotRequired[Scores]
    finalist_ensemble: NotRequired[Scores]
    local_search: NotRequired[ScoredChain]
    actor_critic: NotRequired[ScoredChain]


class ResultRecord(Scores):
    """`result.json`."""

    best_chain: list[int]
    chosen: str  # "search", or the name of a recipe that beat the search on `select`
    layers: list[str]
    layer_calls: int | float  # a float with --fractions
    update_calls: int
    seconds: float
    optimum: float | None
    num_chains: int
    num_examples: dict[str, int]
    num_tokens: NotRequired[dict[str, int]]  # only of text
    about: str
    controls: Controls
    finalists: NotRequired[list[FinalistRow]]  # neither this nor the next in results of 0.1.0
    num_scored: NotRequired[int]
    nonfinite_chains: int
    stopped_by: NotRequired[str]  # what stopped the search before its end
    config: dict[str, object]
    signature: NotRequired[str | None]  # of the config (`jchain.cli.trust`)
    versions: dict[str, str]
    sweep: NotRequired[list[SweepRow]]


class Configured(TypedDict):
    """What both records say about how they were made."""

    config: dict[str, object]
    signature: NotRequired[str | None]


class SearchOutput(NamedTuple):
    """Everything that `jchain search` writes and prints."""

    record: ResultRecord
    bank: Bank
    result: Result
    levels: dict[str, float]  # losses on `search`, with penalties: lines in the plot of the curve
    stopped_by: str | None = None  # what stopped it; later controls are missing


class SeedRow(TypedDict):
    """One row of the table over seeds: the best chain found, or a control."""

    loss: list[float | None]  # on `test`, by seed
    accuracy: list[float]
    mean: float | None
    standard_error: float | None  # of the mean, over seeds
    mean_accuracy: float
    # Loss of the best chain found minus loss of this row, paired by seed.
    difference: float | None
    interval: list[float] | None  # 95%, Student's t
    num_lower: int  # number of seeds in which the best chain found has the lower loss


class Summary(TypedDict):
    """`summary.json`: the results of several seeds."""

    seeds: list[int]
    about: list[str]
    layers: list[list[str]]
    num_examples: dict[str, int]
    rows: dict[str, SeedRow]
    sentence: str
    seconds: float
    config: dict[str, object]
    signature: NotRequired[str | None]  # of the config (`jchain.cli.trust`)
    versions: dict[str, str]


def read(path: Path, kind: type[T], required: Collection[str]) -> T:
    """Read a record, and check the types of its fields. Older results have fewer fields.

    Args:
      path: the file.
      kind: the type of the record.
      required: the fields that the caller needs.

    Raises:
      OSError: if the file cannot be read.
      ValueError: with the name of the file and of the first field that is missing or has another
        type.
    """
    try:
        value = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"cannot read {path}: {get_first_line(error)}") from None
    if not isinstance(value, dict):
        raise ValueError(f"cannot read {path}: expected fields, got {shorten(value)}")
    if missing := [name for name in required if name not in value]:
        raise ValueError(f"cannot read {path}: expected the field {missing[0]}, got none")
    for name, hint in get_type_hints(kind).items():
        if name in value:
            check_type(value[name], hint, path, name)
    return value  # pyright: ignore[reportReturnType]


def check_type(value: object, kind: Any, path: Path, field: str) -> None:
    """Check that a value of a file has a type.

    Args:
      value: the value.
      kind: the type, as in an annotation.
      path: the file, for errors.
      field: the name of the value in the file.

    Raises:
      ValueError: with the name of the file and of the first field that is missing or has another
        type.
    """
    from pydantic import TypeAdapter, ValidationError

    try:
        TypeAdapter(kind).validate_python(value, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = ".".join(map(str, (field, *first["loc"])))
        raise ValueError(
            f"cannot read the {name} of {path}: {first['msg']}, got {shorten(first['input'])}"
        ) from None


def finite_or_none(loss: float | Array | np.ndarray | np.floating) -> float | None:
    """Convert a loss for JSON, which has no infinity: None if it is not finite.

    Args:
      loss: a scalar.
    """
    return float(loss) if np.isfinite(loss) else None


def format_loss(loss: float | None, digits: int = 3) -> str:
    """Format a loss for a table.

    Args:
      loss: a loss from a record; None stands for one that is not finite.
      digits: the number of decimals.
    """
    return "not finite" if loss is None else f"{loss:.{digits}f}"


def format_calls(layer_calls: int | float) -> str:
    """Format layer calls: whole ones as they are, a number with a fraction with one decimal.

    Args:
      layer_calls: the layer calls of a record.
    """
    return f"{layer_calls:,.1f}" if isinstance(layer_calls, float) else f"{layer_calls:,}"
