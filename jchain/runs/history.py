"""What a run has done so far, and how it is written to a checkpoint and read from one."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jchain._typing import PyTree
from jchain.problem import Problem
from jchain.runs.interruption import SIGNAL_NAMES
from jchain.runs.result import Result, RunState, Start, StopRule, Trace, empty_trace
from jchain.runs.run_folder import Snapshot
from jchain.runs.scored_chains import ScoredChains, concat_scored, empty_scored, select_scored
from jchain.runs.stepping import Records, reopen


class Part(NamedTuple):
    """The steps that the device took between two reads by the host."""

    runs: RunState
    trace: Trace  # [T, S]
    records: Records
    seconds: float


class History:
    """The state of the runs, their trace, and their records.

    Args:
      runs: the runs before their first step.
      start: what the chains before the first step cost and reached; None if there were none.
    """

    def __init__(self, runs: RunState, start: Start | None = None) -> None:
        self.runs = runs
        self.start = start
        self.seconds = 0.0
        self.scored: list[list[ScoredChains]] = []  # one list per part, with an item per run
        num_runs, has_rest = runs.key.shape[0], runs.stats.rest is not None
        self._traces = [empty_trace(num_runs, has_rest=has_rest)]
        self._custom: list[PyTree] = []
        self._num_steps = np.zeros(num_runs, np.int64)

    @property
    def trace(self) -> Trace:
        """The trace of all steps, `[T, S]`."""
        self._traces = [_concat(self._traces)]
        return self._traces[0]

    @property
    def custom(self) -> PyTree:
        """What `record_fn` returned for all steps, with leading axes `[T, S]`; None if nothing."""
        self._custom = [_concat(self._custom)] if self._custom else []
        return self._custom[0] if self._custom else None

    def add(self, part: Part) -> list[ScoredChains]:
        """Add the steps of a part, and return the chains that each run scored in it.

        Args:
          part: the steps. If they did not record their chains, an empty list is returned.
        """
        self.runs = part.runs
        self.seconds += part.seconds
        # Copies, because the rows are views of buffers with room for more steps.
        self._traces.append(jax.tree.map(np.copy, part.trace))
        if part.records.custom is not None:
            self._custom.append(jax.tree.map(np.copy, part.records.custom))
        scored = []
        if part.records.scored is not None:
            layer_calls = part.trace.total(part.runs.stats.rest)
            is_counted = np.asarray(part.trace.is_counted)
            scored = select_scored(part.records.scored, is_counted, layer_calls, self._num_steps)
        self._num_steps = self._num_steps + np.asarray(part.trace.is_counted).sum(axis=0)
        return scored

    def complete(
        self,
        results: Sequence[Result],
        stopped_by: str | None,
        *,
        keep_state: bool,
        keep_scored: bool,
    ) -> list[Result]:
        """Add to the results what only the history knows.

        Args:
          results: the results of all runs.
          stopped_by: why the runs were stopped; None if they were not.
          keep_state: whether to add the states.
          keep_scored: whether to add the scored chains.
        """

        def complete_one(result: Result, run: int) -> Result:
            is_over = bool(np.asarray(self.runs.stats.is_over)[run])
            rows = np.flatnonzero(np.asarray(self.trace.is_counted)[:, run])
            scored = None
            if keep_scored:
                empty = empty_scored(self.runs.stats.pool.chains.shape[-1])
                scored = concat_scored([empty, *(part[run] for part in self.scored if part)])
            return result._replace(
                is_complete=is_over,
                stopped_by=stopped_by if not is_over or stopped_by in SIGNAL_NAMES else None,
                state=jax.tree.map(lambda leaf: leaf[run], self.runs.state) if keep_state else None,
                records=jax.tree.map(lambda leaf: leaf[rows, run], self.custom),
                scored=scored,
            )

        return [complete_one(result, run) for run, result in enumerate(results)]

    def to_snapshot(self, stop: StopRule) -> Snapshot:
        """Return what a checkpoint holds.

        Args:
          stop: the rule that ends the runs.
        """
        start = None if self.start is None else list(self.start)
        info = {
            "seconds": self.seconds,
            "start": start,
            "stop": _to_numbers(stop),
        }
        arrays = {"runs": self.runs, "trace": self.trace, "custom": self.custom}
        return Snapshot(arrays, info)

    @staticmethod
    def make_template(runs: RunState, records: Records) -> PyTree:
        """Return the shapes and dtypes of the arrays of a checkpoint; a size of -1 is not known.

        Args:
          runs: the runs before their first step, or their shapes.
          records: the shapes of what one step records.
        """
        num_runs = runs.key.shape[0]

        def stack(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct((-1, *shape), dtype)

        empty = empty_trace(num_runs, has_rest=runs.stats.rest is not None)
        trace = jax.tree.map(lambda leaf: stack((num_runs,), leaf.dtype), empty)
        custom = jax.tree.map(lambda leaf: stack(leaf.shape, leaf.dtype), records.custom)
        return {"runs": runs, "trace": trace, "custom": custom}

    @staticmethod
    def from_snapshot(snapshot: Snapshot, problem: Problem, stop: StopRule) -> "History":
        """Return the history that a checkpoint holds, ready to go on.

        Args:
          snapshot: the checkpoint.
          problem: the problem of the runs, whose devices get the state.
          stop: the rule that ends the runs from now on.

        Raises:
          ValueError: if the budget is smaller than what a run has spent.
        """
        arrays, info = snapshot
        start = None if info["start"] is None else Start(*info["start"])
        history = History(problem.put(arrays["runs"]), start)
        history.seconds = info["seconds"]
        history._traces = [arrays["trace"]]
        history._custom = [] if arrays["custom"] is None else [arrays["custom"]]
        history._num_steps = arrays["trace"].is_counted.sum(axis=0)
        spent = math.ceil(np.max(history.runs.stats.total))
        numbers = _to_numbers(stop)
        if spent > numbers[0]:
            raise ValueError(
                f"expected a budget of at least {spent:,} layer calls, which this run has spent, "
                f"got {numbers[0]:,}"
            )
        if info["stop"] != numbers:
            history.runs = reopen(history.runs, stop)
        return history


def _to_numbers(stop: StopRule) -> list[int | float]:
    """Return the budget and the target loss as JSON."""
    return [np.asarray(leaf).item() for leaf in stop]


def _concat(parts: list[PyTree]) -> PyTree:
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)
