"""When does searching over existing layers pay off?

    python experiments/main_job.py

The run takes about 20 minutes on 2 CPU cores. `--quick` runs one seed, two candidates, and two
searches in one minute, and writes nothing.

Expected result: in `repair`, the chain that was found has a test loss of 0.17 (interquartile mean;
94% of digits are right). In 30 of 30 seeds, its loss is lower than those of the best parent, of a
plain net trained for the same number of steps, and of the median random chain. In 29 seeds, it is
lower than that of the plain net tuned on the same labels. With local search, the loss is 1.5. In
`drift`, the loss is lower than that of the best parent in 23 seeds and than that of the plain net
in 21. Searching does not pay off for any other candidate.

There are six candidates (candidates.py), each with 30 seeds of data, bank, and searches. None of
these seeds was used to choose sizes or rates. A search sees `search`; from its 16 finalists, the
script picks the one with the lowest loss on `search` and `select` together. It reports the loss of
this chain on `test`, and the difference from each control, paired by seed, with its bootstrap 95%
interval. All searches have the same budget of layer calls, and gradients are charged.

Finished parts are kept, so an interrupted run continues where it stopped. The script writes
main_job.json, main_job.md, main_job.png, and candidates.png to experiments/results.
"""

import json
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from candidates import CANDIDATES, HEAD, LAYER, Candidate, combine_faults, tune
from matplotlib.figure import Figure
from records import (
    describe_machine,
    describe_search,
    keep,
    make_parser,
    make_pool,
    write_results,
)
from scipy.stats import bootstrap

import jchain as jc
from jchain import files

SEEDS = range(100, 130)
NUM_RANDOM = 200
COMBINED = "plain net, trained on random combinations"
TUNING_STEPS = (30, 100, 300)
# In `repair`, the plain net is also tuned for longer.
LONG_STEPS = (1000, 3000)
TUNED_LONGER = "plain net, fine-tuned on search, up to 3,000 steps"
FOUND = "critic search"
SEARCHES: dict[str, Any] = {
    FOUND: jc.CriticSearch(),
    "actor-critic": jc.ActorCritic(),
    "linearized": jc.LinearizedSearch(),
    "beam search": jc.BeamSearch(),
    "evolution": jc.Evolution(),
    "local search": jc.LocalSearch(),
    "random search": jc.RandomSearch(),
}
# `repair` runs all searches, the other candidates only these two.
FEW_SEARCHES = (FOUND, "local search")
# Rules to pick one of the finalists: weights of the losses on `search` and on `select`.
RULES = {"picked on search alone": (1.0, 0.0), "picked on select alone": (0.0, 1.0)}
# The main rule, which all searches use. `search` counts too because `select` is small.
RULE = (1.0, 1.0)
ORDER = (
    *SEARCHES,
    *RULES,
    "ensemble of the finalists",
    "known faults, undone in reverse order",
    "best parent",
    "best parent, best single edit",
    "ensemble of the parents",
    "plain net, same steps",
    "plain net, fine-tuned on search",
    TUNED_LONGER,
    COMBINED,
    "random chains, median",
)
# Rows of the figure of `repair`. The seed and the digits that it shows are below.
JOB_ROWS = {
    FOUND: "chain found",
    "linearized": "linearized search, same budget",
    "local search": "local search, same budget",
    COMBINED: "plain net, trained on random combinations",
    "plain net, fine-tuned on search": "plain net, fine-tuned on the labeled digits",
    "plain net, same steps": "plain net, same steps",
    "best parent": "best parent",
    "random chains, median": "random chains, median",
}
SHOWN_SEED, SHOWN_DIGITS = 0, (0, 3, 4, 7)
# All chains of at most this many layers are scored, to estimate the time of all chains.
TIMED_LAYERS = 4
Arrays = dict[str, np.ndarray]


