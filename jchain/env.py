"""The decision process over a problem, functional and for one episode: `vmap` it for many.

A state is a prefix and the activation that it produced, an action is a token: a layer extends the prefix for one layer
call, a head ends the episode. The reward is minus the loss when a head is taken and 0 before.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jchain._typing import Array, Bool, Float, Int, Shaped
from jchain.chain import PADDING
from jchain.engine.layer_calls import apply_all, apply_token, evaluate_heads
from jchain.problem import Problem
from jchain.pytree import is_concrete


class State(NamedTuple):
    """Where an episode stands."""

    chain: Int[Array, "L"]  # [L], the tokens taken so far, -1 behind them
    length: Int[Array, ""]  # layers so far
    is_done: Bool[Array, ""]  # a head was taken
    hidden: Shaped[Array, "B ..."]  # [B, ...F], activation of the prefix on the whole split


def reset(problem: Problem) -> State:
    """The empty prefix."""
    chain = jnp.full(problem.max_layers + 1, PADDING, jnp.int32)
    return State(
        chain, jnp.zeros((), jnp.int32), jnp.array(False), problem.bank.embed(problem.data.x)
    )


def legal_actions(problem: Problem, length: Int[Array, ""]) -> Bool[Array, "E"]:
    """The tokens that may follow a prefix of `length` layers, True = allowed: layers before `max_layers`, heads from
    `min_layers` on."""
    tokens = jnp.arange(problem.bank.num_layers + problem.bank.num_heads)
    return jnp.where(
        tokens < problem.bank.num_layers, length < problem.max_layers, length >= problem.min_layers
    )


def step(problem: Problem, state: State, action: Int[Array, ""]) -> tuple[State, Float[Array, ""]]:
    """The next state and the reward.

    An episode that is done stays as it is, with reward 0. The reward of a loss that is not finite is `-inf`.

    Raises:
      ValueError: the action is not legal and neither it nor the state is traced. When traced, its result is undefined.
    """
    if is_concrete((state, action)) and not state.is_done:
        _check_legal(problem, state, int(action))
    bank = problem.bank
    is_layer = (action < bank.num_layers) & ~state.is_done
    is_head = (action >= bank.num_layers) & ~state.is_done
    hidden = jax.lax.cond(
        is_layer, lambda t, h: apply_token(bank.layers, t, h), lambda _, h: h, action, state.hidden
    )
    chain = jnp.where(is_layer | is_head, state.chain.at[state.length].set(action), state.chain)

    def end(token: Array, hidden: Array) -> Array:
        loss = head_loss(problem, token, hidden) + problem.layer_penalty(chain)
        return jnp.where(jnp.isfinite(loss), -loss, -jnp.inf)

    def go_on(token: Array, hidden: Array) -> Array:
        return jnp.zeros_like(jax.eval_shape(end, token, hidden))

    reward = jax.lax.cond(is_head, end, go_on, action, hidden)
    return State(chain, state.length + is_layer, state.is_done | is_head, hidden), reward


def append_heads(
    problem: Problem, chain: Int[Array, "L"], length: Int[Array, ""]
) -> Int[Array, "K L"]:
    """The chains that end a prefix of `length` layers by each head."""
    heads = problem.bank.num_layers + jnp.arange(problem.bank.num_heads, dtype=jnp.int32)
    return jnp.where((jnp.arange(chain.size) == length)[None], heads[:, None], chain[None])


def head_loss(
    problem: Problem, head: Int[Array, ""], hidden: Shaped[Array, "B ..."]
) -> Float[Array, ""]:
    """The loss of the head with this token on these activations, without the price of layers."""
    call = jax.vmap(partial(apply_token, problem.bank.heads, head))
    return evaluate_heads(problem, call, hidden[None])[0][0]


def head_losses(problem: Problem, hidden: Shaped[Array, "B ..."]) -> Float[Array, "K"]:
    """The loss of each head on these activations, without the price of layers."""
    return evaluate_heads(
        problem, lambda hidden: apply_all(problem.bank.heads, hidden[0]), hidden[None]
    )[0]


def _check_legal(problem: Problem, state: State, action: int) -> None:
    is_legal = np.asarray(legal_actions(problem, state.length))
    if not 0 <= action < is_legal.size or not is_legal[action]:
        legal = np.flatnonzero(is_legal)
        least = f"at least {problem.min_layers} and " if problem.min_layers > 0 else ""
        raise ValueError(
            f"illegal action {action} after {int(state.length)} of {least}at most {problem.max_layers} layers: expected a "
            f"token in {legal[0]}..{legal[-1]}"
        )
