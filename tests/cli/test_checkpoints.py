"""`jchain search --checkpoint`, `evaluate` and `export`."""

import dataclasses
import json
import re

import numpy as np
import pytest
from checkpoints import QUESTION, TEXT, make_checkpoint, make_tensors, write, write_file

import jchain as jc
from jchain.__main__ import main
from jchain.cli import checkpoints, pipeline
from jchain.cli.config import SearchConfig


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two fine-tunes of a model of bytes, a text and questions."""
    folder = tmp_path_factory.mktemp("jobs")
    for i in range(2):
        made = make_checkpoint(folder / f"m{i}")
        write(
            made,
            config={"vocab_size": 256, "n_positions": 16, "n_layer": 4},
            tensors=make_tensors(4, i, vocabulary=256, positions=16),
        )
    write_file(folder, TEXT)
    write_file(folder, "\n".join([json.dumps(QUESTION)] * 12), "questions.jsonl")
    return folder


@pytest.fixture(scope="module")
def result(folder):
    options = [
        "--length",
        "8",
        "--search",
        "random",
        "--budget",
        "80",
        "--sizes",
        "4,6,5,4",
        "--min-layers",
        "1",
    ]
    paths = [str(folder / name) for name in ("m0", "m1")]
    text = ["--text", str(folder / "text.txt")]
    assert (
        main(["search", "--checkpoint", *paths, *text, *options, "--out", str(folder / "result")])
        == 0
    )
    return folder / "result"


def test_a_search_leaves_a_result_without_the_weights(folder, result, capsys):
    assert sorted(path.name for path in result.iterdir()) == ["curve.png", "result.json"]
    found = json.loads((result / "result.json").read_text())
    assert found["layers"][-1] in ("m0/head", "m1/head")
    assert set(found["layers"][:-1]) <= {"m0/1", "m0/2", "m1/1", "m1/2", "m1/embeddings"}
    assert 2 <= len(found["layers"]) <= 4
    assert found["controls"]["best_parent"]["loss"]["test"] > 0
    # Their model has as many blocks as a chain may have, or with other embeddings one layer more.
    assert "nothing dropped" in found["controls"]["recipes"]
    on_select = [row["loss"]["select"] for row in found["controls"]["recipes"].values()]
    assert found["loss"]["select"] <= min(on_select) * (1 + 1e-5)
    assert found["chosen"] in ("search", *found["controls"]["recipes"])
    assert main(["evaluate", str(result), "--split", "test", "--json"]) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert told["chains"][0]["loss"] == pytest.approx(found["loss"]["test"], rel=1e-5)
    assert told["chains"][0]["layers"] == found["layers"]


def test_recipes_are_those_of_the_model_that_is_better(folder, result):
    """m0 has two blocks that are not pinned, m1 one layer more, its embeddings."""
    found = json.loads((result / "result.json").read_text())
    assert found["config"]["max_layers"] is None
    rows = found["controls"]["recipes"]
    bank = jc.hub.load_many([folder / "m0", folder / "m1"], pinned=(1, 1))
    data = jc.hub.load_text(folder / "m0", folder / "text.txt", length=8, sizes=(4, 6, 5, 4))
    whole = jc.evaluate(jc.Problem(bank, data.select, 3), jc.chain.pad([*bank.parents], 3)).loss
    assert rows["nothing dropped"]["loss"]["select"] == pytest.approx(float(whole.min()), rel=1e-5)
    assert tuple(rows["nothing dropped"]["chain"]) == bank.parents[int(whole.argmin())]


def test_a_result_is_exported_as_a_checkpoint(folder, result, tmp_path, capsys):
    assert main(["export", str(result), "--out", str(tmp_path / "out")]) == 0
    found = json.loads((result / "result.json").read_text())
    bank = jc.hub.load(tmp_path / "out")
    data = jc.hub.load_text(tmp_path / "out", folder / "text.txt", length=8, sizes=(4, 6, 5, 4))
    out = jc.evaluate(jc.Problem(bank, data.test, bank.num_layers), np.array([bank.parents[0]]))
    assert float(out.loss[0]) == pytest.approx(found["loss"]["test"], rel=1e-5)
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"| loss on test | {found['loss']['test']:.4f}, the unchanged model " in card
    assert "--search random --budget 80" in card
    assert main(["export", str(result), "--out", str(tmp_path / "out")]) == 2
    assert "expected no folder at" in capsys.readouterr().err
    assert main(["export", str(result), "--out", str(tmp_path / "own"), "--chain", "1,0,6"]) == 0
    assert json.loads((tmp_path / "own" / "config.json").read_text())["n_layer"] == 4


@pytest.mark.slow
def test_questions_are_searched_too(folder, tmp_path):
    options = [
        "--search",
        "random",
        "--budget",
        "40",
        "--pinned",
        "0,1",
        "--layer-cost",
        "10",
        "--sweep",
        "2",
    ]
    out = str(tmp_path / "out")
    assert (
        main(
            [
                "search",
                "--checkpoint",
                str(folder / "m0"),
                "--choices",
                str(folder / "questions.jsonl"),
                *options,
                "--out",
                out,
            ]
        )
        == 0
    )
    found = json.loads((tmp_path / "out" / "result.json").read_text())
    # Layers are that dear.
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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--checkpoint", "m0"],
            "expected one of --text, --choices and --data with --checkpoint, got none",
        ),
        (["--checkpoint", "m0", "--text", "text.txt", "--data", "digits"], "got text, data"),
        (
            ["--checkpoint", "m0", "--text", "text.txt", "--depth", "3"],
            "expected no --depth with --checkpoint",
        ),
        (["--text", "text.txt"], "expected --checkpoint with --text"),
        (
            ["--checkpoint", "m0", "--text", "text.txt", "--sweep", "-1"],
            "expected --sweep of at least 0, got -1",
        ),
        (
            ["--checkpoint", "m0", "--text", "text.txt", "--sweep", "2"],
            "below the most layers of a chain, 2, got 2",
        ),
        (
            ["--checkpoint", "m0", "--text", "text.txt", "--length", "0"],
            "expected --length of at least 1",
        ),
        (
            ["--checkpoint", "m0", "--text", "text.txt", "--search", "suffix-beam"],
            "not invertible",
        ),
        (["--pinned", "1,1"], "expected --checkpoint with --pinned"),
        (["--checkpoint", "m0", "m0", "--text", "text.txt"], "expected different checkpoints"),
        (
            ["--checkpoint", "m0", "--text", "text.txt", "--pinned", "2,2"],
            "expected fewer pinned blocks than the 4",
        ),
        (
            ["--checkpoint", "none", "--text", "text.txt"],
            "expected a checkpoint folder at .*none, found none",
        ),
    ],
)
def test_options_that_do_not_go_together_are_refused(folder, monkeypatch, capsys, options, message):
    monkeypatch.chdir(folder)
    assert main(["search", *options, "--out", "refused"]) == 2
    err = capsys.readouterr().err
    assert [line for line in err.splitlines() if line.startswith("jchain: error")]
    assert re.search(message, err), err
    assert not (folder / "refused").exists()


def test_recipes_bring_the_model_to_as_many_blocks(folder):
    bank = jc.hub.load_many([folder / "m0", folder / "m1"])
    data = jc.hub.load_text(folder / "m0", folder / "text.txt", length=8)
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
def test_local_search_begins_at_the_models_and_what_is_done_by_hand(folder, max_layers):
    bank = jc.hub.load_many([folder / "m0", folder / "m1"])
    data = jc.hub.load_text(folder / "m0", folder / "text.txt", length=8)
    problem = jc.Problem(bank, data.search, max_layers)
    other = jc.RandomSearch()
    assert pipeline.start_at_models(other, problem) is other
    rows = pipeline.start_at_models(jc.LocalSearch(), problem).starts.tolist()
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


def test_results_of_other_banks_are_not_exported(tmp_path, capsys):
    (tmp_path / "result.json").write_text(json.dumps({"config": {}, "best_chain": [0]}))
    assert main(["export", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "expected the result of jchain search --checkpoint" in capsys.readouterr().err


def test_models_are_called_by_as_much_of_their_paths_as_it_takes():
    assert checkpoints.name_models(["/a/b", "/a/c/"]) == ["b", "c"]
    assert checkpoints.name_models(["/a/x", "/b/x"]) == ["a/x", "b/x"]


def test_sequences_are_not_longer_than_the_positions_of_the_model(tmp_path):
    checkpoint, text = make_checkpoint(tmp_path / "model"), tmp_path / "text.txt"
    text.write_text(TEXT)
    config = SearchConfig(checkpoint=[str(checkpoint)], text=[str(text)], sizes=(4, 4, 4, 4))
    assert checkpoints.load_data(config).data.search.x.shape == (4, 16)
    shorter = dataclasses.replace(config, length=9)
    assert checkpoints.load_data(shorter).data.search.x.shape == (4, 9)
    odd = make_checkpoint(tmp_path / "odd")
    options = json.loads((odd / "config.json").read_text())
    (odd / "config.json").write_text(json.dumps(options | {"n_positions": "many"}))
    with pytest.raises(ValueError, match="an option has an invalid value"):
        checkpoints.load_data(dataclasses.replace(config, checkpoint=[str(odd)]))
