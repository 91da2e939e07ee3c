"""A net that you bring: search its snapshots, from nothing and from the net itself.

    python experiments/own_net.py

The run took 65 minutes on 2 CPU cores that several other jobs also used. `--quick` runs one small
net and one search in less than a minute, and writes nothing.

Expected result: on `search`, the best snapshot has a loss of 0.108, and linearized search reaches
0.097 from nothing as well as from the net. On `test`, no search has a lower interquartile mean than
the best snapshot (0.128).

Each of 10 nets has 6 pre-norm blocks (layer normalization, an MLP, and a residual connection) and
is trained on digits. A bank holds 3 snapshots of one net, so it has 18 layers, 3 heads, and
3 parents, and chains have up to 6 layers. Every search of the arena spends the same number of
layer calls, once with `starts=None` and once from the parents, which is the default of `jc.run`.
From the 16 finalists of a run, the script picks the one with the lowest loss on `select`, and
scores it once on `test`. The best snapshot is picked in the same way.

Finished parts are kept, so an interrupted run continues where it stopped. The script writes
own_net.json, own_net.md, and own_net.png to experiments/results.
"""

import time
from functools import cache
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
from arena import SEARCHES as ARENA_SEARCHES
from matplotlib.figure import Figure
from records import describe_machine, describe_search, keep, make_parser, make_pool, write_results

import jchain as jc

SIDE, NUM_CLASSES = 8, 10
NET = "best snapshot"
SEARCHES: dict[str, Any] = {**ARENA_SEARCHES, "target propagation": jc.TargetPropagation()}
QUICK_SEARCHES = ("random search",)
STARTS = {"nothing": None, "the net": "parents"}
Arrays = dict[str, np.ndarray]


class Sizes(NamedTuple):
    """The sizes of the nets and the runs."""

    num_nets: int = 10
    num_snapshots: int = 3
    depth: int = 6
    num_steps: int = 1000
    budgets: tuple[int, ...] = (1000, 4000)  # the last one is that of the runs


QUICK = Sizes(num_nets=1, depth=3, num_steps=60, budgets=(200, 400))


class PreNormBlock(nn.Module):
    """A pre-norm residual block: `x + gelu(norm(x) W1 + b1) W2 + b2`."""

    features: int
    hidden: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        hidden = nn.gelu(nn.Dense(self.hidden)(nn.LayerNorm()(x)))
        return x + nn.Dense(self.features)(hidden)


class NormHead(nn.Module):
    """The final layer normalization of a pre-norm net, and a linear classifier."""

    num_classes: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.Dense(self.num_classes)(nn.LayerNorm()(x))


def main() -> None:
    parser = make_parser(
        __doc__, quick="one small net, one search; nothing is written", has_workers=True
    )
    args = parser.parse_args()
    start = time.perf_counter()
    sizes, names = (QUICK, QUICK_SEARCHES) if args.quick else (Sizes(), tuple(SEARCHES))
    with make_pool(1 if args.quick else args.workers) as pool:
        futures = {name: pool.submit(run_search, name, sizes) for name in names}
        runs = {name: future.result() for name, future in futures.items()}
        net = pool.submit(score_net, sizes).result()
    summary = summarize(runs, net, sizes)
    table = format_table(summary, sizes)
    print(table, flush=True)
    if args.quick:
        return
    result = {
        **describe_machine(),
        "config": {
            **sizes._asdict(),
            "searches": {name: describe_search(SEARCHES[name]) for name in names},
        },
        "seconds": round(time.perf_counter() - start),
        "summary": summary,
        "runs": {
            name: {key: np.round(values, 5).tolist() for key, values in rows.items()}
            for name, rows in {**runs, NET: net}.items()
        },
    }
    write_results(args.out, "own_net", result, table, lambda path: draw(path, summary))


@cache
def load_data(seed: int) -> jc.Dataset:
    return jc.data.load("digits", seed)


@cache
def train_net(seed: int, sizes: Sizes) -> jc.Bank:
    """Train a net, and return the bank of its snapshots."""
    return jc.train.snapshots(
        jax.random.key(seed),
        load_data(seed).train,
        layer=PreNormBlock(SIDE**2, 2 * SIDE**2),
        head=NormHead(NUM_CLASSES),
        num_snapshots=sizes.num_snapshots,
        depth=sizes.depth,
        num_steps=sizes.num_steps,
    )


def make_problem(seed: int, sizes: Sizes, split: str) -> jc.Problem:
    return jc.Problem(train_net(seed, sizes), getattr(load_data(seed), split), sizes.depth)


def run_search(name: str, sizes: Sizes) -> Arrays:
    """Run a search on every net; the arrays of `run_one` by start and net, `[2, M, ...]`."""
    began = time.perf_counter()

    def make() -> Arrays:
        rows = [
            [run_one(SEARCHES[name], seed, sizes, starts) for seed in range(sizes.num_nets)]
            for starts in STARTS.values()
        ]
        jax.clear_caches()
        return {key: np.array([[one[key] for one in row] for row in rows]) for key in rows[0][0]}

    inputs = (name, describe_search(SEARCHES[name]), sizes)
    arrays = keep(__file__, f"own_net-{name.replace(' ', '_')}", inputs, make)
    print(f"{name:24} {time.perf_counter() - began:.0f} s", flush=True)
    return arrays


