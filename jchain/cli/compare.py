"""`jchain compare`: one table of several results, with intervals over seeds."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jchain.cli.records import ResultRecord, finite_or_none, format_loss, read
from jchain.cli.result_folder import RESULT_FILE, SUMMARY_FILE
from jchain.cli.seeds import compare_pairs
from jchain.cli.tables import TextTable
from jchain.data import EVALUATION_SPLITS

# Options in which the seeds of one search may differ.
BY_SEED = ("seed", "num_seeds", "out", "command")
_NEEDED = ("loss", "layers", "layer_calls", "seconds", "config")


class Compared(NamedTuple):
    """The results of one search with one or several seeds."""

    name: str  # the first folder
    seeds: list[int]
    loss: dict[str, list[float | None]]  # by split, one per seed
    layer_calls: list[int | float]
    seconds: list[float]
    layers: list[str]  # of the seed with the lowest loss on `select`
    stopped_by: str | None  # what stopped the search before its end, if it was stopped


class SeedResult(NamedTuple):
    """The result of one seed."""

    name: str  # the folder that was given
    folder: Path  # the folder of the seed
    record: ResultRecord


def group_results(paths: Sequence[Path]) -> list[list[SeedResult]]:
    """Read results, and group those that differ only in their seeds.

    Args:
      paths: result folders of one seed, or of several.

    Raises:
      ValueError: if a path is no result folder.
    """
    groups: dict[str, list[SeedResult]] = {}
    for path in paths:
        for result in _read(path):
            config = {k: v for k, v in result.record["config"].items() if k not in BY_SEED}
            groups.setdefault(json.dumps(config, sort_keys=True), []).append(result)
    return [*groups.values()]


def find_best(group: Sequence[SeedResult]) -> SeedResult:
    """Return the result of the seed with the lowest loss on `select`.

    Args:
      group: the results of one search.
    """
    on_select = [result.record["loss"]["select"] for result in group]
    return group[int(np.argmin([math.inf if loss is None else loss for loss in on_select]))]


def summarize(group: Sequence[SeedResult]) -> Compared:
    """Collect what is compared of one search.

    Args:
      group: its results, one per seed.

    Raises:
      ValueError: if a record is not that of a search.
    """
    try:
        records = [result.record for result in group]
        return Compared(
            name=group[0].name,
            seeds=[int(str(record["config"]["seed"])) for record in records],
            loss={
                split: [record["loss"][split] for record in records] for split in EVALUATION_SPLITS
            },
            layer_calls=[record["layer_calls"] for record in records],
            seconds=[record["seconds"] for record in records],
            layers=find_best(group).record["layers"],
            stopped_by=next(filter(None, (record.get("stopped_by") for record in records)), None),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"expected the result of a search in {group[0].name}: {error!r}") from None


def tabulate(rows: Sequence[Compared]) -> TextTable:
    """Tabulate the results.

    Args:
      rows: the results, one per search.
    """
    shown = [
        [
            row.name if row.stopped_by is None else f"{row.name} (stopped)",
            str(len(row.seeds)),
            *(_format_losses(row.loss[split]) for split in EVALUATION_SPLITS),
            f"{np.mean(row.layer_calls):,.0f}",
            f"{np.mean(row.seconds):,.1f}",
            " -> ".join(row.layers),
        ]
        for row in rows
    ]
    columns = ["result", "seeds", *EVALUATION_SPLITS, "layer calls", "seconds", "chain"]
    title = "mean loss [95% interval over seeds]; chain of the seed best on select"
    return TextTable(title, columns, shown, names=(0, len(columns) - 1))


def to_json(rows: Sequence[Compared]) -> list[dict[str, object]]:
    """Return the table as JSON, with all losses.

    Args:
      rows: the results, one per search.
    """
    return [row._asdict() for row in rows]


def _read(path: Path) -> list[SeedResult]:
    """Read the result of a folder, or those of its seeds."""
    folders = [path]
    if (path / SUMMARY_FILE).is_file():
        folders = sorted(path.glob("seed-*"), key=lambda seed: int(seed.name.partition("-")[2]))
    try:
        return [
            SeedResult(str(path), folder, read(folder / RESULT_FILE, ResultRecord, _NEEDED))
            for folder in folders
        ]
    except (OSError, ValueError) as error:
        raise ValueError(f"expected a result folder, got {path}: {error}") from None


def _format_losses(losses: Sequence[float | None]) -> str:
    values = [math.inf if loss is None else loss for loss in losses]
    mean, bounds = compare_pairs(values)
    shown = format_loss(finite_or_none(mean))
    return shown if bounds is None else f"{shown} [{bounds[0]:.3f}, {bounds[1]:.3f}]"
