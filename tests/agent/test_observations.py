import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference

import jchain as jc
from jchain.agent import observations
from jchain.agent.observations import NUM_FEATURES, compress_loss, observe
from jchain.engine import layer_calls
from jchain.engine.layer_calls import apply_all


@pytest.mark.parametrize("fn", [observe, observations.observe_gradients])
@pytest.mark.parametrize("limit", [110, 250])  # 3 and 6 of 9 examples at a time, for one head
def test_large_outputs_are_observed_in_parts(problem, monkeypatch, fn, limit):
    hidden, parent = (jax.random.normal(jax.random.key(k), (9, 5)) for k in (0, 1))
    expected = fn(problem, hidden, parent)
    monkeypatch.setattr(layer_calls, "_OUTPUT_LIMIT", limit // 3)
    jaxpr = str(jax.make_jaxpr(lambda h: fn(problem, h, parent))(hidden))
    assert "scan" in jaxpr
    out = fn(problem, hidden, parent)
    np.testing.assert_allclose(out.loss, expected.loss, rtol=1e-6)
    np.testing.assert_allclose(out.features, expected.features, rtol=1e-4, atol=1e-5)


def test_features_match_plain_formulas_in_float64(problem):
    hidden, parent = (
        np.asarray(jax.random.normal(jax.random.key(k), (9, 5)), np.float64) for k in (0, 1)
    )
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

    means = np.array(
        [rows[y == c].mean(axis=0) if (y == c).any() else np.zeros(5) for c in range(3)]
    )
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


@pytest.mark.parametrize("num_heads", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_jitted_features_equal_those_of_single_prefixes(num_heads):
    """XLA on CPU once got the gradient's size wrong for jitted, vmapped banks of one head."""
    data = jc.data.load("wine", seed=0)
    modules = {"layer": jc.layers.ResidualMLP(13), "head": jc.layers.DenseHead(3)}
    bank = jc.train.random(
        jax.random.key(0), data.train, num_layers=12, num_heads=num_heads, num_steps=0, **modules
    )
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
def test_wide_activations_and_labels_that_are_not_classes(shape):
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
    assert (jnp.diff(compress_loss(loss)) > 0).all()
    np.testing.assert_allclose(
        compress_loss(loss[4:])[1] - compress_loss(loss[4:])[0], np.log(100), rtol=1e-4
    )


def test_sketches_in_plain_numpy(problem):
    """Class means over the root mean square are added up by place and sign, then log-scaled."""
    hidden = jax.random.normal(jax.random.key(0), (9, 5))
    heads = problem.bank.heads[0].params["Dense_0"]
    y = np.asarray(problem.data.y)
    logits = np.einsum("bf,kfc->kbc", hidden, heads["kernel"]) + np.asarray(heads["bias"])[:, None]
    prob = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
    loss = -np.log(prob[:, np.arange(9), y]).mean(axis=1)
    k = loss.argmin()
    gradient = (prob[k] - np.eye(3)[y]) @ np.asarray(heads["kernel"])[k].T
    place_key, sign_key = jax.random.split(jax.random.key(0))
    place = np.asarray(jax.random.randint(place_key, (15,), 0, 64))
    sign = np.asarray(jax.random.rademacher(sign_key, (15,)))
    observes = jc.agent.observations.observe_activations, jc.agent.observations.observe_gradients
    joined = jc.agent.observations.Join(observes)(problem, hidden, hidden)
    for i, (observe_one, rows) in enumerate(
        zip(observes, (np.asarray(hidden), gradient), strict=True)
    ):
        scale = np.sqrt(np.mean(rows**2))
        means = (
            np.array(
                [rows[y == c].mean(axis=0) if (y == c).any() else np.zeros(5) for c in range(3)]
            )
            / scale
        )
        expected = np.zeros(65)
        np.add.at(expected, place, means.reshape(-1) * sign)
        expected[64] = np.log(scale)
        out = observe_one(problem, hidden, hidden)
        np.testing.assert_allclose(out.features, expected, rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(out.loss, loss, rtol=1e-5)
        np.testing.assert_allclose(joined.features[65 * i : 65 * (i + 1)], out.features, rtol=1e-5)


def test_sketches_of_examples_without_a_class(problem):
    targets = jax.random.normal(jax.random.key(3), (9, 3))
    regression = jc.Problem(
        problem.bank, jc.Batch(problem.data.x, targets), 3, loss_fn=optax.squared_error
    )
    hidden = jax.random.normal(jax.random.key(0), (9, 5))
    out = jc.agent.observations.observe_activations(regression, hidden, hidden)
    assert out.features.shape == (65,)
    assert np.count_nonzero(out.features) > 30
    # If an example changes, the sketch changes.
    other = jc.agent.observations.observe_activations(regression, hidden.at[3].set(0.0), hidden)
    assert np.abs(out.features - other.features).max() > 0.01
    broken = jc.agent.observations.observe_gradients(problem, jnp.full((9, 5), jnp.inf), hidden)
    assert np.all(np.isfinite(broken.features))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_features_of_half_precision_are_those_of_float32(problem, dtype):
    """Squares neither vanish nor overflow, and losses are float32."""
    half, whole = (
        jc.Problem(
            jax.tree.map(lambda leaf, to=to: leaf.astype(dtype).astype(to), problem.bank),
            problem.data,
            3,
        )
        for to in (dtype, jnp.float32)
    )
    hidden, parent = (
        300 * jax.random.normal(jax.random.key(k), (9, 5)).astype(dtype) for k in (0, 1)
    )
    observed = observe(half, hidden, parent)
    expected = observe(whole, hidden.astype(jnp.float32), parent.astype(jnp.float32))
    np.testing.assert_allclose(observed.features, expected.features, rtol=0.02, atol=0.1)


def test_a_chain_is_observed_prefix_by_prefix(problem):
    chain = jnp.array([2, 0, 5, -1])
    found = observations.observe_chain(jc.agent.observations.observe, problem, chain)
    parent = hidden = problem.bank.embed(problem.data.x)
    for slot, token in enumerate((2, 0, None, None)):
        expected = jc.agent.observations.observe(problem, hidden, parent).features
        np.testing.assert_allclose(found[slot], expected, rtol=1e-3, atol=1e-4)
        if token is not None:
            parent, hidden = hidden, problem.bank.layers[0].apply(token, hidden)


def test_losses_of_stopping(problem):
    observed = observations.observe_root(jc.agent.observations.observe_activations, problem)
    for token in (3, 1):
        observed = observations.observe_next(
            jc.agent.observations.observe_activations, problem, observed, jnp.array(token)
        )
    for head in (4, 5):
        expected = reference.chain_loss(problem, [3, 1, head, -1])[0]
        np.testing.assert_allclose(observed.loss[head - 4], expected, rtol=1e-5)
    after = observations.observe_next(
        jc.agent.observations.observe_activations, problem, observed, jnp.array(5)
    )
    np.testing.assert_array_equal(after.features, observed.features)


def test_nothing_is_observed_without_a_function(problem):
    assert observations.observe_chain(None, problem, jnp.array([2, 0, 5, -1])).shape == (4, 0)
