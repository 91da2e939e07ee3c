"""`jchain report`: one HTML page about results, which opens without a network."""

import base64
import io
from collections.abc import Callable, Sequence
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

import jchain as jc
from jchain.bank import Bank
from jchain.cli.checkpoints import EvalData
from jchain.cli.compare import BY_SEED, SeedResult, find_best, group_results, summarize, tabulate
from jchain.cli.config import SearchConfig
from jchain.cli.loading import load_bank_and_data
from jchain.cli.progress import ChainScores, evaluate_in_parts, print_progress, show_phase
from jchain.cli.records import ResultRecord, format_loss
from jchain.cli.result_folder import SEARCH_FILE, read_config
from jchain.cli.seeds import summarize as summarize_seeds
from jchain.cli.tables import (
    TextTable,
    make_remarks,
    tabulate_result,
    tabulate_summary,
    tabulate_sweep,
)
from jchain.files import write_atomically
from jchain.hub import recipes
from jchain.plot.drawing import draw_chains
from jchain.problem import Problem
from jchain.runs.result import Result

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Options that the page does not list: where a result is, and the command, which has its own line.
_HIDDEN = ("out", "command")
_PART_SIZE = 8


class Figure(NamedTuple):
    """A figure of the page."""

    title: str
    source: str  # a data URI
    note: str = ""


class Section(NamedTuple):
    """What the page says about one search."""

    name: str
    remarks: list[str]
    tables: list[TextTable]
    figures: list[Figure]
    commands: list[str]


class Drawn(NamedTuple):
    """The results of one search, and the runs behind them, which older results do not have."""

    name: str
    group: list[SeedResult]
    runs: list[Result]


def write_report(
    path: Path, results: Sequence[Path], *, with_maps: bool = True, is_trusted: bool = False
) -> None:
    """Write a page about results: tables, curves, chains, and heat maps.

    Args:
      path: the file to write.
      results: result folders of `jchain search`. Those that differ only in their seeds are shown as
        one search.
      with_maps: whether to draw heat maps, for which the bank and the data are loaded and chains
        are scored.
      is_trusted: whether the files that the results name may be read for the heat maps (see
        `jchain.cli.trust`).

    Raises:
      ValueError: if a folder holds no result, or the page cannot be written there.
    """
    import jinja2

    if path.is_dir() or not path.absolute().parent.is_dir():
        raise ValueError(f"expected a file in a folder that exists, got {path}")
    groups = group_results(results)
    compared = [summarize(group) for group in groups]
    names = _shorten([row.name for row in compared])
    drawn = [
        Drawn(name, group, _read_runs(group)) for name, group in zip(names, groups, strict=True)
    ]
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    template = environment.from_string((files("jchain.cli") / "report.html").read_text())
    page = template.render(
        title=", ".join(names),
        comparison=tabulate(
            [row._replace(name=name) for row, name in zip(compared, names, strict=True)]
        ),
        figures=_draw_comparison(drawn),
        sections=[_make_section(one, with_maps=with_maps, is_trusted=is_trusted) for one in drawn],
        options=_tabulate_options(drawn),
        version=jc.__version__,
    )
    write_atomically(path, lambda temporary: Path(temporary).write_text(page, encoding="utf-8"))


def _shorten(names: Sequence[str]) -> list[str]:
    """Name folders by their last parts, unless two of them are the same."""
    short = [Path(name).resolve().name for name in names]
    return short if len(set(short)) == len(short) else list(names)


def _read_runs(group: Sequence[SeedResult]) -> list[Result]:
    paths = [result.folder / SEARCH_FILE for result in group]
    if not all(path.is_file() for path in paths):
        return []
    return [Result.from_json(path.read_text()) for path in paths]


