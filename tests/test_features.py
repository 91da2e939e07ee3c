import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jchain as jc
from jchain.engine import apply_all
from jchain.features import NUM_FEATURES, log_loss, observe


def test_features_match_plain_formulas_in_float64(problem):
    hidden, parent = (np.asarray(jax.random.normal(jax.random.key(k), (9, 5)), np.float64) for k in (0, 1))
    out = observe(problem, jnp.asarray(hidden, jnp.float32), jnp.asarray(parent, jnp.float32))
    heads = problem.bank.heads[0].params["Dense_0"]
    kernels, biases = np.asarray(heads["kernel"], np.float64), np.asarray(heads["bias"], np.float64)
    y = np.asarray(problem.data.y)
    logits = np.einsum("bf,kfc->kbc", hidden, kernels) + biases[:, None]
    prob = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
    each = -np.log(prob[:, np.arange(9), y])
    np.testing.assert_allclose(out.loss, each.mean(axis=1), rtol=1e-5)

    k = each.mean(axis=1).argmin()
    one_hot = np.eye(3)[y]
    residual = prob[k] - one_hot
    rows = hidden - hidden.mean(axis=0)
    scale = np.sqrt(np.mean(rows**2))
    rows /= scale
    covariance = rows.T @ rows / 9

    def unexplained(targets):
        targets = targets - targets.mean(axis=0)
        weights = np.linalg.solve(covariance + 0.1 * np.eye(5), rows.T @ targets / 9)
        return np.sum((targets - rows @ weights) ** 2) / np.sum(targets**2)

    means = np.array([rows[y == c].mean(axis=0) if (y == c).any() else np.zeros(5) for c in range(3)])
    expected = [
        np.arcsinh(each[k].mean() / 2e-3),
        np.arcsinh(np.sqrt(np.mean(each[k] ** 2)) / 2e-3),
        np.arcsinh(np.mean(np.sqrt(each[k])) ** 2 / 2e-3),
        np.mean(logits[k].argmax(axis=1) == y),
        np.log(np.sqrt(np.mean(residual**2))),
        np.log(scale * np.sqrt(np.mean((residual @ kernels[k].T) ** 2))),
        np.log(unexplained(one_hot)),
        np.log(unexplained(residual)),
        np.log(scale),
        np.log(np.trace(covariance) ** 2 / np.sum(covariance**2)),
        np.log(1 - np.sum(means[y] ** 2) / np.sum(rows**2)),
        np.log(np.sqrt(np.mean((hidden - parent) ** 2) / np.mean(parent**2))),
    ]
    assert out.features.shape == (NUM_FEATURES,) == (len(expected),)
    np.testing.assert_allclose(out.features, expected, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("num_heads", [1, 2])
def test_jitted_features_are_those_of_each_prefix_alone(num_heads):
    """XLA on CPU got the gradient's size wrong for banks of one head, jitted and vmapped."""
    data = jc.data.load("wine", seed=0)
    modules = {"layer": jc.layers.ResidualMLP(13), "head": jc.layers.DenseHead(3)}
    bank = jc.train.random(jax.random.key(0), data.train, num_layers=12, num_heads=num_heads, num_steps=0, **modules)
    problem, x = jc.Problem(bank, data.search, max_layers=2), data.search.x
    children = apply_all(problem.bank.layers, x)
    alone = jnp.stack([observe(problem, child, x).features for child in children])
    found = jax.jit(jax.vmap(observe, (None, 0, None)))(problem, children, x).features
    np.testing.assert_allclose(found, alone, rtol=2e-3, atol=2e-3)


def test_features_of_broken_activations_are_finite(problem):
    for value in (jnp.nan, jnp.inf, 0.0):
        hidden = jnp.full((9, 5), value)
        assert np.isfinite(observe(problem, hidden, hidden).features).all()


@pytest.mark.parametrize("shape", [(200, 70), (9, 4, 5)])
def test_wide_activations_and_labels_that_are_no_classes(shape):
    layer, head = jc.layers.Dense(shape[-1]), jc.layers.Dense(shape[-1])
    x = jax.random.normal(jax.random.key(0), shape)
    params = layer.init(jax.random.key(1), x)["params"]
    bank = jc.Bank.stack(layer, [params], head, [params])
    problem = jc.Problem(bank, jc.Batch(x, jnp.sin(x)), max_layers=1, loss_fn=optax.squared_error)
    features = observe(problem, x, x).features
    assert np.isfinite(features).all()
    assert not np.array_equal(features, observe(problem, 2 * x, x).features)


def test_the_scale_of_losses_is_monotone_and_a_log_above_its_unit():
    loss = jnp.array([-1.0, 0.0, 1e-3, 0.1, 1.0, 100.0])
    assert (jnp.diff(log_loss(loss)) > 0).all()
    np.testing.assert_allclose(log_loss(loss[4:])[1] - log_loss(loss[4:])[0], np.log(100), rtol=1e-4)
