"""Predict the loss of every prefix with every short suffix of a chain.

A suffix is a few layers and a head. Target outputs (`jchain.inverse.target_outputs`) are pulled
back through it to the activations at its entry that give these outputs, and the suffix is
linearized there. Matrix products then predict its outputs for the activations of any prefix,
without layer calls.
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jchain._typing import Array, Float, Int
from jchain.chain import PADDING
from jchain.engine.layer_calls import apply_token
from jchain.gradient.linearize import flatten_rows
from jchain.groups import LayerGroup
from jchain.inverse.pullback import reach_target
from jchain.problem import Problem


class Suffixes(NamedTuple):
    """Suffixes, with their outputs as affine maps of the activations at their entry."""

    tokens: Int[Array, "M T"]  # [M, T], layers in order, then a head, then -1 as padding
    outputs: Float[Array, "M B C"]  # [M, B, C], the outputs at zero activations
    rows: Float[Array, "M C B F"]  # [M, C, B, F], the Jacobian of each output of each example


class _Level(NamedTuple):
    """Suffixes of one length."""

    tokens: Int[Array, "m T"]
    # [m, B, ...F], the activations at the entry of each suffix that give the target outputs
    entry: Float[Array, "m B ..."]
    rows: Float[Array, "m C B ..."]  # [m, C, B, ...F], as in `Suffixes`


def pull_back_suffixes(
    problem: Problem,
    inverses: Sequence[LayerGroup],
    members: tuple[Int[Array, "_"], ...],
    near: Float[Array, "B ..."],
    num_layers: int,
) -> Suffixes:
    """Pull back and linearize all suffixes of up to `num_layers` layers, with every head.

    Each layer of each suffix costs `2 + C` layer calls for C outputs of an example. Layers that
    suffixes share count once.

    Args:
      problem: the bank, the examples on which suffixes are pulled back, and the loss.
      inverses: the inverses of the bank's layers.
      members: for each group of the bank's layers, the indices within the group of the layers from
        which suffixes are built.
      near: activations at the head's input, `[B, ...F]`. For each head, they are changed as little
        as possible to give the target outputs.
      num_layers: the maximum number of layers in a suffix.

    Raises:
      ValueError: if the loss has no target outputs (`jchain.inverse.target_outputs`).
    """
    bank = problem.bank
    tokens = jnp.concatenate(
        [jnp.asarray(g.tokens)[rows] for g, rows in zip(bank.layers, members, strict=True)]
    )
    heads = bank.num_layers + jnp.arange(bank.num_heads)
    levels = [jax.lax.map(partial(_pull_head, problem, near, num_layers + 1), heads)]
    targets = levels[0][1]
    for _ in range(num_layers):
        grown = jax.lax.map(partial(_prepend_layer, bank.layers, inverses, levels[-1][0]), tokens)
        level = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), grown)
        levels.append((level, jnp.tile(targets, (len(level.tokens) // len(targets), 1, 1))))
    expanded = [_extrapolate_to_zero(level, outputs) for level, outputs in levels]
    return jax.tree.map(lambda *parts: jnp.concatenate(parts), *expanded)


def _pull_head(
    problem: Problem, near: Array, num_slots: int, token: Array
) -> tuple[_Level, Float[Array, "B C"]]:
    """Return the suffix of one head alone, and its outputs at its entry activations."""

    def head(hidden: Array) -> Array:
        return flatten_rows(apply_token(problem.bank.heads, token, hidden))

    entry = reach_target(problem, token, near)
    outputs, back = jax.vjp(head, entry)
    units = jnp.broadcast_to(
        jnp.eye(outputs.shape[1], dtype=outputs.dtype)[:, None], (outputs.shape[1], *outputs.shape)
    )
    rows = jax.vmap(lambda unit: back(unit)[0])(units)
    tokens = jnp.full(num_slots, PADDING, jnp.int32).at[0].set(token.astype(jnp.int32))
    return _Level(tokens, entry, rows), outputs


def _prepend_layer(
    layers: tuple[LayerGroup, ...], inverses: Sequence[LayerGroup], level: _Level, token: Array
) -> _Level:
    """Put a layer in front of every suffix."""

    def prepend(suffix: _Level) -> _Level:
        entry = inverse(suffix.entry)
        back = jax.vjp(layer, entry)[1]
        rows = jax.vmap(lambda row: back(row)[0])(suffix.rows)
        tokens = jnp.roll(suffix.tokens, 1).at[0].set(token.astype(jnp.int32))
        return _Level(tokens, entry, rows)

    layer, inverse = (partial(apply_token, groups, token) for groups in (layers, tuple(inverses)))
    return jax.lax.map(prepend, level)


def _extrapolate_to_zero(level: _Level, outputs: Float[Array, "m B C"]) -> Suffixes:
    """Extrapolate outputs from the entry activations to zero activations."""
    rows = level.rows.reshape(*level.rows.shape[:3], -1)
    entry = level.entry.reshape(*level.entry.shape[:2], -1)
    return Suffixes(level.tokens, outputs - jnp.einsum("mcbf,mbf->mbc", rows, entry), rows)


def predict_losses(
    problem: Problem, suffixes: Suffixes, hidden: Float[Array, "P B ..."]
) -> Float[Array, "P M"]:
    """Predict the loss of each prefix with each suffix, without the layer penalty.

    Args:
      problem: the bank, the examples on which suffixes were pulled back, and the loss.
      suffixes: the M suffixes.
      hidden: the activations after each prefix, `[P, B, ...F]`.
    """
    flat = hidden.reshape(*hidden.shape[:2], -1)
    shape = jax.eval_shape(
        partial(apply_token, problem.bank.heads, jnp.asarray(problem.bank.num_layers)), hidden[0]
    ).shape

    def predict(suffix: Suffixes) -> Float[Array, "P"]:
        outputs = suffix.outputs[None] + jnp.einsum("cbf,pbf->pbc", suffix.rows, flat)
        return jax.vmap(lambda outputs: problem.loss_and_accuracy(outputs.reshape(shape))[0])(
            outputs
        )

    return jax.lax.map(predict, suffixes).T
