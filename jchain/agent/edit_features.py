"""What the gradient says of the best chain so far, as an actor sees it: features of each entry at each slot."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jchain import chain as chain_lib
from jchain._typing import Array, Bool, Float, Int
from jchain.chain import PADDING
from jchain.gradient.edit_scores import EditScores, choose_products, score_edits
from jchain.problem import Problem

# Scores count in units of their median size, up to so many.
_MOST = 3.0
_NUM_KINDS = 3


class Advice(NamedTuple):
    """Of one chain."""

    chain: Int[Array, "L"]  # all -1 when there is none yet
    features: Float[
        Array, "L E 3"
    ]  # [L, N + K, 3], is it there; gain predicted of a swap, or of another head; of an insertion


def init(problem: Problem) -> Advice:
    """Of no chain: nothing is said."""
    num_slots, num_entries = (
        problem.max_layers + 1,
        problem.bank.num_layers + problem.bank.num_heads,
    )
    return Advice(
        jnp.full(num_slots, PADDING, jnp.int32),
        jnp.zeros((num_slots, num_entries, _NUM_KINDS), jnp.float32),
    )


def update(
    advice: Advice, problem: Problem, chain: Int[Array, "L"], kind: str
) -> tuple[Advice, Int[Array, ""]]:
    """Advice from scores of the edits of a chain, and the layer calls that they cost: none where it is the chain of before, or none.

    Args:
      advice: of before.
      problem: bank, split, loss.
      chain: the best one, all -1 when there is none.
      kind: of `jchain.gradient.score_edits`.

    Raises:
      ValueError: as `jchain.gradient.score_edits`.
    """

    # A plain vmap would turn the branch into both sides of a select.
    @jax.custom_batching.sequential_vmap
    def choose(problem: Problem, advice: Advice, chain: Array) -> tuple[Advice, Array]:
        def ask() -> tuple[Advice, Array]:
            scores = score_edits(problem, chain, kind, num_products=choose_products(problem))
            return Advice(chain, _make_features(problem, chain, scores)), scores.layer_calls.astype(
                jnp.int32
            )

        is_new = jnp.any(chain != advice.chain) & (chain[0] != PADDING)
        return jax.lax.cond(is_new, ask, lambda: (advice, jnp.zeros((), jnp.int32)))

    return choose(problem, advice, chain)


def read(advice: Advice, slot: Int[Array, ""], is_same: Bool[Array, ""]) -> Float[Array, "E 6"]:
    """Features of each entry as the next token: those of its slot, and again where the prefix is that of the advised chain."""
    features = advice.features[slot]
    return jnp.concatenate([features, jnp.where(is_same, features, 0.0)], axis=1)


def init_weights() -> Float[Array, "6"]:
    """Of `read`'s features in a logit: at first, gains count where the prefix is that of the advised chain."""
    return jnp.array([0.0, 0.0, 0.0, 0.0, 1.0, 1.0], jnp.float32)


def _make_features(
    problem: Problem, chain: Int[Array, "L"], scores: EditScores
) -> Float[Array, "L E 3"]:
    num_layers, num_heads = problem.bank.num_layers, problem.bank.num_heads
    entries, slots = jnp.arange(num_layers + num_heads), jnp.arange(chain.size)
    is_there = chain[:, None] == entries[None]
    is_head = slots == chain_lib.count_layers(chain, num_layers)
    heads = jnp.where(is_head[:, None], scores.head[None], jnp.nan)
    swap = jnp.concatenate([scores.swap, heads], axis=1)
    insert = jnp.pad(scores.insert, ((0, 0), (0, num_heads)), constant_values=jnp.nan)
    unit = (
        jnp.nan_to_num(
            jnp.nanmedian(jnp.abs(jnp.stack([jnp.where(is_there, jnp.nan, swap), insert])))
        )
        + 1e-12
    )
    gains = [jnp.nan_to_num(jnp.clip(-score / unit, -_MOST, _MOST)) for score in (swap, insert)]
    return jnp.stack([is_there, *gains], axis=-1).astype(jnp.float32)
