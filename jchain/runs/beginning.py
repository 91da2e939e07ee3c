"""How a run begins: anew, with the chains that are given, or where an earlier call stopped."""

import jax
import numpy as np

from jchain.runs.history import History
from jchain.runs.result import RunState, Start
from jchain.runs.run_folder import RunFolder
from jchain.runs.scored_chains import ScoredChains, read_log
from jchain.runs.starts import begin_at
from jchain.runs.stepping import RunSpec, infer_records, infer_runs, init_runs


def begin_run(spec: RunSpec, folder: RunFolder | None, *, keep_scored: bool) -> History:
    """Continue runs from their folder, or begin them.

    Args:
      spec: what the runs are.
      folder: the folder of the runs; None if they are not saved.
      keep_scored: whether the history keeps the scored chains.

    Raises:
      ValueError: if the budget is smaller than what a run has spent, or the log was changed.
    """
    snapshot = None
    if folder is not None:
        runs = infer_runs(spec.keys, spec.search, spec.problem, spec.num_finalists)
        records = infer_records(runs, spec.search, spec.problem, spec.recording)
        template = History.make_template(runs, records)
        snapshot = folder.restore(lambda info: template, jax.random.key_impl(spec.keys))
    if folder is None or snapshot is None:
        history = History(*begin_anew(spec))
        scored = _list_starts(spec, history.start)
        if folder is not None:
            folder.log.append(scored)
        if keep_scored:
            history.scored.append(scored)
        return history
    history = History.from_snapshot(snapshot, spec.problem, spec.stop)
    if keep_scored:
        num_slots = spec.problem.max_layers + 1
        history.scored.append(read_log(folder.log.path, num_slots, len(spec.keys)))
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
