import jax.numpy as jnp
import numpy as np

from jchain.agent import rewards


def test_rank_rewards_by_hand():
    loss = jnp.array([2.0, 1.0, jnp.inf, 2.0, 9.0])
    np.testing.assert_allclose(rewards.rank_rewards(loss), [0.25, 1.0, -1.0, 0.25, -0.5])


def test_rewards_of_a_fixed_scale_by_hand():
    loss = jnp.array([2.0, 0.5, jnp.inf])
    np.testing.assert_allclose(rewards.plain_rewards(loss), [-2.0, -0.5, -2.0])
    # The reward is the log of loss / 0.001 if the loss is far above 0.001.
    np.testing.assert_allclose(
        rewards.log_rewards(loss), -np.log([2000.0, 500.0, 2000.0]), rtol=1e-4
    )
    nothing = jnp.full(2, jnp.inf)
    for reward_fn in (rewards.plain_rewards, rewards.log_rewards):
        np.testing.assert_array_equal(reward_fn(nothing), [0.0, 0.0])
