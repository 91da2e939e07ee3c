"""The tables that `jchain search` prints, and a drawing of the chain found."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from jchain.cli.records import (
    FOUND,
    ResultRecord,
    Scores,
    SeedRow,
    Summary,
    SweepRow,
    format_loss,
)
from jchain.cli.seeds import list_rows
from jchain.data import EVALUATION_SPLITS

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

# The width of tables if standard output is not a terminal.
_WIDTH = 120
# Differences of at most this many standard errors are marked as noise.
_NUM_ERRORS = 1.96


def print_table(record: ResultRecord) -> None:
    """Print the scores of the chain found and of its controls.

    Args:
      record: the result of one search.
    """
    console = make_console()
    table = make_table(
        "loss ± standard error (accuracy) by split and number of examples; difference: best chain "
        "found minus row"
    )
    table.add_column("", no_wrap=True)
    for name in EVALUATION_SPLITS:
        table.add_column(f"{name}, {record['num_examples'][name]:,}", justify="right")
    table.add_column("difference, test", justify="right")
    table.add_row(FOUND, *(_format_cell(record, split) for split in EVALUATION_SPLITS), "")
    for name, row in list_rows(record).items():
        cells = [_format_cell(row, split) for split in EVALUATION_SPLITS]
        table.add_row(name, *cells, _format_difference(row))
    if record["optimum"] is not None:
        table.add_row("optimum of all chains", f"{record['optimum']:.3f}")
    console.print(table)
    if "sweep" in record:
        console.print(_make_sweep_table(record["sweep"]))
    for line in [*_make_remarks(record), *draw_chain(record["layers"])]:
        console.print(line, highlight=False, markup=False)


def print_summary(summary: Summary) -> None:
    """Print the chains found and the comparison with the controls over several seeds.

    Args:
      summary: the summary of the seeds.
    """
    console, seeds = make_console(), summary["seeds"]
    for seed, about, layers in zip(seeds, summary["about"], summary["layers"], strict=True):
        chain = " -> ".join(layers)
        console.print(f"seed {seed}, {about}:\n  {chain}", highlight=False, markup=False)
    num = summary["num_examples"]["test"]
    table = make_table(
        f"test, {num:,} examples: mean ± standard error over {len(seeds)} seeds; difference: best "
        "chain found minus row, paired by seed"
    )
    table.add_column("", no_wrap=True)
    for title in ("loss", "accuracy", "difference [95% interval]", "wins"):
        table.add_column(title, justify="right")
    for name, row in summary["rows"].items():
        table.add_row(name, *_format_seed_row(row, len(seeds), is_found=name == FOUND))
    console.print(table)
    for line in [*draw_chain(summary["layers"][0], f"seed {seeds[0]}"), summary["sentence"]]:
        console.print(line, highlight=False, markup=False)


def draw_chain(layers: Sequence[str], title: str = "") -> list[str]:
    """Draw a chain as text, with one column per slot and one row per origin of layers.

    The origin of `net/0` is `net`, and its cell shows `0`. A layer whose name has no slash is its
    own origin, and its cell shows a bullet.

    Args:
      layers: the names of the layers and the head, in order.
      title: text to show to the left of the slot numbers.
    """
    origins = [name.rpartition("/")[0] or name for name in layers]
    own = [name.rpartition("/")[2] if "/" in name else "●" for name in layers]
    widths = [max(len(cell), len(str(slot))) for slot, cell in enumerate(own, 1)]
    indent = max(len(name) for name in (*origins, title))
    # The last column is the head, which has no slot.
    slots = [str(slot).rjust(width) for slot, width in enumerate(widths[:-1], 1)]
    lines = [f"{title.ljust(indent)}  {' '.join(slots)}"]
    for origin in dict.fromkeys(origins):
        cells = [
            (cell if other == origin else "·").rjust(width)
            for cell, other, width in zip(own, origins, widths, strict=True)
        ]
        lines.append(f"{origin.ljust(indent)}  {' '.join(cells)}")
    return lines


def make_console() -> "Console":
    """Make the console for tables, which is wide enough if it is not a terminal."""
    from rich.console import Console

    console = Console()
    return console if console.is_terminal else Console(width=_WIDTH)


def make_table(title: str) -> "Table":
    """Make an empty table.

    Args:
      title: the text above the table.
    """
    from rich import box
    from rich.table import Table

    return Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)


def _make_remarks(record: ResultRecord) -> list[str]:
    updates = ""
    if record["update_calls"]:
        updates = f", {record['update_calls']:,} of them gradient steps"
    chain = " -> ".join(record["layers"])
    lines = [
        f"Best chain found, in {record['layer_calls']:,} layer calls{updates}, among "
        f"{record['num_chains']:,} chains: {chain}"
    ]
    if record["chosen"] != "search":
        lines.append(
            f"This chain is a recipe ({record['chosen']}): no chain found was better on select"
        )
    if record["nonfinite_chains"]:
        lines.append(
            f"{record['nonfinite_chains']} of {record.get('num_scored', 'all')} scored chains had "
            "a non-finite loss"
        )
    return [*lines, *_say_what_is_noise(record)]


def _say_what_is_noise(record: ResultRecord) -> list[str]:
    names = [name for name, row in list_rows(record).items() if _is_noise(row)]
    if not names:
        return []
    return [f"No clear difference on test (95%): {'; '.join(names)}"]


def _is_noise(row: Scores) -> bool:
    difference = row.get("difference")
    if difference is None or difference["mean"] is None or difference["standard_error"] is None:
        return False
    return abs(difference["mean"]) <= _NUM_ERRORS * difference["standard_error"]


def _format_difference(row: Scores) -> str:
    if "quartiles" in row:
        return f"quartiles {' to '.join(format_loss(loss) for loss in row['quartiles'])}"
    difference = row.get("difference")
    if difference is None or difference["mean"] is None:
        return ""
    shown = f"{difference['mean']:+.3f}"
    if difference["standard_error"] is not None:
        shown += f" ± {difference['standard_error']:.3f}"
    return f"{shown} (noise)" if _is_noise(row) else shown


def _format_seed_row(row: SeedRow, num_seeds: int, *, is_found: bool) -> list[str]:
    loss, error = format_loss(row["mean"]), row["standard_error"]
    cells = [loss if error is None else f"{loss} ± {error:.3f}", f"{row['mean_accuracy']:.1%}"]
    if is_found:
        return [*cells, "", ""]
    difference, bounds = row["difference"], row["interval"]
    if difference is None:
        return [*cells, "", f"{row['num_lower']} of {num_seeds}"]
    shown = f"{difference:+.3f}"
    if bounds is not None:
        noise = " (noise)" if bounds[0] <= 0 <= bounds[1] else ""
        shown += f" [{bounds[0]:+.3f}, {bounds[1]:+.3f}]{noise}"
    return [*cells, shown, f"{row['num_lower']} of {num_seeds}"]


def _make_sweep_table(rows: Sequence[SweepRow]) -> "Table":
    """Tabulate the loss on `test` by number of layers: the chains found, and the recipes."""
    names = list(dict.fromkeys(name for row in rows for name in row["recipes"]))
    table = make_table("loss (accuracy) on test by number of layers, pinned ones not counted")
    for name in ("at most", FOUND, *names):
        table.add_column(name, justify="right")
    for row in rows:
        cells = [row, *(row["recipes"].get(name) for name in names)]
        shown = ["" if cell is None else _format_cell(cell, "test") for cell in cells]
        table.add_row(str(row["max_layers"]), *shown)
    return table


def _format_cell(scores: Scores, split: str) -> str:
    if split not in scores["loss"]:
        return ""
    loss = scores["loss"][split]
    error = scores.get("standard_error", {}).get(split)
    shown = format_loss(loss)
    if loss is None:
        return shown
    if error is not None:
        shown += f" ± {error:.3f}"
    return f"{shown} ({scores['accuracy'][split]:.1%})"
