import dataclasses
import json
import re

import pytest
from checkpoints import TEXT, make_checkpoint
from command_line import check_bad_checkpoint_options

from jchain.cli import checkpoints
from jchain.cli.config import SearchConfig


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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--checkpoint", "m0"],
            "expected one of --text, --choices, and --data with --checkpoint, got none",
        ),
        (["--checkpoint", "m0", "--text", "text.txt", "--data", "digits"], "got text, data"),
        (
            ["--checkpoint", "m0", "--text", "text.txt", "--length", "0"],
            "expected --length to be at least 1",
        ),
        (["--checkpoint", "m0", "m0", "--text", "text.txt"], "expected different checkpoints"),
        (
            ["--checkpoint", "m0", "--text", "text.txt", "--pinned", "2,2"],
            "expected fewer pinned blocks than the 4",
        ),
        (
            ["--checkpoint", "m0", "--text", "text.txt", "--alternate"],
            "expected --sublayers with --alternate",
        ),
        (
            ["--checkpoint", "none", "--text", "text.txt"],
            "expected a checkpoint folder, a GGUF file, or a model of the .* found none at none",
        ),
    ],
)
def test_options_that_do_not_fit_the_checkpoints_exit_with_2(
    models_folder, monkeypatch, capsys, options, message
):
    err = check_bad_checkpoint_options(models_folder, monkeypatch, capsys, options)
    assert re.search(message, err), err
