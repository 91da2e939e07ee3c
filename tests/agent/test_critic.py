from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jchain as jc
from jchain.agent.critic import NUM_INPUTS, Network, check, make_inputs
from jchain.agent.observations import NUM_FEATURES
from jchain.files import write_arrays

SAVED = Path(__file__).parent.parent / "saved" / "critic.safetensors"


def make_critic(num_inputs=NUM_INPUTS, width=4):
    params = Network(width).init(jax.random.key(0), jnp.zeros(num_inputs))["params"]
    return jc.Critic(params, jnp.arange(1.0, num_inputs + 1), jnp.full(num_inputs, 2.0), width)


def test_a_saved_critic_predicts_the_same(tmp_path):
    critic = make_critic()
    critic.save(tmp_path / "critic.safetensors")
    loaded = jc.Critic.load(tmp_path / "critic.safetensors")
    inputs = jax.random.normal(jax.random.key(1), (3, NUM_INPUTS))
    np.testing.assert_array_equal(critic.gain(inputs), loaded.gain(inputs))
    assert jax.tree.structure(critic) == jax.tree.structure(loaded)


def test_a_critic_saved_by_an_earlier_version_predicts_the_same():
    """The file and these predictions were written by version 0.1, before its modules moved."""
    critic = jc.Critic.load(SAVED)
    inputs = jnp.stack(
        [
            jnp.zeros(NUM_INPUTS),
            jnp.linspace(-2.0, 3.0, NUM_INPUTS),
            jnp.cos(jnp.arange(1.0 * NUM_INPUTS)),
        ]
    )
    expected = [1.7866694927215576, 0.511553168296814, 1.633853793144226]
    assert critic.width == 3
    np.testing.assert_allclose(critic.gain(inputs), expected, rtol=1e-5)


def test_inputs_are_scaled_and_clipped():
    critic = make_critic()
    inputs = critic.mean + 2.0 * jnp.linspace(-9, 9, NUM_INPUTS)
    expected = Network(4).apply(
        {"params": critic.params}, jnp.clip(jnp.linspace(-9, 9, NUM_INPUTS), -5, 5)
    )
    np.testing.assert_allclose(critic.gain(inputs), expected, rtol=1e-5)


def test_inputs_are_features_changes_and_remaining_layers():
    features, change = jnp.full((2, NUM_FEATURES), 3.0), jnp.full((2, NUM_FEATURES), 0.5)
    inputs = make_inputs(features, change, jnp.ones(NUM_FEATURES), jnp.array([1, 3]), 4)
    assert inputs.shape == (2, NUM_INPUTS)
    np.testing.assert_allclose(
        inputs[:, -2:], [[0.25, np.log(3)], [0.75, 0.0]], rtol=1e-6, atol=1e-6
    )
    np.testing.assert_allclose(
        inputs[0, :-2], [3.0] * NUM_FEATURES + [0.5] * NUM_FEATURES + [2.0] * NUM_FEATURES
    )


def test_critic_rejects_bad_files_and_arguments(tmp_path, bank):
    path = tmp_path / "critic.safetensors"
    with pytest.raises(FileNotFoundError):
        jc.Critic.load(path)
    bank.save(path)
    with pytest.raises(ValueError, match="expected a critic of prefixes"):
        jc.Critic.load(path)
    make_critic(NUM_INPUTS + 3).save(path)
    with pytest.raises(
        ValueError, match=f"expected a critic of {NUM_INPUTS} inputs.*got one of {NUM_INPUTS + 3}"
    ):
        jc.Critic.load(path)
    write_arrays(
        path,
        {"kind": "critic of prefixes", "num_inputs": NUM_INPUTS, "width": 4},
        {"000": jnp.zeros(2)},
    )
    with pytest.raises(ValueError, match="got other shapes"):
        jc.Critic.load(path)
    make_critic().save(path)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match="damaged"):
        jc.Critic.load(path)
    with pytest.raises(ValueError, match="expected a critic of"):
        jc.CriticSearch(make_critic(NUM_INPUTS - 1))
    with pytest.raises(ValueError, match="expected a critic of"):
        check("best")
