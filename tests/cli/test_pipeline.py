import json
import re
import shlex

import jax
import numpy as np
import pytest
from command_line import SMALL, check_bad_checkpoint_options, check_bad_options, search

import jchain as jc
from jchain.__main__ import main


@pytest.mark.slow
def test_the_bank_that_is_kept_has_the_updated_weights(tmp_path, capsys):
    search(tmp_path / "out", "--update", "clone-then-tune", "--search", "local", "--budget", "7000")
    shown = capsys.readouterr()
    result = json.loads(shown.out)
    assert f"{result['update_calls']:,} of them gradient steps" in " ".join(shown.err.split())
    assert result["config"]["update"] == "clone-then-tune"
    bank, data = jc.Bank.load(tmp_path / "out" / "bank.safetensors"), jc.data.load("wine", 0)
    chain = jc.chain.pad([result["best_chain"]], 2)
    out = jc.evaluate(jc.Problem(bank, data.test, 2), chain)
    assert result["loss"]["test"] == pytest.approx(float(out.loss[0]), rel=1e-5)
    assert bank.num_layers == 4 + 8
    # The optimum is that of the bank before any update.
    optimum = float(jc.evaluate_all(jc.Problem(bank.take(range(4)), data.search, 2))[1].loss.min())
    assert result["optimum"] == pytest.approx(optimum, rel=1e-5)


@pytest.mark.slow
def test_fractions_are_recorded_and_shown(tmp_path, capsys):
    options = ["--search", "local", "--fractions", "1/4,1", "--budget", "40", "--quick"]
    search(tmp_path / "out", *options)
    shown = capsys.readouterr()
    result, text = json.loads(shown.out), " ".join(shown.err.split())
    assert result["config"]["fractions"] == [0.25, 1.0]
    assert result["layer_calls"] % 1 != 0
    assert result["layer_calls"] <= 40
    assert f"Best chain found, in {result['layer_calls']:,.1f} layer calls" in text
    assert "scored chains stopped after a part of the examples, or had a non-finite loss" in text
    found = jc.Result.from_json((tmp_path / "out" / "search.json").read_text())
    assert found.layer_calls == result["layer_calls"]


def test_a_search_without_a_finite_loss_fails(tmp_path, capsys, monkeypatch):
    make = jc.train.routed
    monkeypatch.setattr(
        "jchain.train.routed",
        lambda *a, **k: jax.tree.map(lambda leaf: leaf * np.nan, make(*a, **k)),
    )
    assert main(["search", *SMALL, "--search", "random", "--out", str(tmp_path / "out")]) == 2
    assert "no chain has a finite loss" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["run"]  # it keeps the bank


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--update", "tune-found"], "more than the 1,545 layer calls of gradient steps, got 300"),
        (["--budget", "3", "--search", "random"], "layer calls here, got 3"),
        (
            ["--budget", "3", "--search", "beam", "--seeds", "2", "--bank", "independent"],
            "which costs 4 layer calls here in addition to 4 for the starts, 8 in all, got 3",
        ),
    ],
)
def test_small_budgets_are_rejected_before_anything_is_trained(
    tmp_path, capsys, monkeypatch, options, message
):
    train = jc.train.train_weights

    def only_trace(keys, *args):
        assert isinstance(keys, jax.core.Tracer)
        return train(keys, *args)

    monkeypatch.setattr(jc.train, "train_weights", only_trace)
    check_bad_options(tmp_path, capsys, options, message)


@pytest.mark.slow
def test_the_budget_that_the_error_names_is_enough(tmp_path, capsys):
    options = [*SMALL, "--search", "random", "--bank", "random", "--out", str(tmp_path / "out")]
    assert main(["search", *options, "--budget", "3"]) == 2
    least = int(re.findall(r"costs ([0-9]+) layer calls", capsys.readouterr().err)[0])
    assert main(["search", *options, "--quick", "--budget", str(least - 1)]) == 2
    assert main(["search", *options, "--quick", "--budget", str(least)]) == 0
    record = json.loads((tmp_path / "out" / "result.json").read_text())
    assert record["layer_calls"] == least


def test_a_sweep_above_the_blocks_of_the_model_exits_with_2(models_folder, monkeypatch, capsys):
    options = shlex.split("--checkpoint m0 --text text.txt --sweep 2")
    err = check_bad_checkpoint_options(models_folder, monkeypatch, capsys, options)
    assert "below 2, the maximum number of layers, got 2" in err


