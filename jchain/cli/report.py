"""The table that `jchain search` prints."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from jchain.cli.records import Scores, SearchOutput, SweepRow
from jchain.data import EVALUATION_SPLITS

if TYPE_CHECKING:
    from rich.table import Table


def print_table(output: SearchOutput) -> None:
    """Print the chain that was found beside its controls.

    Args:
      output: of the search.
    """
    from rich.console import Console
    from rich.table import Table

    record, controls = output.record, output.record["controls"]
    table = Table(title="loss (accuracy) by split", title_justify="left")
    table.add_column("", no_wrap=True)
    for name in EVALUATION_SPLITS:
        table.add_column(name, justify="right")
    parent = "best parent net" if output.bank.parents else "plain net, as many steps"
    rows: dict[str, Scores] = {
        "chain found": record,
        parent: controls["best_parent"],
        "random chain, as long": controls["random_chain"],
        **controls["recipes"],
    }
    for name, row in rows.items():
        table.add_row(name, *(_format_cell(row, split) for split in EVALUATION_SPLITS))
    if record["optimum"] is not None:
        table.add_row("optimum of all chains", f"{record['optimum']:.4f}        ")
    console = Console()
    console.print(table)
    if "sweep" in record:
        console.print(_make_sweep_table(record["sweep"]))
    for line in _make_remarks(output):
        console.print(line)


def _make_remarks(output: SearchOutput) -> list[str]:
    record, updates = output.record, ""
    if record["update_calls"]:
        updates = f", {record['update_calls']:,} of them gradient steps"
    chain = " -> ".join(record["layers"])
    lines = [f"chain found, in {record['layer_calls']:,} layer calls{updates}: {chain}"]
    if record["chosen"] != "search":
        lines.append(
            f"It is a recipe, {record['chosen']}: what the search found is no better on select"
        )
    if record["nonfinite_chains"]:
        lines.append(
            f"{record['nonfinite_chains']} of {output.result.num_chains} scored chains had a loss "
            "that was not finite"
        )
    return lines


def _make_sweep_table(rows: Sequence[SweepRow]) -> "Table":
    """Loss on `test` by the number of layers, of what was found and of recipes."""
    from rich.table import Table

    names = list(dict.fromkeys(name for row in rows for name in row["recipes"]))
    title = "loss (accuracy) on test by layers beside pinned ones"
    table = Table(title=title, title_justify="left")
    for name in ("at most", "chain found", *names):
        table.add_column(name, justify="right")
    for row in rows:
        cells = [row, *(row["recipes"].get(name) for name in names)]
        shown = ["" if cell is None else _format_cell(cell, "test") for cell in cells]
        table.add_row(str(row["max_layers"]), *shown)
    return table


def _format_cell(scores: Scores, split: str) -> str:
    loss = scores["loss"][split]
    shown = format_loss(loss)
    return shown if loss is None else f"{shown} ({scores['accuracy'][split]:.1%})"


def format_loss(loss: float | None) -> str:
    """A loss with four decimals.

    Args:
      loss: None if it is not finite.
    """
    return "not finite" if loss is None else f"{loss:.4f}"
