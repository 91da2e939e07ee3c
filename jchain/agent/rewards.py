"""Rewards of chains, computed from their losses. A critic's predictions are in the same units."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jchain._typing import Array, Float
from jchain.agent.observations import compress_loss
from jchain.arguments import checked
from jchain.pytree import describe_type


@checked
def rank_rewards(loss: Float[Array, "P"]) -> Float[Array, "P"]:
    """Reward the chains of a step by rank: 1 for the lowest loss, -1 for the highest.

    Equal losses get equal rewards. The losses of a bank span orders of magnitude but differ little
    near the optimum. Ranks resolve both (rank-based shaping, Wierstra et al. 2014, JMLR 15). They
    depend on the other chains of the step, so the predictions of a critic that is trained on them
    are unitless.

    Args:
      loss: the losses of at least two chains, `[P]`; +inf ranks last.
    """
    is_better = jnp.sum(loss[:, None] < loss[None], axis=1)
    is_worse = jnp.sum(loss[:, None] > loss[None], axis=1)
    return (is_better - is_worse) / (loss.shape[0] - 1)


@checked
def log_rewards(loss: Float[Array, "P"]) -> Float[Array, "P"]:
    """Reward each chain with minus its compressed loss, on a scale that is the same in all steps.

    The loss is compressed by `jchain.agent.observations.compress_loss`, which is nearly a log.

    Args:
      loss: the losses, `[P]`; one that is not finite counts as the worst finite one.
    """
    return -compress_loss(_bound(loss))


@checked
def plain_rewards(loss: Float[Array, "P"]) -> Float[Array, "P"]:
    """Reward each chain with minus its loss.

    Args:
      loss: the losses, `[P]`; one that is not finite counts as the worst finite one.
    """
    return -_bound(loss)


def _bound(loss: Float[Array, "P"]) -> Float[Array, "P"]:
    """Replace losses that are not finite by the worst finite one, or by 0 if there is none."""
    worst = jnp.max(jnp.where(jnp.isfinite(loss), loss, -jnp.inf))
    return jnp.where(jnp.isfinite(loss), loss, jnp.where(jnp.isfinite(worst), worst, 0.0))


@checked
def compute_rewards(
    reward_fn: Callable[[Float[Array, "P"]], Float[Array, "P"]], loss: Float[Array, "P"]
) -> Float[Array, "P"]:
    """Compute the rewards of chains with a user's function, and check their shape.

    Args:
      reward_fn: the function, such as `plain_rewards`.
      loss: the losses of the chains, `[P]`.

    Raises:
      ValueError: if the function does not return one reward per chain.
    """
    rewards = reward_fn(loss)
    if not isinstance(rewards, jax.Array) or rewards.shape != loss.shape:
        raise ValueError(
            f"expected reward_fn to return rewards of shape {list(loss.shape)}, one per chain, got "
            f"{describe_type(rewards)}"
        )
    return rewards
