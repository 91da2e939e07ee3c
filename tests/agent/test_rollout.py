import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jchain as jc
from jchain.agent.encoding import ActorCriticNetwork
from jchain.agent.policy import Policy
from jchain.agent.rollout import sample_chain, sample_prefix
from jchain.chain import PADDING


def test_sample_prefix_draws_prefixes_of_the_elite(problem):
    elite = jnp.array([[2, 0, 5, -1], [1, 4, -1, -1], [-1, -1, -1, -1]])
    keys = jax.random.split(jax.random.key(0), 2000)

    @jax.jit
    def draw(chains, num_chains, rate):
        return jax.vmap(lambda key: sample_prefix(key, chains, num_chains, rate, problem.space))(
            keys
        )

    def share(rate):
        drawn = draw(elite, jnp.array(2), jnp.array(rate))
        rows, count = np.unique(drawn, axis=0, return_counts=True)
        return {
            tuple(row[row >= 0].tolist()): n / len(keys) for row, n in zip(rows, count, strict=True)
        }

    # Each chain has 1/2. Then each prefix of the first chain has 1/3, and of the second 1/2.
    expected = {(2, 0): 1 / 6, (2,): 1 / 6, (1,): 1 / 4, (): 5 / 12}
    found = share(1.0)
    assert found.keys() == expected.keys()
    assert all(found[prefix] == pytest.approx(expected[prefix], abs=0.04) for prefix in expected)
    assert share(0.0) == {(): 1.0}
    assert np.all(draw(jnp.full((3, 4), PADDING), jnp.array(0), jnp.array(1.0)) == PADDING)


@pytest.mark.parametrize("encoding", [jc.TokenEncoding(8), jc.WeightEncoding(8)])
def test_sample_chain_continues_from_a_prefix(encoding, problem):
    state = jc.ActorCritic(encoding=encoding).init(jax.random.key(0), problem)
    # With larger weights than initially, the policy is far from uniform.
    params = jax.tree.map(lambda leaf: 3 * leaf, state.params)
    policy = Policy(ActorCriticNetwork(encoding), params, state.inputs)
    prefix, keys = jnp.array([3, 1, -1, -1]), jax.random.split(jax.random.key(0), 32)
    chains = jax.vmap(lambda k: sample_chain(k, policy, prefix, problem))(keys).chains
    jc.chain.validate(chains, 4, 2, 3)
    np.testing.assert_array_equal(chains[:, :2], np.tile([3, 1], (32, 1)))
    assert len(np.unique(chains, axis=0)) > 1
