"""The driver that runs every search: `run` and `run_many`."""

import math
import time
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import ArrayLike

from jchain._typing import Array, Int, Key
from jchain.chain import PADDING, ChainsLike
from jchain.engine.backend import jit_for_problem
from jchain.engine.control_flow import vmap_unless_one
from jchain.problem import Problem
from jchain.pytree import describe_type
from jchain.search.front import empty_front, merge_front
from jchain.search.pool import empty_pool, merge
from jchain.search.progress import Progress
from jchain.search.protocol import Checked, Search, check_step
from jchain.search.rescoring import get_seen_problem, rescore
from jchain.search.result import (
    Result,
    RunState,
    RunStats,
    Start,
    StopRule,
    Trace,
    make_results,
)
from jchain.search.starts import begin_at, list_starts

# A run stops after this many consecutive steps that cost no layer calls.
MAX_FREE_STEPS = 100
_MAX_BUDGET = 2**31 - 1  # layer calls are counted in int32
# The device takes about 0.2 s worth of steps, but at most 256, before the host reads the results.
_SYNC_SECONDS, _MAX_STEPS_PER_SYNC = 0.2, 256


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
) -> Result:
    """Run a search until its budget is used.

    The budget is never exceeded: a step that would exceed it is not counted, and its chains are
    dropped. The run also stops after 100 consecutive steps that cost no layer calls.

    Args:
      key: the PRNG key; consumed by this call.
      search: the search and its hyperparameters.
      problem: the problem to search.
      budget: the maximum number of layer calls.
      target_loss: the loss to reach; the run stops once the loss of a chain is at most this.
      num_finalists: the number of distinct chains to keep for re-ranking.
      progress: whether to show a live line with the layer calls, the best loss, and the time left.
      mesh: the devices over which the chains of each step are sharded (see `jchain.evaluate`). If
        they belong to several processes, all processes must make this call with equal arguments,
        and all get the result. None leaves the problem on its devices.
      starts: chains to score before the first step, `[S, L]` or lists of tokens, so that the result
        is at least as good as the best of them. They are charged, and a search that can, such as
        local search, begins at the best one (`jchain.search.protocol.Startable`). "parents" for the
        parents of the bank that the problem allows; None to begin with nothing.

    Raises:
      BudgetError: if the budget is smaller than the cost of the starts and one step.
      ValueError: if the key is not from `jax.random.key`, the search is not a registered pytree or
        does not accept the problem, the starts are not chains of the problem, or the target is nan.
    """
    _check_keys(key, 0, "one key of jax.random.key")
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
    )[0]


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

    Raises:
      BudgetError: if the budget is smaller than the cost of the starts and one step of a run.
      ValueError: if there are no keys, the keys are not from `jax.random.key`, or as for `run`.
    """
    check_arguments(search, problem, budget, num_finalists)
    if math.isnan(target_loss):
        raise ValueError("expected a target_loss that is a number, got nan")
    _check_keys(keys, 1, "keys of jax.random.key of shape [S], at least one")
    chains = list_starts(problem, starts)
    problem = problem if mesh is None else problem.on(mesh)
    stop = StopRule(np.int32(budget), np.float32(target_loss))
    with Progress(budget, is_shown=progress) as line:
        runs, start = _begin(keys, search, problem, chains, num_finalists, stop)
        runs, trace = advance_runs(runs, search, problem, stop, line)
    return make_results(runs, trace, budget, problem, start)


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
    chains = list_starts(problem, starts)
    stop = StopRule(np.int32(budget), np.float32(-np.inf))
    runs, start = _begin(key[None], search, problem, chains, num_finalists, stop)
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
    runs, trace = _advance(runs, search, problem, stop, 1, should_roll_back=False)
    trace = jax.tree.map(lambda leaf: np.asarray(leaf)[:1], trace)
    make_results(runs, trace, int(np.asarray(stop.budget)), problem, start)


def _begin(
    keys: Key[Array, "S"],
    search: Search,
    problem: Problem,
    chains: Int[np.ndarray, "C L"],
    num_finalists: int,
    stop: StopRule,
) -> tuple[RunState, Start | None]:
    """Initialize one run per key, and let it begin at the starts, if there are any."""
    runs = init_runs(problem.put(keys), search, problem, num_finalists)
    if len(chains) == 0:
        return runs, None
    return begin_at(runs, search, problem, chains, stop)


def _check_keys(keys: object, num_axes: int, expected: str) -> None:
    dtype, shape = getattr(keys, "dtype", type(keys)), getattr(keys, "shape", ())
    if not jnp.issubdtype(dtype, jax.dtypes.prng_key) or len(shape) != num_axes or 0 in shape:
        raise ValueError(f"expected {expected}, got {dtype}{list(shape)}")


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
    if not isinstance(problem, Problem):
        raise ValueError(f"expected a jc.Problem, got {describe_type(problem)}")
    for name, value in (("budget", budget), ("num_finalists", num_finalists)):
        if not isinstance(value, int | np.integer):
            raise ValueError(f"expected {name} to be an integer, got {value!r}")
    if budget < 1 or num_finalists < 1:
        raise ValueError(
            f"expected a budget and num_finalists of at least 1, got {budget} and {num_finalists}"
        )
    if budget > _MAX_BUDGET:
        raise ValueError(
            f"expected a budget of at most {_MAX_BUDGET:,} layer calls, got {budget:,}"
        )
    if jax.tree_util.all_leaves([search]):
        raise ValueError(
            "expected an instance of a class decorated with @jc.pytree_dataclass, got "
            f"{describe_type(search)}"
        )
    if isinstance(search, Checked):
        search.check(get_seen_problem(search, problem))


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
    )

    seen = get_seen_problem(search, problem)

    def init_one(key: Array) -> RunState:
        key, init_key = jax.random.split(key)
        state = search.init(init_key, seen)
        return RunState(key, jax.tree.map(_cast, state, state), stats)

    return vmap_unless_one(init_one, keys)


def _cast(new: ArrayLike, old: ArrayLike) -> Array:
    """Give a leaf the dtype of an earlier one, without a weak type.

    Otherwise, a run that begins at chains, or that is read from a file, would compile its steps
    again.
    """
    new, dtype = jnp.asarray(new), jnp.asarray(old).dtype
    is_key = jnp.issubdtype(dtype, jax.dtypes.prng_key)
    return new if is_key else jax.lax.convert_element_type(new, dtype)


def advance_runs(
    runs: RunState,
    search: Search,
    problem: Problem,
    stop: StopRule,
    line: Progress,
    *,
    should_roll_back: bool = False,
) -> tuple[RunState, Trace]:
    """Step until all runs are over.

    Args:
      runs: the runs, from `init_runs` or from an earlier call.
      search: the search.
      problem: the problem to search.
      stop: the rule that ends each run.
      line: the progress line to update.
      should_roll_back: whether to return to the state before a step that is not counted, so that a
        run can continue from there.

    Returns:
      The finished runs, and the trace of all T steps, `[T, S]`.
    """
    num_steps, shape = 1, (0, runs.key.shape[0])
    traces = [Trace(jnp.zeros(shape, jnp.int32), jnp.zeros(shape), jnp.zeros(shape, bool))]
    while not np.all(runs.stats.is_over):
        began = time.perf_counter()
        runs, trace = _advance(
            runs, search, problem, stop, num_steps, should_roll_back=should_roll_back
        )
        traces.append(jax.tree.map(lambda leaf, n=num_steps: np.asarray(leaf)[:n], trace))
        line.update(int(np.min(runs.stats.layer_calls)), float(np.min(runs.stats.pool.loss)))
        # Processes that share a mesh must take the same number of steps, but their clocks differ.
        if problem.mesh is None and time.perf_counter() - began < _SYNC_SECONDS:
            num_steps = min(2 * num_steps, _MAX_STEPS_PER_SYNC)
    return runs, jax.tree.map(lambda *leaves: np.concatenate(leaves), *traces)


@jit_for_problem(static_argnames=("should_roll_back",))
def _advance(
    runs: RunState,
    search: Search,
    problem: Problem,
    stop: StopRule,
    num_steps: Int[ArrayLike, ""],
    *,
    should_roll_back: bool,
) -> tuple[RunState, Trace]:
    """Take up to `num_steps` steps of each run, and stop early if all runs are over."""

    def is_active(carry: tuple[Array, RunState, Trace]) -> Array:
        t, runs, _ = carry
        return (t < num_steps) & ~runs.stats.is_over.all()

    def step(carry: tuple[Array, RunState, Trace]) -> tuple[Array, RunState, Trace]:
        t, runs, trace = carry
        runs, row = vmap_unless_one(
            lambda run: _step(run, search, problem, stop, should_roll_back), runs
        )
        return t + 1, runs, jax.tree.map(lambda leaf, new: leaf.at[t].set(new), trace, row)

    shape = (_MAX_STEPS_PER_SYNC, runs.key.shape[0])
    empty = Trace(jnp.zeros(shape, jnp.int32), jnp.zeros(shape), jnp.zeros(shape, bool))
    _, runs, trace = jax.lax.while_loop(is_active, step, (jnp.array(0), runs, empty))
    return runs, trace


def _step(
    run: RunState, search: Search, problem: Problem, stop: StopRule, should_roll_back: bool
) -> tuple[RunState, Trace]:
    """Take one step of one run; return the run and its row of the trace."""
    key, step_key = jax.random.split(run.key)
    seen = get_seen_problem(search, problem)
    state, info = check_step(search, search.step(step_key, run.state, seen), seen)
    if seen is not problem:
        info = rescore(info, problem)
    # With jax_enable_x64, some counts and losses become wider than in the first state.
    state = jax.tree.map(_cast, state, run.state)
    old = run.stats
    calls = info.layer_calls.astype(jnp.int32)
    num_free = jnp.where(calls == 0, old.num_free + 1, 0)
    # Compare with the budget that is left, because the sum of the calls could overflow int32.
    left = stop.budget - old.layer_calls
    is_counted = ~old.is_over & (calls <= left)
    # What a search reports is checked: a row that is not a chain never becomes the best one.
    is_chain = problem.space.contains(info.chains)
    is_invalid = ~is_chain & (info.chains != PADDING).any(axis=1)
    chains = jnp.where(is_chain[:, None], info.chains, PADDING)
    loss = jnp.where(is_chain, info.loss, jnp.inf)
    pool = merge(old.pool, chains, loss)
    new = RunStats(
        pool=pool,
        layer_calls=old.layer_calls + calls,
        num_scored=old.num_scored + jnp.sum(is_chain, dtype=jnp.int32),
        num_nonfinite=old.num_nonfinite
        + jnp.sum(is_chain & ~jnp.isfinite(info.loss), dtype=jnp.int32),
        num_invalid=old.num_invalid + jnp.sum(is_invalid, dtype=jnp.int32),
        num_free=num_free,
        last_calls=calls,
        is_over=(calls >= left) | (num_free >= MAX_FREE_STEPS) | (pool.loss[0] <= stop.target_loss),
        front=merge_front(old.front, problem, chains, loss),
    )
    unchanged = old._replace(last_calls=calls, is_over=jnp.array(True))
    stats = jax.tree.map(partial(jnp.where, is_counted), new, unchanged)
    if should_roll_back:
        state = jax.tree.map(partial(jnp.where, is_counted), state, run.state)
    return RunState(key, state, stats), Trace(stats.layer_calls, stats.pool.loss[0], is_counted)
