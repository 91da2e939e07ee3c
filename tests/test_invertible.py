import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import init_params
from hypothesis import given, settings
from hypothesis import strategies as st

import jchain as jc

LAYERS = [
    lambda n: jc.layers.InvertibleDense(n),
    lambda n: jc.layers.InvertibleDense(n, use_bias=False, negative_slope=0.2),
    lambda n: jc.layers.AdditiveCoupling(n),
    lambda n: jc.layers.AdditiveCoupling(n, hidden=3, activation=nn.gelu),
    lambda n: jc.layers.InvertibleResidual(n),
    lambda n: jc.layers.InvertibleResidual(n, hidden=2 * n, bound=0.5, activation=nn.tanh),
]


def make_params(layer, seed, shape, dtype=jnp.float32):
    params = layer.init(jax.random.key(seed), jnp.ones((1, *shape)))["params"]
    return jax.tree.map(lambda leaf: leaf.astype(dtype), params)


@pytest.mark.parametrize("make", LAYERS)
@pytest.mark.parametrize("is_x64", [False, pytest.param(True, marks=pytest.mark.slow)])
@settings(max_examples=5, deadline=None)
@given(size=st.sampled_from((2, 5, 16)), seed=st.integers(0, 1000), is_sequence=st.booleans())
def test_invertible_layers_round_trip(make, is_x64, size, seed, is_sequence):
    layer = make(size)
    with jax.enable_x64(is_x64):
        dtype, bound = (jnp.float64, 1e-10) if is_x64 else (jnp.float32, 1e-5)
        params = make_params(layer, seed, (size,), dtype)
        x = jax.random.normal(
            jax.random.key(seed + 1), (4, 3, size) if is_sequence else (4, size), dtype
        )
        y = layer.apply({"params": params}, x)
        module, inverse = layer.invert(params)
        np.testing.assert_allclose(module.apply({"params": inverse}, y), x, atol=bound)
        # The inverse of the inverse is the layer.
        module, again = module.invert(inverse)
        assert module == layer
        np.testing.assert_allclose(module.apply({"params": again}, x), y, atol=bound)


def test_a_fixed_point_is_as_near_for_each_example_alone():
    layer = jc.layers.InvertibleResidual(6)
    params = make_params(layer, 0, (6,))
    x = (
        jax.random.normal(jax.random.key(1), (5, 6))
        * jnp.array([1e-6, 1e-3, 1.0, 1e4, jnp.nan])[:, None]
    )
    module, inverse = layer.invert(params)
    back = module.apply({"params": inverse}, layer.apply({"params": params}, x))
    np.testing.assert_allclose(back[:4], x[:4], rtol=1e-4, atol=0)
    assert np.isnan(back[4]).all()


def test_invertible_dense_by_hand():
    params = {"kernel": jnp.array([[2.0, 0.0], [0.0, 4.0]]), "bias": jnp.array([1.0, -1.0])}
    layer = jc.layers.InvertibleDense(2, negative_slope=0.5)
    # [3, -1] W + b = [7, -5]
    np.testing.assert_allclose(
        layer.apply({"params": params}, jnp.array([[3.0, -1.0]])), [[7.0, -2.5]]
    )


