"""The arena: every search on ChainBench at equal cost.

    python experiments/chainbench.py && python experiments/arena.py

Each search spends the same number of layer calls on each of the 36 problems, 20 times with other keys. What repeats costs is
one rule for all (`jchain.memo`). The losses are looked up in ChainBench's tables (`jchain.lookup`), which changes no charge;
the time per layer call is that of one run with the layers themselves. Sizes and rates were chosen on problems of even number
(`--tune` is to compare them there, and was not run yet); the results are those of odd number.

Committed: `--reported --seeds 10` with all searches but the two actor-critics of whole chains, 5 minutes on 2 CPU cores. With
them, 20 seeds and all 36 problems it was not run to its end yet. `--quick`: four problems of the wine data, 5 seeds, 2,000
layer calls, 4 minutes, with what was not built made first. Writes arena.json, arena.md and arena.png to experiments/results.
"""

import argparse
import dataclasses
import multiprocessing
import os
import platform
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from matplotlib.figure import Figure

import jchain as jc
from jchain.files import write_atomically, write_json

FOLDER = Path.home() / ".cache" / "jchain" / "chainbench"
# Slowest first, so that no core waits for one at the end.
SEARCHES: dict[str, Any] = {
    "actor-critic, tokens": jc.ActorCritic(encoding=jc.TokenEncoding()),
    "actor-critic, weights": jc.ActorCritic(encoding=jc.WeightEncoding()),
    "evolution": jc.Evolution(population_size=128, tournament_size=32),
    "q-learning": jc.QLearning(learning_rate=0.3),
    "critic search": jc.CriticSearch(observe=jc.lookup.observe),
    "local search": jc.LocalSearch(),
    "mcts": jc.MCTS(num_simulations=16),
    "beam search": jc.BeamSearch(width=4, max_width=256),
    "random search": jc.RandomSearch(),
}
# What was tried beside these on the problems of even number.
VARIANTS: dict[str, list[Any]] = {
    "actor-critic, tokens": [
        jc.ActorCritic(num_chains=64, num_epochs=2),
        jc.ActorCritic(entropy_weight=0.2),
        jc.ActorCritic(entropy_weight=1.0),
        jc.ActorCritic(learning_rate=1e-2),
        jc.ActorCritic(imitation_weight=0.2),
        jc.ActorCritic(imitation_weight=0.0),
        jc.ActorCritic(restart_rate=0.5),
        jc.ActorCritic(restart_rate=0.0),
        jc.ActorCritic(restart_rate=0.0, imitation_weight=0.0),
    ],
    "evolution": [jc.Evolution(), jc.Evolution(16, 4), jc.Evolution(256, 64), jc.Evolution(64, 8)],
    "q-learning": [jc.QLearning(), jc.QLearning(decay=0.9), jc.QLearning(learning_rate=0.3, decay=0.9)],
    "critic search": [
        jc.CriticSearch(observe=jc.lookup.observe, ridge=0.5),
        jc.CriticSearch(observe=jc.lookup.observe, ridge=8.0),
        jc.CriticSearch(observe=jc.lookup.observe, epsilon=0.0),
        jc.CriticSearch(observe=jc.lookup.observe, epsilon=0.3),
    ],
    "local search": [jc.LocalSearch(1), jc.LocalSearch(4), jc.LocalSearch(32)],
    "mcts": [jc.MCTS(8), jc.MCTS(32), jc.MCTS(64), jc.MCTS(16, gumbel_scale=0.3), jc.MCTS(16, gumbel_scale=3.0)],
    "beam search": [jc.BeamSearch(1, 256)],
}
DETERMINISTIC = "beam search"
BUDGETS = (300, 1000, 4000, 16000)
CLOCK = ("digits-independent-1", 2000)  # the problem and layer calls of the run that is timed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=FOLDER, help="of ChainBench (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=20, help="runs of each search on each problem")
    parser.add_argument("--search", action="append", choices=SEARCHES, help="only these; repeat for more")
    parser.add_argument("--budget", type=int, action="append", help="layer calls to report; repeat for more")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes (default: %(default)s)")
    parser.add_argument("--reported", action="store_true", help="only the problems of odd number")
    parser.add_argument("--tune", action="store_true", help="other sizes and rates, on the problems of even number")
    parser.add_argument("--quick", action="store_true", help="four problems, 5 seeds, 2,000 layer calls")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    start = time.perf_counter()
    names, budgets, seeds = list(jc.chainbench.NAMES), tuple(sorted(args.budget or BUDGETS)), args.seeds
    reported = names[1::2]
    names = reported if args.reported else names
    if args.quick:
        names = reported = [name for name in names if name.startswith("wine") and name.endswith("0")]
        budgets, seeds = (300, 2000), 5
        jc.chainbench.build(args.folder, names)
    searches = {name: search for name, search in SEARCHES.items() if name in (args.search or SEARCHES)}
    if args.tune:
        tune(searches, args)
        return
    grid = make_grid(budgets)
    runs = run_all(searches, args.folder, names, grid, seeds, args.workers)
    clock = names[0] if args.quick else CLOCK[0]
    times = {name: measure_time(search, jc.chainbench.load(args.folder, clock)) for name, search in searches.items()}
    rows = [i for i, name in enumerate(names) if name in reported]
    others = [i for i, name in enumerate(names) if name not in reported]
    result = {
        "device": f"{jax.devices()[0].device_kind}, {platform.machine()}",
        "versions": {"python": platform.python_version(), "jax": jax.__version__, "jchain": jc.__version__},
        "config": {
            "reported": reported,
            "seeds": seeds,
            "budgets": budgets,
            "searches": {name: repr(search) for name, search in searches.items()},
            "clock": clock,
        },
        "seconds": round(time.perf_counter() - start),
        "summary": summarize(runs, rows, grid, budgets),
        "summary_of_the_other_half": summarize(runs, others, grid, budgets) if others else {},
        "us_per_layer_call": times,
        "improvement": compare_pairs(runs, rows, grid, budgets),
        "regret": {
            name: {p: at(curves, grid, budgets)[i].T.round(7).tolist() for i, p in enumerate(names)}
            for name, curves in runs.items()
        },
    }
    table = format_table(result)
    print(table)
    args.out.mkdir(parents=True, exist_ok=True)
    stem = "arena_quick" if args.quick else "arena"
    write_json(args.out / f"{stem}.json", result)
    write_atomically(args.out / f"{stem}.md", lambda path: Path(path).write_text(table + "\n"))
    of_reported = {name: curves[rows] for name, curves in runs.items()}
    write_atomically(args.out / f"{stem}.png", lambda path: draw(path, of_reported, grid))


