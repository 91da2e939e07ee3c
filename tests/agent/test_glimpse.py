import jax.numpy as jnp
import numpy as np
import reference

import jchain as jc
from jchain.agent import observations


def test_a_chain_is_seen_as_its_prefixes_are(problem):
    chain = jnp.array([2, 0, 5, -1])
    found = observations.observe_chain(jc.agent.observations.observe, problem, chain)
    parent = hidden = problem.bank.embed(problem.data.x)
    for slot, token in enumerate((2, 0, None, None)):
        expected = jc.agent.observations.observe(problem, hidden, parent).features
        np.testing.assert_allclose(found[slot], expected, rtol=1e-3, atol=1e-4)
        if token is not None:
            parent, hidden = hidden, problem.bank.layers[0].apply(token, hidden)


def test_it_knows_the_loss_of_stopping(problem):
    seen = observations.observe_root(jc.agent.observations.observe_activations, problem)
    for token in (3, 1):
        seen = observations.observe_next(
            jc.agent.observations.observe_activations, problem, seen, jnp.array(token)
        )
    for head in (4, 5):
        expected = reference.chain_loss(problem, [3, 1, head, -1])[0]
        np.testing.assert_allclose(seen.loss[head - 4], expected, rtol=1e-5)
    after = observations.observe_next(
        jc.agent.observations.observe_activations, problem, seen, jnp.array(5)
    )
    np.testing.assert_array_equal(after.features, seen.features)


def test_nothing_is_seen_where_nothing_observes(problem):
    assert observations.observe_chain(None, problem, jnp.array([2, 0, 5, -1])).shape == (4, 0)
