"""When should a chain stop? A head as an action, fixed lengths, or a layer penalty.

    python experiments/chainbench.py && python experiments/stopping.py

The run takes 40 minutes on one CPU core shared with several other jobs. Nearly all of this is
compilation. `--quick` runs two problems of the wine data with 3 seeds and two searches, and takes 2
minutes.

Expected result, as the area between the fronts at 1,000 layer calls. With a head as an action, it
is 0.001 for critic search, 0.011 for beam search, and 0.054 for the actor-critic. It is 0.34 to
0.52 for evolution, local search, and random search, which score few short chains; with all stops,
it is 0.01 to 0.04 for these three. With fixed lengths, it is 0.02 to 0.08. With layer penalties, it
is 0.03 to 0.62.

Each search looks for good chains of every number of layers in three ways, with the same total of
layer calls: in one run in which a head is an action; in one run for each fixed length,
`Problem(min_layers=k, max_layers=k)`, with a fourth of the calls each; and in one run for each of
four layer penalties, with a fourth of the calls each. The best chains of each length that a run
found are its front. All fronts start with the heads alone, which cost no layer call.

ChainBench's table has the best chains of up to 1, 2, 3, and 4 layers. For each of these, regret is
that of the arena: 0 for the best chain of at most that many layers, and 1 (the maximum) for the
median one. The area between the fronts is the mean of the four regrets. A second way to read a run
includes every stop of the scored chains by every head, which costs no extra layer call
(`jc.evaluate_prefixes`). A third way, for penalties, uses only the best chain of each run.

Penalties are in units of the loss of the best head alone. The four penalties were chosen on the
even-numbered problems, as if each run found the best chain at its penalty. All other results are
those of the odd-numbered problems. Losses are looked up in tables.

A run ends at its budget, when it has the best chain of each length, or when free steps outnumber
the others by a hundred. The run of chains of one layer needs only 12 layer calls; the rest of its
share stays unspent.

The finished runs of each search are kept, so an interrupted run continues where it stopped. The
script writes stopping.json, stopping.md, and stopping.png to experiments/results.
"""

import hashlib
import itertools
import time
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from fronts import DEPTH, LENGTHS, Table, run_fronts
from matplotlib.figure import Figure
from records import describe_machine, describe_search, keep, make_parser, make_pool, write_results

import jchain as jc

SEARCHES: dict[str, Any] = {
    "actor-critic": jc.ActorCritic(),
    "critic search": jc.CriticSearch(),
    "evolution": jc.Evolution(),
    "local search": jc.LocalSearch(),
    # A step with more chains would not fit into the smallest share.
    "random search": jc.RandomSearch(num_chains=16),
    "beam search": jc.BeamSearch(width=4, max_width=256),
}
BUDGETS = (500, 1000, 4000)
SHOWN = 1  # the budget of the figure and of most tables
PENALTY_GRID = (0.01, 0.02, 0.03, 0.05, 0.07, 0.1, 0.14, 0.2, 0.3, 0.4, 0.6)
NUM_PENALTIES = DEPTH  # one per fixed length, so that shares are equal
TRACED = (1, 5, 10, 20, 40)
# Names of the methods in saved results, which call a layer penalty a price.
ACTION, FIXED, PENALIZED = "head as an action", "fixed lengths", "price per layer"
STOPS, BEST_ONLY = ", all stops", ", best chains only"
METHODS = (
    ACTION,
    FIXED,
    PENALIZED,
    PENALIZED + BEST_ONLY,
    ACTION + STOPS,
    FIXED + STOPS,
    PENALIZED + STOPS,
)


class Setup(NamedTuple):
    """The problems, runs, and penalties with which searches are compared."""

    folder: Path
    names: tuple[str, ...]
    seeds: int
    penalties: tuple[float, ...]  # in units of the loss of the best head alone


