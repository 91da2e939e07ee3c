"""The tables that `jchain search` prints, and a drawing of the chain found."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from jchain.cli.records import (
    FOUND,
    ResultRecord,
    Scores,
    SeedRow,
    Summary,
    SweepRow,
    format_calls,
    format_loss,
)
from jchain.cli.seeds import list_rows
from jchain.data import EVALUATION_SPLITS

if TYPE_CHECKING:
    from rich.console import Console

# The width of tables if standard output is not a terminal.
_WIDTH = 120
# Differences of at most this many standard errors are marked as noise.
_NUM_ERRORS = 1.96


class TextTable(NamedTuple):
    """A table of text, which is printed by `print_text_table` and written by `jchain report`."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    # The columns of names, which are aligned to the left and may be folded.
    names: Sequence[int] = (0,)


def print_text_table(table: TextTable) -> None:
    """Print a table, or, if the terminal is too narrow for it, a list with a line per cell.

    Args:
      table: the table.
    """
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    shown = Table(title=table.title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for i, title in enumerate(table.columns):
        is_name = i in table.names
        shown.add_column(
            title,
            justify="left" if is_name else "right",
            no_wrap=is_name == (len(table.names) == 1),
            overflow="fold" if is_name else "ellipsis",
        )
    for row in table.rows:
        shown.add_row(*map(escape, row))
    console = make_console()
    drawn = "".join(part.text for line in console.render_lines(shown) for part in line)
    cells = [cell for row in table.rows for i, cell in enumerate(row) if i not in table.names]
    if all(word in drawn for word in " ".join(cells).split()):
        console.print(shown)
        return
    for line in _list_cells(table):
        console.print(line, highlight=False, markup=False)
    console.print()


def _list_cells(table: TextTable) -> Iterator[str]:
    """List the cells of a table: the name of each row, and its other cells below it."""
    yield table.title
    for row in table.rows:
        yield " ".join(row[i] for i in table.names) or row[0]
        for i, (title, cell) in enumerate(zip(table.columns, row, strict=True)):
            if i not in table.names and cell:
                yield f"  {title}: {cell}"


def print_table(record: ResultRecord) -> None:
    """Print the scores of the chain found and of its controls.

    Args:
      record: the result of one search.
    """
    print_text_table(tabulate_result(record))
    if "sweep" in record:
        print_text_table(tabulate_sweep(record["sweep"]))
    console = make_console()
    for line in [*make_remarks(record), *draw_chain(record["layers"])]:
        console.print(line, highlight=False, markup=False)


def tabulate_result(record: ResultRecord) -> TextTable:
    """Tabulate the scores of the chain found and of its controls.

    Args:
      record: the result of one search.
    """
    rows = [[FOUND, *(_format_cell(record, split) for split in EVALUATION_SPLITS), ""]]
    for name, row in list_rows(record).items():
        cells = [_format_cell(row, split) for split in EVALUATION_SPLITS]
        rows.append([name, *cells, _format_difference(row)])
    if record["optimum"] is not None:
        rows.append(["optimum of all chains", f"{record['optimum']:.3f}", "", "", ""])
    splits = [f"{name}, {record['num_examples'][name]:,}" for name in EVALUATION_SPLITS]
    title = (
        "loss ± standard error (accuracy) by split and number of examples; difference: best chain "
        "found minus row"
    )
    return TextTable(title, ["", *splits, "difference, test"], rows)


def print_summary(summary: Summary) -> None:
    """Print the chains found and the comparison with the controls over several seeds.

    Args:
      summary: the summary of the seeds.
    """
    console, seeds = make_console(), summary["seeds"]
    for seed, about, layers in zip(seeds, summary["about"], summary["layers"], strict=True):
        chain = " -> ".join(layers)
        console.print(f"seed {seed}, {about}:\n  {chain}", highlight=False, markup=False)
    print_text_table(tabulate_summary(summary))
    for line in [*draw_chain(summary["layers"][0], f"seed {seeds[0]}"), summary["sentence"]]:
        console.print(line, highlight=False, markup=False)


def tabulate_summary(summary: Summary) -> TextTable:
    """Tabulate the comparison of the chains found with the controls over several seeds.

    Args:
      summary: the summary of the seeds.
    """
    num, num_seeds = summary["num_examples"]["test"], len(summary["seeds"])
    title = (
        f"test, {num:,} examples: mean ± standard error over {num_seeds} seeds; difference: best "
        "chain found minus row, paired by seed"
    )
    rows = [
        [name, *_format_seed_row(row, num_seeds, is_found=name == FOUND)]
        for name, row in summary["rows"].items()
    ]
    return TextTable(title, ["", "loss", "accuracy", "difference [95% interval]", "wins"], rows)


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


def make_remarks(record: ResultRecord) -> list[str]:
    """Say which chain was found, at what cost, and what to be careful about.

    Args:
      record: the result of one search.
    """
    updates = ""
    if record["update_calls"]:
        updates = f", {record['update_calls']:,} of them gradient steps"
    chain = " -> ".join(record["layers"])
    lines = [
        f"Best chain found, in {format_calls(record['layer_calls'])} layer calls{updates}, among "
        f"{record['num_chains']:,} chains: {chain}"
    ]
    if record["chosen"] != "search":
        lines.append(
            f"This chain is a recipe ({record['chosen']}): no chain found was better on select"
        )
    if record["nonfinite_chains"]:
        is_staged = record["config"].get("fractions") is not None
        why = "stopped after a part of the examples, or had" if is_staged else "had"
        lines.append(
            f"{record['nonfinite_chains']} of {record.get('num_scored', 'all')} scored chains "
            f"{why} a non-finite loss"
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


def tabulate_sweep(rows: Sequence[SweepRow]) -> TextTable:
    """Tabulate the loss on `test` by number of layers: the chains found, and the recipes.

    Args:
      rows: the field `sweep` of a result.
    """
    names = list(dict.fromkeys(name for row in rows for name in row["recipes"]))
    title = "loss (accuracy) on test by number of layers, pinned ones not counted"
    shown = []
    for row in rows:
        cells = [row, *(row["recipes"].get(name) for name in names)]
        shown.append(
            [
                str(row["max_layers"]),
                *("" if cell is None else _format_cell(cell, "test") for cell in cells),
            ]
        )
    return TextTable(title, ["at most", FOUND, *names], shown, names=())


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