def test_additive_coupling_matches_a_float64_loop():
    layer = jc.layers.AdditiveCoupling(5, hidden=4)
    (params,) = init_params(layer, jax.random.key(0), 1, (5,))
    x = np.asarray(jax.random.normal(jax.random.key(1), (3, 5)), np.float64)

    def mlp(name, x):
        inner, outer = (
            jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params[f"{name}_{i}"])
            for i in (0, 1)
        )
        return np.maximum(x @ inner["kernel"] + inner["bias"], 0) @ outer["kernel"] + outer["bias"]

    first = x[:, :2] + mlp("f", x[:, 2:])
    second = x[:, 2:] + mlp("g", first)
    made = layer.apply({"params": params}, jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(made, np.concatenate([first, second], axis=1), rtol=1e-5, atol=1e-5)


def test_orthogonal_initialization_is_well_conditioned():
    params = make_params(jc.layers.InvertibleDense(12), 0, (12,))
    assert np.linalg.cond(params["kernel"]) == pytest.approx(1.0, abs=1e-4)


def test_projection_keeps_invertible_weights_and_repairs_others():
    dense = jc.layers.InvertibleDense(6, max_condition=5.0)
    params = make_params(dense, 0, (6,))
    np.testing.assert_allclose(dense.project(params)["kernel"], params["kernel"], atol=1e-6)
    left, _, right = np.linalg.svd(params["kernel"])
    singular = {
        **params,
        "kernel": jnp.asarray((left * np.array([4.0, 3.0, 2.0, 1.0, 0.1, 0.0])) @ right),
    }
    values = np.linalg.svd(dense.project(singular)["kernel"], compute_uv=False)
    np.testing.assert_allclose(values, [4, 3, 2, 1, 0.8, 0.8], rtol=1e-4)
    residual = jc.layers.InvertibleResidual(6, bound=0.8)
    wide = jax.tree.map(lambda leaf: 3.0 * leaf, make_params(residual, 0, (6,)))
    norms = [
        np.linalg.norm(residual.project(wide)[name]["kernel"], 2) for name in ("Dense_0", "Dense_1")
    ]
    assert np.prod(norms) == pytest.approx(0.8, rel=1e-4)


def test_layers_without_an_inverse_are_refused():
    dense = jc.layers.InvertibleDense(3)
    params = {"kernel": jnp.ones((3, 3)), "bias": jnp.zeros(3)}
    with pytest.raises(
        ValueError, match="singular layer has no inverse: expected a condition number below"
    ):
        dense.invert(params)
    residual = jc.layers.InvertibleResidual(3)
    wide = jax.tree.map(lambda leaf: 3.0 * leaf, make_params(residual, 0, (3,)))
    with pytest.raises(
        ValueError, match="no inverse: expected spectral norms .* below 1, got 8.1 and 1"
    ):
        residual.invert(wide)
    with pytest.raises(ValueError, match="product below 1, got 0.9 and 1.13"):
        jc.layers.InvertibleResidual(3, activation=nn.gelu).invert(make_params(residual, 0, (3,)))
    x = jnp.ones((1, 3))
    for layer, expected in (
        (jc.layers.InvertibleDense(3, negative_slope=0.0), "a positive negative_slope"),
        (jc.layers.InvertibleResidual(3, bound=1.0), "a bound between 0 and 1"),
        (jc.layers.InvertibleDense(3, max_condition=0.5), "a max_condition of at least 1"),
        (jc.layers.AdditiveCoupling(1), "at least 2 features"),
    ):
        with pytest.raises(ValueError, match=expected):
            layer.init(jax.random.key(0), x)


@pytest.mark.parametrize(
    "layer", [jc.layers.InvertibleDense(13, max_condition=3.0), jc.layers.InvertibleResidual(13)]
)
def test_training_keeps_layers_invertible(layer):
    data = jc.data.load("wine", seed=0)
    make = lambda num_steps: jc.train.routed(  # noqa: E731
        jax.random.key(0),
        data.train,
        layer=layer,
        head=jc.layers.DenseHead(3),
        num_layers=3,
        depth=2,
        num_steps=num_steps,
        optimizer=optax.adam(0.05),
    )
    start, end = make(0), make(60)
    assert not np.allclose(
        jax.tree.leaves(start.layers)[0], jax.tree.leaves(end.layers)[0], atol=0.1
    )
    jc.inverse.invert_layers(end)
    if isinstance(layer, jc.layers.InvertibleDense):
        assert np.linalg.cond(end.layers[0].params["kernel"]).max() < 3.001


def test_invertible_banks_are_saved_and_loaded(tmp_path):
    layer = jc.layers.InvertibleDense(5, negative_slope=0.25)
    head = jc.layers.DenseHead(3)
    params = (
        init_params(layer, jax.random.key(0), 2, (5,)),
        init_params(head, jax.random.key(1), 1, (5,)),
    )
    bank = jc.Bank.stack(layer, params[0], head, params[1])
    bank.save(tmp_path / "bank")
    assert jc.Bank.load(tmp_path / "bank").layers[0].module == layer
