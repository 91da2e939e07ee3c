"""Moves of several swaps at once: to first order, what swaps change in the outputs of a chain adds up."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jchain._typing import Array, Float, Int
from jchain.problem import Problem


class JointMoves(NamedTuple):
    """Several swaps at once, predicted from one pass: to first order, what they change in the outputs adds up.

    Predicted on at most 128 of the examples, evenly spaced, where an example has no more than 64 outputs.
    """

    token: Int[Array, "L m"]  # [L, m], the most promising layers at each slot, best first
    change: Float[
        Array, "L m b R"
    ]  # [L, m, b, R], what each changes in the R products of the outputs; nan where none is
    greedy: Int[
        Array, "L L"
    ]  # [L, L], the chain with 1, 2, ... swaps, each the best one beside those before
    greedy_score: Float[
        Array, "L"
    ]  # [L], predicted change of loss, price included; nan where no slot is left
    pairs: Int[
        Array, "Q L"
    ]  # [Q, L], the chain with the best two of these swaps at different slots, best first
    pair_score: Float[Array, "Q"]  # [Q], likewise; nan where there is no pair


def keep_best(
    problem: Problem, swap: Float[Array, "N"], change: Float[Array, "N b R"], num_best: int
) -> tuple[Int[Array, "m"], Float[Array, "m b R"]]:
    """The most promising swaps of one slot: their layers, and what they change in the outputs; nan where there is no swap.

    Args:
      problem: prices of layers.
      swap: predicted change of loss of each, without prices; nan where nothing is known.
      change: what each changes in the outputs.
      num_best: how many, m.
    """
    price = jnp.broadcast_to(problem.layer_cost, swap.shape)
    score, token = jax.lax.top_k(
        -jnp.nan_to_num(swap + price, nan=jnp.inf, posinf=jnp.inf), num_best
    )
    return token, jnp.where(jnp.isfinite(score)[:, None, None], change[token], jnp.nan)


def join(
    problem: Problem,
    chain: Int[Array, "L"],
    token: Int[Array, "L m"],
    change: Float[Array, "L m b R"],
    read: Callable[[Array], Array],
    num_pairs: int,
) -> JointMoves:
    """The most promising pairs, and a greedy move of as many swaps as there are slots.

    Args:
      problem: prices of layers.
      chain: from which all moves go.
      token: the swaps that moves are made of, at each slot.
      change: what each changes in the outputs, nan where there is none.
      read: predicted change of loss of a change of the outputs, `[b, R]`, without prices.
      num_pairs: Q.
    """
    num_slots, num_best = token.shape
    cost = jnp.broadcast_to(problem.layer_cost, (problem.bank.num_layers,))
    price = (
        (cost[token] - cost[jnp.clip(chain, 0, cost.size - 1)][:, None])
        .reshape(-1)
        .astype(change.dtype)
    )
    slot = jnp.repeat(jnp.arange(num_slots), num_best)
    flat = change.reshape(-1, *change.shape[2:])
    is_swap = jnp.isfinite(flat).all(axis=(1, 2))
    flat = jnp.where(is_swap[:, None, None], flat, 0.0)

    def predict(total: Array, paid: Array) -> Float[Array, "S"]:
        """Of each swap beside those that are made already."""
        loss = jax.vmap(lambda one: read(total + one))(flat) + paid + price
        return jnp.where(jnp.isfinite(loss), loss, jnp.inf)

    def swap(chain: Array, i: Array) -> Array:
        return chain.at[slot[i]].set(token.reshape(-1)[i].astype(chain.dtype))

    def add(carry: Any, _: None) -> Any:
        chain, is_left, total, paid = carry
        loss = jnp.where(is_left, predict(total, paid), jnp.inf)
        i = jnp.argmin(loss)
        is_one = is_left[i]
        total, paid = (jnp.where(is_one, a + b, a) for a, b in ((total, flat[i]), (paid, price[i])))
        chain = jnp.where(is_one, swap(chain, i), chain)
        return (chain, is_left & (slot != slot[i]), total, paid), (
            chain,
            jnp.where(is_one, loss[i], jnp.nan),
        )

    start = (chain, is_swap, jnp.zeros_like(flat[0]), jnp.zeros((), flat.dtype))
    _, (greedy, greedy_score) = jax.lax.scan(add, start, length=num_slots)
    loss = jax.lax.map(lambda i: predict(flat[i], price[i]), jnp.arange(slot.size))
    is_pair = is_swap[:, None] & is_swap[None] & (slot[:, None] < slot[None])
    gain, place = jax.lax.top_k(-jnp.where(is_pair, loss, jnp.inf).reshape(-1), num_pairs)
    pairs = jax.vmap(lambda i: swap(swap(chain, i // slot.size), i % slot.size))(place)
    is_there = jnp.isfinite(gain)
    pairs = jnp.where(is_there[:, None], pairs, chain[None])
    return JointMoves(
        token, change, greedy, greedy_score, pairs, jnp.where(is_there, -gain, jnp.nan)
    )
