"""Measure how close a sweep of chains of convolutions comes to the limit of the processor.

    python benchmarks/images.py --json benchmarks/results/images_cpu.json  # 10 minutes, 2 CPU cores

The sweep evaluates all chains of up to four blocks of one to three convolutions. Its bank is like
the one that `jchain search --data` makes for images. The limit is the arithmetic of all distinct
layer and head calls at the speed of the fastest large matrix product. Expected result: 34 to 44% of
the limit on a processor with AVX-512, where a single convolution of 16 channels reaches 36 to 43%.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from machine import count_call_flops, describe_device, measure_matmul, versions

import jchain as jc
from jchain import files

DEPTH, NUM_CLASSES = 4, 10
# Shape of an example, and number of examples.
BANKS: dict[str, tuple[tuple[int, ...], int]] = {
    "conv 16 8x8, depths 1 to 3": ((8, 8, 16), 128),
    "conv 16 16x16, depths 1 to 3": ((16, 16, 16), 32),
}
NUM_LAYERS = 12


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write results here")
    args = parser.parse_args()
    rows = []
    for name in BANKS:
        rows.append(row := measure(name))
        print(
            f"{row['bank']}: {row['chains']:,} chains in {row['seconds']:.0f} s, "
            f"{row['of_limit']:.0%} of the limit "
            f"(processor time {row['busy_seconds']:.0f} s, {row['of_limit_busy']:.0%})",
            flush=True,
        )
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        files.write_json(
            args.json, {"device": describe_device(), "versions": versions(), "images": rows}
        )


def measure(name: str) -> dict[str, Any]:
    """Measure the seconds of the sweep and of its limit, in both wall-clock and processor time.

    The two kinds of time differ if other processes use the processor too. The product that sets the
    limit is timed before and after the sweep.
    """
    shape, num_examples = BANKS[name]
    x_key, y_key, key = jax.random.split(jax.random.key(0), 3)
    x, y = (
        jax.random.normal(x_key, (num_examples, *shape)),
        jax.random.randint(y_key, (num_examples,), 0, NUM_CLASSES),
    )
    layers = [jc.layers.ConvBlock(shape[-1], 1 + i % 3) for i in range(NUM_LAYERS)]
    heads = [jc.layers.PoolHead(NUM_CLASSES), jc.layers.ConvHead(NUM_CLASSES)]
    params = [
        jax.tree.map(lambda leaf: 0.5 * leaf, m.init(key, x[:1])["params"])
        for m in (*layers, *heads)
    ]
    bank = jc.Bank.stack(layers, params[: len(layers)], heads, params[len(layers) :])
    problem = jc.Problem(bank, jc.Batch(x, y), DEPTH)
    chains = jc.chain.ChainSpace(bank.num_layers, bank.num_heads, DEPTH).enumerate()
    said = jc.explain_plan(problem, chains)
    # All layers, and all heads, are called equally often.
    flops = sum(
        calls * np.mean([count_call_flops(group, x) for group in groups for _ in group.tokens])
        for groups, calls in ((bank.layers, said.layer_calls), (bank.heads, said.head_calls))
    )
    jax.block_until_ready(jc.evaluate(problem, chains[:1]))
    compiled = jax.jit(
        jc.evaluate, compiler_options=jc.engine.compiler_options(jax.default_backend())
    )
    run = compiled.lower(problem, jnp.asarray(chains)).compile()
    gflops = [measure_matmul(clock) for clock in (time.perf_counter, time.process_time)]
    begin = time.perf_counter(), time.process_time()
    jax.block_until_ready(run(problem, jnp.asarray(chains)))
    seconds, busy = time.perf_counter() - begin[0], time.process_time() - begin[1]
    # If there are several cores, the processor time of the product also counts each of them.
    gflops = [
        (a + measure_matmul(clock)) / 2
        for a, clock in zip(gflops, (time.perf_counter, time.process_time), strict=True)
    ]
    return {
        "bank": name,
        "chains": len(chains),
        "layer_calls": said.layer_calls,
        "head_calls": said.head_calls,
        "plan": str(said.plan),
        "seconds": seconds,
        "busy_seconds": busy,
        "of_limit": float(flops / gflops[0] / 1e9 / seconds),
        "of_limit_busy": float(flops / gflops[1] / 1e9 / busy),
    }


if __name__ == "__main__":
    main()
