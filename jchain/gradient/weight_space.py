"""Weight space: the gradient of the loss by the weights of a chain's layers, and swaps scored to first order in them."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jchain._typing import Array, Float, Int
from jchain.bank import Bank
from jchain.engine.layer_calls import locate
from jchain.gradient.linearize import Forward, flatten_rows, full_nan, has_gradient, pull_head
from jchain.groups import LayerGroup
from jchain.problem import Problem


def only_group(bank: Bank) -> LayerGroup:
    """The group of all layers.

    Raises:
      ValueError: they are of several modules, whose weights have no indices in common.
    """
    if len(bank.layers) != 1:
        raise ValueError(f"expected layers of one module, got {len(bank.layers)}")
    return bank.layers[0]


def flatten_gradients(
    problem: Problem, chain: Int[Array, "L"], forward: Forward
) -> Float[Array, "L W"]:
    """The gradient of the loss by the weights of the layer at each slot, its leaves flattened one behind the other.

    All layers share a module; nan where nothing is known.
    """

    def flatten(group: LayerGroup, own: Any, gradient: Any) -> Array:
        return jnp.concatenate([leaf.reshape(-1) for leaf in jax.tree.leaves(gradient)])

    return _go_back(problem, chain, forward, flatten)


def score_swaps(
    problem: Problem,
    chain: Int[Array, "L"],
    forward: Forward,
    learning_rate: Float[Array, ""] | None = None,
) -> Float[Array, "L N"]:
    """`<dL/dW_t, W_b - W_t>`; with a learning rate plus `|W_b - W_t|^2 / (2 learning_rate)`; nan where nothing is known."""

    dtype = jnp.promote_types(jnp.float32, forward.hidden.dtype)

    def multiply(changes: Array, gradient: Array) -> Float[Array, "n"]:
        return jnp.matmul(flatten_rows(changes), gradient.reshape(-1), preferred_element_type=dtype)

    def score(group: LayerGroup, own: Any, gradient: Any) -> Float[Array, "N"]:
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

    swap = _go_back(problem, chain, forward, score)
    is_layer = jnp.arange(chain.size) < forward.length
    is_own = is_layer[:, None] & (jnp.arange(problem.bank.num_layers)[None] == chain[:, None])
    return jnp.where(is_own, 0.0, swap)


def _go_back(
    problem: Problem,
    chain: Int[Array, "L"],
    forward: Forward,
    read: Callable[[LayerGroup, Any, Any], Array],
) -> Float[Array, "L ..."]:
    """What `read` makes of the group, the weights and the loss's gradient of the layer at each slot; nan where nothing is known."""
    bank, length = problem.bank, forward.length
    (row,) = pull_head(problem, chain, forward, "activations", None)[1]
    group_of, member_of = locate(bank.layers)

    def visit_group(
        group: LayerGroup, token: Array, hidden: Array, row: Array
    ) -> tuple[Array, Array]:
        own = jax.tree.map(lambda leaf: leaf[member_of[token]], group.params)
        back = jax.vjp(lambda params, h: group.module.apply({"params": params}, h), own, hidden)[1]
        gradient, before = back(row)
        return before, read(group, own, gradient)

    def visit(carry: Any, slot: Any) -> Any:
        row, is_known = carry
        _, token, hidden = slot
        branches = [partial(visit_group, group) for group in bank.layers]
        before, made = jax.lax.switch(group_of[token], branches, token, hidden, row)
        is_known_before = is_known & has_gradient(before, row)
        return (before, is_known_before), jnp.where(is_known, made, jnp.nan)

    def skip(carry: Any, slot: Any) -> Any:
        return carry, full_nan(jax.eval_shape(visit, carry, slot)[1])

    def go_back(carry: Any, slot: Any) -> Any:
        return jax.lax.cond(slot[0] < length, visit, skip, carry, slot)

    slots = jnp.arange(chain.size), chain, forward.hidden
    return jax.lax.scan(go_back, (row, jnp.array(True)), slots, reverse=True)[1]