def main() -> None:
    parser = make_parser(
        __doc__, quick="one seed, two candidates; nothing is written", has_workers=True
    )
    parser.add_argument(
        "--draw", action="store_true", help="only draw the figures, from the existing results"
    )
    args = parser.parse_args()
    if args.draw:
        draw_all(args.out)
        return
    start = time.perf_counter()
    seeds, names, searches = SEEDS, tuple(CANDIDATES), tuple(SEARCHES)
    if args.quick:
        seeds, names, searches = SEEDS[:1], ("repair", "supernet"), FEW_SEARCHES
    runs = run_all(names, seeds, searches, args.workers)
    summary = {name: summarize(runs[name]) for name in names}
    spaces = {name: describe_space(CANDIDATES[name](seeds[0])) for name in names}
    table = format_table(summary, spaces, len(seeds))
    print(table, flush=True)
    if args.quick:
        return
    result = {
        **describe_machine(),
        "config": {
            "seeds": list(seeds),
            "searches": {name: describe_search(search) for name, search in SEARCHES.items()},
            "num_random": NUM_RANDOM,
            "tuning_steps": TUNING_STEPS,
            "long_steps": LONG_STEPS,
        },
        "seconds": round(time.perf_counter() - start),
        "candidates": {name: {**spaces[name], "rows": summary[name]} for name in names},
        "runs": {
            name: {row: np.round(values, 5).tolist() for row, values in runs[name].items()}
            for name in names
        },
    }
    write_results(args.out, "main_job", result, table)
    draw_all(args.out)


