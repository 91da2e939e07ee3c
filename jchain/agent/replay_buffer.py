"""Replay of sampled chains, with what was seen along them and how likely they were when they were sampled."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jchain._typing import Array, Float, Int, Key
from jchain.chain import PADDING
from jchain.problem import Problem


class Sample(NamedTuple):
    """A chain of the policy."""

    chain: Int[Array, "L"]  # [L]
    log_prob: Float[Array, "L"]  # [L], of its tokens; 0 behind the head
    features: Float[Array, "L F"]  # [L, F]
    loss: Float[Array, ""]  # +inf where it was not finite; means nothing where nothing is seen


class Replay(NamedTuple):
    """The last chains, as a ring."""

    chains: Int[Array, "R L"]  # [R, L]
    log_prob: Float[Array, "R L"]  # [R, L], of the tokens when they were taken
    loss: Float[Array, "R"]
    num_stored: Int[Array, ""]  # since the start
    features: Float[Array, "R L F"]  # [R, L, F]


def empty_replay(size: int, problem: Problem, seen: Float[Array, "F"]) -> Replay:
    """Places for so many chains, and for what is seen of each prefix."""
    shape = (size, problem.max_layers + 1)
    return Replay(
        jnp.full(shape, PADDING, jnp.int32),
        jnp.zeros(shape),
        jnp.full(size, jnp.inf),
        jnp.zeros((), jnp.int32),
        jnp.zeros((*shape, *seen.shape), seen.dtype),
    )


def remember(replay: Replay, sample: Sample) -> Replay:
    """With these chains, `[P, ...]`, in the place of the oldest."""
    num_chains = sample.loss.shape[0]
    place = (replay.num_stored + jnp.arange(num_chains)) % replay.loss.shape[0]
    return Replay(
        replay.chains.at[place].set(sample.chain),
        replay.log_prob.at[place].set(sample.log_prob),
        replay.loss.at[place].set(sample.loss.astype(replay.loss.dtype)),
        replay.num_stored + num_chains,
        replay.features.at[place].set(sample.features),
    )


def recall(key: Key[Array, ""], replay: Replay, num: int) -> Sample:
    """Some that are remembered, `[num, ...]`; one may come more than once."""
    num_there = jnp.minimum(replay.num_stored, replay.loss.shape[0])
    row = jax.random.randint(key, (num,), 0, num_there)
    return Sample(replay.chains[row], replay.log_prob[row], replay.features[row], replay.loss[row])
