"""The arena: compare all searches at equal cost, on ChainBench and on large problems.

    python experiments/chainbench.py && python experiments/arena.py

The run takes 31 minutes on 2 CPU cores shared with two other jobs.

Expected result: at 1,000 layer calls, the regret is 0.0042 for critic search, 0.0082 for linearized
search, and 0.027 to 0.034 for evolution, local search, and beam search.

Each search spends the same number of layer calls on each of the 36 problems, in 20 runs with
different keys. One rule decides what every search pays for a chain that it scores again
(`jchain.engine.score_cache`). Losses are looked up in ChainBench's tables
(`jchain.chainbench.tabular`), which does not change what a search is charged; only searches that
need a gradient apply the layers. A run ends early once it has found the best chain of all. The time
per layer call is measured in a separate run that does apply the layers. Sizes and rates were chosen
on the even-numbered problems (`--tune` compares them there); the reported results are those of the
odd-numbered problems.

`--tune` takes 13 minutes without the variants that need a gradient. It also runs searches with one
part removed. Their regrets at 1,000 layer calls are as follows. Actor-critic: 0.065 without
imitation, 0.033 without restarts, 0.031 with both, and 0.038 if it also observes edit scores and
pays for them. Critic search: 0.020 without learning, 0.008 without features, and 0.007 with them
(features pay off if the critic was trained on other banks). Linearized search: 0.008 without pairs
and 0.004 with them.

`--quick` runs four problems of the wine data with 5 seeds and 2,000 layer calls. It builds missing
problems first.

`--large` runs on 12 banks of 24, 48, and 96 layers with chains of up to 8, 12, and 24 layers. It
uses no tables, and it adds the critic that controller.py trained on small banks. The best chain is
unknown, so regret is relative to the lowest loss that any run found, and a run that reaches this
loss counts as solved. It takes 45 minutes on a machine shared with two other jobs. Expected result:
at 1,000 layer calls, the regret is 0.048 for linearized search and for that critic, zero-shot, and
0.19 for local search, which reaches 0.049 after 12,000.

The finished runs of each search are kept, so an interrupted arena continues where it stopped. The
script writes arena.json, arena.md, and arena.png (or arena_large and arena_tune) to
experiments/results.
"""

import argparse
import dataclasses
import hashlib
import json
import time
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure
from records import (
    RESULTS,
    describe_machine,
    describe_search,
    describe_value,
    keep,
    make_parser,
    make_pool,
    make_zero_shot_search,
    use_tables,
    write_results,
)
from scipy.stats import trim_mean

import jchain as jc
from jchain import files

# The slowest searches come first, so that no core is idle at the end.
SEARCHES: dict[str, Any] = {
    "linearized": jc.LinearizedSearch(),
    "actor-critic, tokens": jc.ActorCritic(encoding=jc.TokenEncoding()),
    "actor-critic, weights": jc.ActorCritic(encoding=jc.WeightEncoding()),
    "q-learning": jc.QLearning(learning_rate=0.3),
    "evolution": jc.Evolution(population_size=64, tournament_size=16),
    "critic search": jc.CriticSearch(),
    "mcts": jc.MCTS(num_simulations=8),
    "local search": jc.LocalSearch(),
    "random search": jc.RandomSearch(),
    "beam search": jc.BeamSearch(width=4, max_width=256),
}
BUDGETS = (300, 1000, 4000, 16000)
TUNED_BUDGETS = BUDGETS[1:3]
CLOCK = ("digits-independent-1", 2000)  # problem and layer calls of the timed run
# Number of digits of a regret. Losses from tables and from layers differ in later digits.
EXACT = 6
LARGE = tuple(f"{data}-{kind}-1" for data in jc.chainbench.DATA for kind in jc.chainbench.KINDS)
LARGE_SIZES = {"digits": (48, 12), "wine": (96, 24), "breast_cancer": (24, 8)}  # layers, slots
LARGE_BUDGETS = (1000, 4000, 12000)
# The searches that are worse on ChainBench are left out.
LARGE_SEARCHES = (
    "linearized",
    "critic search",
    "evolution",
    "local search",
    "random search",
    "beam search",
)


