"""A plan that evaluates blocks of sorted chains, slot by slot, with batched calls."""

import enum
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from jchain._typing import Activations, Array, Bool, Int, PyTree
from jchain.arguments import check_at_least_one, check_fields, checked
from jchain.engine.head_calls import (
    empty_results,
    estimate_head_bytes,
    evaluate_heads,
    prepare_heads,
)
from jchain.engine.layer_calls import estimate_call_bytes, get_member_bytes, locate, nbytes
from jchain.engine.prefix_sharing import SortedChains, batch_rows, pad_to_multiple
from jchain.groups import LayerGroup
from jchain.modules.activations import make_buffer, put_row
from jchain.problem import Problem
from jchain.pytree import pick, vary_like

T = TypeVar("T")
_Results = tuple[Array, Array]
_CallFn = Callable[[PyTree], PyTree]


class Share(enum.Enum):
    """What the nodes of one batched call have in common.

    Attributes:
      LAYER: one layer has several inputs. Its weights are read once, and the batch is a single call
        on more examples.
      INPUT: several layers have the same input. The batch is a convolution of more channels, or a
        wider matrix product.
      NOTHING: several layers have one input each. Matrix products are batched, but convolutions
        become grouped convolutions, which are slow.
    """

    LAYER = "layer"
    INPUT = "input"
    NOTHING = "nothing"


@dataclass(frozen=True)
class Blocks:
    """A plan that evaluates sorted chains in blocks, slot by slot, with batched calls.

    The nodes of a slot are cut into batches, and each batch is one call.

    Attributes:
      block_size: the number of chains in a block. Activations of two slots of a block are kept in
        memory at a time.
      widths: the sizes of batches of nodes, ascending from 1, each a multiple of the previous one.
        Each size is compiled separately.
      share: what the nodes of a batch have in common.
      head_widths: the sizes of batches of head calls, which follow the same rules as `widths`.

    Raises:
      ValueError: if block_size is less than 1, or the widths do not follow these rules.
    """

    block_size: int
    widths: tuple[int, ...] = (1,)
    share: Share = Share.LAYER
    head_widths: tuple[int, ...] = (1,)

    def __post_init__(self) -> None:
        check_fields(self)
        check_at_least_one(block_size=self.block_size)
        for widths in (self.widths, self.head_widths):
            steps = pairwise(widths)
            if widths[:1] != (1,) or any(b <= a or b % a for a, b in steps):
                raise ValueError(
                    "expected widths that ascend from 1, each a multiple of the previous one, got "
                    f"{widths}"
                )

    @checked
    def count_bytes(self, problem: Problem, hidden: PyTree) -> int:
        """Estimate the size of activations and temporaries in bytes."""
        bank, size = problem.bank, nbytes(hidden)
        kept = 2 * (self.block_size + 1) + problem.max_layers + 2
        weights = 0 if self.share is Share.LAYER else max(map(get_member_bytes, bank.layers))
        # A call copies its input, and a batch of heads may be wider than a batch of layers.
        layers = self.widths[-1] * (estimate_call_bytes(bank.layers, hidden) + weights)
        width = self.head_widths[-1]
        heads = estimate_head_bytes(problem, hidden, width) + width * size
        return kept * size + max(layers, heads)

    @checked
    def evaluate(
        self, problem: Problem, hidden: Activations, population: SortedChains
    ) -> tuple[Array, Array]:
        """Compute loss, without the layer penalty, and accuracy of sorted chains, `[P]` each."""
        num_chains, num_slots = population.chains.shape
        size = min(self.block_size, num_chains)
        blocks = jax.tree.map(
            lambda a: a.reshape(-1, size, *a.shape[1:]), pad_to_multiple(population, size)
        )
        carry = _Activations(
            make_buffer((num_slots,), hidden),
            put_row(make_buffer((2 * (size + 1),), hidden), 0, hidden),
        )
        results = empty_results(problem, hidden, blocks.length.size)
        results = jax.tree.map(lambda a: a.reshape(-1, size), results)
        carry, results = vary_like((carry, results), problem, hidden, population)

        def run(i: Array, state: tuple[_Activations, _Results]) -> tuple[_Activations, _Results]:
            carry, results = state
            block = jax.tree.map(lambda a: a[i], blocks)
            carry, new = _evaluate_block(self, problem, hidden, carry, block)
            return carry, jax.tree.map(lambda a, b: a.at[i].set(b), results, new)

        # Blocks after the last new chain only repeat it.
        has_new = (blocks.first_new < num_slots).any(axis=1)
        num_blocks = jnp.max(jnp.where(has_new, jnp.arange(1, len(has_new) + 1), 0))
        _, results = jax.lax.fori_loop(0, num_blocks, run, (carry, results))
        return jax.tree.map(lambda a: a.reshape(-1)[:num_chains], results)


