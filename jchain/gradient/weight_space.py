"""Gradients of the loss with respect to layer weights, and first-order scores of swaps."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jchain._typing import Activations, Array, Bool, Float, Int, PyTree
from jchain.bank import Bank
from jchain.engine.layer_calls import locate
from jchain.gradient.linearize import (
    ForwardPass,
    Slot,
    flatten_rows,
    keeps_gradient,
    scan_backward,
)
from jchain.gradient.loss_predictor import compute_head_vjps
from jchain.groups import LayerGroup
from jchain.modules.activations import put_floating, take_floating
from jchain.problem import Problem
from jchain.pytree import pick


class _Carry(NamedTuple):
    """The state of the backward pass at the output of a slot."""

    # leaves [B, ...F], the gradient of the loss with respect to the output of the slot; None for
    # leaves without a gradient
    cotangent: PyTree
    is_known: Bool[Array, ""]  # False if the gradient was lost in a later layer


def only_group(bank: Bank) -> LayerGroup:
    """Return the only group of layers of a bank.

    Args:
      bank: the bank, whose layers must share one module.

    Raises:
      ValueError: if the layers have more than one module, because their weights then have no
        indices in common.
    """
    if len(bank.layers) != 1:
        raise ValueError(f"expected layers of one module, got {len(bank.layers)} modules")
    return bank.layers[0]


def flatten_gradients(
    problem: Problem, chain: Int[Array, "L"], forward: ForwardPass
) -> Float[Array, "L W"]:
    """Compute the gradient of the loss with respect to the weights of the layer at each slot.

    Args:
      problem: the bank, the split of data, and the loss. All layers must share one module.
      chain: the tokens of the chain, `[L]`.
      forward: the forward pass of the chain.

    Returns:
      The gradients, `[L, W]`: each row holds the leaves of a layer's gradient, flattened and
      concatenated. Rows are nan if the slot has no layer or its gradient is unknown.
    """

    def flatten(group: LayerGroup, own: PyTree, gradient: PyTree) -> Array:
        return jnp.concatenate([leaf.reshape(-1) for leaf in jax.tree.leaves(gradient)])

    return _scan_gradients(problem, chain, forward, flatten)


def score_swaps_by_weights(
    problem: Problem,
    chain: Int[Array, "L"],
    forward: ForwardPass,
    learning_rate: Float[Array, ""] | None = None,
) -> Float[Array, "L N"]:
    """Predict the change in loss when layer `b` replaces the layer at slot `t`.

    The score is `<dL/dW_t, W_b - W_t>`, without the layer penalty; nan if unknown.

    Args:
      problem: the bank, the split of data, and the loss.
      chain: the tokens of the chain, `[L]`.
      forward: the forward pass of the chain.
      learning_rate: the step size in the additional term `|W_b - W_t|^2 / (2 learning_rate)`; None
        to leave this term out.
    """
    dtypes = [leaf.dtype for leaf in jax.tree.leaves(take_floating(forward.hidden))]
    dtype = jnp.result_type(jnp.float32, *dtypes)

    def multiply(changes: Array, gradient: Array) -> Float[Array, "n"]:
        return jnp.matmul(flatten_rows(changes), gradient.reshape(-1), preferred_element_type=dtype)

    def score(group: LayerGroup, own: PyTree, gradient: PyTree) -> Float[Array, "N"]:
        changes = jax.tree.map(lambda stacked, leaf: stacked - leaf[None], group.params, own)
        scores = sum(jax.tree.leaves(jax.tree.map(multiply, changes, gradient)))
        if learning_rate is not None:
            squares = sum(
                jnp.sum(flatten_rows(c).astype(dtype) ** 2, axis=1)
                for c in jax.tree.leaves(changes)
            )
            scores += squares / (2 * learning_rate)
        unknown = jnp.full(problem.bank.num_layers, jnp.nan, dtype)
        return unknown.at[jnp.array(group.tokens)].set(scores)

    swap = _scan_gradients(problem, chain, forward, score)
    is_layer = jnp.arange(chain.size) < forward.length
    is_own = is_layer[:, None] & (jnp.arange(problem.bank.num_layers)[None] == chain[:, None])
    return jnp.where(is_own, 0.0, swap)


def _scan_gradients(
    problem: Problem,
    chain: Int[Array, "L"],
    forward: ForwardPass,
    read_fn: Callable[[LayerGroup, PyTree, PyTree], Array],
) -> Float[Array, "L ..."]:
    """Return `read_fn(group, weights, gradient)` at each slot, or nan if it is unknown."""
    bank = problem.bank
    cotangent = pick(compute_head_vjps(problem, chain, forward, "activations", None)[1], 0)
    group_of, member_of = locate(bank.layers)

    def visit_group(
        group: LayerGroup, token: Array, hidden: Activations, after: PyTree
    ) -> tuple[PyTree, Array]:
        own = pick(group.params, member_of[token])

        def apply(params: PyTree, floating: PyTree) -> PyTree:
            outputs = group.apply_params(member_of[token], params, put_floating(hidden, floating))
            return take_floating(outputs)

        gradient, before = jax.vjp(apply, own, take_floating(hidden))[1](after)
        return before, read_fn(group, own, gradient)

    def step(carry: _Carry, slot: Slot) -> tuple[_Carry, Array]:
        branches = [partial(visit_group, group) for group in bank.layers]
        before, scores = jax.lax.switch(
            group_of[slot.token], branches, slot.token, slot.before, carry.cotangent
        )
        is_known_before = carry.is_known & keeps_gradient(before, carry.cotangent)
        return _Carry(before, is_known_before), jnp.where(carry.is_known, scores, jnp.nan)

    last = _Carry(cotangent, jnp.array(True))
    return scan_backward(step, last, chain, forward, forward.length)
