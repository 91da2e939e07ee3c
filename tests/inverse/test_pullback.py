import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import init_params

import jchain as jc
from jchain.inverse import pullback as inverse

FEATURES = 6
LAYERS = (
    jc.layers.InvertibleDense(FEATURES),
    jc.layers.AdditiveCoupling(FEATURES),
    jc.layers.InvertibleResidual(FEATURES, bound=0.6),
)


def make_bank(layers=LAYERS, num_classes=3, head=None):
    """Make a bank of two layers of each module."""
    head = head or jc.layers.DenseHead(num_classes)
    banks = []
    for i, layer in enumerate(layers):
        keys = jax.random.split(jax.random.key(i), 3)
        params = [layer.init(key, jnp.ones((1, FEATURES)))["params"] for key in keys[:2]]
        banks.append(jc.Bank.stack(layer, params, head, init_params(head, keys[2], 1, (FEATURES,))))
    return jc.Bank.concat(banks)


@pytest.fixture(scope="module")
def bank():
    return make_bank()


def run(bank, suffix, hidden):
    for token in suffix:
        groups = bank.layers if token < bank.num_layers else bank.heads
        (group,) = [group for group in groups if token in group.tokens]
        hidden = group.apply(group.tokens.index(token), hidden)
    return hidden


@pytest.mark.parametrize(
    "suffix", [[], [0], [2, 4, 0], [5, 5, 1, 3, -1, -1], [0, 6], [1, 4, 3, 8], [7]]
)
def test_pull_back_reproduces_the_outputs(bank, suffix):
    tokens = [token for token in suffix if token >= 0]
    x = jax.random.normal(jax.random.key(3), (5, FEATURES))
    outputs = run(bank, tokens, x)
    found = jc.pull_back(bank, np.array(suffix, int), outputs)
    np.testing.assert_allclose(run(bank, tokens, found.activations), outputs, atol=2e-5)
    assert found.activations.shape == x.shape
    assert float(found.residual.max()) < 1e-5
    has_head = bool(tokens) and tokens[-1] >= bank.num_layers
    if has_head:
        assert found.null_space.shape == (FEATURES, FEATURES - 3)
    else:
        np.testing.assert_allclose(found.activations, x, atol=1e-5)
        assert found.null_space.size == 0


def test_the_head_gets_the_least_norm_and_its_null_space_is_free(bank):
    outputs = jax.random.normal(jax.random.key(1), (4, 3))
    found = jc.pull_back(bank, [6], outputs)
    head = bank.heads[0].params["Dense_0"]
    wanted = np.linalg.lstsq(
        np.asarray(head["kernel"][0]).T, np.asarray(outputs - head["bias"][:1]).T, rcond=None
    )[0].T
    np.testing.assert_allclose(found.activations, wanted, atol=1e-5)
    np.testing.assert_allclose(found.null_space.T @ found.null_space, np.eye(3), atol=1e-5)
    moved = found.activations + jax.random.normal(jax.random.key(2), (4, 3)) @ found.null_space.T
    np.testing.assert_allclose(run(bank, [6], moved), outputs, atol=1e-5)
    # If `near` already gives the outputs, it is its own nearest preimage.
    again = jc.pull_back(bank, [6], outputs, near=moved)
    np.testing.assert_allclose(again.activations, moved, atol=1e-5)


def test_pull_back_unreachable_outputs_have_a_residual():
    wide = make_bank(LAYERS[:1], num_classes=9)
    outputs = jax.random.normal(jax.random.key(1), (4, 9))
    found = jc.pull_back(wide, [0, 2], outputs)
    made = run(wide, [0, 2], found.activations)
    wanted = np.linalg.norm(made - outputs, axis=1) / np.linalg.norm(outputs, axis=1)
    np.testing.assert_allclose(found.residual, wanted, rtol=1e-4)
    assert wanted.min() > 0.1
    # In least squares, the head's transpose maps the residual to 0.
    kernel = np.asarray(wide.heads[0].params["Dense_0"]["kernel"][0])
    np.testing.assert_allclose((made - outputs) @ kernel.T, 0.0, atol=1e-4)


