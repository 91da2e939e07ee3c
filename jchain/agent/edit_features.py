"""Features for an actor: the predicted gains of edits of the best chain so far."""

from typing import NamedTuple

import jax.numpy as jnp

from jchain._typing import Array, Bool, Float, Int
from jchain.chain import PADDING
from jchain.engine.control_flow import cond_in_sequence
from jchain.gradient.edit_scores import EditScores, choose_products, score_edits
from jchain.gradient.slot_scores import ScoreKind
from jchain.problem import Problem

# Gains are in units of the median size of an edit score and are clipped to this many units.
_MAX_UNITS = 3.0
_NUM_FEATURES = 3


class EditFeatures(NamedTuple):
    """Features of each entry at each slot of one chain."""

    chain: Int[Array, "L"]  # [L], all -1 if there is no chain yet
    # [L, N + K, 3]: whether the chain has this entry at this slot; the predicted gain of swapping
    # the entry in (at the head's slot, this swaps the head); the predicted gain of inserting it
    features: Float[Array, "L E 3"]


def empty_edit_features(problem: Problem) -> EditFeatures:
    """Return edit features that are all 0 and belong to no chain."""
    num_slots, num_entries = (
        problem.max_layers + 1,
        problem.bank.num_layers + problem.bank.num_heads,
    )
    return EditFeatures(
        jnp.full(num_slots, PADDING, jnp.int32),
        jnp.zeros((num_slots, num_entries, _NUM_FEATURES), jnp.float32),
    )


def update_edit_features(
    edit_features: EditFeatures, problem: Problem, chain: Int[Array, "L"], kind: ScoreKind
) -> tuple[EditFeatures, Int[Array, ""]]:
    """Score the edits of a chain, unless `edit_features` already belong to it.

    Args:
      edit_features: the previous edit features.
      problem: the bank, the split of data, and the loss.
      chain: the best chain, `[L]`; all -1 if there is none, and then nothing is scored.
      kind: the kind of edit scores (`jchain.gradient.score_edits`).

    Returns:
      The edit features of the chain, and the cost of scoring in layer calls, which is 0 if nothing
      was scored.

    Raises:
      ValueError: as for `jchain.gradient.score_edits`.
    """

    def score(
        problem: Problem, _: EditFeatures, chain: Int[Array, "L"]
    ) -> tuple[EditFeatures, Int[Array, ""]]:
        scores = score_edits(problem, chain, kind, num_products=choose_products(problem))
        features = _make_features(problem, chain, scores)
        return EditFeatures(chain, features), scores.layer_calls.astype(jnp.int32)

    def keep(
        _: Problem, edit_features: EditFeatures, chain: Int[Array, "L"]
    ) -> tuple[EditFeatures, Int[Array, ""]]:
        return edit_features, jnp.zeros((), jnp.int32)

    is_new = jnp.any(chain != edit_features.chain) & (chain[0] != PADDING)
    return cond_in_sequence(is_new, score, keep, problem, edit_features, chain)


def read_edit_features(
    edit_features: EditFeatures, slot: Int[Array, ""], is_on_chain: Bool[Array, ""]
) -> Float[Array, "E 6"]:
    """Read the features of each entry as the next token.

    The first three features are those at the slot. The other three are the same if the prefix is a
    prefix of the chain, and 0 otherwise.

    Args:
      edit_features: the edit features of one chain.
      slot: the slot of the next token.
      is_on_chain: whether the prefix is a prefix of that chain.
    """
    features = edit_features.features[slot]
    return jnp.concatenate([features, jnp.where(is_on_chain, features, 0.0)], axis=1)


def init_edit_weights() -> Float[Array, "6"]:
    """Return the initial weights of `read_edit_features` in a logit: 1 for gains on the chain."""
    return jnp.array([0.0, 0.0, 0.0, 0.0, 1.0, 1.0], jnp.float32)


def _make_features(
    problem: Problem, chain: Int[Array, "L"], scores: EditScores
) -> Float[Array, "L E 3"]:
    """Convert edit scores to gains in units of their median size; 0 for edits that do not exist."""
    num_layers, num_heads = problem.bank.num_layers, problem.bank.num_heads
    entries, slots = jnp.arange(num_layers + num_heads), jnp.arange(chain.size)
    has_entry = chain[:, None] == entries[None]
    is_head = slots == problem.space.count_layers(chain)
    heads = jnp.where(is_head[:, None], scores.head[None], jnp.nan)
    swap = jnp.concatenate([scores.swap, heads], axis=1)
    insert = jnp.pad(scores.insert, ((0, 0), (0, num_heads)), constant_values=jnp.nan)
    size = jnp.abs(jnp.stack([jnp.where(has_entry, jnp.nan, swap), insert]))
    unit = jnp.nan_to_num(jnp.nanmedian(size)) + 1e-12
    gains = [
        jnp.nan_to_num(jnp.clip(-score / unit, -_MAX_UNITS, _MAX_UNITS)) for score in (swap, insert)
    ]
    return jnp.stack([has_entry, *gains], axis=-1).astype(jnp.float32)
