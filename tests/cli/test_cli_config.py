import dataclasses
import re

import pytest
from command_line import check_bad_checkpoint_options, check_bad_options

from jchain.cli.config import SearchConfig, resolve


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--search", "suffix-beam"], "expected --layer of invertible-dense, invertible-coupling"),
        (
            ["--search", "local", "--update", "shared"],
            "expected --search actor-critic with --update shared, got local",
        ),
        (
            ["--search", "local", "--encoding", "weights"],
            "expected --search actor-critic with --encoding, got local",
        ),
        (["--max-layers", "-1"], "max_layers to be an integer of at least 0, got -1"),
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
            "expected --sweep of at least 0, got -1",
        ),
        (
            ["--checkpoint", "m0", "--text", "text.txt", "--search", "suffix-beam"],
            "not invertible",
        ),
        (["--pinned", "1,1"], "expected --checkpoint with --pinned"),
    ],
)
def test_options_that_exclude_each_other_exit_with_2(
    models_folder, monkeypatch, capsys, options, message
):
    err = check_bad_checkpoint_options(models_folder, monkeypatch, capsys, options)
    assert re.search(message, err), err


def test_a_configuration_cannot_be_changed():
    given = SearchConfig()
    resolved = resolve(given)
    assert (given, given.search, resolved.search) == (SearchConfig(), None, "actor-critic")
    with pytest.raises(dataclasses.FrozenInstanceError):
        resolved.seed = 1
    assert SearchConfig.load(resolved.dump()) == resolved
