"""Which files of a path are the checkpoint."""

import shutil

import jax
import pytest
from checkpoints import write, write_config
from gguf_files import CONFIGS, write_gguf, write_model

import jchain as jc
from jchain.hub.gguf_file import GGUFCheckpoint
from jchain.hub.opening import open_checkpoint, read_config


@pytest.fixture
def file(tmp_path):
    model = write_model(tmp_path / "model", "llama")
    folder = tmp_path / "folder"
    folder.mkdir()
    return write_gguf(folder / "Tiny-F32.gguf", CONFIGS["llama"], model)


def test_a_folder_with_one_gguf_file_is_that_file(file):
    checkpoint = open_checkpoint(file.parent)
    assert isinstance(checkpoint, GGUFCheckpoint)
    assert checkpoint.path == file
    assert read_config(file.parent) == (checkpoint.config, str(file))
    assert jc.hub.load(file.parent).names[0] == "folder/0"


def test_a_folder_with_several_gguf_files_is_refused(file):
    shutil.copy(file, file.with_name("Tiny-Q8.gguf"))
    with pytest.raises(ValueError, match=r"one GGUF file, got Tiny-F32.gguf, Tiny-Q8.gguf: give"):
        jc.hub.load(file.parent)


def test_safetensors_have_precedence_over_gguf(file):
    write(file.parent)
    assert not isinstance(open_checkpoint(file.parent), GGUFCheckpoint)
    assert read_config(file.parent)[1].endswith("config.json")


def test_a_link_is_named_after_itself(file, tmp_path):
    blob = tmp_path / ("0" * 40)
    file.rename(blob)
    file.symlink_to(blob)
    assert jc.hub.load(file).names[0] == "Tiny-F32/0"


def test_random_banks_take_the_config_of_a_gguf_file(file):
    bank = jc.hub.random_bank(jax.random.key(0), file)
    expected = jc.hub.random_bank(
        jax.random.key(0), write_config(file.parent / "c", CONFIGS["llama"])
    )
    assert bank.layers[0].module == expected.layers[0].module


def test_gguf_is_imported_only_for_gguf_files(file, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    jc.hub.load(write(file.parent / "gpt2"))
    with pytest.raises(ImportError, match="GGUF files need gguf: pip install"):
        jc.hub.load(file)
