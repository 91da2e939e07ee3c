"""Rollouts: chains sampled from a policy, starting empty or with a prefix of a good chain."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jchain._typing import Array, Bool, Float, Int, Key
from jchain.agent import observations
from jchain.agent.observations import ObservedPrefix
from jchain.agent.policy import Policy, PolicyCarry
from jchain.chain import PADDING, ChainSpace
from jchain.engine import prefix_rules
from jchain.problem import Problem


class Rollout(NamedTuple):
    """One sampled chain, or `P`, with all that updates need, so that updates apply no layers."""

    chains: Int[Array, "*P L"]  # [P, L]
    # [P, L], log-probabilities of the tokens when they were sampled; 0 after the head
    log_probs: Float[Array, "*P L"]
    # [P, L, F], features of the prefix before each token; F = 0 if nothing is observed
    features: Float[Array, "*P L F"]
    loss: Float[Array, "*P"]  # [P], +inf if not finite; if F = 0, undefined before scoring


def drop_empty(features: Float[Array, "*P F"]) -> Float[Array, "*P F"] | None:
    """Return None in place of features without numbers, which checkpoints cannot hold.

    Args:
      features: features, `[..., F]`.
    """
    return features if features.shape[-1] else None


def restore_empty(
    features: Float[Array, "*P F"] | None, chains: Int[Array, "*P"]
) -> Float[Array, "*P F"]:
    """Return what `drop_empty` was given.

    Args:
      features: what `drop_empty` returned.
      chains: the chains that the features belong to, `[..., L]`.
    """
    return jnp.zeros((*chains.shape, 0)) if features is None else features


class _Carry(NamedTuple):
    policy: PolicyCarry
    is_done: Bool[Array, ""]  # whether the head was sampled
    observed: ObservedPrefix
    cost: Float[Array, ""]  # of the prefix; 0 without a limit
    stage: Int[Array, ""] | None  # that the prefix has reached; None without stages


def sample_prefix(
    key: Key[Array, ""],
    chains: Int[Array, "Q L"],
    num_chains: Int[Array, ""],
    restart_rate: Float[Array, ""],
    space: ChainSpace,
) -> Int[Array, "L"]:
    """Sample the prefix that a new chain starts with: a prefix of a good chain, or the empty one.

    The prefix is padded with -1. All its possible lengths are equally likely. New chains that share
    a prefix pay for it only once per step.

    Args:
      key: the PRNG key; consumed by this call.
      chains: the good chains, in the first rows of `[Q, L]`.
      num_chains: the number of good chains; later rows are ignored.
      restart_rate: the probability of starting with a prefix of a good chain.
      space: the space of the chains.
    """
    row_key, cut_key, restart_key = jax.random.split(key, 3)
    chain = chains[jax.random.randint(row_key, (), 0, jnp.maximum(num_chains, 1), jnp.int32)]
    cut = jax.random.randint(cut_key, (), 0, space.count_layers(chain) + 1, jnp.int32)
    is_restart = jax.random.uniform(restart_key, (), jnp.float32) < restart_rate
    is_kept = (jnp.arange(chain.shape[0]) < cut) & is_restart
    return jnp.where(is_kept, chain, PADDING)


def sample_chain(
    key: Key[Array, ""], policy: Policy, prefix: Int[Array, "L"], problem: Problem
) -> Rollout:
    """Sample the rest of one chain from the policy.

    If the encoding observes activations, layers are applied while sampling, so the loss is known at
    the end. Otherwise, no layer is applied and the loss is undefined; the finished chains are
    scored together later.

    Args:
      key: the PRNG key; consumed by this call.
      policy: the network with its params and inputs.
      prefix: the tokens to start with, padded with -1, `[L]`.
      problem: the bank, the split of data, and the loss.
    """
    space, observe = problem.space, policy.network.encoding.observe
    root = observations.observe_root(observe, problem)

    def act(
        carry: _Carry, slot: tuple[Array, Array, Array]
    ) -> tuple[_Carry, tuple[Array, Array, Array]]:
        t, key, given = slot
        is_legal = prefix_rules.legal_actions(problem, t, carry.cost, carry.stage)
        logits, _ = policy.predict(carry.policy, t, is_legal)
        drawn = jax.random.categorical(key, logits.astype(jnp.float32))
        token = jnp.where(given == PADDING, drawn, given)
        log_prob = jnp.where(carry.is_done, 0.0, jax.nn.log_softmax(logits)[token])
        taken = jnp.where(carry.is_done, PADDING, token).astype(jnp.int32)
        after = observations.observe_next(observe, problem, carry.observed, taken)
        advanced = policy.advance(carry.policy, t, token, after.features)
        is_done = carry.is_done | (token >= space.num_layers)
        cost = prefix_rules.add_cost(problem, carry.cost, taken)
        stage = prefix_rules.next_stage(problem, carry.stage, taken)
        step = (taken, log_prob, carry.observed.features)
        return _Carry(advanced, is_done, after, cost, stage), step

    num_slots = space.max_layers + 1
    slots = (jnp.arange(num_slots), jax.random.split(key, num_slots), prefix)
    zero, stage = jnp.zeros((), jnp.float32), prefix_rules.first_stage(problem)
    start = _Carry(policy.init_carry(root.features), jnp.array(False), root, zero, stage)
    last, (chain, log_probs, features) = jax.lax.scan(act, start, slots)
    head = chain[space.count_layers(chain)] - space.num_layers
    loss = last.observed.loss[head] + problem.penalty(chain)
    return Rollout(chain, log_probs, features, jnp.where(jnp.isfinite(loss), loss, jnp.inf))
