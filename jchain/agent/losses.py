"""Losses of an actor-critic on one chain, as pure functions of arrays to `vmap` over chains.

A chain is an episode: slot `t` holds the token (action) `a_t` that is taken after `t` layers, the
head ends the episode, and the slots after it are padding. Every loss is a mean over the `L` slots,
weighted by `w_t`, which is 1 up to the head and 0 after it, so all terms of one chain have the same
scale. The losses are built from rlax, in which `v_tm1` and `v_t` are the values before and after a
token.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jchain._typing import Array, Bool, Float, Int


class Episode(NamedTuple):
    """One chain as the steps of an episode; `[P, L]` if vmapped."""

    a_t: Int[Array, "*P L"]  # tokens; -1 after the head
    r_t: Float[Array, "*P L"]  # rewards: the chain's reward at its head, 0 elsewhere
    discount_t: Float[Array, "*P L"]  # 1 before the head, 0 at and after the head
    w_t: Float[Array, "*P L"]  # 1 up to the head, 0 after it


class Losses(NamedTuple):
    """The two losses of an actor-critic on one chain; `[P]` if vmapped."""

    actor: Float[Array, "*P"]
    critic: Float[Array, "*P"]


def make_episode(
    chain: Int[Array, "L"], length: Int[Array, ""], reward: Float[Array, ""], dtype: jnp.dtype
) -> Episode:
    """Make an episode from one chain.

    Args:
      chain: the layer tokens, one head token, and padding of -1, `[L]`.
      length: the number of layers, which is also the slot of the head.
      reward: the reward of the whole chain.
      dtype: the dtype of discounts and weights.
    """
    slots = jnp.arange(chain.shape[0])
    return Episode(
        a_t=chain,
        r_t=jnp.where(slots == length, reward, 0.0),
        discount_t=(slots < length).astype(dtype),
        w_t=(slots <= length).astype(dtype),
    )


def action_log_probs(logits: Float[Array, "L E"], a_t: Int[Array, "L"]) -> Float[Array, "L"]:
    """Compute `log pi(a_t)` of each token; entries after the head are undefined.

    Args:
      logits: the logits before each token, `[L, N + K]`.
      a_t: the tokens, `[L]`; -1 after the head.
    """
    log_pi = jax.nn.log_softmax(logits)
    return jnp.take_along_axis(log_pi, jnp.maximum(a_t, 0)[:, None], axis=-1)[:, 0]


def ppo_loss(
    logits: Float[Array, "L E"],
    values: Float[Array, "L"],
    old_log_probs: Float[Array, "L"],
    episode: Episode,
    lambda_: ArrayLike,
    clip: ArrayLike,
) -> Losses:
    """Compute PPO's clipped surrogate loss with lambda returns.

    This is equation 7 of Schulman et al. 2017, arXiv:1707.06347. Let `ratio_t = pi(a_t) /
    pi_old(a_t)`. The lambda return `G_t` is computed from the last step backward:

        G_t   = r_t + discount_t * ((1 - lambda) * v_{t+1} + lambda * G_{t+1})
        adv_t = G_t - v_t
        actor  = -mean_t w_t * min(ratio_t * adv_t, clip(ratio_t, 1 - clip, 1 + clip) * adv_t)
        critic = mean_t w_t * 1/2 * adv_t^2

    No gradient flows through `G_t` or, in the loss of the actor, through `adv_t`.

    Args:
      logits: the logits of the current policy before each token, `[L, N + K]`.
      values: the values of the current critic before each token, `v_t`, `[L]`.
      old_log_probs: `log pi_old(a_t)` under the policy that sampled the chain, `[L]`.
      episode: the tokens, rewards, discounts, and weights of the chain.
      lambda_: the mixing parameter: 0 for one-step targets of the critic, 1 for the reward alone.
      clip: the distance that the ratio may move from 1.
    """
    import rlax

    ratio_t = jnp.exp(action_log_probs(logits, episode.a_t) - old_log_probs)
    td_error = rlax.td_lambda(
        v_tm1=values,
        r_t=episode.r_t,
        discount_t=episode.discount_t,
        v_t=_shift(values),
        lambda_=jnp.asarray(lambda_, values.dtype),
    )
    # The lambda return minus the value is the generalized advantage estimate.
    adv_t = jax.lax.stop_gradient(td_error)
    # rlax declares a Python number, but an array works too.
    epsilon: float = clip  # pyright: ignore[reportAssignmentType]
    actor = rlax.clipped_surrogate_pg_loss(ratio_t, adv_t * episode.w_t, epsilon)
    return Losses(jnp.asarray(actor), _critic_loss(td_error, episode))


def vtrace_loss(
    logits: Float[Array, "L E"],
    values: Float[Array, "L"],
    old_log_probs: Float[Array, "L"],
    episode: Episode,
    lambda_: ArrayLike,
) -> Losses:
    """Compute the V-trace losses of an actor-critic, for chains that an earlier policy sampled.

    This is equation 1 of Espeholt et al. 2018, arXiv:1802.01561. Let `ratio_t = pi(a_t) /
    pi_old(a_t)`. The error is computed from the last step backward:

        rho_t   = min(1, ratio_t)
        error_t = rho_t * (r_t + discount_t * (v_{t+1} + lambda * error_{t+1}) - v_t)
        adv_t   = error_t
        actor  = -mean_t w_t * adv_t * log pi(a_t)
        critic = mean_t w_t * 1/2 * error_t^2

    The advantage equals the error, because both clip the ratio at 1. No gradient flows through
    `rho_t`, `adv_t`, or the target `error_t + v_t`.

    Args:
      logits: the logits of the current policy before each token, `[L, N + K]`.
      values: the values of the current critic before each token, `v_t`, `[L]`.
      old_log_probs: `log pi_old(a_t)` under the policy that sampled the chain, `[L]`.
      episode: the tokens, rewards, discounts, and weights of the chain.
      lambda_: the mixing parameter for the errors of later steps.
    """
    import rlax

    ratio_t = jnp.exp(action_log_probs(logits, episode.a_t) - old_log_probs)
    out = rlax.vtrace_td_error_and_advantage(
        v_tm1=values,
        v_t=_shift(values),
        r_t=episode.r_t,
        discount_t=episode.discount_t,
        # V-trace weights the gradient of the log-probabilities by the clipped ratio.
        rho_tm1=jax.lax.stop_gradient(ratio_t),
        lambda_=jnp.asarray(lambda_, values.dtype),
    )
    adv_t = jax.lax.stop_gradient(out.pg_advantage)
    a_t = jnp.maximum(episode.a_t, 0)
    actor = rlax.policy_gradient_loss(logits, a_t, adv_t, episode.w_t)
    return Losses(jnp.asarray(actor), _critic_loss(out.errors, episode))


def entropy_loss(logits: Float[Array, "L E"], w_t: Float[Array, "L"]) -> Float[Array, ""]:
    """Compute minus the mean entropy: `mean_t w_t * sum_a pi_t(a) * log pi_t(a)`.

    Args:
      logits: the logits before each token, `[L, N + K]`.
      w_t: the weights, 1 up to the head and 0 after it, `[L]`.
    """
    import rlax

    return jnp.asarray(rlax.entropy_loss(logits, w_t))


def imitation_loss(
    logits: Float[Array, "L E"], a_t: Int[Array, "L"], is_step: Bool[Array, "L"]
) -> Float[Array, ""]:
    """Compute the negative log-likelihood of a chain: `-mean_t w_t * log pi(a_t)`.

    This is the loss of priority queue training (Abolafia et al. 2018, arXiv:1801.03526).

    Args:
      logits: the logits before each token, `[L, N + K]`.
      a_t: the tokens of the chain to imitate, `[L]`.
      is_step: `w_t` as a mask of the slots that hold a token, `[L]`.
    """
    return -jnp.mean(jnp.where(is_step, action_log_probs(logits, a_t), 0.0))


def _shift(values: Float[Array, "L"]) -> Float[Array, "L"]:
    """Return the value after each token; the last is never used, because its discount is 0."""
    return jnp.pad(values[1:], (0, 1))


def _critic_loss(td_error: ArrayLike, episode: Episode) -> Float[Array, ""]:
    """Compute half the mean squared error."""
    return 0.5 * jnp.mean(jnp.square(td_error) * episode.w_t)
