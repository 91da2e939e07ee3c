"""Can inverses of square layers lead from an output back to the layers that made it?

    python experiments/inverse.py

The run takes one hour on 2 CPU cores. `--quick` runs depths of at most 4, one kind of layer, and
two seeds in two minutes, and writes nothing.

Expected result: at depth 8, the chain is found in 20 of 20 cases with noise of 0 and of 10%, in 0.3
and 3 seconds. At depth 12, it takes 23 seconds from exact outputs and 3 minutes with noise of 1%.
With slopes of 0.2 or condition numbers of 10,000, the secret chain is found if the halves meet
nearer to the end. Meeting in the middle has the lowest interquartile mean regret from 1,000 layer
calls on, but linearized search is better on routed couplings and residual layers. The ideal layer
is far worse than the gradient.

- *Recovery*: a bank has 16 orthogonal layers, 16 wide, with a leaky ReLU of slope 0.5. A secret
  chain of them is applied to 64 normal examples, noise is added to its outputs, and
  `jc.meet_in_the_middle` looks for the chain. The tables show how often it is found, and in how
  many seconds, by depth, noise (its standard deviation relative to that of the outputs), number of
  probes, slope, condition number of the matrices, and float type. They also show whether the
  residual tells right from wrong: the largest residual of a right chain, and the smallest one of a
  wrong chain.
- *Growth*: seconds against depth and bank size, compared with the time to evaluate all chains one
  after another at the speed of `jc.evaluate_all`.
- *Search*: regret (0 is the best of all chains, 1 the median one) of each search at equal layer
  calls, on digits banks of invertible layers with 12 layers and 4 slots.
- *Ideal layer*: Spearman's correlation with the true change in loss, over all single swaps of a
  chain, of distances to the target at the slot (`jchain.inverse.target_scores`) and of gradient
  scores.
- *Trained layers*: recovery of chains of the layers of these banks.

The script writes inverse.json, .md, and .png to experiments/results.
"""

import time
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure
from records import (
    correlate,
    describe_machine,
    evaluate_swaps,
    keep,
    make_parser,
    make_pool,
    write_results,
)

import jchain as jc

