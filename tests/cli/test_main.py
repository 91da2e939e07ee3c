"""The command line, in this process, on small sizes."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

import jchain as jc
from jchain.__main__ import main
from jchain.cli import commands

SMALL = [
    "--data",
    "wine",
    "--num-layers",
    "4",
    "--depth",
    "2",
    "--num-steps",
    "30",
    "--budget",
    "300",
]


def search(tmp_path, *options):
    assert main(["search", *SMALL, "--out", str(tmp_path / "out"), "--json", *options]) == 0


@pytest.mark.parametrize(
    "options",
    [("--bank", "routed", "--num-heads", "2"), ("--bank", "independent", "--search", "random")],
)
def test_search_writes_and_prints_a_report_that_can_be_checked(tmp_path, capsys, options):
    search(tmp_path, *options)
    shown = capsys.readouterr()
    assert "chain found" in shown.out
    assert "layer calls" in shown.err
    result = json.loads(shown.out.splitlines()[-1])
    assert result == json.loads((tmp_path / "out" / "result.json").read_text())
    assert set(result) == {
        "best_chain",
        "chosen",
        "layers",
        "loss",
        "accuracy",
        "layer_calls",
        "update_calls",
        "seconds",
        "optimum",
        "controls",
        "nonfinite_chains",
        "config",
        "versions",
    }
    assert (tmp_path / "out" / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]

    bank, data = jc.Bank.load(tmp_path / "out" / "bank.safetensors"), jc.data.load("wine", 0)
    assert result["layers"] == [bank.names[token] for token in result["best_chain"]]
    assert 0 < result["layer_calls"] <= 300
    chain = jc.chain.pad([result["best_chain"]], 2)
    for split in ("search", "select", "test"):
        out = jc.evaluate(jc.Problem(bank, getattr(data, split), 2), chain)
        assert result["loss"][split] == pytest.approx(float(out.loss[0]), rel=1e-5)
        assert result["accuracy"][split] == pytest.approx(float(out.accuracy[0]))
        assert set(result["controls"]["random_chain"]["loss"]) == {"search", "select", "test"}
    optimum = float(jc.evaluate_all(jc.Problem(bank, data.search, 2))[1].loss.min())
    assert result["optimum"] == pytest.approx(optimum, rel=1e-5)
    assert result["loss"]["search"] >= optimum * (1 - 1e-5)
    assert result["config"]["budget"] == 300
    assert result["versions"]["jax"] == jax.__version__
    if bank.parents:
        parents = jc.evaluate(jc.Problem(bank, data.search, 2), jc.chain.pad(bank.parents)).loss
        assert np.isclose(
            result["controls"]["best_parent"]["loss"]["search"], parents, rtol=1e-5
        ).any()


@pytest.mark.slow
def test_updated_weights_are_those_of_the_bank_that_is_kept(tmp_path, capsys):
    search(tmp_path, "--update", "clones", "--search", "local", "--budget", "7000")
    shown = capsys.readouterr().out
    result = json.loads(shown.splitlines()[-1])
    assert f"{result['update_calls']:,} of them gradient steps" in shown
    assert result["config"]["update"] == "clones"
    bank, data = jc.Bank.load(tmp_path / "out" / "bank.safetensors"), jc.data.load("wine", 0)
    chain = jc.chain.pad([result["best_chain"]], 2)
    out = jc.evaluate(jc.Problem(bank, data.test, 2), chain)
    assert result["loss"]["test"] == pytest.approx(float(out.loss[0]), rel=1e-5)
    assert bank.num_layers == 4 + 8
    # The optimum is that of the bank as it was made.
    optimum = float(jc.evaluate_all(jc.Problem(bank.take(range(4)), data.search, 2))[1].loss.min())
    assert result["optimum"] == pytest.approx(optimum, rel=1e-5)


@pytest.fixture(scope="module")
def result_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    search(folder, "--search", "random")
    return folder / "out"


def test_evaluate_scores_chains_of_a_result_or_a_bank_file(result_folder, capsys):
    result = json.loads((result_folder / "result.json").read_text())
    assert main(["evaluate", str(result_folder), "--split", "test", "--json"]) == 0
    scored = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert scored["chains"][0]["chain"] == result["best_chain"]
    assert scored["chains"][0]["loss"] == pytest.approx(result["loss"]["test"], rel=1e-5)
    bank = str(result_folder / "bank.safetensors")
    assert (
        main(["evaluate", bank, "--data", "wine", "--chain", "4", "--chain", "0,1,4", "--json"])
        == 0
    )
    scored = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [row["layers"] for row in scored["chains"]] == [
        ["routed/head"],
        ["routed/0", "routed/1", "routed/head"],
    ]
    assert scored["layer_calls"] == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data", "mnits"], "unknown data set 'mnits': did you mean mnist"),
        (["--sizes", "1,a"], "expected sizes as in 5000,1000,1000,1000, got '1,a'"),
        (["--search", "annealing"], "invalid choice: 'annealing'"),
        (["--search", "suffix-beam"], "expected --layer of invertible-dense, invertible-coupling"),
        (
            ["--search", "local", "--update", "shared"],
            "expected --search actor-critic with --update shared, got local",
        ),
        (
            ["--search", "local", "--encoding", "weights"],
            "expected --search actor-critic with --encoding, got local",
        ),
        (["--update", "found"], "more than the 1,545 layer calls of gradient steps, got 300"),
        (
            ["--num-layers", "5", "--bank", "independent"],
            "a multiple of depth for bank independent, got 5 and 2",
        ),
        (["--num-heads", "0"], "expected num_heads of at least 1, got 0"),
        (["--num-layers", "0"], "expected num_layers of at least 1, got 0"),
        (["--num-heads", "2", "--bank", "snapshots"], "expected no num_heads for bank snapshots"),
        (["--max-layers", "-1"], "max_layers to be an integer of at least 0, got -1"),
        (["--budget", "0"], "expected a budget of at least 1, got 0"),
        (["--min-layers", "9"], "expected min_layers to be an integer in 0..2"),
        (["--layer-cost", "nan"], "expected a finite --layer-cost of at least 0, got nan"),
        (["--channels", "8"], "expected --channels only for images, got it for [13]"),
        (["--budget", "3", "--search", "random"], "budget of at least one step"),
    ],
)
def test_bad_options_exit_with_2_one_line_and_no_files(tmp_path, capsys, options, message):
    argv = ["search", *SMALL, "--out", str(tmp_path / "out"), *options]
    try:
        code = main(argv)
    except SystemExit as error:  # argparse's own
        code = error.code
    shown = capsys.readouterr()
    assert code == 2
    assert message in shown.err
    assert "Traceback" not in shown.err
    assert list(tmp_path.iterdir()) == []


def test_a_result_is_not_overwritten_unless_told_to(result_folder, capsys, monkeypatch):
    before = (result_folder / "result.json").read_bytes()
    argv = ["search", *SMALL, "--search", "random", "--out", str(result_folder), "--seed", "1"]
    assert main(argv) == 2
    assert "already holds a result: pass --replace" in capsys.readouterr().err
    assert (result_folder / "result.json").read_bytes() == before
    assert main([*argv, "--replace"]) == 0
    assert json.loads((result_folder / "result.json").read_text())["config"]["seed"] == 1
    assert [path.name for path in result_folder.parent.iterdir()] == ["out"]
    found, notes = commands.run_job, result_folder / "notes.txt"

    def search_while_notes_are_taken(*args):
        notes.write_text("mine")
        return found(*args)

    monkeypatch.setattr(commands, "run_job", search_while_notes_are_taken)
    assert main([*argv, "--replace"]) == 0
    assert "out-2: bank.safetensors, curve.png, result.json" in capsys.readouterr().out
    assert notes.read_text() == "mine"
    assert main([*argv, "--replace"]) == 2
    assert "holds files that are not a result of jchain (notes.txt)" in capsys.readouterr().err
    notes.unlink()


def test_a_result_may_be_written_where_one_stands(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    options = [
        "--search",
        "random",
        "--layer-cost",
        "0.5",
        "--max-layers",
        "1",
        "--min-layers",
        "1",
    ]
    assert main(["search", *SMALL, *options, "--out", "."]) == 0
    assert {path.name for path in Path().iterdir()} == {
        "bank.safetensors",
        "curve.png",
        "result.json",
    }
    # Without layer penalty, as in all rows of the table.
    result = json.loads(Path("result.json").read_text())
    assert result["optimum"] == pytest.approx(result["loss"]["search"], rel=1e-5)


def test_a_result_that_cannot_be_put_in_its_place_is_kept(tmp_path, capsys, monkeypatch):
    def refuse(*args):
        raise OSError("Device or resource busy")

    monkeypatch.setattr("os.rename", refuse)
    assert main(["search", *SMALL, "--search", "random", "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    (folder,) = tmp_path.iterdir()
    assert f"Device or resource busy; the result is kept in {folder}" in said
    assert (folder / "result.json").exists()


def test_folders_that_hold_something_else_are_never_replaced(tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("mine")
    assert main(["search", *SMALL, "--out", str(tmp_path), "--replace"]) == 2
    assert "holds files that are not a result" in capsys.readouterr().err
    assert main(["search", *SMALL, "--out", str(tmp_path / "notes.txt"), "--replace"]) == 2
    assert "expected a folder for results, got the file" in capsys.readouterr().err
    assert main(["search", *SMALL, "--out", str(tmp_path / "notes.txt" / "out")]) == 2
    assert "expected a folder for results, got the file" in capsys.readouterr().err
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--chain", "0,99"],
            "token 99 at slot 1 is out of range: expected 0..3 (layers), 4..4 (heads)",
        ),
        (["--chain", "0,1"], "has no head token"),
        (["--chain", "4,1"], "has tokens after its head"),
        (["--chain", "a,4"], "expected a chain as tokens with commas between"),
        (["--data", "digits"], "does not take an input of shape [360, 64]"),
    ],
)
def test_evaluate_refuses(result_folder, capsys, options, message):
    assert main(["evaluate", str(result_folder), *options]) == 2
    assert message in capsys.readouterr().err


def test_evaluate_refuses_damaged_and_missing_files(result_folder, tmp_path, capsys):
    damaged = tmp_path / "bank.safetensors"
    damaged.write_bytes((result_folder / "bank.safetensors").read_bytes()[:-9])
    for path, message in [
        (damaged, "is damaged, truncated or no jchain file"),
        (tmp_path / "none", "expected a jchain file"),
        (tmp_path, "expected a bank file or a result folder"),
    ]:
        assert main(["evaluate", str(path), "--chain", "4"]) == 2
        assert message in capsys.readouterr().err


def test_a_search_whose_chains_are_all_broken_says_so(tmp_path, capsys, monkeypatch):
    make = jc.train.routed
    monkeypatch.setattr(
        "jchain.train.routed",
        lambda *a, **k: jax.tree.map(lambda leaf: leaf * np.nan, make(*a, **k)),
    )
    assert main(["search", *SMALL, "--search", "random", "--out", str(tmp_path / "out")]) == 2
    assert "no chain has a finite loss" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
