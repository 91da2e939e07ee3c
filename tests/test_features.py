import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jchain as jc
from jchain.engine import apply_all
from jchain.features import NUM_FEATURES, log_loss, observe


def test_features_match_plain_formulas_in_float64(problem):
    hidden, sibling, parent = (np.asarray(jax.random.normal(jax.random.key(k), (9, 5)), np.float64) for k in range(3))
    out = observe(problem, jnp.asarray([hidden, sibling], jnp.float32), jnp.asarray(parent, jnp.float32))
    heads = problem.bank.heads[0].params["Dense_0"]
    kernels, biases = np.asarray(heads["kernel"], np.float64), np.asarray(heads["bias"], np.float64)
    y = np.asarray(problem.data.y)

    def apply_heads(activations):
        return np.einsum("bf,kfc->kbc", activations, kernels) + biases[:, None]

    def measure(logits):
        prob = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
        return prob, -np.log(prob[:, np.arange(9), y])

    logits = apply_heads(hidden)
    prob, each = measure(logits)
    np.testing.assert_allclose(out.loss[0], each.mean(axis=1), rtol=1e-5)
    # If the layer of this prefix, or of its sibling, came next and changed the logits as it did behind their parent.
    imagined = [logits + apply_heads(child) - apply_heads(parent) for child in (hidden, sibling)]

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
        np.arcsinh(min(measure(logits)[1].mean(axis=1).min() for logits in imagined) / 2e-3),
    ]
    assert out.features.shape == (2, NUM_FEATURES) == (2, len(expected))
    np.testing.assert_allclose(out.features[0], expected, rtol=2e-3, atol=2e-3)


def test_looking_ahead_is_exact_where_layers_add_to_the_outputs():
    """Layers that only shift activations, heads that are linear: what is imagined is what comes."""
    shifts = 0.3 * jax.random.normal(jax.random.key(0), (3, 5))
    layer, head = nn.Dense(5), jc.layers.DenseHead(4)
    x, y = jax.random.normal(jax.random.key(1), (9, 5)), jnp.arange(9) % 4
    heads = [head.init(jax.random.key(k), x)["params"] for k in (2, 3)]
    bank = jc.Bank.stack(layer, [{"kernel": jnp.eye(5), "bias": shift} for shift in shifts], head, heads)
    problem = jc.Problem(bank, jc.Batch(x, y), max_layers=2)
    ahead = observe(problem, x[None] + shifts[:, None], x).features[:, -1]
    chains = jnp.array([[[a, b, 3 + k] for b in range(3) for k in range(2)] for a in range(3)])
    loss = jnp.stack([jc.evaluate(problem, rows).loss.min() for rows in chains])
    np.testing.assert_allclose(ahead, log_loss(loss), rtol=1e-5)


@pytest.mark.parametrize("num_heads", [1, 2])
def test_jitted_features_are_those_of_each_child_alone(num_heads):
    """XLA on CPU got the gradient's size wrong for banks of one head, jitted and vmapped."""
    data = jc.data.load("wine", seed=0)
    modules = {"layer": jc.layers.ResidualMLP(13), "head": jc.layers.DenseHead(3)}
    bank = jc.train.random(jax.random.key(0), data.train, num_layers=12, num_heads=num_heads, num_steps=0, **modules)
    problem, x = jc.Problem(bank, data.search, max_layers=2), data.search.x
    children = apply_all(problem.bank.layers, x)
    alone = jnp.concatenate([observe(problem, child[None], x).features for child in children])
    found = jax.jit(observe)(problem, children, x).features
    # All but the last one, for which siblings count.
    np.testing.assert_allclose(found[:, :-1], alone[:, :-1], rtol=2e-3, atol=2e-3)


def test_features_of_broken_activations_are_finite(problem):
    for value in (jnp.nan, jnp.inf, 0.0):
        hidden = jnp.full((9, 5), value)
        assert np.isfinite(observe(problem, hidden[None], hidden).features).all()


@pytest.mark.parametrize("shape", [(200, 70), (9, 4, 5)])
def test_wide_activations_and_labels_that_are_no_classes(shape):
    layer, head = jc.layers.Dense(shape[-1]), jc.layers.Dense(shape[-1])
    x = jax.random.normal(jax.random.key(0), shape)
    params = layer.init(jax.random.key(1), x)["params"]
    bank = jc.Bank.stack(layer, [params], head, [params])
    problem = jc.Problem(bank, jc.Batch(x, jnp.sin(x)), max_layers=1, loss_fn=optax.squared_error)
    features = observe(problem, x[None], x).features
    assert np.isfinite(features).all()
    assert not np.array_equal(features, observe(problem, 2 * x[None], x).features)


def test_the_scale_of_losses_is_monotone_and_a_log_above_its_unit():
    loss = jnp.array([-1.0, 0.0, 1e-3, 0.1, 1.0, 100.0])
    assert (jnp.diff(log_loss(loss)) > 0).all()
    np.testing.assert_allclose(log_loss(loss[4:])[1] - log_loss(loss[4:])[0], np.log(100), rtol=1e-4)