NUM_LAYERS, FEATURES, EXAMPLES, SLOPE = 16, 16, 64, 0.5
NOISES = (0.01, 0.03, 0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0, 2.0)
# One row of the recovery table: depth, noise, and options that differ from the defaults.
Case = tuple[int, float, dict[str, Any]]
CASES: list[tuple[Case, int]] = [
    *(((depth, 0.0, {}), 20) for depth in (2, 4, 6, 8)),
    ((10, 0.0, {}), 5),
    ((12, 0.0, {}), 3),
    *(((12, 0.01, options), 2) for options in ({"tolerance": 0.01}, {})),
    ((8, 0.1, {}), 20),
    *(
        ((depth, noise, {}), 10)
        for depth in (4, 6, 8)
        for noise in NOISES
        if (depth, noise) != (8, 0.1)
    ),
    *(
        ((depth, noise, {"num_probes": probes}), 10)
        for probes in (2, 32)
        for depth, noises in ((6, (0.5, 0.7, 1.0)), (8, (0.1, 0.3, 0.4, 0.5)))
        for noise in noises
    ),
    *(((8, noise, {"num_sketch": 128}), 5) for noise in (0.4, 0.5)),
    *(((8, noise, {"slope": slope}), 10) for slope in (1.0, 0.2, 0.1) for noise in (0.0, 0.03)),
    ((8, 0.0, {"slope": 0.01}), 10),
    *(((8, 0.03, {"slope": slope, "num_forward": 4}), 10) for slope in (0.2, 0.1)),
    *(
        ((8, 0.0, {"condition": c, "is_x64": x64}), 10)
        for x64 in (False, True)
        for c in (1e1, 1e2, 1e3, 1e4)
    ),
    *(((8, 0.0, {"condition": c, "is_x64": False, "num_forward": 4}), 10) for c in (1e3, 1e4)),
    *(((8, 0.01, {"condition": c}), 5) for c in (1e1, 1e2)),
]
QUICK: list[tuple[Case, int]] = [
    ((depth, noise, {}), 2) for depth in (2, 4) for noise in (0.0, 0.1)
]
# The largest halves whose sketches fit into half of 24 GiB, at 96 bytes each.
FIT = 12 * 2**30 / (2 * 96)
COLUMNS = (
    "depth",
    "noise",
    "seeds",
    "found",
    "largest_right",
    "smallest_wrong",
    "seconds",
    "most_seconds",
)
GROWTH = [(n, depth) for n in (4, 8, 16, 64) for depth in range(2, 25, 2) if n ** (depth / 2) < 2e7]
LAYERS = {
    "dense": jc.layers.InvertibleDense(64),
    "coupling": jc.layers.AdditiveCoupling(64),
    "residual": jc.layers.InvertibleResidual(64),
}
BANKS = [(layer, kind, 0) for layer in LAYERS for kind in ("independent", "routed")]
TRAINED_DEPTH, TRAINED_NOISES, NUM_TRAINED = 6, (0.0, 0.01, 0.1), 5
NUM_STEPS, DEPTH, SIZE = 300, 4, 12
SEARCHES = {
    "meet in the middle": jc.SuffixBeamSearch(),
    "target propagation": jc.TargetPropagation(),
    "target propagation, exact": jc.TargetPropagation(is_exact=True),
    "linearized": jc.LinearizedSearch(),
    "beam search": jc.BeamSearch(),
    "local search": jc.LocalSearch(),
    "evolution": jc.Evolution(),
    "random search": jc.RandomSearch(),
}
BUDGETS, NUM_SEEDS = (300, 1000, 3000), 10
SCORES = (
    "linearized",
    "activations",
    "weights",
    "ideal, all of it",
    "ideal, the way there",
    "ideal, undone",
)


def main() -> None:
    parser = make_parser(__doc__, quick="depth 4 at most, one kind of layers; nothing is written")
    args = parser.parse_args()
    recovery = [run_case(case, seeds) for case, seeds in (QUICK if args.quick else CASES)]
    print(format_recovery(recovery), flush=True)
    banks, seeds = (BANKS[:1], 2) if args.quick else (BANKS, NUM_SEEDS)
    trained = [row for bank in banks for row in recover_trained(bank, min(seeds, NUM_TRAINED))]
    print(format_recovery(trained), flush=True)
    sizes = [size for size in GROWTH if size[0] ** size[1] < 1e5] if args.quick else GROWTH
    found = keep(
        __file__,
        "inverse-growth",
        sizes,
        lambda: {"seconds": np.array([time_growth(*size) for size in sizes])},
    )
    growth = [
        {"layers": n, "depth": depth, "seconds": float(row[0]), "exhaustive": float(row[1])}
        for (n, depth), row in zip(sizes, found["seconds"], strict=True)
    ]
    with make_pool(2) as pool:
        searched = [*pool.map(search_bank, banks, [seeds] * len(banks))]
        scored = [*pool.map(correlate_bank, banks)]
    search, ideal = summarize_search(searched), summarize_correlations(banks, scored)
    tables = [format_recovery(recovery), format_recovery(trained), format_growth(growth)]
    tables = "\n\n".join([*tables, format_search(search, banks), format_ideal(ideal)])
    print(tables)
    if args.quick:
        return
    found = {
        "recovery": recovery,
        "trained": trained,
        "growth": growth,
        "search": search,
        "ideal": ideal,
    }
    result = {**describe_machine(), "banks": BANKS, "budgets": BUDGETS, **found}
    write_results(
        args.out, "inverse", result, tables, partial(draw, recovery=recovery, growth=growth)
    )