def run_one(search: Any, seed: int, sizes: Sizes, starts: Any) -> Arrays:
    """Return the loss on search at each budget, and what the picked finalist has on test."""
    key = jax.random.key(1000 + seed)
    problem = make_problem(seed, sizes, "search")
    result = jc.run(key, search, problem, budget=sizes.budgets[-1], starts=starts)
    return {
        "search": result.curve.at(sizes.budgets),
        **score_picked(result.finalists, seed, sizes),
    }


def score_net(sizes: Sizes) -> Arrays:
    """Return the same for the snapshots of each net, `[M, ...]`."""
    rows = []
    for seed in range(sizes.num_nets):
        problem = make_problem(seed, sizes, "search")
        chains = jc.chain.pad([*problem.bank.parents], sizes.depth)
        loss = float(np.min(jc.evaluate(problem, chains).loss))
        search = np.full(len(sizes.budgets), loss)
        rows.append({"search": search, **score_picked(chains, seed, sizes)})
    return {key: np.array([row[key] for row in rows]) for key in rows[0]}


def score_picked(chains: np.ndarray, seed: int, sizes: Sizes) -> Arrays:
    """Pick the chain with the lowest loss on `select`, and score it on `test`."""
    select = np.asarray(jc.evaluate(make_problem(seed, sizes, "select"), chains).loss)
    picked = chains[[int(np.argmin(select))]]
    test = jc.evaluate(make_problem(seed, sizes, "test"), picked)
    return {
        "select": select.min(),
        "test": np.asarray(test.loss)[0],
        "accuracy": np.asarray(test.accuracy)[0],
        "length": np.asarray((picked >= 0).sum() - 1),
    }


def summarize(runs: dict[str, Arrays], net: Arrays, sizes: Sizes) -> dict[str, Any]:
    """Compute interquartile means over nets with 95% intervals, by search and start."""
    summary: dict[str, Any] = {NET: summarize_nets(net, net, sizes)}
    for name, arrays in runs.items():
        summary[name] = {
            start: summarize_nets({key: of[i] for key, of in arrays.items()}, net, sizes)
            for i, start in enumerate(STARTS)
        }
    return summary


def summarize_nets(arrays: Arrays, net: Arrays, sizes: Sizes) -> dict[str, Any]:
    losses = {
        str(budget): jc.chainbench.stats.iqm([arrays["search"][:, i]])._asdict()
        for i, budget in enumerate(sizes.budgets)
    }
    return {
        "search": losses,
        "test": jc.chainbench.stats.iqm([arrays["test"]])._asdict(),
        "accuracy": float(arrays["accuracy"].mean()),
        "length": float(arrays["length"].mean()),
        # Numbers of nets on which the chain is better than the best snapshot.
        "lower_search": int((arrays["search"][:, -1] < net["search"][:, -1]).sum()),
        "lower_test": int((arrays["test"] < net["test"]).sum()),
        "equal_test": int((arrays["test"] == net["test"]).sum()),
    }


def format_table(summary: dict[str, Any], sizes: Sizes) -> str:
    """Format a Markdown table, sorted by the loss on search from nothing."""
    head = ["search", "begins with"]
    head += [f"loss on `search`, {budget:,} layer calls" for budget in sizes.budgets]
    head += ["loss on `test`", f"lower than the net on `test`, of {sizes.num_nets}"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    rows = {(NET, ""): summary[NET]}
    names = sorted(
        (name for name in summary if name != NET),
        key=lambda name: summary[name]["nothing"]["search"][str(sizes.budgets[-1])]["value"],
    )
    rows |= {(name, start): summary[name][start] for name in names for start in STARTS}
    for (name, start), row in rows.items():
        cells = [format_estimate(row["search"][str(budget)]) for budget in sizes.budgets]
        cells += [format_estimate(row["test"]), "" if name == NET else f"{row['lower_test']}"]
        lines.append(f"| {name} | {start} | {' | '.join(cells)} |")
    return "\n".join(lines)


def format_estimate(estimate: dict[str, float]) -> str:
    return f"{estimate['value']:.3f} [{estimate['low']:.3f}, {estimate['high']:.3f}]"


def draw(path: str, summary: dict[str, Any]) -> None:
    """Plot the loss on `search` and on `test` of each search, by start."""
    names = [name for name in summary if name != NET]
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    panels: Any = figure.subplots(1, 2, sharey=True)
    for axes, split in zip(panels, ("search", "test"), strict=True):
        for shift, start in ((0.15, "nothing"), (-0.15, "the net")):
            found = [get_estimate(summary[name][start], split) for name in names]
            value, low, high = (np.array([e[k] for e in found]) for k in ("value", "low", "high"))
            error = [value - low, high - value]
            places = np.arange(len(names)) + shift
            axes.errorbar(value, places, xerr=error, fmt="o", label=f"begins with {start}")
        axes.axvline(get_estimate(summary[NET], split)["value"], color="black", label=NET)
        axes.set(yticks=range(len(names)), yticklabels=names, xlabel=f"loss on {split}")
        axes.grid(axis="x", alpha=0.2)
    panels[0].legend(fontsize="small")
    figure.savefig(path, dpi=130)


def get_estimate(row: dict[str, Any], split: str) -> dict[str, float]:
    return row["test"] if split == "test" else [*row["search"].values()][-1]


if __name__ == "__main__":
    main()