def see_losses_only(problem: jc.Problem, children: Any, parent: Any) -> Any:
    """Observe no features, for a critic that learns from tokens alone.

    The name of this function is part of a key in arena_tune.json.
    """
    observation = jc.chainbench.tabular.observe(problem, children, parent)
    return observation._replace(features=jnp.zeros_like(observation.features))


# Variants for the even-numbered problems: other sizes and rates, and searches with a part removed.
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "actor-critic, tokens": [
        {"entropy_weight": 0.2},
        {"entropy_weight": 1.0},
        {"learning_rate": 1e-2},
        {"imitation_weight": 0.0},
        {"restart_rate": 0.0},
        {"restart_rate": 0.0, "imitation_weight": 0.0},
        {"score_kind": "linearized"},
        {"score_kind": "activations"},
    ],
    "linearized": [
        {"num_products": 9},
        {"num_pairs": 0, "num_single": 8},
        {"num_greedy": 0},
    ],
    "q-learning": [{"learning_rate": 0.1}, {"decay": 0.9}],
    "evolution": [
        {"population_size": 16, "tournament_size": 4},
        {"population_size": 128, "tournament_size": 32},
        {"population_size": 256, "tournament_size": 64},
    ],
    "critic search": [
        {"ridge": 0.5},
        {"ridge": 8.0},
        {"ridge": jnp.inf},
        {"epsilon": 0.0},
        {"epsilon": 0.3},
        {"observe": see_losses_only},
    ],
    "local search": [{"num_chains": 1}, {"num_chains": 4}, {"num_chains": 32}],
    "mcts": [
        {"num_simulations": 4},
        {"num_simulations": 16},
        {"gumbel_scale": 0.3},
        {"gumbel_scale": 3.0},
    ],
    "beam search": [{"width": 1}],
}


class Setup(NamedTuple):
    """The problems and runs on which searches are compared."""

    folder: Path
    names: tuple[str, ...]
    grid: np.ndarray  # layer calls at which the best loss is recorded, [G]
    seeds: int
    is_large: bool = False


def main() -> None:
    parser = make_parser(__doc__, has_folder=True, has_workers=True)
    parser.add_argument(
        "--search", action="append", choices=SEARCHES, help="run only this search; repeatable"
    )
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument(
        "--tune",
        action="store_true",
        help="compare other sizes and rates on the even-numbered problems",
    )
    mode.add_argument(
        "--quick", action="store_true", help="four problems, 5 seeds, 2,000 layer calls"
    )
    mode.add_argument(
        "--large",
        action="store_true",
        help="12 problems with 24 to 96 layers and chains of up to 8 to 24 layers",
    )
    args = parser.parse_args()
    searches = {
        name: search for name, search in SEARCHES.items() if name in (args.search or SEARCHES)
    }
    args.out.mkdir(parents=True, exist_ok=True)
    if args.tune:
        tune(searches, args)
    elif args.quick:
        names = tuple(
            name for name in jc.chainbench.NAMES if name.startswith("wine") and name.endswith("0")
        )
        jc.chainbench.build(args.folder, names)
        compare_searches(
            "arena_quick",
            searches,
            Setup(args.folder, names, make_grid((300, 2000)), 5),
            (300, 2000),
            args,
        )
    elif args.large:
        critic = jc.Critic.load(RESULTS / "critic.safetensors")
        searches = {
            **{name: search for name, search in searches.items() if name in LARGE_SEARCHES},
            "critic search, pretrained, zero-shot": make_zero_shot_search(critic),
        }
        for name in LARGE:
            load_large(args.folder, name)
        setup = Setup(args.folder, LARGE, make_grid(LARGE_BUDGETS), 20, is_large=True)
        compare_searches("arena_large", searches, setup, LARGE_BUDGETS, args)
    else:
        setup = Setup(args.folder, jc.chainbench.NAMES, make_grid(BUDGETS), 20)
        compare_searches("arena", searches, setup, BUDGETS, args, reported=slice(1, None, 2))


