"""`jchain compare`: one table of several results, with intervals over seeds."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jchain.cli.records import ResultRecord, finite_or_none, format_loss
from jchain.cli.report import make_console, make_table
from jchain.cli.result_folder import RESULT_FILE, SUMMARY_FILE
from jchain.cli.seeds import compare_pairs
from jchain.data import EVALUATION_SPLITS

# Options in which the seeds of one search may differ.
_BY_SEED = ("seed", "num_seeds", "out", "command")


class Compared(NamedTuple):
    """The results of one search with one or several seeds."""

    name: str  # the first folder
    seeds: list[int]
    loss: dict[str, list[float | None]]  # by split, one per seed
    layer_calls: list[int]
    seconds: list[float]
    layers: list[str]  # of the seed with the lowest loss on `select`


def compare(paths: Sequence[Path]) -> list[Compared]:
    """Read results, and group those that differ only in their seeds.

    Args:
      paths: result folders of one seed, or of several.

    Raises:
      ValueError: if a path is no result folder.
    """
    groups: dict[str, list[tuple[Path, ResultRecord]]] = {}
    for path in paths:
        for folder, record in _read(path):
            config = {k: v for k, v in record["config"].items() if k not in _BY_SEED}
            groups.setdefault(json.dumps(config, sort_keys=True), []).append((folder, record))
    return [_summarize(group) for group in groups.values()]


def print_comparison(rows: Sequence[Compared]) -> None:
    """Print the table.

    Args:
      rows: the results, one per search.
    """
    from rich.markup import escape

    table = make_table("mean loss [95% interval over seeds]; chain of the seed best on select")
    table.add_column("result", overflow="fold")
    for title in ("seeds", *EVALUATION_SPLITS, "layer calls", "seconds"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("chain", overflow="fold")
    for row in rows:
        table.add_row(
            escape(row.name),
            str(len(row.seeds)),
            *(_format_losses(row.loss[split]) for split in EVALUATION_SPLITS),
            f"{np.mean(row.layer_calls):,.0f}",
            f"{np.mean(row.seconds):,.1f}",
            escape(" -> ".join(row.layers)),
        )
    make_console().print(table)


def to_json(rows: Sequence[Compared]) -> list[dict[str, object]]:
    """Return the table as JSON, with all losses.

    Args:
      rows: the results, one per search.
    """
    return [row._asdict() for row in rows]


def _read(path: Path) -> list[tuple[Path, ResultRecord]]:
    """Read the result of a folder, or those of its seeds."""
    folders = [path]
    if (path / SUMMARY_FILE).is_file():
        folders = sorted(path.glob("seed-*"), key=lambda seed: int(seed.name.partition("-")[2]))
    try:
        return [(path, json.loads((folder / RESULT_FILE).read_text())) for folder in folders]
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"expected a result folder, got {path}: {error}") from None


def _summarize(group: Sequence[tuple[Path, ResultRecord]]) -> Compared:
    try:
        records = [record for _, record in group]
        on_select = [record["loss"]["select"] for record in records]
        best = int(np.argmin([math.inf if loss is None else loss for loss in on_select]))
        return Compared(
            name=str(group[0][0]),
            seeds=[int(str(record["config"]["seed"])) for record in records],
            loss={
                split: [record["loss"][split] for record in records] for split in EVALUATION_SPLITS
            },
            layer_calls=[record["layer_calls"] for record in records],
            seconds=[record["seconds"] for record in records],
            layers=records[best]["layers"],
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"expected the result of a search in {group[0][0]}: {error!r}") from None


def _format_losses(losses: Sequence[float | None]) -> str:
    values = [math.inf if loss is None else loss for loss in losses]
    mean, bounds = compare_pairs(values)
    shown = format_loss(finite_or_none(mean))
    return shown if bounds is None else f"{shown} [{bounds[0]:.3f}, {bounds[1]:.3f}]"
