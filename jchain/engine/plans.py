"""How the calls of a population are made: the plans, and the choice between them.

Each plan makes every distinct call once and keeps a bounded number of activations, whatever the number of chains. They
give the same losses up to the order of sums.
"""

import enum
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from jchain._typing import Array, Bool, Int
from jchain.engine.backend import default_memory_limit
from jchain.engine.layer_calls import (
    apply_token,
    count_convolutions,
    evaluate_heads,
    find_call_bytes,
    find_head_bytes,
    find_member_bytes,
    find_outputs,
    locate,
    nbytes,
)
from jchain.engine.prefix_sharing import SortedChains, batch_rows, pad_to_multiple
from jchain.groups import LayerGroup
from jchain.problem import Problem

# On CPU. Activations that should stay in the cache: those of one call, those that a batch of heads reads, and those of a
# block, in bytes.
_CALL_CACHE, _HEAD_CACHE, _BLOCK_CACHE = 2**20, 2**21, 2**24
_MAX_CPU_BLOCK = 64
_MIN_CPU_WIDTH = 8  # narrower batches gain nothing over single calls
_SIBLINGS = (1, 2, 8)
# Elsewhere. Activations (or gathered weights) of one call that fill the device, in bytes, and the most nodes in a call.
_CALL_FILL, _MAX_WIDTH = 2**26, 256


@runtime_checkable
class Plan(Protocol):
    """How calls are made. Hashable, as it is part of the program."""

    def count_bytes(self, problem: Problem, hidden: Any) -> int:
        """Activations and temporaries, in bytes, for layers that read `hidden`; an estimate."""
        ...

    def measure(
        self, problem: Problem, hidden: Array, population: SortedChains
    ) -> tuple[Array, Array]:
        """Loss, without price, and accuracy of sorted chains, `[P]`; anything where a chain equals the one before."""
        ...


@dataclass(frozen=True)
class Walk:
    """One plain layer call at a time, depth first: keeps the activations along one chain."""

    def count_bytes(self, problem: Problem, hidden: Any) -> int:
        call = max(
            find_call_bytes(problem.bank.layers, hidden), find_head_bytes(problem, hidden, 1)
        )
        return (problem.max_layers + 2) * nbytes(hidden) + call

    def measure(
        self, problem: Problem, hidden: Array, population: SortedChains
    ) -> tuple[Array, Array]:
        return _walk(problem, hidden, population)


class Share(enum.Enum):
    """What the nodes of one call have in common."""

    LAYER = "layer"  # one layer on several inputs: its weights are read once, the call is one on more examples
    PARENT = (
        "parent"  # several layers on one input: a convolution of more channels, a wider product
    )
    NOTHING = "nothing"  # several layers on as many inputs: batched products, but grouped convolutions, which are slow


@dataclass(frozen=True)
class Blocks:
    """Blocks of sorted chains, slot by slot: the nodes of a slot in batches, each one call.

    Attributes:
      block_size: chains that are worked off together; two generations of their activations are kept.
      widths: nodes in one call, ascending from 1, each a multiple of the one before: one program for each.
      share: what the nodes of a batch have in common.
      head_widths: chains in one call of a head, as `widths`.
    """

    block_size: int
    widths: tuple[int, ...] = (1,)
    share: Share = Share.LAYER
    head_widths: tuple[int, ...] = (1,)

    def __post_init__(self) -> None:
        if self.block_size < 1:
            raise ValueError(f"expected a block_size of at least 1, got {self.block_size}")
        for widths in (self.widths, self.head_widths):
            steps = pairwise(widths)
            if widths[:1] != (1,) or any(b <= a or b % a for a, b in steps):
                raise ValueError(
                    f"expected widths that ascend from 1, each a multiple of the one before, got {widths}"
                )

    def count_bytes(self, problem: Problem, hidden: Any) -> int:
        bank, size = problem.bank, nbytes(hidden)
        kept = 2 * (self.block_size + 1) + problem.max_layers + 2
        weights = 0 if self.share is Share.LAYER else max(map(find_member_bytes, bank.layers))
        # A call copies what it reads, and a batch of heads may be wider than one of layers.
        layers = self.widths[-1] * (find_call_bytes(bank.layers, hidden) + weights)
        width = self.head_widths[-1]
        heads = find_head_bytes(problem, hidden, width) + width * size
        return kept * size + max(layers, heads)

    def measure(
        self, problem: Problem, hidden: Array, population: SortedChains
    ) -> tuple[Array, Array]:
        return _measure_blocks(self, problem, hidden, population)