def run_all(
    names: tuple[str, ...], seeds: range, searches: tuple[str, ...], workers: int
) -> dict[str, Arrays]:
    """Return the loss and accuracy on test of each row, `[seeds, 2]`, by candidate."""
    cases = [(name, seed) for name in names for seed in seeds]
    with make_pool(workers) as pool:
        run = partial(run_case, searches=searches)
        found = list(pool.map(run, cases, chunksize=max(1, len(seeds) // workers)))
    by_name: dict[str, list[Arrays]] = {name: [] for name in names}
    for (name, _), rows in zip(cases, found, strict=True):
        by_name[name].append(rows)
    return {
        name: {row: np.stack([one[row] for one in each]) for row in each[0]}
        for name, each in by_name.items()
    }


def run_case(case: tuple[str, int], searches: tuple[str, ...]) -> Arrays:
    name, seed = case
    own = searches if name == "repair" else tuple(s for s in searches if s in FEW_SEARCHES)

    def make() -> Arrays:
        candidate = CANDIDATES[name](seed)
        key = jax.random.key(1000 + seed)
        rows: Arrays = {}
        for search in own:
            rows |= run_search(key, candidate, search)
        return rows | run_controls(jax.random.fold_in(key, 1), candidate, seed)

    inputs = (case, [describe_search(SEARCHES[s]) for s in own])
    arrays = keep(__file__, f"main_job-{name.replace(' ', '_')}-{seed}", inputs, make)
    print(f"{name:20} {seed}", flush=True)
    return arrays


def run_search(key: jax.Array, candidate: Candidate, name: str) -> Arrays:
    """Run a search, and return the test results of the finalist that is picked.

    For the main search, add the finalists picked by other rules, and the ensemble of the finalists.
    """
    began = time.perf_counter()
    problem = candidate.problem("search")
    # Searches begin with nothing, so that results show what they find themselves.
    result = jc.run(key, SEARCHES[name], problem, budget=candidate.budget, starts=None)
    seconds = time.perf_counter() - began
    chains = result.finalists
    losses = [np.asarray(evaluate(candidate, s, chains).loss) for s in ("search", "select")]
    counts = [len(getattr(candidate.data, s).y) for s in ("search", "select")]
    test = evaluate(candidate, "test", chains)

    def pick(weights: tuple[float, float]) -> np.ndarray:
        total = sum(w * n * loss for w, n, loss in zip(weights, counts, losses, strict=True))
        return take(test, int(np.argmin(total)))

    rows = {name: pick(RULE)}
    rows[f"{name}: loss on search, seconds"] = np.array([result.best_loss, seconds])
    if name != FOUND:
        return rows
    rows |= {rule: pick(weights) for rule, weights in RULES.items()}
    rows["ensemble of the finalists"] = score_ensemble(candidate, chains)
    return rows


def run_longer(
    key: jax.Array, candidate: Candidate, net: jc.Bank, nets: list[jc.Bank]
) -> np.ndarray:
    """Tune the plain net for up to 3,000 steps; `select` chooses the number of steps."""
    data = candidate.data
    longer = [*nets, *(tune(key, net, data.search, steps) for steps in LONG_STEPS)]
    best = min(longer, key=lambda own: score_net(own, data.select)[0])
    return score_net(best, data.test)


def run_combined(key: jax.Array, candidate: Candidate, seed: int) -> np.ndarray:
    """Train a plain net on random combinations of faults.

    Unlike the other plain nets, it knows which faults there are.
    """
    net = jc.train.independent(
        key,
        combine_faults(seed),
        layer=LAYER,
        head=HEAD,
        num_nets=1,
        depth=candidate.plain_depth,
        num_steps=candidate.bank.num_steps,
    )
    return score_net(net, candidate.data.test)


def run_controls(key: jax.Array, candidate: Candidate, seed: int) -> Arrays:
    bank, data = candidate.bank, candidate.data
    net_key, tune_key, chain_key = jax.random.split(key, 3)
    rows: Arrays = {}
    if bank.parents:
        chains = jc.chain.pad(bank.parents)
        best = chains[int(np.argmin(evaluate(candidate, "select", chains).loss))]
        rows["best parent"] = take(evaluate(candidate, "test", best[None]), 0)
        rows["ensemble of the parents"] = score_ensemble(candidate, chains)
        if (best >= 0).sum() <= candidate.max_layers + 1:
            edit = find_best_edit(candidate, best)
            rows["best parent, best single edit"] = take(evaluate(candidate, "test", edit[None]), 0)
    net = jc.train.independent(
        net_key,
        data.train,
        layer=LAYER,
        head=HEAD,
        num_nets=1,
        depth=candidate.plain_depth,
        num_steps=bank.num_steps,
    )
    rows["plain net, same steps"] = score_net(net, data.test)
    nets = [net, *(tune(tune_key, net, data.search, steps) for steps in TUNING_STEPS)]
    best_net = min(nets, key=lambda own: score_net(own, data.select)[0])
    rows["plain net, fine-tuned on search"] = score_net(best_net, data.test)
    if candidate.reference:
        rows[TUNED_LONGER] = run_longer(tune_key, candidate, net, nets)
    if candidate.reference:
        rows[COMBINED] = run_combined(net_key, candidate, seed)
    random = candidate.problem("search").space.sample(chain_key, NUM_RANDOM)
    out = evaluate(candidate, "test", random)
    rows["random chains, median"] = np.array([np.median(out.loss), np.median(out.accuracy)])
    if candidate.reference:
        chain = jc.chain.pad([candidate.reference], candidate.max_layers)
        rows["known faults, undone in reverse order"] = take(evaluate(candidate, "test", chain), 0)
    return rows


def evaluate(candidate: Candidate, split: str, chains: Any) -> jc.Evaluation:
    """Evaluate chains without the layer penalty.

    The chains may be longer than those that a search may make.
    """
    problem = candidate.problem(split, np.shape(chains)[1] - 1)
    return jc.evaluate(jc.Problem(problem.bank, problem.data, problem.max_layers), chains)


def take(out: jc.Evaluation, row: int) -> np.ndarray:
    return np.array([float(out.loss[row]), float(out.accuracy[row])])


def score_net(net: jc.Bank, batch: jc.Batch) -> np.ndarray:
    chain = jc.chain.pad([net.parents[0]])
    return take(jc.evaluate(jc.Problem(net, batch, chain.shape[1] - 1), chain), 0)


def score_ensemble(candidate: Candidate, chains: Any) -> np.ndarray:
    """Compute the loss and accuracy on test of the mean of the class probabilities."""
    x, y = candidate.data.test
    apply = jax.jit(jc.apply_chain)
    bank = candidate.bank.without_names()
    mean = jnp.mean(
        jnp.stack([jax.nn.softmax(apply(bank, jnp.asarray(c), x)) for c in chains]), axis=0
    )
    loss = -jnp.log(jnp.maximum(mean[jnp.arange(len(y)), y], 1e-30)).mean()
    return np.array([float(loss), float((mean.argmax(axis=1) == y).mean())])


def find_best_edit(candidate: Candidate, parent: np.ndarray) -> np.ndarray:
    """Find the neighbor of a parent with the lowest loss on search."""
    problem = candidate.problem("search")
    tokens = [int(token) for token in parent if token >= 0]
    chain = jnp.asarray(jc.chain.pad([tokens], candidate.max_layers)[0])
    rows, is_neighbor = problem.space.neighbors(chain)
    rows = jnp.where(is_neighbor[:, None], rows, chain)
    loss = jnp.where(is_neighbor, jc.evaluate(problem, rows).loss, jnp.inf)
    return np.asarray(rows[loss.argmin()])


def summarize(rows: Arrays) -> dict[str, dict[str, Any]]:
    """Compute the IQM of the loss and the mean accuracy of each row.

    Also compute the difference between the chain that was found and the row, paired by seed.
    """
    found = rows[FOUND][:, 0]
    summary = {}
    for name in (name for name in ORDER if name in rows):
        values = rows[name]
        loss = values[:, 0]
        row: dict[str, Any] = {
            "loss": jc.chainbench.stats.iqm(loss[None])._asdict(),
            "mean": float(loss.mean()),
            "accuracy": float(values[:, 1].mean()),
        }
        if name != FOUND:
            row["difference"] = compare(found - loss)
            row["lower"] = int((found < loss).sum())
            row["equal"] = int((found == loss).sum())
        summary[name] = row
    return summary


def compare(differences: np.ndarray) -> dict[str, float]:
    """Compute the mean of paired differences and its bootstrap 95% interval."""
    mean = float(differences.mean())
    if np.ptp(differences) == 0 or len(differences) < 2:
        return {"value": mean, "low": mean, "high": mean}
    interval = bootstrap((differences,), np.mean, rng=0, n_resamples=2000).confidence_interval
    return {"value": mean, "low": float(interval.low), "high": float(interval.high)}


def describe_space(candidate: Candidate) -> dict[str, float]:
    """Count all chains, and estimate how long scoring all of them would take.

    The estimate is extrapolated from chains of few layers.
    """
    layers = min(candidate.max_layers, TIMED_LAYERS)
    few = candidate.problem("search", layers)
    jax.block_until_ready(jc.evaluate_all(few)[1].loss)  # compile
    began = time.perf_counter()
    out = jc.evaluate_all(few)[1]
    jax.block_until_ready(out.loss)
    seconds = time.perf_counter() - began
    every = candidate.problem("search").space
    num_layers = candidate.bank.num_layers
    calls = sum(num_layers**i for i in range(1, candidate.max_layers + 1))
    return {
        "num_layers": num_layers,
        "max_layers": candidate.max_layers,
        "num_chains": every.num_chains,
        "seconds_for_all": seconds * calls / int(out.layer_calls),
    }


def format_table(summary: dict[str, Any], spaces: dict[str, Any], num: int) -> str:
    """Format a Markdown table for each candidate."""
    parts = []
    for name, rows in summary.items():
        space = spaces[name]
        seconds = space["seconds_for_all"]
        parts.append(
            f"**{name}**: {space['num_layers']} layers, chains of up to {space['max_layers']}, "
            f"{space['num_chains']:,} chains; scoring all takes about {format_time(seconds)}\n"
        )
        parts.append(
            "| | loss on test | accuracy | found minus row | found is lower in |\n"
            "|---|---|---|---|---|"
        )
        for title, row in rows.items():
            loss = row["loss"]
            cells = [title, f"{loss['value']:.3f} [{loss['low']:.3f}, {loss['high']:.3f}]"]
            cells.append(f"{row['accuracy']:.1%}")
            if "difference" in row:
                d = row["difference"]
                cells.append(f"{d['value']:+.3f} [{d['low']:+.3f}, {d['high']:+.3f}]")
                equal = f", equal in {row['equal']}" if row["equal"] else ""
                cells.append(f"{row['lower']} of {num}{equal}")
            else:
                cells += ["", ""]
            parts.append("| " + " | ".join(cells) + " |")
        parts.append("")
    return "\n".join(parts).strip()


def format_time(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} minutes"


def draw_all(out: Path) -> None:
    """Draw both figures from main_job.json and from main_job_seeds.json of `jchain search`."""
    saved = json.loads((out / "main_job.json").read_text())["runs"]
    runs = {
        name: {row: np.array(values) for row, values in rows.items()}
        for name, rows in saved.items()
    }
    summary = json.loads((out / "main_job_seeds.json").read_text())
    layers = summary["layers"][summary["seeds"].index(SHOWN_SEED)]
    job = partial(draw_job, rows=runs["repair"], layers=layers)
    files.write_atomically(out / "main_job.png", job)
    files.write_atomically(out / "candidates.png", partial(draw_candidates, runs=runs))


def draw_job(path: str, rows: Arrays, layers: Sequence[str]) -> None:
    """Draw digits on their way through the chain that was found, and the loss on test.

    Each seed is one dot.
    """
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    parts: Any = figure.subfigures(1, 2, width_ratios=(1, 1.05))
    left, right = parts
    titles, images = apply_step_by_step(layers)
    grid = left.subplots(images.shape[1], len(titles))
    for column, title in enumerate(titles):
        for row, axes in enumerate(grid[:, column]):
            axes.imshow(images[column, row], cmap="gray_r", vmin=0, vmax=1, interpolation="bicubic")
            axes.set(xticks=[], yticks=[])
        grid[0, column].set_title(title, fontsize=9)
    axes = right.subplots()
    shown = [name for name in JOB_ROWS if name in rows]
    for place, name in enumerate(shown):
        loss = rows[name][:, 0]
        color = "C3" if name == FOUND else "C0"
        axes.plot(loss, np.full(len(loss), place), "o", color=color, alpha=0.35, markersize=5)
        axes.plot(np.mean(loss), place, "|", color=color, markersize=18)
    labels = [f"{JOB_ROWS[name]}, {rows[name][:, 1].mean():.0%}" for name in shown]
    axes.set_yticks(range(len(shown)), labels)
    axes.invert_yaxis()
    axes.set(xscale="log", xlabel="loss on test, a dot per seed")
    axes.grid(visible=True, axis="x", alpha=0.3)
    figure.savefig(path, dpi=110)


def apply_step_by_step(layers: Sequence[str]) -> tuple[list[str], np.ndarray]:
    """Apply each repair of a chain to four digits, `[C, 4, 8, 8]`.

    The first row has the digits before any repair, and the last one the digits without faults.

    Args:
      layers: names along the chain that `jchain search` found with SHOWN_SEED.
    """
    task = jc.tasks.make("repair", SHOWN_SEED)
    bank = task.make_bank(jax.random.split(jax.random.key(SHOWN_SEED), 4)[0])
    x, y = task.data.test
    rows = jnp.array([int(jnp.argmax(y == digit)) for digit in SHOWN_DIGITS])
    hidden = x[rows]
    titles, columns = ["input"], [hidden]
    for name in layers:
        if not name.startswith("undo "):
            break
        group, place = bank.find(bank.names.index(name))
        hidden = group.apply(place, hidden)
        titles.append(name.replace("undo ", "undo\n"))
        columns.append(hidden)
    titles.append("without\nfaults")
    columns.append(jc.tasks.make_repair(SHOWN_SEED, faults=[]).data.test.x[rows])
    return titles, np.asarray(jnp.stack(columns)).reshape(len(columns), 4, 8, 8)


def draw_candidates(path: str, runs: dict[str, Arrays]) -> None:
    """Plot the loss on test of the chain that was found against that of three controls.

    Each seed is one dot.
    """
    controls = ("best parent", "plain net, same steps", "plain net, fine-tuned on search")
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    for axes, control in zip(figure.subplots(1, 3, sharey=True), controls, strict=True):
        for name, rows in runs.items():
            if control in rows:
                axes.plot(rows[control][:, 0], rows[FOUND][:, 0], ".", label=name)
        low, high = 0.03, 30
        axes.plot([low, high], [low, high], color="gray", linewidth=0.8)
        axes.set(xscale="log", yscale="log", xlabel=f"loss of the {control}")
        axes.grid(visible=True, alpha=0.3)
    figure.axes[0].set_ylabel("loss of the chain found")
    figure.axes[1].legend(fontsize="small")
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
