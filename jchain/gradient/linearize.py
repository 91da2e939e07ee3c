"""The forward pass of a chain, a backward scan over its slots, and scores of layers at a slot."""

import functools
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from jchain import env
from jchain._typing import Activations, Array, Bool, Float, Int, PyTree, Shaped
from jchain.bank import Bank
from jchain.chain import ChainsLike
from jchain.engine.layer_calls import apply_token
from jchain.groups import LayerGroup
from jchain.problem import Problem
from jchain.pytree import is_concrete
from jchain.tokens import check_tokens

C = TypeVar("C")
T = TypeVar("T")


class ForwardPass(NamedTuple):
    """The activations and losses of one chain."""

    length: Int[Array, ""]  # number of layers
    hidden: PyTree  # leaves [L, B, ...F], the input of each slot
    loss: Float[Array, ""]  # the loss of the chain, without the layer penalty
    heads: Float[Array, "K"]  # [K], the loss with each head, without the layer penalty


class Slot(NamedTuple):
    """One slot of a chain in a backward scan."""

    position: Int[Array, ""]
    token: Int[Array, ""]
    before: Activations  # [B, ...F], the input of the slot, or a pytree of such arrays
    after: Activations  # its output


def check_chain(problem: Problem, chain: ChainsLike) -> Int[Array, "L"]:
    """Return one chain of a problem as an array.

    Args:
      problem: the problem, whose bank and `max_layers` define which chains are valid.
      chain: the tokens of the chain, `[L]`. They are checked unless they are traced.

    Raises:
      ValueError: if the chain is invalid for this bank, or its number of slots is not
        `max_layers + 1`.
    """
    if is_concrete(chain):
        chain = problem.space.validate(chain)
    tokens = jnp.asarray(chain)
    if tokens.shape != (problem.max_layers + 1,):
        raise ValueError(
            f"expected one chain of shape [{problem.max_layers + 1}], got {list(tokens.shape)}"
        )
    return tokens


def forward_pass(problem: Problem, chain: Int[Array, "L"]) -> ForwardPass:
    """Apply a chain to the split.

    This costs one layer call per layer.

    Args:
      problem: the bank, the split of data, and the loss.
      chain: the tokens of the chain, `[L]`.
    """
    bank = problem.bank
    length = problem.space.count_layers(chain)

    def apply(hidden: PyTree, slot: tuple[Array, Array]) -> tuple[PyTree, PyTree]:
        index, token = slot
        outputs = jax.lax.cond(
            index < length, partial(apply_token, bank.layers), lambda _, h: h, token, hidden
        )
        return outputs, hidden

    last, hidden = jax.lax.scan(apply, bank.embed(problem.data.x), (jnp.arange(chain.size), chain))
    losses = env.head_losses(problem, last)
    return ForwardPass(length, hidden, losses[chain[length] - bank.num_layers], losses)


def scan_backward(
    step_fn: Callable[[C, Slot], tuple[C, T]],
    init: C,
    chain: Int[Array, "L"],
    forward: ForwardPass,
    num_slots: Int[Array, ""],
) -> T:
    """Scan over the first `num_slots` slots of a chain, from the last to the first.

    Args:
      step_fn: a function `(carry, slot) -> (carry, output)`. The carry must keep its structure,
        shapes, and dtypes.
      init: the carry at the start of the scan, which is at the last of these slots.
      chain: the tokens of the chain, `[L]`.
      forward: the forward pass of the chain.
      num_slots: the number of slots to visit. The other slots leave the carry unchanged, and their
        outputs are nan, or 0 for integers.

    Returns:
      The outputs of all slots, stacked along a leading axis `L`.
    """

    def visit(carry: C, slot: Slot) -> tuple[C, T]:
        return jax.lax.cond(slot.position < num_slots, step_fn, skip, carry, slot)

    def skip(carry: C, slot: Slot) -> tuple[C, T]:
        return carry, jax.tree.map(full_nan, jax.eval_shape(step_fn, carry, slot)[1])

    after = jax.tree.map(lambda leaf: jnp.concatenate([leaf[1:], leaf[-1:]]), forward.hidden)
    slots = Slot(jnp.arange(chain.size), chain, forward.hidden, after)
    return jax.lax.scan(visit, init, slots, reverse=True)[1]


