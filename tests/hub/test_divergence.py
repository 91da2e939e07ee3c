"""Losses of the next token with weights and with a parent, against float64 NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jchain as jc
from jchain.engine import head_calls
from jchain.hub import parents
from jchain.losses import PartSizes, find_token_loss
from tests import checkpoints

VOCABULARY, LENGTH = 19, 5
CHAIN = [0, 1, 2]


@pytest.fixture(scope="module")
def bank(tmp_path_factory):
    folder = checkpoints.write_config(
        tmp_path_factory.mktemp("model"), checkpoints.GPT2 | {"vocab_size": VOCABULARY}
    )
    found = jc.hub.random_bank(jax.random.key(0), folder)
    return jax.tree.map(lambda leaf: 20 * leaf, found)


@pytest.fixture
def read_in_parts(monkeypatch):
    jax.clear_caches()
    with monkeypatch.context() as patch:
        patch.setattr(head_calls, "_MIN_OUTPUTS", 2)
        patch.setattr(head_calls, "_CPU_SIZES", PartSizes(4, 7))
        yield patch
    jax.clear_caches()


def make_text(num=6, seed=1):
    tokens = np.random.default_rng(seed).integers(VOCABULARY, size=(num, LENGTH + 1))
    labels = np.where(tokens[:, 1:] % 4 == 0, -1, tokens[:, 1:])
    labels[0] = -1
    return jc.Batch(jnp.asarray(tokens[:, :-1]), jnp.asarray(labels))


def log_softmax(logits):
    logits = np.asarray(logits, np.float64)
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def average(values, labels, weights=None):
    """Average over the counted tokens of each sequence, and then over sequences."""
    weights = (labels >= 0) * (np.ones_like(values) if weights is None else weights)
    sums = weights.sum(axis=1)
    return np.mean((values * weights).sum(axis=1) / np.where(sums > 0, sums, 1))


def compute_divergence(bank, x, chain, top_k=None):
    """Compute the divergence of each token in float64."""
    p, q = (log_softmax(jc.apply_chain(bank, np.array(c), x)) for c in (CHAIN, chain))
    if top_k is not None:
        order = np.argsort(-p, axis=-1)

        def reduce(log_probs):
            probs = np.take_along_axis(np.exp(log_probs), order, axis=-1)
            rest = probs[..., top_k:].sum(axis=-1, keepdims=True)
            return np.log(np.concatenate([probs[..., :top_k], rest], axis=-1))

        p, q = reduce(p), reduce(q)
    return (np.exp(p) * (p - q)).sum(axis=-1)


@pytest.mark.parametrize("top_k", [None, 3, VOCABULARY - 1])
def test_the_divergence_from_the_parent(bank, read_in_parts, top_k):
    text = make_text()
    data = jc.hub.add_parent(bank, text, top_k=top_k)
    problem = jc.Problem(bank, data, 2, loss_fn=jc.hub.kl_to_parent)
    chains, out = jc.evaluate_all(problem)
    labels, tolerance = np.asarray(text.y), 2e-3 if top_k is None else 1e-5
    for row, loss in zip(chains, out.loss, strict=True):
        expected = average(compute_divergence(bank, text.x, row, top_k), labels)
        np.testing.assert_allclose(loss, expected, rtol=tolerance, atol=2e-5)
        plain = problem.loss_and_accuracy(jnp.asarray(jc.predict(problem, row)))[0]
        np.testing.assert_allclose(loss, plain, rtol=1e-4, atol=1e-6)
    assert abs(float(jc.evaluate(problem, np.array(CHAIN)).loss)) < 2e-5


@pytest.mark.slow
def test_a_search_minimizes_the_divergence_on_every_split(bank, read_in_parts):
    splits = [make_text(seed=seed) for seed in range(4)]
    data = jc.hub.add_parent(bank, jc.Dataset(*splits, "text", VOCABULARY))
    loss = jc.hub.mixed_loss([(jc.hub.kl_to_parent, 1.0), (jc.hub.next_token_loss, 0.0)])
    problem = jc.Problem(bank, data.search, 2, loss_fn=loss, accuracy_fn=jc.hub.next_token_accuracy)
    result = jc.run(jax.random.key(0), jc.LocalSearch(), problem, budget=30)
    assert list(result.best_chain) == CHAIN
    assert list(jc.pick_best(problem, result.finalists, data.select)) == CHAIN
    parts = jc.Problem(bank, data.search, 2, loss_fn=loss, batch_size=4)
    chains = problem.space.enumerate()
    np.testing.assert_allclose(
        jc.evaluate(parts, chains).loss, jc.evaluate(problem, chains).loss, rtol=1e-4, atol=1e-5
    )
    tuned = jc.updates.tune.tune_chain(
        jax.random.key(0), problem, np.array([1, 2, -1]), num_steps=3
    )
    before, after = (
        float(jc.evaluate(problem.with_bank(own), np.array([1, 2, -1])).loss)
        for own in (bank, tuned)
    )
    assert after < before


@pytest.mark.slow
def test_gradients_of_the_divergence_are_those_of_float32_softmax(bank, read_in_parts):
    text = make_text()
    for top_k in (None, 3):
        data = jc.hub.add_parent(bank, text, top_k=top_k)
        problem = jc.Problem(bank, data, 2, loss_fn=jc.hub.kl_to_parent)
        hidden = bank.embed(text.x)

        def compute(hidden, problem=problem):
            return head_calls.compute_head_loss(problem, 2, hidden)

        found = jax.grad(compute)(hidden)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(head_calls, "_MIN_OUTPUTS", 1000)
            expected = jax.grad(compute)(hidden)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


def test_the_likeliest_tokens_are_kept_if_all_take_too_much(bank, monkeypatch):
    text = make_text()
    assert isinstance(jc.hub.add_parent(bank, text).y.parent, parents.AllProbabilities)
    monkeypatch.setattr(parents, "_MOST_BYTES", 10)
    monkeypatch.setattr(parents, "_PART_BYTES", 4 * VOCABULARY * LENGTH * 2)
    found = jc.hub.add_parent(bank, text)
    assert isinstance(found.y.parent, parents.TopProbabilities)
    assert found.y.parent.indices.shape == (6, LENGTH, VOCABULARY)
    np.testing.assert_allclose(found.y.parent.rest, 0, atol=1e-7)


def test_weights_of_tokens(bank, read_in_parts):
    text = make_text()
    rng = np.random.default_rng(0)
    weights = rng.random(text.y.shape).astype(np.float32) * (rng.random(text.y.shape) < 0.6)
    labels = np.asarray(text.y)
    data = jc.Batch(text.x, jc.hub.TokenLabels(text.y, jnp.asarray(weights)))
    problem = jc.Problem(
        bank,
        data,
        2,
        loss_fn=jc.hub.next_token_loss,
        accuracy_fn=jc.hub.next_token_accuracy,
    )
    assert problem.read_tokens.total < (labels >= 0).sum()
    out = jc.evaluate(problem, np.array(CHAIN))
    logits = np.asarray(jc.apply_chain(bank, np.array(CHAIN), text.x))
    own = np.take_along_axis(log_softmax(logits), np.maximum(labels, 0)[..., None], -1)[..., 0]
    np.testing.assert_allclose(out.loss, average(-own, labels, weights), rtol=1e-5)
    hits = logits.argmax(axis=-1) == labels
    np.testing.assert_allclose(out.accuracy, average(hits, labels, weights), rtol=1e-5)
    plain = problem.loss_and_accuracy(jnp.asarray(logits))
    np.testing.assert_allclose((out.loss, out.accuracy), plain, rtol=1e-5)


def test_a_mixed_loss_is_the_weighted_sum_and_reads_in_parts_if_all_of_it_can(bank):
    rng = np.random.default_rng(0)
    outputs = jnp.asarray(rng.normal(size=(4, LENGTH, VOCABULARY)), jnp.float32)
    y = jnp.asarray(rng.integers(-1, VOCABULARY, size=(4, LENGTH)))
    plain = optax.softmax_cross_entropy_with_integer_labels
    mixed = jc.hub.mixed_loss([(jc.hub.next_token_loss, 0.5), (plain, 2.0)])
    expected = 0.5 * jc.hub.next_token_loss(outputs, y) + 2 * plain(outputs, y).mean(axis=1)
    np.testing.assert_allclose(mixed(outputs, y), expected, rtol=1e-6)
    assert find_token_loss(mixed) is not None
    assert find_token_loss(jc.hub.mixed_loss([(lambda outputs, y: outputs, 1.0)])) is None
    assert mixed == jc.hub.mixed_loss([(jc.hub.next_token_loss, 0.5), (plain, 2.0)])
    with pytest.raises(ValueError, match="expected at least one loss with its weight, got none"):
        jc.hub.mixed_loss([])


def test_a_choice_without_tokens_is_left_out():
    outputs = jnp.asarray(np.random.default_rng(0).normal(size=(3, 3, 4, 7)), jnp.float32)
    y = jnp.ones((3, 3, 4), int).at[:, 2].set(-1)
    found = jc.hub.choice_loss(outputs, y)
    np.testing.assert_allclose(found, jc.hub.choice_loss(outputs[:, :2], y[:, :2]), rtol=1e-6)
    found = jc.hub.choice_accuracy(outputs, y)
    np.testing.assert_array_equal(found, jc.hub.choice_accuracy(outputs[:, :2], y[:, :2]))


def test_what_is_missing_for_the_divergence_is_named(bank):
    text = make_text()
    with pytest.raises(
        ValueError, match=r"expected labels with the output of .* jc.hub.add_parent"
    ):
        jc.Problem(bank, text, 2, loss_fn=jc.hub.kl_to_parent)
    with pytest.raises(ValueError, match=r"expected top_k to be at most 19, got 20"):
        jc.hub.add_parent(bank, text, top_k=20)
    with pytest.raises(ValueError, match="expected parent, one of the 0 chains in bank.parents"):
        jc.hub.add_parent(bank.without_names(), text)
