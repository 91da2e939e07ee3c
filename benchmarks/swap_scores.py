"""Compare scoring all single swaps of a chain from one linearization with evaluating them.

    python benchmarks/swap_scores.py --json benchmarks/results/swap_scores_cpu.json  # 3 minutes
    python benchmarks/swap_scores.py --quick                            # 30 s, writes nothing

The chain has 24 layers of a bank of 96, so 2,280 swaps change something. Weights and data are
random. The two methods take turns, and the median of the turns is reported. Expected result on 2
CPU cores: linearized scores need 1/11 of the layer calls of exact evaluation. They take 1/8 of its
time for MLPs of width 64, and 1/5 for convolutions with 16 channels.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from evaluate import make_problem, random_chains
from machine import describe_device, versions

import jchain as jc
from jchain import files

NUM_LAYERS, DEPTH = 96, 24
BANKS: dict[str, tuple[Any, tuple[int, ...], int]] = {
    "mlp 64": (jc.layers.ResidualMLP(64), (64,), 512),
    "conv 16 8x8": (jc.layers.ConvBlock(16), (8, 8, 16), 128),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write results here")
    parser.add_argument("--quick", action="store_true", help="only MLPs of width 64, one turn")
    parser.add_argument(
        "--turns", type=int, default=5, help="turns; the median is reported (default: %(default)s)"
    )
    args = parser.parse_args()
    rows = []
    for name in ("mlp 64",) if args.quick else BANKS:
        rows.append(compare(name, 1 if args.quick else args.turns))
        print(format_row(rows[-1]), flush=True)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        config = {"num_layers": NUM_LAYERS, "depth": DEPTH, "turns": args.turns}
        files.write_json(
            args.json,
            {"device": describe_device(), "versions": versions(), "config": config, "rows": rows},
        )


def compare(name: str, num_turns: int) -> dict[str, Any]:
    layer, shape, num_examples = BANKS[name]
    problem = make_problem(layer, shape, num_examples, NUM_LAYERS, DEPTH)
    chain = random_chains(1, NUM_LAYERS, DEPTH)[0]
    swaps, is_swap = (
        np.asarray(a)
        for a in jc.chain.ChainSpace(NUM_LAYERS, 1, len(jnp.asarray(chain)) - 1).neighbors(
            jnp.asarray(chain)
        )
    )
    swaps = swaps[is_swap][: (NUM_LAYERS - 1) * DEPTH]
    jobs: dict[str, Callable[[], Any]] = {
        "exact": lambda: jc.evaluate(problem, swaps),
        "linearized": lambda: jc.gradient.score_edits(problem, chain),
        "linearized, 2 products": lambda: jc.gradient.score_edits(problem, chain, num_products=2),
        "activations": lambda: jc.gradient.score_edits(problem, chain, "activations"),
        "weights": lambda: jc.gradient.score_edits(problem, chain, "weights"),
    }
    outs = {job: jax.block_until_ready(run()) for job, run in jobs.items()}
    seconds: dict[str, list[float]] = {job: [] for job in jobs}
    for _ in range(num_turns):
        for job, run in jobs.items():
            start = time.perf_counter()
            jax.block_until_ready(run())
            seconds[job].append(time.perf_counter() - start)
    medians = {job: float(np.median(taken)) for job, taken in seconds.items()}
    calls = {job: int(out.layer_calls) for job, out in outs.items()}
    return {
        "bank": name,
        "layer_calls": calls,
        "seconds": medians,
        "layer_calls_over_linearized": calls["exact"] / calls["linearized"],
        "seconds_over_linearized": medians["exact"] / medians["linearized"],
    }


def format_row(row: dict[str, Any]) -> str:
    jobs = "; ".join(
        f"{job} {row['layer_calls'][job]:,} calls, {row['seconds'][job]:.3f} s"
        for job in row["seconds"]
    )
    return (
        f"{row['bank']}: {jobs}: exact over linearized "
        f"{row['layer_calls_over_linearized']:.1f} in layer calls, "
        f"{row['seconds_over_linearized']:.1f} in seconds"
    )


if __name__ == "__main__":
    main()
