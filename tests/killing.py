"""Kill runs at random moments, let them continue, and compare them with runs that nobody killed.

    python tests/killing.py --kills 50

Runs of several searches, one after the other, in one process (`child`). Prints how many of the
kills came while a run was going on, and fails if a result or a log differs in any bit.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TESTS = Path(__file__).parent


def child(folder: Path, names: list[str]) -> None:
    """Take every run to its end, and write all results."""
    import jax

    jax.config.update("jax_disable_most_optimizations", True)
    jax.config.update("jax_compilation_cache_dir", str(TESTS.parent / ".pytest_cache" / "jax"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    import small_searches

    import jchain as jc

    key, data = jax.random.key(0), jc.data.load("wine", seed=0)
    results = {}
    for name in names:
        is_inverted = name == "SuffixBeamSearch"
        layer = jc.layers.InvertibleDense(13) if is_inverted else jc.layers.ResidualMLP(13)
        bank = jc.train.random(
            key, data.train, layer=layer, head=jc.layers.DenseHead(3), num_layers=5, num_steps=0
        )
        runs = jc.run_many(
            jax.random.split(key, 2),
            small_searches.SEARCHES[name],
            jc.Problem(bank, data.search, max_layers=4),
            budget=1_000,
            checkpoint_dir=folder / name,
            save_every=1e-3,
            record="chains",
            record_fn=lambda state, info: info.loss.min(),
            # So that runs of few steps take long enough to be killed.
            callback=lambda progress: time.sleep(0.15),
        )
        results[name] = [result.to_json() for result in runs]
    (folder / "results.json").write_text(json.dumps(results))


def start(folder: Path, names: list[str]) -> subprocess.Popen:
    """Start a process that runs the searches."""
    command = [sys.executable, "-W", "ignore", __file__, "--child", str(folder), *names]
    return subprocess.Popen(command, cwd=TESTS.parent)


def kill_at_random(folder: Path, names: list[str], num_kills: int, seed: int) -> int:
    """Kill the runs some times, then let them end; return how many kills met a living process."""
    rng, num_met = random.Random(seed), 0
    for _ in range(num_kills):
        began = time.monotonic()
        process = start(folder, names)
        # Wait until a run goes on, or the kills would only meet a process that starts.
        before = count_lines(folder)
        while process.poll() is None and count_lines(folder) == before:
            time.sleep(0.01)
        try:
            process.wait(rng.uniform(0, 0.4))
        except subprocess.TimeoutExpired:
            num_met += 1
        process.kill()
        process.wait()
        if (folder / "results.json").exists():
            break
        assert time.monotonic() - began < 300
    assert start(folder, names).wait() == 0
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
    assert start(whole, names).wait() == 0
    num_met = kill_at_random(killed, names, num_kills, seed)
    compare(whole, killed)
    return num_met


def main() -> None:
    import small_searches

    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--child", type=Path)
    parser.add_argument("names", nargs="*")
    args = parser.parse_args()
    names = args.names or list(small_searches.SEARCHES)
    if args.child is not None:
        child(args.child, names)
        return
    with tempfile.TemporaryDirectory() as folder:
        num_met = check(Path(folder), names, args.kills, args.seed)
    print(f"{num_met} kills met a run; results and logs of {len(names)} searches are equal")


if __name__ == "__main__":
    main()
