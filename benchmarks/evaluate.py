"""Measure the speed of evaluating many chains, compared with PyTorch and plain JAX.

    pip install -e ".[parity]"                                        # for the PyTorch rows
    python benchmarks/evaluate.py --json benchmarks/results/cpu.json  # 50 minutes on 2 CPU cores
    python benchmarks/evaluate.py --parts --json benchmarks/results/parts_cpu.json  # see parts.py
    python benchmarks/evaluate.py --quick                             # 3 minutes, writes nothing

All implementations use the same weights and data. The PyTorch rows need the extra `parity`; without
it, they are empty. The implementations take turns, so that a slow moment of the machine affects all
of them. Their outputs are compared before anything is timed. A peer that would take more than
`--patience` seconds for one population is skipped in that row; the fastest peer so far is skipped
only if it would take eight times as long.

Expected result on 2 CPU cores: random chains are evaluated 1.2 to 7.5 times as fast as by the best
peer (more chains share more), and 2.5 to 4.5 times as fast if many prefixes are shared.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import parts
from machine import (
    count_call_flops,
    describe_device,
    measure_bandwidth,
    measure_matmul,
    time_call,
    versions,
)
from matplotlib.figure import Figure

import jchain as jc
from jchain import files

NUM_LAYERS, DEPTH, NUM_CLASSES = 8, 4, 10
# Layer, shape of an example, and number of examples.
BANKS: dict[str, tuple[Any, tuple[int, ...], int]] = {
    "mlp 64": (jc.layers.ResidualMLP(64), (64,), 512),
    "mlp 512": (jc.layers.ResidualMLP(512), (512,), 512),
    "conv 16 8x8": (jc.layers.ConvBlock(16), (8, 8, 16), 128),
    "conv 32 32x32": (jc.layers.ConvBlock(32), (32, 32, 32), 32),
    "transformer 128": (jc.layers.TransformerBlock(128, num_heads=4), (16, 128), 32),
    "transformer 768": (jc.layers.TransformerBlock(768, num_heads=12), (64, 768), 4),
}
QUICK_BANKS = ("mlp 64", "conv 16 8x8")
# The plain vmap takes chains in parts of this size: larger layers would not fit with more.
VMAP_CHUNK = 64


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write results here, and a figure next to them")
    parser.add_argument("--quick", action="store_true", help="two banks, few chains, no growth")
    parser.add_argument(
        "--patience",
        type=float,
        default=12.0,
        help="seconds for one population (default: %(default)s)",
    )
    parser.add_argument("--parts", action="store_true", help="only splits that are read in parts")
    args = parser.parse_args()
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
    if args.parts or args.quick:
        measure_parts(args)
    if args.parts:
        return
    result: dict[str, Any] = {
        "device": describe_device(),
        "versions": versions(),
        # This is measured first and last; the limits use the first value.
        "matmul_gflops": measure_matmul(),
        "matmul_gflops_last": None,
        "bandwidth_gbytes_per_s": measure_bandwidth(),
        "config": {
            "num_layers": NUM_LAYERS,
            "depth": DEPTH,
            "quick": args.quick,
            "patience_s": args.patience,
        },
        "compile": [],
        "rows": [],
        "growth": [],
    }
    for name in QUICK_BANKS if args.quick else BANKS:
        compare(name, result, args)
        save(args.json, result)
    if not args.quick:
        result["growth"] = measure_growth()
    result["matmul_gflops_last"] = measure_matmul()
    print(format_tables(result))
    save(args.json, result)


def measure_parts(args: argparse.Namespace) -> None:
    """Measure what reading a split in parts costs; with `--parts`, write the results."""
    result = parts.measure(quick=args.quick)
    print(parts.format_table(result), flush=True)
    if args.parts and args.json:
        machine = {"device": describe_device(), "versions": versions()}
        files.write_json(args.json, machine | result)


def save(path: Path | None, result: dict[str, Any]) -> None:
    """Write the results so far, and their figure.

    An interruption therefore loses at most one bank.
    """
    if path is not None:
        files.write_json(path, result)
    if path is not None and result["rows"]:
        draw(result, path.with_suffix(".png"))


def make_problem(
    layer: Any,
    shape: tuple[int, ...],
    num_examples: int,
    num_layers: int,
    depth: int,
    **kwargs: Any,
) -> jc.Problem:
    """Make a problem of random data and of weights so small that deep chains stay finite."""
    x_key, y_key, layer_key, head_key = jax.random.split(jax.random.key(0), 4)
    x = jax.random.normal(x_key, (num_examples, *shape))
    y = jax.random.randint(y_key, (num_examples,), 0, NUM_CLASSES)
    head = jc.layers.DenseHead(NUM_CLASSES)
    layers = [
        jax.tree.map(lambda leaf: 0.5 * leaf, layer.init(key, x[:1])["params"])
        for key in jax.random.split(layer_key, num_layers)
    ]
    bank = jc.Bank.stack(layer, layers, head, [head.init(head_key, x[:1])["params"]])
    return jc.Problem(bank, jc.Batch(x, y), depth, **kwargs)


def random_chains(
    num_chains: int, num_layers: int = NUM_LAYERS, depth: int = DEPTH, seed: int = 0
) -> np.ndarray:
    layers = np.random.default_rng(seed).integers(0, num_layers, (num_chains, depth))
    return np.concatenate([layers, np.full((num_chains, 1), num_layers)], axis=1).astype(np.int32)


def evolution_chains(num_parents: int = 16, num_children: int = 32) -> np.ndarray:
    """Make children of a few parents, each with one layer swapped."""
    rng = np.random.default_rng(0)
    chains = np.repeat(random_chains(num_parents, seed=1), num_children, axis=0)
    chains[np.arange(len(chains)), rng.integers(0, DEPTH, len(chains))] = rng.integers(
        0, NUM_LAYERS, len(chains)
    )
    return chains


def sweep_chains() -> np.ndarray:
    """List all chains of exactly `DEPTH` layers, so that peers can stack them."""
    grid = np.indices((NUM_LAYERS,) * DEPTH).reshape(DEPTH, -1).T
    return np.concatenate([grid, np.full((len(grid), 1), NUM_LAYERS)], axis=1).astype(np.int32)


def compare(name: str, result: dict[str, Any], args: argparse.Namespace) -> None:
    """Add one row for each population."""
    gflops, bandwidth = result["matmul_gflops"], result["bandwidth_gbytes_per_s"]
    layer, shape, num_examples = BANKS[name]
    problem = make_problem(layer, shape, num_examples, NUM_LAYERS, DEPTH)
    peers = {**make_jax_peers(problem), **make_torch_peers(problem, with_compile=not args.quick)}
    populations = {"random 64": random_chains(64), "evolution 512": evolution_chains()}
    if not args.quick:
        populations |= {
            "random 512": random_chains(512),
            "random 4096": random_chains(4096),
            "sweep": sweep_chains(),
        }
    per_chain: dict[str, float] = {}
    for population, chains in populations.items():
        said = jc.explain_plan(problem, chains)
        nodes, heads = said.layer_calls, said.head_calls
        layer_flops, head_flops = count_flops(problem)
        limit = (nodes * layer_flops + heads * head_flops) / gflops / 1e9
        fastest = min(per_chain, key=per_chain.__getitem__, default=None)
        fair = {
            peer: run
            for peer, run in peers.items()
            if per_chain.get(peer, 0) * len(chains) <= args.patience * (8 if peer == fastest else 1)
        }
        if limit > 2 * args.patience or not fair:
            print(f"{name}, {population}: left out, it would take too long", flush=True)
            continue
        runs = {"jchain": lambda chains: np.asarray(jc.evaluate(problem, chains).loss), **fair}
        seconds = take_turns(runs, chains)
        for peer in fair:
            per_chain[peer] = seconds[peer]["median"] / len(chains)
        hidden_bytes = problem.data.x.nbytes
        weight_bytes = (
            sum(leaf.nbytes for leaf in jax.tree.leaves(problem.bank.layers[0].params)) / NUM_LAYERS
        )
        result["rows"].append(
            {
                "bank": name,
                "population": population,
                "chains": len(chains),
                "nodes": nodes,
                "heads": heads,
                "plan": str(said.plan),
                "limit_s": limit,
                "bytes_limit_s": nodes * (2 * hidden_bytes + weight_bytes) / bandwidth / 1e9,
                "seconds": {
                    peer: seconds[peer]["median"] if peer in seconds else None
                    for peer in ("jchain", *peers)
                },
                "spread": {peer: [seconds[peer]["low"], seconds[peer]["high"]] for peer in seconds},
                "repeats": {peer: seconds[peer]["repeats"] for peer in seconds},
            }
        )
        print(format_row(result["rows"][-1]), flush=True)
    result["compile"].append(measure_compile(name))


def take_turns(
    runs: dict[str, Callable[[np.ndarray], np.ndarray]], chains: np.ndarray
) -> dict[str, dict[str, float]]:
    """Measure the median, the quartiles, and the number of timings of each implementation.

    All outputs are first compared with jchain's.
    """
    expected = runs["jchain"](chains)
    timings: dict[str, list[float]] = {name: [] for name in runs}
    for name, run in runs.items():
        begin = time.perf_counter()
        losses = run(chains)
        seconds = time.perf_counter() - begin
        np.testing.assert_allclose(losses, expected, rtol=2e-3, atol=2e-3, err_msg=name)
        # One timing is enough to know that the slowest are slow. They were already compiled for a
        # smaller population.
        if seconds > 3 and len(chains) > 64 and name != "jchain":
            timings[name].append(seconds)
    time.sleep(0.25)
    start = time.perf_counter()
    while len(timings["jchain"]) < 3 or (
        len(timings["jchain"]) < 15 and time.perf_counter() - start < 5
    ):
        for name, run in runs.items():
            if timings[name] and timings[name][-1] > 3 and name != "jchain":
                continue
            # The first call after another implementation pays for a cold cache, and for memory that
            # was given back to the system.
            if not timings[name] or timings[name][-1] < 0.5:
                run(chains)
            timings[name].append(time_call(lambda: run(chains)))  # noqa: B023
            # PyTorch's threads keep spinning for a while, and would slow down the next one.
            time.sleep(0.25 if name.startswith("torch") else 0)
    return {
        name: {
            "median": float(np.median(values)),
            "low": float(np.quantile(values, 0.25)),
            "high": float(np.quantile(values, 0.75)),
            "repeats": len(values),
        }
        for name, values in timings.items()
    }


def make_jax_peers(problem: jc.Problem) -> dict[str, Callable[[np.ndarray], np.ndarray]]:
    """Make a loop over jitted single chains, and a plain vmap over chains."""

    def one(problem: jc.Problem, chain: jax.Array) -> tuple[jax.Array, jax.Array]:
        hidden = problem.data.x
        for token in chain[:-1]:
            hidden = problem.bank.layers[0].apply(token, hidden)
        return problem.loss_and_accuracy(problem.bank.heads[0].apply(0, hidden))

    jitted, vmapped = jax.jit(one), jax.jit(jax.vmap(one, in_axes=(None, 0)))

    def loop(chains: np.ndarray) -> np.ndarray:
        return np.array([jitted(problem, chain)[0] for chain in jnp.asarray(chains)])

    def naive(chains: np.ndarray) -> np.ndarray:
        parts = [chains[i : i + VMAP_CHUNK] for i in range(0, len(chains), VMAP_CHUNK)]
        return np.concatenate([vmapped(problem, part)[0] for part in parts])

    return {"jax_loop": loop, "jax_vmap": naive}


def make_torch_peers(
    problem: jc.Problem, *, with_compile: bool
) -> dict[str, Callable[[np.ndarray], np.ndarray]]:
    try:
        from torch_peers import make_peers
    except ImportError as error:
        print(f"no PyTorch rows: {error}")
        return {}
    return make_peers(problem, with_compile=with_compile)


def count_flops(problem: jc.Problem) -> tuple[float, float]:
    """Count the operations of one layer call and of one head call, as XLA counts them."""
    layer, head = (
        count_call_flops(groups[0], problem.data.x)
        for groups in (problem.bank.layers, problem.bank.heads)
    )
    return layer, head


def measure_compile(name: str) -> dict[str, Any]:
    """Measure the seconds to compile a new problem.

    Also count the traces that 100 more populations cause.
    """
    layer, shape, num_examples = BANKS[name]
    calls = []

    def counted(outputs: jax.Array, labels: jax.Array) -> jax.Array:
        calls.append(outputs.shape)
        return optax.softmax_cross_entropy_with_integer_labels(outputs, labels)

    problem = make_problem(layer, shape, num_examples, NUM_LAYERS, DEPTH, loss_fn=counted)
    first, second = (
        time_call(lambda: jax.block_until_ready(jc.evaluate(problem, random_chains(64))))
        for _ in range(2)
    )
    # The populations are small because a hundred large ones would take minutes.
    jc.evaluate(problem, random_chains(2))
    num_calls = len(calls)
    for seed in range(100):
        jax.block_until_ready(jc.evaluate(problem, random_chains(2, seed=seed)))
    return {"bank": name, "seconds": first - second, "new_traces": len(calls) - num_calls}


def measure_growth() -> list[dict[str, Any]]:
    """Measure seconds and memory against the number of chains, bank size, and chain length.

    The bank is MLP 64 with 512 examples.
    """
    cases = [("chains", num, 64, 4) for num in (16, 64, 256, 1024, 4096, 16384)]
    cases += [("layers", 512, num, 4) for num in (4, 16, 64, 256, 1024)]
    cases += [("length", 64, 8, num) for num in (2, 4, 8, 16, 32, 64)]
    layer, shape, num_examples = BANKS["mlp 64"]
    rows = []
    for axis, num_chains, num_layers, depth in cases:
        problem = make_problem(layer, shape, num_examples, num_layers, depth)
        chains = random_chains(num_chains, num_layers, depth)
        said = jc.explain_plan(problem, chains)
        run = partial(
            lambda problem, chains: np.asarray(jc.evaluate(problem, chains).loss), problem
        )
        timings = take_turns({"jchain": run}, chains)["jchain"]
        compiled: Any = jax.jit(jc.evaluate).lower(problem, jnp.asarray(chains)).compile()
        memory: Any = compiled.memory_analysis()
        rows.append(
            {
                "axis": axis,
                "chains": num_chains,
                "layers": num_layers,
                "length": depth,
                "plan": str(said.plan),
                "layer_calls": said.layer_calls,
                "head_calls": said.head_calls,
                "seconds": timings["median"],
                "spread": [timings["low"], timings["high"]],
                "us_per_layer_call": timings["median"] / said.layer_calls * 1e6,
                "temporary_bytes": memory.temp_size_in_bytes,
            }
        )
        print(f"growth, {axis}: {rows[-1]}", flush=True)
    return rows


def best(row: dict[str, Any], start: str) -> float | None:
    """Return the seconds of the fastest peer whose name starts with `start`."""
    found = [
        s
        for peer, s in row["seconds"].items()
        if peer != "jchain" and peer.startswith(start) and s is not None
    ]
    return min(found, default=None)


def format_row(row: dict[str, Any]) -> str:
    jchain = row["seconds"]["jchain"]
    ratios = [
        "" if best(row, start) is None else f"{best(row, start) / jchain:.2f}"
        for start in ("", "torch", "jax_loop", "jax_vmap")
    ]
    cells = [row["bank"], row["population"], f"{row['nodes']:,}", f"{jchain * 1e3:,.1f}", *ratios]
    return "| " + " | ".join([*cells, f"{row['limit_s'] / jchain:.0%}"]) + " |"


def format_tables(result: dict[str, Any]) -> str:
    """Format Markdown tables of the peers' times as multiples of jchain's."""
    head = (
        "bank",
        "chains",
        "layer calls",
        "jchain, ms",
        "best peer",
        "PyTorch",
        "JAX loop",
        "naive vmap",
        "of limit",
    )
    lines = [
        "| " + " | ".join(head) + " |",
        "|---" * len(head) + "|",
        *map(format_row, result["rows"]),
    ]
    random = [row for row in result["rows"] if row["population"].startswith("random")]
    for start, name in (("torch", "the best PyTorch peer"), ("jax_vmap", "naive vmap")):
        ratios = [
            best(row, start) / row["seconds"]["jchain"]
            for row in random
            if best(row, start) is not None
        ]
        if ratios:
            lines.append(
                f"Random chains: {np.exp(np.mean(np.log(ratios))):.2f} times faster than {name} "
                "(geometric mean)"
            )
    for row in result["compile"]:
        lines.append(
            f"{row['bank']}: compiled in {row['seconds']:.1f} s, {row['new_traces']} new traces"
        )
    last = result["matmul_gflops_last"]
    lines.append(
        f"matmul: {result['matmul_gflops']:.0f} GFLOP/s first, "
        f"{'not measured' if last is None else f'{last:.0f}'} last"
    )
    return "\n".join(lines)


def draw(result: dict[str, Any], path: Path) -> None:
    """Plot the peers' times as multiples of jchain's, with a line of dots for each row."""
    rows = result["rows"][::-1]
    figure = Figure(figsize=(8, 1 + 0.3 * len(rows)), layout="constrained")
    axes = figure.subplots()
    peers = [peer for peer in rows[0]["seconds"] if peer != "jchain"]
    for peer, marker in zip(peers, "osD^v", strict=False):
        points = [
            (row["seconds"][peer] / row["seconds"]["jchain"], i)
            for i, row in enumerate(rows)
            if row["seconds"][peer]
        ]
        axes.plot(*zip(*points, strict=True), marker, label=peer.replace("_", " "), alpha=0.8)
    axes.axvline(1, color="black", linewidth=1)
    axes.set_xscale("log")
    axes.set_yticks(range(len(rows)), [f"{row['bank']}, {row['population']}" for row in rows])
    axes.set_xlabel(f"seconds / seconds of jchain ({result['device']})")
    axes.grid(axis="x", which="both", alpha=0.3)
    axes.legend(loc="upper right")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