class _Activations(NamedTuple):
    """The activations that later slots and blocks read.

    The store has two generations of `C + 1` rows, for the inputs of a slot's calls and for their
    outputs. Row 0 of each generation belongs to the last chain of the previous block.
    """

    # leaves [L, B, ...F], activations after each slot of the last chain of the previous block
    path: PyTree
    store: PyTree  # leaves [2 * (C + 1), B, ...F]


class _Slot(NamedTuple):
    """One slot of all chains in a block."""

    tokens: Int[Array, "C"]
    input_of: Int[Array, "C"]  # row of each chain's input in its generation of the store
    first_input: Int[Array, ""]  # first row of the generation of inputs
    first_output: Int[Array, ""]  # first row of the generation of outputs


def _evaluate_block(
    plan: Blocks, problem: Problem, hidden: PyTree, carry: _Activations, block: SortedChains
) -> tuple[_Activations, _Results]:
    """Compute loss and accuracy, `[C]`, of a block whose chains start from `hidden`."""
    chains, length, first_new = block
    size, num_slots = chains.shape
    rows = jnp.arange(size)
    state = (
        carry._replace(store=put_row(carry.store, 0, hidden)),
        jnp.zeros_like(rows),
        empty_results(problem, hidden, size),
    )
    state = vary_like(state, carry)

    def advance(
        state: tuple[_Activations, Array, _Results], xs: tuple[Array, Array]
    ) -> tuple[tuple[_Activations, Array, _Results], None]:
        (path, store), input_of, results = state
        t, tokens = xs
        first_input = (t % 2) * (size + 1)
        slot = _Slot(tokens, input_of, first_input, size + 1 - first_input)

        is_end = (length == t) & (first_new <= t)
        carry = vary_like((store, empty_results(problem, hidden, size)), store)
        position, (store, values) = _call_heads(plan, problem, slot, is_end, carry)
        results = jax.tree.map(lambda a, b: jnp.where(is_end, b[position], a), results, values)

        is_node = (first_new <= t) & (t < length)
        position, store = _call_layers(plan, problem, slot, is_node, store)
        # A chain without a new node shares its prefix with the chain before it.
        latest = jax.lax.cummax(jnp.where(is_node, rows, -1))
        output_of = jnp.where(latest >= 0, position[latest] + 1, 0)
        store = put_row(store, slot.first_output, pick(path, t))
        path = put_row(path, t, pick(store, slot.first_output + output_of[-1]))
        return (_Activations(path, store), output_of, results), None

    (carry, _, results), _ = jax.lax.scan(advance, state, (jnp.arange(num_slots), chains.T))
    return carry, results