def main() -> None:
    parser = make_parser(
        __doc__,
        quick="two problems, 3 seeds; nothing is written",
        has_folder=True,
        has_workers=True,
    )
    parser.add_argument("--seeds", type=int, default=10, help="runs of each stochastic search")
    args = parser.parse_args()
    searches, tuned, names, seeds = (
        SEARCHES,
        jc.chainbench.NAMES[::2],
        jc.chainbench.NAMES[1::2],
        args.seeds,
    )
    if args.quick:
        searches = {name: SEARCHES[name] for name in ("local search", "beam search")}
        tuned, names, seeds = ("wine-random-0",), ("wine-routed-0", "wine-random-1"), 3
        jc.chainbench.build(args.folder, (*tuned, *names))
    setup = Setup(
        args.folder, names, seeds, choose_penalties([Table(args.folder, name) for name in tuned])
    )
    with make_pool(args.workers) as pool:
        futures = {
            name: pool.submit(run_search, name, search, setup) for name, search in searches.items()
        }
        runs = {name: future.result() for name, future in futures.items()}
    tables = [Table(args.folder, name) for name in names]
    result = {
        **describe_machine(),
        "config": {
            "reported": names,
            "seeds": seeds,
            "budgets": BUDGETS,
            "shown": BUDGETS[SHOWN],
            "prices": setup.penalties,
            "searches": {name: describe_search(search) for name, search in searches.items()},
        },
        "truth": describe_truth(tables, setup.penalties),
        "fronts": {
            name: compare_fronts(arrays, tables, setup.penalties) for name, arrays in runs.items()
        },
        "one_chain": {
            name: compare_chains(arrays, tables, setup.penalties) for name, arrays in runs.items()
        },
        "choice": {
            name: compare_choices(arrays, tables, setup.penalties) for name, arrays in runs.items()
        },
        "lengths_by_step": {
            name: summarize_lengths(arrays, setup.penalties) for name, arrays in runs.items()
        },
    }
    table = format_tables(result)
    print(table, flush=True)
    if args.quick:
        return
    write_results(args.out, "stopping", result, table, partial(draw, result=result))


def choose_penalties(tables: list[Table]) -> tuple[float, ...]:
    """Choose the penalties whose best chains give the mean front nearest to the true front."""
    # Find the best length at each penalty of the grid.
    best_lengths = [
        [
            (t.loss[t.best] + penalty * t.unit * np.arange(DEPTH + 1)).argmin()
            for penalty in PENALTY_GRID
        ]
        for t in tables
    ]

    def area(chosen: tuple[int, ...]) -> float:
        total = 0.0
        for table, lengths in zip(tables, best_lengths, strict=True):
            places = np.full(DEPTH + 1, -1)
            found = [0, *(lengths[i] for i in chosen)]
            places[found] = table.best[found]
            total += float(table.regret(places).mean())
        return total

    best = min(itertools.combinations(range(len(PENALTY_GRID)), NUM_PENALTIES), key=area)
    return tuple(PENALTY_GRID[i] for i in best)


def run_search(name: str, search: Any, setup: Setup) -> dict[str, np.ndarray]:
    """Return the fronts of all runs of a search.

    Returns:
      `scored` and `stops`, `[M, R, S, B, D + 1]`, for the run with a head as an action, those of
      fixed lengths, and those of penalties; and `lengths`, `[M, R, S, T, D + 1]`.
    """
    start = time.perf_counter()
    digest = hashlib.sha256()
    for problem in setup.names:
        digest.update((setup.folder / f"{problem}.table.safetensors").read_bytes())
    inputs = (
        setup.names,
        setup.seeds,
        setup.penalties,
        digest.hexdigest(),
        describe_search(search),
    )
    make = partial(run_all, search, setup)
    arrays = keep(__file__, f"stopping-{name.replace(' ', '-')}", inputs, make)
    print(f"{name:20} {time.perf_counter() - start:.0f} s", flush=True)
    # Each program uses memory mappings, and a process can have only so many.
    jax.clear_caches()
    return arrays


