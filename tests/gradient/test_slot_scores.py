import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import HEAD
from edit_references import (
    CHAIN,
    to_float64,
    use_float64,
    walk,
)

import jchain as jc

x64 = pytest.fixture(use_float64)


def test_activation_scores_equal_the_directional_derivative(problem, x64):
    problem = to_float64(problem)
    scores = jc.swap_scores(problem, CHAIN, "activations")
    hidden, apply_rest = walk(problem, CHAIN)
    for slot in range(3):
        for token in range(4):
            step = problem.bank.layers[0].apply(token, hidden[slot]) - hidden[slot + 1]
            ahead, back = (
                problem.loss_and_accuracy(
                    apply_rest(slot + 1, hidden[slot + 1] + sign * 1e-6 * step)
                )[0]
                for sign in (1, -1)
            )
            np.testing.assert_allclose(
                scores[slot, token], (ahead - back) / 2e-6, rtol=1e-4, atol=1e-8
            )


def test_a_layer_with_outputs_that_are_not_finite_has_no_scores(problem):
    params = jax.tree.map(lambda leaf: leaf.at[1].set(jnp.inf), problem.bank.layers[0].params)
    bank = problem.bank
    broken = jc.Bank.stack(
        bank.layers[0].module,
        [jax.tree.map(lambda leaf, i=i: leaf[i], params) for i in range(4)],
        HEAD,
        [jax.tree.map(lambda leaf, i=i: leaf[i], bank.heads[0].params) for i in range(2)],
    )
    broken_problem = jc.Problem(broken, problem.data, 3)
    scores = jc.gradient.score_edits(broken_problem, CHAIN)
    expected = jc.gradient.score_edits(problem, CHAIN)
    assert np.isnan(scores.swap[:3, 1]).all()
    np.testing.assert_allclose(
        np.delete(scores.swap, 1, 1), np.delete(expected.swap, 1, 1), rtol=1e-5
    )
    lost = jc.gradient.score_edits(broken_problem, np.array([1, 0, 3, 5]))
    assert np.isnan(np.delete(lost.swap[0], 1)).all()
    assert not np.isfinite(lost.loss)
