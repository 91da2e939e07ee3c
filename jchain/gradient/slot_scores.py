"""Scores of the edits of one slot, and the backward-scan step that computes them."""

import functools
from functools import partial
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from jchain._typing import Activations, Array, Bool, Float, Int, PyTree
from jchain.engine.layer_calls import apply_token
from jchain.engine.plans import choose_chunk
from jchain.gradient.joint_moves import keep_best
from jchain.gradient.linearize import Slot, flatten_rows, keeps_gradient, map_layers
from jchain.gradient.loss_predictor import LossPredictor
from jchain.groups import LayerGroup
from jchain.modules.activations import pull_back_floating, take_floating
from jchain.problem import Problem

KINDS = ("linearized", "activations", "weights", "nearest")
# `score_edits` checks the kind itself.
if TYPE_CHECKING:
    ScoreKind: TypeAlias = Literal["linearized", "activations", "weights", "nearest"]
else:
    ScoreKind: TypeAlias = str


class StaticArgs(NamedTuple):
    """The static arguments of a scan over slots."""

    kind: ScoreKind
    num_products: int | None
    num_best: int  # 0 to predict no joint moves
    num_pairs: int
    backend: str


class Carry(NamedTuple):
    """The state of the backward pass at the output of a slot."""

    # leaves [R, B, ...F], the vjps at the output of the slot; None for leaves without a gradient
    vjps: PyTree
    is_known: Bool[Array, ""]  # False if the gradient was lost in a later layer


class SlotScores(NamedTuple):
    """Scores of the edits of one slot, without layer penalties."""

    swap: Float[Array, "*L N"]
    insert: Float[Array, "*L N"]
    delete: Float[Array, "*L"]
    best: tuple[Array, Array] | None  # result of `keep_best`; None if no joint moves are predicted


def score_slot(
    problem: Problem,
    length: Int[Array, ""],
    members: tuple[Int[Array, "_"], ...],
    predictor: LossPredictor,
    rows: slice,
    static: StaticArgs,
    carry: Carry,
    slot: Slot,
) -> tuple[Carry, SlotScores]:
    """Score the edits of one slot, and pull the vjps back through its layer.

    With its first six arguments bound, this is a step of
    `jchain.gradient.linearize.scan_backward`.

    Args:
      problem: the bank, the split of data, and the loss.
      length: the number of layers of the chain.
      members: for each group of the bank's layers, the indices within the group of the layers to
        score.
      predictor: the loss predictor of the chain.
      rows: the examples on which joint moves are predicted.
      static: the static arguments.
      carry: the state of the backward pass at the output of the slot.
      slot: the slot to score.
    """
    bank, predict_fn = problem.bank, predictor.predict_fn
    vjps, is_known = carry
    is_layer = slot.position < length
    before = jax.lax.cond(
        is_layer, partial(_pull_back, bank.layers, slot.token, slot.before), lambda v: v, vjps
    )
    is_known_before = is_known & keeps_gradient(before, vjps)

    def score(outputs: PyTree) -> tuple[Array, Array, Array | None]:
        change = _dot(vjps, _subtract(outputs, slot.after))
        kept = change[rows] if static.num_best else None
        return predict_fn(change), predict_fn(_dot(before, _subtract(outputs, slot.before))), kept

    chunk = choose_chunk(bank.num_layers, slot.before, static.backend)
    swap, insert, change = map_layers(score, bank, members, slot.before, chunk)
    own = jnp.where(is_layer, slot.token, bank.num_layers)
    swap = jnp.where(is_layer & is_known, swap, jnp.nan)
    if bank.stages is not None:
        swap = jnp.where(bank.stages.can_swap(slot.token), swap, jnp.nan)
    best = None
    if change is not None:
        best = keep_best(problem, swap.at[own].set(jnp.nan), change, static.num_best)
    insert = jnp.where(is_known_before, insert, jnp.nan)
    delete = predict_fn(_dot(vjps, _subtract(slot.before, slot.after)))
    delete = jnp.where(is_layer & is_known, delete, jnp.nan)
    scores = SlotScores(swap.at[own].set(0.0), insert, delete, best)
    return Carry(before, is_known_before), scores


def _pull_back(
    groups: tuple[LayerGroup, ...], token: Array, hidden: Activations, rows: PyTree
) -> PyTree:
    """Compute the vjps at the input of a layer from the vjps at its output."""
    return jax.vmap(pull_back_floating(partial(apply_token, groups, token), hidden))(rows)


def _subtract(hidden: Activations, other: Activations) -> PyTree:
    """Compute the difference of the floating-point leaves."""
    return jax.tree.map(jnp.subtract, take_floating(hidden), take_floating(other))


def _dot(rows: PyTree, change: PyTree) -> Float[Array, "B R"]:
    """Compute the dot product of each example with each row, summed over the leaves."""
    parts = jax.tree.leaves(jax.tree.map(_dot_leaf, rows, change))
    return functools.reduce(jnp.add, parts)


def _dot_leaf(rows: Float[Array, "R B ..."], change: Float[Array, "B ..."]) -> Float[Array, "B R"]:
    num_rows, num_examples = rows.shape[:2]
    return jnp.einsum(
        "rbf,bf->br",
        rows.reshape(num_rows, num_examples, -1),
        flatten_rows(change),
        preferred_element_type=jnp.promote_types(jnp.float32, rows.dtype),
    )
