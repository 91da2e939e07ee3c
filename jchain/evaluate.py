"""Many chains at once, exactly.

Chains are sorted, so that chains which share a prefix lie together, and only *nodes* are computed: a (prefix, layer)
that the chain before did not have, so each of a population once. On CPU a walk along the sorted chains computes one
node at a time. Elsewhere blocks of chains are worked off slot by slot, the nodes of a slot vmapped over their weights;
the activations along the last chain of a block are carried into the next, so that memory is bounded by the size of a
block and still nothing is computed twice.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jchain import chain as chain_lib
from jchain._typing import Array, Bool, Float, Int, Shaped
from jchain.bank import Bank, LayerGroup
from jchain.problem import Problem
from jchain.pytree import is_concrete

# Activations that a block may hold, in bytes, where no chunk_size is given.
_BLOCK_BYTES = 2**30
_MAX_CHAINS = 2**22


class Evaluation(NamedTuple):
    """What `evaluate` found."""

    loss: Float[Array, "P"]  # [P], +inf where it was not finite
    accuracy: Float[Array, "P"]  # [P], share of examples; 0 where the loss was not finite
    layer_calls: Int[Array, ""]  # distinct (prefix, layer) of the population
    head_calls: Int[Array, ""]  # distinct chains

    @property
    def num_nonfinite(self) -> Int[Array, ""]:
        """Chains whose loss was not finite."""
        return jnp.sum(jnp.isinf(self.loss))


def apply_chain(bank: Bank, chain: Int[Array, "L"] | Any, x: Shaped[Array, "B ..."]) -> Float[Array, "B ..."]:
    """Outputs of one chain for one batch: stem, layers in order, head. The plain definition, one branch per slot.

    Args:
      bank: the layers.
      chain: tokens, `[L]`; checked where they are not traced.
      x: raw input, `[B, ...]`.

    Raises:
      ValueError: `chain` is no chain of this bank.
    """
    if is_concrete(chain):
        chain = chain_lib.validate(chain, bank.num_layers, bank.num_heads)
    if jnp.ndim(chain) != 1:
        raise ValueError(f"expected one chain of shape [L], got {list(jnp.shape(chain))}")
    chain = jnp.asarray(chain)
    hidden = bank.embed(x)
    for token in chain[:-1]:
        is_layer = (token >= 0) & (token < bank.num_layers)
        hidden = jax.lax.cond(is_layer, partial(apply_token, bank.layers), lambda _, h: h, token, hidden)
    return apply_token(bank.heads, chain[chain_lib.count_layers(chain, bank.num_layers)], hidden)


def apply_token(groups: tuple[LayerGroup, ...], token: Int[Array, ""], hidden: Array) -> Array:
    """The member of `groups` with this token, applied to a batch: one layer call (or head call)."""
    group_of, member_of = _locate(groups)
    branches = [partial(group.apply, member_of[token]) for group in groups]
    return jax.lax.switch(group_of[token], branches, hidden)


def _locate(groups: tuple[LayerGroup, ...]) -> tuple[Int[Array, "T"], Int[Array, "T"]]:
    """Group and place in the group of each token; -1 for tokens of none of these groups."""
    size = 1 + max(token for group in groups for token in group.tokens)
    group_of, member_of = np.full(size, -1), np.full(size, -1)
    for i, group in enumerate(groups):
        group_of[list(group.tokens)] = i
        member_of[list(group.tokens)] = np.arange(len(group.tokens))
    return jnp.asarray(group_of), jnp.asarray(member_of)


def evaluate(problem: Problem, chains: Int[Array, "P L"] | Any, *, chunk_size: int | None = None) -> Evaluation:
    """Loss and accuracy of many chains, each distinct (prefix, layer) computed once.

    Works under `jit` and `vmap`. Under a `vmap` over populations of one problem, they are computed together; over
    problems, one after another.

    Args:
      problem: bank, split, loss.
      chains: tokens, `[P, L]`, `L = max_layers + 1`; checked where they are not traced.
      chunk_size: chains per block, whose nodes are vmapped; memory grows with it. 1 is one node at a time, the choice on
        CPU when None, as vmapped weights make a convolution a grouped one there, which is far slower; elsewhere as many
        as 1 GiB of activations holds.

    Raises:
      ValueError: some row is no chain of this bank, there are none, or chunk_size is below 1.
    """
    num_layers, num_heads = problem.bank.num_layers, problem.bank.num_heads
    if is_concrete(chains):
        chains = chain_lib.validate(chains, num_layers, num_heads, problem.max_layers)
    expected = f"[P, {problem.max_layers + 1}]"
    if jnp.ndim(chains) != 2 or chains.shape[0] == 0 or chains.shape[1] != problem.max_layers + 1:
        raise ValueError(f"expected chains of shape {expected}, at least one, got {list(jnp.shape(chains))}")
    return _evaluate(problem, jnp.asarray(chains), chunk_size)


def evaluate_all(problem: Problem, *, chunk_size: int | None = None) -> tuple[Int[np.ndarray, "P L"], Evaluation]:
    """Every chain of up to `max_layers` layers and its evaluation, in the order of `chain.enumerate_all`.

    Raises:
      ValueError: there are more than 4,194,304, or chunk_size is below 1.
    """
    sizes = (problem.bank.num_layers, problem.bank.num_heads, problem.max_layers)
    if chain_lib.count(*sizes) > _MAX_CHAINS:
        raise ValueError(f"expected at most {_MAX_CHAINS:,} chains to evaluate, got {chain_lib.count(*sizes):,}")
    chains = chain_lib.enumerate_all(*sizes)
    return chains, _evaluate(problem, jnp.asarray(chains), chunk_size)


def count_calls(chains: Int[Array, "P L"], num_layers: int) -> tuple[Int[Array, ""], Int[Array, ""]]:
    """Layer calls and head calls that evaluating a population costs: its distinct (prefix, layer), distinct chains."""
    _, _, length, first_new = _sort(chains, num_layers)
    return jnp.sum(jnp.maximum(length - first_new, 0)), jnp.sum(first_new <= length)


@partial(jax.jit, static_argnames="chunk_size")
def _evaluate(problem: Problem, chains: Int[Array, "P L"], chunk_size: int | None) -> Evaluation:
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"expected a chunk_size of at least 1, got {chunk_size}")
    loss, accuracy = _measure(problem, chains, chunk_size)
    loss += problem.price(chains)
    is_finite = jnp.isfinite(loss)
    return Evaluation(
        jnp.where(is_finite, loss, jnp.inf),
        jnp.where(is_finite, accuracy, 0.0),
        *count_calls(chains, problem.bank.num_layers),
    )


def _measure(problem: Problem, chains: Int[Array, "P L"], chunk_size: int | None) -> tuple[Array, Array]:
    """Loss `[P]` without price and accuracy `[P]`.

    A plain vmap of `_measure_sorted` would batch its loops, computing and copying whole blocks for the slowest
    population, and turn each layer call into one with gathered weights: 15 to 30 times slower for convolutions on CPU.
    """

    @jax.custom_batching.custom_vmap
    def measure(problem: Problem, chains: Array) -> tuple[Array, Array]:
        return _measure_sorted(problem, chains, chunk_size)

    @measure.def_vmap
    def _(axis_size: int, is_batched: Any, problem: Problem, chains: Array) -> Any:
        if not any(jax.tree.leaves(is_batched[0])):
            out = _measure(problem, chains.reshape(-1, chains.shape[-1]), chunk_size)
            return jax.tree.map(lambda a: a.reshape(axis_size, -1), out), (True, True)
        leaves, structure = jax.tree.flatten((problem, chains))
        flags = jax.tree.leaves(is_batched)

        def measure_one(batched: list[Array]) -> tuple[Array, Array]:
            rest = iter(batched)
            args = [next(rest) if flag else leaf for leaf, flag in zip(leaves, flags, strict=True)]
            problem, chains = jax.tree.unflatten(structure, args)
            return _measure(problem, chains, chunk_size)

        batched = [leaf for leaf, flag in zip(leaves, flags, strict=True) if flag]
        return jax.lax.map(measure_one, batched), (True, True)

    return measure(problem, chains)


def _sort(chains: Int[Array, "P L"], num_layers: int) -> tuple[Array, Array, Array, Array]:
    """Chains in the order of their tokens.

    Returns:
      order: `[P]`, places of the sorted chains in `chains`.
      chains: `[P, L]`, sorted.
      length: `[P]`, layers of each.
      first_new: `[P]`, the first slot in which each differs from the one before it; L where they are equal.
    """
    num_chains, num_slots = chains.shape
    *columns, order = jax.lax.sort(
        [*chains.T.astype(jnp.int32), jnp.arange(num_chains)], num_keys=num_slots, is_stable=True
    )
    chains = jnp.stack(columns, axis=1)
    is_new = jnp.concatenate([jnp.ones((1, num_slots), bool), chains[1:] != chains[:-1]])
    first_new = jnp.where(is_new.any(axis=1), jnp.argmax(is_new, axis=1), num_slots)
    return order, chains, chain_lib.count_layers(chains, num_layers), first_new


def _choose_chunk_size(hidden: Any, num_chains: int) -> int:
    if jax.default_backend() == "cpu":
        return 1
    # Two generations of nodes, parents and children, are alive at once.
    return max(1, min(num_chains, _BLOCK_BYTES // (2 * hidden.size * hidden.dtype.itemsize)))


def _measure_sorted(problem: Problem, chains: Int[Array, "P L"], chunk_size: int | None) -> tuple[Array, Array]:
    hidden = problem.bank.embed(problem.data.x)
    num_chains, num_slots = chains.shape
    chunk_size = min(chunk_size or _choose_chunk_size(hidden, num_chains), num_chains)
    order, chains, length, first_new = _sort(chains, problem.bank.num_layers)
    measure_fn = _measure_one_by_one if chunk_size == 1 else partial(_measure_in_blocks, chunk_size=chunk_size)
    loss, accuracy = measure_fn(problem, hidden, chains, length, first_new)
    # A chain equal to the one before it was not computed: it takes the results of the first of its run.
    run_start = jax.lax.cummax(jnp.where(first_new < num_slots, jnp.arange(num_chains), 0))
    source = jnp.zeros_like(run_start).at[order].set(run_start)
    return loss[source], accuracy[source]


def _measure_one_by_one(problem: Problem, hidden: Array, chains: Array, length: Array, first_new: Array) -> Any:
    """Loss and accuracy `[P]` of sorted chains, walking the tree of their prefixes depth first.

    Keeps only the activations along the current chain, `[L, B, ...F]`, which stay in the cache of a CPU.
    """
    bank = problem.bank
    num_chains, num_slots = chains.shape
    slots = jnp.arange(num_slots)[None]
    is_node = (slots >= first_new[:, None]) & (slots < length[:, None])
    nodes = jnp.nonzero(is_node.reshape(-1), size=is_node.size)[0]
    ends = jnp.nonzero(first_new <= length, size=num_chains + 1, fill_value=num_chains)[0]
    # Nodes that must be there before the head of each end can be called; none behind the last end.
    needs = jnp.append(jnp.cumsum(is_node.sum(axis=1)), is_node.size + 1)[ends]

    # Two flat loops, as a loop that carries the path without writing to it would copy it each time.
    def call_heads(num_done: Array, path: Array, end: Array, results: Any) -> tuple[Array, Any]:
        def call_head(carry: Any) -> Any:
            end, results = carry
            i = ends[end]
            measured = problem.measure(apply_token(bank.heads, chains[i, length[i]], path[length[i]]))
            return end + 1, jax.tree.map(lambda a, b: a.at[i].set(b), results, measured)

        return jax.lax.while_loop(lambda carry: needs[carry[0]] <= num_done, call_head, (end, results))

    def call_layer(n: Array, carry: Any) -> Any:
        path, end, results = carry
        i, t = jnp.divmod(nodes[n], num_slots)
        path = path.at[t + 1].set(apply_token(bank.layers, chains[i, t], path[t]))
        return path, *call_heads(n + 1, path, end, results)

    path = jnp.zeros((num_slots, *hidden.shape), hidden.dtype).at[0].set(hidden)
    carry = (path, *call_heads(jnp.array(0), path, jnp.array(0), _empty_results(problem, hidden, num_chains)))
    return jax.lax.fori_loop(0, is_node.sum(), call_layer, carry)[2]


def _empty_results(problem: Problem, hidden: Array, size: int) -> tuple[Array, Array]:
    measured = jax.eval_shape(lambda h: problem.measure(problem.bank.heads[0].apply(0, h)), hidden)
    return jax.tree.map(lambda a: jnp.zeros(size, a.dtype), measured)


def _measure_in_blocks(
    problem: Problem, hidden: Array, chains: Array, length: Array, first_new: Array, chunk_size: int
) -> Any:
    """Loss and accuracy `[P]` of sorted chains, `chunk_size` at a time, slot by slot, nodes vmapped."""
    num_chains, num_slots = chains.shape
    # Pad with the last chain again: it has no new node, so padding costs nothing.
    num_padding = -num_chains % chunk_size
    chains, length = (jnp.pad(a, [(0, num_padding)] + [(0, 0)] * (a.ndim - 1), mode="edge") for a in (chains, length))
    first_new = jnp.pad(first_new, (0, num_padding), constant_values=num_slots)
    blocks = [a.reshape(-1, chunk_size, *a.shape[1:]) for a in (chains, length, first_new)]
    path = jnp.zeros((num_slots, *hidden.shape), hidden.dtype)
    _, results = jax.lax.scan(partial(_measure_block, problem, hidden), path, blocks)
    return jax.tree.map(lambda a: a.reshape(-1)[:num_chains], results)


def _measure_block(problem: Problem, hidden: Array, path: Array, block: Any) -> tuple[Array, tuple[Array, Array]]:
    """Loss and accuracy `[C]` of one block.

    Args:
      problem: bank, split, loss.
      hidden: the input of all chains, `[B, ...F]`.
      path: activations after each slot of the last chain before this block, `[L, B, ...F]`.
      block: chains `[C, L]`, their lengths `[C]`, their first new slots `[C]`.
    """
    chains, length, first_new = block
    size, num_slots = chains.shape
    # Place 0 of a buffer holds the activation carried from the path, place n that of the n-th node of this block.
    empty = jnp.zeros((size + 1, *hidden.shape), hidden.dtype)

    def advance(carry: Any, slot: Any) -> Any:
        parents, parent_of, results = carry
        t, tokens, path_t = slot

        def call_layer(group: LayerGroup, member: Array, row: Array) -> Array:
            return group.apply(member, parents[parent_of[row]])

        def call_head(group: LayerGroup, member: Array, row: Array) -> tuple[Array, Array]:
            return problem.measure(group.apply(member, parents[parent_of[row]]))

        is_end = (length == t) & (first_new <= t)
        results = _map_nodes(problem.bank.heads, tokens, is_end, call_head, jnp.arange(size), results)
        is_node = (first_new <= t) & (t < length)
        child_of = jnp.cumsum(is_node)
        children = _map_nodes(problem.bank.layers, tokens, is_node, call_layer, child_of, empty.at[0].set(path_t))
        return (children, child_of, results), children[child_of[-1]]

    carry = (empty.at[0].set(hidden), jnp.zeros_like(length), _empty_results(problem, hidden, size))
    (_, _, results), path = jax.lax.scan(advance, carry, (jnp.arange(num_slots), chains.T, path))
    return path, results


def _map_nodes(
    groups: tuple[LayerGroup, ...],
    tokens: Int[Array, "C"],
    is_node: Bool[Array, "C"],
    run: Callable[[LayerGroup, Array, Array], Any],
    place: Int[Array, "C"],
    out: Any,
) -> Any:
    """`out` with `run(group, member, row)` written at `place[row]` for every row that is a node, group by group."""
    group_of, member_of = _locate(groups)
    size = tokens.shape[0]
    for i, group in enumerate(groups):
        is_mine = is_node & (group_of[tokens] == i)
        row = jnp.nonzero(is_mine, size=size, fill_value=size)[0]

        def write(out: Any, group: LayerGroup = group, row: Array = row) -> Any:
            new = jax.vmap(partial(run, group))(member_of[tokens[row]], row)
            to = place.at[row].get(mode="fill", fill_value=size + 1)
            return jax.tree.map(lambda a, b: a.at[to].set(b, mode="drop"), out, new)

        out = jax.lax.cond(is_mine.any(), write, lambda out: out, out)
    return out