def test_recipes_take_the_better_model(models_folder, checkpoint_result):
    """m0 has two blocks that are not pinned, and m1 also has its embeddings."""
    found = json.loads((checkpoint_result / "result.json").read_text())
    assert found["config"]["max_layers"] is None
    rows = found["controls"]["recipes"]
    bank = jc.hub.load_many([models_folder / "m0", models_folder / "m1"], pinned=(1, 1))
    data = jc.hub.load_text(
        models_folder / "m0", models_folder / "text.txt", length=8, sizes=(4, 6, 5, 4)
    )
    whole = jc.evaluate(jc.Problem(bank, data.select, 3), jc.chain.pad([*bank.parents], 3)).loss
    assert rows["nothing dropped"]["loss"]["select"] == pytest.approx(float(whole.min()), rel=1e-5)
    assert tuple(rows["nothing dropped"]["chain"]) == bank.parents[int(whole.argmin())]


@pytest.mark.slow
def test_questions_are_searched_too(models_folder, tmp_path):
    options = shlex.split("--search random --budget 400 --pinned 0,1 --layer-cost 10 --sweep 2")
    out = str(tmp_path / "out")
    assert (
        main(
            [
                "search",
                "--checkpoint",
                str(models_folder / "m0"),
                "--choices",
                str(models_folder / "questions.jsonl"),
                *options,
                "--out",
                out,
            ]
        )
        == 0
    )
    found = json.loads((tmp_path / "out" / "result.json").read_text())
    # The layer penalty is so high that no layer pays off.
    assert found["layers"] == ["m0/head"]
    assert 0 <= found["accuracy"]["test"] <= 1
    few, all_ = found["sweep"]
    assert (few["max_layers"], all_["max_layers"], all_["chain"]) == (2, 3, [3])
    assert set(few["recipes"]) == {
        "last blocks dropped",
        "blocks of least influence dropped",
        "best run of blocks dropped",
    }
    assert few["recipes"]["last blocks dropped"]["chain"] == [0, 1, 3]
    assert (tmp_path / "out" / "sweep.png").exists()


@pytest.mark.slow
def test_recipes_bring_the_model_to_the_number_of_blocks(models_folder):
    bank = jc.hub.load_many([models_folder / "m0", models_folder / "m1"])
    data = jc.hub.load_text(models_folder / "m0", models_folder / "text.txt", length=8)
    problem = jc.Problem(bank, data.search, max_layers=5)
    assert bank.parents[1] == (8, 4, 5, 6, 7, 10)
    found = jc.hub.recipes.find_chains(problem, list(bank.parents[1]), 3)
    assert found["last blocks dropped"] == [8, 4, 5, 10]
    assert all(chain[0] == 8 and len(chain) == 4 for chain in found.values())
    assert found["best run of blocks dropped"] in ([8, 6, 7, 10], [8, 4, 7, 10], [8, 4, 5, 10])
    parent = list(bank.parents[0])
    longer = jc.hub.recipes.find_chains(problem, parent, 6)
    assert (longer["nothing dropped"], len(longer["best run repeated"]), len(longer)) == (
        parent,
        7,
        2,
    )
    for num_layers in (len(parent) - 1, 20):
        assert jc.hub.recipes.find_chains(problem, parent, num_layers) == {
            "nothing dropped": parent
        }


@pytest.mark.parametrize("max_layers", [3, 4, 5])
def test_searches_begin_at_the_models_and_recipes(models_folder, max_layers):
    bank = jc.hub.load_many([models_folder / "m0", models_folder / "m1"])
    data = jc.hub.load_text(models_folder / "m0", models_folder / "text.txt", length=8)
    problem = jc.Problem(bank, data.search, max_layers)
    rows = jc.hub.recipes.find_starts(bank, max_layers).tolist()
    starts = [tuple(token for token in row if token >= 0) for row in rows]
    assert len(set(starts)) == len(starts) == {3: 4 + 3, 4: 1 + 4, 5: 1 + 4 + 1}[max_layers]
    for parent in bank.parents:
        assert (parent in starts) == (len(parent) - 1 <= max_layers)
        known = jc.hub.recipes.find_chains(problem, parent, max_layers)
        assert {tuple(chain) for name, chain in known.items() if "influence" not in name} <= set(
            starts
        )
    long = jc.hub.recipes.find_starts(bank, max_layers, min_layers=max_layers)
    assert len(long) == len(starts) - (max_layers == 5)
