"""Greedy removal: drop the layer whose loss hurts least, again and again.

This is how SLEB (Song et al. 2024, arXiv:2402.09025) and Shortened LLaMA (Kim et al. 2024,
arXiv:2402.02834) choose blocks by loss, with a beam in place of one chain. Each pass is twice as
wide as the one before it. After the last pass, steps do nothing.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jchain._typing import Array, Int, Key
from jchain.arguments import check_at_least_one, check_integers, checked
from jchain.chain import PADDING, pad
from jchain.engine import score_cache
from jchain.engine.score_cache import ScoreCache
from jchain.problem import Problem
from jchain.pytree import pytree_dataclass, static
from jchain.search.pool import Pool, empty_pool, merge
from jchain.search.protocol import Info


class State(NamedTuple):
    """The chains of one length that are being shortened, and the best shorter ones so far."""

    beam: Pool  # [W, S]; chains may be longer than those of the space
    shorter: Pool  # [W, S]
    parent: Int[Array, ""]  # the row of the beam that is being shortened
    slot: Int[Array, ""]  # the first slot whose layer has not been dropped yet
    length: Int[Array, ""]  # the number of layers of the chains of the beam
    width: Int[Array, ""]  # the width of this pass; above `max_width` after the last one
    cache: ScoreCache


@pytree_dataclass
class RemovalSearch:
    """Beam search that drops one layer at a time from the parents of the bank.

    A pass begins with the longest parents. If there are none, it begins with all layers, in the
    order of their positions or tokens, under each head. It keeps the best `width` chains of each
    length, down to `min_layers`. Chains with more than `max_layers` layers, or that cost more than
    `max_cost`, are scored and charged, but not reported. No chain is scored twice, and the passes
    share what they know. Keys are not used.

    Attributes:
      width: number of chains of each length that the first pass keeps; 1 for greedy removal.
      max_width: upper bound of the width, which doubles from pass to pass.
      num_chains: number of chains to score per step.

    Raises:
      ValueError: if a size is out of range.
    """

    is_deterministic = True
    needs_gradient = False
    needs_invertible = False
    reads_activations = False

    width: int = static(default=1)
    max_width: int = static(default=8)
    num_chains: int = static(default=8)

    def __post_init__(self) -> None:
        check_at_least_one(width=self.width, num_chains=self.num_chains)
        check_integers(at_least=self.width, max_width=self.max_width)

    @checked
    def check(self, problem: Problem) -> None:
        """Check that there is a chain to begin with.

        Args:
          problem: the problem to search.

        Raises:
          ValueError: if each parent has fewer layers than `min_layers`, or does not follow the
            space of the problem.
        """
        wide = _widen(problem)
        rows = wide.space.contains(jnp.asarray(_list_beginnings(wide)))
        if not bool(rows.any()):
            raise ValueError(
                f"expected a parent of at least {problem.min_layers} layers that is a chain of the "
                f"problem's space for RemovalSearch, got none of {len(rows)}"
            )

    @checked
    def init(self, key: Key[Array, ""], problem: Problem) -> State:
        """Return the state before the first pass.

        Args:
          key: the PRNG key; not used.
          problem: the problem to search.
        """
        wide = _widen(problem)
        empty, zero = empty_pool(self.max_width, wide), jnp.zeros((), jnp.int32)
        width = jnp.array(self.width, jnp.int32)
        state = State(empty, empty, zero, zero, zero, width, score_cache.init(wide))
        return self._start_pass(state, wide, width)

    @checked
    def step(self, key: Key[Array, ""], state: State, problem: Problem) -> tuple[State, Info]:
        """Drop the next layers of one chain, one at a time, and score what is left.

        Args:
          key: the PRNG key; not used.
          state: the state that `init` or the last step returned.
          problem: the problem to search.
        """
        wide = _widen(problem)
        chain = state.beam.chains[state.parent]
        slots = jnp.arange(chain.shape[0])[None]
        gap = state.slot + jnp.arange(self.num_chains)
        later = jnp.append(chain[1:], PADDING)
        rows = jnp.where(slots < gap[:, None], chain[None], later[None])
        is_open = state.width <= self.max_width
        # In a run of equal layers, only the first one is dropped.
        own = chain[jnp.minimum(gap, chain.shape[0] - 1)]
        is_repeat = (gap > 0) & (own == chain[jnp.clip(gap - 1, 0, chain.shape[0] - 1)])
        is_new = is_open & (gap < state.length) & (state.length > problem.min_layers) & ~is_repeat
        is_new &= wide.space.contains(rows)
        # Other rows repeat a chain, so that they take no part in a staged step.
        filler = jnp.where(is_new.any(), rows[jnp.argmax(is_new)], wide.space.head_alone)
        scored = jnp.where(is_new[:, None], rows, filler[None])
        cache, loss, layer_calls = score_cache.evaluate_cached(state.cache, wide, scored)
        loss = jnp.where(is_new & jnp.isfinite(loss), loss, jnp.inf)
        state = state._replace(
            cache=cache, shorter=merge(state.shorter, scored, loss), slot=state.slot + len(gap)
        )
        num_slots = problem.max_layers + 1
        chains = scored[:, :num_slots]
        is_reported = is_new & (state.length - 1 <= problem.max_layers)
        is_reported &= ~problem.exceeds_limit(problem.chain_cost(chains))
        chains = jnp.where(is_reported[:, None], chains, PADDING)
        info = Info(chains, jnp.where(is_reported, loss, jnp.inf), layer_calls)
        return self._advance(state, wide), info

    def _advance(self, state: State, wide: Problem) -> State:
        """Move to the next chain of the beam, to shorter chains, or to the next pass."""
        is_done = state.slot >= state.length
        parent = state.parent + is_done
        is_used = jnp.isfinite(state.beam.loss) & (jnp.arange(self.max_width) < state.width)
        is_last = is_done & (parent >= is_used.sum())
        place = jnp.where(is_last, 0, parent)
        moved = state._replace(
            beam=jax.tree.map(lambda a, b: jnp.where(is_last, a, b), state.shorter, state.beam),
            shorter=jax.tree.map(
                lambda a, b: jnp.where(is_last, a, b),
                empty_pool(self.max_width, wide),
                state.shorter,
            ),
            parent=place,
            slot=jnp.where(is_done, 0, state.slot),
            length=state.length - is_last,
        )
        is_over = is_last & (
            (moved.length <= wide.min_layers) | ~jnp.isfinite(moved.beam.loss).any()
        )
        width = jnp.where(state.width <= self.max_width, 2 * state.width, state.width)
        begun = self._start_pass(moved, wide, width)
        return jax.tree.map(lambda a, b: jnp.where(is_over, a, b), begun, moved)

    def _start_pass(self, state: State, wide: Problem, width: Int[Array, ""]) -> State:
        """Return the state at the start of a pass, with the longest beginnings."""
        rows = jnp.asarray(_list_beginnings(wide))
        is_chain = wide.space.contains(rows)
        length = jnp.where(is_chain, wide.space.count_layers(rows), 0)
        # The losses of the beginnings do not matter: all of them are shortened.
        zero = jnp.zeros((), jnp.int32)
        beam = merge(
            empty_pool(self.max_width, wide),
            rows,
            jnp.where(is_chain & (length == length.max()), 0.0, jnp.inf),
        )
        return state._replace(
            beam=beam,
            shorter=empty_pool(self.max_width, wide),
            parent=zero,
            slot=zero,
            length=length.max().astype(jnp.int32),
            width=width,
        )


def _widen(problem: Problem) -> Problem:
    """Return the problem with room for the chains that the search begins with."""
    lengths = (len(row) - 1 for row in _list_tokens(problem))
    return problem.relax(max(problem.max_layers, *lengths))


def _list_beginnings(wide: Problem) -> Int[Array, "C S"]:
    return jnp.asarray(pad(_list_tokens(wide), wide.max_layers))


def _list_tokens(problem: Problem) -> list[list[int]]:
    """List the parents of the bank, or else all layers under each head, one for each position."""
    bank = problem.bank
    if bank.parents:
        return [list(parent) for parent in bank.parents]
    positions = problem.space.positions or range(bank.num_layers)
    first = {position: token for token, position in reversed([*enumerate(positions)])}
    layers = [first[position] for position in sorted(first)]
    return [[*layers, bank.num_layers + head] for head in range(bank.num_heads)]
