"""All short ends of chains, pulled back from the loss's target: each with the outputs that it would give near what it needs.

A tail, some layers and a head, is undone from outputs of low loss to the activations that it needs at its entry; there it is
linearized. So the loss of every prefix with every tail is predicted for no more layer calls, by matrix products: halves of chains
that meet in the middle where nothing is met exactly.
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
    """Ends of chains, and their outputs as affine maps of the activations at their entry."""

    tokens: Int[Array, "M T"]  # [M, T], layers in order, then a head, then -1
    outputs: Float[Array, "M B C"]  # at zero activations
    rows: Float[Array, "M C B F"]  # [M, C, B, F], their derivative by activations


class _Level(NamedTuple):
    """Suffixes of one length."""

    tokens: Int[Array, "m T"]
    entry: Float[Array, "m B ..."]  # what they need
    rows: Float[Array, "m C B ..."]


def pull_back_suffixes(
    problem: Problem,
    inverses: Sequence[LayerGroup],
    members: tuple[Int[Array, "_"], ...],
    near: Float[Array, "B ..."],
    num_layers: int,
) -> Suffixes:
    """All suffixes of up to `num_layers` layers out of some, by every head.

    The cost of each layer of each tail, shared ones once, is `2 + C` layer calls, C the outputs of an example.

    Args:
      problem: bank, the examples on which suffixes are pulled back, loss.
      inverses: the layers that undo those of the bank.
      members: for each group of the bank's layers the places of those that suffixes are made of.
      near: activations at the head, of which what a head needs is the least change.
      num_layers: most layers of a tail.

    Raises:
      ValueError: the loss has no target.
    """
    bank = problem.bank
    tokens = jnp.concatenate(
        [jnp.asarray(g.tokens)[rows] for g, rows in zip(bank.layers, members, strict=True)]
    )
    heads = bank.num_layers + jnp.arange(bank.num_heads)
    levels = [jax.lax.map(partial(_pull_head, problem, near, num_layers + 1), heads)]
    wanted = levels[0][1]
    for _ in range(num_layers):
        grown = jax.lax.map(partial(_grow, bank.layers, inverses, levels[-1][0]), tokens)
        level = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), grown)
        levels.append((level, jnp.tile(wanted, (len(level.tokens) // len(wanted), 1, 1))))
    made = [_expand(level, outputs) for level, outputs in levels]
    return jax.tree.map(lambda *parts: jnp.concatenate(parts), *made)


def _pull_head(
    problem: Problem, near: Array, num_slots: int, token: Array
) -> tuple[_Level, Float[Array, "B C"]]:
    """One head: what it needs, its derivative there and its outputs."""

    def head(hidden: Array) -> Array:
        return flatten_rows(apply_token(problem.bank.heads, token, hidden))

    entry = reach_target(problem, token, near)
    made, back = jax.vjp(head, entry)
    units = jnp.broadcast_to(
        jnp.eye(made.shape[1], dtype=made.dtype)[:, None], (made.shape[1], *made.shape)
    )
    rows = jax.vmap(lambda unit: back(unit)[0])(units)
    tokens = jnp.full(num_slots, PADDING, jnp.int32).at[0].set(token.astype(jnp.int32))
    return _Level(tokens, entry, rows), made


def _grow(
    layers: tuple[LayerGroup, ...], inverses: Sequence[LayerGroup], level: _Level, token: Array
) -> _Level:
    """A layer before every tail."""

    def grow(tail: _Level) -> _Level:
        entry = inverse(tail.entry)
        back = jax.vjp(layer, entry)[1]
        rows = jax.vmap(lambda row: back(row)[0])(tail.rows)
        tokens = jnp.roll(tail.tokens, 1).at[0].set(token.astype(jnp.int32))
        return _Level(tokens, entry, rows)

    layer, inverse = (partial(apply_token, groups, token) for groups in (layers, tuple(inverses)))
    return jax.lax.map(grow, level)


def _expand(level: _Level, outputs: Float[Array, "m B C"]) -> Suffixes:
    """From the outputs at what a tail needs to those at zero."""
    rows = level.rows.reshape(*level.rows.shape[:3], -1)
    entry = level.entry.reshape(*level.entry.shape[:2], -1)
    return Suffixes(level.tokens, outputs - jnp.einsum("mcbf,mbf->mbc", rows, entry), rows)


def predict(
    problem: Problem, suffixes: Suffixes, hidden: Float[Array, "P B ..."]
) -> Float[Array, "P M"]:
    """The loss of each prefix with each tail, without the price of layers."""
    flat = hidden.reshape(*hidden.shape[:2], -1)
    shape = jax.eval_shape(
        partial(apply_token, problem.bank.heads, jnp.asarray(problem.bank.num_layers)), hidden[0]
    ).shape

    def measure(tail: Suffixes) -> Float[Array, "P"]:
        outputs = tail.outputs[None] + jnp.einsum("cbf,pbf->pbc", tail.rows, flat)
        return jax.vmap(lambda outputs: problem.compute_metrics(outputs.reshape(shape))[0])(outputs)

    return jax.lax.map(measure, suffixes).T