def make_secret(
    seed: int, depth: int, noise: float, options: dict[str, Any]
) -> tuple[jc.Bank, Any, Any, np.ndarray]:
    """Return a bank, inputs, noisy outputs, and the secret chain that made the outputs."""
    num_layers = options.get("num_layers", NUM_LAYERS)
    layer = jc.layers.InvertibleDense(FEATURES, negative_slope=options.get("slope", SLOPE))
    keys = jax.random.split(jax.random.key(seed), num_layers + 4)
    # The singular values have equal ratios and a geometric mean of 1.
    condition = options.get("condition", 1.0)
    values = condition ** np.linspace(0.5, -0.5, FEATURES)
    params = []
    for key in keys[:num_layers]:
        left, right = jax.random.orthogonal(key, FEATURES, (2,))
        bias = 0.1 * jax.random.normal(jax.random.fold_in(key, 1), (FEATURES,))
        params.append(
            {"kernel": (left * jnp.asarray(values, left.dtype)[None]) @ right, "bias": bias}
        )
    head, dtype = jc.layers.DenseHead(2), params[0]["bias"].dtype
    bank = jc.Bank.stack(
        layer, params, head, [head.init(keys[-4], jnp.ones((1, FEATURES), dtype))["params"]]
    )
    x = jax.random.normal(keys[-3], (EXAMPLES, FEATURES))
    chain = np.asarray(jax.random.randint(keys[-2], (depth,), 0, num_layers))
    hidden = x
    for token in chain:
        hidden = bank.layers[0].apply(int(token), hidden)
    return bank, x, hidden + noise * hidden.std() * jax.random.normal(keys[-1], hidden.shape), chain


def recover_secret(seed: int, case: Case) -> tuple[float, float, float]:
    """Try to recover a secret chain.

    Return whether it is found, its residual, and the seconds.
    """
    depth, noise, options = case
    recovery_options = {
        name: options[name]
        for name in ("num_probes", "num_sketch", "num_forward", "tolerance")
        if name in options
    }
    with jax.enable_x64(options.get("is_x64", False)):
        return run_recovery(*make_secret(seed, depth, noise, options), recovery_options)


def run_recovery(
    bank: jc.Bank, x: Any, y: Any, chain: np.ndarray, options: dict[str, Any]
) -> tuple[float, float, float]:
    start = time.perf_counter()
    try:
        found = jc.meet_in_the_middle(bank, x, y, len(chain), **options)
    except ValueError as error:
        if "whose halves meet" not in str(error):
            raise
        return 0.0, np.inf, time.perf_counter() - start
    seconds = time.perf_counter() - start
    return float(np.array_equal(found.layers[0], chain)), float(found.residuals[0]), seconds


def recover_trained(bank: tuple[str, str, int], num_seeds: int) -> list[dict[str, Any]]:
    """Recover random chains of layers that were trained on digits.

    The chains are recovered from their outputs for 64 digits.
    """

    def run() -> dict[str, np.ndarray]:
        problem = make_problem(*bank)
        x = problem.data.x[:EXAMPLES]
        runs = []
        for noise in TRAINED_NOISES:
            for seed in range(num_seeds):
                rng = np.random.default_rng(seed)
                chain = rng.integers(0, SIZE, TRAINED_DEPTH)
                y = problem.bank.embed(x)
                for token in chain:
                    y = problem.bank.layers[0].apply(int(token), y)
                y += noise * y.std() * rng.standard_normal(y.shape).astype(y.dtype)
                runs.append(run_recovery(problem.bank, x, y, chain, {}))
        return {"runs": np.array(runs, np.float32).reshape(len(TRAINED_NOISES), num_seeds, 3)}

    name = f"inverse-trained-{'-'.join(map(str, bank))}"
    found = keep(__file__, name, (bank, num_seeds), run)["runs"]
    return [
        {
            "layer": bank[0],
            "kind": bank[1],
            "seed": bank[2],
            **summarize_recovery(TRAINED_DEPTH, noise, runs),
        }
        for noise, runs in zip(TRAINED_NOISES, found, strict=True)
    ]


