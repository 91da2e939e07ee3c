"""Successive halving of a population: all chains are scored on few examples, the best on more.

The examples are cut into *rungs*. All chains are scored on the first rung, a share of them on the
next one, and so on. A chain of which the last rung was scored has the loss of the whole split: the
mean over all examples, put together from the rungs, so nothing is computed twice. The others
stopped, and their loss is `+inf`. The method is from Jamieson and Talwalkar 2016, arXiv:1502.07943;
EvoPress (Sieberling et al. 2024, arXiv:2410.14649) selects compressed models in this way.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from jchain._typing import Array, Bool, Float, Int
from jchain.arguments import check_numbers, checked
from jchain.chain import ChainsLike
from jchain.engine.backend import get_backend, jit_for_problem
from jchain.engine.layer_calls import get_output_shape, infer_hidden
from jchain.engine.population import Evaluation, Options, evaluate_population, pad_population
from jchain.engine.prefix_sharing import sort_chains
from jchain.modules import check_mean_over_examples
from jchain.problem import Problem
from jchain.pytree import is_concrete, pytree_dataclass, shorten, static

# The defaults: with 64 chains, 64 on a sixteenth of the examples, 16 on a quarter, and 4 on all.
FRACTIONS, KEEP = (1 / 16, 1 / 4, 1), 1 / 4
T = TypeVar("T", bound=Problem)


class Rungs(NamedTuple):
    """How many examples each rung ends at, and which share of the chains goes on to the next."""

    ends: tuple[int, ...]  # rising; the last one is the number of examples
    keep: float

    @property
    def sizes(self) -> tuple[int, ...]:
        """The number of examples that each rung adds."""
        return tuple(np.diff(self.ends, prepend=0).tolist())

    def count_kept(self, num_chains: int) -> int:
        """Return how many of some chains go on to the next rung: the share, rounded up.

        Args:
          num_chains: the number of chains.
        """
        return math.ceil(self.keep * num_chains - 1e-9)


def check_fractions(fractions: Sequence[float | int], keep: float | int = 1) -> None:
    """Check the fractions of the examples and the share of the chains.

    Args:
      fractions: the fractions of the examples that have been used after each rung.
      keep: the share of the chains that goes on to the next rung.

    Raises:
      ValueError: if the fractions do not rise from above 0 to 1, or the share is out of range.
    """
    for i, fraction in enumerate(fractions):
        check_numbers(above=0, at_most=1, **{f"fractions[{i}]": fraction})  # pyright: ignore
    if len(fractions) == 0 or list(fractions) != sorted(set(fractions)) or fractions[-1] != 1:
        raise ValueError(f"expected fractions that rise and end in 1, got {shorten(fractions)}")
    check_numbers(above=0, at_most=1, keep=keep)


def make_rungs(fractions: Sequence[float | int], keep: float | int, num_examples: int) -> Rungs:
    """Cut the examples of a split into rungs.

    Args:
      fractions: as for `check_fractions`.
      keep: as for `check_fractions`.
      num_examples: the number of examples in the split, B.

    Raises:
      ValueError: as for `check_fractions`, or if a fraction adds no example.
    """
    check_fractions(fractions, keep)
    ends = [round(float(fraction) * num_examples) for fraction in fractions]
    for i, size in enumerate(np.diff(ends, prepend=0)):
        if size == 0:
            raise ValueError(
                f"expected fractions that add an example each, got fractions[{i}] = "
                f"{float(fractions[i]):g} of {num_examples:,} examples, which adds none"
            )
    return Rungs(tuple(ends), float(keep))


def check_parts(problem: Problem) -> None:
    """Check that the loss of a split can be put together from parts of its examples.

    Args:
      problem: the problem.

    Raises:
      ValueError: if a function of the problem does not treat examples one by one.
    """
    if problem.batch_size is not None or not is_concrete(problem):
        return  # a problem with a batch_size has been checked
    outputs = get_output_shape(problem, infer_hidden(problem))
    with jax.ensure_compile_time_eval():  # also while the caller is traced
        for name in ("loss_fn", "accuracy_fn"):
            if (function := getattr(problem, name)) is not None:
                check_mean_over_examples(name, function, outputs, problem.data.y)


@pytree_dataclass
class RungProblem(Problem):
    """A problem whose populations are scored by successive halving. A search sees it as a problem.

    Attributes:
      rungs: the rungs.
    """

    rungs: Rungs = static(default=Rungs((), 1.0))

    @staticmethod
    def make(problem: Problem, rungs: Rungs) -> "RungProblem":
        """Return a problem with rungs, without checking it again.

        Args:
          problem: the problem.
          rungs: its rungs.
        """
        return _copy(problem, RungProblem, rungs=rungs)

    @property
    def whole(self) -> Problem:
        """The problem without rungs."""
        return _copy(self, Problem)


def _copy(problem: Problem, cls: type[T], **more: object) -> T:
    """Return an instance of another class with the fields of a problem, and others."""
    copied = object.__new__(cls)
    for name in (field for field in Problem.__dataclass_fields__ if field != "_"):
        object.__setattr__(copied, name, getattr(problem, name))
    for name, value in more.items():
        object.__setattr__(copied, name, value)
    return copied


class StagedEvaluation(NamedTuple):
    """The losses of a population, as far as they are known, and what they cost.

    Attributes:
      loss: the loss of each chain on the whole split, `[P]`, with the layer penalty; `+inf` if the
        chain stopped, or if the loss is not finite.
      accuracy: the accuracy of each chain on the whole split, `[P]`; 0 if the chain stopped.
      partial_loss: the loss of each chain on its first `num_examples` examples, `[P]`.
      num_examples: the number of examples that each chain was scored on, `[P]`.
      layer_calls: the cost in layer calls on the whole split: a layer that is applied to a part of
        the examples counts as that part.
      head_calls: the head calls, counted in the same way.
    """

    loss: Float[Array, "P"]
    accuracy: Float[Array, "P"]
    partial_loss: Float[Array, "P"]
    num_examples: Int[Array, "P"]
    layer_calls: Float[Array, ""]
    head_calls: Float[Array, ""]


class _Rung(NamedTuple):
    """The chains of one rung, and their means over all examples up to it."""

    row: Int[Array, "Q"]  # [Q], their rows in the sorted population
    is_in: Bool[Array, "Q"]  # [Q], False for a row that holds no chain
    loss: Float[Array, "Q"]  # [Q]
    accuracy: Float[Array, "Q"]  # [Q]
    bar: Float[Array, ""]  # the loss of the rival; +inf if there is none
    calls: Float[Array, "2"]  # the layer calls and head calls so far, on the whole split


@checked
def evaluate_staged(
    problem: Problem,
    chains: ChainsLike,
    *,
    fractions: Sequence[float | int] = FRACTIONS,
    keep: float | int = KEEP,
) -> StagedEvaluation:
    """Score chains on few examples first, and only the best ones on all (`jchain.Staged`).

    All chains are scored on the first fraction of the examples, the best share of them on the next
    fraction, and so on. A chain that reaches the last fraction has the loss that `jchain.evaluate`
    gives it, up to rounding. Works under `jit` and `vmap`.

    Args:
      problem: the bank, the split of data, whose examples are in random order, and the loss.
      chains: the tokens of the chains, `[P, L]`. They are checked unless they are traced.
      fractions: the fractions of the examples; they rise, and the last one is 1.
      keep: the share of the chains that goes on to the next fraction, rounded up.

    Raises:
      ValueError: if a row is not a chain of this bank, there are no rows, the fractions do not rise
        from above 0 to 1, one adds no example, the share is out of range, or the loss is not a mean
        over examples.
    """
    rungs = make_rungs(fractions, keep, problem.num_examples)
    check_parts(problem)
    tokens = problem.space.validate(chains) if is_concrete(chains) else jnp.asarray(chains)
    if tokens.ndim != 2 or 0 in tokens.shape or tokens.shape[1] != problem.max_layers + 1:
        raise ValueError(
            f"expected chains of shape [P, {problem.max_layers + 1}], at least one, got "
            f"{list(tokens.shape)}"
        )
    rows = pad_population(tokens) if isinstance(tokens, np.ndarray) else tokens
    rows = problem.put(rows)
    options = Options(None, None, None, get_backend(problem, rows))
    out = halve(problem, rows, rungs=rungs, options=options)
    kept = {name: getattr(out, name)[: len(tokens)] for name in StagedEvaluation._fields[:4]}
    return out._replace(**kept)


def evaluate_rows(problem: Problem, chains: Int[Array, "P L"], *, options: Options) -> Evaluation:
    """Evaluate chains on the whole split or, if the problem has rungs, by successive halving.

    Args:
      problem: the bank, the split of data, and the loss.
      chains: the tokens of the chains, `[P, L]`.
      options: the static options; see `jchain.evaluate`.
    """
    if not isinstance(problem, RungProblem):
        return evaluate_population(problem, chains, options=options)
    out = halve(problem.whole, chains, rungs=problem.rungs, options=options)
    return Evaluation(out.loss, out.accuracy, out.layer_calls, out.head_calls)


@jit_for_problem(static_argnames=("rungs", "options"))
def halve(
    problem: Problem,
    chains: Int[Array, "P L"],
    is_candidate: Bool[Array, "P"] | None = None,
    rival: Int[Array, "L"] | None = None,
    first_loss: Float[Array, "Q"] | None = None,
    *,
    rungs: Rungs,
    options: Options,
) -> StagedEvaluation:
    """Score chains by successive halving.

    Of equal chains, one is scored. A rung scores its chains together, so that they share prefixes.

    Args:
      problem: the bank, the split of data, and the loss.
      chains: the tokens of the chains, `[P, L]`.
      is_candidate: the chains that may go on; None for all. The others should cost no layer call,
        and their results mean nothing.
      rival: the tokens of a chain that the others have to beat on the same examples to go on to the
        last rung; a row of -1 or None for none. It is scored on the other rungs, which is charged.
      first_loss: the losses of the chains and, if there is a rival, of the rival on the first rung,
        `[P]` or `[P + 1]`, if they are known and paid for; None to compute them.
      rungs: the rungs.
      options: the static options; see `jchain.evaluate`.
    """
    num_chains, num_slots = chains.shape
    (rows, _, first_new), source = sort_chains(chains, problem.bank.num_layers)
    is_in = first_new < num_slots
    if is_candidate is not None:
        is_in &= jnp.zeros(num_chains, bool).at[source].max(is_candidate)
    num_all = num_chains if rival is None else num_chains + 1
    has_rival = jnp.array(False) if rival is None else rival[0] >= 0
    if rival is not None:  # one that repeats another row costs nothing
        rival = jnp.where(has_rival, rival, rows[0])
    if first_loss is None:
        first, calls = _score(problem, rows, rival, rungs, 0, options)
    else:
        own = first_loss[:num_chains]
        if is_candidate is not None:  # a row that is none may equal a chain that is one
            own = jnp.where(is_candidate, own, jnp.inf)
        known = jnp.full(num_all, jnp.inf, own.dtype).at[source].min(own)
        known = known.at[num_chains:].set(first_loss[num_chains:])
        first, calls = (known, jnp.zeros(num_all)), jnp.zeros(2, jnp.float32)
    loss, accuracy = (leaf[:num_chains] for leaf in first)
    bar = jnp.where(has_rival, first[0][-1], jnp.inf)
    rung = _Rung(jnp.arange(num_chains), is_in, loss, accuracy, bar, calls)
    known, num_examples = loss, jnp.full(num_chains, rungs.ends[0], jnp.int32)
    for i, end in enumerate(rungs.ends[1:], 1):
        rung = _climb(problem, rows, rung, rival, rungs, i, options)
        place = jnp.where(rung.is_in, rung.row, num_chains)
        known = known.at[place].set(rung.loss, mode="drop")
        num_examples = num_examples.at[place].set(end, mode="drop")
    is_whole = rung.is_in & jnp.isfinite(rung.loss)
    place = jnp.where(is_whole, rung.row, num_chains)
    loss = jnp.full_like(known, jnp.inf).at[place].set(rung.loss, mode="drop")
    accuracy = jnp.zeros_like(known).at[place].set(rung.accuracy, mode="drop")
    results = (leaf[source] for leaf in (loss, accuracy, known, num_examples))
    return StagedEvaluation(*results, *rung.calls)


def evaluate_new(
    problem: RungProblem,
    chains: Int[Array, "P L"],
    is_new: Bool[Array, "P"],
    rival: Int[Array, "L"] | None,
) -> tuple[Float[Array, "P"], Bool[Array, "P"], Float[Array, ""]]:
    """Score new chains by successive halving, beside chains that were scored before.

    Args:
      problem: the problem with its rungs.
      chains: the tokens of the chains, `[P, L]`. Those that are not new should cost no layer call.
      is_new: the chains that compete.
      rival: as for `halve`.

    Returns:
      The losses, `+inf` of chains that stopped; whether this is the loss on the whole split; and
      the layer calls.
    """
    options = Options(None, None, None, get_backend(problem, chains))
    out = halve(problem.whole, chains, is_new, rival, rungs=problem.rungs, options=options)
    # A mean over a part that is not finite stays so.
    is_whole = (out.num_examples == problem.num_examples) | ~jnp.isfinite(out.partial_loss)
    return out.loss, is_whole, out.layer_calls


def _climb(
    problem: Problem,
    rows: Int[Array, "P L"],
    last: _Rung,
    rival: Int[Array, "L"] | None,
    rungs: Rungs,
    i: int,
    options: Options,
) -> _Rung:
    """Score the best chains of a rung on rung `i`, the next one."""
    loss = jnp.where(last.is_in & jnp.isfinite(last.loss), last.loss, jnp.inf)
    counts = [rungs.count_kept(number) for number in range(len(loss) + 1)]
    best = jnp.argsort(loss)[: counts[-1]]
    num_kept = jnp.array(counts)[last.is_in.sum()]
    loss, is_in = loss[best], jnp.arange(counts[-1]) < num_kept
    is_in &= jnp.isfinite(loss)
    is_last = i == len(rungs.ends) - 1
    if is_last:  # few examples tell too little to let the rival stop chains earlier
        is_in &= loss < last.bar
    # Rows without a chain repeat the best one, which costs nothing. So does a head alone.
    filler = jnp.where(is_in[0], rows[last.row[best[0]]], problem.space.head_alone)
    chosen = jnp.where(is_in[:, None], rows[last.row[best]], filler[None])
    needs_rival = is_in[0] & jnp.isfinite(last.bar)
    other = None if rival is None or is_last else jnp.where(needs_rival, rival, filler)

    def score() -> tuple[tuple[Array, Array], Array]:
        return _score(problem, chosen, other, rungs, i, options)

    def skip() -> tuple[tuple[Array, Array], Array]:
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(score))

    (new, accuracy), calls = jax.lax.cond(is_in[0], score, skip)
    before, size, end = rungs.ends[i - 1], rungs.sizes[i], rungs.ends[i]
    bar = last.bar if other is None else (before * last.bar + size * new[-1]) / end
    new, accuracy = new[: len(best)], accuracy[: len(best)]
    return _Rung(
        last.row[best],
        is_in,
        jnp.where(is_in, (before * loss + size * new) / end, jnp.inf),
        jnp.where(is_in, (before * last.accuracy[best] + size * accuracy) / end, 0.0),
        bar,
        last.calls + calls,
    )


def _score(
    problem: Problem,
    rows: Int[Array, "Q L"],
    rival: Int[Array, "L"] | None,
    rungs: Rungs,
    i: int,
    options: Options,
) -> tuple[tuple[Array, Array], Float[Array, "2"]]:
    """Compute the means over the examples of rung `i`: of the rows, and of the rival at the end."""
    end, size = rungs.ends[i], rungs.sizes[i]
    part = problem.take(slice(end - size, end))
    if rival is not None:
        rows = jnp.concatenate([rows, rival[None]])
    out = evaluate_population(part, rows, options=options)
    calls = jnp.stack([out.layer_calls, out.head_calls]).astype(jnp.float32)
    return (out.loss, out.accuracy), calls * (size / rungs.ends[-1])
