"""The part of a run that happens on the device: the first state, and many steps in one program."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jchain._typing import Array, Bool, Float, Int, Key, PyTree
from jchain.chain import PADDING
from jchain.engine.backend import jit_for_problem
from jchain.engine.control_flow import vmap_unless_one
from jchain.problem import Problem
from jchain.runs.charges import Charge, Rest, charge_step
from jchain.runs.front import empty_front, merge_front
from jchain.runs.rescoring import get_seen_problem, rescore
from jchain.runs.result import MAX_FREE_STEPS, RunState, RunStats, StopRule, Trace
from jchain.search.pool import empty_pool, merge
from jchain.search.protocol import Info, Search, charges_fractions, check_step

# One program takes at most this many steps, or fewer if what they record needs more memory.
MAX_STEPS = 256
_MAX_RECORD_BYTES = 2**26

RecordFn = Callable[[PyTree, Info], PyTree]


class Records(NamedTuple):
    """What the steps of a part recorded. Either may be None."""

    scored: Info | None  # the chains that each step scored, [T, S, P, L]
    custom: PyTree  # what `record_fn` returned, with leading axes [T, S]


class Recording(NamedTuple):
    """What to record at each step."""

    is_scored: bool = False  # whether to record the chains and their losses
    record_fn: RecordFn | None = None


NOTHING, NO_RECORDS = Recording(), Records(None, None)


class RunSpec(NamedTuple):
    """What one or several runs are, one per key."""

    keys: Key[Array, "S"]
    search: Search
    problem: Problem
    starts: Int[np.ndarray, "C L"]
    num_finalists: int
    stop: StopRule
    recording: Recording = NOTHING


class Steps(NamedTuple):
    """What `advance_part` returns."""

    runs: RunState
    trace: Trace  # [T, S]
    records: Records
    num_taken: Int[Array, ""]  # the rows after it are undefined


def init_runs(
    keys: Key[Array, "S"], search: Search, problem: Problem, num_finalists: int
) -> RunState:
    """Initialize one run per key.

    Args:
      keys: the PRNG keys, one per run, `[S]`.
      search: the search.
      problem: the problem to search.
      num_finalists: the number of chains that the pool of each run holds.
    """
    return _init_runs(keys, search, problem.without_names(), num_finalists)


def infer_runs(
    keys: Key[Array, "S"], search: Search, problem: Problem, num_finalists: int
) -> RunState:
    """Return the shapes and dtypes of `init_runs`, without computing it.

    Args:
      keys: as for `init_runs`.
      search: as for `init_runs`.
      problem: as for `init_runs`.
      num_finalists: as for `init_runs`.
    """
    problem = problem.without_names()
    return _init_runs.eval_shape(keys, search, problem, num_finalists=num_finalists)


@partial(jax.jit, static_argnames="num_finalists")
def _init_runs(keys: Array, search: Search, problem: Problem, num_finalists: int) -> RunState:
    # Match the dtypes and weak types after a step, so the first step is not compiled separately.
    pool, front = empty_pool(num_finalists, problem), empty_front(problem)
    zero = jnp.zeros((), jnp.int32)
    stats = RunStats(
        pool=pool,
        layer_calls=zero,
        num_scored=zero,
        num_nonfinite=zero,
        num_invalid=zero,
        num_free=zero,
        last_calls=zero,
        is_over=jnp.array(False),
        front=front,
        rest=_start_rest(search, problem),
    )
    seen = get_seen_problem(search, problem)

    def init_one(key: Array) -> RunState:
        key, init_key = jax.random.split(key)
        state = search.init(init_key, seen)
        return RunState(key, jax.tree.map(_cast, state, state), stats)

    return vmap_unless_one(init_one, keys)


def infer_records(
    runs: RunState, search: Search, problem: Problem, recording: Recording
) -> Records:
    """Return the shapes and dtypes of what one step of all runs records, without computing it.

    Args:
      runs: the runs, or their shapes.
      search: the search.
      problem: the problem to search.
      recording: what to record.
    """
    if not recording.is_scored and recording.record_fn is None:
        return NO_RECORDS
    stop = StopRule(np.int32(1), np.float32(0))
    return _take_step_of_each.eval_shape(runs, search, problem.without_names(), stop, recording)[2]


# It is jitted so that `infer_records` and `advance_part` trace the step only once.
@partial(jax.jit, static_argnums=4)
def _take_step_of_each(
    runs: RunState, search: Search, problem: Problem, stop: StopRule, recording: Recording
) -> tuple[RunState, Trace, Records]:
    return vmap_unless_one(lambda run: _take_step(run, search, problem, stop, recording), runs)


def make_empty(records: Records) -> tuple[int, Records]:
    """Make room for the records of a part, at most 64 MB.

    Args:
      records: the shapes and dtypes of what one step records, from `infer_records`.

    Returns:
      The number of steps that fit, and the empty records.
    """
    num_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(records))
    num_steps = max(1, min(MAX_STEPS, _MAX_RECORD_BYTES // max(1, num_bytes)))
    empty = jax.tree.map(lambda leaf: jnp.zeros((num_steps, *leaf.shape), leaf.dtype), records)
    return num_steps, empty


@jit_for_problem(static_argnames=("recording",))
def advance_part(
    runs: RunState,
    search: Search,
    problem: Problem,
    stop: StopRule,
    num_steps: Int[ArrayLike, ""],
    empty: Records = NO_RECORDS,
    *,
    recording: Recording = NOTHING,
) -> Steps:
    """Take some steps of each run, and stop early if all runs are over.

    A step that exceeds the budget is not counted, but the run gets the key and the state that
    follow it; see `settle`.

    Args:
      runs: the runs.
      search: the search.
      problem: the problem to search.
      stop: the rule that ends each run.
      num_steps: the number of steps, at most `MAX_STEPS` and what `empty` has room for.
      empty: the room for the records, from `make_empty`.
      recording: what to record at each step.
    """

    def is_active(carry: tuple[Array, RunState, tuple[Trace, Records]]) -> Array:
        t, runs, _ = carry
        return (t < num_steps) & ~runs.stats.is_over.all()

    def take_step(
        carry: tuple[Array, RunState, tuple[Trace, Records]],
    ) -> tuple[Array, RunState, tuple[Trace, Records]]:
        t, runs, rows = carry
        runs, *new = _take_step_of_each(runs, search, problem, stop, recording)
        return t + 1, runs, jax.tree.map(lambda leaf, row: leaf.at[t].set(row), rows, tuple(new))

    shape = (MAX_STEPS, runs.key.shape[0])
    counts = jnp.zeros(shape, jnp.int32)
    examples = None if runs.stats.rest is None else counts
    trace = Trace(counts, jnp.zeros(shape, jnp.float32), jnp.zeros(shape, bool), examples)
    start = (jnp.array(0), runs, (trace, empty))
    num_taken, runs, (trace, records) = jax.lax.while_loop(is_active, take_step, start)
    return Steps(runs, trace, records, num_taken)


def settle(before: RunState, steps: Steps, advance: Callable[[RunState, int], Steps]) -> RunState:
    """Give each run that is over the key and the state that follow its last counted step.

    To keep them at each step would copy the whole state each time. Instead, the counted steps of
    the runs that ended in a part are taken again.

    Args:
      before: the runs before the part.
      steps: the part.
      advance: takes a number of steps of the runs.
    """
    was_over, is_over = (np.asarray(runs.stats.is_over) for runs in (before, steps.runs))
    runs = _select(was_over, before, steps.runs) if was_over.any() else steps.runs
    num_counted = np.asarray(steps.trace.is_counted)[: int(steps.num_taken)].sum(axis=0)
    has_ended = is_over & ~was_over & (num_counted < int(steps.num_taken))
    again, num_taken = before, 0
    for num in np.unique(num_counted[has_ended]):
        if num > num_taken:
            again, num_taken = advance(again, int(num - num_taken)).runs, num
        runs = _select(has_ended & (num_counted == num), again, runs)
    return runs


@jax.jit
def _select(is_first: Bool[Array, "S"], first: RunState, second: RunState) -> RunState:
    """Take the keys and the states of some runs from the first, and all else from the second."""

    def choose(a: Array, b: Array) -> Array:
        return jnp.where(jnp.expand_dims(is_first, tuple(range(1, b.ndim))), a, b)

    return second._replace(
        key=choose(first.key, second.key), state=jax.tree.map(choose, first.state, second.state)
    )


def reopen(runs: RunState, stop: StopRule) -> RunState:
    """Let runs that are over continue under another rule, if it allows them to.

    Args:
      runs: the runs.
      stop: the new rule.
    """
    stats = runs.stats
    is_over = _is_over(stats.layer_calls, stats.num_free, stats.pool.loss[:, 0], stop)
    return runs._replace(stats=stats._replace(is_over=is_over))


def _take_step(
    run: RunState, search: Search, problem: Problem, stop: StopRule, recording: Recording
) -> tuple[RunState, Trace, Records]:
    """Take one step of one run; return the run, its row of the trace, and what it recorded."""
    key, step_key = jax.random.split(run.key)
    seen = get_seen_problem(search, problem)
    state, info = check_step(search, search.step(step_key, run.state, seen), seen)
    if seen is not problem:
        info = rescore(info, problem)
    # With jax_enable_x64, some counts and losses become wider than in the first state.
    state = jax.tree.map(_cast, state, run.state)
    old = run.stats
    charge = charge_step(info.layer_calls, old.rest)
    is_counted = ~old.is_over & charge.fits(jnp.asarray(stop.budget - old.layer_calls))
    # What a search reports is checked: a row that is not a chain never becomes the best one.
    is_chain = problem.space.contains(info.chains)
    num_invalid = jnp.sum(~is_chain & (info.chains != PADDING).any(axis=1), dtype=jnp.int32)
    chains = jnp.where(is_chain[:, None], info.chains, PADDING)
    loss = jnp.where(is_chain, info.loss, jnp.inf)
    if problem.max_cost is not None:
        loss = jnp.where(problem.exceeds_limit(problem.chain_cost(chains)), jnp.inf, loss)
    info = Info(chains, loss, charge.cost)
    stats = jax.tree.map(
        partial(jnp.where, is_counted),
        _count(old, info, charge, num_invalid, problem, stop),
        old._replace(last_calls=charge.cost, is_over=jnp.array(True)),
    )
    examples = None if stats.rest is None else stats.rest.examples
    row = Trace(stats.layer_calls, stats.pool.loss[0], is_counted, examples)
    custom = None
    if recording.record_fn is not None:
        custom = jax.tree.map(jnp.asarray, recording.record_fn(state, info))
    records = Records(info if recording.is_scored else None, custom)
    return RunState(key, state, stats), row, records


def _count(
    old: RunStats,
    info: Info,
    charge: Charge,
    num_invalid: Int[Array, ""],
    problem: Problem,
    stop: StopRule,
) -> RunStats:
    """Add a step to the counts and the best chains of a run."""
    is_chain = info.chains[:, 0] != PADDING
    pool = merge(old.pool, info.chains, info.loss)
    layer_calls = old.layer_calls + charge.layer_calls
    num_free = jnp.where(charge.cost == 0, old.num_free + 1, 0)
    return RunStats(
        pool=pool,
        layer_calls=layer_calls,
        num_scored=old.num_scored + jnp.sum(is_chain, dtype=jnp.int32),
        num_nonfinite=old.num_nonfinite
        + jnp.sum(is_chain & ~jnp.isfinite(info.loss), dtype=jnp.int32),
        num_invalid=old.num_invalid + num_invalid,
        num_free=num_free,
        last_calls=charge.cost,
        is_over=_is_over(layer_calls, num_free, pool.loss[0], stop),
        front=merge_front(old.front, problem, info.chains, info.loss),
        rest=charge.rest,
    )


def _start_rest(search: Search, problem: Problem) -> Rest | None:
    if not charges_fractions(search):
        return None
    return Rest(jnp.zeros((), jnp.int32), jnp.full((), problem.num_examples, jnp.int32))


def _is_over(
    layer_calls: Int[Array, "*S"],
    num_free: Int[Array, "*S"],
    loss: Float[Array, "*S"],
    stop: StopRule,
) -> Bool[Array, "*S"]:
    is_stuck = num_free >= MAX_FREE_STEPS
    return (layer_calls >= stop.budget) | is_stuck | (loss <= stop.target_loss)


def _cast(new: ArrayLike, old: ArrayLike) -> Array:
    """Give a leaf the dtype of an earlier one, without a weak type.

    Otherwise, a run that begins at chains, or that is read from a file, would compile its steps
    again.
    """
    new, dtype = jnp.asarray(new), jnp.asarray(old).dtype
    is_key = jnp.issubdtype(dtype, jax.dtypes.prng_key)
    return new if is_key else jax.lax.convert_element_type(new, dtype)
