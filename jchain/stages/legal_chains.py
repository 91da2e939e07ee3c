"""Legal chains of a bank with stages: how many there are, and how to list, number, and draw them.

The number of ways to complete a prefix depends only on its stage and on the number of layers that
are still to come, so all of this follows from one small table.
"""

import math
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np

from jchain._typing import Array, Bool, Float, Int, Key
from jchain.stages.table import StageTable

_PADDING = -1


@cache
def count_completions(stages: StageTable, max_layers: int) -> tuple[tuple[int, ...], ...]:
    """Count the ways to complete a prefix with exactly `d` more layers and a head.

    Args:
      stages: the stages of the bank.
      max_layers: the largest `d`.

    Returns:
      The counts, by `d` and by the stage that the prefix has reached.
    """
    range_of_stages, heads = range(stages.num_stages), stages.head_stages
    counts = [
        tuple(sum(bool(stages.fits(head, stage)) for head in heads) for stage in range_of_stages)
    ]
    for _ in range(max_layers):
        after = counts[-1]
        counts.append(
            tuple(
                sum(after[write] for read, write in stages.layer_stages if stages.fits(read, stage))
                for stage in range_of_stages
            )
        )
    return tuple(counts)


def find_open(stages: StageTable, min_layers: int, max_layers: int) -> Bool[np.ndarray, "D S"]:
    """Find the prefixes that can be completed to a chain of `min_layers` to `max_layers` layers.

    Args:
      stages: the stages of the bank.
      min_layers: minimum number of layers in a chain.
      max_layers: maximum number of layers in a chain.

    Returns:
      For each number of layers of a prefix, 0 to `max_layers + 1`, and each stage that it may have
      reached, whether it can be completed, `[max_layers + 2, S]`.
    """
    counts = np.array(count_completions(stages, max_layers), object) > 0
    is_open = np.zeros((max_layers + 2, stages.num_stages), bool)
    for length in range(max_layers + 1):
        is_open[length] = counts[max(min_layers - length, 0) : max_layers - length + 1].any(axis=0)
    return is_open


def find_extensible(
    stages: StageTable, min_layers: int, max_layers: int
) -> Bool[np.ndarray, "D S"]:
    """Find the prefixes that may be followed by one more layer in a chain of the space.

    Args:
      stages: the stages of the bank.
      min_layers: minimum number of layers in a chain.
      max_layers: maximum number of layers in a chain.

    Returns:
      For each number of layers of a prefix, 0 to `max_layers`, and each stage that it may have
      reached, whether it may be followed by a layer, `[max_layers + 1, S]`.
    """
    is_open = find_open(stages, min_layers, max_layers)
    can_extend = np.zeros((max_layers + 1, stages.num_stages), bool)
    for stage in range(stages.num_stages):
        for read, write in stages.layer_stages:
            if stages.fits(read, stage):
                can_extend[:, stage] |= is_open[1:, write]
    return can_extend


def cheapest_rest(
    stages: StageTable, min_layers: int, max_layers: int, token_costs: Float[Array, "E"]
) -> Float[Array, "D S"]:
    """Compute the lowest cost of completing a prefix to a chain of the space.

    Args:
      stages: the stages of the bank.
      min_layers: minimum number of layers in a chain.
      max_layers: maximum number of layers in a chain.
      token_costs: the cost of each layer and head, `[N + K]`.

    Returns:
      The costs, by the number of layers of the prefix, 0 to `max_layers + 1`, and by its stage,
      `[max_layers + 2, S]`; `+inf` if the prefix cannot be completed.
    """
    num_layers = len(stages.layer_stages)
    reads, writes = stages.reads, stages.writes[:num_layers]
    none = jnp.full(stages.num_stages, jnp.inf, token_costs.dtype)
    can_follow = stages.fits(reads[None], np.arange(stages.num_stages)[:, None])

    def find_least(costs: Array, can_follow: Bool[np.ndarray, "S n"]) -> Array:
        return jnp.where(can_follow, costs[None], jnp.inf).min(axis=1, initial=jnp.inf)

    by_number = [find_least(token_costs[num_layers:], can_follow[:, num_layers:])]
    for _ in range(max_layers):
        rest = token_costs[:num_layers] + by_number[-1][writes]
        by_number.append(find_least(rest, can_follow[:, :num_layers]))
    costs = jnp.stack(by_number)
    rows = [
        costs[max(min_layers - length, 0) : max_layers - length + 1].min(axis=0)
        for length in range(max_layers + 1)
    ]
    return jnp.stack([*rows, none])


