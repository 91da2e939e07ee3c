"""Beam search over prefixes that looks ahead with short suffixes (`jchain.inverse.suffixes`).

A step extends each prefix of a beam (Lowerre 1976, the Harpy system) by every layer, predicts the
loss of each new prefix with every suffix that was pulled back from target outputs, and evaluates
the most promising of these chains. A prefix is ranked by its best prediction, so the lookahead
costs no layer calls. A pass goes from the empty prefix to full chains. Each pass draws new probe
examples and pulls back new suffixes, starting from the activations of the best chain so far.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jchain._typing import Array, Bool, Float, Int, Key, Shaped
from jchain.arguments import check_at_least_one, check_integers, check_numbers, checked
from jchain.chain import PADDING
from jchain.engine import score_cache
from jchain.engine.layer_calls import apply_all, infer_hidden
from jchain.engine.score_cache import ScoreCache
from jchain.gradient.linearize import forward_pass
from jchain.groups import LayerGroup
from jchain.inverse.pullback import Invertible, inverse_groups
from jchain.inverse.suffixes import Suffixes, predict_losses, pull_back_suffixes
from jchain.modules.activations import check_one_array
from jchain.problem import Problem
from jchain.pytree import pick, pytree_dataclass, static
from jchain.search.descent import allocate_candidates, sample_candidates
from jchain.search.protocol import Info
from jchain.stages.binding import check_no_stages

# How many chains are proposed for each one that is evaluated, so that cached ones can be skipped.
_MARGIN = 4


class State(NamedTuple):
    """The state that one step passes to the next."""

    prefixes: Int[Array, "W L"]  # [W, L], the beam, padded with -1
    rows: Int[Array, "B"]  # [b], the probe examples of this pass
    hidden: Shaped[Array, "W B ..."]  # [W, b, ...F], activations of each prefix on the probes
    is_valid: Bool[Array, "W"]  # which rows hold a prefix
    length: Int[Array, ""]  # the number of layers of each prefix; 0 at the start of a pass
    suffixes: Suffixes
    inverses: tuple[LayerGroup, ...]
    best: Int[Array, "L"]  # the best chain so far
    best_loss: Float[Array, ""]
    cache: ScoreCache


@pytree_dataclass
class SuffixBeamSearch:
    """Beam search over prefixes that predicts their loss with suffixes pulled back from a target.

    The layers of the bank must be invertible.

    Attributes:
      width: number of prefixes in the beam.
      max_suffix_layers: maximum number of layers in a suffix.
      num_candidates: number of layers that suffixes are made of, drawn anew for each pass. Each
        group of the bank gets a share in proportion to its size, and at least one.
      num_chains: number of chains to evaluate per step.
      num_probes: number of examples that losses are predicted on, drawn anew for each pass. A layer
        call on 1/n of all examples counts as 1/n of a layer call.
      temperature: scale of the Gumbel noise that is added to the predicted losses before they rank
        prefixes and chains, in units of the difference between their mean and their minimum. If all
        examples are probes, passes without noise would repeat.

    Raises:
      ValueError: if a size is below 1; only `max_suffix_layers` may be 0.
    """

    is_deterministic = False
    needs_gradient = False
    needs_invertible = True
    reads_activations = True

    width: int = static(default=16)
    max_suffix_layers: int = static(default=1)
    num_candidates: int = static(default=12)
    num_chains: int = static(default=8)
    num_probes: int = static(default=64)
    temperature: float = 0.01

    def __post_init__(self) -> None:
        check_at_least_one(
            width=self.width,
            num_candidates=self.num_candidates,
            num_chains=self.num_chains,
            num_probes=self.num_probes,
        )
        check_integers(at_least=0, max_suffix_layers=self.max_suffix_layers)
        check_numbers(at_least=0, temperature=self.temperature)

    @checked
    def check(self, problem: Problem) -> None:
        """Check that the bank has only invertible layers, and that activations are one array.

        Args:
          problem: the problem to search.

        Raises:
          ValueError: if activations are not one array, a layer cannot be inverted, or the bank has
            stages.
        """
        check_no_stages(problem.bank.layers, "SuffixBeamSearch, which inverts layers")
        check_one_array(activations=infer_hidden(problem))
        modules = [group.module for group in problem.bank.layers]
        if not all(isinstance(module, Invertible) for module in modules):
            names = [type(module).__name__ for module in modules]
            raise ValueError(
                f"expected invertible layers, each module with invert(params), got {names}"
            )

    @checked
    def init(self, key: Key[Array, ""], problem: Problem) -> State:
        """Return the state before the first pass: probe examples, and a beam of the empty prefix.

        See `Search.init`.

        Args:
          key: the PRNG key; consumed by this call.
          problem: the problem to search.

        Raises:
          ValueError: if activations are not one array, a layer cannot be inverted, or the bank has
            stages.
        """
        self.check(problem)
        inverses = tuple(inverse for inverse in inverse_groups(problem.bank) if inverse is not None)
        rows = self._draw_rows(key, problem)
        probe_problem = problem.take(rows)
        hidden = probe_problem.bank.embed(probe_problem.data.x)
        num_slots = problem.max_layers + 1
        shapes = jax.eval_shape(lambda: self._pull(key, probe_problem, inverses, hidden))
        suffixes = Suffixes(*(jnp.zeros(shape.shape, shape.dtype) for shape in shapes))
        return State(
            jnp.full((self.width, num_slots), PADDING, jnp.int32),
            rows,
            jnp.broadcast_to(hidden, (self.width, *hidden.shape)),
            jnp.arange(self.width) == 0,
            jnp.zeros((), jnp.int32),
            suffixes,
            inverses,
            problem.space.head_alone,
            jnp.full((), jnp.inf, jnp.float32),
            score_cache.init(problem),
        )

    @checked
    def step(self, key: Key[Array, ""], state: State, problem: Problem) -> tuple[State, Info]:
        """Extend the beam by one layer, and evaluate the most promising chains; see `Search.step`.

        Args:
          key: the PRNG key; consumed by this call.
          state: the state that `init` or the last step returned.
          problem: the problem to search.
        """

        # Under vmap, run the whole function in sequence, not only its branches
        # (`cond_in_sequence`). A plain vmap would pull back suffixes in every step of every run,
        # and batched products would round differently.
        @jax.custom_batching.sequential_vmap
        def look_ahead(
            problem: Problem, key: Array, state: State, temperature: Array
        ) -> tuple[State, Array, Array]:
            start_key, key = jax.random.split(key)
            state = jax.lax.cond(
                state.length == 0, self._start, lambda *args: args[1], start_key, state, problem
            )
            return self._extend(key, state, problem.take(state.rows), temperature)

        next_state, chains, num_applied = look_ahead(
            problem, key, state._replace(cache=None), jnp.asarray(self.temperature)
        )
        # Put chains that are not cached first.
        order = jnp.argsort(score_cache.is_cached(state.cache, problem, chains), stable=True)[
            : self.num_chains
        ]
        chains = chains[order]
        cache, loss, layer_calls = score_cache.evaluate_cached(state.cache, problem, chains)
        # Rows without a chain hold a lone head, which may have too few layers (`min_layers`).
        is_chain = problem.space.count_layers(chains) >= problem.min_layers
        chains, loss = (
            jnp.where(is_chain[:, None], chains, PADDING),
            jnp.where(is_chain, loss, jnp.inf),
        )
        best = jnp.argmin(loss)
        is_better = loss[best] < state.best_loss
        next_state = next_state._replace(
            cache=cache,
            best=jnp.where(is_better, chains[best], state.best),
            best_loss=jnp.where(is_better, loss[best], state.best_loss),
        )
        probe_calls = -(-num_applied * len(state.rows) // problem.num_examples)
        return next_state, Info(chains, loss, (layer_calls + probe_calls).astype(jnp.int32))

    def _draw_rows(self, key: Array, problem: Problem) -> Int[Array, "b"]:
        size = problem.num_examples
        return jax.random.choice(key, size, (min(self.num_probes, size),), replace=False)

    def _start(self, key: Array, state: State, problem: Problem) -> State:
        """Start a pass with new probes, because the same probes would repeat its errors."""
        rows = self._draw_rows(key, problem)
        root = problem.bank.embed(pick(problem.data.x, rows))
        return state._replace(rows=rows, hidden=jnp.broadcast_to(root, state.hidden.shape))

    def _pull(
        self, key: Array, probe_problem: Problem, inverses: tuple[LayerGroup, ...], near: Array
    ) -> Suffixes:
        members = sample_candidates(
            key, probe_problem, allocate_candidates(probe_problem, self.num_candidates)
        )
        return pull_back_suffixes(
            probe_problem,
            inverses,
            members,
            near,
            min(self.max_suffix_layers, probe_problem.max_layers),
        )

    def _refresh(
        self, key: Array, state: State, probe_problem: Problem
    ) -> tuple[Suffixes, Int[Array, ""]]:
        """Pull suffixes back from the best chain so far, but only at the start of a pass.

        Returns the suffixes and the number of layer calls on the probes.
        """

        def pull() -> tuple[Suffixes, Array]:
            forward = forward_pass(probe_problem, state.best)
            suffixes = self._pull(
                key, probe_problem, state.inverses, forward.hidden[forward.length]
            )
            num_members = sum(allocate_candidates(probe_problem, self.num_candidates))
            lengths = range(1, min(self.max_suffix_layers, probe_problem.max_layers) + 1)
            num_grown = probe_problem.bank.num_heads * sum(
                num_members**length for length in lengths
            )
            return suffixes, jnp.asarray(
                forward.length + num_grown * (2 + suffixes.outputs.shape[-1]), jnp.int32
            )

        return jax.lax.cond(state.length == 0, pull, lambda: (state.suffixes, jnp.int32(0)))

    def _extend(
        self, key: Array, state: State, probe_problem: Problem, temperature: Array
    ) -> tuple[State, Array, Array]:
        """Extend the beam by one layer.

        Returns the state, the chains to evaluate, and the number of layer calls on the probes.
        """
        pull_key, noise_key = jax.random.split(key)
        suffixes, num_pulled = self._refresh(pull_key, state, probe_problem)
        rows = _extend_prefixes(probe_problem, state)
        suffix_length = (suffixes.tokens >= 0).sum(axis=1)
        loss = (
            predict_losses(probe_problem, suffixes, rows.hidden)
            + probe_problem.penalty(rows.chains)[:, None]
            + probe_problem.penalty(suffixes.tokens)[None]
        )
        cost = (
            probe_problem.chain_cost(rows.chains)[:, None]
            + probe_problem.chain_cost(suffixes.tokens)[None]
        )
        loss = jnp.where(probe_problem.exceeds_limit(cost), jnp.inf, loss)
        is_short_enough = rows.length[:, None] + suffix_length[None] <= probe_problem.max_layers + 1
        loss = jnp.where(
            rows.is_valid[:, None] & is_short_enough & jnp.isfinite(loss), loss, jnp.inf
        )

        is_pair = jnp.isfinite(loss)
        spread = jnp.mean(loss, where=is_pair) - jnp.min(loss)
        noise = jax.random.gumbel(noise_key, loss.shape, jnp.float32)
        noisy_gain = jnp.where(is_pair, temperature * spread * noise, 0.0) - loss
        # Chains of fewer than `min_layers` layers are not evaluated, but their predictions still
        # rank prefixes.
        is_long_enough = rows.length[:, None] + suffix_length[None] > probe_problem.min_layers
        gain, pairs = jax.lax.top_k(
            jnp.where(is_long_enough, noisy_gain, -jnp.inf).reshape(-1),
            min(_MARGIN * self.num_chains, loss.size),
        )
        row, suffix = jnp.divmod(pairs, loss.shape[1])
        chains = _attach(rows.chains[row], rows.length[row], suffixes.tokens[suffix])
        chains = jnp.where(
            jnp.isfinite(gain)[:, None], chains, probe_problem.space.head_alone[None]
        ).astype(jnp.int32)

        prefix_gain, kept = jax.lax.top_k(noisy_gain[1:].max(axis=1), self.width)
        kept = 1 + kept
        is_over = state.length + 1 >= probe_problem.max_layers
        next_state = state._replace(
            prefixes=jnp.where(is_over, PADDING, rows.chains[kept]),
            hidden=rows.hidden[kept],
            is_valid=jnp.where(
                is_over,
                jnp.arange(self.width) == 0,
                rows.is_valid[kept] & jnp.isfinite(prefix_gain),
            ),
            length=jnp.where(is_over, 0, state.length + 1),
            suffixes=suffixes,
        )
        return next_state, chains, num_pulled + rows.is_valid[1:].sum()


class _Prefixes(NamedTuple):
    """The prefixes whose loss with each suffix is predicted."""

    chains: Int[Array, "R L"]
    hidden: Shaped[Array, "R B ..."]
    is_valid: Bool[Array, "R"]
    length: Int[Array, "R"]


def _extend_prefixes(probe_problem: Problem, state: State) -> _Prefixes:
    """Return the children of the beam, after a first row for the empty prefix.

    The first row is valid only at the start of a pass.
    """
    num_layers = probe_problem.bank.num_layers
    outputs = jax.lax.map(lambda hidden: apply_all(probe_problem.bank.layers, hidden), state.hidden)
    tokens = jnp.tile(jnp.arange(num_layers, dtype=jnp.int32), len(state.prefixes))
    chains = jnp.repeat(state.prefixes, num_layers, axis=0)
    chains = jnp.where(
        jnp.arange(probe_problem.max_layers + 1)[None] == state.length, tokens[:, None], chains
    )
    is_valid_child = jnp.repeat(
        state.is_valid & (state.length < probe_problem.max_layers), num_layers
    )
    return _Prefixes(
        jnp.concatenate([state.prefixes[:1], chains]),
        jnp.concatenate([state.hidden[:1], outputs.reshape(-1, *outputs.shape[2:])]),
        jnp.append(state.length == 0, is_valid_child),
        jnp.where(jnp.arange(1 + len(chains)) == 0, state.length, state.length + 1),
    )


def _attach(
    chains: Int[Array, "Q L"], length: Int[Array, "Q"], suffixes: Int[Array, "Q T"]
) -> Int[Array, "Q L"]:
    """Append to each prefix its suffix, with the padding of the suffix."""
    place = jnp.arange(chains.shape[1])[None] - length[:, None]
    appended = jnp.take_along_axis(suffixes, jnp.clip(place, 0, suffixes.shape[1] - 1), axis=1)
    return jnp.where(place < 0, chains, jnp.where(place < suffixes.shape[1], appended, PADDING))
