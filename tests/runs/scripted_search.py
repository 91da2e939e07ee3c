"""A search that plays given losses, for tests of the driver."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

import jchain as jc
from jchain.pytree import pytree_dataclass, static


class State(NamedTuple):
    t: jax.Array


@pytree_dataclass
class Scripted:
    """Play given chains with given losses, at a given cost per step."""

    chains: jax.Array  # [T, P, L]
    loss: jax.Array  # [T, P]
    cost: int = static(default=5)

    def init(self, key, problem):
        return State(jnp.array(0))

    def step(self, key, state, problem):
        info = jc.Info(self.chains[state.t], self.loss[state.t], jnp.array(self.cost))
        return State((state.t + 1) % self.loss.shape[0]), info


def make_scripted(rows, cost=5):
    """Make a search that plays rows of (token, loss); a chain is that token and the head 4."""
    chains = [[[token, 4, -1, -1] for token, _ in row] for row in rows]
    return Scripted(
        jnp.array(chains, jnp.int32), jnp.array([[loss for _, loss in row] for row in rows]), cost
    )