def _call_heads(
    plan: Blocks,
    problem: Problem,
    slot: _Slot,
    is_end: Bool[Array, "C"],
    carry: tuple[PyTree, _Results],
) -> tuple[Int[Array, "C"], tuple[PyTree, _Results]]:
    """Call the heads of the chains that end at this slot; see `_call_batches` for the result."""

    def call_head(
        carry: tuple[PyTree, _Results], call: _CallFn, start: Array, source: Array
    ) -> tuple[PyTree, _Results]:
        store, values = carry
        metrics = evaluate_heads(problem, call, pick(store, slot.first_input + source))
        values = jax.tree.map(
            lambda a, b: jax.lax.dynamic_update_slice(a, b, (start,)), values, metrics
        )
        # XLA would copy an array that a loop reads but never writes, here all activations. To avoid
        # this, write one number after the read, in a row that is overwritten later.
        return jax.tree.map(partial(_mark, slot.first_output, metrics[0][0]), store), values

    # A prefix is rarely followed by several heads, but many chains call the same head.
    share = Share.LAYER if plan.share is Share.INPUT else plan.share
    heads = prepare_heads(problem, pick(carry[0], 0))
    return _call_batches(plan.head_widths, share, heads, slot, is_end, call_head, carry)


def _mark(row: Int[Array, ""], number: Array, leaf: Array) -> Array:
    return _write_rows(leaf, jnp.reshape(number.astype(leaf.dtype), (1,) * leaf.ndim), row)


def _write_rows(leaf: Array, rows: Array, start: Array) -> Array:
    return jax.lax.dynamic_update_slice(leaf, rows, (start, *(0,) * (leaf.ndim - 1)))


def _call_layers(
    plan: Blocks, problem: Problem, slot: _Slot, is_node: Bool[Array, "C"], store: PyTree
) -> tuple[Int[Array, "C"], PyTree]:
    """Call the layers of this slot's nodes; see `_call_batches` for the result."""

    def call_layer(store: PyTree, call: _CallFn, start: Array, source: Array) -> PyTree:
        outputs, first = call(pick(store, slot.first_input + source)), slot.first_output + 1 + start
        return jax.tree.map(lambda leaf, rows: _write_rows(leaf, rows, first), store, outputs)

    return _call_batches(
        plan.widths, plan.share, problem.bank.layers, slot, is_node, call_layer, store
    )


def _call_batches(
    widths: tuple[int, ...],
    share: Share,
    groups: tuple[LayerGroup, ...],
    slot: _Slot,
    is_call: Bool[Array, "C"],
    update_fn: Callable[[T, _CallFn, Array, Array], T],
    carry: T,
) -> tuple[Int[Array, "C"], T]:
    """Update the carry with `carry = update_fn(carry, call, start, source)` for each batch.

    `call` maps the activations of `source` to the outputs of the batch. The activations are
    `[W, B, ...F]`, or `[B, ...F]` if all calls of the batch share one input, or pytrees of such
    arrays. `start` is the index of the batch's first call among all calls.

    Returns:
      The index of each row among all calls, and the last carry.
    """
    tokens, input_of = slot.tokens, slot.input_of
    group_of, member_of = locate(groups)
    group, member = group_of[tokens], member_of[tokens]
    keys = {Share.LAYER: member, Share.INPUT: input_of, Share.NOTHING: jnp.zeros_like(member)}
    widths = tuple(width for width in widths if width <= tokens.shape[0])
    batches = batch_rows(is_call, group, keys[share], len(groups), widths)
    for i, layers in enumerate(groups):
        for j, width in enumerate(widths):

            def run(
                n: Array,
                carry: T,
                layers: LayerGroup = layers,
                i: int = i,
                j: int = j,
                width: int = width,
            ) -> T:
                start = batches.starts[i][j][n]
                batch = jax.lax.dynamic_slice(batches.order, (start,), (width,))
                members, source = member[batch], input_of[batch]
                if share is Share.LAYER:
                    return update_fn(
                        carry, jax.vmap(partial(layers.apply, members[0])), start, source
                    )
                if share is Share.INPUT:
                    call = jax.vmap(layers.apply, in_axes=(0, None))
                    return update_fn(carry, partial(call, members), start, source[0])
                return update_fn(carry, partial(jax.vmap(layers.apply), members), start, source)

            carry = jax.lax.fori_loop(0, batches.counts[i][j], run, carry)
    return batches.position, carry
