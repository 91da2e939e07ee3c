"""Measure what it costs to save a run, and what callbacks and time limits cost when absent.

    python benchmarks/saving.py --json benchmarks/results/saving_cpu.json

The run took 19 minutes on 2 CPU cores with nothing beside it. Expected result: saving every 10
seconds costs less than 3 percent of a run of a minute; a state of 100 MB stops the search for less
than half a second per checkpoint; `jc.run` takes as long as a bare loop of its steps, within 1
percent.

Every search is timed in pairs of runs that take turns, on a bank of 32 residual MLPs that are 64
wide. A run of 20 seconds that is saved every 3.3 seconds has as many checkpoints as one of a minute
that is saved every 10 seconds, so that what a checkpoint costs per run counts three times.
"""

import argparse
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from machine import describe_device, time_call, versions

import jchain as jc
from jchain import files
from jchain.runs.beginning import begin_anew
from jchain.runs.driver import iterate_parts
from jchain.runs.result import StopRule
from jchain.runs.run_folder import RunFolder
from jchain.runs.starts import list_starts
from jchain.runs.stepping import RunSpec

WIDTH, NUM_LAYERS, MAX_LAYERS, NUM_EXAMPLES, NUM_CLASSES = 64, 32, 8, 256, 10
SEARCHES = {
    "random search": jc.RandomSearch(),
    "local search": jc.LocalSearch(),
    "actor-critic": jc.ActorCritic(),
}
SAVES_PER_RUN = 6
STATE_BYTES = 100_000_000


class Sizes(NamedTuple):
    """How long the benchmark runs."""

    seconds: float  # of a run that is saved
    short_seconds: float  # of a run that is compared with a bare loop
    num_pairs: int
    num_short_pairs: int


FULL, QUICK = Sizes(20, 6, 5, 7), Sizes(3, 1, 1, 1)


class BigState(NamedTuple):
    """The state of random search, and an array that changes at each step."""

    state: Any
    array: jax.Array


