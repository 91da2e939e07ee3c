"""`jchain search` on a task, with few gradient steps and layer calls."""

import json
import os
import signal
from functools import partial

import jax
import numpy as np
import pytest
from command_line import fail

import jchain as jc
from jchain.__main__ import main
from jchain.cli import seed_runs
from jchain.runs import monitor
from jchain.tasks import repair

SMALL = ["--sizes", "60,40,20,50", "--budget", "400", "--search", "random", "--max-layers", "3"]


@pytest.fixture(autouse=True)
def few_steps(monkeypatch):
    monkeypatch.setattr(repair, "NET_STEPS", 40)
    monkeypatch.setattr(repair, "REPAIR_STEPS", 4)


@pytest.mark.slow
def test_seeds_are_searched_compared_and_written(tmp_path, capsys):
    out = tmp_path / "out"
    argv = ["search", *SMALL, "--quick", "--seeds", "2", "--seed", "3", "--out", str(out)]
    assert main([*argv, "--json"]) == 0
    shown = capsys.readouterr()
    summary = json.loads(shown.out.splitlines()[-1])
    assert summary == json.loads((out / "summary.json").read_text())
    assert {path.name for path in out.iterdir()} == {
        "run",
        "seed-3",
        "seed-4",
        "seeds.png",
        "summary.json",
    }
    assert "Seed 4, 2 of 2" in shown.err
    assert "Training the layers of the bank ..." in shown.err
    assert summary["sentence"] in " ".join(shown.out.split())
    for i, seed in enumerate((3, 4)):
        record = json.loads((out / f"seed-{seed}" / "result.json").read_text())
        task = jc.tasks.make("repair", seed, sizes=(60, 40, 20, 50))
        assert record["about"] == task.about == summary["about"][i]
        assert record["config"]["seed"] == seed
        assert record["num_examples"] == {"search": 40, "select": 20, "test": 50}
        assert set(record["controls"]) == {
            "recipes",
            "reference",
            "best_parent",
            "plain_net",
            "random_chains",
        }
        bank = jc.Bank.load(out / f"seed-{seed}" / "bank.safetensors")
        problem = jc.Problem(bank, task.data.test, 6)
        tokens = [record["best_chain"], task.reference]
        loss = np.asarray(jc.evaluate(problem, jc.chain.pad(tokens, 6)).loss)
        assert record["loss"]["test"] == pytest.approx(loss[0], rel=1e-4)
        reference = record["controls"]["reference"]
        assert reference["loss"]["test"] == pytest.approx(loss[1], rel=1e-4)
        difference = reference["difference"]["mean"]
        assert difference == pytest.approx(loss[0] - loss[1], rel=1e-3, abs=1e-4)
        row = summary["rows"]["best chain found"]
        assert row["loss"][i] == record["loss"]["test"]
    # A seed's folder is a result that can be evaluated.
    assert main(["evaluate", str(out / "seed-4"), "--split", "test", "--json"]) == 0
    scored = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert scored["chains"][0]["loss"] == pytest.approx(record["loss"]["test"], rel=1e-4)
    assert "it holds several seeds: pass one of them" in fail(["evaluate", str(out)], capsys)
    assert main(argv) == 0
    assert f"Read {out}: seed-3, seed-4, seeds.png, summary.json" in capsys.readouterr().out
    notes = out / "seed-3" / "notes.txt"
    notes.write_text("mine")
    message = "holds files that are not a result of jchain (seed-3/notes.txt)"
    assert message in fail([*argv, "--replace"], capsys)
    notes.unlink()
    assert main([*argv, "--replace", "--seeds", "1"]) == 0
    names = {"bank.safetensors", "curve.png", "result.json", "run", "search.json"}
    assert {path.name for path in out.iterdir()} == names


@pytest.mark.slow
def test_the_finalist_is_picked_on_search_and_select(tmp_path):
    assert main(["search", *SMALL, "--quick", "--out", str(tmp_path / "out")]) == 0
    record = json.loads((tmp_path / "out" / "result.json").read_text())
    bank = jc.Bank.load(tmp_path / "out" / "bank.safetensors")
    data = jc.tasks.make("repair", 0, sizes=(60, 40, 20, 50)).data
    problems = [jc.Problem(bank, batch, 3) for batch in (data.search, data.select)]
    key = jax.random.split(jax.random.key(0), 4)[2]
    finalists = jc.run(key, jc.RandomSearch(), problems[0], budget=400).finalists
    search, select = (np.asarray(jc.evaluate(p, finalists).loss) for p in problems)
    best = finalists[int(np.argmin(40 * search + 20 * select))]
    assert record["best_chain"] == [int(token) for token in best if token >= 0]


