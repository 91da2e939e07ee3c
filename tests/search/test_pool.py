import jax.numpy as jnp
import numpy as np

from jchain.search.pool import empty_pool, merge


def test_a_pool_keeps_the_best_distinct_finite_chains(problem):
    a, b, c = ([token, 4, -1, -1] for token in range(3))
    empty = empty_pool(3, problem)
    assert np.isinf(empty.loss).all()
    assert (np.asarray(empty.chains) == -1).all()
    first = merge(empty, jnp.array([a, a, b, c]), jnp.array([2.0, 2.0, 1.0, jnp.nan]))
    assert first.chains.tolist() == [b, a, [-1] * 4]
    assert first.loss.tolist() == [1, 2, np.inf]
    second = merge(first, jnp.array([c, b]), jnp.array([0.5, 1.0]))
    assert second.chains.tolist() == [c, b, a]
