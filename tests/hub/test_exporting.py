"""Chains as checkpoint folders. test_parity.py compares them with transformers."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import write, write_config

import jchain as jc


def test_chains_that_cannot_be_exported_leave_nothing(tmp_path):
    folder = write(tmp_path / "model")
    bank = jc.hub.load(folder)
    with pytest.raises(ValueError, match="at least one block, got a head alone"):
        jc.hub.export(bank, [2], folder, tmp_path / "out")
    with pytest.raises(FileExistsError, match="already exists; choose another output folder"):
        jc.hub.export(bank, [0, 2], folder, folder)
    other = write(tmp_path / "other", config={"layer_norm_epsilon": 0.1})
    with pytest.raises(ValueError, match="expected a bank of the blocks of"):
        jc.hub.export(bank, [0, 2], other, tmp_path / "out")

    with pytest.raises(ValueError, match="expected max_shard_size to be at least 1, got 0"):
        jc.hub.export(bank, [0, 2], folder, tmp_path / "out", max_shard_size=0)
    with pytest.raises(ValueError, match="expected a folder, or the folder of each model by name"):
        jc.hub.export(bank, [0, 2], {}, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "other"]


def test_the_exported_config_has_the_dtype_of_the_weights(tmp_path):
    folder = write(tmp_path / "model", config={"torch_dtype": "float32"})
    bank = jc.hub.load(folder, dtype=jnp.bfloat16)
    out = jc.hub.export(bank, bank.parents[0], folder, tmp_path / "out")
    assert json.loads((out / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert "dtype: bfloat16" in (out / "mergekit.yaml").read_text()


def test_blocks_keep_their_windows_when_a_config_selects_windows_by_index(tmp_path):
    options = {
        "model_type": "qwen2",
        "vocab_size": 11,
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 2,
    }
    options |= {
        "num_attention_heads": 2,
        "use_sliding_window": True,
        "sliding_window": 2,
        "max_window_layers": 2,
    }
    folder = write_config(tmp_path / "new", options)
    bank = jc.hub.random_bank(jax.random.key(0), folder)
    chain, ids = np.array([0, 1, 0, 1, 2]), jnp.arange(8)[None]
    again = jc.hub.load(jc.hub.export(bank, chain, folder, tmp_path / "out"))
    expected = jc.apply_chain(bank, chain, ids)
    np.testing.assert_allclose(
        jc.apply_chain(again, np.array(again.parents[0]), ids), expected, rtol=1e-5, atol=1e-6
    )


def test_links_out_of_the_folder_are_refused_before_anything_is_written(tmp_path):
    folder = write(tmp_path / "model")
    bank = jc.hub.load(folder)
    private = tmp_path / "id_rsa"
    private.write_text("private")
    (folder / "vocab.json").symlink_to(private)
    with pytest.raises(ValueError, match=r"got vocab.json, a link to .*id_rsa: replace it by a"):
        jc.hub.export(bank, [0, 2], folder, tmp_path / "out")
    (folder / "vocab.json").unlink()
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool.jinja").symlink_to(private)
    with pytest.raises(ValueError, match=r"got additional_chat_templates/tool.jinja, a link to"):
        jc.hub.export(bank, [0, 2], folder, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["id_rsa", "model"]


def test_links_within_the_folder_and_to_the_blobs_of_a_cache_are_copied(tmp_path):
    snapshots = tmp_path / "models--a" / "snapshots"
    snapshots.mkdir(parents=True)
    folder = write(snapshots / "revision")
    blobs = tmp_path / "models--a" / "blobs"
    blobs.mkdir()
    (blobs / "1234").write_text("{}")
    (folder / "tokenizer.json").symlink_to("../../blobs/1234")
    (folder / "vocab.json").symlink_to("tokenizer.json")
    out = jc.hub.export(jc.hub.load(folder), [0, 2], folder, tmp_path / "out")
    for name in ("tokenizer.json", "vocab.json"):
        assert (out / name).read_text() == "{}"
        assert not (out / name).is_symlink()
