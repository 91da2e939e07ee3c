"""Do chains of a routed bank of convolutions beat a net trained for equally many steps?

    python experiments/images.py

The run takes 33 minutes on 2 CPU cores shared with other jobs (about two minutes of one core for
each seed of digits). `--quick` runs one seed with few steps in one minute.

Expected result over 10 seeds of digits: the chain that was found has a test loss of 0.096. The
plain net has 0.127 (higher in 9 of 10 seeds), and the plain net stopped early has 0.098 (higher in
6 of 10).

A bank of 12 blocks, which have 1, 2, and 3 convolutions in turn and 16 channels, and two heads
(pooled and dense) is trained on random routes of 4 blocks. Local search looks for a chain on
`search`, its finalists are re-ranked on `select`, and `test` is used only once, at the end. On
`test`, the chain is compared with:

- a plain net of the same blocks and head, trained alone for the same number of gradient steps as
  the whole bank, with the same batch size, stem, optimizer, and decay;
- the same net, stopped at the tenth of its training at which the loss on `select` is lowest;
- random chains of the bank;
- a random chain after its best single swap of a layer or of the head, by the loss on `search`.

There are two data sets: scikit-learn's digits, 8x8x1, with seeds 0 to 9; and the same digits
enlarged to three noisy channels, 32x32x3, which the stem pools to 16x16, with seed 0. The stem is
random and fixed in all of them. The number of steps was chosen on single seeds from 100 on.

Finished seeds are kept. The script writes images.json, images.md, and images.png to
experiments/results.
"""

import time
from functools import partial
from typing import Any

import jax
import numpy as np
from matplotlib.figure import Figure
from records import describe_machine, keep, make_parser, make_pool, write_results

import jchain as jc

BLOCKS = [jc.layers.ConvBlock(16, depth) for depth in (1, 2, 3)]
HEADS = [jc.layers.PoolHead(10), jc.layers.ConvHead(10)]
NUM_LAYERS, DEPTH, NUM_RANDOM = 12, 4, 32
# Number of snapshots of the plain net, from which `select` chooses one.
NUM_STOPS = 10
ARMS = (
    "found",
    "plain net",
    "plain net, stopped early",
    "best swap of a random chain",
    "random chain",
)
# By data set: side of the stem's windows, seeds, gradient steps, and layer calls of the search.
SETS: dict[str, tuple[int, int, int, int]] = {
    "digits_8x8": (1, 10, 1000, 600),
    "large_digits": (2, 1, 1000, 600),
}


def main() -> None:
    parser = make_parser(
        __doc__, quick="one seed of few steps; nothing is written", has_workers=True
    )
    parser.add_argument(
        "--first-seed",
        type=int,
        default=0,
        help="first seed; sizes were chosen on seeds from 100 on",
    )
    parser.add_argument("--only", choices=SETS, help="run one of the data sets; nothing is written")
    args = parser.parse_args()
    sets = {"digits_8x8": (1, 1, 100, 100)} if args.quick else SETS
    sets = {name: sizes for name, sizes in sets.items() if args.only in (None, name)}
    start = time.perf_counter()
    cases = [
        (name, pool, args.first_seed + seed, num_steps, budget)
        for name, (pool, num_seeds, num_steps, budget) in sets.items()
        for seed in range(num_seeds)
    ]
    with make_pool(args.workers) as workers:
        runs = [
            (case[0], run) for case, run in zip(cases, workers.map(run_case, cases), strict=True)
        ]
    rows = {name: [run for other, run in runs if other == name] for name in sets}
    summary = {name: summarize(found) for name, found in rows.items()}
    table = "\n\n".join(format_table(name, summary[name], rows[name]) for name in sets)
    print(table, flush=True)
    if args.quick or args.only or args.first_seed:
        return
    result = {
        **describe_machine(),
        "config": {
            "sets": sets,
            "num_stops": NUM_STOPS,
            "num_layers": NUM_LAYERS,
            "depth": DEPTH,
            "num_random": NUM_RANDOM,
        },
        "seconds": round(time.perf_counter() - start),
        "summary": summary,
        "runs": {
            name: [{k: np.asarray(v).tolist() for k, v in run.items()} for run in rows[name]]
            for name in sets
        },
    }
    write_results(args.out, "images", result, table, partial(draw, rows=rows))


def run_case(case: tuple[str, int, int, int, int]) -> dict[str, np.ndarray]:
    return keep(__file__, "images-" + "-".join(map(str, case)), case, partial(evaluate_arms, *case))


def load_data(name: str, seed: int) -> jc.data.Dataset:
    """Load the digits unchanged, or fewer of them, enlarged four times in three noisy channels."""
    if name == "digits_8x8":
        return jc.data.load(name, seed)
    digits = jc.data.LOADERS["digits_8x8"]()
    rng = np.random.default_rng(seed)
    x = np.repeat(np.kron(np.asarray(digits[0]), np.ones((1, 4, 4, 1))), 3, axis=3)
    x = x + 4 * rng.normal(size=x.shape)
    return jc.data.split(x, np.asarray(digits[1]), seed=seed, name=name, sizes=(600, 150, 150, 240))


