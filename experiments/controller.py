"""Does a critic that was trained on other banks find good chains of an unseen bank sooner?

    python experiments/chainbench.py && python experiments/controller.py

The run takes 14 minutes on 2 CPU cores. `--quick` uses only the wine data and 8 banks, and takes 3
minutes.

Expected result: over all 36 problems, the zero-shot critic has found 1.28 times the lowest loss
after 96 layer calls and 1.08 times after 300. Beam search has found 1.68 and 1.31 times the lowest
loss.

The script trains critics on banks of the three data sets and four kinds, made with other seeds,
training lengths, depths, label noise, and rotated inputs: one critic for all kinds, and one without
each kind. Each critic then ranks prefixes of ChainBench's problems, both zero-shot (it learns
nothing there) and fine-tuned. The baselines are the same search without a pretrained critic, which
either ranks by the loss of the best head or learns each bank from scratch, beam search, and local
search. Losses are looked up in ChainBench's tables. A deterministic search runs once, the others 10
times. There are two summaries: one of the odd-numbered problems, on which nothing was chosen, and
one of all problems.

The script writes controller.json and controller.md to experiments/results. It also writes the
critic of all kinds as critic.safetensors, for `jchain.Critic.load`.
"""

import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from records import (
    describe_machine,
    keep,
    make_parser,
    make_pool,
    make_zero_shot_search,
    use_tables,
    write_results,
)

import jchain as jc

KINDS = jc.chainbench.KINDS
BUDGETS = (48, 96, 300, 1000, 4000)
GRID = np.unique(np.concatenate([np.geomspace(24, 16000, 80), BUDGETS]).astype(int))
NUM_SEEDS = {"wine": 32, "breast_cancer": 32, "digits": 16}
FIRST_SEED = 300  # ChainBench uses 0 to 2
Case = tuple[str, str, int]


def main() -> None:
    parser = make_parser(
        __doc__,
        quick="only wine, few banks and runs; nothing is written",
        has_folder=True,
        has_workers=True,
    )
    parser.add_argument("--seeds", type=int, default=10, help="runs of each stochastic search")
    args = parser.parse_args()
    names, num_banks, seeds = list(jc.chainbench.NAMES), NUM_SEEDS, args.seeds
    if args.quick:
        names = [name for name in names if name.startswith("wine") and name.endswith("0")]
        num_banks, seeds = {"wine": 2}, 3
        jc.chainbench.build(args.folder, names)
    start = time.perf_counter()
    cases = [
        (data, kind, FIRST_SEED + i)
        for data, count in num_banks.items()
        for i in range(count)
        for kind in KINDS
    ]
    training_sets = collect_training_sets(cases, args.workers)
    print(f"{len(training_sets)} banks studied in {time.perf_counter() - start:.0f} s", flush=True)
    critics = {unseen: train(training_sets, unseen) for unseen in ("", *KINDS)}
    with make_pool(args.workers) as pool:
        futures = {
            name: pool.submit(evaluate_contestant, name, critics, args.folder, names, seeds)
            for name in CONTESTANTS
        }
        curves = {name: future.result() for name, future in futures.items()}
    everything = list(range(len(names)))
    halves = {"all": everything} if args.quick else {"odd": everything[1::2], "all": everything}
    summary = {half: summarize(curves, rows) for half, rows in halves.items()}
    table = "\n\n".join(
        format_table(summary[half], f"{half}, {len(rows)} problems")
        for half, rows in halves.items()
    )
    print(table, flush=True)
    if args.quick:
        return
    result = {
        **describe_machine(),
        "config": {"problems": names, "banks": num_banks, "seeds": seeds, "budgets": BUDGETS},
        "seconds": round(time.perf_counter() - start),
        "summary": summary,
        "loss_over_best": {
            name: {
                n: rows[i][:, np.searchsorted(GRID, BUDGETS)].round(5).tolist()
                for i, n in enumerate(names)
            }
            for name, rows in curves.items()
        },
    }
    write_results(args.out, "controller", result, table)


def find_kind(solved: jc.chainbench.SolvedProblem) -> str:
    return solved.name.split("-")[1]


CONTESTANTS: dict[str, Any] = {
    "zero-shot": lambda solved, critics: make_zero_shot_search(critics[""]),
    "zero-shot, kind unseen": lambda solved, critics: make_zero_shot_search(
        critics[find_kind(solved)]
    ),
    # A pretrained critic needs no exploration (as found on even-numbered problems).
    "fine-tuned": lambda solved, critics: jc.CriticSearch(critics[""], epsilon=0.0),
    "fine-tuned, kind unseen": lambda solved, critics: jc.CriticSearch(
        critics[find_kind(solved)], epsilon=0.0
    ),
    "from scratch": lambda solved, critics: jc.CriticSearch(),
    "by head loss": lambda solved, critics: make_zero_shot_search(None),
    "beam search": lambda solved, critics: jc.BeamSearch(width=4, max_width=256),
    "local search": lambda solved, critics: jc.LocalSearch(),
}