def run_all(search: Any, setup: Setup) -> dict[str, np.ndarray]:
    keys = jax.random.split(jax.random.key(0), 1 if search.is_deterministic else setup.seeds)
    tables = [Table(setup.folder, name) for name in setup.names]
    parts = []
    # Problems of the same shape run one after another, so that they share programs.
    for length in (None, *LENGTHS):
        penalties = (0.0, *setup.penalties) if length is None else (0.0,)
        for i, penalty in enumerate(penalties):
            budgets = (
                np.array(BUDGETS)
                if length is None and i == 0
                else np.array(BUDGETS) // NUM_PENALTIES
            )
            start = time.perf_counter()
            parts.append(
                [
                    run_fronts(keys, search, table, table.problem(penalty, length), budgets)
                    for table in tables
                ]
            )
            print(
                f"{type(search).__name__}, length {length}, penalty {penalty}: "
                f"{time.perf_counter() - start:.0f} s",
                flush=True,
            )
    order = [0, *range(1 + NUM_PENALTIES, len(parts)), *range(1, 1 + NUM_PENALTIES)]
    stacked = [
        [np.stack([parts[r][m][i] for r in order]) for m in range(len(tables))] for i in range(3)
    ]
    return dict(zip(("scored", "stops", "lengths"), map(np.stack, stacked), strict=True))


def find_fronts(
    arrays: dict[str, np.ndarray], tables: list[Table], penalties: tuple[float, ...], budget: int
) -> dict[str, list[np.ndarray]]:
    """Find the best chain of each length within a budget, by method and problem, `[S, D + 1]`."""
    runs = {ACTION: slice(0, 1), FIXED: slice(1, 1 + DEPTH), PENALIZED: slice(1 + DEPTH, None)}
    fronts: dict[str, list[np.ndarray]] = {method: [] for method in METHODS}
    for m, table in enumerate(tables):
        for method, rows in runs.items():
            for suffix, kind in (("", "scored"), (STOPS, "stops")):
                fronts[method + suffix].append(merge_runs(arrays[kind][m, rows, :, budget], table))
        places = arrays["scored"][m, runs[PENALIZED], :, budget]
        length = find_lengths(places, table, np.array(penalties)[:, None])
        is_best = np.arange(DEPTH + 1) == length[..., None]
        fronts[PENALIZED + BEST_ONLY].append(merge_runs(np.where(is_best, places, -1), table))
    return fronts


def merge_runs(places: np.ndarray, table: Table) -> np.ndarray:
    """Merge the fronts of several runs, `[R, S, D + 1]`.

    The heads alone, which cost no layer call, are added.
    """
    best = np.take_along_axis(places, table.read(places).argmin(axis=0)[None], axis=0)[0]
    best[:, 0] = table.best[0]
    return best


def find_lengths(places: np.ndarray, table: Table, penalty: Any = 0.0) -> np.ndarray:
    """Find the length of the best chain at a penalty, in a front `[..., D + 1]`."""
    return add_penalty(places, table, penalty).argmin(axis=-1)


def add_penalty(places: np.ndarray, table: Table, penalty: Any) -> np.ndarray:
    """Add the layer penalty to the losses of a front."""
    return table.read(places) + np.asarray(penalty)[..., None] * table.unit * np.arange(DEPTH + 1)


def compare_fronts(
    arrays: dict[str, np.ndarray], tables: list[Table], penalties: tuple[float, ...]
) -> dict[str, Any]:
    """Compare the methods' fronts at each budget.

    The numbers are the regrets of the best chains of at most 1, 2, ... layers, their mean, and the
    ratios of losses to the best loss of all.
    """
    result: dict[str, Any] = {method: {} for method in METHODS}
    for i, budget in enumerate(BUDGETS):
        for method, fronts in find_fronts(arrays, tables, penalties, i).items():
            regret = np.array(
                [table.regret(places) for table, places in zip(tables, fronts, strict=True)]
            )
            found = [
                table.at_most(places) / table.loss.min()
                for table, places in zip(tables, fronts, strict=True)
            ]
            result[method][str(budget)] = {
                "area": jc.chainbench.stats.iqm(regret.mean(axis=-1))._asdict(),
                "regret": {
                    n: jc.chainbench.stats.iqm(regret[..., n - 1])._asdict() for n in LENGTHS
                },
                "loss_over_best": {
                    n: jc.chainbench.stats.iqm(np.array(found)[..., n - 1])._asdict()
                    for n in LENGTHS
                },
            }
    return result


