"""The data of a run: its state, its stop rule, its trace, and its result."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jchain._typing import Array, Bool, Float, Int, Key, PyTree
from jchain.arguments import checked, read_array
from jchain.problem import Problem
from jchain.pytree import describe_type, shorten
from jchain.runs import result_json
from jchain.runs.charges import Rest, total_calls
from jchain.runs.front import Front, find_front
from jchain.runs.scored_chains import ScoredChains
from jchain.search.pool import Pool


class Curve(NamedTuple):
    """The best loss so far and the cost so far, after each step.

    Layer calls are float64 if the search charges fractions of them (`jc.Staged`), else integers.
    """

    layer_calls: Int[np.ndarray, "T"] | Float[np.ndarray, "T"]
    best_loss: Float[np.ndarray, "T"]

    @checked
    def at(self, budgets: ArrayLike | Sequence[int]) -> Float[np.ndarray, "B"]:
        """Return the best loss within each budget, or `+inf` if the first step costs more.

        Args:
          budgets: the budgets in layer calls, `[B]`.

        Raises:
          ValueError: if a budget is not a number.
        """
        limits = read_array("budgets", budgets, np.float64)
        if np.isnan(limits).any():
            raise ValueError(f"expected budgets to be numbers, got {shorten(budgets)}")
        step = np.searchsorted(self.layer_calls, limits, side="right") - 1
        return np.where(step >= 0, self.best_loss[np.maximum(step, 0)], np.inf)


class Result(NamedTuple):
    """The best chains that a run found, and the cost of finding them.

    Attributes:
      best_chain: the chain with the lowest loss, `[L]`; all -1 if no chain had a finite loss.
      best_loss: its loss; `inf` if there is none.
      curve: the best loss so far, after each step.
      finalists: the best distinct chains, best first, `[Q, L]`, to choose from on another split.
      finalist_losses: their losses, `[Q]`.
      layer_calls: what the run cost; a float if the search charges fractions (`jc.Staged`).
      num_scored: the number of chains that were scored, with repeats.
      num_nonfinite: the number of these chains whose loss was not finite, that cost more than the
        problem's `max_cost`, or that `jc.Staged` stopped after a part of the examples.
      num_invalid: the number of rows that the search reported but that are not chains.
      best_cost: the cost of the best chain, in the unit of `Problem.token_costs`, or its number of
        layers if the problem has none; nan if there is no best chain.
      finalist_costs: the costs of the finalists, `[Q]`.
      front: the scored chains that no other one beats in both cost and loss.
      is_complete: False if the run was stopped before its end.
      ended_by: what ended a complete run: "budget", if it was spent or the next step would have
        exceeded it; "target_loss"; or "free_steps", after 100 consecutive steps that cost nothing,
        for example because the search scored only chains that it had scored before. None for a run
        that was stopped.
      stopped_by: what stopped it: "callback", "max_seconds", "SIGINT", or "SIGTERM". A signal that
        came when the run was just over is named, too.
      state: the state of the search after its last counted step, with `keep_state` or
        `checkpoint_dir`.
      records: what `record_fn` returned, stacked over the counted steps, `[T, ...]`.
      scored: all scored chains, with `record="chains"`.
    """

    best_chain: Int[np.ndarray, "L"]
    best_loss: float
    curve: Curve
    finalists: Int[np.ndarray, "Q L"]
    finalist_losses: Float[np.ndarray, "Q"]
    layer_calls: int | float
    num_scored: int
    num_nonfinite: int
    num_invalid: int = 0
    best_cost: float = float("nan")
    finalist_costs: Float[np.ndarray, "Q"] | None = None
    front: Front | None = None
    is_complete: bool = True
    ended_by: str | None = None
    stopped_by: str | None = None
    state: PyTree = None
    records: PyTree = None
    scored: ScoredChains | None = None

    def to_json(self) -> str:
        """Return the result as JSON text, without `state`.

        Raises:
          ValueError: if `records` are not arrays in dicts, lists, and tuples.
        """
        fields = self._replace(state=None, curve=tuple(self.curve))._asdict()  # pyright: ignore
        return result_json.dump(fields)

    @staticmethod
    @checked
    def from_json(text: str) -> "Result":
        """Return the result that `to_json` wrote. Its `state` is None; arrays are NumPy arrays.

        Args:
          text: the JSON text.

        Raises:
          ValueError: if the text is not from `to_json`.
        """
        fields = result_json.load(text)
        if set(fields) != set(Result._fields):
            raise ValueError(
                f"expected the JSON of a jc.Result with {', '.join(Result._fields)}, got "
                f"{', '.join(fields)}"
            )
        for name, kinds in _JSON_TYPES.items():
            if not isinstance(fields[name], kinds):
                raise ValueError(
                    f"expected the JSON of a jc.Result, got {describe_type(fields[name])} for its "
                    f"{name}"
                )
        curve = fields.pop("curve")
        if len(curve) != len(Curve._fields) or not all(isinstance(a, np.ndarray) for a in curve):
            raise ValueError(
                f"expected the JSON of a jc.Result, got {describe_type(curve)} for its curve"
            )
        return Result(curve=Curve(*curve), **fields)


# The types of the fields that `Result.from_json` reads; `records` may be anything.
_JSON_TYPES = {
    "best_chain": np.ndarray,
    "best_loss": float,
    "curve": tuple,
    "finalists": np.ndarray,
    "finalist_losses": np.ndarray,
    "layer_calls": int | float,
    "num_scored": int,
    "num_nonfinite": int,
    "num_invalid": int,
    "best_cost": float,
    "finalist_costs": np.ndarray | None,
    "front": Front | None,
    "is_complete": bool,
    "ended_by": str | None,
    "stopped_by": str | None,
    "scored": ScoredChains | None,
}


class BudgetError(ValueError):
    """The `ValueError` of a budget that is smaller than the cost of one step.

    Args:
      cost: the layer calls of one step.
      budget: the layer calls that the whole run may spend.
      reserved: the part of the budget that is not for steps of the search.
      purpose: what this part is for.
    """

    def __init__(
        self, cost: int, budget: int, reserved: int = 0, purpose: str = "gradient steps"
    ) -> None:
        kept = f" in addition to {reserved:,} for {purpose}, {cost + reserved:,} in all"
        super().__init__(
            f"expected a budget of at least one step, which costs {cost:,} layer calls here"
            f"{kept if reserved else ''}, got {budget:,}"
        )
        self.cost = cost
        self.reserved = reserved


class RunStats(NamedTuple):
    """The best chains and the counts of one run."""

    pool: Pool
    layer_calls: Int[Array, ""]  # whole ones
    num_scored: Int[Array, ""]
    num_nonfinite: Int[Array, ""]
    num_invalid: Int[Array, ""]
    num_free: Int[Array, ""]  # consecutive zero-cost steps
    last_calls: Int[Array, ""]  # layer calls of the last step, counted or not, rounded up
    is_over: Bool[Array, ""]
    front: Front
    rest: Rest | None = None  # of the layer calls; None if the search charges whole ones

    @property
    def total(self) -> Int[np.ndarray, "*S"] | Float[np.ndarray, "*S"]:
        """The layer calls with their rest, on the host."""
        layer_calls = np.asarray(self.layer_calls)
        if self.rest is None:
            return layer_calls
        return total_calls(layer_calls, *map(np.asarray, self.rest))


class RunState(NamedTuple):
    """One run between two steps, or many runs, whose leaves have a leading axis `[S]`."""

    key: Key[Array, ""]
    state: PyTree  # the state of the search
    stats: RunStats


# A run ends after so many consecutive steps that cost no layer calls.
MAX_FREE_STEPS = 100


class StopRule(NamedTuple):
    """The rule that ends a run: its budget is spent, or its target loss is reached."""

    budget: Int[ArrayLike, ""]  # layer calls, int32
    target_loss: Float[ArrayLike, ""]  # float32


class Start(NamedTuple):
    """The chains that were scored before the first step of a run."""

    layer_calls: int
    best_loss: float
    loss: list[float]  # of each chain


class Trace(NamedTuple):
    """Totals after each step of each run.

    A step after the end of its run, or over the budget, is not counted.
    """

    layer_calls: Int[np.ndarray, "T S"] | Int[Array, "T S"]
    best_loss: Float[np.ndarray, "T S"] | Float[Array, "T S"]
    is_counted: Bool[np.ndarray, "T S"] | Bool[Array, "T S"]
    # The rest of the layer calls, in examples; None if the search charges whole layer calls.
    examples: Int[np.ndarray, "T S"] | Int[Array, "T S"] | None = None

    def total(self, rest: Rest | None) -> Int[np.ndarray, "T S"] | Float[np.ndarray, "T S"]:
        """Return the layer calls with their rest.

        Args:
          rest: the rest at the end of the runs, which has the number of examples.
        """
        layer_calls = np.asarray(self.layer_calls)
        if rest is None or self.examples is None:
            return layer_calls
        num_examples = np.asarray(rest.num_examples)[None]
        return total_calls(layer_calls, np.asarray(self.examples), num_examples)


def empty_trace(num_runs: int, *, has_rest: bool = False) -> Trace:
    """Return the trace of no steps.

    Args:
      num_runs: the number of runs, S.
      has_rest: whether the search charges fractions of layer calls.
    """
    shape = (0, num_runs)
    counts = np.zeros(shape, np.int32)
    examples = counts if has_rest else None
    return Trace(counts, np.zeros(shape, np.float32), np.zeros(shape, bool), examples)


@checked
def front(results: Result | Sequence[Result]) -> Front:
    """Return the chains that no other scored chain beats in both cost and loss, cheapest first.

    All chains that a run scored are considered, not only its finalists. Costs are in the unit of
    `Problem.token_costs`. If the problem has none, the cost is the number of layers. A run keeps at
    most 64 chains. When the front has more, it drops the chains that improve the loss least over
    the next cheaper chain.

    Args:
      results: the result of a run, or several results whose costs have the same unit, for example
        from `jchain.run_many`, which are merged into one front.

    Raises:
      ValueError: if there is no result, or its front is unknown.
    """
    # A Result is a tuple itself.
    is_one = isinstance(results, Result) or not isinstance(results, list | tuple)
    runs = [results] if is_one else [*results]
    fronts = [run.front if isinstance(run, Result) else None for run in runs]
    if not fronts or not all(isinstance(one, Front) for one in fronts):
        raise ValueError(
            f"expected a jc.Result or several, each with a front, got {describe_type(results)}"
        )
    return find_front(*(np.concatenate(parts) for parts in zip(*fronts, strict=True)))


def make_results(
    runs: RunState, trace: Trace, stop: StopRule, problem: Problem, start: Start | None = None
) -> list[Result]:
    """Make the result of each run.

    Args:
      runs: the finished runs.
      trace: the trace of all steps, `[T, S]`.
      stop: the rule that ended each run.
      problem: the problem that was searched, which defines what chains cost.
      start: what the chains before the first step cost and reached; None if there were none.

    Raises:
      BudgetError: if the budget is smaller than the cost of the starts and one step.
    """
    stats = jax.tree.map(np.asarray, runs.stats)
    costs = np.asarray(problem.chain_cost(jnp.asarray(stats.pool.chains)))
    return [
        _make_result(stats, trace, i, stop, costs[i], start)
        for i in range(stats.layer_calls.shape[0])
    ]


def _make_result(
    all_stats: RunStats,
    trace: Trace,
    i: int,
    stop: StopRule,
    costs: Float[np.ndarray, "Q"],
    start: Start | None,
) -> Result:
    """Make the result of run `i`."""
    budget = int(np.asarray(stop.budget))
    stats = jax.tree.map(lambda leaf: leaf[i], all_stats)
    is_counted = trace.is_counted[:, i]
    if stats.last_calls > 0 and not is_counted.any():
        raise BudgetError(
            int(stats.last_calls),
            budget,
            start.layer_calls if start else 0,
            "the starts",
        )
    layer_calls = trace.total(all_stats.rest)[is_counted, i]
    best_loss = np.asarray(trace.best_loss)[is_counted, i]
    if start is not None:
        layer_calls = np.append(layer_calls.dtype.type(start.layer_calls), layer_calls)
        best_loss = np.append(best_loss.dtype.type(start.best_loss), best_loss)
    is_found = np.isfinite(stats.pool.loss)
    return Result(
        best_chain=stats.pool.chains[0],
        best_loss=float(stats.pool.loss[0]),
        curve=Curve(layer_calls, best_loss),
        finalists=stats.pool.chains[is_found],
        finalist_losses=stats.pool.loss[is_found],
        layer_calls=stats.total.item(),
        num_scored=int(stats.num_scored),
        num_nonfinite=int(stats.num_nonfinite),
        num_invalid=int(stats.num_invalid),
        best_cost=float(costs[0]) if is_found[0] else float("nan"),
        finalist_costs=costs[is_found],
        front=find_front(*stats.front),
        ended_by=_find_end(stats, stop),
    )


def _find_end(stats: RunStats, stop: StopRule) -> str | None:
    """Return what ended a run; None if it is not over."""
    if not stats.is_over:
        return None
    if stats.pool.loss[0] <= stop.target_loss:
        return "target_loss"
    return "free_steps" if stats.num_free >= MAX_FREE_STEPS else "budget"
