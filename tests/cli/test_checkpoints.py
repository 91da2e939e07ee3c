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


def test_text_is_read_from_another_field_and_drawn_at_random(tmp_path, monkeypatch, capsys):
    checkpoint, text = make_checkpoint(tmp_path / "model"), tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"body": f"{i} {TEXT}"}) + "\n" for i in range(6)))
    config = SearchConfig(checkpoint=[str(checkpoint)], text=[str(text)], field="body", length=8)
    monkeypatch.setattr(checkpoints, "SIZES", (64, 64, 64, 256))
    data = checkpoints.load_data(config).data
    assert "Text:" not in capsys.readouterr().err
    assert len(data.train.x) == 64
    assert 64 < len(data.test.x) < 256
    with pytest.raises(ValueError, match="expected the field 'text', found body.*or --field"):
        checkpoints.load_data(dataclasses.replace(config, field=None))
    monkeypatch.setattr(checkpoints, "SIZES", (4, 3, 2, 1))
    data = checkpoints.load_data(config).data
    assert [len(split.x) for split in data[:4]] == [4, 3, 2, 1]
    assert "Text: 4, 3, 2, 1 sequences of 8 tokens in train, " in capsys.readouterr().err


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
            ["--checkpoint", "m0", "--choices", "questions.jsonl", "--field", "text"],
            "expected --text with --field, got --field text",
        ),
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