def run_case(case: Case, num_seeds: int) -> dict[str, Any]:
    depth, noise, options = case

    def run() -> dict[str, np.ndarray]:
        runs = [recover_secret(seed, case) for seed in range(num_seeds)]
        return {"runs": np.array(runs, np.float64).astype(np.float32)}

    found = keep(__file__, f"inverse-recover-{depth}", (case, num_seeds), run)["runs"]
    return {**summarize_recovery(depth, noise, found), **options}


def summarize_recovery(depth: int, noise: float, runs: np.ndarray) -> dict[str, Any]:
    is_right, residual, seconds = runs.T
    wrong = residual[(is_right == 0) & np.isfinite(residual)]
    return {
        "depth": depth,
        "noise": noise,
        "seeds": len(runs),
        "found": int(is_right.sum()),
        "largest_right": float(residual[is_right > 0].max()) if is_right.any() else None,
        "smallest_wrong": float(wrong.min()) if wrong.size else None,
        "seconds": float(np.median(seconds)),
        "most_seconds": float(seconds.max()),
    }


def time_growth(num_layers: int, depth: int) -> tuple[float, float]:
    """Measure the seconds of an exact recovery, and of evaluating all chains one after another.

    A short recovery is run twice, and the second time counts, so compilation is not included. The
    time of all chains is extrapolated from that of shorter ones.
    """
    bank, x, y, chain = make_secret(0, depth, 0.0, {"num_layers": num_layers})
    seconds = 0.0
    for _ in range(2):
        if seconds < 10:
            seconds = run_recovery(bank, x, y, chain, {"num_candidates": 1})[2]
    problem = jc.Problem(bank, jc.Batch(x, jnp.zeros(len(x), int)), 4 if num_layers < 32 else 3)
    jc.evaluate_all(problem)
    start = time.perf_counter()
    jax.block_until_ready(jc.evaluate_all(problem)[1].loss)
    each = (time.perf_counter() - start) / num_layers**problem.max_layers
    return seconds, each * float(num_layers) ** depth


