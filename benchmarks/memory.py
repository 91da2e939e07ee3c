"""Compare the memory that evaluations and searches take with what is promised.

    python benchmarks/memory.py --json benchmarks/results/memory_cpu.json

The run took 4 minutes on 2 CPU cores. Linux only.

Each case runs in a process of its own, which computes once, to compile, and then again. The
operating system measures the peak of the second time above what the process held before it.
`jc.explain_plan` estimates the activations and temporaries of an evaluation, and `memory_limit`
bounds that estimate. Searches have no limit: their rows show what they take for heads of many
classes.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from machine import describe_device, versions

import jchain as jc
from jchain import files

MB = 10**6
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
# Freed memory goes back at once, so that the next peak shows all that is taken again.
_MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}


def make_problem(kind: str) -> jc.Problem:
    rng = np.random.default_rng(0)
    num_classes, depth = 10, 4
    if kind == "mlp 512":
        x = rng.standard_normal((2048, 512), np.float32)
        layer: Any = jc.layers.ResidualMLP(512, 512)
    elif kind == "conv 32":
        x = rng.standard_normal((64, 32, 32, 32), np.float32)
        layer = jc.layers.ConvBlock(32)
    else:
        x = rng.standard_normal((256, 64), np.float32)
        layer, num_classes, depth = jc.layers.ResidualMLP(64, 64), 32_768, 8
    head = jc.layers.DenseHead(num_classes)
    y: Any = rng.integers(0, num_classes, len(x)).astype(np.int32)
    *keys, head_key = jax.random.split(jax.random.key(0), 9)
    params = [layer.init(key, x[:1])["params"] for key in keys]
    bank = jc.Bank.stack(layer, params, head, [head.init(head_key, x[:1])["params"]])
    return jc.Problem(bank, jc.Batch(x, y), depth)


EVALUATIONS = [
    (kind, plan, limit)
    for kind in ("mlp 512", "conv 32", "mlp 64, 32,768 classes")
    for plan, limit in (
        ("default", None),
        ("default", 256 * MB),
        ("depth first", None),
        ("blocks of 8", None),
    )
]
SEARCHES = {
    "random search": jc.RandomSearch(),
    "local search": jc.LocalSearch(),
    "beam search": jc.BeamSearch(),
    "critic search": jc.CriticSearch(),
}
PLANS = {"default": None, "depth first": jc.engine.DepthFirst(), "blocks of 8": jc.engine.Blocks(8)}


def measure_evaluation(kind: str, plan: str, limit: int | None) -> dict[str, Any]:
    problem = make_problem(kind)
    chains = np.asarray(problem.space.sample(jax.random.key(1), 64))
    options: dict[str, Any] = {"plan": PLANS[plan], "memory_limit": limit}
    explained = jc.explain_plan(problem, chains, **options)
    peak = measure_peak(lambda: jc.evaluate(problem, chains, **options).loss)
    return {"plan": str(explained.plan), "estimate": explained.num_bytes, "peak": peak}


def measure_search(name: str) -> dict[str, Any]:
    problem = make_problem("mlp 64, 32,768 classes")

    def search() -> jax.Array:
        result = jc.run(jax.random.key(0), SEARCHES[name], problem, budget=400)
        return jax.numpy.asarray(result.best_loss)

    return {"peak": measure_peak(search)}


def measure_peak(run: Callable[[], jax.Array]) -> int:
    """Run twice, and return the peak of the second time above what was held before it."""
    run().block_until_ready()
    before = read_status("VmRSS")
    _CLEAR.write_text("5")  # forget the peak so far
    run().block_until_ready()
    return read_status("VmHWM") - before


def read_status(name: str) -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def start(*case: object) -> dict[str, Any]:
    """Measure a case in a new process."""
    done = subprocess.run(
        [sys.executable, __file__, "--case", json.dumps(case)],
        capture_output=True,
        text=True,
        env={**os.environ, **_MALLOC},
    )
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def format_table(result: dict[str, Any]) -> str:
    """Format Markdown tables of the evaluations and of the searches."""
    lines = ["| bank | plan | limit | estimate | taken |", "|---|---|---|---|---|"]
    for row in result["evaluations"]:
        limit = "" if row["limit"] is None else f"{row['limit'] / MB:.0f} MB"
        lines.append(
            f"| {row['bank']} | {row['asked']} | {limit} | {row['estimate'] / MB:.0f} MB | "
            f"{row['peak'] / MB:.0f} MB |"
        )
    lines += ["", "| search, 8 layers, 256 examples, 32,768 classes | taken |", "|---|---|"]
    for name, row in result["searches"].items():
        lines.append(f"| {name} | {row['peak'] / MB:.0f} MB |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--json", type=Path, help="write the results to this file")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        kind, *case = json.loads(args.case)
        measure = measure_evaluation if kind == "evaluation" else measure_search
        print(json.dumps(measure(*case)))
        return
    result = {
        "device": describe_device(),
        "versions": versions(),
        "evaluations": [
            {"bank": kind, "asked": plan, "limit": limit, **start("evaluation", kind, plan, limit)}
            for kind, plan, limit in EVALUATIONS
        ],
        "searches": {name: start("search", name) for name in SEARCHES},
    }
    if args.json:
        files.write_json(args.json, result)
    print(format_table(result))


if __name__ == "__main__":
    main()
