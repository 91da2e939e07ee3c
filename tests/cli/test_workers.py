"""Seeds in processes of their own give the same results, and are taken up one by one."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time

import pytest
from command_line import SMALL, check_bad_options

from jchain.cli import seed_runs, workers
from jchain.cli.interruption import Stopped

OPTIONS = [*SMALL, *shlex.split("--quick --search local --seeds 3")]


def read(out):
    """Read the results of all seeds without what differs between two calls."""
    found = {}
    for path in sorted(out.glob("seed-*/result.json")):
        record = json.loads(path.read_text())
        for name in ("seconds", "config"):
            del record[name]
        found[path.parent.name] = record
    return found


def search(out, *options):
    """Search in another process, which compiles with all optimizations, as workers do."""
    command = [sys.executable, "-m", "jchain", "search", *OPTIONS, "--out", str(out), *options]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.slow
def test_workers_give_the_results_of_one_process(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    assert search(one).returncode == 0
    err = search(two, "--workers", "2").stderr
    assert all(f"[seed {seed}] " in err for seed in range(3))
    assert read(one) == read(two)
    assert len(read(two)) == 3
    assert not (two / "run" / "programs").exists()


def test_a_number_of_workers_below_1_is_refused(tmp_path, capsys):
    check_bad_options(
        tmp_path, capsys, ["--workers", "0"], "expected --workers to be at least 1, got 0"
    )


class Scripted:
    """Workers that run a line of Python in place of a search."""

    def __init__(self, monkeypatch, code):
        start = subprocess.Popen

        def popen(argv, **kwargs):
            seed = json.loads(argv[-1])["config"]["seed"]
            return start([sys.executable, "-c", code[seed]], **kwargs)

        monkeypatch.setattr(workers.subprocess, "Popen", popen)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A function that runs one scripted worker per item of a list."""

    def run_code(code):
        Scripted(monkeypatch, code)
        config = workers.SearchConfig(out=tmp_path, num_seeds=len(code))
        configs = [seed_runs.pick_seed(config, seed) for seed in range(len(code))]
        workers.run_workers(configs, 2, workers.WorkFolder(config), None)

    return run_code


DIE = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"


def test_what_failed_is_named_and_the_others_run_to_their_ends(run, tmp_path):
    bad = "import sys; print('jchain: error: no data', file=sys.stderr); sys.exit(2)"
    good = f"import time; time.sleep(0.3); open({str(tmp_path / 'done')!r}, 'w')"
    with pytest.raises(ValueError, match="seed 0 failed: no data; seed 1 was killed by SIGKILL"):
        run([bad, DIE, good])
    assert (tmp_path / "done").exists()


def test_a_time_limit_is_not_a_failure(run):
    with pytest.raises(Stopped) as stopped:
        run(["raise SystemExit(75)", "pass"])
    assert stopped.value.name == "max_seconds"


def test_seeds_that_have_no_time_left_are_not_started(tmp_path, monkeypatch):
    Scripted(monkeypatch, ["raise AssertionError"])
    config = workers.SearchConfig(out=tmp_path, num_seeds=1)
    work = workers.WorkFolder(config)
    with pytest.raises(Stopped) as stopped:
        workers.run_workers([seed_runs.pick_seed(config, 0)], 2, work, time.monotonic())
    assert stopped.value.name == "max_seconds"


def test_signals_are_handed_on(run, tmp_path):
    wait = (
        "import signal, sys, time\n"
        "def end(*_):\n"
        f"    open({str(tmp_path / 'told')!r}, 'w')\n"
        "    sys.exit(143)\n"
        "signal.signal(signal.SIGTERM, end)\n"
        "time.sleep(60)"
    )
    kill = f"import os, signal, time; time.sleep(1); os.kill({os.getpid()}, signal.SIGTERM)"
    begin = time.monotonic()
    with pytest.raises(Stopped) as stopped:
        run([wait, kill, wait])
    assert stopped.value.name == "SIGTERM"
    assert (tmp_path / "told").exists()
    assert time.monotonic() - begin < 30


@pytest.mark.slow
def test_a_killed_worker_loses_only_its_own_search(tmp_path):
    whole, out = tmp_path / "whole", tmp_path / "out"
    options = [*OPTIONS, "--budget", "20000"]
    assert search(whole, "--budget", "20000").returncode == 0
    command = [sys.executable, "-m", "jchain", "search", *options, "--out", str(out), "--workers"]
    process = subprocess.Popen([*command, "3"], stderr=subprocess.PIPE, text=True)
    while not (out / "run" / "seed-1" / "search" / "chains.jsonl").exists():
        time.sleep(0.01)
        assert process.poll() is None
    victim = json.loads((out / "run" / "seed-1" / "search" / "holder.json").read_text())["process"]
    os.kill(victim, signal.SIGKILL)
    err = process.communicate()[1]
    assert process.returncode == 2
    assert "seed 1 was killed by SIGKILL. Other seeds are kept; the same command continues" in err
    assert sorted(path.name for path in (out / "run" / "result").iterdir()) == ["seed-0", "seed-2"]
    done = search(out, "--budget", "20000", "--workers", "2")
    assert "Seed 0 is finished" in done.stderr
    assert read(out) == read(whole)


@pytest.mark.slow
def test_workers_end_if_their_parent_is_killed(tmp_path):
    out = tmp_path / "out"
    options = [*OPTIONS, "--budget", "100000000"]
    command = [sys.executable, "-m", "jchain", "search", *options, "--out", str(out)]
    process = subprocess.Popen([*command, "--workers", "2"], stderr=subprocess.DEVNULL)
    holders = [out / "run" / f"seed-{i}" / "search" / "holder.json" for i in range(2)]
    while not all(path.exists() for path in holders):
        time.sleep(0.01)
        assert process.poll() is None
    process.kill()
    process.wait()
    end = time.monotonic() + 60
    # A worker gives its folder back when it is over.
    while any(path.exists() for path in holders):
        assert time.monotonic() < end
        time.sleep(0.1)
