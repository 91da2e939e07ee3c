"""What scoring costs, one rule for all searches: a chain that a search has scored before costs nothing more.

A step pays for each distinct (prefix, layer) of the chains that are new to the search, as `jchain.evaluate` counts them;
losses of the others come from a table of fixed size that works under `jit` and `vmap`. A chain of which a layer or the head
has other weights than when it was scored (`Bank.versions`) is new. Searches that go on from the
activations of a prefix (beam search, tree search) pay for every layer that they apply instead.
"""

from typing import NamedTuple

import jax.numpy as jnp

from jchain import chain as chain_lib
from jchain._typing import Array, Bool, Float, Int
from jchain.chain import PADDING
from jchain.engine.evaluate import evaluate
from jchain.problem import Problem

_SIZE, _NUM_WAYS = 2**15, 8


class ScoreCache(NamedTuple):
    """A set-associative table: a chain stands in any place of the set that its hash names, the oldest makes room."""

    chains: Int[Array, "M W L"]  # [M, W, L], -1 where nothing stands
    loss: Float[Array, "M W"]
    num_stored: Int[Array, "M"]  # [M], chains that each set has seen
    version: Int[Array, "M W"]  # of the chain's layers and head, when it was scored


def init(problem: Problem) -> ScoreCache:
    """An empty table for 32,768 chains: a run that scores more pays again for a few it has forgotten."""
    shape = (_SIZE // _NUM_WAYS, _NUM_WAYS)
    return ScoreCache(
        jnp.full((*shape, problem.max_layers + 1), PADDING, jnp.int32),
        jnp.full(shape, jnp.inf),
        jnp.zeros(shape[:1], jnp.int32),
        jnp.zeros(shape, jnp.int32),
    )


def evaluate_cached(
    cache: ScoreCache, problem: Problem, chains: Int[Array, "P L"]
) -> tuple[ScoreCache, Float[Array, "P"], Int[Array, ""]]:
    """The table with these chains in it, their losses, and the layer calls that the new ones cost."""
    version = _add_versions(problem, chains)
    place, is_match = _find(cache, chains, version)
    is_known = is_match.any(axis=1)
    bare = chain_lib.bare(problem.bank.num_layers, problem.max_layers)
    out = evaluate(problem, jnp.where(is_known[:, None], bare[None], chains))
    known = jnp.where(is_match, cache.loss[place], 0.0).sum(axis=1)
    loss = jnp.where(is_known, known, out.loss)
    return _store(cache, place, chains, version, loss, ~is_known), loss, out.layer_calls


def is_cached(cache: ScoreCache, problem: Problem, chains: Int[Array, "P L"]) -> Bool[Array, "P"]:
    """Which of these chains the table holds."""
    return _find(cache, chains, _add_versions(problem, chains))[1].any(axis=1)


def _add_versions(problem: Problem, chains: Int[Array, "P L"]) -> Int[Array, "P"]:
    """Versions never fall, so their sum is the same only where each of them is."""
    if problem.bank.versions is None:
        return jnp.zeros(chains.shape[:1], jnp.int32)
    return jnp.where(chains >= 0, problem.bank.versions[jnp.maximum(chains, 0)], 0).sum(axis=1)


def _find(
    cache: ScoreCache, chains: Int[Array, "P L"], version: Int[Array, "P"]
) -> tuple[Int[Array, "P"], Bool[Array, "P W"]]:
    """The set of each chain, and in which of its places it stands."""
    place = _hash(chains) % cache.loss.shape[0]
    is_same = (cache.chains[place] == chains[:, None]).all(axis=-1)
    return place, is_same & (cache.version[place] == version[:, None])


def _store(
    cache: ScoreCache,
    place: Int[Array, "P"],
    chains: Int[Array, "P L"],
    version: Int[Array, "P"],
    loss: Float[Array, "P"],
    is_new: Bool[Array, "P"],
) -> ScoreCache:
    num_sets, num_ways = cache.loss.shape
    is_earlier = jnp.tri(chains.shape[0], k=-1, dtype=bool)
    is_new &= ~((chains[:, None] == chains[None]).all(axis=-1) & is_earlier).any(axis=1)
    # Of several new chains in one set, each takes the next place; more than fit are forgotten.
    rank = ((place[:, None] == place[None]) & is_earlier & is_new[None]).sum(axis=1)
    row = jnp.where(is_new & (rank < num_ways), place, num_sets)
    way = (cache.num_stored[place] + rank) % num_ways
    return ScoreCache(
        cache.chains.at[row, way].set(chains.astype(jnp.int32), mode="drop"),
        cache.loss.at[row, way].set(loss.astype(cache.loss.dtype), mode="drop"),
        cache.num_stored.at[row].add(1, mode="drop"),
        cache.version.at[row, way].set(version, mode="drop"),
    )


def _hash(chains: Int[Array, "P L"]) -> Int[Array, "P"]:
    """FNV-1a over tokens, with the high bits folded into the low ones."""
    value = jnp.full(chains.shape[:1], 2166136261, jnp.uint32)
    for token in chains.T.astype(jnp.uint32):
        value = (value ^ token) * jnp.uint32(16777619)
    return ((value ^ (value >> 15)) & 0x7FFFFFFF).astype(jnp.int32)