def compare_searches(
    title: str,
    searches: dict[str, Any],
    setup: Setup,
    budgets: tuple[int, ...],
    args: argparse.Namespace,
    reported: slice = slice(None),
) -> None:
    """Run the searches, and write the table, the figure, and the JSON file."""
    losses = run_all(
        {name: {name: search} for name, search in searches.items()}, setup, args.workers
    )
    runs = find_regret(losses, setup)
    clock = setup.names[0] if args.quick else CLOCK[0]
    rows = list(range(len(setup.names)))[reported]
    others = [i for i in range(len(setup.names)) if i not in rows]
    result = {
        **describe_machine(),
        "config": {
            "reported": [setup.names[i] for i in rows],
            "seeds": setup.seeds,
            "budgets": budgets,
            "searches": {name: describe_search(search) for name, search in searches.items()},
            "clock": clock,
        },
        "summary": summarize(runs, rows, setup.grid, budgets),
        "summary_of_the_other_half": summarize(runs, others, setup.grid, budgets) if others else {},
        "us_per_layer_call": {
            name: time_layer_call(search, load_layers(setup, clock))
            for name, search in searches.items()
        },
        "improvement": compare_pairs(runs, rows, setup.grid, budgets),
        "regret": {
            name: {
                p: select_budgets(curves, setup.grid, budgets)[i].T.round(7).tolist()
                for i, p in enumerate(setup.names)
            }
            for name, curves in runs.items()
        },
    }
    if "local search" in runs:
        result["calls_for_local_search"] = {
            name: count_calls(curves, runs["local search"], setup) for name, curves in runs.items()
        }
    table = format_table(result)
    print(table)
    of_reported = {name: curves[rows] for name, curves in runs.items()}
    write_results(args.out, title, result, table, partial(draw, runs=of_reported, grid=setup.grid))


def tune(searches: dict[str, Any], args: argparse.Namespace) -> None:
    """Compare each search with its variants on the problems that are not reported."""
    setup = Setup(args.folder, jc.chainbench.NAMES[::2], np.array(TUNED_BUDGETS), 10)
    groups = {
        name: {
            name: search,
            **{
                name_variant(name, change): dataclasses.replace(search, **change)
                for change in VARIANTS.get(name, [])
            },
        }
        for name, search in searches.items()
    }
    runs = find_regret(run_all(groups, setup, args.workers), setup)
    summary = summarize(runs, list(range(len(setup.names))), setup.grid, TUNED_BUDGETS)
    path = args.out / "arena_tune.json"
    if args.search and path.exists():
        # Keep the results of the other searches.
        summary = {**json.loads(path.read_text())["summary"], **summary}
    result = {
        **describe_machine(),
        "config": {"problems": setup.names, "seeds": setup.seeds},
        "summary": summary,
    }
    files.write_json(path, result)


def make_grid(budgets: tuple[int, ...]) -> np.ndarray:
    return np.unique(np.concatenate([np.geomspace(20, max(budgets), 60), budgets]).astype(int))


def name_variant(name: str, change: dict[str, Any]) -> str:
    return ", ".join(
        [name, *(f"{field} {describe_value(value)}" for field, value in change.items())]
    )


def run_all(groups: dict[str, dict[str, Any]], setup: Setup, workers: int) -> dict[str, np.ndarray]:
    """Return the best loss of each search by problem, run, and grid point, `[M, S, G]`."""
    with make_pool(workers) as pool:
        futures = [pool.submit(run_searches, searches, setup) for searches in groups.values()]
        return {name: losses for future in futures for name, losses in future.result().items()}


def run_searches(searches: dict[str, Any], setup: Setup) -> dict[str, np.ndarray]:
    """Run the variants of a search on all problems.

    Variants that differ only in their rates share compiled programs.
    """
    inputs = (setup.names, setup.grid.tolist(), setup.seeds, digest_problems(setup))
    losses = {}
    for name, search in searches.items():
        start = time.perf_counter()
        weights = [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(search)]
        make = partial(run_problems, search, setup, 1 if search.is_deterministic else setup.seeds)
        given = (*inputs, describe_search(search), weights)
        losses[name] = keep(__file__, name.replace(" ", "-"), given, make)["loss"]
        print(f"{name:40} {time.perf_counter() - start:.0f} s", flush=True)
    # Each program uses memory mappings, and a process can have only so many.
    jax.clear_caches()
    return losses


