"""Find the calls that a population needs, given that chains share the nodes of their prefixes.

A *node* is a distinct (prefix, layer) pair of the population and takes one layer call. In sorted
chains, shared prefixes are adjacent: the new nodes of chain `i` start at the first slot where it
differs from chain `i - 1`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jchain import chain as chain_lib
from jchain._typing import Array, Bool, Int


class SortedChains(NamedTuple):
    """Chains sorted by their tokens."""

    chains: Int[Array, "P L"]  # [P, L]
    length: Int[Array, "P"]  # [P], number of layers
    # [P], the first slot that differs from the previous chain; L if the two chains are equal
    first_new: Int[Array, "P"]


class Batches(NamedTuple):
    """Rows sorted by the group and member that they call, and cut into batches of fixed widths."""

    order: Int[Array, "C"]  # [C], indices of the rows; rows with a call come first
    position: Int[Array, "C"]  # [C], index of each row in `order`
    # For each group and width: the indices in `order` at which batches start (entries after the
    # last batch are undefined), and the number of batches.
    starts: tuple[tuple[Int[Array, "C"], ...], ...]  # [C] each
    counts: tuple[tuple[Int[Array, ""], ...], ...]


def sort_chains(chains: Int[Array, "P L"], num_layers: int) -> tuple[SortedChains, Int[Array, "P"]]:
    """Sort chains by their tokens.

    Args:
      chains: the tokens of the chains, `[P, L]`.
      num_layers: the number of layers in the bank, N.

    Returns:
      The sorted chains and, for each given chain, the index of the first sorted chain that equals
      it, `[P]`.
    """
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
    """Pad chains to a multiple of `number` by repeating the last chain.

    The repeated chains have no new node, so they cost nothing.

    Args:
      population: the sorted chains.
      number: the number that the padded number of chains is a multiple of.
    """
    num_chains, num_slots = population.chains.shape
    num_padding = -num_chains % number
    return SortedChains(
        jnp.pad(population.chains, ((0, num_padding), (0, 0)), mode="edge"),
        jnp.pad(population.length, (0, num_padding), mode="edge"),
        jnp.pad(population.first_new, (0, num_padding), constant_values=num_slots),
    )


def find_first_new(chains: Int[Array, "P L"]) -> Int[Array, "P"]:
    """Return the first slot where each sorted chain differs from the chain before it.

    This is 0 for the first chain, and L if the two chains are equal.
    """
    num_slots = chains.shape[1]
    is_new = jnp.concatenate([jnp.ones((1, num_slots), bool), chains[1:] != chains[:-1]])
    return jnp.where(is_new.any(axis=1), jnp.argmax(is_new, axis=1), num_slots)


def count_calls(
    chains: Int[Array, "P L"], num_layers: int
) -> tuple[Int[Array, ""], Int[Array, ""]]:
    """Count the layer calls and head calls that an evaluation of a population makes.

    They are the numbers of distinct (prefix, layer) pairs and of distinct chains.

    Args:
      chains: the tokens of the chains, `[P, L]`.
      num_layers: the number of layers in the bank, N.
    """
    (_, length, first_new), _ = sort_chains(chains, num_layers)
    return jnp.sum(jnp.maximum(length - first_new, 0)), jnp.sum(first_new <= length)


def batch_rows(
    is_call: Bool[Array, "C"],
    group: Int[Array, "C"],
    member: Int[Array, "C"],
    num_groups: int,
    widths: tuple[int, ...],
) -> Batches:
    """Cut the rows that have a call into batches of one group and one member each.

    Each run of equal calls is cut into batches of the largest width until the rest of the run is
    too short, then into batches of the next smaller width, and so on.

    Args:
      is_call: whether each row has a call, `[C]`.
      group: the group that each row calls, `[C]`.
      member: the member of the group that each row calls, `[C]`. If all rows have the same number,
        a batch may mix members.
      num_groups: the number of groups.
      widths: the sizes of batches, ascending from 1, each a multiple of the previous one.
    """
    size = is_call.shape[0]
    positions = jnp.arange(size)
    *keys, order = jax.lax.sort([~is_call, group, member, positions], num_keys=3, is_stable=True)
    is_same = jnp.stack([key[1:] == key[:-1] for key in keys]).all(axis=0)
    first = jax.lax.cummax(jnp.where(jnp.append(True, ~is_same), positions, 0))
    last = jax.lax.cummin(jnp.where(jnp.append(~is_same, True), positions, size - 1), reverse=True)
    run_length, is_call, group = last - first + 1, ~keys[0], keys[1]
    starts, counts = [[] for _ in range(num_groups)], [[] for _ in range(num_groups)]
    for width, wider in zip(widths, (*widths[1:], None), strict=True):
        # Wider batches cover the start of a run, so the rest is at its end.
        rest = run_length if wider is None else run_length % wider
        offset = positions - first - (run_length - rest)
        is_start = (
            is_call & (offset >= 0) & (offset < rest // width * width) & (offset % width == 0)
        )
        for g in range(num_groups):
            is_of_group = is_start & (group == g)
            starts[g].append(jnp.sort(jnp.where(is_of_group, positions, size)))
            counts[g].append(jnp.sum(is_of_group))
    position = jnp.zeros_like(order).at[order].set(positions)
    return Batches(order, position, tuple(map(tuple, starts)), tuple(map(tuple, counts)))