def sample_chains(
    key: Key[Array, ""], stages: StageTable, min_layers: int, max_layers: int, num_chains: int
) -> Int[Array, "P L"]:
    """Draw legal chains uniformly, with replacement.

    Args:
      key: the PRNG key; consumed by this call.
      stages: the stages of the bank.
      min_layers: minimum number of layers in a chain.
      max_layers: maximum number of layers in a chain.
      num_chains: number of chains to draw, P.
    """
    logits = jnp.asarray(_make_logits(stages, max_layers))
    num_layers, writes = len(stages.layer_stages), jnp.asarray(stages.writes)
    lengths = np.arange(min_layers, max_layers + 1)
    counts = count_completions(stages, max_layers)
    by_length = jnp.asarray(_log([counts[length][0] for length in lengths]))

    def draw(carry: tuple[Array, Array], key: Array) -> tuple[tuple[Array, Array], Array]:
        num_left, stage = carry
        token = jax.random.categorical(key, logits[jnp.maximum(num_left, 0), stage])
        token = jnp.where(num_left < 0, _PADDING, token).astype(jnp.int32)
        stage = jnp.where(token < num_layers, writes[token], stage)
        return (num_left - 1, stage), token

    def sample(key: Array) -> Array:
        length_key, key = jax.random.split(key)
        length = min_layers + jax.random.categorical(length_key, by_length)
        start = (length.astype(jnp.int32), jnp.zeros((), writes.dtype))
        return jax.lax.scan(draw, start, jax.random.split(key, max_layers + 1))[1]

    return jax.vmap(sample)(jax.random.split(key, num_chains))


def _make_logits(stages: StageTable, max_layers: int) -> Float[np.ndarray, "D S E"]:
    """Return the log number of chains with each next token, by layers left and by stage."""
    counts, num_stages = count_completions(stages, max_layers), stages.num_stages
    num_layers, num_heads = len(stages.layer_stages), len(stages.head_stages)
    logits = np.full((max_layers + 1, num_stages, num_layers + num_heads), -np.inf, np.float32)
    can_follow = stages.fits(stages.reads[None], np.arange(num_stages)[:, None])
    for token, (_, write) in enumerate(stages.layer_stages):
        completions = _log([row[write] for row in counts[:-1]])
        logits[1:, can_follow[:, token], token] = completions[:, None]
    logits[0, :, num_layers:] = np.where(can_follow[:, num_layers:], 0.0, -np.inf)
    return logits


def _log(counts: list[int]) -> Float[np.ndarray, "D"]:
    """Compute the log of integers, which may be larger than any float; -inf for 0."""
    logs = [math.log(count) if count else -math.inf for count in counts]
    return np.array(logs, np.float32)


def enumerate_chains(
    stages: StageTable, min_layers: int, max_layers: int
) -> Int[np.ndarray, "C L"]:
    """List every legal chain, shorter chains first, and those of one length in token order.

    Args:
      stages: the stages of the bank.
      min_layers: minimum number of layers in a chain.
      max_layers: maximum number of layers in a chain.
    """
    num_layers, reads, writes = len(stages.layer_stages), stages.reads, stages.writes
    is_open = find_open(stages, min_layers, max_layers)
    blocks, prefixes, stage = [], np.zeros((1, 0), np.int32), np.zeros(1, int)
    for length in range(max_layers + 1):
        is_next = stages.fits(reads[None], stage[:, None])
        if length >= min_layers:
            row, head = np.nonzero(is_next[:, num_layers:])
            block = np.full((len(row), max_layers + 1), _PADDING, np.int32)
            block[:, :length], block[:, length] = prefixes[row], num_layers + head
            blocks.append(block)
        is_next = is_next[:, :num_layers] & is_open[length + 1][writes[:num_layers]][None]
        row, token = np.nonzero(is_next)
        prefixes = np.concatenate([prefixes[row], token[:, None].astype(np.int32)], axis=1)
        stage = writes[token]
    return np.concatenate(blocks)


def index_chains(
    stages: StageTable, max_layers: int, chains: Int[Array, "*P L"], length: Int[Array, "*P"]
) -> Int[Array, "*P"]:
    """Return the index of each legal chain among all of up to `max_layers` layers.

    Args:
      stages: the stages of the bank.
      max_layers: maximum number of layers in a chain.
      chains: int32 `[..., L]`; the tokens of each chain. The index of an illegal one is undefined.
      length: the number of layers of each chain.
    """
    counts = count_completions(stages, max_layers)
    shorter = np.cumsum([0, *(row[0] for row in counts)]).astype(np.int32)
    # The chains that have a smaller token at a slot, by the layers left there, by the stage before
    # it, and by the token.
    tokens = list(zip(stages.reads, stages.writes, strict=True))
    earlier = np.zeros((max_layers + 1, stages.num_stages, len(tokens)), np.int32)
    for num_left, stage in np.ndindex(earlier.shape[:2]):
        so_far = 0
        for token, (read, write) in enumerate(tokens):
            earlier[num_left, stage, token] = min(so_far, 2**31 - 1)
            if (num_left == 0) == (write < 0) and stages.fits(read, stage):
                so_far += counts[num_left - 1][write] if num_left else 1
    slots = jnp.arange(max_layers + 1).reshape(*(1 for _ in length.shape), -1)
    num_left = length[..., None] - slots
    stage = jnp.maximum(stages.follow(chains), 0)
    at_slot = jnp.asarray(earlier)[jnp.maximum(num_left, 0), stage, jnp.maximum(chains, 0)]
    return jnp.asarray(shorter)[length] + jnp.where(num_left >= 0, at_slot, 0).sum(axis=-1)
