"""The arena: every search on ChainBench at equal cost.

    python experiments/chainbench.py && python experiments/arena.py

Each search spends the same number of layer calls on each problem, 20 times with other keys. What repeats costs is the same
for all (`jchain.memo`). Hyperparameters are chosen on the problems of even number, results are those of odd number.

Committed: `--seeds 10 --budget 300 --budget 1000 --budget 4000` with critic, local, beam and random search and evolution, which
took 18 minutes on 2 CPU cores that other programs used too; its probabilities of improvement count rounding below 1e-6 as
differences, which no longer happens. All searches, 20 seeds and 16,000 layer calls were not run yet. `--quick`: four problems
of the wine data, 5 seeds, 2,000 layer calls, about 6 minutes, with what was not built made first. Writes arena.json, arena.md
and arena.png to experiments/results.
"""

import argparse
import json
import platform
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from matplotlib.figure import Figure

import jchain as jc
from jchain.files import write_atomically

FOLDER = Path.home() / ".cache" / "jchain" / "chainbench"
SEARCHES: dict[str, Any] = {
    "random search": jc.RandomSearch(),
    "local search": jc.LocalSearch(),
    "evolution": jc.Evolution(),
    "beam search": jc.BeamSearch(),
    "q-learning": jc.QLearning(),
    "mcts": jc.MCTS(),
    "actor-critic, tokens": jc.ActorCritic(encoding=jc.TokenEncoding()),
    "critic search": jc.CriticSearch(),
    "actor-critic, weights": jc.ActorCritic(encoding=jc.WeightEncoding()),
}
DETERMINISTIC = ("beam search",)
BUDGETS = (1000, 4000, 16000)
_ROUNDING = 1e-6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=FOLDER, help="of ChainBench (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=20, help="runs of each search on each problem")
    parser.add_argument("--search", action="append", choices=SEARCHES, help="only these; repeat for more")
    parser.add_argument("--half", choices=("odd", "even", "all"), default="odd", help="problems, by their number")
    parser.add_argument("--budget", type=int, action="append", help="layer calls to report; repeat for more")
    parser.add_argument("--quick", action="store_true", help="four problems, 5 seeds, 2,000 layer calls")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    names = list(jc.chainbench.NAMES)
    names = {"odd": names[1::2], "even": names[::2], "all": names}[args.half]
    budgets, seeds = tuple(args.budget or BUDGETS), args.seeds
    if args.quick:
        names, budgets, seeds = (
            [n for n in jc.chainbench.NAMES if n.startswith("wine") and n[-1] == "0"],
            (500, 2000),
            5,
        )
        jc.chainbench.build(args.folder, names)
    searches = {name: SEARCHES[name] for name in args.search or SEARCHES}
    start = time.perf_counter()
    solved = [jc.chainbench.load(args.folder, name) for name in names]
    grid = make_grid(budgets)
    runs = {name: [compare(name, search, one, grid, seeds) for one in solved] for name, search in searches.items()}
    result = {
        "device": f"{jax.devices()[0].device_kind}, {platform.machine()}",
        "versions": {"python": platform.python_version(), "jax": jax.__version__, "jchain": jc.__version__},
        "config": {
            "problems": names,
            "seeds": seeds,
            "budgets": budgets,
            "searches": {n: repr(s) for n, s in searches.items()},
        },
        "seconds": round(time.perf_counter() - start),
        "summary": {name: summarize(rows, grid, budgets) for name, rows in runs.items()},
        "improvement": compare_pairs(runs, grid, budgets),
        "runs": {name: [{k: v for k, v in row.items() if k != "curve"} for row in rows] for name, rows in runs.items()},
    }
    table = format_table(result)
    print(table)
    args.out.mkdir(parents=True, exist_ok=True)
    stem = "arena_quick" if args.quick else "arena"
    text = json.dumps(result, indent=1) + "\n"
    write_atomically(args.out / f"{stem}.json", lambda path: Path(path).write_text(text))
    write_atomically(args.out / f"{stem}.md", lambda path: Path(path).write_text(table + "\n"))
    write_atomically(args.out / f"{stem}.png", lambda path: draw(path, runs, grid))


