"""How a run begins: anew, with the chains that are given, or where an earlier call stopped."""

from typing import Any, NamedTuple

import jax
import numpy as np

from jchain.runs.history import History
from jchain.runs.processes import call_on_first, is_shared
from jchain.runs.result import RunState, Start
from jchain.runs.run_folder import RunFolder, Snapshot, flatten, unflatten
from jchain.runs.scored_chains import ScoredChains, read_log
from jchain.runs.starts import begin_at
from jchain.runs.stepping import RunSpec, infer_records, infer_runs, init_runs


class Saved(NamedTuple):
    """A checkpoint and its log, as processes send them to each other."""

    arrays: dict[str, np.ndarray]  # `Snapshot.arrays`, flat
    info: dict[str, Any]  # `Snapshot.info`
    scored: list[ScoredChains]  # for each run; empty if scored chains are not kept


def begin_run(
    spec: RunSpec, folder: RunFolder | None, *, is_saved: bool, keep_scored: bool
) -> History:
    """Continue runs from their folder, or begin them.

    Args:
      spec: what the runs are.
      folder: the folder of the runs; None if this process does not save them.
      is_saved: whether this process, or one that shares the runs, saves them.
      keep_scored: whether the history keeps the scored chains.

    Raises:
      ValueError: if the budget is smaller than what a run has spent, or the log was changed.
    """
    if is_saved and (history := _continue(spec, folder, keep_scored=keep_scored)):
        return history
    history = History(*begin_anew(spec))
    scored = _list_starts(spec, history.start)
    if folder is not None:
        folder.log.append(scored)
    if keep_scored:
        history.scored.append(scored)
    return history


def _continue(spec: RunSpec, folder: RunFolder | None, *, keep_scored: bool) -> History | None:
    """Read what the runs have done so far; None if nothing was saved."""
    runs = infer_runs(spec.keys, spec.search, spec.problem, spec.num_finalists)
    records = infer_records(runs, spec.search, spec.problem, spec.recording)
    template, key_impl = History.make_template(runs, records), jax.random.key_impl(spec.keys)

    def read() -> Saved | None:
        assert folder is not None
        snapshot = folder.restore(lambda info: template, key_impl)
        if snapshot is None:
            return None
        scored = []
        if keep_scored:
            scored = read_log(folder.log.path, spec.problem.max_layers + 1, len(spec.keys))
        return Saved(flatten(snapshot.arrays), snapshot.info, scored)

    saved = call_on_first(read) if is_shared(spec.problem) else read()
    if saved is None:
        return None
    snapshot = Snapshot(unflatten(saved.arrays, template, key_impl), saved.info)
    history = History.from_snapshot(snapshot, spec.problem, spec.stop)
    history.scored.append(saved.scored)
    return history


def begin_anew(spec: RunSpec) -> tuple[RunState, Start | None]:
    """Initialize runs, and let them begin at the starts, if there are any.

    Args:
      spec: what the runs are.
    """
    problem = spec.problem
    runs = init_runs(problem.put(spec.keys), spec.search, problem, spec.num_finalists)
    if len(spec.starts) == 0:
        return runs, None
    return begin_at(runs, spec.search, problem, spec.starts, spec.stop)


def _list_starts(spec: RunSpec, start: Start | None) -> list[ScoredChains]:
    """Return the starts as chains that each run scored before its first step."""
    if start is None:
        return []
    num_starts = len(spec.starts)
    scored = ScoredChains(
        spec.starts,
        np.array(start.loss, np.float32),
        np.zeros(num_starts, np.int32),
        np.full(num_starts, start.layer_calls, np.int32),
    )
    return [scored] * len(spec.keys)
