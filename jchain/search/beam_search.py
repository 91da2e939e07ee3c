"""Beam search that ranks prefixes by the lowest loss of any head on their activations.

Beam search is from the Harpy system (Lowerre 1976). A pass keeps the best `width` prefixes of each
length. Each pass is twice as wide as the one before it, as in iterative broadening (Ginsberg and
Harvey 1992, Artificial Intelligence 55). After the last pass, steps do nothing.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jchain import env
from jchain._typing import Array, Float, Int, Key, PyTree
from jchain.arguments import check_at_least_one, check_integers, checked
from jchain.chain import PADDING
from jchain.engine.head_calls import map_prefixes
from jchain.modules.activations import make_buffer, put_row
from jchain.problem import Problem
from jchain.pytree import pick, pytree_dataclass, static
from jchain.search.prefixes import (
    count_extensions,
    end_children,
    extend_prefix,
    rank_prefixes,
)
from jchain.search.protocol import Info

# The score of a prefix without a finite loss: worse than any loss, but finite, so that it is
# extended.
_UNKNOWN = float(np.finfo(np.float32).max)


class State(NamedTuple):
    """Two generations of prefixes: one that is being extended, and its children so far."""

    chains: Int[Array, "2 W L"]  # [2, W, L], layer tokens, padded with -1
    hidden: PyTree  # leaves [2, W, B, ...F], activations
    loss: Float[Array, "2 W"]  # [2, W], loss of the best head; +inf in an empty row
    generation: Int[Array, ""]  # 0 or 1, the index of the generation that is being extended
    parent: Int[Array, ""]  # the row of the next prefix to extend
    length: Int[Array, ""]  # the number of layers of each prefix in this generation
    width: Int[Array, ""]  # the width of this pass; above `max_width` after the last one


@pytree_dataclass
class BeamSearch:
    """Beam search by head loss.

    A step extends one prefix by each of the `N` layers, which costs `N` layer calls, or in a bank
    with stages by each that reads its stage. Keys are not used. The state keeps the activations of
    `2 * max_width` prefixes.

    Attributes:
      width: number of prefixes of each length that the first pass keeps.
      max_width: upper bound of the width, which doubles from pass to pass.

    Raises:
      ValueError: if a width is out of range.
    """

    is_deterministic = True
    needs_gradient = False
    needs_invertible = False
    reads_activations = True

    width: int = static(default=1)
    max_width: int = static(default=64)

    def __post_init__(self) -> None:
        check_at_least_one(width=self.width)
        check_integers(at_least=self.width, max_width=self.max_width)

    @checked
    def init(self, key: Key[Array, ""], problem: Problem) -> State:
        """Return the state before the first pass."""
        hidden = problem.bank.embed(problem.data.x)
        empty = State(
            jnp.full((2, self.max_width, problem.max_layers + 1), PADDING, jnp.int32),
            make_buffer((2, self.max_width), hidden),
            jnp.full((2, self.max_width), jnp.inf, jnp.float32),
            jnp.array(0),
            jnp.array(0),
            jnp.array(0),
            jnp.array(0),
        )
        return _start_pass(empty, problem, jnp.array(self.width))

    @checked
    def step(self, key: Key[Array, ""], state: State, problem: Problem) -> tuple[State, Info]:
        """Extend one prefix by every layer."""
        num_layers, num_heads = problem.bank.num_layers, problem.bank.num_heads
        old, length = state.generation, state.length
        prefix, hidden = pick((state.chains, state.hidden), (old, state.parent))
        is_open = (state.width <= self.max_width) & jnp.isfinite(state.loss[old, state.parent])
        should_extend = is_open & (length < problem.max_layers)

        def extend(state: State) -> tuple[State, Array]:
            children, outputs = extend_prefix(problem, prefix, length, hidden)
            penalty = problem.head_penalties(children)
            loss = map_prefixes(problem, lambda h: env.head_losses(problem, h), outputs) + penalty
            loss = loss.astype(jnp.float32)
            return self._insert(state, problem, children, outputs, loss), loss

        def skip(state: State) -> tuple[State, Array]:
            return state, jnp.full((num_layers, num_heads), jnp.inf, jnp.float32)

        state, loss = jax.lax.cond(should_extend, extend, skip, state)
        children = env.append_layers(problem, prefix, length)
        chains, loss = end_children(
            problem, prefix, length, hidden, children, loss, is_open, should_extend
        )
        layer_calls = jnp.where(should_extend, count_extensions(problem, prefix), 0)
        return self._advance(state, problem), Info(chains, loss, layer_calls)

    def _insert(
        self, state: State, problem: Problem, children: Array, hidden: PyTree, loss: Array
    ) -> State:
        """Insert the children one by one; each evicts the worst child so far if it is better.

        Children are ranked by their best head, even if they have fewer than `min_layers` layers.
        Those without a finite loss come after the others, in order of arrival (`rank_prefixes`).
        """
        new = 1 - state.generation
        best = jnp.where(jnp.isfinite(loss), loss, jnp.inf).min(axis=1)
        best = rank_prefixes(problem, children, best, hidden, _UNKNOWN)

        def insert(i: Array, kept: tuple[Array, PyTree, Array]) -> tuple[Array, PyTree, Array]:
            kept_loss = kept[-1]
            is_in_beam = jnp.arange(self.max_width) < state.width
            worst = jnp.argmax(jnp.where(is_in_beam, kept_loss[new], -jnp.inf))
            row = jnp.where(best[i] < kept_loss[new, worst], worst, self.max_width)
            return jax.tree.map(
                lambda leaf, rows: leaf.at[new, row].set(rows[i], mode="drop"),
                kept,
                (children, hidden, best),
            )

        kept = (state.chains, state.hidden, state.loss)
        kept = jax.lax.fori_loop(0, children.shape[0], insert, kept)
        return state._replace(chains=kept[0], hidden=kept[1], loss=kept[2])

    def _advance(self, state: State, problem: Problem) -> State:
        """Move to the next parent, generation, or pass."""
        old, new = state.generation, 1 - state.generation
        parent = state.parent + 1
        is_last = (parent == self.max_width) | ~jnp.isfinite(
            state.loss[old, parent % self.max_width]
        )
        next_state = state._replace(
            loss=jnp.where(is_last, state.loss.at[old].set(jnp.inf), state.loss),
            generation=jnp.where(is_last, new, old),
            parent=jnp.where(is_last, 0, parent),
            length=state.length + is_last,
        )
        is_over = is_last & (
            (next_state.length >= problem.max_layers) | ~jnp.isfinite(state.loss[new]).any()
        )
        width = jnp.where(state.width <= self.max_width, 2 * state.width, state.width)
        return jax.lax.cond(
            is_over, lambda s: _start_pass(s, problem, width), lambda s: s, next_state
        )


def _start_pass(state: State, problem: Problem, width: Int[Array, ""]) -> State:
    """Return the state at the start of a pass, with only the empty prefix."""
    return State(
        state.chains.at[0, 0].set(PADDING),
        put_row(state.hidden, (0, 0), problem.bank.embed(problem.data.x)),
        # A finite loss marks a row as used. Its value does not matter: no other row is used.
        jnp.full_like(state.loss, jnp.inf).at[0, 0].set(0.0),
        jnp.array(0),
        jnp.array(0),
        jnp.array(0),
        width,
    )