def evaluate_arms(
    name: str, pool: int, seed: int, num_steps: int, budget: int
) -> dict[str, np.ndarray]:
    """Compute the loss and accuracy on `test` of each arm, and the cost of the arm."""
    data = load_data(name, seed)
    bank_key, net_key, search_key, sample_key, stem_key = jax.random.split(jax.random.key(seed), 5)
    stem = jc.layers.ConvStem(16, pool)
    settings: Any = {"stem": stem, "num_steps": num_steps}
    settings["stem_params"] = stem.init(stem_key, data.train.x[:1])["params"]
    seconds = [time.perf_counter()]
    bank = jc.train.routed(
        bank_key,
        data.train,
        layer=BLOCKS,
        head=HEADS,
        num_layers=NUM_LAYERS,
        depth=DEPTH,
        num_heads=2,
        **settings,
    )
    seconds.append(time.perf_counter())
    search, select, test = (
        jc.Problem(bank, getattr(data, split), DEPTH) for split in ("search", "select", "test")
    )
    result = jc.run(search_key, jc.LocalSearch(), search, budget=budget, starts=None)
    chain = np.asarray(result.finalists)[int(np.argmin(jc.evaluate(select, result.finalists).loss))]
    seconds.append(time.perf_counter())
    layers, head = [int(t) for t in chain if 0 <= t < NUM_LAYERS], int(chain.max()) - NUM_LAYERS
    net = jc.train.snapshots(
        net_key,
        data.train,
        layer=[BLOCKS[token % len(BLOCKS)] for token in layers],
        head=HEADS[head],
        num_snapshots=NUM_STOPS,
        depth=len(layers),
        **settings,
    )
    seconds.append(time.perf_counter())
    sampled = np.asarray(
        jc.chain.ChainSpace(NUM_LAYERS, len(HEADS), DEPTH).sample(sample_key, NUM_RANDOM)
    )
    swapped = find_best_swap(search, sampled[0])
    stop = int(np.argmin(jc.evaluate(jc.Problem(net, data.select, len(layers)), net.parents).loss))
    nets = jc.evaluate(jc.Problem(net, data.test, len(layers)), net.parents)
    # `test` is used only once: all chains of the bank are evaluated together.
    out = jc.evaluate(test, np.concatenate([chain[None], swapped[None], sampled]))
    losses, accuracies = (
        [of_bank[0], of_nets[-1], of_nets[stop], of_bank[1], of_bank[2:].mean()]
        for of_bank, of_nets in ((out.loss, nets.loss), (out.accuracy, nets.accuracy))
    )
    return {
        "loss": np.array(losses),
        "accuracy": np.array(accuracies),
        "seconds": np.diff(seconds),
        "chain": chain,
        "layer_calls": np.array(result.curve.layer_calls[-1]),
        "search_loss": np.array(result.best_loss),
    }


def find_best_swap(problem: jc.Problem, chain: np.ndarray) -> np.ndarray:
    """Find the best chain among this chain and its swaps of one layer or of the head."""
    num_layers = int((chain >= 0).sum()) - 1
    swaps = np.repeat(chain[None], num_layers * NUM_LAYERS + len(HEADS), axis=0)
    for i in range(num_layers * NUM_LAYERS):
        swaps[i, i // NUM_LAYERS] = i % NUM_LAYERS
    swaps[-len(HEADS) :, num_layers] = NUM_LAYERS + np.arange(len(HEADS))
    return swaps[int(np.argmin(jc.evaluate(problem, swaps).loss))]


def summarize(runs: list[dict[str, np.ndarray]]) -> dict[str, Any]:
    """Compute the IQM of loss and accuracy by arm.

    Also count the seeds in which the chain that was found has a lower loss than the arm.
    """
    loss, accuracy = (np.array([run[key] for run in runs]) for key in ("loss", "accuracy"))
    return {
        arm: {
            "loss": jc.chainbench.stats.iqm(loss[None, :, i])._asdict(),
            "accuracy": jc.chainbench.stats.iqm(accuracy[None, :, i])._asdict(),
            "found_is_lower": int((loss[:, 0] < loss[:, i]).sum()),
        }
        for i, arm in enumerate(ARMS)
    }


def format_table(name: str, summary: dict[str, Any], runs: list[dict[str, np.ndarray]]) -> str:
    lines = [
        f"| {name}, {len(runs)} seeds | test loss | accuracy | found is lower |",
        "|---|---|---|---|",
    ]
    for arm, row in summary.items():
        loss, accuracy = row["loss"], row["accuracy"]
        lines.append(
            f"| {arm} | {loss['value']:.4f} [{loss['low']:.4f}, {loss['high']:.4f}] "
            f"| {accuracy['value']:.1%} [{accuracy['low']:.1%}, {accuracy['high']:.1%}] "
            f"| {'' if arm == 'found' else row['found_is_lower']} |"
        )
    bank, search, net = np.mean([run["seconds"] for run in runs], axis=0)
    calls = np.mean([run["layer_calls"] for run in runs])
    lines.append(
        f"\nSeconds: bank {bank:.0f}, search of {calls:.0f} layer calls {search:.0f}, "
        f"plain net {net:.0f}."
    )
    return "\n".join(lines)


def draw(path: str, rows: dict[str, list[dict[str, np.ndarray]]]) -> None:
    """Plot the test loss of each arm, with one dot for each seed."""
    figure = Figure(figsize=(4.5 * len(rows), 3.5), layout="constrained")
    for axes, (name, runs) in zip(
        figure.subplots(1, len(rows), squeeze=False)[0], rows.items(), strict=True
    ):
        for run in runs:
            axes.plot(run["loss"], range(len(ARMS)), "o-", alpha=0.5)
        axes.set_yticks(range(len(ARMS)), ARMS)
        axes.set_xscale("log")
        axes.set_xlabel(f"test loss, {name}")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