def digest_problems(setup: Setup) -> str:
    digest = hashlib.sha256()
    for name in setup.names:
        path = (
            find_large_path(setup.folder, name)
            if setup.is_large
            else setup.folder / f"{name}.table.safetensors"
        )
        digest.update(path.read_bytes())
    return digest.hexdigest()


def run_problems(search: Any, setup: Setup, seeds: int) -> dict[str, np.ndarray]:
    keys = jax.random.split(jax.random.key(0), seeds)
    losses = []
    for name in setup.names:
        if setup.is_large:
            run = partial(jc.run_many, keys, search, load_large(setup.folder, name))
        else:
            solved = jc.chainbench.load(setup.folder, name)
            best, middle = solved.loss["search"].min(), np.median(solved.loss["search"])
            target_loss = float(best + 0.4 * 10**-EXACT * (middle - best))
            given = (
                (search, solved.problem)
                if needs_gradient(search)
                else (use_tables(search), solved.tabular_problem())
            )
            run = partial(jc.run_many, keys, *given, target_loss=target_loss)
        # Searches begin with nothing, so that results show what they find themselves.
        results = run(budget=int(setup.grid[-1]), starts=None)
        losses.append([result.curve.at(setup.grid) for result in results])
    return {"loss": np.array(losses)}


def needs_gradient(search: Any) -> bool:
    """Return whether the search needs the layers, so that losses from tables are not enough."""
    return isinstance(search, jc.LinearizedSearch) or (
        isinstance(search, jc.ActorCritic) and search.score_kind is not None
    )


def find_large_path(folder: Path, name: str) -> Path:
    num_layers, depth = LARGE_SIZES[name.split("-")[0]]
    return folder / f"{name}-{num_layers}-{depth}.bank.safetensors"


def load_large(folder: Path, name: str) -> jc.Problem:
    """Load a problem that is larger than those of ChainBench.

    Its bank is trained if the file is missing.
    """
    path = find_large_path(folder, name)
    data, _, seed = name.split("-")
    num_layers, depth = LARGE_SIZES[data]
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        jc.chainbench.make_bank(name, num_layers=num_layers, depth=depth)[0].save(path)
    return jc.Problem(jc.Bank.load(path), jc.data.load(data, int(seed)).search, depth)


def load_layers(setup: Setup, name: str) -> jc.Problem:
    if setup.is_large:
        return load_large(setup.folder, name)
    return jc.chainbench.load(setup.folder, name).problem


def find_regret(losses: dict[str, np.ndarray], setup: Setup) -> dict[str, np.ndarray]:
    """Turn losses `[M, S, G]` into regrets: 0 for the best chain, 1 for the median chain.

    The regret is also 1 before a run has scored its first chain. On large problems, the best chain
    is the best one that any run found.
    """
    best, middle = np.empty((2, len(setup.names), 1, 1))
    for i, name in enumerate(setup.names):
        if setup.is_large:
            problem = load_large(setup.folder, name)
            sizes = problem.bank.num_layers, problem.bank.num_heads, problem.max_layers
            chains = jc.chain.ChainSpace(*sizes).sample(jax.random.key(0), 1000)
            best[i] = min(loss[i].min() for loss in losses.values())
            middle[i] = np.median(jc.evaluate(problem, chains).loss)
        else:
            loss = jc.chainbench.load(setup.folder, name).loss["search"]
            best[i], middle[i] = loss.min(), np.median(loss)
    regret = {
        name: np.where(np.isfinite(loss), (loss - best) / (middle - best), 1.0)
        for name, loss in losses.items()
    }
    return {name: np.round(of, EXACT) for name, of in regret.items()}


