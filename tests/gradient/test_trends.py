import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jchain as jc
from jchain.gradient import trends

CHAINS = np.array([[2, 0, 3, 5], [1, 1, 4, -1], [2, 2, 0, 4], [3, 5, -1, -1], [5, -1, -1, -1]])


@pytest.fixture(scope="module")
def seen(problem):
    state = trends.init(problem)
    step = jax.jit(trends.update)
    for chain in CHAINS:
        state = step(state, problem, jnp.asarray(chain))
    return state


def test_moments_equal_those_of_numpy(problem, seen):
    rows = []
    for chain in CHAINS:
        gradients = np.asarray(jc.gradient.weight_gradients(problem, chain), np.float64)
        length = int((chain >= 0).sum()) - 1
        rows += [(gradients[t], 0, t, chain[t - 1] if t else 4, chain[t]) for t in range(length)]
    gradients, *by_context = zip(*rows, strict=True)
    for moments, contexts in zip(seen, by_context, strict=True):
        for context in range(moments.num_seen.size):
            values = np.array([g for g, c in zip(gradients, contexts, strict=True) if c == context])
            assert moments.num_seen[context] == len(values)
            if len(values):
                np.testing.assert_allclose(
                    moments.mean[context], values.mean(axis=0), rtol=1e-4, atol=1e-7
                )
            if len(values) > 1:
                np.testing.assert_allclose(
                    moments.variance[context], values.var(axis=0, ddof=1), rtol=1e-3, atol=1e-9
                )
            else:
                assert np.isnan(moments.variance[context]).all()


def test_a_trend_of_one_chain_scores_as_its_gradient(problem):
    problem = jc.Problem(problem.bank, problem.data, 3, layer_cost=jnp.array([0.1, 0.5, 0.9, 1.3]))
    state = trends.update(trends.init(problem), problem, jnp.asarray(CHAINS[0]))
    expected = jc.swap_scores(problem, CHAINS[0], "weights")
    found = trends.predict_swaps(state, problem, CHAINS[0])
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)
    for context in ("before", "layer"):
        by_layer = trends.predict_swaps(state, problem, CHAINS[0], context)
        np.testing.assert_allclose(by_layer, expected, rtol=1e-4, atol=1e-6)
    # That chain has no layer after layer 1, so scores there are unknown.
    other = trends.predict_swaps(state, problem, np.array([1, 0, 4, -1]), "before")
    assert np.isnan(other[1]).all()
    assert np.isfinite(other[0]).all()


def test_a_chain_with_a_gradient_that_is_not_finite_is_left_out(problem, seen):
    bank = problem.bank
    params = jax.tree.map(lambda leaf: leaf.at[1].set(jnp.inf), bank.layers[0].params)
    broken = jc.Bank.stack(
        bank.layers[0].module,
        [jax.tree.map(lambda leaf, i=i: leaf[i], params) for i in range(4)],
        bank.heads[0].module,
        [jax.tree.map(lambda leaf, i=i: leaf[i], bank.heads[0].params) for i in range(2)],
    )
    after = trends.update(seen, jc.Problem(broken, problem.data, 3), jnp.array([0, 1, 4, -1]))
    jax.tree.map(np.testing.assert_array_equal, after, seen)


def test_trends_reject_bad_input(problem, two_group_problem, seen):
    with pytest.raises(ValueError, match="expected layers of one module, got 2"):
        trends.init(two_group_problem)
    with pytest.raises(ValueError, match="expected layers of one module, got 2"):
        jc.gradient.weight_gradients(two_group_problem, np.array([1, 4, 2, 6]))
    with pytest.raises(ValueError, match="token 9 at slot 1 is out of range"):
        trends.predict_swaps(seen, problem, np.array([2, 9, 3, 5]))
    with pytest.raises(ValueError, match=r"expected one chain of shape \[4\], got \[5, 4\]"):
        trends.predict_swaps(seen, problem, CHAINS)
