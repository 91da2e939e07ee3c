"""Kill runs at random moments, let them continue, and compare them with runs that nobody killed.

    python tests/killing.py --kills 50

Runs of several searches, one after the other, in one process (`child`). Prints how many of the
kills came while a run was going on, and fails if a result or a log differs in any bit.
"""

import argparse
import json
import multiprocessing
import os
import random
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import small_searches

import jchain as jc

TESTS = Path(__file__).parent
PRELOADED = ["killing", "orbax.checkpoint"]
BUDGET = 2_000


def apply_layer(params, x):
    return x + jnp.tanh(x @ params)


def child(folder: Path, names: list[str]) -> None:
    """Take every run to its end, and write all results."""
    jax.config.update("jax_disable_most_optimizations", True)
    jax.config.update("jax_compilation_cache_dir", str(TESTS.parent / ".pytest_cache" / "jax"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    key, rng, results = jax.random.key(0), np.random.default_rng(0), {}
    data = jc.Batch(rng.normal(size=(30, 5)).astype(np.float32), rng.integers(0, 3, 30))
    head = (lambda params, x: x @ params), rng.normal(size=(2, 5, 3)).astype(np.float32)
    for name in names:
        if name == "SuffixBeamSearch":
            layer = jc.layers.InvertibleDense(5)
            keys = jax.random.split(key, 4)
            params = [layer.init(own, data.x)["params"] for own in keys]
        else:
            layer = apply_layer
            params = list(rng.normal(size=(4, 5, 5)).astype(np.float32))
        bank = jc.Bank.stack(layer, params, head[0], list(head[1]))
        runs = jc.run_many(
            jax.random.split(key, 2),
            small_searches.SEARCHES[name],
            jc.Problem(bank, data, max_layers=4),
            budget=BUDGET,
            checkpoint_dir=folder / name,
            save_every=1e-3,
            record="chains",
            record_fn=lambda state, info: info.loss.min(),
            # So that runs of few steps take long enough to be killed.
            callback=lambda progress: time.sleep(0.08),
        )
        results[name] = [result.to_json() for result in runs]
    (folder / "results.json").write_text(json.dumps(results))


def start(folder: Path, names: list[str]) -> multiprocessing.Process:
    """Start a process that runs the searches."""
    # Processes are forked from one that has imported the libraries, but has not started JAX. It
    # finds this module by PYTHONPATH.
    os.environ["PYTHONPATH"] = str(TESTS)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    process = context.Process(target=child, args=(folder, names))
    process.start()
    return process


def finish(folder: Path, names: list[str]) -> None:
    """Let the runs end."""
    process = start(folder, names)
    process.join()
    assert process.exitcode == 0


def kill_at_random(folder: Path, names: list[str], num_kills: int, seed: int) -> int:
    """Kill the runs some times, then let them end; return how many kills met a living process."""
    rng, num_met = random.Random(seed), 0
    for _ in range(num_kills):
        began = time.monotonic()
        process = start(folder, names)
        # Wait until a run goes on, or the kills would only meet a process that starts.
        before = count_lines(folder)
        while process.is_alive() and count_lines(folder) == before:
            time.sleep(0.01)
        process.join(rng.uniform(0, 0.25))
        num_met += process.is_alive()
        process.kill()
        process.join()
        if (folder / "results.json").exists():
            break
        assert time.monotonic() - began < 300
    finish(folder, names)
    return num_met


def count_lines(folder: Path) -> int:
    """Return the size of all logs."""
    return sum(path.stat().st_size for path in folder.glob("*/chains.jsonl"))


def compare(whole: Path, killed: Path) -> None:
    """Check that all results and logs are equal."""
    found, expected = (json.loads((path / "results.json").read_text()) for path in (killed, whole))
    assert found.keys() == expected.keys()
    for name in expected:
        assert found[name] == expected[name], name
        logs = [(path / name / "chains.jsonl").read_bytes() for path in (killed, whole)]
        assert logs[0] == logs[1], name
        assert len(list((killed / name / "checkpoints").iterdir())) <= 2, name


def check(folder: Path, names: list[str], num_kills: int, seed: int = 0) -> int:
    """Compare runs that are killed with others; return how many kills met a living process."""
    whole, killed = folder / "whole", folder / "killed"
    for path in (whole, killed):
        path.mkdir()
    finish(whole, names)
    num_met = kill_at_random(killed, names, num_kills, seed)
    compare(whole, killed)
    return num_met


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("names", nargs="*")
    args = parser.parse_args()
    names = args.names or list(small_searches.SEARCHES)
    with tempfile.TemporaryDirectory() as folder:
        num_met = check(Path(folder), names, args.kills, args.seed)
    print(f"{num_met} kills met a run; results and logs of {len(names)} searches are equal")


if __name__ == "__main__":
    main()
