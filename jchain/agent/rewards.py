"""Rewards of chains, from their losses: what an agent is taught to want, and the unit in which its critic predicts."""

import jax.numpy as jnp

from jchain._typing import Array, Float
from jchain.agent.observations import log_loss


def rank_rewards(loss: Float[Array, "P"]) -> Float[Array, "P"]:
    """Minus the loss, as its rank among the chains of the step, in -1..1; equal losses get equal rewards.

    Losses of a bank span orders of magnitude, and near the optimum what is left to gain is far smaller than their spread:
    ranks keep both ends in sight (rank-based shaping, Wierstra et al. 2014, JMLR 15). They move with the policy, so that
    what a critic learns of them has no unit.
    """
    is_better = jnp.sum(loss[:, None] < loss[None], axis=1)
    is_worse = jnp.sum(loss[:, None] > loss[None], axis=1)
    return (is_better - is_worse) / (loss.shape[0] - 1)


def log_rewards(loss: Float[Array, "P"]) -> Float[Array, "P"]:
    """Minus the log of the loss (`jchain.agent.observations.log_loss`): a scale that is the same in all steps."""
    return -log_loss(_bound(loss))


def plain_rewards(loss: Float[Array, "P"]) -> Float[Array, "P"]:
    """Minus the loss."""
    return -_bound(loss)


def _bound(loss: Float[Array, "P"]) -> Float[Array, "P"]:
    """A chain that cannot be scored is as bad as the worst that can."""
    worst = jnp.max(jnp.where(jnp.isfinite(loss), loss, -jnp.inf))
    return jnp.where(jnp.isfinite(loss), loss, jnp.where(jnp.isfinite(worst), worst, 0.0))
