"""Does an actor-critic beat random search, and does it matter how it sees the chain so far?

    pip install -e ".[bench]" && python experiments/actor_critic_vs_random.py

Twenty problems of each kind of bank (independent, routed, snapshots): 12 residual MLP layers trained on digits, up to 4 in a
chain. All chains of each are evaluated, so the optimum is known. Each search then spends 8,000 layer calls.

Hardware and run time: 2 CPU cores, about 25 minutes. `--quick`: 2 problems of each kind, about 3 minutes.
Result to expect: IQM of (loss found / optimum) of the actor-critic, with either encoding, near 1.0 with an interval below
that of random search on every kind. Writes actor_critic_vs_random.json and .png to experiments/results.
"""

import argparse
import json
import platform
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import scipy.stats
from matplotlib.figure import Figure

import jchain as jc
from jchain.files import write_atomically

SEARCHES = {
    "random search": jc.RandomSearch(),
    "actor-critic, tokens": jc.ActorCritic(encoding=jc.TokenEncoding()),
    "actor-critic, weights": jc.ActorCritic(encoding=jc.WeightEncoding()),
}
KINDS = ("independent", "routed", "snapshots")
NUM_LAYERS, DEPTH = 12, 4
GRID = np.unique(np.geomspace(180, 8000, 60).astype(int))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=int, default=8000, help="layer calls")
    parser.add_argument("--seeds", type=int, default=20, help="problems of each kind")
    parser.add_argument("--quick", action="store_true", help="2 problems of each kind")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    seeds = 2 if args.quick else args.seeds
    start = time.perf_counter()
    runs = [run for kind in KINDS for seed in range(seeds) for run in compare(kind, seed, args.budget)]
    summary = {kind: {name: summarize(runs, kind, name) for name in SEARCHES} for kind in KINDS}
    args.out.mkdir(parents=True, exist_ok=True)
    result = {
        "config": {
            "budget": args.budget,
            "seeds": seeds,
            "num_layers": NUM_LAYERS,
            "max_layers": DEPTH,
            "data": "digits",
        },
        "device": f"{jax.devices()[0].device_kind}, {platform.machine()}",
        "versions": {"python": platform.python_version(), "jax": jax.__version__, "jchain": jc.__version__},
        "seconds": round(time.perf_counter() - start),
        "grid": GRID.tolist(),
        "summary": summary,
        "runs": runs,
    }
    text = json.dumps(result, indent=1) + "\n"
    write_atomically(args.out / "actor_critic_vs_random.json", lambda path: Path(path).write_text(text))
    plot(args.out / "actor_critic_vs_random.png", runs)
    for kind, rows in summary.items():
        for name, row in rows.items():
            low, high = row["interval"]
            print(f"{kind:12} {name:22} loss / optimum, IQM {row['iqm']:.3f} [{low:.3f}, {high:.3f}]")


def make_problem(kind: str, seed: int) -> jc.Problem:
    """A bank of 12 layers and the `search` split; the seed decides splits, weights and minibatches."""
    data = jc.data.load("digits", seed)
    key = jax.random.key(seed)
    shared: dict[str, Any] = {"layer": jc.layers.ResidualMLP(64), "head": jc.layers.DenseHead(10), "depth": DEPTH}
    if kind == "independent":
        bank = jc.train.independent(key, data.train, num_nets=NUM_LAYERS // DEPTH, **shared)
    elif kind == "routed":
        bank = jc.train.routed(key, data.train, num_layers=NUM_LAYERS, **shared)
    else:
        bank = jc.train.snapshots(key, data.train, num_snapshots=NUM_LAYERS // DEPTH, **shared)
    return jc.Problem(bank, data.search, max_layers=DEPTH)


def compare(kind: str, seed: int, budget: int) -> list[dict[str, Any]]:
    """Every search on one problem, its curve divided by the optimum."""
    problem = make_problem(kind, seed)
    optimum = float(jc.evaluate_all(problem)[1].loss.min())
    runs = []
    for name, search in SEARCHES.items():
        start = time.perf_counter()
        result = jc.run(jax.random.key(1000 + seed), search, problem, budget=budget)
        place = np.searchsorted(result.curve.layer_calls, GRID, side="right") - 1
        ratio = np.where(place >= 0, result.curve.best_loss[place] / optimum, np.nan)
        run = {"kind": kind, "seed": seed, "search": name, "optimum": optimum, "found": result.best_loss}
        run |= {"ratio": result.best_loss / optimum, "layer_calls": result.layer_calls, "chains": result.num_chains}
        run |= {"seconds": round(time.perf_counter() - start, 2)}
        run |= {"curve": [None if np.isnan(r) else round(float(r), 5) for r in ratio]}
        print(f"{kind} {seed} {name}: {run['ratio']:.4f} of the optimum", flush=True)
        runs.append(run)
    return runs


def summarize(runs: list[dict[str, Any]], kind: str, name: str) -> dict[str, Any]:
    """Interquartile mean of (loss found / optimum) and its 95% bootstrap interval over problems."""
    ratios = np.array([run["ratio"] for run in runs if run["kind"] == kind and run["search"] == name])
    interval = bootstrap_iqm(ratios)
    solved = float(np.mean(ratios < 1 + 1e-6))
    return {"iqm": float(iqm(ratios)), "interval": interval, "solved": solved, "max": float(ratios.max())}


def iqm(values: np.ndarray, axis: int = 0) -> np.ndarray:
    """Interquartile mean (Agarwal et al. 2021, arXiv:2108.13264)."""
    return scipy.stats.trim_mean(values, 0.25, axis=axis)


def bootstrap_iqm(values: np.ndarray) -> list[float]:
    """95% interval of the IQM over the first axis."""
    result = scipy.stats.bootstrap((values,), iqm, method="percentile", n_resamples=9999, rng=np.random.default_rng(0))
    return [float(result.confidence_interval.low), float(result.confidence_interval.high)]


def plot(path: Path, runs: list[dict[str, Any]]) -> None:
    """IQM and interval of each search against layer calls, a panel per kind of bank."""
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    for axes, kind in zip(figure.subplots(1, len(KINDS)), KINDS, strict=True):
        for name in SEARCHES:
            curves = np.array([run["curve"] for run in runs if run["kind"] == kind and run["search"] == name], float)
            is_known = ~np.isnan(curves).any(axis=0)
            intervals = np.array([bootstrap_iqm(curves[:, i]) for i in np.flatnonzero(is_known)])
            axes.plot(GRID[is_known], iqm(curves[:, is_known]), label=name)
            axes.fill_between(GRID[is_known], *intervals.T, alpha=0.2)
        axes.axhline(1, color="black", linewidth=0.8)
        axes.set(title=f"{kind} bank", xlabel="layer calls", xscale="log", yscale="log")
        low, high = axes.get_ylim()
        ticks = (1, 1.5, 2, 3, 5, 10) if high > 2 else (1, 1.02, 1.05, 1.1, 1.2, 1.3, 1.5)
        ticks = [tick for tick in ticks if low < tick < high]
        axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.set_xticks([200, 500, 1000, 2000, 4000, 8000], ["200", "500", "1k", "2k", "4k", "8k"])
        axes.minorticks_off()
        axes.grid(visible=True, alpha=0.3)
    figure.axes[0].set_ylabel("loss found / optimum (IQM, 95%)")
    figure.axes[0].legend()
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
