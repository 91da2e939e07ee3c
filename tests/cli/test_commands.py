import json
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
from command_line import search

import jchain as jc
from jchain.__main__ import main

SAVED = Path(__file__).parent.parent / "saved"


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(("--bank", "routed", "--num-heads", "2"), marks=pytest.mark.slow),
        ("--bank", "independent", "--search", "random", "--quick"),
    ],
)
def test_search_writes_and_prints_a_report_that_can_be_checked(tmp_path, capsys, options):
    search(tmp_path / "out", *options)
    shown = capsys.readouterr()
    assert "chain found" in shown.err
    assert "layer calls" in shown.err
    result = json.loads(shown.out)
    assert result == json.loads((tmp_path / "out" / "result.json").read_text())
    assert set(result) == {
        "finalists",
        "about",
        "num_chains",
        "num_examples",
        "standard_error",
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
        "num_scored",
        "config",
        "signature",
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
        logits = jc.apply_chain(bank, chain[0], getattr(data, split).x)
        own = optax.softmax_cross_entropy_with_integer_labels(logits, getattr(data, split).y)
        error = float(own.std(ddof=1)) / len(own) ** 0.5
        assert result["standard_error"][split] == pytest.approx(error, rel=1e-3)
        assert result["num_examples"][split] == len(own)
    assert result["controls"]["random_chains"]["num_chains"] == 200
    optimum = float(jc.evaluate_all(jc.Problem(bank, data.search, 2))[1].loss.min())
    assert result["optimum"] == pytest.approx(optimum, rel=1e-5)
    assert result["loss"]["search"] >= optimum * (1 - 1e-5)
    assert result["config"]["budget"] == 300
    assert result["versions"]["jax"] == jax.__version__
    expected = {"plain_net", "random_chains", "recipes"} | (
        {"best_parent"} if bank.parents else set()
    )
    if "--quick" not in options:
        expected |= {"tuned_plain_net", "finalist_ensemble", "local_search", "actor_critic"}
        expected |= {"best_edit", "parent_ensemble"} if bank.parents else set()
    assert set(result["controls"]) == expected
    if bank.parents:
        parents = jc.evaluate(jc.Problem(bank, data.search, 2), jc.chain.pad(bank.parents)).loss
        assert np.isclose(
            result["controls"]["best_parent"]["loss"]["search"], parents, rtol=1e-5
        ).any()


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
        (
            ["--chain", "0,99"],
            "token 99 at slot 1 is out of range: expected 0..3 (layers), 4..4 (heads)",
        ),
        (["--chain", "0,1"], "has no head token"),
        (["--chain", "4,1"], "has tokens after its head"),
        (["--chain", "a,4"], "expected a chain as comma-separated tokens"),
        (["--data", "digits"], "does not take an input of shape [360, 64]"),
    ],
)
def test_evaluate_refuses_invalid_chains(result_folder, capsys, options, message):
    assert main(["evaluate", str(result_folder), *options]) == 2
    assert message in capsys.readouterr().err


def test_evaluate_refuses_damaged_and_missing_files(result_folder, tmp_path, capsys):
    damaged = tmp_path / "bank.safetensors"
    damaged.write_bytes((result_folder / "bank.safetensors").read_bytes()[:-9])
    for path, message in [
        (damaged, "is damaged, truncated, or not a jchain file"),
        (tmp_path / "none", "expected a jchain file"),
        (tmp_path, "expected a bank file or a result folder"),
    ]:
        assert main(["evaluate", str(path), "--chain", "4"]) == 2
        assert message in capsys.readouterr().err


def test_a_search_leaves_a_result_without_the_weights(models_folder, checkpoint_result, capsys):
    names = ["curve.png", "result.json", "run", "search.json"]
    assert sorted(path.name for path in checkpoint_result.iterdir()) == names
    found = json.loads((checkpoint_result / "result.json").read_text())
    assert found["layers"][-1] in ("m0/head", "m1/head")
    assert set(found["layers"][:-1]) <= {"m0/1", "m0/2", "m1/1", "m1/2", "m1/embeddings"}
    assert 2 <= len(found["layers"]) <= 4
    assert found["controls"]["best_parent"]["loss"]["test"] > 0
    # A whole model fits into a chain: its blocks, and one more layer for other embeddings.
    assert "nothing dropped" in found["controls"]["recipes"]
    on_select = [row["loss"]["select"] for row in found["controls"]["recipes"].values()]
    assert found["loss"]["select"] <= min(on_select) * (1 + 1e-5)
    assert found["chosen"] in ("search", *found["controls"]["recipes"])
    assert main(["evaluate", str(checkpoint_result), "--split", "test", "--json"]) == 0
    scored = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert scored["chains"][0]["loss"] == pytest.approx(found["loss"]["test"], rel=1e-5)
    assert scored["chains"][0]["layers"] == found["layers"]


