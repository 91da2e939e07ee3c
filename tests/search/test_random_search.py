import jax
import numpy as np

import jchain as jc


def test_random_search_repeated_chains_are_free(problem):
    search = jc.RandomSearch(num_chains=6)
    state = search.init(jax.random.key(0), problem)
    state, first = search.step(jax.random.key(1), state, problem)
    _, again = search.step(jax.random.key(1), state, problem)
    np.testing.assert_array_equal(first.chains, again.chains)
    np.testing.assert_array_equal(first.loss, again.loss)
    assert first.layer_calls > 0
    assert again.layer_calls == 0
