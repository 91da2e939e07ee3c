"""The family of a config, and what holds for all families."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import GPT2, write_config
from fuzz.targets import CONFIGS

import jchain as jc
from jchain.hub.families import make_architecture


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "bert"}, "model_type = 'bert' is not supported, expected gpt2, llama"),
        ({"model_type": None}, "expected model_type, got none"),
        ({"n_embd": "six"}, "an option has an invalid value"),
    ],
)
def test_configs_of_no_family_are_rejected(change, message):
    with pytest.raises(ValueError, match=message):
        make_architecture(GPT2 | change, "config")


@pytest.mark.parametrize("family", CONFIGS)
def test_saved_and_exported_banks_have_the_same_outputs(family, tmp_path):
    folder = write_config(tmp_path / "model", CONFIGS[family])
    bank = jc.hub.random_bank(jax.random.key(0), folder, pinned=(0, 1))
    architecture = make_architecture(CONFIGS[family], "config")
    x = jnp.ones(architecture.example_shape, architecture.example_dtype)
    if architecture.vocab_size is not None:
        x = jax.random.randint(jax.random.key(1), (1, 7), 0, architecture.vocab_size)
    chain = np.array([0, 0, bank.num_layers])
    expected = jc.apply_chain(bank, chain, x)
    assert jnp.all(jnp.isfinite(expected))
    bank.save(tmp_path / "bank.safetensors")
    kept = jc.Bank.load(tmp_path / "bank.safetensors")
    np.testing.assert_array_equal(jc.apply_chain(kept, chain, x), expected)
    again = jc.hub.load(jc.hub.export(bank, chain, folder, tmp_path / "out"))
    found = jc.apply_chain(again, np.array(again.parents[0]), x)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_lists_that_a_family_ignores_are_adapted_in_exports(tmp_path):
    """transformers checks that `layer_types` has as many entries as the model has blocks."""
    folder = write_config(
        tmp_path / "model", CONFIGS["llama"] | {"layer_types": ["sliding_attention"] * 2}
    )
    bank = jc.hub.random_bank(jax.random.key(0), folder)
    out = jc.hub.export(bank, [0, 1, 0, 2], folder, tmp_path / "out")
    assert (out / "config.json").read_text().count("sliding_attention") == 3
