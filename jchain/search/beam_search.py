"""Beam search: prefixes ranked by the lowest loss of a head on their activations (Lowerre 1976, the Harpy system).

A pass keeps the best `width` prefixes of each length; the next pass is twice as wide, as iterative broadening (Ginsberg and
Harvey 1992, Artificial Intelligence 55), until `max_width`, behind which nothing more is asked.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jchain import env
from jchain._typing import Array, Float, Int, Key, Shaped
from jchain.chain import PADDING
from jchain.engine.layer_calls import apply_all
from jchain.problem import Problem
from jchain.pytree import pytree_dataclass, static
from jchain.search.base import Info


class State(NamedTuple):
    """Two generations of prefixes: that which is extended, and at `1 - generation` that of their best children."""

    chains: Int[Array, "2 W L"]  # [2, W, L], -1 behind the layers
    hidden: Shaped[Array, "2 W B ..."]  # [2, W, B, ...F]
    loss: Float[Array, "2 W"]  # [2, W], of their best head; +inf where none stands
    generation: Int[Array, ""]
    parent: Int[Array, ""]  # the next one to be extended
    depth: Int[Array, ""]  # layers of the parents
    width: Int[Array, ""]  # of this pass; above max_width when all are over


@pytree_dataclass
class BeamSearch:
    """Beam search by head loss. A step extends one prefix by every layer, which costs as many layer calls.

    Deterministic: the keys are not used. Activations of `2 * max_width` prefixes are kept.

    Attributes:
      width: prefixes that the first pass keeps.
      max_width: prefixes that the last pass keeps, at most: its width is the last of width, 2 width, 4 width, ... up to this.
    """

    width: int = static(default=1)
    max_width: int = static(default=64)

    def __post_init__(self) -> None:
        if not 1 <= self.width <= self.max_width:
            raise ValueError(
                f"expected a width of at least 1 and at most max_width, got {self.width} and {self.max_width}"
            )

    def init(self, key: Key[Array, ""], problem: Problem) -> State:
        hidden = problem.bank.embed(problem.data.x)
        empty = State(
            jnp.full((2, self.max_width, problem.max_layers + 1), PADDING, jnp.int32),
            jnp.zeros((2, self.max_width, *hidden.shape), hidden.dtype),
            jnp.full((2, self.max_width), jnp.inf, jnp.float32),
            jnp.array(0),
            jnp.array(0),
            jnp.array(0),
            jnp.array(0),
        )
        return _start_pass(empty, problem, jnp.array(self.width))

    def step(self, key: Key[Array, ""], state: State, problem: Problem) -> tuple[State, Info]:
        num_layers, num_heads = problem.bank.num_layers, problem.bank.num_heads
        old, new = state.generation, 1 - state.generation
        prefix, hidden = state.chains[old, state.parent], state.hidden[old, state.parent]
        is_there = (state.width <= self.max_width) & jnp.isfinite(state.loss[old, state.parent])
        does_extend = is_there & (state.depth < problem.max_layers)
        slots = jnp.arange(problem.max_layers + 1)[None]
        extended = jnp.where(
            slots == state.depth, jnp.arange(num_layers, dtype=jnp.int32)[:, None], prefix[None]
        )

        def extend(carry: tuple[Array, Array, Array]) -> tuple[tuple[Array, Array, Array], Array]:
            made = apply_all(problem.bank.layers, hidden)
            loss = (
                jax.vmap(lambda h: env.head_losses(problem, h))(made)
                + problem.layer_penalty(extended)[:, None]
            )
            loss = loss.astype(jnp.float32)
            best = jnp.where(jnp.isfinite(loss), loss, jnp.inf).min(axis=1)

            def insert(i: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
                chains, kept, losses = carry
                is_place = jnp.arange(self.max_width) < state.width
                worst = jnp.argmax(jnp.where(is_place, losses[new], -jnp.inf))
                row = jnp.where(best[i] < losses[new, worst], worst, self.max_width)
                return (
                    chains.at[new, row].set(extended[i], mode="drop"),
                    kept.at[new, row].set(made[i], mode="drop"),
                    losses.at[new, row].set(best[i], mode="drop"),
                )

            return jax.lax.fori_loop(0, num_layers, insert, carry), loss

        def stay(carry: tuple[Array, Array, Array]) -> tuple[tuple[Array, Array, Array], Array]:
            return carry, jnp.full((num_layers, num_heads), jnp.inf, jnp.float32)

        carry = (state.chains, state.hidden, state.loss)
        carry, loss = jax.lax.cond(does_extend, extend, stay, carry)
        state = state._replace(chains=carry[0], hidden=carry[1], loss=carry[2])

        stopped = jax.vmap(lambda chain: env.append_heads(problem, chain, state.depth + 1))(
            extended
        )
        # Prefixes that may not end yet are ranked by their heads all the same.
        is_root = (state.depth == 0) & is_there & (problem.min_layers == 0)
        is_end = does_extend & (state.depth + 1 >= problem.min_layers)
        chains = jnp.concatenate(
            [
                jnp.where(is_root, env.append_heads(problem, prefix, state.depth), PADDING),
                jnp.where(is_end, stopped, PADDING).reshape(-1, problem.max_layers + 1),
            ]
        )
        root_loss = jnp.where(is_root, env.head_losses(problem, hidden), jnp.inf)
        loss = jnp.concatenate([root_loss, jnp.where(is_end, loss, jnp.inf).reshape(-1)])
        loss = jnp.where(jnp.isfinite(loss), loss, jnp.inf)
        layer_calls = jnp.where(does_extend, num_layers, 0)
        return self._advance(state, problem), Info(chains, loss, layer_calls)

    def _advance(self, state: State, problem: Problem) -> State:
        """To the next parent, generation, or pass."""
        old, new = state.generation, 1 - state.generation
        parent = state.parent + 1
        is_last = (parent == self.max_width) | ~jnp.isfinite(
            state.loss[old, parent % self.max_width]
        )
        next_state = state._replace(
            loss=jnp.where(is_last, state.loss.at[old].set(jnp.inf), state.loss),
            generation=jnp.where(is_last, new, old),
            parent=jnp.where(is_last, 0, parent),
            depth=state.depth + is_last,
        )
        is_over = is_last & (
            (next_state.depth >= problem.max_layers) | ~jnp.isfinite(state.loss[new]).any()
        )
        width = jnp.where(state.width <= self.max_width, 2 * state.width, state.width)
        return jax.lax.cond(
            is_over, lambda s: _start_pass(s, problem, width), lambda s: s, next_state
        )


def _start_pass(state: State, problem: Problem, width: Int[Array, ""]) -> State:
    """The empty prefix alone."""
    return State(
        state.chains.at[0, 0].set(PADDING),
        state.hidden.at[0, 0].set(problem.bank.embed(problem.data.x)),
        # Only that it is finite matters here.
        jnp.full_like(state.loss, jnp.inf).at[0, 0].set(0.0),
        jnp.array(0),
        jnp.array(0),
        jnp.array(0),
        width,
    )