def collect_training_sets(
    cases: list[Case], workers: int
) -> dict[Case, jc.agent.pretrain.TrainingSet]:
    """Collect the training set of each bank."""
    with make_pool(workers) as pool:
        # Neighbors in the list share programs.
        return dict(
            zip(
                cases,
                pool.map(
                    collect_training_set, cases, chunksize=max(1, len(cases) // (8 * workers))
                ),
                strict=True,
            )
        )


def collect_training_set(case: Case) -> jc.agent.pretrain.TrainingSet:
    def make() -> dict[str, Any]:
        training_set = jc.agent.pretrain.make_training_set(make_problem(*case))
        return {**training_set._asdict(), "sizes": np.array(training_set.sizes)}

    arrays = keep(__file__, "-".join(map(str, case)), case, make)
    return jc.agent.pretrain.TrainingSet(
        arrays["inputs"], arrays["stop"], arrays["best"], tuple(map(int, arrays["sizes"]))
    )


def make_problem(data_name: str, kind: str, seed: int) -> jc.Problem:
    """Make a bank of 12 layers that varies with its seed in more than its weights."""
    rng = np.random.default_rng(seed)
    data = jc.data.load(data_name, seed)
    steps, depth, noise = ((1.0, 4, 0.0), (0.3, 4, 0.0), (1.0, 2, 0.0), (1.0, 4, 0.2))[seed % 4]
    x, y = np.asarray(data.train.x), np.array(data.train.y)
    search_x = np.asarray(data.search.x)
    is_noisy = rng.random(len(y)) < noise
    y[is_noisy] = rng.integers(0, data.num_classes, is_noisy.sum())
    if seed % 8 >= 4:
        turn = np.linalg.qr(rng.normal(size=(x.shape[1], x.shape[1])))[0].astype(x.dtype)
        x, search_x = x @ turn, search_x @ turn
    train = jc.Batch(jnp.asarray(x), jnp.asarray(y))
    options: Any = {
        "layer": jc.layers.ResidualMLP(x.shape[1]),
        "head": jc.layers.DenseHead(data.num_classes),
        "depth": depth,
        "num_steps": int(steps * (1000 if data_name == "digits" else 200)),
    }
    key = jax.random.key(seed)
    if kind in ("routed", "random"):
        make: Any = getattr(jc.train, kind)
        bank = make(key, train, num_layers=12, num_heads=3, **options)
    elif kind == "independent":
        bank = jc.train.independent(key, train, num_nets=12 // depth, **options)
    else:
        bank = jc.train.snapshots(key, train, num_snapshots=12 // depth, **options)
    return jc.Problem(bank, jc.Batch(jnp.asarray(search_x), data.search.y), max_layers=4)


def train(training_sets: dict[Case, jc.agent.pretrain.TrainingSet], unseen: str) -> jc.Critic:
    """Train a critic on all banks except those of one kind."""
    return jc.pretrain_critic(
        jax.random.key(0),
        [training_set for (_, kind, _), training_set in training_sets.items() if kind != unseen],
    )


def evaluate_contestant(
    name: str, critics: dict[str, jc.Critic], folder: Path, names: list[str], seeds: int
) -> np.ndarray:
    """Compute the ratio of the lowest loss found to the best loss, `[M, S, G]`.

    The axes are problems, runs, and grid points.
    """
    start, curves = time.perf_counter(), []
    for problem_name in names:
        solved = jc.chainbench.load(folder, problem_name)
        curves.append(evaluate_search(solved, CONTESTANTS[name](solved, critics), seeds))
    print(f"{name:24} {time.perf_counter() - start:.0f} s", flush=True)
    return np.array(curves)


def evaluate_search(solved: jc.chainbench.SolvedProblem, search: Any, seeds: int) -> np.ndarray:
    """Compute the ratio of the lowest loss found to that of all chains, `[S, G]`.

    The axes are runs and grid points.
    """
    keys = jax.random.split(jax.random.key(0), 1 if search.is_deterministic else seeds)
    best = solved.loss["search"].min()
    results = jc.run_many(
        keys,
        use_tables(search),
        solved.tabular_problem(),
        budget=int(GRID[-1]),
        target_loss=float(best),
        starts=None,  # to show what the search finds itself
    )
    loss = np.array([result.curve.at(GRID) for result in results])
    return np.where(np.isfinite(loss), loss, np.median(solved.loss["search"])) / best


def summarize(curves: dict[str, np.ndarray], rows: list[int]) -> dict[str, Any]:
    """Compute the IQM at each budget, and how many layer calls local search needs for it."""
    local = np.array(
        [
            jc.chainbench.stats.iqm(curves["local search"][rows, :, i], num_resamples=2).value
            for i in range(len(GRID))
        ]
    )
    summary: dict[str, Any] = {}
    for name, ratios in curves.items():
        summary[name] = {}
        for budget in BUDGETS:
            estimate = jc.chainbench.stats.iqm(ratios[rows][:, :, np.searchsorted(GRID, budget)])
            is_as_low = local <= estimate.value
            needed = int(GRID[np.argmax(is_as_low)]) if is_as_low.any() else None
            summary[name][str(budget)] = {**estimate._asdict(), "local_search_needs": needed}
    return summary


def format_table(summary: dict[str, Any], title: str) -> str:
    """Format a Markdown table of the IQM and interval of the ratio.

    What local search needs is in brackets.
    """
    lines = [
        f"| {title} | " + " | ".join(f"{b:,} layer calls" for b in BUDGETS) + " |",
        "|---" * (len(BUDGETS) + 1) + "|",
    ]
    for name, row in summary.items():
        cells = []
        for cell in row.values():
            needed = (
                "more" if cell["local_search_needs"] is None else f"{cell['local_search_needs']:,}"
            )
            interval = f"{cell['value']:.3f} [{cell['low']:.3f}, {cell['high']:.3f}]"
            cells.append(interval if name == "local search" else f"{interval} ({needed})")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
