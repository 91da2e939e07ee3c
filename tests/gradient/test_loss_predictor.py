import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from edit_references import (
    TokensHead,
    find_moved_outputs,
    wide_problem,
)

import jchain as jc
from jchain.engine import layer_calls
from jchain.engine.layer_calls import count_examples_per_call


@pytest.mark.parametrize(
    "num_products", [pytest.param(1, marks=pytest.mark.slow), 2, 5, 98, 99, None]
)
def test_the_likeliest_classes_have_products_of_their_own(num_products):
    """The other classes share one product: the mean of their changes by softmax weights."""
    label = jax.random.randint(jax.random.key(3), (40,), 0, 100)
    problem = wide_problem(optax.softmax_cross_entropy_with_integer_labels, label)
    num_single = (num_products or 17) - 1 if num_products != 99 else 99
    chain = np.array([2, 0, 3, 4])
    scores = jc.gradient.score_edits(problem, chain, num_products=num_products)
    for slot, token in ((0, 1), (1, 3), (2, 0)):
        outputs, moved = map(np.asarray, find_moved_outputs(problem, chain, slot, token))
        change = []
        for z, dz, y in zip(outputs.astype(float), moved.astype(float), label, strict=True):
            rest = [c for c in np.argsort(-z) if c != y][num_single:]
            if rest:
                weight = np.exp(z[rest] - z[rest].max())
                dz[rest] = dz[rest] @ weight / weight.sum()
            find_loss = lambda z, y=y: np.log(np.exp(z).sum()) - z[y]  # noqa: E731
            change.append(find_loss(z + dz) - find_loss(z))
        assert scores.swap[slot, token] == pytest.approx(np.mean(change), rel=1e-3, abs=1e-6)
    assert scores.layer_calls == (2 + (num_products or 17)) * 3 + 4 * 3


def make_sampled(is_softmax):
    """Make a problem whose outputs are sampled, so that none has its own product."""
    key = jax.random.key(3)
    if is_softmax:
        labels = jax.random.randint(key, (400, 4), 0, 25)
        return wide_problem(optax.softmax_cross_entropy_with_integer_labels, labels, TokensHead())
    return wide_problem(optax.squared_error, jax.random.normal(key, (400, 100)))


@pytest.fixture(params=[pytest.param(400, marks=pytest.mark.slow), 150], ids=["whole", "in parts"])
def part_size(request, monkeypatch):
    """Set the maximum number of examples per head call. 150 gives parts of 133, and 1 left over."""
    jax.clear_caches()
    parts = -(-400 // request.param)
    monkeypatch.setattr(layer_calls, "_OUTPUT_LIMIT", -(-400 * 400 // parts))
    yield request.param
    jax.clear_caches()


@pytest.mark.slow
@pytest.mark.parametrize("is_softmax", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_other_wide_outputs_are_sampled(is_softmax, part_size):
    """With more samples, scores approach the second-order loss (exact for squared errors)."""
    problem, chain = make_sampled(is_softmax), np.array([2, 0, 3, 4])
    assert count_examples_per_call(problem, problem.data.x, 1) == (400 if part_size == 400 else 133)

    def expand(slot, token):
        outputs, moved = find_moved_outputs(problem, chain, slot, token)
        loss = lambda size: problem.loss_and_accuracy(outputs + size * moved)[0]  # noqa: E731
        return jax.grad(loss)(0.0) + 0.5 * jax.grad(jax.grad(loss))(0.0)

    expected = np.array([[expand(slot, token) for token in range(4)] for slot in range(3)])
    errors = [
        np.abs(jc.gradient.score_edits(problem, chain, num_products=n).swap[:3] - expected).mean()
        for n in (5, 129)
    ]
    assert errors[1] < 0.1 * np.abs(expected).mean()
    assert errors[1] < 0.7 * errors[0]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["activations", "weights"])
def test_gradients_of_wide_outputs_do_not_depend_on_parts(kind, monkeypatch):
    problem, chain = make_sampled(True), np.array([2, 0, 3, 4])
    found = []
    for limit in (400 * 400, 400 * 150):
        jax.clear_caches()
        monkeypatch.setattr(layer_calls, "_OUTPUT_LIMIT", limit)
        found.append(jc.gradient.score_edits(problem, chain, kind=kind))
    jax.clear_caches()
    for whole, parts in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_allclose(parts, whole, rtol=1e-4, atol=1e-7)


def test_score_edits_rejects_float16_gradients(problem):
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.float16), (problem.bank, problem.data.x))
    posed = jc.Problem(half[0], jc.Batch(half[1], problem.data.y), problem.max_layers)
    with pytest.raises(
        ValueError, match="expected activations of bfloat16 or wider for gradients, got float16"
    ):
        jc.gradient.score_edits(posed, np.array([0, 1, 4, -1]))