def choose_plan(
    problem: Problem, hidden: Any, num_chains: int, memory_limit: int | None, backend: str
) -> Plan:
    """The plan that should be fastest for these shapes within the limit.

    On CPU one call of a larger layer keeps the cores busy; smaller ones are batched as far as the cache goes, convolutions
    by what they read, the rest by layer where the bank is small enough for layers to repeat in a block. Layers of several
    convolutions are called one at a time. Elsewhere calls are made wide enough to fill the device: convolutions by layer,
    the rest with gathered weights.

    Args:
      problem: bank, split, loss.
      hidden: what the layers read; only its shape and dtype are looked at.
      num_chains: P.
      memory_limit: bytes for activations and temporaries; a quarter of the device's memory when None.
      backend: the platform, as `jax.default_backend()` names it.

    Raises:
      ValueError: not even one node at a time fits.
    """
    limit = default_memory_limit() if memory_limit is None else memory_limit
    size = nbytes(hidden)
    smallest = Walk().count_bytes(problem, hidden)
    if limit < smallest:
        raise ValueError(
            f"memory_limit is too small: expected at least {smallest:,} bytes, which one node at a time needs with "
            f"activations of {size:,} bytes along {problem.max_layers} layers, got {limit:,}"
        )
    most_convolutions = max(count_convolutions(group, hidden) for group in problem.bank.layers)
    has_convolution = most_convolutions > 0
    if backend == "cpu":
        block_size = min(_MAX_CPU_BLOCK, _BLOCK_CACHE // (2 * size))
        # Siblings make one convolution of more channels, whatever the number of layers in the bank.
        share = Share.PARENT if has_convolution else Share.LAYER
        width = min(16, _CALL_CACHE // size)
        widths = (
            _SIBLINGS if has_convolution else _ladder(width) if width >= _MIN_CPU_WIDTH else (1,)
        )
        if most_convolutions > 1:
            # Siblings share the input of the first alone, and grouped convolutions take two to five times as long.
            widths = (1,)
        head_widths = _ladder(
            min(16, _HEAD_CACHE // max(size, nbytes(find_outputs(problem, hidden))))
        )
        least = _SIBLINGS[-1] if has_convolution else 2 * problem.bank.num_layers
    else:
        block_size, least = num_chains, 1
        share = Share.LAYER if has_convolution else Share.NOTHING
        weights = 0 if has_convolution else max(map(find_member_bytes, problem.bank.layers))
        widths = _ladder(min(_MAX_WIDTH, _CALL_FILL // max(size, weights)))
        head_widths = widths
    block_size = _floor_power_of_2(min(block_size, num_chains))
    while block_size >= max(least, 2):
        if len(widths) == 1:
            break
        fitting, head_fitting = (
            tuple(w for w in ws if w <= block_size) for ws in (widths, head_widths)
        )
        plan = Blocks(block_size, fitting, share, head_fitting)
        if plan.count_bytes(problem, hidden) <= limit:
            return plan
        block_size //= 2
    return Walk()


def choose_chunk(num_layers: int, hidden: Any, backend: str) -> int:
    """How many layers are called together on one input that they share."""
    widest = _SIBLINGS[-1] if backend == "cpu" else min(_MAX_WIDTH, _CALL_FILL // nbytes(hidden))
    return max(1, min(num_layers, widest))


def _ladder(most: int) -> tuple[int, ...]:
    """Widths from 1 to the largest power of two that is at most `most`, four times apart but for the first step."""
    widths, width = [], _floor_power_of_2(most)
    while width > 1:
        widths.append(width)
        width //= 4
    return (1, *reversed(widths))


def _floor_power_of_2(number: int) -> int:
    return 1 << (max(1, number).bit_length() - 1)


def _empty_results(problem: Problem, hidden: Array, size: int) -> tuple[Array, Array]:
    measured = jax.eval_shape(
        lambda h: problem.compute_metrics(problem.bank.heads[0].apply(0, h)), hidden
    )
    return jax.tree.map(lambda a: jnp.zeros(size, a.dtype), measured)


def _walk(problem: Problem, hidden: Array, population: SortedChains) -> tuple[Array, Array]:
    bank, (chains, length, first_new) = problem.bank, population
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
            call = jax.vmap(partial(apply_token, bank.heads, chains[i, length[i]]))
            measured = evaluate_heads(problem, call, path[length[i]][None])
            return end + 1, jax.tree.map(lambda a, b: a.at[i].set(b[0]), results, measured)

        return jax.lax.while_loop(
            lambda carry: needs[carry[0]] <= num_done, call_head, (end, results)
        )

    def call_layer(n: Array, carry: Any) -> Any:
        path, end, results = carry
        i, t = jnp.divmod(nodes[n], num_slots)
        path = path.at[t + 1].set(apply_token(bank.layers, chains[i, t], path[t]))
        return path, *call_heads(n + 1, path, end, results)

    path = jnp.zeros((num_slots, *hidden.shape), hidden.dtype).at[0].set(hidden)
    carry = (
        path,
        *call_heads(jnp.array(0), path, jnp.array(0), _empty_results(problem, hidden, num_chains)),
    )
    return jax.lax.fori_loop(0, is_node.sum(), call_layer, carry)[2]


def _measure_blocks(
    plan: Blocks, problem: Problem, hidden: Array, population: SortedChains
) -> tuple[Array, Array]:
    num_chains, num_slots = population.chains.shape
    size = min(plan.block_size, num_chains)
    blocks = [a.reshape(-1, size, *a.shape[1:]) for a in pad_to_multiple(population, size)]
    path = jnp.zeros((num_slots, *hidden.shape), hidden.dtype)
    # Two generations of activations. Row 0 of each is that of the last chain of the block before.
    store = jnp.zeros((2 * (size + 1), *hidden.shape), hidden.dtype).at[0].set(hidden)
    _, results = jax.lax.scan(partial(_measure_block, plan, problem, hidden), (path, store), blocks)
    return jax.tree.map(lambda a: a.reshape(-1)[:num_chains], results)


def _measure_block(
    plan: Blocks, problem: Problem, hidden: Array, carry: Any, block: Any
) -> tuple[Any, Any]:
    """Loss and accuracy `[C]` of one block.

    Args:
      plan: widths and what batches share.
      problem: bank, split, loss.
      hidden: the input of all chains, `[B, ...F]`.
      carry: activations after each slot of the last chain before this block, `[L, B, ...F]`, and the store, two
        generations of `C + 1` rows each, of which row 0 belongs to that chain.
      block: chains `[C, L]`, their lengths `[C]`, their first new slots `[C]`.
    """
    path, store = carry
    chains, length, first_new = block
    size, num_slots = chains.shape
    rows = jnp.arange(size)
    # Few heads are called for the same chain, but the same head for many.
    head_share = Share.LAYER if plan.share is Share.PARENT else plan.share

    def advance(carry: Any, slot: Any) -> Any:
        path, store, parent_of, results = carry
        t, tokens = slot
        parents = (t % 2) * (size + 1)
        children = size + 1 - parents
        origin = (0,) * hidden.ndim

        def call_head(carry: Any, call: Callable, start: Array, parent: Array) -> Any:
            store, values = carry
            measured = evaluate_heads(problem, call, store[parents + parent])
            values = jax.tree.map(
                lambda a, b: jax.lax.dynamic_update_slice(a, b, (start,)), values, measured
            )
            # XLA copies what a loop reads and never writes, here all activations: so write one number, after they are
            # read, in a row that is set below.
            mark = jnp.reshape(measured[0][0].astype(store.dtype), (1, *(1 for _ in origin)))
            return jax.lax.dynamic_update_slice(store, mark, (children, *origin)), values

        def call_layer(store: Array, call: Callable, start: Array, parent: Array) -> Array:
            made = call(store[parents + parent])
            return jax.lax.dynamic_update_slice(store, made, (children + 1 + start, *origin))

        is_end = (length == t) & (first_new <= t)
        carry = (store, _empty_results(problem, hidden, size))
        position, (store, values) = _call_batches(
            plan.head_widths,
            head_share,
            problem.bank.heads,
            tokens,
            parent_of,
            is_end,
            call_head,
            carry,
        )
        results = jax.tree.map(lambda a, b: jnp.where(is_end, b[position], a), results, values)

        is_node = (first_new <= t) & (t < length)
        position, store = _call_batches(
            plan.widths,
            plan.share,
            problem.bank.layers,
            tokens,
            parent_of,
            is_node,
            call_layer,
            store,
        )
        # A row without a new node goes on from that of the row before.
        latest = jax.lax.cummax(jnp.where(is_node, rows, -1))
        child_of = jnp.where(latest >= 0, position[latest] + 1, 0)
        store = store.at[children].set(path[t])
        path = path.at[t].set(store[children + child_of[-1]])
        return (path, store, child_of, results), None

    carry = (
        path,
        store.at[0].set(hidden),
        jnp.zeros_like(rows),
        _empty_results(problem, hidden, size),
    )
    (path, store, _, results), _ = jax.lax.scan(advance, carry, (jnp.arange(num_slots), chains.T))
    return (path, store), results


def _call_batches(
    widths: tuple[int, ...],
    share: Share,
    groups: tuple[LayerGroup, ...],
    tokens: Int[Array, "C"],
    parent_of: Int[Array, "C"],
    is_call: Bool[Array, "C"],
    use: Callable[[Any, Callable, Array, Array], Any],
    carry: Any,
) -> tuple[Int[Array, "C"], Any]:
    """`carry = use(carry, call, start, parent)` for each batch.

    `call` maps the activations of `parent`, `[W, B, ...F]` or where it is shared `[B, ...F]`, to those of the batch.

    Returns:
      The place of each row among all calls, of which `start` is that of a batch's first, and the last carry.
    """
    group_of, member_of = locate(groups)
    group, member = group_of[tokens], member_of[tokens]
    shared = {Share.LAYER: member, Share.PARENT: parent_of, Share.NOTHING: jnp.zeros_like(member)}[
        share
    ]
    widths = tuple(width for width in widths if width <= tokens.shape[0])
    batches = batch_rows(is_call, group, shared, len(groups), widths)
    for i, layers in enumerate(groups):
        for j, width in enumerate(widths):

            def run(
                n: Array,
                carry: Any,
                layers: LayerGroup = layers,
                i: int = i,
                j: int = j,
                width: int = width,
            ) -> Any:
                start = batches.starts[i][j][n]
                batch = jax.lax.dynamic_slice(batches.order, (start,), (width,))
                members, parent = member[batch], parent_of[batch]
                if share is Share.LAYER:
                    return use(carry, jax.vmap(partial(layers.apply, members[0])), start, parent)
                if share is Share.PARENT:
                    call = jax.vmap(layers.apply, in_axes=(0, None))
                    return use(carry, partial(call, members), start, parent[0])
                return use(carry, partial(jax.vmap(layers.apply), members), start, parent)

            carry = jax.lax.fori_loop(0, batches.counts[i][j], run, carry)
    return batches.position, carry
