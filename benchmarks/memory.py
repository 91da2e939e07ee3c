"""Compare the memory that an evaluation or a search promises to take with what it takes.

    python benchmarks/memory.py --json benchmarks/results/memory_cpu.json

The run took 12 minutes on 2 CPU cores, with tests beside it. Expected result: no evaluation takes
more than its `memory_limit`, or more than 1.25 times the estimate of `jc.explain_plan`; beam search
and critic search take no more for a head of 32,768 classes when the bank has four times as many
layers.

Each case runs in its own process, which makes the call once to compile it, gives freed memory back
to the operating system, resets the process's peak (`/proc/self/clear_refs`), and makes the call
again. What is taken is the peak of the resident memory during the second call, less the resident
memory before it. Linux only.
"""

import argparse
import ctypes
import gc
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from machine import describe_device, versions

import jchain as jc

MIB = 2**20
NUM_CHAINS, DEPTH = 64, 4


class Case(NamedTuple):
    """A call whose memory is measured, by name."""

    layers: str  # a key of BANKS
    call: str  # "evaluate", or the name of a search
    plan: str = "auto"  # a key of PLANS
    limit: int | None = None  # the memory limit in MiB
    num_layers: int = 8


def make_problem(layer: Any, head: Any, shape: tuple[int, ...], num_layers: int) -> jc.Problem:
    """Make a problem of random weights and data."""
    keys = jax.random.split(jax.random.key(0), num_layers + 3)
    x = jax.random.normal(keys[0], shape)
    params = [layer.init(key, x[:1])["params"] for key in keys[3:]]
    y = jax.random.randint(keys[1], shape[:1], 0, head.num_classes)
    bank = jc.Bank.stack(layer, params, head, [head.init(keys[2], x[:1])["params"]])
    return jc.Problem(bank, jc.Batch(x, y), max_layers=DEPTH)


def make_mlp(num_layers: int) -> jc.Problem:
    """2,048 examples of 512 numbers: 4 MiB of activations per prefix."""
    layer, head = jc.layers.ResidualMLP(512), jc.layers.DenseHead(10)
    return make_problem(layer, head, (2048, 512), num_layers)


def make_conv(num_layers: int) -> jc.Problem:
    """256 images of 16x16x32: 8 MiB of activations per prefix."""
    layer, head = jc.layers.ConvBlock(32), jc.layers.ConvHead(10)
    return make_problem(layer, head, (256, 16, 16, 32), num_layers)


def make_wide_head(num_layers: int) -> jc.Problem:
    """256 examples of 64 numbers, and 32,768 classes: 32 MiB of outputs per chain."""
    layer, head = jc.layers.ResidualMLP(64), jc.layers.DenseHead(32_768)
    return make_problem(layer, head, (256, 64), num_layers)


BANKS: dict[str, Callable[[int], jc.Problem]] = {
    "MLP": make_mlp,
    "convolutions": make_conv,
    "32,768 classes": make_wide_head,
}
PLANS: dict[str, Any] = {
    "auto": None,
    "DepthFirst": jc.engine.DepthFirst(),
    "Blocks(8)": jc.engine.Blocks(8),
    "Blocks(32)": jc.engine.Blocks(32),
    "Blocks(16), any": jc.engine.Blocks(16, (1, 4), jc.engine.Share.NOTHING, (1, 4)),
}
SEARCHES: dict[str, Any] = {
    "random search": jc.RandomSearch(16),
    "local search": jc.LocalSearch(2),
    "evolution": jc.Evolution(16, 4, 8),
    "beam search": jc.BeamSearch(max_width=4),
    "critic search": jc.CriticSearch(width=16),
    "linearized search": jc.LinearizedSearch(),
    "target propagation": jc.TargetPropagation(2),
    "Q-learning": jc.QLearning(8),
    "MCTS": jc.MCTS(8),
    "actor-critic": jc.ActorCritic(num_chains=8),
}


