"""Weights of several dtypes, and random weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import GPT2, make_tensors, write, write_config

import jchain as jc


def test_several_dtypes_in_one_file_are_rejected(tmp_path):
    changed = {"transformer.h.1.mlp.c_fc.bias": np.zeros(24, np.float16)}
    folder = write(tmp_path / "model", tensors=make_tensors() | changed)
    with pytest.raises(
        ValueError, match="expected weights of one dtype, got float16, float32; set dtype to choose"
    ):
        jc.hub.load(folder)


def test_an_untrained_model_has_all_its_weights(tmp_path):
    folder = write_config(tmp_path / "new", GPT2 | {"n_layer": 3})
    bank = jc.hub.random_bank(jax.random.key(0), folder, name="new")
    assert bank.names == ("new/0", "new/1", "new/2", "new/head")
    out = jc.hub.export(bank, bank.parents[0], folder, tmp_path / "out")
    assert "lm_head.weight" not in out.joinpath("model.safetensors").read_bytes()[:4096].decode(
        "latin-1"
    )
    again, ids = jc.hub.load(out, name="new"), jnp.array([[1, 2, 3]])
    np.testing.assert_array_equal(
        *(jc.apply_chain(b, np.array(b.parents[0]), ids) for b in (bank, again))
    )
    kernel = bank.layers[0].params["mlp"]["c_fc"]["weight"]
    assert not np.array_equal(kernel[0], kernel[1])
    other = jc.hub.random_bank(jax.random.key(1), folder, pinned=(1, 1))
    assert other.num_layers == 1
