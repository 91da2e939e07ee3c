"""Losses of one chain against plain Python, from their equations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jchain.agent import losses

CHAIN = np.array([2, 0, 5, -1])  # two layers and a head, of 4 layers and 2 heads
REWARD, LAMBDA, CLIP = 0.7, 0.95, 0.2
MOVED = np.array([0.5, 0.0, -0.5])  # log of the ratio of the new to the old policy


@pytest.fixture(scope="module")
def logits():
    return 2.0 * jax.random.normal(jax.random.key(0), (4, 6))


@pytest.fixture(scope="module")
def values():
    return jax.random.normal(jax.random.key(1), (4,))


@pytest.fixture(scope="module")
def log_pi(logits):
    """Log-probabilities before each of the three tokens, `[3, 6]`."""
    logits = np.asarray(logits, np.float64)
    return (logits - np.log(np.exp(logits).sum(axis=1, keepdims=True)))[:3]


@pytest.fixture(scope="module")
def chosen(log_pi):
    return log_pi[np.arange(3), CHAIN[:3]]


@pytest.fixture(scope="module")
def old_log_probs(chosen):
    return jnp.append(jnp.array(chosen - MOVED, jnp.float32), 0.0)


@pytest.fixture(scope="module")
def episode():
    return losses.make_episode(
        jnp.asarray(CHAIN), jnp.array(2), jnp.array(REWARD), jnp.dtype("float32")
    )


def test_the_reward_comes_with_the_head(episode):
    np.testing.assert_array_equal(episode.a_t, CHAIN)
    np.testing.assert_allclose(episode.r_t, [0, 0, REWARD, 0])
    np.testing.assert_array_equal(episode.discount_t, [1, 1, 0, 0])
    np.testing.assert_array_equal(episode.w_t, [1, 1, 1, 0])


def test_ppo_by_hand(logits, values, old_log_probs, episode):
    actor, critic = losses.ppo_loss(logits, values, old_log_probs, episode, LAMBDA, CLIP)
    # lambda returns backward: G_t = r_t + (1 - lambda) v_{t+1} + lambda G_{t+1}
    returns, v, ratio = np.zeros(3), np.asarray(values, np.float64)[:3], np.exp(MOVED)
    returns[2] = REWARD
    for t in (1, 0):
        returns[t] = (1 - LAMBDA) * v[t + 1] + LAMBDA * returns[t + 1]
    advantage = returns - v
    surrogate = np.minimum(ratio * advantage, np.clip(ratio, 0.8, 1.2) * advantage)
    # Means are over the L = 4 slots.
    np.testing.assert_allclose(actor, -surrogate.sum() / 4, rtol=1e-4)
    np.testing.assert_allclose(critic, 0.5 * np.sum(advantage**2) / 4, rtol=1e-4)


def test_vtrace_by_hand(logits, values, old_log_probs, episode, chosen):
    actor, critic = losses.vtrace_loss(logits, values, old_log_probs, episode, LAMBDA)
    v, clipped = np.asarray(values, np.float64)[:3], np.minimum(np.exp(MOVED), 1.0)
    following, rewards = np.append(v[1:], 0.0), np.array([0.0, 0.0, REWARD])
    # arXiv:1802.01561 (1): v_s - V(x_s) =
    #   rho_s (r_s + V(x_{s+1}) - V(x_s)) + lambda c_s (v_{s+1} - V(x_{s+1}))
    error = np.zeros(4)
    for t in (2, 1, 0):
        error[t] = clipped[t] * (rewards[t] + following[t] - v[t])
        error[t] += LAMBDA * clipped[t] * error[t + 1]
    # rho_s (r_s + v_{s+1} - V(x_s)), with the error of the next step mixed in by lambda.
    advantage = clipped * (rewards + following + LAMBDA * error[1:] - v)
    np.testing.assert_allclose(actor, -np.sum(advantage * chosen) / 4, rtol=1e-4)
    np.testing.assert_allclose(critic, 0.5 * np.sum(error**2) / 4, rtol=1e-4)


def test_entropy_by_hand(logits, log_pi, episode):
    expected = np.sum(np.exp(log_pi) * log_pi) / 4
    np.testing.assert_allclose(losses.entropy_loss(logits, episode.w_t), expected, rtol=1e-4)


def test_imitation_is_the_mean_negative_log_likelihood(logits, chosen):
    chain = jnp.asarray(CHAIN)
    loss = losses.imitation_loss(logits, chain, chain >= 0)
    np.testing.assert_allclose(loss, -chosen.sum() / 4, rtol=1e-4)
    nothing = jnp.full(4, -1)
    assert losses.imitation_loss(logits, nothing, nothing >= 0) == 0


def test_slots_after_the_head_change_no_loss(logits, values, old_log_probs, episode):
    other, later = logits.at[3].add(jnp.arange(6.0)), values.at[3].add(5.0)
    for loss_fn in (
        lambda logits, values: losses.ppo_loss(
            logits, values, old_log_probs, episode, LAMBDA, CLIP
        ),
        lambda logits, values: losses.vtrace_loss(logits, values, old_log_probs, episode, LAMBDA),
        lambda logits, values: (losses.entropy_loss(logits, episode.w_t),),
    ):
        np.testing.assert_allclose(loss_fn(other, later), loss_fn(logits, values), rtol=1e-6)


def test_no_gradient_flows_through_targets(logits, values, old_log_probs, episode):
    """The gradient of the values is -error / L for the critic, and 0 for the actor."""
    for loss_fn in (
        lambda v: losses.ppo_loss(logits, v, old_log_probs, episode, LAMBDA, CLIP),
        lambda v: losses.vtrace_loss(logits, v, old_log_probs, episode, LAMBDA),
    ):
        jacobian = jax.jacobian(loss_fn)(values)
        np.testing.assert_array_equal(jacobian.actor, 0)
        # critic = mean(error^2) / 2 with error = target - v, so the gradient is -error / 4.
        np.testing.assert_allclose(
            2 * np.sum(np.square(jacobian.critic)), loss_fn(values).critic, rtol=1e-4
        )
