import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jchain as jc
from jchain.agent.encoding import ActorCriticNetwork
from jchain.agent.policy import Policy, evaluate_actions
from jchain.agent.rollout import sample_chain
from jchain.chain import PADDING

NOTHING = jnp.zeros((4, 0))  # features of the prefixes of a chain, if nothing is observed


@pytest.fixture(scope="module", params=[jc.TokenEncoding(8), jc.WeightEncoding(8)])
def policy(request, problem):
    state = jc.ActorCritic(encoding=request.param).init(jax.random.key(0), problem)
    # With larger weights than initially, the policy is far from uniform.
    params = jax.tree.map(lambda leaf: 3 * leaf, state.params)
    return Policy(ActorCriticNetwork(request.param), params, state.inputs)


def test_evaluated_actions_have_the_log_probabilities_of_the_rollout(policy, problem):
    nothing = jnp.full(4, PADDING)
    for seed in range(6):
        rollout = sample_chain(jax.random.key(seed), policy, nothing, problem)
        chain, log_probs = rollout.chains, rollout.log_probs
        jc.chain.validate(chain, 4, 2, 3)
        logits, values = evaluate_actions(policy, chain, NOTHING, problem)
        length = int(jc.chain.count_layers(chain, 4))
        expected = jax.nn.log_softmax(logits)[jnp.arange(length + 1), chain[: length + 1]]
        np.testing.assert_allclose(log_probs[: length + 1], expected, rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(log_probs[length + 1 :], 0)
        assert np.ptp(values[: length + 1]) > 0 or length == 0


def test_layers_are_never_taken_in_the_last_slot(policy, problem):
    logits, _ = evaluate_actions(policy, jnp.array([0, 1, 2, 4]), NOTHING, problem)
    assert np.all(jax.nn.softmax(logits[3])[:4] == 0)
    assert np.all(jax.nn.softmax(logits[2]) > 0)
