import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jchain as jc
from jchain.search.q_learning import sample_chain, update


def test_q_update_by_hand(problem):
    # Slots 0..3, last layer 0..3 or none (4), layer tokens 0..3 and heads 4, 5.
    values = jnp.zeros((4, 5, 6)).at[1, 2].set(jnp.array([0.0, 3, 0, 0, 1, 0]))
    chain = jnp.array([2, 4, -1, -1], jnp.int32)
    new = update(values, chain, jnp.array(-2.0), jnp.array(0.5), problem)
    # The first token moves halfway to the best value of the next state, 3, and the head halfway to
    # the reward: 1 + (-2 - 1) / 2.
    expected = values.at[0, 4, 2].set(1.5).at[1, 2, 4].set(-0.5)
    np.testing.assert_allclose(new, expected)


def test_only_heads_count_after_the_last_layer(problem):
    values = jnp.zeros((4, 5, 6)).at[3, 1].set(jnp.array([9.0, 9, 9, 9, -1, -3]))
    chain = jnp.array([0, 0, 1, 4], jnp.int32)
    new = update(values, chain, jnp.array(-1.0), jnp.array(1.0), problem)
    assert new[2, 0, 1] == -1


def test_greedy_chains_follow_the_table(problem):
    values = jnp.zeros((4, 5, 6)).at[0, 4, 3].set(1.0).at[1, 3, 0].set(1.0).at[2, 0, 5].set(1.0)
    chain = sample_chain(jax.random.key(0), values, jnp.array(0.0), problem)
    np.testing.assert_array_equal(chain, [3, 0, 5, -1])
    keys = jax.random.split(jax.random.key(0), 200)
    random = jax.vmap(lambda key: sample_chain(key, values, jnp.array(1.0), problem))(keys)
    jc.chain.validate(random, 4, 2, 3)
    assert len(np.unique(random[:, 0])) == 6


@pytest.mark.slow
def test_replayed_values_approach_the_best_loss(problem):
    search = jc.QLearning(num_chains=16, num_replays=64, learning_rate=0.5, decay=1.0)
    state, step = search.init(jax.random.key(0), problem), jax.jit(search.step)
    for key in jax.random.split(jax.random.key(1), 80):
        state, _ = step(key, state, problem)
    # The value of a head alone is exact because nothing follows.
    bare = jc.evaluate(problem, [[4, -1, -1, -1], [5, -1, -1, -1]]).loss
    np.testing.assert_allclose(state.values[0, 4, 4:], -bare, rtol=1e-3)


def test_value_is_the_best_token_by_hand(problem):
    search = jc.QLearning(reward_fn=jc.agent.rewards.log_rewards)
    state = search.init(jax.random.key(0), problem)
    table = (
        jnp.full((4, 5, 6), -9.0)
        .at[0, 4, 2]
        .set(-1.0)
        .at[1, 2, 5]
        .set(-2.0)
        .at[3, 1]
        .set(-jnp.arange(6.0))
    )
    chains = jnp.array([[2, 4, -1, -1], [2, 0, 1, 5]])
    # In the last slot, only heads count, and the first one has -4.
    expected = [[-1.0, -2.0, 0.0, 0.0], [-1.0, -2.0, -9.0, -4.0]]
    np.testing.assert_array_equal(
        search.value(state._replace(values=table), problem, chains), expected
    )


def test_q_learning_flags():
    search = jc.QLearning()
    assert (search.is_deterministic, search.needs_gradient, search.needs_invertible) == (False,) * 3
