"""Replay buffer: the last chains, with the records of how they were sampled."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jchain._typing import Array, Float, Int, Key
from jchain.agent.rollout import Rollout, drop_empty, restore_empty
from jchain.chain import PADDING
from jchain.problem import Problem


class ReplayBuffer(NamedTuple):
    """The last `R` chains, as a ring buffer."""

    chains: Int[Array, "R L"]  # [R, L]
    log_probs: Float[Array, "R L"]  # [R, L], log-probabilities of the tokens when they were sampled
    loss: Float[Array, "R"]  # [R]
    num_added: Int[Array, ""]  # the number of chains ever added, including evicted ones
    # [R, L, F], features of the prefix before each token; None if F = 0
    features: Float[Array, "R L F"] | None

    def add(self, rollout: Rollout) -> "ReplayBuffer":
        """Add chains, `[P, ...]`, in place of the oldest ones."""
        num_chains = rollout.loss.shape[0]
        place = (self.num_added + jnp.arange(num_chains)) % self.loss.shape[0]
        return ReplayBuffer(
            self.chains.at[place].set(rollout.chains),
            self.log_probs.at[place].set(rollout.log_probs),
            self.loss.at[place].set(rollout.loss.astype(self.loss.dtype)),
            self.num_added + num_chains,
            None if self.features is None else self.features.at[place].set(rollout.features),
        )

    def sample(self, key: Key[Array, ""], num_chains: int) -> Rollout:
        """Draw chains uniformly with replacement, `[num_chains, ...]`."""
        num_stored = jnp.minimum(self.num_added, self.loss.shape[0])
        row = jax.random.randint(key, (num_chains,), 0, num_stored, jnp.int32)
        features = None if self.features is None else self.features[row]
        return Rollout(
            self.chains[row],
            self.log_probs[row],
            restore_empty(features, self.chains[row]),
            self.loss[row],
        )


def empty_replay_buffer(
    size: int, problem: Problem, prefix_features: Float[Array, "F"]
) -> ReplayBuffer:
    """Return an empty replay buffer.

    Args:
      size: the maximum number of chains, R.
      problem: the problem, whose `max_layers` determines the length of the chains.
      prefix_features: the features of any prefix, `[F]`; only their shape and dtype are used.
    """
    shape = (size, problem.max_layers + 1)
    return ReplayBuffer(
        jnp.full(shape, PADDING, jnp.int32),
        jnp.zeros(shape),
        jnp.full(size, jnp.inf),
        jnp.zeros((), jnp.int32),
        drop_empty(jnp.zeros((*shape, *prefix_features.shape), prefix_features.dtype)),
    )