def check_card(card, found, original):
    """Compare the table of scores of a model card with a result."""
    lines = card[card.index("## Scores") :].splitlines()
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:]]
    column = table[0].index("loss on test")
    rows = {row[0]: row for row in table if len(row) == len(table[0])}
    wanted = {"this chain": found, original: found["controls"]["best_parent"]}
    wanted |= found["controls"]["recipes"]
    for name, scores in wanted.items():
        loss = scores["loss"]["test"]
        assert rows[name][column].startswith(f"{loss:.4f}"), name
        perplexity = rows[name][table[0].index("perplexity on test")]
        assert perplexity == f"{np.exp(loss):.2f}" or loss > np.log(1e9)


def test_a_result_is_exported_as_a_checkpoint(models_folder, checkpoint_result, tmp_path, capsys):
    assert main(["export", str(checkpoint_result), "--out", str(tmp_path / "out")]) == 0
    found = json.loads((checkpoint_result / "result.json").read_text())
    bank = jc.hub.load(tmp_path / "out")
    data = jc.hub.load_text(
        tmp_path / "out", models_folder / "text.txt", length=8, sizes=(4, 6, 5, 4)
    )
    out = jc.evaluate(jc.Problem(bank, data.test, bank.num_layers), np.array([bank.parents[0]]))
    assert float(out.loss[0]) == pytest.approx(found["loss"]["test"], rel=1e-5)
    card = (tmp_path / "out" / "README.md").read_text()
    check_card(card, found, "best original model")
    assert "--search random --budget 100" in card
    assert "| tokens | 48 in search, 40 in select, 32 in test |" in card
    assert "| data | text.txt |" in card
    assert str(tmp_path) not in card
    assert str(models_folder) not in card
    assert main(["export", str(checkpoint_result), "--out", str(tmp_path / "out")]) == 2
    assert "already exists; choose another output folder" in capsys.readouterr().err
    assert (
        main(["export", str(checkpoint_result), "--out", str(tmp_path / "own"), "--chain", "1,0,6"])
        == 0
    )
    assert json.loads((tmp_path / "own" / "config.json").read_text())["n_layer"] == 4


def test_results_of_other_banks_are_not_exported(tmp_path, capsys):
    (tmp_path / "result.json").write_text(json.dumps({"config": {}, "best_chain": [0]}))
    assert main(["export", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "expected the result of jchain search --checkpoint" in capsys.readouterr().err


def test_results_of_the_old_code_are_evaluated(capsys):
    """`tests/saved/result` was written before the command line was rewritten."""
    saved = json.loads((SAVED / "result" / "result.json").read_text())
    for split, loss in saved["loss"].items():
        assert main(["evaluate", str(SAVED / "result"), "--split", split, "--json"]) == 0
        (row,) = json.loads(capsys.readouterr().out.splitlines()[-1])["chains"]
        assert (row["chain"], row["layers"]) == (saved["best_chain"], saved["layers"])
        assert row["loss"] == pytest.approx(loss, rel=1e-5)
        assert row["accuracy"] == pytest.approx(saved["accuracy"][split])


def test_results_of_the_old_code_are_exported(models_folder, tmp_path, monkeypatch, capsys):
    """`tests/saved/checkpoint_result` was searched in `models_folder`, whose paths it has."""
    monkeypatch.chdir(models_folder)
    folder = str(SAVED / "checkpoint_result")
    saved = json.loads((SAVED / "checkpoint_result" / "result.json").read_text())
    assert main(["evaluate", folder, "--trust", "--split", "test", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out.splitlines()[-1])["chains"]
    assert (row["chain"], row["layers"]) == (saved["best_chain"], saved["layers"])
    assert row["loss"] == pytest.approx(saved["loss"]["test"], rel=1e-5)
    assert main(["export", folder, "--trust", "--out", str(tmp_path / "out")]) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    check_card(card, saved, "original model")
    assert saved["config"]["command"] in card
    assert main(["export", str(SAVED / "result"), "--out", str(tmp_path / "own")]) == 2
    assert "expected the result of jchain search --checkpoint" in capsys.readouterr().err
