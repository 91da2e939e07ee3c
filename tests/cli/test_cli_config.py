import dataclasses
import re

import pytest
from command_line import check_bad_checkpoint_options, check_bad_options, fail

from jchain.cli.choices import UPDATES
from jchain.cli.config import SearchConfig, resolve


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--search", "suffix-beam"], "expected --layer of invertible-dense, invertible-coupling"),
        (
            ["--search", "local", "--update", "shared-updates"],
            "expected --search actor-critic with --update shared-updates, got local",
        ),
        (
            ["--search", "local", "--encoding", "weights"],
            "expected --search actor-critic with --encoding, got local",
        ),
        (["--fractions", "1/4,1/16,1"], "expected fractions that rise and end in 1, got"),
        (
            ["--fractions", "1/4,1", "--update", "clone-then-tune"],
            "expected --update frozen or tune-found with --fractions, got clone-then-tune",
        ),
        (["--moves", "edits,swaps"], "expected moves to be some of edits, switches, runs, got"),
        (["--search", "random", "--moves", "runs"], "or evolution with --moves, got random"),
        (["--space", "subsets"], "invalid choice: 'subsets'"),
        (["--max-layers", "-1"], "max_layers to be an integer in 0..4096, got -1"),
        (["--budget", "0"], "expected a budget of at least 1, got 0"),
        (["--min-layers", "9"], "expected min_layers to be an integer in 0..2"),
        (["--layer-cost", "nan"], "expected a finite --layer-cost of at least 0, got nan"),
    ],
)
def test_bad_options_exit_with_2_and_write_nothing(tmp_path, capsys, options, message):
    check_bad_options(tmp_path, capsys, options, message)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--checkpoint", "m0", "--text", "text.txt", "--depth", "3"],
            "expected no --depth with --checkpoint",
        ),
        (["--text", "text.txt"], "expected --checkpoint with --text"),
        (
            ["--checkpoint", "m0", "--text", "text.txt", "--sweep", "-1"],
            "expected --sweep to be at least 0, got -1",
        ),
        (
            ["--checkpoint", "m0", "--text", "text.txt", "--search", "suffix-beam"],
            "cannot be inverted",
        ),
        (["--pinned", "1,1"], "expected --checkpoint with --pinned"),
    ],
)
def test_options_that_exclude_each_other_exit_with_2(
    models_folder, monkeypatch, capsys, options, message
):
    err = check_bad_checkpoint_options(models_folder, monkeypatch, capsys, options)
    assert re.search(message, err), err


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("never", "frozen"),
        ("found", "tune-found"),
        ("clones", "clone-then-tune"),
        ("shared", "shared-updates"),
    ],
)
def test_old_results_name_their_update_policies_as_before(old, new):
    assert SearchConfig.load({"update": old}) == SearchConfig.load({"update": new})
    assert set(UPDATES) >= {SearchConfig.load({"update": old}).update}


def test_a_configuration_cannot_be_changed():
    given = SearchConfig(data="wine")
    resolved = resolve(given)
    assert (given.search, resolved.search) == (None, "critic")
    with pytest.raises(dataclasses.FrozenInstanceError):
        resolved.seed = 1
    assert SearchConfig.load(resolved.dump()) == resolved


@pytest.mark.parametrize(
    ("given", "task", "bank", "search", "num_seeds", "out"),
    [
        ({}, "repair", None, "critic", 5, "repair-critic-0-4"),
        ({"seed": 7, "quick": True}, "repair", None, "critic", 1, "repair-critic-7"),
        ({"quick": True, "num_seeds": 2}, "repair", None, "critic", 2, "repair-critic-0-1"),
        ({"search": "local", "task": "repair"}, "repair", None, "local", 5, "repair-local-0-4"),
        ({"encoding": "weights"}, "repair", None, "actor-critic", 5, "repair-actor-critic-0-4"),
        ({"bank": "routed"}, None, "routed", "critic", 1, "digits-routed-critic-0"),
        ({"data": "wine"}, None, "routed", "critic", 1, "wine-routed-critic-0"),
        ({"depth": 4}, None, "routed", "critic", 1, "digits-routed-critic-0"),
    ],
)
def test_options_decide_whether_a_task_is_searched(given, task, bank, search, num_seeds, out):
    config = resolve(SearchConfig(**given))
    assert (config.task, config.bank, config.search) == (task, bank, search)
    assert (config.num_seeds, config.out.name) == (num_seeds, out)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--task", "repai"],
            "expected the name of a task (repair), got 'repai'; did you mean repair?",
        ),
        (["--task", "repair", "--depth", "3"], "expected no --depth with --task"),
        (["--task", "repair", "--data", "wine"], "expected no --data with --task"),
        (["--task", "repair", "--sweep", "2"], "expected --checkpoint with --sweep"),
        (["--update", "tune-found"], "expected --data or --bank with --update tune-found"),
        (["--seeds", "0"], "expected --seeds to be at least 1, got 0"),
        (["--sizes", "898,361,50,40"], "at most [898, 360, 270, 489], got [898, 361, 50, 40]"),
        (["--sizes", "898,100,50,750"], "at most [898, 360, 270, 749], got [898, 100, 50, 750]"),
        (["--sizes", "898,100"], "expected sizes of train, search, select, test"),
        (["--max-layers", "-1"], "max_layers to be an integer in 0..4096, got -1"),
        (["--min-layers", "9"], "expected min_layers to be an integer in 0..7"),
        (
            ["--search", "suffix-beam"],
            "suffix-beam needs invertible layers, which this task does not have",
        ),
        (["--sizes", "898,1000,50,10"], "at most [898, 360, 270, 489], got [898, 1000, 50, 10]"),
        (["--task", "repair", "--checkpoint", "m"], "expected --task or --checkpoint, got both"),
    ],
)
def test_options_that_do_not_fit_a_task_exit_with_2(tmp_path, capsys, options, message):
    assert message in fail(["search", "--out", str(tmp_path / "out"), *options], capsys)
    assert list(tmp_path.iterdir()) == []