def compare_chains(
    arrays: dict[str, np.ndarray], tables: list[Table], penalties: tuple[float, ...]
) -> dict[str, Any]:
    """Compute the regret of the best chain of a run, and how often its length is right.

    A length is right if the true best chain has it. For a head as an action, the chain is the best
    one without a penalty at each budget, and the best one at each penalty with its share of that
    budget.
    """
    result: dict[str, Any] = {}
    for r, penalty in (
        (0, 0.0),
        *((1 + DEPTH + i, penalty) for i, penalty in enumerate(penalties)),
    ):
        for b, budget in enumerate(BUDGETS):
            regrets, hits, lengths = [], [], []
            for m, table in enumerate(tables):
                places = merge_runs(arrays["scored"][m, r : r + 1, :, b], table)
                penalized = table.loss + penalty * table.unit * table.length
                best, middle = penalized.min(), np.median(penalized)
                regrets.append(
                    np.minimum(
                        (add_penalty(places, table, penalty).min(axis=-1) - best) / (middle - best),
                        1.0,
                    )
                )
                lengths.append(find_lengths(places, table, penalty))
                hits.append(lengths[-1] == table.length[penalized.argmin()])
            key = "none" if r == 0 else str(penalty)
            result.setdefault(key, {})[str(budget if r == 0 else budget // NUM_PENALTIES)] = {
                "regret": jc.chainbench.stats.iqm(np.array(regrets))._asdict(),
                "is_as_long": float(np.mean(hits)),
                "length": float(np.mean(lengths)),
            }
    return result


def compare_choices(
    arrays: dict[str, np.ndarray], tables: list[Table], penalties: tuple[float, ...]
) -> dict[str, Any]:
    """Choose the best chain of a front on each split.

    Return its length and its regret on test.
    """
    fronts = find_fronts(arrays, tables, penalties, SHOWN)
    return {method: choose_lengths(fronts[method], tables) for method in (ACTION, FIXED, PENALIZED)}


def choose_lengths(fronts: list[np.ndarray], tables: list[Table]) -> dict[str, Any]:
    result = {}
    for split in ("search", "select", "test"):
        lengths = [
            table.read(places, split).argmin(axis=-1)
            for table, places in zip(tables, fronts, strict=True)
        ]
        chosen = [
            np.take_along_axis(places, length[:, None], axis=1)[:, 0]
            for places, length in zip(fronts, lengths, strict=True)
        ]
        regret = [table.test_regret(places) for table, places in zip(tables, chosen, strict=True)]
        result[split] = {
            "length": float(np.mean(lengths)),
            "test_regret": jc.chainbench.stats.iqm(np.array(regret))._asdict(),
        }
    return result


def describe_truth(tables: list[Table], penalties: tuple[float, ...]) -> dict[str, Any]:
    """Describe the best chains of each length on search."""
    fronts = [table.best[None] for table in tables]
    test = np.array([table.test_regret(table.best) for table in tables])
    by_split = {
        split: [int(table.read(table.best, split).argmin()) for table in tables]
        for split in ("search", "select", "test")
    }
    return {
        "loss_over_best": {
            n: jc.chainbench.stats.iqm(
                [[table.at_most(table.best)[n - 1] / table.loss.min()] for table in tables]
            )._asdict()
            for n in LENGTHS
        },
        "problems_by_best_length": {
            s: np.bincount(n, minlength=DEPTH + 1).tolist() for s, n in by_split.items()
        },
        "test_regret": {n: jc.chainbench.stats.iqm(test[:, [n]])._asdict() for n in (0, *LENGTHS)},
        "choice": choose_lengths(fronts, tables),
        "length_at_price": {
            str(penalty): float(
                np.mean([find_lengths(table.best, table, penalty) for table in tables])
            )
            for penalty in (0.0, *penalties)
        },
        "is_at_some_price": float(np.mean([find_optimal_lengths(table) for table in tables])),
    }


def find_optimal_lengths(table: Table) -> np.ndarray:
    """Find which chains of the true front are the best of all at some penalty, `[D + 1]`."""
    return np.isin(
        np.arange(DEPTH + 1),
        [find_lengths(table.best, table, penalty) for penalty in np.geomspace(1e-4, 10, 2000)],
    )


def summarize_lengths(
    arrays: dict[str, np.ndarray], penalties: tuple[float, ...]
) -> dict[str, Any]:
    """Compute the mean number of layers of scored chains and its entropy, by penalty and step.

    The entropy is in nats, and both are means over runs.
    """
    result = {}
    for r, penalty in (
        (0, 0.0),
        *((1 + DEPTH + i, penalty) for i, penalty in enumerate(penalties)),
    ):
        counts = arrays["lengths"][:, r][:, :, [step - 1 for step in TRACED]].reshape(
            -1, len(TRACED), DEPTH + 1
        )
        share = counts / np.maximum(counts.sum(axis=-1, keepdims=True), 1)
        entropy = -np.sum(share * np.log(np.where(share > 0, share, 1.0)), axis=-1)
        is_there = counts.sum(axis=-1) > 0
        result["none" if r == 0 else str(penalty)] = {
            step: {
                "length": float((share @ np.arange(DEPTH + 1))[is_there[:, i], i].mean()),
                "entropy": float(entropy[is_there[:, i], i].mean()),
                "runs": int(is_there[:, i].sum()),
            }
            for i, step in enumerate(TRACED)
            if is_there[:, i].any()
        }
    return result


def format_tables(result: dict[str, Any]) -> str:
    shown = result["config"]["shown"]
    parts = [
        (
            "Area between the front that was found and the true one, mean regret of the best "
            f"chains of at most 1 to 4 layers; and these at {shown:,} layer calls",
            list_fronts(result),
        ),
        (
            "Asked for one chain, head as an action: regret, and share of runs whose chain is as "
            "long as the best one",
            list_chains(result),
        ),
        (
            f"One chain of a front of {shown:,} layer calls, chosen on a split: its layers, and "
            "its regret on test",
            list_choices(result),
        ),
        (
            "The best chains of each length on search: regret on test, and problems in which they "
            "are the best of these",
            list_truth(result),
        ),
        (
            "Chains that a step of the actor-critic scores: mean number of layers / entropy of it "
            "in nats",
            list_steps(result),
        ),
    ]
    return "\n\n".join(f"{title}:\n\n{table}" for title, table in parts)


def list_fronts(result: dict[str, Any]) -> str:
    shown = str(result["config"]["shown"])
    head = [
        "search",
        "method",
        *(f"area, {b:,} layer calls" for b in BUDGETS),
        *(f"at most {n}" for n in LENGTHS),
    ]
    rows = []
    for name, methods in result["fronts"].items():
        for method, by_budget in methods.items():
            areas = [by_budget[str(budget)]["area"] for budget in BUDGETS]
            regrets = [by_budget[shown]["regret"][n] for n in LENGTHS]
            rows.append([name, method, *map(show, areas), *(f"{e['value']:.4f}" for e in regrets)])
    return make_table(head, rows)


def list_chains(result: dict[str, Any]) -> str:
    shown = BUDGETS[SHOWN]
    cases = [("none", budget) for budget in BUDGETS]
    cases += [(str(penalty), shown // NUM_PENALTIES) for penalty in result["config"]["prices"]]
    head = ["search", *(f"price {penalty}, {budget:,} layer calls" for penalty, budget in cases)]
    rows = []
    for name, found in result["one_chain"].items():
        cells = [found[penalty][str(budget)] for penalty, budget in cases]
        rows.append(
            [name, *(f"{show(cell['regret'])}, {cell['is_as_long']:.0%}" for cell in cells)]
        )
    return make_table(head, rows)


def list_choices(result: dict[str, Any]) -> str:
    head = ["search", "method", "on search", "on select", "on test"]
    rows = [["the best of each length", "", *map(show_choice, result["truth"]["choice"].values())]]
    for name, methods in result["choice"].items():
        rows += [
            [name, method, *map(show_choice, choice.values())] for method, choice in methods.items()
        ]
    return make_table(head, rows)


def show_choice(choice: dict[str, Any]) -> str:
    return f"{choice['length']:.2f}: {show(choice['test_regret'])}"


def list_truth(result: dict[str, Any]) -> str:
    truth = result["truth"]
    head = [
        "layers",
        "regret on test",
        *(f"best on {split}" for split in truth["problems_by_best_length"]),
    ]
    counts = truth["problems_by_best_length"].values()
    rows = [
        [str(n), f"{truth['test_regret'][n]['value']:.3f}", *(str(count[n]) for count in counts)]
        for n in truth["test_regret"]
    ]
    return make_table(head, rows)


def list_steps(result: dict[str, Any]) -> str:
    if "actor-critic" not in result["lengths_by_step"]:
        return "none"
    head = ["price", *(f"step {step}" for step in TRACED)]
    rows = []
    for penalty, steps in result["lengths_by_step"]["actor-critic"].items():
        # Steps that fewer than half of the runs reached are left blank.
        most = max(c["runs"] for c in steps.values())
        cells = [steps.get(step, {"runs": 0}) for step in TRACED]
        rows.append(
            [
                penalty,
                *(
                    f"{c['length']:.2f} / {c['entropy']:.2f}" if 2 * c["runs"] >= most else ""
                    for c in cells
                ),
            ]
        )
    return make_table(head, rows)


def show(estimate: dict[str, float]) -> str:
    return f"{estimate['value']:.4f} [{estimate['low']:.4f}, {estimate['high']:.4f}]"


def make_table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join(
        [
            "| " + " | ".join(head) + " |",
            "|---" * len(head) + "|",
            *("| " + " | ".join(r) + " |" for r in rows),
        ]
    )


def draw(path: str, result: dict[str, Any]) -> None:
    """Plot the fronts at one budget, and the area to the true front against the budget."""
    names, shown = list(result["fronts"]), str(result["config"]["shown"])
    figure = Figure(figsize=(2.6 * len(names), 5.6), layout="constrained")
    axes = figure.subplots(2, len(names), sharey="row")
    styles = dict(
        zip((ACTION, FIXED, PENALIZED, PENALIZED + BEST_ONLY, ACTION + STOPS), "os^v*", strict=True)
    )
    truth = [result["truth"]["loss_over_best"][n]["value"] for n in LENGTHS]
    for name, (above, below) in zip(names, axes.T, strict=True):
        above.plot(LENGTHS, truth, "k--", label="true front")
        for method, marker in styles.items():
            found = result["fronts"][name][method]
            losses = [found[shown]["loss_over_best"][n]["value"] for n in LENGTHS]
            areas = [found[str(budget)]["area"] for budget in BUDGETS]
            options: Any = {"marker": marker, "markersize": 4, "linewidth": 1, "label": method}
            (line,) = above.plot(LENGTHS, losses, **options)
            below.plot(
                BUDGETS, [area["value"] for area in areas], color=line.get_color(), **options
            )
            interval = [area["low"] for area in areas], [area["high"] for area in areas]
            below.fill_between(BUDGETS, *interval, color=line.get_color(), alpha=0.15, linewidth=0)
        above.set(title=name, xlabel="layers, at most", xticks=LENGTHS)
        above.set_yscale("log", base=2)
        above.yaxis.set_major_formatter("{x:g}")
        below.set(xscale="log", xlabel="layer calls")
        below.set_xticks(BUDGETS, [f"{budget:,}" for budget in BUDGETS])
        below.minorticks_off()
        below.set_yscale("symlog", linthresh=1e-3)
        below.set_ylim(0, 1)
        for ax in (above, below):
            ax.grid(which="both", alpha=0.2)
    axes[0, 0].set_ylabel(f"loss / lowest, {int(shown):,} layer calls")
    axes[1, 0].set_ylabel("area between the fronts")
    figure.legend(
        *axes[0, 0].get_legend_handles_labels(),
        loc="outside lower center",
        ncols=6,
        fontsize="small",
    )
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
