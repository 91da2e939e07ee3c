"""The tensors that a file must contain."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import make_tensors, write, write_config

import jchain as jc

NAME = "transformer.h.1.mlp.c_fc.bias"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({NAME: None}, f"expected tensors {NAME}, which are missing"),
        (
            {"transformer.extra": np.zeros(2, np.float32)},
            "expected only tensors of the model that its config describes, got transformer.extra",
        ),
        (
            {NAME: np.zeros(7, np.float32)},
            rf"expected {NAME} of shape \[24\] from its config, got \[7\]",
        ),
        ({NAME: np.zeros(24, np.int8)}, f"expected {NAME} of float32, bfloat16, float16, got I8"),
    ],
)
def test_files_with_other_tensors_are_rejected(tmp_path, change, message):
    tensors = {
        name: tensor for name, tensor in (make_tensors() | change).items() if tensor is not None
    }
    with pytest.raises(ValueError, match=message):
        jc.hub.load(write(tmp_path / "model", tensors=tensors))


@pytest.mark.parametrize(
    ("options", "name"),
    [
        (
            {"model_type": "gpt2", "n_embd": 8, "n_layer": 2, "n_head": 2, "n_positions": 8},
            "lm_head.weight",
        ),
        (
            {
                "model_type": "gpt_neox",
                "hidden_size": 8,
                "num_hidden_layers": 2,
                "num_attention_heads": 1,
            }
            | {"intermediate_size": 8, "tie_word_embeddings": True},
            "embed_out.weight",
        ),
    ],
)
def test_a_file_may_contain_a_tied_output_layer(tmp_path, options, name):
    from safetensors.numpy import load_file, save_file

    folder = write_config(tmp_path / "new", options | {"vocab_size": 11})
    bank = jc.hub.random_bank(jax.random.key(0), folder)
    out = jc.hub.export(bank, bank.parents[0], folder, tmp_path / "out")
    tensors = load_file(out / "model.safetensors")
    assert name not in tensors
    (embeddings,) = (key for key in tensors if key.endswith(("wte.weight", "embed_in.weight")))
    save_file(tensors | {name: np.ones((11, 8), np.float32)}, out / "model.safetensors")
    with pytest.raises(
        ValueError,
        match=f"expected {name} to equal {embeddings}, .* tie_word_embeddings, got other values",
    ):
        jc.hub.load(out)
    save_file(tensors | {name: tensors[embeddings]}, out / "model.safetensors")
    again, ids = jc.hub.load(out), jnp.array([[1, 2]])
    np.testing.assert_array_equal(
        *(jc.apply_chain(b, np.array(b.parents[0]), ids) for b in (bank, again))
    )


def test_masks_of_unsupported_dtypes_are_ignored(tmp_path):
    tensors = make_tensors() | {"transformer.h.0.attn.bias": np.ones((1, 1, 8, 8), bool)}
    folder = write(
        tmp_path / "model",
        tensors=tensors,
        config={"_num_labels": 1, "_attn_implementation_autoset": True},
    )
    assert jc.hub.load(folder).num_layers == 2
    with pytest.raises(
        ValueError, match="expected dtype to be None, .* float32, bfloat16, float16, got int32"
    ):
        jc.hub.load(folder, dtype=jnp.int32)
