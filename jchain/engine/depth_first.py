"""A plan that makes one layer call at a time and keeps the activations of one chain in memory."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jchain._typing import Activations, Array, Float, Int, PyTree
from jchain.arguments import checked
from jchain.engine.head_calls import (
    empty_results,
    estimate_head_bytes,
    evaluate_heads,
    prepare_heads,
)
from jchain.engine.layer_calls import apply_token, estimate_call_bytes, nbytes
from jchain.engine.prefix_sharing import SortedChains
from jchain.modules.activations import make_buffer, put_row
from jchain.problem import Problem
from jchain.pytree import pick, vary_like

_Results = tuple[Array, Array]


@dataclass(frozen=True)
class DepthFirst:
    """A plan that makes one layer call at a time, depth first in the tree of prefixes."""

    @checked
    def count_bytes(self, problem: Problem, hidden: PyTree) -> int:
        """Estimate the size of activations and temporaries in bytes."""
        call = max(
            estimate_call_bytes(problem.bank.layers, hidden),
            estimate_head_bytes(problem, hidden, 1),
        )
        return (problem.max_layers + 2) * nbytes(hidden) + call

    @checked
    def evaluate(
        self, problem: Problem, hidden: Activations, population: SortedChains
    ) -> tuple[Array, Array]:
        """Compute loss, without the layer penalty, and accuracy of sorted chains, `[P]` each."""
        order = _compute_order(population)
        chains, length, _ = population
        heads = prepare_heads(problem, hidden)

        # The loop that calls heads does not carry the path. In each of its iterations, XLA would
        # copy an array that the loop carries without writing to it.
        def call_head(end: Array, path: PyTree, results: _Results) -> _Results:
            i = order.ends[end]
            call = jax.vmap(partial(apply_token, heads, chains[i, length[i]]))
            hidden = jax.tree.map(lambda leaf: leaf[length[i]][None], path)
            metrics = evaluate_heads(problem, call, hidden)
            return jax.tree.map(lambda a, b: a.at[i].set(b[0]), results, metrics)

        def call_layer(n: Array, carry: _Carry) -> _Carry:
            i, t = jnp.divmod(order.nodes[n], chains.shape[1])
            hidden = apply_token(problem.bank.layers, chains[i, t], pick(carry.path, t))
            path = put_row(carry.path, t + 1, hidden)
            return _call_ready_heads(order, n + 1, carry._replace(path=path), call_head)

        carry = _Carry(
            put_row(make_buffer((chains.shape[1],), hidden), 0, hidden),
            jnp.array(0),
            empty_results(problem, hidden, chains.shape[0]),
        )
        carry = vary_like(carry, problem, hidden, population)
        carry = _call_ready_heads(order, jnp.array(0), carry, call_head)
        return jax.lax.fori_loop(0, order.num_nodes, call_layer, carry).results


class _Order(NamedTuple):
    """The order of the layer calls and the head calls."""

    nodes: Int[Array, "M"]  # [P * L], index of each node in the flat chains; padded with zeros
    num_nodes: Int[Array, ""]
    ends: Int[Array, "E"]  # [P + 1], indices of the distinct chains; padded with P
    # [P + 1], number of layer calls before the head call of each distinct chain; in the padding,
    # larger than the number of all layer calls
    num_before: Int[Array, "E"]


class _Carry(NamedTuple):
    """The state after some layer calls."""

    path: PyTree  # leaves [L, B, ...F], the inputs of each slot of one chain
    end: Int[Array, ""]  # number of head calls so far
    results: tuple[Float[Array, "P"], Float[Array, "P"]]  # loss and accuracy, [P] each


def _compute_order(population: SortedChains) -> _Order:
    chains, length, first_new = population
    num_chains, num_slots = chains.shape
    slots = jnp.arange(num_slots)[None]
    is_node = (slots >= first_new[:, None]) & (slots < length[:, None])
    nodes = jnp.nonzero(is_node.reshape(-1), size=is_node.size)[0]
    ends = jnp.nonzero(first_new <= length, size=num_chains + 1, fill_value=num_chains)[0]
    num_before = jnp.append(jnp.cumsum(is_node.sum(axis=1)), is_node.size + 1)[ends]
    return _Order(nodes, is_node.sum(), ends, num_before)


def _call_ready_heads(
    order: _Order,
    num_done: Int[Array, ""],
    carry: _Carry,
    call_head: Callable[[Array, Array, _Results], _Results],
) -> _Carry:
    """Call the head of each chain whose last layer is among the first `num_done` layer calls."""
    path = carry.path

    def call(state: tuple[Array, _Results]) -> tuple[Array, _Results]:
        end, results = state
        return end + 1, call_head(end, path, results)

    end, results = jax.lax.while_loop(
        lambda state: order.num_before[state[0]] <= num_done, call, (carry.end, carry.results)
    )
    return _Carry(path, end, results)