def time_layer_call(search: Any, problem: jc.Problem) -> float:
    """Measure the microseconds per layer call of a compiled run that applies the layers."""
    jc.run(jax.random.key(0), search, problem, budget=CLOCK[1], starts=None)
    start = time.perf_counter()
    result = jc.run(jax.random.key(0), search, problem, budget=CLOCK[1], starts=None)
    seconds = time.perf_counter() - start
    jax.clear_caches()
    return seconds / result.layer_calls * 1e6


def select_budgets(curves: np.ndarray, grid: np.ndarray, budgets: Any) -> np.ndarray:
    """Select the regrets `[M, S, ...]` at these numbers of layer calls."""
    return curves[:, :, np.searchsorted(grid, budgets)]


def summarize(
    runs: dict[str, np.ndarray], rows: list[int], grid: np.ndarray, budgets: tuple[int, ...]
) -> dict[str, Any]:
    """Compute the IQM of the regret and the share of solved runs, by search and budget.

    A run is solved if it found the best chain.
    """
    return {
        name: {
            str(budget): {
                **jc.chainbench.stats.iqm(select_budgets(curves[rows], grid, budget))._asdict(),
                "solved": float(np.mean(select_budgets(curves[rows], grid, budget) == 0)),
            }
            for budget in budgets
        }
        for name, curves in runs.items()
    }


def count_calls(curves: np.ndarray, local: np.ndarray, setup: Setup) -> dict[str, int | None]:
    """Count the layer calls until a search reaches the final regret of local search.

    The counts are by problem, and None if a search never gets there. Both regrets are interquartile
    means over runs.
    """
    level, means = trim_mean(local[:, :, -1], 0.25, axis=1), trim_mean(curves, 0.25, axis=1)
    is_there = means <= level[:, None]
    return {
        name: int(setup.grid[np.argmax(row)]) if row.any() else None
        for name, row in zip(setup.names, is_there, strict=True)
    }


def compare_pairs(
    runs: dict[str, np.ndarray], rows: list[int], grid: np.ndarray, budgets: tuple[int, ...]
) -> dict[str, Any]:
    """Compute the probability of improvement for each pair of searches, by budget.

    This is the probability that one search has a lower regret than the other on the same problem.
    """
    return {
        str(budget): {
            name: {
                other: jc.chainbench.stats.probability_of_improvement(
                    select_budgets(curves[rows], grid, budget),
                    select_budgets(runs[other][rows], grid, budget),
                    num_resamples=500,
                )._asdict()
                for other in runs
                if other != name
            }
            for name, curves in runs.items()
        }
        for budget in budgets
    }


def format_table(result: dict[str, Any]) -> str:
    """Format a Markdown table of the IQM of the regret at each budget, best first.

    Each IQM has its 95% interval.
    """
    budgets, summary = result["config"]["budgets"], result["summary"]
    head = [
        "search",
        *(f"{budget:,} layer calls" for budget in budgets),
        "solved",
        "µs per layer call",
    ]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for name in sorted(
        summary, key=lambda name: [summary[name][str(b)]["value"] for b in budgets[1:]]
    ):
        row = summary[name]
        cells = [
            f"{e['value']:.4f} [{e['low']:.4f}, {e['high']:.4f}]"
            for e in (row[str(b)] for b in budgets)
        ]
        time_taken = result["us_per_layer_call"][name]
        cells += [f"{row[str(budgets[-1])]['solved']:.0%}", f"{time_taken:.0f}"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(path: str, runs: dict[str, np.ndarray], grid: np.ndarray) -> None:
    """Plot the IQM of the regret against layer calls, with its interval."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for name, curves in runs.items():
        estimates = [
            jc.chainbench.stats.iqm(curves[:, :, i], num_resamples=200) for i in range(len(grid))
        ]
        value, low, high = np.array(estimates).T
        (line,) = axes.plot(grid, value, label=name)
        axes.fill_between(grid, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
    axes.set_yscale("symlog", linthresh=1e-4)
    axes.set(
        xscale="log",
        ylim=(0, 1.2),
        xlabel="layer calls",
        ylabel="regret: 0 = best chain, 1 = median chain",
    )
    axes.grid(which="both", alpha=0.2)
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
