"""Meeting in the middle of a beam of prefixes and all short suffixes, pulled back from the loss's target (`jchain.inverse.suffixes`).

A step extends the prefixes of a beam (Lowerre 1976, the Harpy system) by every layer, predicts their loss with every tail, and
evaluates the most promising of these chains. What a prefix is worth is its best prediction, so a beam looks a tail ahead for no
layer call. A pass goes from the empty prefix to full chains; the next one has other examples as probes and pulls back other
suffixes, from activations of the best chain so far.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jchain._typing import Array, Bool, Float, Int, Key, Shaped
from jchain.chain import PADDING, count_layers
from jchain.engine import score_cache
from jchain.engine.layer_calls import apply_all
from jchain.engine.score_cache import ScoreCache
from jchain.gradient.linearize import forward_pass
from jchain.groups import LayerGroup
from jchain.inverse.pullback import inverse_groups
from jchain.inverse.suffixes import Suffixes, predict, pull_back_suffixes
from jchain.problem import Problem
from jchain.pytree import pytree_dataclass, static
from jchain.search.base import Info
from jchain.search.descent import allocate_candidates, sample_candidates

# So many times as many chains are looked up as are evaluated, to pass over those that were tried.
_MARGIN = 4


class State(NamedTuple):
    """What the next step needs."""

    prefixes: Int[Array, "W L"]  # [W, L], the beam, -1 behind their layers
    rows: Int[Array, "B"]  # [b], the probes of this pass
    hidden: Shaped[Array, "W B ..."]  # [W, b, ...F], on these
    is_there: Bool[Array, "W"]
    depth: Int[Array, ""]  # layers of each
    suffixes: Suffixes
    inverses: tuple[LayerGroup, ...]
    best: Int[Array, "L"]  # the best chain so far
    best_loss: Float[Array, ""]
    cache: ScoreCache


@pytree_dataclass
class SuffixBeamSearch:
    """Beam search that meets short suffixes pulled back from the target. Layers must be such that can be undone.

    Attributes:
      width: prefixes of the beam.
      num_suffix: most layers of a tail.
      num_candidates: layers that suffixes are made of, of each module its share and at least one, drawn anew for each pass.
      num_moves: chains that are evaluated in a step.
      num_probes: examples on which prefixes and suffixes meet, drawn anew for each pass; a layer call on them counts as that share
        of one.
      temperature: of the Gumbel noise on the predicted loss by which prefixes and chains are chosen, in units of how much better
        the best one is than the mean; without noise passes would be alike where all examples are probes.
    """

    width: int = static(default=16)
    num_suffix: int = static(default=1)
    num_candidates: int = static(default=12)
    num_moves: int = static(default=8)
    num_probes: int = static(default=64)
    temperature: float = 0.01

    def __post_init__(self) -> None:
        sizes = {
            name: getattr(self, name)
            for name in ("width", "num_candidates", "num_moves", "num_probes")
        }
        if min(sizes.values()) < 1 or self.num_suffix < 0:
            raise ValueError(
                f"expected sizes of at least 1 and num_suffix of at least 0, got {sizes} and {self.num_suffix}"
            )

    def init(self, key: Key[Array, ""], problem: Problem) -> State:
        inverses = tuple(inverse for inverse in inverse_groups(problem.bank) if inverse is not None)
        if len(inverses) < len(problem.bank.layers):
            modules = [type(group.module).__name__ for group in problem.bank.layers]
            raise ValueError(
                f"expected layers that can be undone, each module with invert(params), got {modules}"
            )
        rows = self._draw_rows(key, problem)
        few = problem.take(rows)
        hidden = few.bank.embed(few.data.x)
        num_slots = problem.max_layers + 1
        found: Suffixes = jax.eval_shape(lambda: self._pull(key, few, inverses, hidden))  # pyright: ignore[reportAssignmentType]
        suffixes = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), found)
        return State(
            jnp.full((self.width, num_slots), PADDING, jnp.int32),
            rows,
            jnp.broadcast_to(hidden, (self.width, *hidden.shape)),
            jnp.arange(self.width) == 0,
            jnp.zeros((), jnp.int32),
            suffixes,
            inverses,
            jnp.full(num_slots, PADDING, jnp.int32).at[0].set(problem.bank.num_layers),
            jnp.full((), jnp.inf, jnp.float32),
            score_cache.init(problem),
        )

    def step(self, key: Key[Array, ""], state: State, problem: Problem) -> tuple[State, Info]:
        # A plain vmap would pull back suffixes in every step of every run.
        @jax.custom_batching.sequential_vmap
        def look(
            problem: Problem, key: Array, state: State, temperature: Array
        ) -> tuple[State, Array, Array]:
            start_key, key = jax.random.split(key)
            state = jax.lax.cond(
                state.depth == 0, self._start, lambda *args: args[1], start_key, state, problem
            )
            return self._extend(key, state, problem.take(state.rows), temperature)

        looked, chains, num_applied = look(
            problem, key, state._replace(cache=None), jnp.asarray(self.temperature)
        )
        # Those that were not tried before, as far as there are.
        order = jnp.argsort(score_cache.is_cached(state.cache, problem, chains), stable=True)[
            : self.num_moves
        ]
        chains = chains[order]
        cache, loss, layer_calls = score_cache.evaluate_cached(state.cache, problem, chains)
        # Where there was no chain to look at, a head alone was, which may be too short.
        is_chain = count_layers(chains, problem.bank.num_layers) >= problem.min_layers
        chains, loss = (
            jnp.where(is_chain[:, None], chains, PADDING),
            jnp.where(is_chain, loss, jnp.inf),
        )
        best = jnp.argmin(loss)
        is_better = loss[best] < state.best_loss
        next_state = looked._replace(
            cache=cache,
            best=jnp.where(is_better, chains[best], state.best),
            best_loss=jnp.where(is_better, loss[best], state.best_loss),
        )
        probe_calls = -(-num_applied * len(state.rows) // len(problem.data.x))
        return next_state, Info(chains, loss, (layer_calls + probe_calls).astype(jnp.int32))

    def _draw_rows(self, key: Array, problem: Problem) -> Int[Array, "b"]:
        size = len(problem.data.x)
        return jax.random.choice(key, size, (min(self.num_probes, size),), replace=False)

    def _start(self, key: Array, state: State, problem: Problem) -> State:
        """A pass, with probes of its own: the beam would be wrong about the same chains again."""
        rows = self._draw_rows(key, problem)
        root = problem.bank.embed(problem.data.x[rows])
        return state._replace(rows=rows, hidden=jnp.broadcast_to(root, state.hidden.shape))

    def _pull(
        self, key: Array, few: Problem, inverses: tuple[LayerGroup, ...], near: Array
    ) -> Suffixes:
        members = sample_candidates(key, few, allocate_candidates(few, self.num_candidates))
        return pull_back_suffixes(
            few, inverses, members, near, min(self.num_suffix, few.max_layers)
        )

    def _refresh(self, key: Array, state: State, few: Problem) -> tuple[Suffixes, Int[Array, ""]]:
        """Where a pass starts, suffixes from activations of the best chain so far; and how many layers were applied to the probes."""

        def pull() -> tuple[Suffixes, Array]:
            forward = forward_pass(few, state.best)
            suffixes = self._pull(key, few, state.inverses, forward.hidden[forward.length])
            num_members = sum(allocate_candidates(few, self.num_candidates))
            lengths = range(1, min(self.num_suffix, few.max_layers) + 1)
            num_grown = few.bank.num_heads * sum(num_members**length for length in lengths)
            return suffixes, jnp.asarray(
                forward.length + num_grown * (2 + suffixes.outputs.shape[-1]), jnp.int32
            )

        return jax.lax.cond(state.depth == 0, pull, lambda: (state.suffixes, jnp.int32(0)))

    def _extend(
        self, key: Array, state: State, few: Problem, temperature: Array
    ) -> tuple[State, Array, Array]:
        """The beam one layer on, the chains to be evaluated, and how many layers were applied to the probes."""
        pull_key, noise_key = jax.random.split(key)
        suffixes, num_pulled = self._refresh(pull_key, state, few)
        rows = _grow(few, state)
        num_suffix = (suffixes.tokens >= 0).sum(axis=1)
        loss = (
            predict(few, suffixes, rows.hidden)
            + few.layer_penalty(rows.chains)[:, None]
            + few.layer_penalty(suffixes.tokens)[None]
        )
        does_fit = rows.depth[:, None] + num_suffix[None] <= few.max_layers + 1
        loss = jnp.where(rows.is_there[:, None] & does_fit & jnp.isfinite(loss), loss, jnp.inf)

        is_pair = jnp.isfinite(loss)
        spread = jnp.mean(loss, where=is_pair) - jnp.min(loss)
        hope = (
            jnp.where(is_pair, temperature * spread * jax.random.gumbel(noise_key, loss.shape), 0.0)
            - loss
        )
        # Of chains that are too short nothing is evaluated, but they say which prefixes are good.
        is_long = rows.depth[:, None] + num_suffix[None] > few.min_layers
        gain, pairs = jax.lax.top_k(
            jnp.where(is_long, hope, -jnp.inf).reshape(-1), min(_MARGIN * self.num_moves, loss.size)
        )
        row, tail = jnp.divmod(pairs, loss.shape[1])
        chains = _attach(rows.chains[row], rows.depth[row], suffixes.tokens[tail])
        stop = jnp.full(few.max_layers + 1, PADDING, jnp.int32).at[0].set(few.bank.num_layers)
        chains = jnp.where(jnp.isfinite(gain)[:, None], chains, stop[None]).astype(jnp.int32)

        worth, kept = jax.lax.top_k(hope[1:].max(axis=1), self.width)
        kept = 1 + kept
        is_over = state.depth + 1 >= few.max_layers
        next_state = state._replace(
            prefixes=jnp.where(is_over, PADDING, rows.chains[kept]),
            hidden=rows.hidden[kept],
            is_there=jnp.where(
                is_over, jnp.arange(self.width) == 0, rows.is_there[kept] & jnp.isfinite(worth)
            ),
            depth=jnp.where(is_over, 0, state.depth + 1),
            suffixes=suffixes,
        )
        return next_state, chains, num_pulled + rows.is_there[1:].sum()


class _Prefixes(NamedTuple):
    """Prefixes that meet suffixes."""

    chains: Int[Array, "R L"]
    hidden: Shaped[Array, "R B ..."]
    is_there: Bool[Array, "R"]
    depth: Int[Array, "R"]


def _grow(few: Problem, state: State) -> _Prefixes:
    """The children of the beam, and before them the empty prefix, which is there at the start of a pass."""
    num_layers = few.bank.num_layers
    made = jax.lax.map(lambda hidden: apply_all(few.bank.layers, hidden), state.hidden)
    tokens = jnp.tile(jnp.arange(num_layers, dtype=jnp.int32), len(state.prefixes))
    chains = jnp.repeat(state.prefixes, num_layers, axis=0)
    chains = jnp.where(jnp.arange(few.max_layers + 1)[None] == state.depth, tokens[:, None], chains)
    does_extend = jnp.repeat(state.is_there & (state.depth < few.max_layers), num_layers)
    return _Prefixes(
        jnp.concatenate([state.prefixes[:1], chains]),
        jnp.concatenate([state.hidden[:1], made.reshape(-1, *made.shape[2:])]),
        jnp.append(state.depth == 0, does_extend),
        jnp.where(jnp.arange(1 + len(chains)) == 0, state.depth, state.depth + 1),
    )


def _attach(
    chains: Int[Array, "Q L"], depth: Int[Array, "Q"], suffixes: Int[Array, "Q T"]
) -> Int[Array, "Q L"]:
    """Each tail behind its prefix; its own padding is the chain's."""
    place = jnp.arange(chains.shape[1])[None] - depth[:, None]
    behind = jnp.take_along_axis(suffixes, jnp.clip(place, 0, suffixes.shape[1] - 1), axis=1)
    return jnp.where(place < 0, chains, jnp.where(place < suffixes.shape[1], behind, PADDING))
