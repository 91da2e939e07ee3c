import jax
import jax.numpy as jnp
import numpy as np
import pytest
from edit_references import (
    CHAIN,
    to_float64,
    use_float64,
    walk,
)

import jchain as jc

x64 = pytest.fixture(use_float64)


@pytest.mark.parametrize("kind", ["weights", "nearest"])
def test_weight_scores_equal_the_directional_derivative(kind, two_group_problem, x64):
    """Scores are nan for layers of another module."""
    problem = to_float64(two_group_problem)
    chain = np.array([1, 4, 2, 6])
    scores = jc.gradient.score_edits(problem, chain, kind, learning_rate=0.5)
    for slot in range(3):
        for token in range(5):
            expected = push_weights(problem, chain, slot, token, 0.5 if kind == "nearest" else None)
            np.testing.assert_allclose(scores.swap[slot, token], expected, rtol=1e-4, atol=1e-8)
    assert np.isnan(scores.insert).all()
    assert np.isnan(scores.delete).all()


def push_weights(problem, chain, slot, token, learning_rate):
    """Compute a weight score by central differences, from a slot's weights to a layer's.

    It is nan for layers of another module.
    """
    group, other = (
        next(g for g in problem.bank.layers if t in g.tokens) for t in (chain[slot], token)
    )
    if group is not other:
        return np.nan
    own, new = (
        jax.tree.map(lambda leaf, i=i: leaf[i], group.params)
        for i in map(group.tokens.index, (int(chain[slot]), token))
    )
    hidden, apply_rest = walk(problem, chain)

    def loss(size):
        params = jax.tree.map(lambda a, b: a + size * (b - a), own, new)
        return problem.loss_and_accuracy(
            apply_rest(slot + 1, group.module.apply({"params": params}, hidden[slot]))
        )[0]

    square = sum(
        jnp.sum((a - b) ** 2) for a, b in zip(*map(jax.tree.leaves, (own, new)), strict=True)
    )
    return (loss(1e-6) - loss(-1e-6)) / 2e-6 + (
        0.0 if learning_rate is None else square / (2 * learning_rate)
    )


def test_weight_gradients_equal_those_of_the_loss(problem):
    chain = CHAIN
    found = jc.gradient.weight_gradients(problem, chain)
    group, x = problem.bank.layers[0], problem.data.x

    def loss(params):
        hidden = x
        for own in params:
            hidden = group.module.apply({"params": own}, hidden)
        return problem.loss_and_accuracy(problem.bank.heads[0].apply(1, hidden))[0]

    owns = [jax.tree.map(lambda leaf, t=t: leaf[t], group.params) for t in chain[:3]]
    for slot, gradient in enumerate(jax.grad(loss)(owns)):
        expected = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(gradient)])
        np.testing.assert_allclose(found[slot], expected, rtol=1e-4, atol=1e-7)
    assert np.isnan(found[3]).all()