@pytest.mark.slow
def test_finished_seeds_are_kept_when_a_run_is_interrupted(tmp_path, capsys, monkeypatch):
    run_seed, seeds = seed_runs._run_seed, []

    def interrupt_second(config, *args):
        seeds.append(config.seed)
        if len(seeds) == 2:
            raise KeyboardInterrupt
        return run_seed(config, *args)

    monkeypatch.setattr(seed_runs, "_run_seed", interrupt_second)
    out = tmp_path / "out"
    command = ["search", *SMALL, "--quick", "--seeds", "2", "--out", str(out)]
    assert main(command) == 130
    assert f"The same command continues this search, from {out / 'run'}" in capsys.readouterr().err
    assert main(["compare", str(out)]) == 2  # there is no result yet
    assert main(command) == 0
    assert seeds == [0, 1, 1]
    # A seed that was finished with another budget is extended like the others.
    seeds.clear()
    larger = [*command, "--budget", "600"]
    assert main(larger) == 130
    assert main([*command, "--budget", "700"]) == 0
    assert seeds == [0, 1, 0, 1]
    budgets = [
        json.loads((out / name / "result.json").read_text())["config"]["budget"]
        for name in ("seed-0", "seed-1")
    ]
    assert budgets == [700, 700]
    assert {path.name for path in out.iterdir()} == {
        "run",
        "seed-0",
        "seed-1",
        "seeds.png",
        "summary.json",
    }


@pytest.mark.slow
def test_several_seeds_of_a_trained_bank_are_compared_too(tmp_path, capsys):
    options = "--data wine --num-layers 4 --depth 2 --num-steps 30 --budget 300 --search random"
    out = str(tmp_path / "out")
    assert main(["search", *options.split(), "--seeds", "2", "--quick", "--out", out]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "seed 1, wine: " in shown
    assert "plain net, same steps" in shown


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_search_that_a_signal_stops_writes_its_best_chain(
    tmp_path, capsys, monkeypatch, request, name, code
):
    after_part = monitor.Monitor.after_part

    def interrupt(self, part):
        os.kill(os.getpid(), getattr(signal, name))
        return after_part(self, part)

    monkeypatch.setattr(monitor.Monitor, "after_part", interrupt)
    # A process that starts in the background may ignore SIGINT.
    request.addfinalizer(partial(signal.signal, signal.SIGINT, signal.getsignal(signal.SIGINT)))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    out = tmp_path / "out"
    options = [*SMALL[:2], "--budget", "9000", *SMALL[4:]]
    assert main(["search", *options, "--quick", "--out", str(out)]) == code
    assert "Interrupted: the best chain so far is kept" in capsys.readouterr().err
    record = json.loads((out / "result.json").read_text())
    assert record["controls"] == {"recipes": {}}
    assert 0 < record["layer_calls"] < 9000
    bank = jc.Bank.load(out / "bank.safetensors")
    problem = jc.Problem(bank, jc.tasks.make("repair", 0, sizes=(60, 40, 20, 50)).data.test, 3)
    loss = jc.evaluate(problem, jc.chain.pad([record["best_chain"]], 3)).loss[0]
    assert record["loss"]["test"] == pytest.approx(float(loss), rel=1e-4)


@pytest.mark.parametrize("seeds", ["1", "2"])
def test_controls_that_are_interrupted_do_not_lose_the_search(tmp_path, capsys, monkeypatch, seeds):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("jchain.cli.controls._train_plain_net", interrupt)
    out = tmp_path / "out"
    assert main(["search", *SMALL, "--quick", "--seeds", seeds, "--out", str(out)]) == 130
    err = capsys.readouterr().err
    assert "Interrupted: the remaining controls are not scored" in err
    assert [*tmp_path.iterdir()] == [out]
    assert jc.Bank.load(out / "run" / "seed-0" / "bank.safetensors").num_layers == 12
    if seeds == "2":  # a seed is written only when it is finished
        assert [path.name for path in out.iterdir()] == ["run"]
        return
    record = json.loads((out / "result.json").read_text())
    assert set(record["controls"]) == {"recipes", "reference", "best_parent"}
    assert record["stopped_by"] == "SIGINT"
