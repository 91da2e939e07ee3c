"""A cache of chain losses, so that scoring a cached chain again is free.

New chains cost their distinct (prefix, layer) pairs, counted as by `jchain.evaluate`. The cache has
a fixed size and works under `jit` and `vmap`. A cached chain counts as new if the data, the loss,
the layer costs, or the weights of one of its layers or of its head have changed since it was scored
(`jchain.engine.fingerprint`). Searches that continue from the activations of a
prefix (beam search, tree search) do not use the cache: they pay for every layer that they apply.
"""

from typing import NamedTuple

import jax.numpy as jnp

from jchain._typing import Array, Bool, Float, Int, UInt
from jchain.arguments import checked
from jchain.chain import PADDING
from jchain.engine.evaluation import evaluate_filled
from jchain.engine.fingerprint import compute_fingerprints
from jchain.engine.successive_halving import RungProblem, evaluate_new
from jchain.problem import Problem

_SIZE, _NUM_WAYS = 2**15, 8


class ScoreCache(NamedTuple):
    """A set-associative cache of losses.

    The hash of a chain selects its set, whose oldest chain is evicted.
    """

    chains: Int[Array, "M W L"]  # [M, W, L], all -1 in an empty entry
    loss: Float[Array, "M W"]  # [M, W]
    num_stored: Int[Array, "M"]  # [M], number of chains ever stored in each set
    fingerprint: UInt[Array, "M W"]  # [M, W], fingerprint of the chain when it was scored


@checked
def init(problem: Problem) -> ScoreCache:
    """Create an empty cache for 32,768 chains.

    A run that scores more chains pays again for the chains that were evicted.

    Args:
      problem: the problem, whose `max_layers` gives the number of slots of a chain.
    """
    shape = (_SIZE // _NUM_WAYS, _NUM_WAYS)
    return ScoreCache(
        jnp.full((*shape, problem.max_layers + 1), PADDING, jnp.int32),
        jnp.full(shape, jnp.inf),
        jnp.zeros(shape[:1], jnp.int32),
        jnp.zeros(shape, jnp.uint32),
    )


@checked
def evaluate_cached(
    cache: ScoreCache,
    problem: Problem,
    chains: Int[Array, "P L"],
    rival: Int[Array, "L"] | None = None,
) -> tuple[ScoreCache, Float[Array, "P"], Int[Array, ""] | Float[Array, ""]]:
    """Look up the losses of chains in the cache, and evaluate the chains that are new.

    Inside `jc.Staged`, the new chains compete, and those that stop after a part of the examples
    have a loss of `+inf`, which is not stored.

    Args:
      cache: the losses of the chains that were scored before.
      problem: the bank, the split of data, and the loss.
      chains: the tokens of the chains, `[P, L]`.
      rival: the tokens of a chain that a new chain has to beat to be of use, such as the chain that
        local search is at; a row of -1 or None for none. Inside `jc.Staged`, a new chain that is no
        better than its rival on the same examples is not scored on all. Otherwise, it has no
        effect.

    Returns:
      The cache with these chains stored, their losses `[P]`, and the layer calls that the new
      chains cost: a float inside `jc.Staged`.
    """
    fingerprint = compute_fingerprints(problem, chains)
    set_index, is_match = _find(cache, chains, fingerprint)
    is_known = is_match.any(axis=1)
    # Replace cached chains with a chain of only a head, which costs no layer call.
    new = jnp.where(is_known[:, None], problem.space.head_alone[None], chains)
    is_new = ~is_known
    if isinstance(problem, RungProblem):
        loss, is_whole, layer_calls = evaluate_new(problem, new, is_new, rival)
        is_new &= is_whole
    else:
        loss, _, layer_calls, _ = evaluate_filled(problem, new)
    known = jnp.where(is_match, cache.loss[set_index], 0.0).sum(axis=1)
    loss = jnp.where(is_known, known, loss)
    return _store(cache, set_index, chains, fingerprint, loss, is_new), loss, layer_calls


@checked
def add(
    cache: ScoreCache, problem: Problem, chains: Int[Array, "P L"], loss: Float[Array, "P"]
) -> ScoreCache:
    """Store losses that were computed elsewhere, so that these chains are free.

    Args:
      cache: the losses of the chains that were scored before.
      problem: the problem that the losses belong to.
      chains: the tokens of the chains, `[P, L]`.
      loss: their losses, `[P]`.
    """
    fingerprint = compute_fingerprints(problem, chains)
    set_index, is_match = _find(cache, chains, fingerprint)
    return _store(cache, set_index, chains, fingerprint, loss, ~is_match.any(axis=1))


@checked
def is_cached(cache: ScoreCache, problem: Problem, chains: Int[Array, "P L"]) -> Bool[Array, "P"]:
    """Return whether each chain is in the cache with its current weights, `[P]`.

    Args:
      cache: the losses of the chains that were scored before.
      problem: the problem, whose bank decides which losses are out of date.
      chains: the tokens of the chains, `[P, L]`.
    """
    return _find(cache, chains, compute_fingerprints(problem, chains))[1].any(axis=1)


def _find(
    cache: ScoreCache, chains: Int[Array, "P L"], fingerprint: UInt[Array, "P"]
) -> tuple[Int[Array, "P"], Bool[Array, "P W"]]:
    """Return the set of each chain, and which entry of the set holds the chain."""
    set_index = _hash(chains) % cache.loss.shape[0]
    is_same = (cache.chains[set_index] == chains[:, None]).all(axis=-1)
    return set_index, is_same & (cache.fingerprint[set_index] == fingerprint[:, None])


def _store(
    cache: ScoreCache,
    set_index: Int[Array, "P"],
    chains: Int[Array, "P L"],
    fingerprint: UInt[Array, "P"],
    loss: Float[Array, "P"],
    is_new: Bool[Array, "P"],
) -> ScoreCache:
    """Store the new chains in the cache."""
    num_sets, num_ways = cache.loss.shape
    is_earlier = jnp.tri(chains.shape[0], k=-1, dtype=bool)
    is_new &= ~((chains[:, None] == chains[None]).all(axis=-1) & is_earlier).any(axis=1)
    # New chains of the same set take consecutive entries; chains that do not fit are not stored.
    rank = ((set_index[:, None] == set_index[None]) & is_earlier & is_new[None]).sum(axis=1)
    row = jnp.where(is_new & (rank < num_ways), set_index, num_sets)
    way = (cache.num_stored[set_index] + rank) % num_ways
    return ScoreCache(
        cache.chains.at[row, way].set(chains.astype(jnp.int32), mode="drop"),
        cache.loss.at[row, way].set(loss.astype(cache.loss.dtype), mode="drop"),
        cache.num_stored.at[row].add(1, mode="drop"),
        cache.fingerprint.at[row, way].set(fingerprint, mode="drop"),
    )


def _hash(chains: Int[Array, "P L"]) -> Int[Array, "P"]:
    """Compute the FNV-1a hash of the tokens, with the high bits folded into the low bits."""
    value = jnp.full(chains.shape[:1], 2166136261, jnp.uint32)
    for token in chains.T.astype(jnp.uint32):
        value = (value ^ token) * jnp.uint32(16777619)
    return ((value ^ (value >> 15)) & 0x7FFFFFFF).astype(jnp.int32)
