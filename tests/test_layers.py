import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from conftest import init_params

import jchain as jc


@pytest.mark.parametrize(
    "layer",
    [jc.layers.ResidualMLP(5), jc.layers.ResidualMLP(5, hidden=3), jc.layers.Dense(5, nn.tanh)],
)
@pytest.mark.parametrize("shape", [(4, 5), (4, 2, 5)])
def test_layers_keep_the_shape(layer, shape):
    x = jax.random.normal(jax.random.key(0), shape)
    out, _ = layer.init_with_output(jax.random.key(1), x)
    assert out.shape == x.shape
    assert not np.allclose(out, x)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (jc.layers.ConvBlock(3, depth=2), (2, 4, 5, 3)),
        (jc.layers.ConvBlock(2), (3, 3, 3, 2)),
        (jc.layers.TransformerBlock(6, num_heads=2), (3, 5, 6)),
        (jc.layers.TransformerBlock(8, num_heads=4, hidden=5, is_causal=True), (2, 7, 8)),
    ],
)
def test_layers_match_a_float64_loop(layer, shape):
    x = jax.random.normal(jax.random.key(0), shape)
    (params,) = init_params(layer, jax.random.key(1), 1, shape[1:])
    out = layer.apply({"params": params}, x)
    assert out.shape == x.shape
    np.testing.assert_allclose(
        out, reference.apply(layer, params, np.asarray(x, np.float64)), rtol=1e-5, atol=1e-5
    )


def test_causal_positions_see_nothing_later():
    layer = jc.layers.TransformerBlock(6, num_heads=2, is_causal=True)
    x = jax.random.normal(jax.random.key(0), (1, 5, 6))
    (params,) = init_params(layer, jax.random.key(1), 1, (5, 6))
    out, changed = (layer.apply({"params": params}, x) for x in (x, x.at[0, 3].add(1.0)))
    np.testing.assert_allclose(out[0, :3], changed[0, :3], rtol=1e-6)
    assert not np.allclose(out[0, 3:], changed[0, 3:], atol=1e-3)


def test_residual_mlp_by_hand():
    params = {
        "Dense_0": {"kernel": jnp.array([[1.0, -1.0]]), "bias": jnp.array([0.0, 1.0])},
        "Dense_1": {"kernel": jnp.array([[2.0], [10.0]]), "bias": jnp.array([0.5])},
    }
    out = jc.layers.ResidualMLP(1, hidden=2).apply({"params": params}, jnp.array([[3.0]]))
    # hidden = relu([3, -2]) = [3, 0]; 3 + (2 * 3 + 0.5)
    np.testing.assert_allclose(out, [[9.5]])


def test_head_flattens_each_example():
    out, variables = jc.layers.DenseHead(7).init_with_output(jax.random.key(0), jnp.ones((4, 2, 5)))
    assert out.shape == (4, 7)
    assert variables["params"]["Dense_0"]["kernel"].shape == (10, 7)


def test_stem_and_heads_of_images():
    x = jax.random.normal(jax.random.key(0), (4, 7, 6, 3))
    stem = jc.layers.ConvStem(5, pool=2)
    (params,) = init_params(stem, jax.random.key(1), 1, (7, 6, 3))
    plain = jc.layers.ConvStem(5).apply({"params": params}, x)
    wanted = reference._conv(params["Conv_0"], np.asarray(x, np.float64))
    np.testing.assert_allclose(plain, wanted, atol=1e-5)
    pooled = wanted[:, :6].reshape(4, 3, 2, 3, 2, 5).max(axis=(2, 4))
    np.testing.assert_allclose(stem.apply({"params": params}, x), pooled, atol=1e-5)

    head = jc.layers.ConvHead(10)
    (params,) = init_params(head, jax.random.key(2), 1, (7, 6, 3))
    assert [params[f"Dense_{i}"]["kernel"].shape for i in range(3)] == [
        (126, 120),
        (120, 84),
        (84, 10),
    ]
    hidden = np.asarray(x, np.float64).reshape(4, -1)
    for i in range(3):
        hidden = np.maximum(hidden, 0) if i else hidden
        hidden = hidden @ np.asarray(params[f"Dense_{i}"]["kernel"]) + np.asarray(
            params[f"Dense_{i}"]["bias"]
        )
    np.testing.assert_allclose(head.apply({"params": params}, x), hidden, atol=1e-5)
    (params,) = init_params(jc.layers.ConvHead(10, pool=3), jax.random.key(2), 1, (7, 6, 3))
    assert params["Dense_0"]["kernel"].shape == (2 * 2 * 3, 120)

    head = jc.layers.PoolHead(10)
    (params,) = init_params(head, jax.random.key(3), 1, (7, 6, 3))
    mean = np.maximum(np.asarray(x, np.float64), 0).mean(axis=(1, 2))
    wanted = mean @ np.asarray(params["Dense_0"]["kernel"]) + np.asarray(params["Dense_0"]["bias"])
    np.testing.assert_allclose(head.apply({"params": params}, x), wanted, atol=1e-5)
    with pytest.raises(ValueError, match="depth to be at least 1, got 0"):
        jc.layers.ConvBlock(3, depth=0).init(jax.random.key(0), x)
