"""Moves of several swaps, whose changes of a chain's outputs add up to first order."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jchain._typing import Array, Bool, Float, Int
from jchain.problem import Problem


class JointMoves(NamedTuple):
    """Moves that make several swaps at once, predicted from one pass over the chain.

    Predictions use at most 128 evenly spaced examples, or all examples if the Hessian of the loss
    is sampled (see `jchain.gradient.score_edits`).
    """

    token: Int[Array, "L m"]  # [L, m], the most promising layers at each slot, best first
    # [L, m, b, R], the change that each swap makes in the R products of the outputs; nan if there
    # is no such swap
    change: Float[Array, "L m b R"]
    # [L, L], the chain with 1, 2, ... swaps; each swap is the best one given the swaps before it
    greedy: Int[Array, "L L"]
    # [L], predicted change in loss, with the layer penalty; nan if no slot is left
    greedy_score: Float[Array, "L"]
    # [Q, L], the chain with each of the best pairs of these swaps at different slots, best first
    pairs: Int[Array, "Q L"]
    # [Q], predicted change in loss, with the layer penalty; nan if there is no such pair
    pair_score: Float[Array, "Q"]


class _Greedy(NamedTuple):
    """A greedy move that is under construction."""

    chain: Int[Array, "L"]
    is_left: Bool[Array, "S"]  # whether the slot of each swap is still unchanged
    change: Float[Array, "b R"]  # change of the outputs by the swaps so far
    penalty: Float[Array, ""]  # change of the layer penalty by the swaps so far


def keep_best(
    problem: Problem, swap: Float[Array, "N"], change: Float[Array, "N b R"], num_best: int
) -> tuple[Int[Array, "m"], Float[Array, "m b R"]]:
    """Keep the most promising swaps of one slot.

    Args:
      problem: the problem, whose `layer_cost` gives the layer penalty.
      swap: the predicted change in loss of each swap, `[N]`, without the layer penalty; nan if
        unknown.
      change: the change that each swap makes in the products of the outputs, `[N, b, R]`.
      num_best: the number of swaps to keep, m.

    Returns:
      The tokens `[m]` of the swaps and the changes `[m, b, R]` that they make, best first. If fewer
      than m swaps have known scores, the changes of the others are nan.
    """
    penalty = jnp.broadcast_to(problem.layer_cost, swap.shape)
    score, token = jax.lax.top_k(
        -jnp.nan_to_num(swap + penalty, nan=jnp.inf, posinf=jnp.inf), num_best
    )
    return token, jnp.where(jnp.isfinite(score)[:, None, None], change[token], jnp.nan)


def join(
    problem: Problem,
    chain: Int[Array, "L"],
    token: Int[Array, "L m"],
    change: Float[Array, "L m b R"],
    predict_fn: Callable[[Array], Array],
    num_pairs: int,
) -> JointMoves:
    """Find the most promising pairs of swaps, and greedy moves of 1, 2, ... swaps.

    Args:
      problem: the problem, whose `layer_cost` gives the layer penalty.
      chain: the chain before the moves, `[L]`.
      token: the tokens of the swaps that moves combine, `[L, m]`.
      change: the change that each swap makes in the products of the outputs, `[L, m, b, R]`; nan if
        there is no such swap.
      predict_fn: a function from a change of the products, `[b, R]`, to the change in loss, without
        the layer penalty.
      num_pairs: the number of pairs to return, Q.
    """
    num_slots, num_best = token.shape
    cost = jnp.broadcast_to(problem.layer_cost, (problem.bank.num_layers,))
    own = cost[jnp.clip(chain, 0, cost.size - 1)][:, None]
    penalty = (cost[token] - own).reshape(-1).astype(change.dtype)
    slot = jnp.repeat(jnp.arange(num_slots), num_best)
    flat = change.reshape(-1, *change.shape[2:])
    is_swap = jnp.isfinite(flat).all(axis=(1, 2))
    flat = jnp.where(is_swap[:, None, None], flat, 0.0)

    def predict(made: Array, made_penalty: Array) -> Float[Array, "S"]:
        """Predict the change in loss of each swap on top of a change that is already made."""
        loss = jax.vmap(lambda one: predict_fn(made + one))(flat) + made_penalty + penalty
        return jnp.where(jnp.isfinite(loss), loss, jnp.inf)

    def swap(chain: Array, i: Array) -> Array:
        return chain.at[slot[i]].set(token.reshape(-1)[i].astype(chain.dtype))

    def add(move: _Greedy, _: None) -> tuple[_Greedy, tuple[Array, Array]]:
        loss = jnp.where(move.is_left, predict(move.change, move.penalty), jnp.inf)
        i = jnp.argmin(loss)
        does_swap = move.is_left[i]
        longer = _Greedy(
            jnp.where(does_swap, swap(move.chain, i), move.chain),
            move.is_left & (slot != slot[i]),
            jnp.where(does_swap, move.change + flat[i], move.change),
            jnp.where(does_swap, move.penalty + penalty[i], move.penalty),
        )
        return longer, (longer.chain, jnp.where(does_swap, loss[i], jnp.nan))

    start = _Greedy(chain, is_swap, jnp.zeros_like(flat[0]), jnp.zeros((), flat.dtype))
    _, (greedy, greedy_score) = jax.lax.scan(add, start, length=num_slots)
    loss = jax.lax.map(lambda i: predict(flat[i], penalty[i]), jnp.arange(slot.size))
    is_pair = is_swap[:, None] & is_swap[None] & (slot[:, None] < slot[None])
    gain, index = jax.lax.top_k(-jnp.where(is_pair, loss, jnp.inf).reshape(-1), num_pairs)
    pairs = jax.vmap(lambda i: swap(swap(chain, i // slot.size), i % slot.size))(index)
    is_known = jnp.isfinite(gain)
    pairs = jnp.where(is_known[:, None], pairs, chain[None])
    return JointMoves(
        token, change, greedy, greedy_score, pairs, jnp.where(is_known, -gain, jnp.nan)
    )