def test_pull_back_residual_shows_missed_fixed_points(monkeypatch):
    from jchain import invertible

    bank = make_bank(LAYERS[2:])
    outputs = jax.random.normal(jax.random.key(1), (4, FEATURES))
    monkeypatch.setattr(invertible, "_MAX_ITERATIONS", 2)
    with jax.disable_jit():
        found = jc.pull_back(bank, [0], outputs)
    made = run(bank, [0], found.activations)
    wanted = np.linalg.norm(made - outputs, axis=1) / np.linalg.norm(outputs, axis=1)
    np.testing.assert_allclose(found.residual, wanted, rtol=1e-4)
    assert wanted.max() > 1e-3


def test_labels_become_logits():
    labels = jnp.array([0, 2, 1])
    logits = inverse.target_logits(labels, 3, confidence=0.9)
    np.testing.assert_allclose(logits.mean(axis=1), 0.0, atol=1e-6)
    np.testing.assert_allclose(jax.nn.softmax(logits)[jnp.arange(3), labels], 0.9, rtol=1e-5)
    x = jnp.zeros((3, 3))
    chosen = inverse.target_outputs(x, labels, optax.softmax_cross_entropy_with_integer_labels)
    np.testing.assert_allclose(jax.nn.softmax(chosen)[jnp.arange(3), labels], 0.99, rtol=1e-5)
    np.testing.assert_array_equal(inverse.target_outputs(x, x + 1, optax.squared_error), x + 1)
    with pytest.raises(ValueError, match=r"targets of the shape of the outputs, \[3, 3\]"):
        inverse.target_outputs(x, labels, optax.squared_error)


def test_condition_numbers_by_hand():
    layer, head = jc.layers.InvertibleDense(2, negative_slope=0.5), jc.layers.DenseHead(2)
    scale = [
        {"kernel": jnp.diag(jnp.array(d)), "bias": jnp.zeros(2)}
        for d in ([2.0, 1.0], [1.0, 3.0], [1.0, 0.0])
    ]
    bank = jc.Bank.stack(layer, scale, head, init_params(head, jax.random.key(0), 1, (2,)))
    x = jnp.array([[1.0, 1.0], [1.0, -1.0]])
    np.testing.assert_allclose(inverse.condition_numbers(bank, [0], x), [2.0, 4.0], rtol=1e-6)
    # diag(2, 3), or diag(2, 3 / 4) with two leaky slopes on the second
    np.testing.assert_allclose(
        inverse.condition_numbers(bank, [0, 1, 3], x), [1.5, 2 / 0.75], rtol=1e-6
    )
    assert inverse.condition_numbers(bank, [2], x).tolist() == [np.inf, np.inf]
    assert inverse.condition_numbers(bank, [0], x).dtype == np.float64


def test_pull_back_rejects_bad_input(bank):
    outputs = jnp.ones((4, 3))
    plain = jc.Bank.stack(
        jc.layers.ResidualMLP(FEATURES),
        init_params(jc.layers.ResidualMLP(FEATURES), jax.random.key(0), 2, (FEATURES,)),
        jc.layers.DenseHead(3),
        init_params(jc.layers.DenseHead(3), jax.random.key(1), 1, (FEATURES,)),
    )

    class Curved(nn.Module):
        @nn.compact
        def __call__(self, x):
            return jnp.tanh(nn.Dense(3)(x))

    for tested, suffix, given, expected in (
        (
            plain,
            [0, 2],
            outputs,
            "layer layer0: ResidualMLP has no inverse: expected a module with invert",
        ),
        (bank, [6, 0], outputs, "a head .token 6 or more. only at the end"),
        (bank, [9], outputs, r"tokens in 0\.\.8, got \[9\]"),
        (bank, [[0]], outputs, r"integer tokens of shape \[L\]"),
        (bank, [0.5], outputs, "integer tokens"),
        (bank, [0], outputs, "outputs of the layers' shape"),
        (bank, [6], jnp.ones((4, 2)), r"expected outputs \[B, 3\]"),
        (make_bank(head=Curved()), [6], outputs, "an affine head"),
        (jax.tree.map(jnp.zeros_like, bank), [0], jnp.ones((4, FEATURES)), "singular layer"),
    ):
        with pytest.raises(ValueError, match=expected):
            jc.pull_back(tested, suffix, given)
    with pytest.raises(ValueError, match=r"near of the shape of the head's input, got \[4, 5\]"):
        jc.pull_back(bank, [6], outputs, near=jnp.ones((4, 5)))
    with pytest.raises(ValueError, match="confidence between 1/3 and 1, got 1.5"):
        inverse.target_logits(jnp.array([0]), 3, 1.5)