@jc.pytree_dataclass
class BigRandomSearch:
    """Random search with a state of `STATE_BYTES`."""

    is_deterministic = False
    needs_gradient = False
    needs_invertible = False
    reads_activations = False

    def init(self, key: jax.Array, problem: jc.Problem) -> BigState:
        array = jnp.zeros(STATE_BYTES // 4)
        return BigState(jc.RandomSearch().init(key, problem), array)

    def step(
        self, key: jax.Array, state: BigState, problem: jc.Problem
    ) -> tuple[BigState, jc.Info]:
        inner, info = jc.RandomSearch().step(key, state.state, problem)
        return BigState(inner, state.array + 1), info


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--quick", action="store_true", help="short runs, one pair each")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    args = parser.parse_args()
    sizes = QUICK if args.quick else FULL
    problem = make_problem()
    rows = []
    for name, search in SEARCHES.items():
        rate = measure_rate(search, problem, sizes.short_seconds)
        row = {
            "search": name,
            "layer_calls_per_second": rate,
            "saving": compare_saving(search, problem, sizes, int(rate * sizes.seconds)),
            "bare": compare_with_bare(search, problem, sizes, int(rate * sizes.short_seconds)),
        }
        print(row, flush=True)
        rows.append(row)
    result = {
        "device": describe_device(),
        "versions": versions("orbax-checkpoint"),
        "config": {**sizes._asdict(), "saves_per_run": SAVES_PER_RUN, "state_bytes": STATE_BYTES},
        "rows": rows,
        "big_state_stops": measure_stops(problem, sizes.seconds),
    }
    if args.json:
        files.write_json(args.json, result)
    print(format_table(result))


def make_problem() -> jc.Problem:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((NUM_EXAMPLES, WIDTH), np.float32)
    y: Any = rng.integers(0, NUM_CLASSES, NUM_EXAMPLES).astype(np.int32)
    layer, head = jc.layers.ResidualMLP(WIDTH, WIDTH), jc.layers.DenseHead(NUM_CLASSES)
    *keys, head_key = jax.random.split(jax.random.key(0), NUM_LAYERS + 1)
    params = [layer.init(key, x)["params"] for key in keys]
    bank = jc.Bank.stack(layer, params, head, [head.init(head_key, x)["params"]])
    return jc.Problem(bank, jc.Batch(x, y), MAX_LAYERS)


def measure_rate(search: Any, problem: jc.Problem, seconds: float) -> float:
    """Return the layer calls per second of a run, after another one has compiled it."""
    rate = 0.0
    for _ in range(2):
        began = time.perf_counter()
        result = jc.run(jax.random.key(0), search, problem, budget=2**31 - 1, max_seconds=seconds)
        rate = result.layer_calls / (time.perf_counter() - began)
    return rate


def compare_saving(search: Any, problem: jc.Problem, sizes: Sizes, budget: int) -> dict[str, Any]:
    """Time a run that is saved, and the same run that is not saved."""
    folder = Path(tempfile.mkdtemp()) / "run"
    num_saves = []

    def save() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        jc.run(
            jax.random.key(1),
            search,
            problem,
            budget=budget,
            checkpoint_dir=folder,
            save_every=sizes.seconds / SAVES_PER_RUN,
        )
        num_saves.append(max(int(path.name) for path in (folder / "checkpoints").iterdir()))

    def leave() -> None:
        jc.run(jax.random.key(1), search, problem, budget=budget)

    row = compare(save, leave, sizes.num_pairs)
    shutil.rmtree(folder.parent)
    return {**row, "num_saves": num_saves}


def compare_with_bare(
    search: Any, problem: jc.Problem, sizes: Sizes, budget: int
) -> dict[str, Any]:
    """Time a run, and a loop that only takes its steps."""
    key = jax.random.key(1)
    stop = StopRule(np.int32(budget), np.float32(-np.inf))
    spec = RunSpec(key[None], search, problem, list_starts(problem, None), 16, stop)

    def loop() -> None:
        runs, _ = begin_anew(spec)
        for part in iterate_parts(runs, search, problem, stop):
            jax.block_until_ready(part.runs)

    def run() -> None:
        jc.run(key, search, problem, budget=budget)

    return compare(run, loop, sizes.num_short_pairs)


def compare(
    first: Callable[[], None], second: Callable[[], None], num_pairs: int
) -> dict[str, Any]:
    """Time two calls in turns, after each was called once; the order alternates."""
    first()
    second()
    pairs = []
    for i in range(num_pairs):
        if i % 2:
            b = time_call(second)
            pairs.append((time_call(first), b))
        else:
            pairs.append((time_call(first), time_call(second)))
    seconds = np.array(pairs)
    ratios = seconds[:, 0] / seconds[:, 1]
    return {
        "seconds": np.median(seconds, axis=0).tolist(),
        "ratio": float(np.median(ratios)),
        "ratio_spread": np.quantile(ratios, [0.25, 0.75]).tolist(),
    }


def measure_stops(problem: jc.Problem, seconds: float) -> list[float]:
    """Return for how many seconds each checkpoint of a big state stops the search."""
    stops = []
    save = RunFolder.save

    def timed(self: RunFolder, snapshot: Any) -> None:
        stops.append(time_call(lambda: save(self, snapshot)))

    RunFolder.save = timed
    try:
        with tempfile.TemporaryDirectory() as folder:
            jc.run(
                jax.random.key(1),
                BigRandomSearch(),
                problem,
                budget=2**31 - 1,
                max_seconds=seconds,
                checkpoint_dir=Path(folder) / "run",
                save_every=seconds / SAVES_PER_RUN,
            )
    finally:
        RunFolder.save = save
    return stops


def format_table(result: dict[str, Any]) -> str:
    """Format a Markdown table of the ratios, and a line on big states."""
    head = ("search", "saved, relative to not saved", "`jc.run`, relative to a bare loop")
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row in result["rows"]:
        cells = [
            f"{of['ratio']:.3f} ({of['ratio_spread'][0]:.3f} to {of['ratio_spread'][1]:.3f})"
            for of in (row["saving"], row["bare"])
        ]
        lines.append(f"| {row['search']} | {' | '.join(cells)} |")
    stops = result["big_state_stops"]
    lines += [
        "",
        f"A state of {result['config']['state_bytes'] / 1e6:.0f} MB stops the search for "
        f"{np.median(stops):.2f} s per checkpoint (median of {len(stops)}), and for "
        f"{max(stops):.2f} s at most.",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
