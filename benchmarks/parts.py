"""Measure what `jc.Problem(batch_size=)` costs in time, and what it saves in memory.

    python benchmarks/evaluate.py --parts --json benchmarks/results/parts_cpu.json

The run took 8 minutes on 2 CPU cores that other jobs also used. Expected result: parts are not
slower than the whole, and the peak memory is below 300 MB for parts of 1,000 and above 1 GB for the
whole.

A split of 50,000 examples with 784 features is evaluated as a whole and in parts. For the time,
both take turns. For the memory, each runs in a process of its own, which first makes the data and
the bank. The operating system measures by how much the peak of the process is above what it then
holds. This includes the compilation.
"""

import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import psutil
from machine import time_call

import jchain as jc

NUM_EXAMPLES, NUM_FEATURES, NUM_CLASSES = 50_000, 784, 10
NUM_LAYERS, DEPTH, HIDDEN = 8, 4, 64
PART_SIZES = (1_000, 5_000)
# Numbers of chains and of pairs of timings.
SIZES, QUICK_SIZES = (8, 7), (4, 3)
_STATUS = Path("/proc/self/status")


def make_data() -> jc.Batch:
    """Make the data in host memory, without temporary copies, which would raise the peak."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((NUM_EXAMPLES, NUM_FEATURES), np.float32)
    y: Any = rng.integers(0, NUM_CLASSES, NUM_EXAMPLES).astype(np.int32)
    return jc.Batch(x, y)


def make_bank() -> jc.Bank:
    x = np.zeros((1, NUM_FEATURES), np.float32)
    layer = jc.layers.ResidualMLP(NUM_FEATURES, HIDDEN)
    head = jc.layers.DenseHead(NUM_CLASSES)
    *keys, head_key = jax.random.split(jax.random.key(0), NUM_LAYERS + 1)
    params = [layer.init(key, x)["params"] for key in keys]
    return jc.Bank.stack(layer, params, head, [head.init(head_key, x)["params"]])


def make_chains(num_chains: int) -> np.ndarray:
    rng = np.random.default_rng(1)
    layers = rng.integers(0, NUM_LAYERS, (num_chains, DEPTH))
    return np.concatenate([layers, np.full((num_chains, 1), NUM_LAYERS)], axis=1).astype(np.int32)


def measure(*, quick: bool) -> dict[str, Any]:
    """Measure time and memory of the whole split and of each size of parts."""
    num_chains, num_pairs = QUICK_SIZES if quick else SIZES
    chains, data, bank = make_chains(num_chains), make_data(), make_bank()
    whole = jc.Problem(bank, data, DEPTH)
    rows = [
        measure_time(whole, jc.Problem(bank, data, DEPTH, batch_size=size), chains, num_pairs)
        for size in PART_SIZES
    ]
    memory = {str(size): measure_memory(size, num_chains) for size in (None, *PART_SIZES)}
    return {
        "config": {
            "shape": [NUM_EXAMPLES, NUM_FEATURES],
            "layer": f"ResidualMLP({NUM_FEATURES}, {HIDDEN})",
            "chains": num_chains,
            "pairs": num_pairs,
        },
        "layer_calls": jc.explain_plan(whole, chains).layer_calls,
        "data_bytes": data.x.nbytes + data.y.nbytes,
        "rows": rows,
        "peak_bytes_above_data": memory,
    }


def measure_time(
    whole: jc.Problem, parts: jc.Problem, chains: np.ndarray, num_pairs: int
) -> dict[str, Any]:
    """Time both in turns, after their losses have been compared."""

    def run(problem: jc.Problem) -> np.ndarray:
        return np.asarray(jc.evaluate(problem, chains).loss)

    error = float(np.max(np.abs(run(parts) / run(whole) - 1)))
    if error > 1e-6:
        raise ValueError(f"expected equal losses, got a relative difference of {error}")
    pairs = [
        (time_call(lambda: run(whole)), time_call(lambda: run(parts))) for _ in range(num_pairs)
    ]
    seconds = np.array(pairs)
    of_whole, of_parts = np.median(seconds, axis=0)
    ratios = seconds[:, 1] / seconds[:, 0]
    return {
        "batch_size": parts.batch_size,
        "whole_s": float(of_whole),
        "parts_s": float(of_parts),
        "ratio": float(of_parts / of_whole),
        "ratio_spread": np.quantile(ratios, [0.25, 0.75]).tolist(),
        "relative_error": error,
    }


def measure_memory(batch_size: int | None, num_chains: int) -> int:
    """Measure the peak of evaluating in a new process, in bytes above the data and the bank."""
    arguments = [sys.executable, __file__, str(batch_size or 0), str(num_chains)]
    done = subprocess.run(arguments, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])["peak"]


def evaluate_once(batch_size: int | None, num_chains: int) -> None:
    """Evaluate in this process, and print its peak above what it held before."""
    data, chains, bank = make_data(), make_chains(num_chains), make_bank()
    before = psutil.Process().memory_info().rss
    problem = jc.Problem(bank, data, DEPTH, batch_size=batch_size)
    jax.block_until_ready(jc.evaluate(problem, chains).loss)
    print(json.dumps({"peak": read_peak() - before}))


def read_peak() -> int:
    """Return the peak of this process in bytes.

    On Linux, `ru_maxrss` of a new process includes the peak of the process that started it.
    """
    if _STATUS.exists():
        line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # in bytes on macOS


def format_table(result: dict[str, Any]) -> str:
    """Format a Markdown table of the times and the memory."""
    head = ("examples at once", "time", "relative to the whole", "peak memory above the data")
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    peak = {size: f"{of / 1e6:.0f} MB" for size, of in result["peak_bytes_above_data"].items()}
    rows = result["rows"]
    seconds = float(np.median([row["whole_s"] for row in rows]))
    lines.append(f"| all {result['config']['shape'][0]:,} | {seconds:.2f} s | 1 | {peak['None']} |")
    for row in rows:
        low, high = row["ratio_spread"]
        ratio = f"{row['ratio']:.2f} ({low:.2f} to {high:.2f})"
        size = row["batch_size"]
        lines.append(f"| {size:,} | {row['parts_s']:.2f} s | {ratio} | {peak[str(size)]} |")
    return "\n".join(lines)


if __name__ == "__main__":
    evaluate_once(int(sys.argv[1]) or None, int(sys.argv[2]))
