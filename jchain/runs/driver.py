"""The driver that runs every search: `run` and `run_many`."""

import contextlib
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import jax
import numpy as np
from jax.sharding import Mesh

from jchain._typing import Array, Key, PyTree
from jchain.arguments import check_integers, checked
from jchain.chain import ChainsLike
from jchain.engine.backend import check_not_forked
from jchain.problem import Problem
from jchain.pytree import describe_type
from jchain.runs.beginning import begin_anew, begin_run
from jchain.runs.history import History, Part
from jchain.runs.identity import describe_run
from jchain.runs.interruption import Interruption
from jchain.runs.monitor import Monitor
from jchain.runs.processes import is_shared
from jchain.runs.progress import Progress, ProgressLine
from jchain.runs.rescoring import get_seen_problem
from jchain.runs.result import Result, RunState, Start, StopRule, Trace, make_results
from jchain.runs.run_folder import open_folder
from jchain.runs.starts import list_starts
from jchain.runs.stepping import (
    NOTHING,
    Recording,
    RunSpec,
    Steps,
    advance_part,
    infer_records,
    make_empty,
    settle,
)
from jchain.search.protocol import Checked, Info, Search

_MAX_BUDGET = 2**31 - 1  # layer calls are counted in int32
_MAX_FINALISTS = 2**20
# The device takes about 0.2 s worth of steps before the host reads the results.
_SYNC_SECONDS = 0.2


@checked
def run(
    key: Key[Array, ""],
    search: Search,
    problem: Problem,
    *,
    budget: int,
    target_loss: float = -math.inf,
    num_finalists: int = 16,
    progress: bool = False,
    mesh: Mesh | None = None,
    starts: ChainsLike | Literal["parents"] | None = "parents",
    checkpoint_dir: str | os.PathLike[str] | None = None,
    save_every: float = 30.0,
    max_seconds: float | None = None,
    callback: Callable[[Progress], object] | None = None,
    record_fn: Callable[[PyTree, Info], PyTree] | None = None,
    record: Literal["chains"] | None = None,
    keep_state: bool = False,
) -> Result:
    """Run a search until its budget is used.

    The budget is never exceeded: a step that would exceed it is not counted, and its chains are
    dropped. The run also stops after 100 consecutive steps that cost no layer calls.

    Ctrl-C and SIGTERM stop the run after the steps that the device is taking, and the result of the
    steps so far is returned (`Result.stopped_by`). A second signal has its usual effect at once.

    With `checkpoint_dir`, the run is saved there. The same call again continues from the last
    checkpoint and gives the same result, to the bit, as a run that was never stopped, on the same
    kind of device. A larger budget, or another target, extends a run that was over.

    Args:
      key: the PRNG key; consumed by this call.
      search: the search and its hyperparameters.
      problem: the problem to search.
      budget: the maximum number of layer calls, including those of the calls that
        this one continues.
      target_loss: the loss to reach; the run stops once the loss of a chain is at most this.
      num_finalists: the number of distinct chains to keep for re-ranking.
      progress: whether to show a live line with the layer calls, the best loss, and the time left.
      mesh: the devices over which the chains of each step are sharded (see `jchain.evaluate`). If
        they belong to several processes, all processes must make this call with equal arguments,
        and all get the result. None leaves the problem on its devices.
      starts: chains to score before the first step, `[C, L]` or lists of tokens, so that the result
        is at least as good as the best of them. They are charged, and a search that can, such as
        local search, begins at the best one (`jchain.search.protocol.Startable`). "parents" for the
        parents of the bank that the problem allows; None to begin with nothing.
      checkpoint_dir: the folder to save the run to, with a log of all scored chains,
        `chains.jsonl`; made if it does not exist. Another run cannot use it at the same time. Of
        several processes that share a mesh, the first reads and writes it. None to save nothing.
      save_every: the seconds between two checkpoints.
      max_seconds: the seconds of this call after which the run stops, up to a few steps; None for
        no limit.
      callback: a function that is called on the host after every few steps, about five times a
        second, with the progress. If it returns a true value, the run stops. If it raises an error,
        the run is saved first.
      record_fn: a jittable function of the state and the `Info` of a step, whose outputs are
        stacked over the counted steps in `Result.records`.
      record: "chains" to keep all scored chains in `Result.scored`.
      keep_state: whether to return the state after the last counted step as `Result.state`. It is
        always returned with `checkpoint_dir`.

    Raises:
      BudgetError: if the budget is smaller than the cost of the starts and one step.
      ValueError: if the key is not from `jax.random.key`, the search is not a registered pytree or
        does not accept the problem, the starts are not chains of the problem, a number is out of
        range, or the folder holds another run, something else, or is in use.
    """
    check_not_forked()
    return run_many(
        key[None],
        search,
        problem,
        budget=budget,
        target_loss=target_loss,
        num_finalists=num_finalists,
        progress=progress,
        mesh=mesh,
        starts=starts,
        checkpoint_dir=checkpoint_dir,
        save_every=save_every,
        max_seconds=max_seconds,
        callback=None if callback is None else lambda runs: callback(runs[0]),
        record_fn=record_fn,
        record=record,
        keep_state=keep_state,
    )[0]


