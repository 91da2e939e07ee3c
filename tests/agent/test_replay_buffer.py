import jax
import jax.numpy as jnp
import numpy as np

from jchain.agent.replay_buffer import empty_replay_buffer
from jchain.agent.rollout import Rollout


def test_replay_buffer_evicts_the_oldest_chains(problem):
    def make(losses):
        chains = jnp.array([[4, -1, -1, -1], [5, -1, -1, -1]], jnp.int32)
        log_probs = jnp.zeros((2, 4)).at[:, 0].set(-losses)
        return Rollout(chains, log_probs, jnp.zeros((2, 4, 1)) + losses[:, None, None], losses)

    buffer = empty_replay_buffer(3, problem, jnp.zeros(1)).add(make(jnp.array([1.0, 2.0])))
    drawn = buffer.sample(jax.random.key(0), 50)
    assert set(np.asarray(drawn.loss).tolist()) == {1.0, 2.0}
    np.testing.assert_array_equal(drawn.chains[:, 0], np.where(drawn.loss == 1.0, 4, 5))
    np.testing.assert_array_equal(drawn.log_probs[:, 0], -drawn.loss)
    np.testing.assert_array_equal(drawn.features[:, 2, 0], drawn.loss)
    buffer = buffer.add(make(jnp.array([3.0, 4.0])))
    drawn = buffer.sample(jax.random.key(0), 50)
    assert set(np.asarray(drawn.loss).tolist()) == {2.0, 3.0, 4.0}
