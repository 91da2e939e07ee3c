"""Norms and activations, compared with NumPy in float64 and, for names, with transformers."""

import jax.numpy as jnp
import numpy as np
import pytest

from jchain.hub.modules import ACTIVATIONS, RMSNorm


@pytest.mark.parametrize("offset", [None, 0.0, 1.0])
def test_norms_add_their_offset_to_the_weights(offset):
    rng = np.random.default_rng(0)
    x, weight = rng.normal(size=(2, 5)), rng.normal(size=5)
    expected = x / np.sqrt((x**2).mean(-1, keepdims=True) + 0.1) * (weight + (offset or 0.0))
    norm, params = RMSNorm(0.1, offset), {"params": {"weight": jnp.asarray(weight)}}
    np.testing.assert_allclose(norm.apply(params, jnp.asarray(x)), expected, rtol=1e-5)


def test_weights_multiply_in_float32_if_they_have_an_offset():
    """With an offset the result is rounded once; without one, before and after the product."""
    x, weight = jnp.asarray([[1.0, 3.0, 7.0]], jnp.bfloat16), jnp.full(3, 1.0078125, jnp.bfloat16)
    wide = np.asarray(x, np.float32) / np.sqrt(np.mean(np.asarray(x, np.float32) ** 2))
    once = jnp.asarray(1.0078125 * wide).astype(jnp.bfloat16)
    twice = weight[None] * jnp.asarray(wide).astype(jnp.bfloat16)
    assert not np.array_equal(once, twice)
    for offset, expected in ((0.0, once), (None, twice)):
        params = {"params": {"weight": weight}}
        assert np.array_equal(RMSNorm(0.0, offset).apply(params, x), expected)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_have_the_names_of_transformers(name):
    torch, activations = (
        pytest.importorskip("torch"),
        pytest.importorskip("transformers.activations"),
    )
    x = np.linspace(-9, 9, 101, dtype=np.float32)
    expected = activations.ACT2FN[name](torch.tensor(x)).numpy()
    np.testing.assert_allclose(ACTIVATIONS[name](jnp.asarray(x)), expected, rtol=1e-5, atol=2e-6)
