"""What is seen of a prefix while it grows, layer by layer."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jchain._typing import Array, Float, Int
from jchain.calls import apply_token
from jchain.features import Observe
from jchain.problem import Problem


class Glimpse(NamedTuple):
    """A prefix, looked at."""

    hidden: Any  # [B, ...F], its activations; None where nothing is looked at
    features: Float[Array, "F"]  # [F], none where nothing is looked at
    loss: Float[Array, "K"]  # [K], of stopping here by each head, without the price of layers


def start(observe: Observe | None, problem: Problem) -> Glimpse:
    """The empty prefix."""
    if observe is None:
        return Glimpse(None, jnp.zeros(0), jnp.zeros(problem.bank.num_heads))
    hidden = problem.bank.embed(problem.data.x)
    return Glimpse(hidden, *observe(problem, hidden, hidden))


def advance(observe: Observe | None, problem: Problem, glimpse: Glimpse, token: Int[Array, ""]) -> Glimpse:
    """The prefix with one layer more, for one layer call; the same where the token is none of a layer."""
    if observe is None:
        return glimpse
    is_layer = (token >= 0) & (token < problem.bank.num_layers)
    made = apply_token(problem.bank.layers, jnp.where(is_layer, token, 0), glimpse.hidden)
    after = Glimpse(made, *observe(problem, made, glimpse.hidden))
    return jax.tree.map(lambda new, old: jnp.where(is_layer, new, old).astype(old.dtype), after, glimpse)


def follow(observe: Observe | None, problem: Problem, chain: Int[Array, "L"]) -> Float[Array, "L F"]:
    """Features of the prefix before each token of a chain; behind its head those of the last one."""

    def look(glimpse: Glimpse, token: Array) -> tuple[Glimpse, Array]:
        return advance(observe, problem, glimpse, token), glimpse.features

    return jax.lax.scan(look, start(observe, problem), chain)[1]
