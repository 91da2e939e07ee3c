import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jchain as jc


@pytest.mark.parametrize(
    "layer", [jc.layers.ResidualMLP(5), jc.layers.ResidualMLP(5, hidden=3), jc.layers.Dense(5, nn.tanh)]
)
@pytest.mark.parametrize("shape", [(4, 5), (4, 2, 5)])
def test_layers_keep_the_shape(layer, shape):
    x = jax.random.normal(jax.random.key(0), shape)
    out, _ = layer.init_with_output(jax.random.key(1), x)
    assert out.shape == x.shape
    assert not np.allclose(out, x)


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