def list_cases() -> list[Case]:
    """List all cases."""
    plans = [Case(layers, "evaluate", plan) for layers in BANKS for plan in PLANS]
    limits = [
        Case(layers, "evaluate", "auto", limit) for layers in BANKS for limit in (96, 192, 768)
    ]
    searches = [Case("MLP", name) for name in SEARCHES]
    heads = [
        Case("32,768 classes", name, num_layers=num)
        for name in ("beam search", "critic search", "MCTS", "random search")
        for num in (4, 16)
    ]
    return plans + limits + searches + heads


def read_status(name: str) -> int:
    """Read a number of bytes from the status of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def measure_peak(call: Callable[[], Any]) -> int:
    """Return the bytes that a call takes at its peak, without what its first call keeps."""
    jax.block_until_ready(call())
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    before = read_status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    jax.block_until_ready(call())
    return read_status("VmHWM") - before


def run_case(case: Case) -> dict[str, Any]:
    """Measure one case in this process."""
    problem = BANKS[case.layers](case.num_layers)
    if case.call == "evaluate":
        rng = np.random.default_rng(0)
        rows = [[*rng.integers(0, case.num_layers, DEPTH), case.num_layers] for _ in range(64)]
        chains = jnp.asarray(rows, jnp.int32)
        limit = None if case.limit is None else case.limit * MIB
        given = {"plan": PLANS[case.plan], "memory_limit": limit}
        promise = jc.explain_plan(problem, chains, **given)
        taken = measure_peak(lambda: jc.evaluate(problem, chains, **given).loss)
        return {"plan": str(promise.plan), "promised": promise.num_bytes, "taken": taken}
    search = SEARCHES[case.call]
    state = jax.jit(search.init)(jax.random.key(0), problem)
    step = jax.jit(search.step)
    kept = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    for seed in range(2):
        state, _ = step(jax.random.key(seed), state, problem)
    taken = measure_peak(lambda: step(jax.random.key(2), state, problem))
    return {"state": kept, "taken": taken}


def run_in_process(case: Case) -> dict[str, Any]:
    """Measure one case in another process."""
    done = subprocess.run(
        [sys.executable, __file__, "--case", json.dumps(case)],
        capture_output=True,
        text=True,
        check=True,
    )
    return {**case._asdict(), **json.loads(done.stdout.splitlines()[-1])}


def format_table(rows: list[dict[str, Any]]) -> str:
    """Format the rows as two tables: evaluations, with what they promise, and searches."""
    lines = ["| bank | plan | limit | promised | taken |", "|---|---|---|---|---|"]
    for row in rows:
        if row["call"] == "evaluate":
            name = row["plan"].replace("block_size=", "").replace("widths=(1,), ", "")
            name = name.split(", share")[0] + ")" * (", share" in name)
            limit = "" if row["limit"] is None else f"{row['limit']} MiB"
            lines.append(
                f"| {row['layers']} | `{name}` | {limit} | {row['promised'] / MIB:.0f} MiB | "
                f"{row['taken'] / MIB:.0f} MiB |"
            )
    lines += ["", "| bank | search | layers | state | taken |", "|---|---|---|---|---|"]
    lines += [
        f"| {row['layers']} | {row['call']} | {row['num_layers']} | {row['state'] / MIB:.0f} MiB | "
        f"{row['taken'] / MIB:.0f} MiB |"
        for row in rows
        if row["call"] != "evaluate"
    ]
    return "\n".join(lines)


def main() -> None:
    """Measure all cases."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", type=Path, help="file to write the results to")
    parser.add_argument("--quick", action="store_true", help="measure only a few cases")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        print(json.dumps(run_case(Case(*json.loads(args.case)))))
        return
    cases = list_cases()
    rows = []
    for case in cases[:: len(cases) // 3] if args.quick else cases:
        rows.append(row := run_in_process(case))
        promised = row.get("promised", row.get("state", 0))
        print(
            f"{case.layers:>14} {case.call:>18} {row.get('plan', case.num_layers)!s:>40} "
            f"limit {case.limit or '-':>4} promised {promised / MIB:8.1f} MiB "
            f"taken {row['taken'] / MIB:8.1f} MiB",
            flush=True,
        )
    if args.json:
        result = {"device": describe_device(), "versions": versions(), "rows": rows}
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    print(format_table(rows))


if __name__ == "__main__":
    main()
