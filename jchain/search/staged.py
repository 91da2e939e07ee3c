"""Staged scoring: a search scores its chains on few examples first, and only the best on all.

The method is successive halving (`jchain.engine.successive_halving`). EvoPress (Sieberling et al.
2024, arXiv:2410.14649) selects the children of each generation in this way.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp

from jchain._typing import Array, Float, Int, Key, PyTree
from jchain.arguments import check_fields, checked
from jchain.chain import PADDING
from jchain.engine.backend import get_backend
from jchain.engine.evaluation import evaluate_filled
from jchain.engine.population import Options
from jchain.engine.successive_halving import (
    FRACTIONS,
    KEEP,
    RungProblem,
    check_fractions,
    check_parts,
    halve,
    make_rungs,
)
from jchain.problem import Problem
from jchain.pytree import pytree_dataclass, static
from jchain.search.protocol import (
    Checked,
    Info,
    Search,
    Startable,
    charges_fractions,
    is_deterministic,
    needs_gradient,
    needs_invertible,
    reads_activations,
)


class Best(NamedTuple):
    """The best chain so far of a search that reads activations."""

    chain: Int[Array, "L"]  # [L]; -1 if there is none
    first_loss: Float[Array, ""]  # on the examples that the search reads
    loss: Float[Array, ""]  # on the whole split


class State(NamedTuple):
    """The state of the inner search."""

    inner: PyTree
    best: Best | None  # None if the search reads only losses


@pytree_dataclass
class Staged:
    """A search whose chains are scored on few examples first, and only the best on all.

    All chains of a step are scored on the first fraction of the examples, the best share of them on
    the next fraction, and so on. Only a chain that reaches the last fraction has a loss; the others
    stop, and lose: the inner search and the result see a loss of `+inf`. A layer call on a part of
    the examples is charged as that part of a layer call. A chain that stopped is not remembered, so
    it can compete again, and pays again.

    A chain has to be among the best of its step, so a step should score many: `num_chains` of 16 or
    more. To be scored on all examples, a neighbor in `LocalSearch` must also beat the current chain
    on the examples before. A search that reads activations, such as `BeamSearch`, reads those of
    the first fraction alone and ranks by them; its best chains must beat the best one so far in the
    same way.

    The first examples of the split are used first, so examples must be in random order, as they are
    in the splits of `jchain.data` and `jchain.hub`.

    Attributes:
      search: the inner search.
      fractions: the fractions of the examples; they rise, and the last one is 1.
      keep: the share of the chains that goes on to the next fraction, rounded up.

    Raises:
      ValueError: if the inner search charges fractions itself, the fractions do not rise from above
        0 to 1, or `keep` is not above 0 and at most 1.
    """

    search: Search
    fractions: Sequence[float | int] = static(default=FRACTIONS)
    keep: float | int = static(default=KEEP)

    charges_fractions = True
    # The first fraction is taken here, and not by the driver.
    reads_activations = False

    def __post_init__(self) -> None:
        check_fields(self)
        object.__setattr__(self, "fractions", tuple(self.fractions))
        if charges_fractions(self.search):
            raise ValueError(
                "expected a search that charges whole layer calls, got "
                f"{type(self.search).__name__}"
            )
        check_fractions(self.fractions, self.keep)

    @property
    def is_deterministic(self) -> bool:
        """True if the inner search is deterministic."""
        return is_deterministic(self.search)

    @property
    def needs_gradient(self) -> bool:
        """True if the inner search takes gradients through layers."""
        return needs_gradient(self.search)

    @property
    def needs_invertible(self) -> bool:
        """True if the inner search needs invertible layers."""
        return needs_invertible(self.search)

    @checked
    def check(self, problem: Problem) -> None:
        """Check the fractions, and what the inner search checks.

        Args:
          problem: the problem to search.

        Raises:
          ValueError: if a fraction adds no example, the loss is not a mean over examples, the
            inner search reads activations of more examples than `batch_size`, or it does not accept
            the problem.
        """
        seen = self._see(problem)
        check_parts(problem)
        if isinstance(self.search, Checked):
            self.search.check(seen)

    @checked
    def init(self, key: Key[Array, ""], problem: Problem) -> State:
        """Return the first state of the inner search.

        Args:
          key: the PRNG key; consumed by this call.
          problem: the problem to search.
        """
        best = None
        if reads_activations(self.search):
            infinity = jnp.full((), jnp.inf, jnp.float32)
            chain = jnp.full(problem.max_layers + 1, PADDING, jnp.int32)
            best = Best(chain, infinity, infinity)
        return State(self.search.init(key, self._see(problem)), best)

    @checked
    def start(
        self,
        key: Key[Array, ""],
        state: State,
        problem: Problem,
        chains: Int[Array, "C L"],
        loss: Float[Array, "C"],
    ) -> State:
        """Let the inner search begin at the starts, if it can.

        Args:
          key: the PRNG key; consumed by this call.
          state: the state that `init` returned.
          problem: the problem to search.
          chains: the starts, `[C, L]`.
          loss: their losses on the whole split, `[C]`.
        """
        seen, best, inner = self._see(problem), state.best, state.inner
        if best is not None:
            # The starts were paid for on all examples.
            first = evaluate_filled(seen, chains).loss
            best = _update_best(best, chains, first, loss)
            loss = first
        if isinstance(self.search, Startable):
            inner = self.search.start(key, inner, seen, chains, loss)
        return State(inner, best)

    @checked
    def step(self, key: Key[Array, ""], state: State, problem: Problem) -> tuple[State, Info]:
        """Take a step of the inner search with staged scores.

        Args:
          key: the PRNG key; consumed by this call.
          state: the state that `init` or the last step returned.
          problem: the problem to search.
        """
        inner, info = self.search.step(key, state.inner, self._see(problem))
        best = state.best
        if best is not None:
            best, info = self._score_more(problem, best, info)
        return State(inner, best), info._replace(layer_calls=jnp.float32(info.layer_calls))

    def _see(self, problem: Problem) -> Problem:
        """Return what the inner search sees: the first examples, or a problem with rungs."""
        rungs = make_rungs(self.fractions, self.keep, problem.num_examples)
        if not reads_activations(self.search):
            return RungProblem.make(problem, rungs)
        size = rungs.ends[0]
        if problem.batch_size is not None and size > problem.batch_size:
            raise ValueError(
                f"expected a first fraction of at most batch_size={problem.batch_size} examples "
                f"for {type(self.search).__name__}, which reads activations, got {size:,} examples"
            )
        return problem.first_part().take(slice(0, size))

    def _score_more(self, problem: Problem, best: Best, info: Info) -> tuple[Best, Info]:
        """Score the chains that beat the best one on more examples."""
        rungs = make_rungs(self.fractions, self.keep, problem.num_examples)
        is_chain = problem.space.contains(info.chains)
        chains = jnp.where(is_chain[:, None], info.chains, problem.space.head_alone[None])
        first = jnp.append(info.loss, best.first_loss.astype(info.loss.dtype))
        options = Options(None, None, None, get_backend(problem, chains))
        out = halve(problem, chains, is_chain, best.chain, first, rungs=rungs, options=options)
        loss = jnp.where(is_chain, out.loss, jnp.inf)
        layer_calls = info.layer_calls * (rungs.ends[0] / rungs.ends[-1]) + out.layer_calls
        best = _update_best(best, chains, info.loss, loss)
        return best, Info(info.chains, loss.astype(info.loss.dtype), layer_calls)


def _update_best(
    best: Best, chains: Int[Array, "P L"], first_loss: Float[Array, "P"], loss: Float[Array, "P"]
) -> Best:
    """Return the best chain of all, by the loss on the whole split."""
    row = jnp.argmin(loss)
    is_better = loss[row] < best.loss
    new = Best(chains[row], first_loss[row], loss[row])
    return Best(
        *(jnp.where(is_better, b.astype(a.dtype), a) for a, b in zip(best, new, strict=True))
    )