@checked
def run_many(
    keys: Key[Array, "S"],
    search: Search,
    problem: Problem,
    *,
    budget: int,
    target_loss: float = -math.inf,
    num_finalists: int = 16,
    progress: bool = False,
    mesh: Mesh | None = None,
    starts: ChainsLike | Literal["parents"] | None = "parents",
    checkpoint_dir: str | os.PathLike[str] | None = None,
    save_every: float = 30.0,
    max_seconds: float | None = None,
    callback: Callable[[Sequence[Progress]], object] | None = None,
    record_fn: Callable[[PyTree, Info], PyTree] | None = None,
    record: Literal["chains"] | None = None,
    keep_state: bool = False,
) -> list[Result]:
    """Run a search once per key, all at the same time, and return one result per key.

    Steps are vmapped, so a chain that several runs score is computed only once. Each run is charged
    as if it were alone.

    Args:
      keys: the PRNG keys, one per run, `[S]`.
      search: the search and its hyperparameters.
      problem: the problem to search.
      budget: the maximum number of layer calls of each run.
      target_loss: as for `run`; a run that reaches it stops, and the others continue.
      num_finalists: the number of distinct chains to keep in each run.
      progress: as for `run`; the line shows the fewest layer calls and the lowest loss of all runs.
      mesh: as for `run`.
      starts: as for `run`; the same for all runs.
      checkpoint_dir: as for `run`; one folder for all runs.
      save_every: as for `run`.
      max_seconds: as for `run`.
      callback: as for `run`, but with a list of the progress of each run.
      record_fn: as for `run`; it gets the state and the `Info` of one run.
      record: as for `run`.
      keep_state: as for `run`.

    Raises:
      BudgetError: if the budget is smaller than the cost of the starts and one step of a run.
      ValueError: if there are no keys, the keys are not from `jax.random.key`, or as for `run`.
    """
    check_arguments(search, problem, budget, num_finalists)
    _check_limits(target_loss, record, save_every, max_seconds)
    keep_scored, is_saved = record is not None, checkpoint_dir is not None
    keep_state |= is_saved
    spec = RunSpec(
        keys,
        search,
        problem if mesh is None else problem.with_mesh(mesh),
        list_starts(problem, starts),
        num_finalists,
        StopRule(np.int32(budget), np.float32(target_loss)),
        Recording(keep_scored or callback is not None or is_saved, record_fn),
    )
    shared = is_shared(spec.problem)
    with contextlib.ExitStack() as stack:
        interruption = stack.enter_context(Interruption())
        identity = describe_run(spec) if is_saved else {}
        folder = stack.enter_context(open_folder(checkpoint_dir, identity, is_shared=shared))
        history = begin_run(spec, folder, is_saved=is_saved, keep_scored=keep_scored)
        monitor = Monitor(
            history,
            spec.stop,
            stack.enter_context(ProgressLine(budget, is_shown=progress)),
            interruption,
            folder=folder,
            save_every=save_every,
            max_seconds=max_seconds,
            callback=callback,
            keep_scored=keep_scored,
            is_shared=shared,
        )
        parts = iterate_parts(
            history.runs, search, spec.problem, spec.stop, spec.recording, keep_state=keep_state
        )
        stopped_by = next(filter(None, map(monitor.after_part, parts)), None)
        monitor.finish()
        stopped_by = stopped_by or interruption.name  # a signal may come at the very end
    results = make_results(history.runs, history.trace, spec.stop, spec.problem, history.start)
    return history.complete(results, stopped_by, keep_state=keep_state, keep_scored=keep_scored)


def iterate_parts(
    runs: RunState,
    search: Search,
    problem: Problem,
    stop: StopRule,
    recording: Recording = NOTHING,
    *,
    keep_state: bool = False,
) -> Iterator[Part]:
    """Step until all runs are over, and yield after every few steps.

    Args:
      runs: the runs, from `init_runs` or from an earlier part.
      search: the search.
      problem: the problem to search.
      stop: the rule that ends each run.
      recording: what to record at each step.
      keep_state: whether runs that are over have the state that follows their last counted step,
        so that they can be continued (`settle`).
    """
    num_steps = 1
    max_steps, empty = make_empty(infer_records(runs, search, problem, recording))

    def advance(runs: RunState, num_steps: int) -> Steps:
        return advance_part(runs, search, problem, stop, num_steps, empty, recording=recording)

    while not np.all(runs.stats.is_over):
        began = time.perf_counter()
        steps = advance(runs, num_steps)
        trace, records = jax.tree.map(
            lambda leaf, n=int(steps.num_taken): np.asarray(leaf)[:n], (steps.trace, steps.records)
        )
        runs = settle(runs, steps, advance) if keep_state else steps.runs
        seconds = time.perf_counter() - began
        yield Part(runs, trace, records, seconds)
        # Processes that share a mesh must take the same number of steps, but their clocks differ.
        if problem.mesh is None and seconds < _SYNC_SECONDS:
            num_steps = min(2 * num_steps, max_steps)


