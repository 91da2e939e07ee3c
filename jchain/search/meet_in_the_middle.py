"""Meeting in the middle of a beam of prefixes and all short tails, pulled back from the loss's target (`jchain.tails`).

A step extends the prefixes of a beam (Lowerre 1976, the Harpy system) by every layer, predicts their loss with every tail, and
evaluates the most promising of these chains. What a prefix is worth is its best prediction, so a beam looks a tail ahead for no
layer call. A pass goes from the empty prefix to full chains; the next one pulls back other tails, from activations of the best
chain so far, and takes prefixes at random among the good ones.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jchain import memo as memo_lib
from jchain._typing import Array, Bool, Float, Int, Key, Shaped
from jchain.bank import LayerGroup
from jchain.chain import PADDING
from jchain.engine import apply_all
from jchain.inverse import undo_groups
from jchain.linearize import go_forward
from jchain.memo import Memo
from jchain.problem import Problem
from jchain.pytree import pytree_dataclass, static
from jchain.search.base import Info
from jchain.starts import draw_members, share_members
from jchain.tails import Tails, predict, pull_tails


class State(NamedTuple):
    """What the next step needs."""

    prefixes: Int[Array, "W L"]  # [W, L], the beam, -1 behind their layers
    hidden: Shaped[Array, "W B ..."]  # [W, b, ...F], on the probes
    is_there: Bool[Array, "W"]
    depth: Int[Array, ""]  # layers of each
    tails: Tails
    inverses: tuple[LayerGroup, ...]
    best: Int[Array, "L"]  # the best chain so far
    best_loss: Float[Array, ""]
    is_first: Bool[Array, ""]  # the pass takes the best prefixes, not some of the good ones
    memo: Memo


@pytree_dataclass
class MeetInTheMiddle:
    """Beam search that meets short tails pulled back from the target. Layers must be such that can be undone.

    Attributes:
      width: prefixes of the beam.
      num_tail: most layers of a tail.
      num_candidates: layers that tails are made of, of each module its share and at least one, drawn anew for each pass.
      num_moves: chains that are evaluated in a step.
      num_probes: examples on which prefixes and tails meet, evenly spaced; a layer call on them counts as that share of one.
      temperature: of the Gumbel noise on the log of the predicted loss by which a later pass takes prefixes.
    """

    width: int = static(default=8)
    num_tail: int = static(default=2)
    num_candidates: int = static(default=12)
    num_moves: int = static(default=8)
    num_probes: int = static(default=64)
    temperature: float = 0.1

    def __post_init__(self) -> None:
        sizes = {name: getattr(self, name) for name in ("width", "num_candidates", "num_moves", "num_probes")}
        if min(sizes.values()) < 1 or self.num_tail < 0:
            raise ValueError(
                f"expected sizes of at least 1 and num_tail of at least 0, got {sizes} and {self.num_tail}"
            )

    def init(self, key: Key[Array, ""], problem: Problem) -> State:
        inverses = tuple(inverse for inverse in undo_groups(problem.bank) if inverse is not None)
        if len(inverses) < len(problem.bank.layers):
            modules = [type(group.module).__name__ for group in problem.bank.layers]
            raise ValueError(f"expected layers that can be undone, each module with invert(params), got {modules}")
        few = self._take(problem)
        hidden = few.bank.embed(few.data.x)
        num_slots = problem.max_layers + 1
        found: Tails = jax.eval_shape(lambda: self._pull(key, few, inverses, hidden))  # pyright: ignore[reportAssignmentType]
        tails = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), found)
        return State(
            jnp.full((self.width, num_slots), PADDING, jnp.int32),
            jnp.broadcast_to(hidden, (self.width, *hidden.shape)),
            jnp.arange(self.width) == 0,
            jnp.zeros((), jnp.int32),
            tails,
            inverses,
            jnp.full(num_slots, PADDING, jnp.int32).at[0].set(problem.bank.num_layers),
            jnp.full((), jnp.inf, jnp.float32),
            jnp.array(True),
            memo_lib.init(problem),
        )

    def step(self, key: Key[Array, ""], state: State, problem: Problem) -> tuple[State, Info]:
        few = self._take(problem)

        # A plain vmap would pull back tails in every step of every run.
        @jax.custom_batching.sequential_vmap
        def look(problem: Problem, key: Array, state: State) -> tuple[State, Array, Array]:
            return self._extend(key, state, few, problem)

        looked, chains, num_applied = look(problem, key, state._replace(memo=None))
        memo, loss, layer_calls = memo_lib.score(state.memo, problem, chains)
        best = jnp.argmin(loss)
        is_better = loss[best] < state.best_loss
        next_state = looked._replace(
            memo=memo,
            best=jnp.where(is_better, chains[best], state.best),
            best_loss=jnp.where(is_better, loss[best], state.best_loss),
        )
        share = len(few.data.x) / len(problem.data.x)
        return next_state, Info(chains, loss, layer_calls + jnp.ceil(num_applied * share).astype(jnp.int32))

    def _take(self, problem: Problem) -> Problem:
        size = len(problem.data.x)
        rows = np.unique(np.linspace(0, size - 1, min(self.num_probes, size)).astype(int))
        return problem.take(rows)

    def _pull(self, key: Array, few: Problem, inverses: tuple[LayerGroup, ...], near: Array) -> Tails:
        members = draw_members(key, few, share_members(few, self.num_candidates))
        return pull_tails(few, inverses, members, near, min(self.num_tail, few.max_layers))

    def _extend(self, key: Array, state: State, few: Problem, problem: Problem) -> tuple[State, Array, Array]:
        """The beam one layer on, the chains to be evaluated, and how many layers were applied to the probes."""
        pull_key, noise_key = jax.random.split(key)
        bank, num_slots = few.bank, few.max_layers + 1
        is_start = state.depth == 0

        def pull() -> tuple[Tails, Array]:
            forward = go_forward(few, state.best)
            tails = self._pull(pull_key, few, state.inverses, forward.hidden[forward.length])
            outputs = tails.outputs.shape[-1]
            num_grown = sum(
                bank.num_heads * sum(share_members(few, self.num_candidates)) ** length
                for length in range(1, min(self.num_tail, few.max_layers) + 1)
            )
            return tails, forward.length + num_grown * (2 + outputs)

        tails, num_pulled = jax.lax.cond(is_start, pull, lambda: (state.tails, jnp.int32(0)))
        made = jax.lax.map(lambda h: apply_all(bank.layers, h), state.hidden)
        made = made.reshape(-1, *made.shape[2:])
        tokens = jnp.tile(jnp.arange(bank.num_layers, dtype=jnp.int32), self.width)
        prefixes = jnp.repeat(state.prefixes, bank.num_layers, axis=0)
        prefixes = jnp.where(jnp.arange(num_slots)[None] == state.depth, tokens[:, None], prefixes)
        is_there = jnp.repeat(state.is_there, bank.num_layers)
        depth = state.depth + 1

        # A tail is placed behind the prefix; its own padding is the chain's.
        num_tail = (tails.tokens >= 0).sum(axis=1) - 1
        width = tails.tokens.shape[1]
        place = jnp.arange(num_slots)[None] - depth
        behind = jnp.where((place >= 0) & (place < width), tails.tokens[:, jnp.clip(place[0], 0, width - 1)], PADDING)
        price = few.price(prefixes)[:, None] + few.price(tails.tokens)[None]
        loss = jax.lax.map(lambda h: predict(few, tails, h), made) + price
        is_chain = is_there[:, None] & (num_tail + depth < num_slots)[None] & jnp.isfinite(loss)
        loss = jnp.where(is_chain, loss, jnp.inf)

        gain, pairs = jax.lax.top_k(-loss.reshape(-1), min(self.num_moves, loss.size))
        row, tail = jnp.divmod(pairs, loss.shape[1])
        chains = jnp.where(place < 0, prefixes[row], behind[tail])
        stop = jnp.full(num_slots, PADDING, jnp.int32).at[0].set(bank.num_layers)
        chains = jnp.where(jnp.isfinite(gain)[:, None], chains, stop[None])

        worth = jnp.log(jnp.maximum(loss.min(axis=1), 1e-6))
        noise = jnp.where(state.is_first, 0.0, self.temperature) * jax.random.gumbel(noise_key, worth.shape)
        _, kept = (
            jax.lax.top_k(-worth + noise, self.width) if len(worth) >= self.width else (None, jnp.arange(self.width))
        )
        is_over = depth >= few.max_layers
        hidden = few.bank.embed(few.data.x)
        is_root = jnp.arange(self.width) == 0
        next_state = state._replace(
            prefixes=jnp.where(is_over, PADDING, prefixes[kept]),
            hidden=jnp.where(is_over, jnp.broadcast_to(hidden, state.hidden.shape), made[kept]),
            is_there=jnp.where(is_over, is_root, is_there[kept] & jnp.isfinite(worth[kept])),
            depth=jnp.where(is_over, 0, depth),
            tails=tails,
            is_first=state.is_first & ~is_over,
        )
        return next_state, chains.astype(jnp.int32), num_pulled + bank.num_layers * state.is_there.sum()