def all_members(bank: Bank) -> tuple[Int[Array, "_"], ...]:
    """Return the indices of all layers within each group of a bank's layers.

    Args:
      bank: the bank with the layers.
    """
    return tuple(jnp.arange(len(group.tokens)) for group in bank.layers)


def find_members(bank: Bank, tokens: Sequence[int] | None) -> tuple[Int[Array, "_"], ...]:
    """Return the indices of some layers within each group of a bank's layers.

    Args:
      bank: the bank with the layers.
      tokens: the tokens of the layers; None for all layers.

    Raises:
      ValueError: if there is no token, or a token is not a layer or repeats.
    """
    if tokens is None:
        return all_members(bank)
    check_tokens(tokens, range(bank.num_layers), "layer")
    return tuple(
        jnp.array([group.tokens.index(t) for t in tokens if t in group.tokens], jnp.int32)
        for group in bank.layers
    )


def map_layers(
    score: Callable[[PyTree], T],
    bank: Bank,
    members: tuple[Int[Array, "_"], ...],
    hidden: Activations,
    chunk: int,
) -> T:
    """Score the output of each layer for one input.

    Args:
      score: a function from the output of one layer, which is like `hidden`, to a pytree of floats.
      bank: the bank with the layers.
      members: for each group of the bank's layers, the indices within the group of the layers to
        score.
      hidden: the input of the layers, `[B, ...F]`, or a pytree of such arrays.
      chunk: the number of layers that are applied at the same time.

    Returns:
      The scores with a leading axis `N`, in the order of tokens; nan for layers that are not in
      `members`.
    """

    def score_group(group: LayerGroup, indices: Array) -> tuple[Array, T]:
        scores = jax.lax.map(
            lambda index: score(group.apply(index, hidden)), indices, batch_size=chunk
        )
        return jnp.asarray(group.tokens)[indices], scores

    parts = [
        score_group(group, indices)
        for group, indices in zip(bank.layers, members, strict=True)
        if indices.shape[0]
    ]
    tokens = jnp.concatenate([part[0] for part in parts])
    return jax.tree.map(
        lambda *scores: (
            jnp.full((bank.num_layers, *scores[0].shape[1:]), jnp.nan, scores[0].dtype)
            .at[tokens]
            .set(jnp.concatenate(scores))
        ),
        *(part[1] for part in parts),
    )


def full_nan(shape: jax.ShapeDtypeStruct) -> Array:
    """Return an array of nan, or of 0 for integers, with the given shape and dtype."""
    return jnp.full(
        shape.shape, jnp.nan if jnp.issubdtype(shape.dtype, jnp.floating) else 0, shape.dtype
    )


def keeps_gradient(before: PyTree, after: PyTree) -> Bool[Array, ""]:
    """Return whether a layer passes its gradient on to its input.

    It does not if the vector-Jacobian products at its input are all 0, but the cotangents at its
    output are not. Scores before such a layer would be 0, which is wrong.

    Args:
      before: the vector-Jacobian products at the layer's input, for its floating-point leaves.
      after: the cotangents at the layer's output, for its floating-point leaves.
    """
    return _any_nonzero(before) | ~_any_nonzero(after)


def _any_nonzero(tree: PyTree) -> Bool[Array, ""]:
    parts = [jnp.any(leaf != 0) for leaf in jax.tree.leaves(tree)]
    return functools.reduce(jnp.logical_or, parts)


def flatten_rows(array: Shaped[Array, "B ..."]) -> Shaped[Array, "B R"]:
    """Flatten each row into one vector."""
    return array.reshape(array.shape[0], -1)