def compare(name: str, search: Any, solved: jc.chainbench.Solved, grid: np.ndarray, seeds: int) -> dict[str, Any]:
    """All seeds of one search on one problem: regret after each number of layer calls."""
    keys = jax.random.split(jax.random.key(0), 1 if name in DETERMINISTIC else seeds)
    start = time.perf_counter()
    results = jc.run_many(keys, search, solved.problem, budget=int(grid[-1]))
    seconds = time.perf_counter() - start
    curve = np.array([regret_at(result, solved, grid) for result in results])
    best = solved.loss["search"].min()
    row = {
        "problem": solved.name,
        "regret": curve[:, -1].tolist(),
        "share_solved": float(np.mean([result.best_loss <= best * (1 + 1e-5) for result in results])),
        "layer_calls": [result.layer_calls for result in results],
        "chains": [result.num_chains for result in results],
        "seconds": seconds,
        "curve": curve,
    }
    print(
        f"{name:22} {solved.name:26} regret {np.median(curve[:, -1]):.4f} solved {row['share_solved']:.0%} {seconds:.1f} s",
        flush=True,
    )
    return row


def make_grid(budgets: tuple[int, ...]) -> np.ndarray:
    return np.unique(np.concatenate([np.geomspace(20, max(budgets), 60), budgets]).astype(int))


def regret_at(result: jc.Result, solved: jc.chainbench.Solved, grid: np.ndarray) -> np.ndarray:
    """Regret after each number of layer calls; that of a random chain before the first step ends."""
    place = np.searchsorted(result.curve.layer_calls, grid, side="right") - 1
    regret = np.where(place >= 0, solved.regret(result.curve.best_loss[np.maximum(place, 0)]), 1.0)
    # A loss differs in its last bits with the population it was computed in.
    return np.where(regret < _ROUNDING, 0.0, regret)


def scores(rows: list[dict[str, Any]], grid: np.ndarray, budget: int) -> np.ndarray:
    """Regrets `[M, S]` after so many layer calls."""
    return np.array([row["curve"][:, np.searchsorted(grid, budget)] for row in rows])


def summarize(rows: list[dict[str, Any]], grid: np.ndarray, budgets: tuple[int, ...]) -> dict[str, Any]:
    seconds = sum(row["seconds"] for row in rows)
    calls = sum(sum(row["layer_calls"]) for row in rows)
    return {
        "regret": {str(budget): jc.stats.iqm(scores(rows, grid, budget))._asdict() for budget in budgets},
        "share_solved": float(np.mean([row["share_solved"] for row in rows])),
        "us_per_layer_call": seconds / calls * 1e6,
        "seconds": seconds,
    }


def compare_pairs(runs: dict[str, Any], grid: np.ndarray, budgets: tuple[int, ...]) -> dict[str, Any]:
    """How likely each search ends below each other one on the same problem, by budget."""
    return {
        str(budget): {
            name: {
                other: jc.stats.probability_of_improvement(
                    scores(rows, grid, budget), scores(other_rows, grid, budget), num_resamples=500
                )._asdict()
                for other, other_rows in runs.items()
                if other != name
            }
            for name, rows in runs.items()
        }
        for budget in budgets
    }


def format_table(result: dict[str, Any]) -> str:
    """Markdown: IQM of the regret with its 95% interval at each budget."""
    budgets = result["config"]["budgets"]
    head = ["search", *(f"{budget:,} layer calls" for budget in budgets), "solved", "us per layer call"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for name, row in result["summary"].items():
        cells = [
            f"{e['value']:.4f} [{e['low']:.4f}, {e['high']:.4f}]" for e in (row["regret"][str(b)] for b in budgets)
        ]
        lines.append(f"| {name} | {' | '.join(cells)} | {row['share_solved']:.0%} | {row['us_per_layer_call']:.0f} |")
    return "\n".join(lines)


def draw(path: str, runs: dict[str, Any], grid: np.ndarray) -> None:
    """IQM of the regret against layer calls, with its interval."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for name, rows in runs.items():
        estimates = [jc.stats.iqm(scores(rows, grid, budget), num_resamples=200) for budget in grid]
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
