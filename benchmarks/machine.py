"""The machine that a benchmark runs on, and its limits. The other scripts here import this."""

import platform
import time
from collections.abc import Callable
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def measure_matmul(clock: Callable[[], float] = time.perf_counter) -> float:
    """Measure the GFLOP/s of the fastest square product of size 1,024 or 2,048, by this clock."""
    best = 0.0
    for size in (1024, 2048):
        a = jax.random.normal(jax.random.key(0), (size, size))
        multiply = jax.jit(jnp.matmul)
        call = partial(lambda multiply, a: multiply(a, a).block_until_ready(), multiply, a)
        timings = [time_call(call, clock) for _ in range(15)]
        best = max(best, 2 * size**3 / float(np.median(timings[2:])) / 1e9)
    return best


def measure_bandwidth() -> float:
    """Measure the GB/s that are read and written by adding to 256 MiB in place."""
    add = jax.jit(lambda x: jax.lax.fori_loop(0, 8, lambda i, x: x + 1, x), donate_argnums=0)
    x = jnp.zeros(2**26)

    def run() -> None:
        nonlocal x
        x = add(x).block_until_ready()

    timings = [time_call(run) for _ in range(6)]
    return 8 * 2 * x.nbytes / float(np.median(timings[1:])) / 1e9


def time_call(run: Callable[[], Any], clock: Callable[[], float] = time.perf_counter) -> float:
    begin = clock()
    run()
    return clock() - begin


def describe_device() -> str:
    device = jax.devices()[0]
    if device.platform != "cpu":
        return device.device_kind
    info = Path("/proc/cpuinfo")
    names = [
        line.split(":")[1].strip()
        for line in info.read_text().splitlines()
        if line.startswith("model name")
    ]
    wide = "AVX-512" if "avx512f" in info.read_text() else "AVX2"
    return f"CPU, {len(names)} cores, {names[0]}, {wide}"


def versions(*others: str) -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("jax", "flax", "jchain", "torch", *others):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def count_call_flops(group: Any, x: jax.Array) -> float:
    cost: Any = jax.jit(group.apply).lower(0, x).cost_analysis()
    return cost["flops"]