def make_problem(layer: str, kind: str, seed: int) -> jc.Problem:
    data = jc.data.load("digits", seed)
    sizes: Any = {"num_layers": SIZE} if kind == "routed" else {"num_nets": SIZE // DEPTH}
    options: Any = {
        "layer": LAYERS[layer],
        "head": jc.layers.DenseHead(10),
        "depth": DEPTH,
        "num_steps": NUM_STEPS,
    }
    bank = getattr(jc.train, kind)(jax.random.key(seed), data.train, **options, **sizes)
    return jc.Problem(bank, data.search, DEPTH)


def search_bank(bank: tuple[str, str, int], num_seeds: int) -> dict[str, np.ndarray]:
    """Compute the regret of each search at each budget, `[budgets, seeds]`.

    Also return the run time of each search in seconds.
    """

    def run() -> dict[str, np.ndarray]:
        problem, found = make_problem(*bank), {}
        loss = np.asarray(jc.evaluate_all(problem)[1].loss)
        for name, search in SEARCHES.items():
            start = time.perf_counter()
            keys = jax.random.split(jax.random.key(1), 1 if search.is_deterministic else num_seeds)
            results = jc.run_many(keys, search, problem, budget=BUDGETS[-1])
            losses = np.stack([result.curve.at(BUDGETS) for result in results], axis=1)
            losses = np.broadcast_to(losses, (len(BUDGETS), num_seeds))
            # A run that has no chain yet counts as having the worst chain.
            losses = np.minimum(losses, loss.max())
            found[f"{name} seconds"] = np.array([time.perf_counter() - start])
            found[name] = np.maximum((losses - loss.min()) / (np.median(loss) - loss.min()), 0)
        return found

    return keep(
        __file__,
        f"inverse-search-{'-'.join(map(str, bank))}",
        (bank, num_seeds),
        run,
    )


def correlate_bank(bank: tuple[str, str, int]) -> dict[str, np.ndarray]:
    """Correlate each score with the true change in loss, `[chains, SCORES]`.

    The chains are random ones and some of the best 1%.
    """

    def run() -> dict[str, np.ndarray]:
        problem = make_problem(*bank)
        chains, out = jc.evaluate_all(problem)
        is_long = chains[:, DEPTH] >= SIZE
        order = np.argsort(np.asarray(out.loss)[is_long])
        rng = np.random.default_rng(0)
        picks = {
            "random": rng.choice(order, 8, replace=False),
            "good": rng.choice(order[: len(order) // 100], 8, replace=False),
        }
        return {
            sort: np.array([correlate_chain(problem, chains[is_long][i]) for i in rows])
            for sort, rows in picks.items()
        }

    return keep(
        __file__,
        f"inverse-ideal-{'-'.join(map(str, bank))}",
        bank,
        run,
    )


def correlate_chain(problem: jc.Problem, chain: np.ndarray) -> list[float]:
    change = evaluate_swaps(problem, chain)
    is_swap = np.arange(change.shape[1]) != chain[:-1, None]
    scores = [
        jc.swap_scores(problem, chain, kind) for kind in ("linearized", "activations", "weights")
    ]
    for is_projected, is_exact in ((False, False), (True, False), (True, True)):
        scores.append(
            jc.inverse.target_scores.score_edits_by_target(
                problem, chain, is_projected=is_projected, is_exact=is_exact
            ).swap
        )
    return [
        correlate(np.nan_to_num(np.asarray(score)[:-1][is_swap]), change[is_swap])
        for score in scores
    ]


def summarize_search(searched: list[dict[str, np.ndarray]]) -> list[dict[str, Any]]:
    rows = []
    for name in SEARCHES:
        regret = np.stack([found[name] for found in searched])  # [banks, budgets, seeds]
        row: dict[str, Any] = {
            "search": name,
            "seconds": float(np.median([found[f"{name} seconds"] for found in searched])),
        }
        row["regret"] = [jc.chainbench.stats.iqm(regret[:, i]) for i in range(len(BUDGETS))]
        row["by_bank"] = regret.mean(axis=2).round(5).tolist()
        row["solved"] = [float(np.mean(regret[:, i] < 1e-5)) for i in range(len(BUDGETS))]
        rows.append(row)
    return rows


def summarize_correlations(
    banks: list[tuple[str, str, int]], scored: list[dict[str, np.ndarray]]
) -> list[dict[str, Any]]:
    rows = []
    for layer in LAYERS:
        for kind in ("independent", "routed"):
            selected = [
                found
                for bank, found in zip(banks, scored, strict=True)
                if bank[:2] == (layer, kind)
            ]
            for sort in ("random", "good") if selected else ():
                mean = np.mean(np.concatenate([found[sort] for found in selected]), axis=0)
                rows.append(
                    {
                        "layer": layer,
                        "kind": kind,
                        "chains": sort,
                        "spearman": dict(zip(SCORES, mean.tolist(), strict=True)),
                    }
                )
    return rows


def format_recovery(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| depth | noise | else | found | largest residual of a right chain "
        "| smallest of a wrong one | seconds, median (most) |"
    ]
    lines.append("|---" * 7 + "|")
    for row in rows:
        others = {name: value for name, value in row.items() if name not in COLUMNS}
        other = (
            ", ".join(v if isinstance(v, str) else f"{name} {v:g}" for name, v in others.items())
            or "-"
        )
        residuals = [
            "-" if row[name] is None else f"{row[name]:.2g}"
            for name in ("largest_right", "smallest_wrong")
        ]
        lines.append(
            f"| {row['depth']} | {row['noise']:g} | {other} | {row['found']} of {row['seeds']} "
            f"| {' | '.join(residuals)} | {row['seconds']:.2f} ({row['most_seconds']:.2f}) |"
        )
    return "\n".join(lines)


def format_growth(rows: list[dict[str, Any]]) -> str:
    lines = ["| layers | depth | chains | seconds | all chains, seconds |", "|---" * 5 + "|"]
    for row in rows:
        lines.append(
            f"| {row['layers']} | {row['depth']} | {row['layers'] ** row['depth']:.1e} "
            f"| {row['seconds']:.2f} | {row['exhaustive']:.1e} |"
        )
    return "\n".join(lines)


def format_search(rows: list[dict[str, Any]], banks: list[tuple[str, str, int]]) -> str:
    """Format Markdown tables of the regret: over all banks, and the mean of each bank."""
    lines = [
        "| search | " + " | ".join(f"regret at {b:,}" for b in BUDGETS) + " | solved | seconds |",
        "|---" * (3 + len(BUDGETS)) + "|",
    ]
    for row in rows:
        cells = [f"{e.value:.4f} [{e.low:.4f}, {e.high:.4f}]" for e in row["regret"]]
        lines.append(
            f"| {row['search']} | {' | '.join(cells)} | {row['solved'][-1]:.0%} "
            f"| {row['seconds']:.0f} |"
        )
    lines += [
        "",
        f"| bank, regret at {BUDGETS[1]:,} | " + " | ".join(row["search"] for row in rows) + " |",
    ]
    lines.append("|---" * (1 + len(rows)) + "|")
    for i, bank in enumerate(banks):
        means = [f"{row['by_bank'][i][1]:.3f}" for row in rows]
        lines.append(f"| {' '.join(map(str, bank))} | {' | '.join(means)} |")
    return "\n".join(lines)


def format_ideal(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| layers | bank | chains | " + " | ".join(SCORES) + " |",
        "|---" * (3 + len(SCORES)) + "|",
    ]
    for row in rows:
        cells = [f"{row['spearman'][name]:.2f}" for name in SCORES]
        lines.append(f"| {row['layer']} | {row['kind']} | {row['chains']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(path: str, recovery: list[dict[str, Any]], growth: list[dict[str, Any]]) -> None:
    """Plot seconds against the number of halves, and recovery against noise."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for n in sorted({row["layers"] for row in growth}):
        selected = [row for row in growth if row["layers"] == n]
        halves = [n ** (row["depth"] / 2) for row in selected]
        (line,) = left.plot(
            halves, [row["seconds"] for row in selected], marker="o", label=f"{n} layers"
        )
        left.plot(halves, [row["exhaustive"] for row in selected], ls=":", color=line.get_color())
    # Fit a line through the largest halves.
    most, seconds = max((row["layers"] ** (row["depth"] / 2), row["seconds"]) for row in growth)
    ends = np.array([most / 1e3, most * 30])
    left.plot(ends, seconds * ends / most, color="gray", lw=1, ls="--", label=r"$\propto N^{D/2}$")
    left.axhline(3600, color="gray", lw=1)
    left.text(4, 3600 * 1.3, "an hour", color="gray")
    left.axvline(FIT, color="gray", lw=1)
    left.text(FIT * 0.8, 3e-3, "halves fit in 12 GiB", color="gray", rotation=90, ha="right")
    left.set(
        xscale="log", yscale="log", ylim=(1e-3, 1e10), xlabel="halves $N^{D/2}$ of $N^D$ chains"
    )
    left.set(ylabel="seconds (dotted: all chains)", title="Exact outputs")
    for depth in (4, 6, 8):
        selected = [row for row in recovery if row["depth"] == depth and set(row) == {*COLUMNS}]
        selected.sort(key=lambda row: row["noise"])
        shares = [row["found"] / row["seeds"] for row in selected]
        right.plot(
            [row["noise"] for row in selected], shares, marker="o", label=f"{depth} layers deep"
        )
    right.set(
        xlabel="noise, by the outputs' standard deviation",
        ylabel="share of chains found",
        title="Noisy outputs",
    )
    right.set_xscale("symlog", linthresh=0.01)
    for ax in (left, right):
        ax.grid(alpha=0.3)
        ax.legend(loc="upper left" if ax is left else "lower left")
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