def tune(searches: dict[str, Any], args: argparse.Namespace) -> None:
    """Compares each search with its variants where nothing is reported."""
    names, budgets = list(jc.chainbench.NAMES[::2]), (1000, 4000)
    variants = {
        f"{name} {i}": search
        for name, first in searches.items()
        for i, search in enumerate([first, *VARIANTS.get(name, [])])
    }
    grid = np.array(budgets)
    runs = run_all(variants, args.folder, names, grid, 10, args.workers)
    summary = summarize(runs, list(range(len(names))), grid, budgets)
    rows = [{"search": repr(variants[name]), **summary[name]} for name in variants]
    args.out.mkdir(parents=True, exist_ok=True)
    write_json(args.out / "arena_tune.json", {"problems": names, "seeds": 10, "variants": rows})


def make_grid(budgets: tuple[int, ...]) -> np.ndarray:
    return np.unique(np.concatenate([np.geomspace(20, max(budgets), 60), budgets]).astype(int))


def run_all(
    searches: dict[str, Any], folder: Path, names: list[str], grid: np.ndarray, seeds: int, workers: int
) -> dict[str, np.ndarray]:
    """For each search its regret on each problem in each run after each number of layer calls, `[M, S, G]`."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=pin, initargs=(context.Value("i", 0),)) as pool:
        tasks = {
            name: pool.submit(
                run_problems, name, search, folder, names, grid, 1 if name.startswith(DETERMINISTIC) else seeds
            )
            for name, search in searches.items()
        }
        return {name: task.result() for name, task in tasks.items()}


def pin(counter: Any) -> None:
    """A core for each process, where the system allows it: their threads would only wait for each other."""
    with counter.get_lock():
        place, counter.value = counter.value, counter.value + 1
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[place % len(cores)]})


def run_problems(title: str, search: Any, folder: Path, names: list[str], grid: np.ndarray, seeds: int) -> np.ndarray:
    """One search on all problems."""
    keys = jax.random.split(jax.random.key(0), seeds)
    start, curves = time.perf_counter(), []
    for name in names:
        solved = jc.chainbench.load(folder, name)
        problem = solved.lookup(keep_weights=isinstance(search, jc.ActorCritic))
        results = jc.run_many(keys, search, problem, budget=int(grid[-1]))
        curves.append([regret_at(result, solved, grid) for result in results])
    regret = np.array(curves)
    print(
        f"{title:40} IQM {jc.stats.iqm(regret[..., -1]).value:.4f}, {np.mean(regret[..., -1] == 0):.0%} solved, "
        f"{time.perf_counter() - start:.0f} s",
        flush=True,
    )
    # Programs map memory, of which a process may have only so many pieces.
    jax.clear_caches()
    return regret


def regret_at(result: jc.Result, solved: jc.chainbench.Solved, grid: np.ndarray) -> np.ndarray:
    """Regret after each number of layer calls; that of a random chain before the first step ends."""
    loss = result.curve.at(grid)
    return np.where(np.isfinite(loss), solved.regret(loss), 1.0)


def measure_time(search: Any, solved: jc.chainbench.Solved) -> float:
    """Microseconds per layer call of one run with the layers themselves, compiled before."""
    if isinstance(search, jc.CriticSearch):
        search = dataclasses.replace(search, observe=jc.CriticSearch().observe)
    jc.run(jax.random.key(0), search, solved.problem, budget=CLOCK[1])
    start = time.perf_counter()
    result = jc.run(jax.random.key(0), search, solved.problem, budget=CLOCK[1])
    seconds = time.perf_counter() - start
    jax.clear_caches()
    return seconds / result.layer_calls * 1e6


def at(curves: np.ndarray, grid: np.ndarray, budgets: Any) -> np.ndarray:
    """Regrets `[M, S, ...]` after so many layer calls."""
    return curves[:, :, np.searchsorted(grid, budgets)]


def summarize(
    runs: dict[str, np.ndarray], rows: list[int], grid: np.ndarray, budgets: tuple[int, ...]
) -> dict[str, Any]:
    """IQM of the regret and share of runs that found the best chain, by search and budget."""
    return {
        name: {
            str(budget): {
                **jc.stats.iqm(at(curves[rows], grid, budget))._asdict(),
                "solved": float(np.mean(at(curves[rows], grid, budget) == 0)),
            }
            for budget in budgets
        }
        for name, curves in runs.items()
    }


def compare_pairs(
    runs: dict[str, np.ndarray], rows: list[int], grid: np.ndarray, budgets: tuple[int, ...]
) -> dict[str, Any]:
    """How likely each search ends below each other one on the same problem, by budget."""
    return {
        str(budget): {
            name: {
                other: jc.stats.probability_of_improvement(
                    at(curves[rows], grid, budget), at(runs[other][rows], grid, budget), num_resamples=500
                )._asdict()
                for other in runs
                if other != name
            }
            for name, curves in runs.items()
        }
        for budget in budgets
    }


def format_table(result: dict[str, Any]) -> str:
    """Markdown: IQM of the regret with its 95% interval at each budget, best first."""
    budgets, summary = result["config"]["budgets"], result["summary"]
    head = ["search", *(f"{budget:,} layer calls" for budget in budgets), "solved", "us per layer call"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for name in sorted(summary, key=lambda name: [summary[name][str(b)]["value"] for b in budgets[1:]]):
        row = summary[name]
        cells = [f"{e['value']:.4f} [{e['low']:.4f}, {e['high']:.4f}]" for e in (row[str(b)] for b in budgets)]
        time_taken = result["us_per_layer_call"][name]
        lines.append(f"| {name} | {' | '.join(cells)} | {row[str(budgets[-1])]['solved']:.0%} | {time_taken:.0f} |")
    return "\n".join(lines)


def draw(path: str, runs: dict[str, np.ndarray], grid: np.ndarray) -> None:
    """IQM of the regret against layer calls, with its interval."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for name, curves in runs.items():
        estimates = [jc.stats.iqm(curves[:, :, i], num_resamples=200) for i in range(len(grid))]
        value, low, high = np.array(estimates).T
        (line,) = axes.plot(grid, value, label=name)
        axes.fill_between(grid, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
    axes.set_yscale("symlog", linthresh=1e-4)
    axes.set(xscale="log", ylim=(0, 1.2), xlabel="layer calls", ylabel="regret: 0 = best chain, 1 = median chain")
    axes.grid(which="both", alpha=0.2)
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
