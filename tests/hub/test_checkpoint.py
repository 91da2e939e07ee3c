"""Reading checkpoint folders: whole files, shards, damaged files."""

import contextlib
import json

import numpy as np
import pytest
from checkpoints import make_tensors, write

import jchain as jc

NAME = "transformer.h.1.mlp.c_fc.bias"


def test_missing_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="expected a checkpoint folder"):
        jc.hub.load(tmp_path / "none")
    folder = write(tmp_path / "model")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(
        FileNotFoundError, match="found pytorch_model.bin: only safetensors and GGUF files are read"
    ):
        jc.hub.load(folder)
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {NAME: "../secret.safetensors"}})
    )
    with pytest.raises(
        ValueError, match=r"expected files of this folder, got '../secret.safetensors'"
    ):
        jc.hub.load(folder)
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {NAME: "model-2.safetensors"}})
    )
    with pytest.raises(FileNotFoundError, match=r"expected model-2.safetensors in"):
        jc.hub.load(folder)


def test_a_single_file_has_precedence_over_shards(tmp_path):
    from safetensors.numpy import save_file

    folder, other = write(tmp_path / "model"), make_tensors(seed=1)
    save_file(other, folder / "old.safetensors")
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": dict.fromkeys(other, "old.safetensors")})
    )
    bank = jc.hub.load(folder)
    np.testing.assert_array_equal(
        bank.stem_params["wte"]["weight"], make_tensors()["transformer.wte.weight"]
    )


def test_damaged_files_raise_only_clear_errors(tmp_path):
    folder = write(tmp_path / "model")
    path = folder / "model.safetensors"
    whole, config = path.read_bytes(), (folder / "config.json").read_bytes()
    rng = np.random.default_rng(0)
    length = 8 + int.from_bytes(whole[:8], "little")
    for trial in range(100):
        damaged, options = bytearray(whole), bytearray(config)
        if trial % 4 == 0:
            damaged = damaged[: rng.integers(0, len(damaged))]
        elif trial % 4 == 1:
            options[rng.integers(0, len(options))] = rng.integers(0, 256)
        else:
            for place in rng.integers(0, length, 1 + trial % 3):
                damaged[place] = rng.integers(0, 256)
        path.write_bytes(damaged)
        (folder / "config.json").write_bytes(options)
        # Each of these errors says what was expected, and in which file.
        with contextlib.suppress(ValueError, FileNotFoundError):
            jc.hub.load(folder)


def test_damaged_shards_and_indices_raise_only_clear_errors(tmp_path):
    source = write(tmp_path / "model")
    bank = jc.hub.load(source)
    folder = jc.hub.export(bank, bank.parents[0], source, tmp_path / "shards", max_shard_size=1000)
    index, shards = (
        folder / "model.safetensors.index.json",
        sorted(folder.glob("model-*.safetensors")),
    )
    assert len(shards) > 2
    whole, rng = {path: path.read_bytes() for path in (index, *shards)}, np.random.default_rng(0)
    for trial in range(60):
        for path, content in whole.items():
            path.write_bytes(content)
        damaged = bytearray(whole[index])
        if trial % 3 == 0:
            rng.choice(shards).unlink()
        elif trial % 3 == 1:
            first, second = rng.choice(len(shards), 2, replace=False)
            shards[first].write_bytes(whole[shards[second]])
        else:
            for place in rng.integers(0, len(damaged), 3):
                damaged[place] = rng.integers(32, 127)
        index.write_bytes(damaged)
        with contextlib.suppress(ValueError, FileNotFoundError):
            jc.hub.load(folder)
            assert trial % 3 == 2  # only bytes that are not read may have changed
