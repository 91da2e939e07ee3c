"""Measure the errors of losses in float32 and bfloat16, compared with float64.

    python benchmarks/precision.py --json benchmarks/results/precision_cpu.json  # 1 minute

The script evaluates 200 random chains of 4 layers on each bank; the banks are trained on digits.
Expected result: the relative error of a loss is below 1e-6 in float32 and below 1e-2 in bfloat16.
"""

import argparse
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jchain as jc
from jchain import files

BANKS = ("independent", "routed", "snapshots", "random")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write results here")
    args = parser.parse_args()
    data = jc.data.load("digits", seed=0)
    modules = {"layer": jc.layers.ResidualMLP(64), "head": jc.layers.DenseHead(10)}
    rows = []
    for kind in BANKS:
        problem = jc.Problem(
            getattr(jc.train, kind)(jax.random.key(0), data.train, **modules),
            data.search,
            max_layers=4,
        )
        bank = problem.bank
        chains = jc.chain.ChainSpace(bank.num_layers, bank.num_heads, 4).sample(
            jax.random.key(1), 200
        )
        exact = losses_in_float64(problem, np.asarray(chains))
        row: dict[str, Any] = {
            "bank": kind,
            "loss": {"lowest": exact.min(), "highest": exact.max()},
        }
        for dtype in (jnp.float32, jnp.bfloat16):
            error = np.abs(
                np.asarray(jc.evaluate(problem, chains, dtype=dtype).loss, np.float64) / exact - 1
            )
            row[jnp.dtype(dtype).name] = {
                "median": float(np.median(error)),
                "largest": float(error.max()),
            }
        rows.append(row)
        print(row)
    if args.json:
        result = {
            "device": jax.devices()[0].device_kind,
            "jax": jax.__version__,
            "relative_error": rows,
        }
        files.write_json(args.json, result)


def losses_in_float64(problem: jc.Problem, chains: np.ndarray) -> np.ndarray:
    """Evaluate one chain at a time, by the plain definition."""
    with jax.enable_x64(True):
        exact = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), problem.bank)
        x: Any = np.asarray(problem.data.x, np.float64)
        y: Any = np.asarray(problem.data.y)
        run = jax.jit(lambda bank, chain: problem.loss_fn(jc.apply_chain(bank, chain, x), y).mean())
        return np.array([run(exact, jnp.asarray(chain)) for chain in chains])


if __name__ == "__main__":
    main()