def advance_runs(
    runs: RunState,
    search: Search,
    problem: Problem,
    stop: StopRule,
    line: ProgressLine,
    *,
    after_part: Callable[[History], str | None],
    keep_state: bool = False,
) -> tuple[RunState, Trace, str | None]:
    """Step until all runs are over, or until they are stopped.

    Args:
      runs: the runs, from `init_runs` or from an earlier call.
      search: the search.
      problem: the problem to search.
      stop: the rule that ends each run.
      line: the progress line to update.
      after_part: a function that is called after every few steps with what this call has done so
        far. If it returns a text, the runs stop.
      keep_state: as for `iterate_parts`.

    Returns:
      The runs, the trace of all T steps, `[T, S]`, and why the runs stopped; None at their end.
    """
    history = History(runs)
    for part in iterate_parts(runs, search, problem, stop, keep_state=keep_state):
        history.add(part)
        stats = part.runs.stats
        line.update(int(np.min(stats.layer_calls)), float(np.min(stats.pool.loss)))
        if reason := after_part(history):
            return history.runs, history.trace, reason
    return history.runs, history.trace, None


def check_budget(
    key: Key[Array, ""],
    search: Search,
    problem: Problem,
    *,
    budget: int,
    num_finalists: int = 16,
    starts: ChainsLike | Literal["parents"] | None = "parents",
) -> None:
    """Check that a budget pays for the starts and the first step of a run.

    The bank may have any weights. The programs are those of `run`, which does not compile them
    again for a bank of the same shapes.

    Args:
      key: the PRNG key that `run` will be given.
      search: the search and its hyperparameters.
      problem: the problem to search.
      budget: the maximum number of layer calls.
      num_finalists: as for `run`.
      starts: as for `run`.

    Raises:
      BudgetError: if the budget is smaller than the cost of the starts and one step.
      ValueError: if an argument is invalid; see `run`.
    """
    check_arguments(search, problem, budget, num_finalists)
    stop = StopRule(np.int32(budget), np.float32(-np.inf))
    chains = list_starts(problem, starts)
    spec = RunSpec(key[None], search, problem, chains, num_finalists, stop)
    runs, start = begin_anew(spec)
    check_first_step(runs, search, problem, stop, start)


def check_first_step(
    runs: RunState, search: Search, problem: Problem, stop: StopRule, start: Start | None
) -> None:
    """Take one step of each run, and check that the budget pays for it.

    Args:
      runs: the runs, from `init_runs` or `begin_at`.
      search: the search.
      problem: the problem to search.
      stop: the rule that ends each run.
      start: what the chains before the first step cost and reached; None if there were none.

    Raises:
      BudgetError: if the budget is smaller than the cost of the starts and one step.
    """
    steps = advance_part(runs, search, problem, stop, 1)
    trace = jax.tree.map(lambda leaf: np.asarray(leaf)[:1], steps.trace)
    make_results(steps.runs, trace, stop, problem, start)


def _check_limits(
    target_loss: float, record: str | None, save_every: float, max_seconds: float | None
) -> None:
    check_saving(save_every, max_seconds)
    if math.isnan(target_loss):
        raise ValueError("expected a target_loss that is a number, got nan")
    if record not in (None, "chains"):
        raise ValueError(f'expected record to be "chains" or None, got {record!r}')


def check_saving(save_every: float, max_seconds: float | None) -> None:
    """Check when a run is saved and stops.

    Args:
      save_every: as for `run`.
      max_seconds: as for `run`.

    Raises:
      ValueError: if a number of seconds is not above 0.
    """
    for name, value in (("save_every", save_every), ("max_seconds", max_seconds)):
        if value is not None and not value > 0:
            raise ValueError(f"expected {name} in seconds, above 0, got {value}")


def check_arguments(search: Search, problem: Problem, budget: int, num_finalists: int) -> None:
    """Check the arguments of a run on the host.

    Args:
      search: the search.
      problem: the problem to search.
      budget: the maximum number of layer calls.
      num_finalists: the number of distinct chains to keep.

    Raises:
      ValueError: if the search is not a registered pytree or does not accept the problem, or if a
        number is out of range.
    """
    check_not_forked()
    check_integers(at_least=1, at_most=_MAX_BUDGET, budget=budget)
    check_integers(at_least=1, at_most=_MAX_FINALISTS, num_finalists=num_finalists)
    if jax.tree_util.all_leaves([search]):
        raise ValueError(
            "expected an instance of a class decorated with @jc.pytree_dataclass, got "
            f"{describe_type(search)}"
        )
    if isinstance(search, Checked):
        search.check(get_seen_problem(search, problem))
