"""Which calls a population needs: chains that share a prefix share its nodes.

A *node* is a (prefix, layer) of the population, so one layer call. Sorted chains have their shared prefixes side by side:
chain `i` adds exactly the nodes from the first slot in which it differs from chain `i - 1`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jchain import chain as chain_lib
from jchain._typing import Array, Bool, Int


class SortedChains(NamedTuple):
    """Chains in the order of their tokens."""

    chains: Int[Array, "P L"]  # [P, L]
    length: Int[Array, "P"]  # [P], layers of each
    first_new: Int[
        Array, "P"
    ]  # [P], the first slot that differs from the chain before; L where they are equal


class Batches(NamedTuple):
    """Rows that call the same thing, side by side and cut into batches of fixed widths."""

    order: Int[Array, "C"]  # [C], the rows, those that call something first
    position: Int[Array, "C"]  # [C], place of each row in `order`
    # By group and width: where in `order` its batches start (what stands behind the last means nothing), and how many.
    starts: tuple[tuple[Int[Array, "C"], ...], ...]  # [C] each
    counts: tuple[tuple[Int[Array, ""], ...], ...]


def sort_chains(chains: Int[Array, "P L"], num_layers: int) -> tuple[SortedChains, Int[Array, "P"]]:
    """The sorted chains, and for each of the given ones the first sorted one that equals it."""
    num_chains, num_slots = chains.shape
    *columns, order = jax.lax.sort(
        [*chains.T.astype(jnp.int32), jnp.arange(num_chains)], num_keys=num_slots, is_stable=True
    )
    chains = jnp.stack(columns, axis=1)
    length, first_new = chain_lib.count_layers(chains, num_layers), find_first_new(chains)
    run_start = jax.lax.cummax(jnp.where(first_new < num_slots, jnp.arange(num_chains), 0))
    return SortedChains(chains, length, first_new), jnp.zeros_like(run_start).at[order].set(
        run_start
    )


def pad_to_multiple(population: SortedChains, number: int) -> SortedChains:
    """The chains, the last one repeated up to a multiple of `number`: it has no new node, so this costs nothing."""
    num_chains, num_slots = population.chains.shape
    num_padding = -num_chains % number
    return SortedChains(
        jnp.pad(population.chains, ((0, num_padding), (0, 0)), mode="edge"),
        jnp.pad(population.length, (0, num_padding), mode="edge"),
        jnp.pad(population.first_new, (0, num_padding), constant_values=num_slots),
    )


def find_first_new(chains: Int[Array, "P L"]) -> Int[Array, "P"]:
    """The first slot in which each sorted chain differs from the one before it: 0 for the first, L where they are equal."""
    num_slots = chains.shape[1]
    is_new = jnp.concatenate([jnp.ones((1, num_slots), bool), chains[1:] != chains[:-1]])
    return jnp.where(is_new.any(axis=1), jnp.argmax(is_new, axis=1), num_slots)


def count_calls(
    chains: Int[Array, "P L"], num_layers: int
) -> tuple[Int[Array, ""], Int[Array, ""]]:
    """Layer calls and head calls that evaluating a population costs: its distinct (prefix, layer), distinct chains."""
    (_, length, first_new), _ = sort_chains(chains, num_layers)
    return jnp.sum(jnp.maximum(length - first_new, 0)), jnp.sum(first_new <= length)


def batch_rows(
    is_call: Bool[Array, "C"],
    group: Int[Array, "C"],
    member: Int[Array, "C"],
    num_groups: int,
    widths: tuple[int, ...],
) -> Batches:
    """The rows that call something, cut into batches of one group and one member each.

    A run of n equal calls becomes as many batches of the largest width as fit, then of the next one, and so on.

    Args:
      is_call: which rows call something.
      group: the module that each calls.
      member: which of its weights. Pass the same for all to let batches mix them.
      num_groups: how many groups there are.
      widths: sizes of batches, ascending from 1, each a multiple of the one before.
    """
    size = is_call.shape[0]
    places = jnp.arange(size)
    *keys, order = jax.lax.sort([~is_call, group, member, places], num_keys=3, is_stable=True)
    is_same = jnp.stack([key[1:] == key[:-1] for key in keys]).all(axis=0)
    first = jax.lax.cummax(jnp.where(jnp.append(True, ~is_same), places, 0))
    last = jax.lax.cummin(jnp.where(jnp.append(~is_same, True), places, size - 1), reverse=True)
    run_length, is_call, group = last - first + 1, ~keys[0], keys[1]
    starts, counts = [[] for _ in range(num_groups)], [[] for _ in range(num_groups)]
    for width, wider in zip(widths, (*widths[1:], None), strict=True):
        # What the wider batches leave of a run stands at its end.
        rest = run_length if wider is None else run_length % wider
        place = places - first - (run_length - rest)
        is_start = is_call & (place >= 0) & (place < rest // width * width) & (place % width == 0)
        for g in range(num_groups):
            is_mine = is_start & (group == g)
            starts[g].append(jnp.sort(jnp.where(is_mine, places, size)))
            counts[g].append(jnp.sum(is_mine))
    position = jnp.zeros_like(order).at[order].set(places)
    return Batches(order, position, tuple(map(tuple, starts)), tuple(map(tuple, counts)))
