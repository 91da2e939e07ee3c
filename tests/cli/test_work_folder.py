"""A search that is stopped continues from its folder, and ends with the same result."""

import json
import os
import shlex
import shutil
from pathlib import Path

import pytest
from command_line import SMALL, fail
from filelock import FileLock

from jchain.__main__ import main
from jchain.cli import pipeline, result_folder
from jchain.runs import monitor

OPTIONS = [*SMALL, *shlex.split("--quick --search local --num-layers 12 --depth 4 --max-layers 6")]


def search(out, *options):
    return main(["search", *OPTIONS, "--out", str(out), *options])


def read(out):
    """Read a result without what differs between two calls."""
    record = json.loads((out / "result.json").read_text())
    for name in ("seconds", "config"):
        del record[name]
    return record


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("finished") / "out"
    assert search(out) == 0
    return out


@pytest.fixture
def out(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "out")


def refuse(*args, **kwargs):
    raise AssertionError("expected no computation")


def test_a_finished_search_is_shown_and_not_repeated(out, monkeypatch, capsys):
    monkeypatch.setattr(pipeline, "make", refuse)
    assert search(out) == 0
    shown = capsys.readouterr().out
    assert "best chain found" in shown
    assert f"Read {out}: bank.safetensors, curve.png, result.json, search.json. To extend" in shown
    assert search(out, "--json") == 0
    assert json.loads(capsys.readouterr().out) == json.loads((out / "result.json").read_text())


def test_other_options_and_a_smaller_budget_are_refused(out, monkeypatch, capsys):
    monkeypatch.setattr(pipeline, "make", refuse)
    before = read(out)
    command = ["search", *OPTIONS, "--out", str(out)]
    err = fail([*command, "--search", "random", "--layer-cost", "0.5"], capsys)
    assert "layer_cost: 0.0 there, 0.5 here; search: local there, random here" in err
    err = fail([*command, "--budget", "200"], capsys)
    assert "expected a budget of at least 300, which this search has had, got 200" in err
    (out / "run" / "options.json").write_text("{")
    assert "options.json, which says what the search is" in fail(command, capsys)
    assert read(out) == before


@pytest.mark.slow
def test_a_larger_budget_extends_a_search(out, tmp_path, capsys):
    assert search(tmp_path / "whole", "--budget", "600") == 0
    assert "The bank is read from" not in capsys.readouterr().err
    assert search(out, "--budget", "600") == 0
    assert f"The bank is read from {out}" in capsys.readouterr().err
    assert read(out) == read(tmp_path / "whole")
    assert read(out)["layer_calls"] > 300


def test_a_search_that_is_stopped_twice_ends_with_the_same_result(finished, tmp_path, monkeypatch):
    after_part, out = monitor.Monitor.after_part, tmp_path / "out"

    def stop_after_a_part(self, part):
        self._interruption.name = "SIGTERM"
        return after_part(self, part)

    with monkeypatch.context() as patch:
        patch.setattr(monitor.Monitor, "after_part", stop_after_a_part)
        assert search(out) == 143
        first = read(out)
        assert first["stopped_by"] == "SIGTERM"
        assert search(out) == 143
    assert first["layer_calls"] < read(out)["layer_calls"] < 300
    assert search(out) == 0
    assert read(out) == read(finished)
    assert search(out) == 0


def test_a_bank_is_not_trained_twice(finished, tmp_path, monkeypatch, capsys):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "run", interrupt)
        assert search(out) == 130
    assert "The same command continues this search" in capsys.readouterr().err
    assert search(out) == 0
    assert f"The bank is read from {out}" in capsys.readouterr().err
    assert read(out) == read(finished)


def test_nothing_is_left_if_nothing_was_saved(tmp_path, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "make", interrupt)
    assert search(tmp_path / "out") == 130
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize("num_moved", [0, 1, 2])
def test_files_that_are_half_moved_are_taken_up(out, monkeypatch, capsys, num_moved):
    expected, replace, moved = read(out), os.replace, []

    def die(source, target):
        if Path(target).parent == out:
            if len(moved) == num_moved:
                raise KeyboardInterrupt
            moved.append(target)
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", die)
        assert search(out, "--replace") == 130
    assert not result_folder.has_result(out)
    assert "its search is not finished" in fail(["evaluate", str(out)], capsys)
    monkeypatch.setattr(pipeline, "make", refuse)
    assert search(out) == 0
    assert read(out) == expected
    assert {path.name for path in (out / "run").iterdir()} <= {"lock", "options.json", "seed-0"}


def test_two_processes_cannot_use_one_folder(out, capsys):
    with FileLock(out / "run" / "lock"):
        err = fail(["search", *OPTIONS, "--out", str(out), "--budget", "600"], capsys)
    assert "expected a folder that is free" in err


def test_a_search_stops_after_its_time(tmp_path, capsys):
    out = tmp_path / "out"
    assert search(out, "--max-seconds", "0.001", "--budget", "3000") == 0
    assert "Out of time: the best chain so far is kept" in capsys.readouterr().err
    assert read(out)["stopped_by"] == "max_seconds"
    assert search(out, "--budget", "3000") == 0
    assert "stopped_by" not in read(out)
    for value in ("0", "nan"):
        err = fail(["search", *OPTIONS, "--out", str(out), "--max-seconds", value], capsys)
        assert f"expected --max-seconds above 0, got {float(value)}" in err


@pytest.mark.slow
def test_a_search_over_several_seeds_is_extended(tmp_path):
    options = shlex.split("--seeds 2 --max-layers 2")
    for folder, budgets in {"parts": ("200", "400"), "whole": ("400",)}.items():
        for budget in budgets:
            assert search(tmp_path / folder, *options, "--budget", budget) == 0
    rows = [
        json.loads((tmp_path / folder / "summary.json").read_text())["rows"]
        for folder in ("parts", "whole")
    ]
    assert rows[0] == rows[1]


def test_a_result_that_is_not_written_is_shown_and_written_later(
    finished, tmp_path, monkeypatch, capsys
):
    out, write_json = tmp_path / "out", result_folder.write_json

    def fill(path, value):
        if path.name == "result.json":
            raise OSError(28, "No space left on device")
        write_json(path, value)

    with monkeypatch.context() as patch:
        patch.setattr(result_folder, "write_json", fill)
        assert search(out) == 2
    done = capsys.readouterr()
    assert "best chain found" in done.out
    assert "Wrote" not in done.out
    assert "jchain: error: the result above is not written: [Errno 28] No space left" in done.err
    assert not result_folder.has_result(out)
    assert "its search is not finished" in fail(["evaluate", str(out)], capsys)
    assert search(out) == 0
    assert read(out) == read(finished)


@pytest.mark.slow
@pytest.mark.parametrize("update", ["tune-found", "clone-then-tune", "shared-updates"])
def test_a_search_with_updates_continues(tmp_path, update, capsys):
    options = ["--update", update, "--search", "actor-critic", "--budget", "8000", "--quick"]
    command = ["search", *SMALL, *options]
    assert main([*command, "--out", str(tmp_path / "whole")]) == 0
    for _ in range(2):
        stopped = [*command, "--out", str(tmp_path / "out"), "--max-seconds", "0.001"]
        assert main(stopped) == 0
        assert "jchain: out of time" in capsys.readouterr().err
    assert main([*command, "--out", str(tmp_path / "out")]) == 0
    assert read(tmp_path / "out") == read(tmp_path / "whole")