def _draw(title: str, draw: Callable[..., "Axes"], note: str = "") -> Figure:
    """Draw a figure as SVG, which the page embeds."""
    import matplotlib as mpl

    figure = draw().get_figure(root=True)
    assert figure is not None
    buffer = io.BytesIO()
    # The same figure gives the same bytes.
    with mpl.rc_context({"svg.hashsalt": title}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    encoded = base64.b64encode(buffer.getvalue()).decode()
    return Figure(title, f"data:image/svg+xml;base64,{encoded}", note)


def _draw_comparison(drawn: Sequence[Drawn]) -> list[Figure]:
    with_runs = [one for one in drawn if one.runs]
    if not with_runs:
        return []

    def draw_curves() -> "Axes":
        ax = None
        for one in with_runs:
            runs = one.runs[0] if len(one.runs) == 1 else one.runs
            ax = jc.plot.curve(runs, label=one.name, ax=ax)
        assert ax is not None
        if all((run.curve.best_loss > 0).all() for one in with_runs for run in one.runs):
            ax.set_yscale("log")
        return ax

    def draw_fronts() -> "Axes":
        ax = None
        for one in with_runs:
            ax = jc.plot.front(one.runs, label=one.name, ax=ax)
        assert ax is not None
        ax.set(xlabel="number of layers", ylabel="loss on search")
        ax.locator_params(axis="x", integer=True)
        return ax

    return [
        _draw(
            "Best loss on search over the cost",
            draw_curves,
            "Several seeds: mean and 95% interval. Losses include layer penalties.",
        ),
        _draw(
            "Lowest loss by number of layers",
            draw_fronts,
            "Of the chains that were scored on search with the final weights.",
        ),
    ]


def _make_section(drawn: Drawn, *, with_maps: bool, is_trusted: bool) -> Section:
    best, records = find_best(drawn.group), [result.record for result in drawn.group]
    tables, remarks = [], []
    if len(records) > 1:
        config = SearchConfig.load(records[0]["config"])
        summary = summarize_seeds(config, records, sum(record["seconds"] for record in records))
        tables.append(tabulate_summary(summary))
        remarks.append(summary["sentence"])
        remarks.append(
            f"What follows is the result of seed {best.record['config']['seed']}, which has the "
            "lowest loss on select."
        )
    tables.append(tabulate_result(best.record))
    if "sweep" in best.record:
        tables.append(tabulate_sweep(best.record["sweep"]))
    tables += _tabulate_finalists(best.record)
    remarks += make_remarks(best.record)
    if "stopped_by" in best.record:
        remarks.append(
            f"This search was stopped ({best.record['stopped_by']}), so controls are missing."
        )
    if not drawn.runs:
        remarks.append(
            "The run was not saved with this result, so its curve and its front are missing."
        )
    figures = [_draw_chains(drawn.name, records, best.record)]
    if with_maps:
        try:
            figures += _draw_maps(drawn.name, best, is_trusted=is_trusted)
        except (ValueError, OSError, ImportError, RuntimeError) as error:
            print_progress(f"No heat maps of {drawn.name}: {error}")
            remarks.append(f"Heat maps are missing: {error}")
    commands = list(dict.fromkeys(str(record["config"]["command"]) for record in records))
    return Section(drawn.name, remarks, tables, figures, commands)


def _tabulate_finalists(record: ResultRecord) -> list[TextTable]:
    rows = [
        [
            " -> ".join(row["layers"]),
            str(len(row["layers"]) - 1),
            format_loss(row["search_loss"], 4),
            format_loss(row["deciding_loss"], 4),
        ]
        for row in record.get("finalists", [])
    ]
    if not rows:
        return []
    columns = ["finalist", "layers", "loss on search", "loss for re-ranking"]
    return [TextTable("The best chains of the search, with layer penalties", columns, rows)]


def _draw_chains(name: str, records: Sequence[ResultRecord], best: ResultRecord) -> Figure:
    """Draw the chain of each seed, then the finalists of the best seed."""
    rows = {f"seed {record['config']['seed']}": record["layers"] for record in records}
    rows |= {f"finalist {i + 1}": row["layers"] for i, row in enumerate(best.get("finalists", []))}
    return _draw(
        f"Chains of {name}",
        partial(draw_chains, list(rows.values()), list(rows)),
        "Each cell is a layer, by slot. Its color says where the layer comes from.",
    )


def _draw_maps(name: str, best: SeedResult, *, is_trusted: bool) -> list[Figure]:
    """Draw what swaps of the best chain would change and, for checkpoints, runs of blocks."""
    config, _ = read_config(best.folder, is_trusted=is_trusted)
    if config is None:
        raise ValueError(f"expected a result folder, got {best.folder}")
    with show_phase(f"Loading the bank of {name}"):
        bank, eval_data = load_bank_and_data(best.folder, config)
    chain = jc.chain.pad([best.record["best_chain"]])[0]
    problem = _make_problem(bank, eval_data, max_layers=len(chain) - 1)
    with show_phase(f"Predicting the swaps of the best chain of {name}"):
        scores = np.asarray(jc.swap_scores(problem, chain))
    figures = [
        _draw(
            f"Swaps in the best chain of {name}",
            partial(jc.plot.swap_scores, bank, chain, scores),
            "Predicted from the gradient of the loss on search. Blue lowers the loss.",
        )
    ]
    for parent in bank.parents if config.checkpoint else ():
        figures += _draw_runs_of_blocks(problem, parent)
    return figures


def _make_problem(bank: Bank, eval_data: EvalData, max_layers: int) -> Problem:
    return Problem(
        bank,
        eval_data.data.search,
        max_layers,
        loss_fn=eval_data.loss_fn,
        accuracy_fn=eval_data.accuracy_fn,
    )


def _draw_runs_of_blocks(problem: Problem, parent: Sequence[int]) -> list[Figure]:
    origin = problem.bank.names[parent[0]].rpartition("/")[0]

    def score(problem: Problem, chains: np.ndarray) -> np.ndarray:
        scored: ChainScores = evaluate_in_parts(
            problem, chains, f"Scoring the runs of blocks of {origin}", _PART_SIZE
        )
        return scored.loss

    losses = recipes.score_runs(problem, parent, evaluate_fn=score)
    names = [problem.bank.names[token] for token in parent[:-1]][-len(losses.repeated) :]
    labels = [name.rpartition("/")[2] for name in names]
    note = f"Loss on search minus that of the unchanged model, {losses.loss:.4f}."
    return [
        _draw(
            f"Blocks i to j of {origin}, {what}",
            partial(jc.plot.block_runs, changed - losses.loss, labels=labels),
            note,
        )
        for what, changed in (("repeated", losses.repeated), ("dropped", losses.dropped))
    ]


def _tabulate_options(drawn: Sequence[Drawn]) -> TextTable:
    """Tabulate the options that any search set, with those that differ first."""
    configs = [one.group[0].record["config"] for one in drawn]
    names = list(dict.fromkeys(name for config in configs for name in config))
    rows = []
    for name in names:
        if name in _HIDDEN or (name in BY_SEED and any(len(one.group) > 1 for one in drawn)):
            continue
        values = [_format_option(config.get(name)) for config in configs]
        if any(values):
            rows.append([name.replace("_", " "), *values])
    rows.sort(key=lambda row: len(set(row[1:])) == 1)
    columns = ["option", *(one.name for one in drawn)]
    return TextTable("Options, those that differ first", columns, rows, tuple(range(len(columns))))


def _format_option(value: object) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return "" if value is None else str(value)
