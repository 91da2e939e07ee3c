"""Search results that several test modules read. Copy a result before changing it."""

import json
import shlex

import pytest
from checkpoints import QUESTION, TEXT, make_checkpoint, make_tensors, write, write_file
from command_line import search

from jchain.__main__ import main


@pytest.fixture(scope="session")
def result_folder(tmp_path_factory):
    """The result of a random search on wine."""
    folder = tmp_path_factory.mktemp("wine") / "out"
    search(folder, "--search", "random", "--quick")
    return folder


@pytest.fixture(scope="session")
def models_folder(tmp_path_factory):
    """A folder with two fine-tunes of a model of bytes, a text, and questions."""
    folder = tmp_path_factory.mktemp("models")
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


@pytest.fixture(scope="session")
def checkpoint_result(models_folder, tmp_path_factory):
    """The result of a random search over the blocks of both models."""
    out = tmp_path_factory.mktemp("checkpoints") / "result"
    paths = [str(models_folder / name) for name in ("m0", "m1")]
    text = ["--text", str(models_folder / "text.txt")]
    options = shlex.split("--length 8 --search random --budget 100 --sizes 4,6,5,4 --min-layers 1")
    assert main(["search", "--checkpoint", *paths, *text, *options, "--out", str(out)]) == 0
    return out
