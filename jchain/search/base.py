"""What every search is, and the one loop that runs it."""

import math
import time
from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jchain._typing import Array, Bool, Float, Int, Key
from jchain.chain import PADDING
from jchain.engine.backend import compiler_options, find_backend
from jchain.problem import Problem
from jchain.search.progress import Progress

# A search that charges nothing so often in a row has nothing left to ask.
MAX_FREE_STEPS = 100
_MAX_BUDGET = 2**31 - 1  # counts are int32
# Steps between two looks of the host: as many as fit this time, in seconds, and at most this number.
_PART_SECONDS, _MAX_PART = 0.2, 256


class Info(NamedTuple):
    """What one step did."""

    chains: Int[Array, "P L"]  # [P, L], the chains it scored; rows of -1 hold none
    loss: Float[Array, "P"]  # [P], +inf where it was not finite, or where there is no chain
    layer_calls: Int[Array, ""]  # what it cost


@runtime_checkable
class Search(Protocol):
    """A frozen dataclass registered as a pytree (`jchain.pytree`): sizes static, rates data.

    Both methods can be jitted, and vmapped over keys and states.
    """

    def init(self, key: Key[Array, ""], problem: Problem) -> Any:
        """The first state: what `step` needs to know, and nothing else."""
        ...

    def step(self, key: Key[Array, ""], state: Any, problem: Problem) -> tuple[Any, Info]:
        """Score some chains."""
        ...


@runtime_checkable
class Refreshable(Protocol):
    """A search that can go on where weights of the bank have changed; others start anew there (`jchain.updates`)."""

    def refresh(
        self, state: Any, problem: Problem, chains: Int[Array, "Q L"]
    ) -> tuple[Any, Int[Array, ""]]:
        """The state with all losses that it remembers taken anew, and what that cost in layer calls.

        Args:
          state: of before.
          problem: with the weights as they are now.
          chains: chains to remember beside, `[Q, L]`; rows of -1 hold none.
        """
        ...


@runtime_checkable
class Checked(Protocol):
    """A search that does not take every problem."""

    def check(self, problem: Problem) -> None:
        """On the host, before anything is computed.

        Raises:
          ValueError: what the search was given does not fit the problem.
        """
        ...


class Curve(NamedTuple):
    """Best loss against cost, after each step."""

    layer_calls: Int[np.ndarray, "T"]
    best_loss: Float[np.ndarray, "T"]

    def at(self, budgets: Any) -> Float[np.ndarray, "B"]:
        """Best loss within each number of layer calls, `+inf` where the first step costs more."""
        place = np.searchsorted(self.layer_calls, budgets, side="right") - 1
        return np.where(place >= 0, self.best_loss[np.maximum(place, 0)], np.inf)


class Result(NamedTuple):
    """What a run found on its problem."""

    best_chain: Int[np.ndarray, "L"]  # all -1 when no chain had a finite loss
    best_loss: float
    curve: Curve
    finalists: Int[
        np.ndarray, "Q L"
    ]  # the best different chains, best first, to be re-ranked on `select`
    finalist_losses: Float[np.ndarray, "Q"]
    layer_calls: int
    num_chains: int  # scored, repeats included
    num_nonfinite: int  # of them, with a loss that was not finite


class Pool(NamedTuple):
    """The best different chains so far, best first."""

    chains: Int[Array, "Q L"]  # [Q, L], all -1 in an empty place
    loss: Float[Array, "Q"]  # [Q], +inf there


class Tally(NamedTuple):
    """What one run has found and spent."""

    pool: Pool
    layer_calls: Int[Array, ""]
    num_chains: Int[Array, ""]
    num_nonfinite: Int[Array, ""]
    num_free: Int[Array, ""]  # steps in a row that cost nothing
    cost: Int[Array, ""]  # of the last step, counted or not
    is_over: Bool[Array, ""]


class BudgetError(ValueError):
    """Not even one step fits."""

    def __init__(self, cost: int, budget: int, more: str = "") -> None:
        super().__init__(
            f"expected a budget of at least one step, which costs {cost:,} layer calls here{more}, got {budget:,}"
        )
        self.cost = cost


class Goal(NamedTuple):
    """When a run is over."""

    budget: Any  # int32
    target_loss: Any  # float32


class Run(NamedTuple):
    """One run between two steps."""

    key: Key[Array, ""]
    state: Any
    tally: Tally


class Steps(NamedTuple):
    """What each step of a part of the runs left."""

    layer_calls: Int[Array, "T S"]
    best_loss: Float[Array, "T S"]
    is_counted: Bool[Array, "T S"]


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
) -> Result:
    """Step a search until its budget is used.

    The budget is never exceeded: a step that would pass it is not counted and its chains are not seen. A search that
    charges nothing for 100 steps in a row is stopped.

    Args:
      key: consumed by the search.
      search: the search and its hyperparameters.
      problem: what to minimize over.
      budget: layer calls.
      target_loss: good enough: a run that has found a chain of at most this loss is over.
      num_finalists: how many different chains to keep for re-ranking.
      progress: show a live line with layer calls, best loss and time left.
      mesh: devices over which the chains of each step are spread (see `jchain.evaluate`). Where they belong to several
        processes, all must make this call with equal arguments, and all get the result.

    Raises:
      ValueError: the key is none of `jax.random.key`, the search is not a registered pytree or does not take the problem, the
        target is nan, or the budget is smaller than one step.
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
) -> list[Result]:
    """`run` for many keys at once: their steps are vmapped, so that chains which runs share are computed once.

    Each run is charged as if it were alone.

    Args:
      keys: one for each run, `[S]`.
      search: as for `run`, and so are the others; progress shows the run that has spent least.

    Raises:
      ValueError: there is no key, one of another kind, or as `run`.
    """
    check(search, problem, budget, num_finalists)
    if math.isnan(target_loss):
        raise ValueError("expected a target_loss that is a number, got nan")
    _check_keys(keys, 1, "keys of jax.random.key of shape [S], at least one")
    problem = (problem if mesh is None else problem.on(mesh)).without_names()
    runs = start(problem.put(keys), search, problem, num_finalists)
    with Progress(budget, is_shown=progress) as line:
        runs, steps = spend(
            runs, search, problem, Goal(np.int32(budget), np.float32(target_loss)), line
        )
    return finish(runs, steps, budget)


def _check_keys(keys: Array, num_axes: int, expected: str) -> None:
    if (
        not jnp.issubdtype(keys.dtype, jax.dtypes.prng_key)
        or keys.ndim != num_axes
        or keys.size == 0
    ):
        raise ValueError(f"expected {expected}, got {keys.dtype}{list(keys.shape)}")


def check(search: Search, problem: Problem, budget: int, num_finalists: int) -> None:
    """Refuse what no run can begin with.

    Raises:
      ValueError: the search is not a registered pytree or does not take the problem, or a number is out of range.
    """
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
            f"expected a search registered as a pytree (jchain.pytree), got {type(search).__name__}"
        )
    if isinstance(search, Checked):
        search.check(problem)


def spend(
    runs: Run,
    search: Search,
    problem: Problem,
    goal: Goal,
    line: Progress,
    *,
    keeps_state: bool = False,
) -> tuple[Run, Steps]:
    """Step until all runs are over; `[T]` is the number of steps.

    With `keeps_state` the state is that of before the last step where this was not counted, for runs that go on.
    """
    advance = _compile_advance(find_backend(problem))
    parts: list[Steps] = []
    num_steps = 1
    while not np.all(runs.tally.is_over):
        began = time.perf_counter()
        runs, steps = advance(runs, search, problem, goal, num_steps, keeps_state=keeps_state)
        parts.append(jax.tree.map(lambda leaf, n=num_steps: np.asarray(leaf)[:n], steps))
        line.update(int(np.min(runs.tally.layer_calls)), float(np.min(runs.tally.pool.loss)))
        # Few enough steps at a time that the line lives, many enough that the host costs nothing. Processes that share
        # a mesh must agree, which their clocks would not.
        if problem.mesh is None and time.perf_counter() - began < _PART_SECONDS:
            num_steps = min(2 * num_steps, _MAX_PART)
    return runs, jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)


def finish(runs: Run, steps: Steps, budget: int) -> list[Result]:
    """What each run found.

    Raises:
      ValueError: not even one step fitted into the budget.
    """
    tallies = jax.tree.map(np.asarray, runs.tally)
    return [_make_result(tallies, steps, i, budget) for i in range(tallies.layer_calls.shape[0])]


@partial(jax.jit, static_argnames="num_finalists")
def start(keys: Array, search: Search, problem: Problem, num_finalists: int) -> Run:
    """Runs before their first step."""
    # Of the types that a step returns, also where they are weak: with others the first step would be compiled for itself.
    pool, zero = empty_pool(num_finalists, problem), jnp.zeros((), jnp.int32)
    tally = Tally(pool, zero, zero, zero, zero, zero, jnp.array(False))

    def start_one(key: Array) -> Run:
        key, init_key = jax.random.split(key)
        return Run(key, search.init(init_key, problem), tally)

    return _map_runs(start_one, keys)


@cache
def _compile_advance(backend: str) -> Any:
    return jax.jit(
        _advance, static_argnames="keeps_state", compiler_options=compiler_options(backend)
    )


def _advance(
    runs: Run,
    search: Search,
    problem: Problem,
    goal: Goal,
    num_steps: Int[Array, ""],
    keeps_state: bool,
) -> tuple[Run, Steps]:
    """Up to `num_steps` steps of each run, until all are over."""

    def go_on(carry: tuple[Array, Run, Steps]) -> Array:
        t, runs, _ = carry
        return (t < num_steps) & ~runs.tally.is_over.all()

    def step(carry: tuple[Array, Run, Steps]) -> tuple[Array, Run, Steps]:
        t, runs, steps = carry
        runs, row = _map_runs(lambda run: _step(run, search, problem, goal, keeps_state), runs)
        return t + 1, runs, jax.tree.map(lambda leaf, new: leaf.at[t].set(new), steps, row)

    shape = (_MAX_PART, runs.key.shape[0])
    empty = Steps(jnp.zeros(shape, jnp.int32), jnp.zeros(shape), jnp.zeros(shape, bool))
    _, runs, steps = jax.lax.while_loop(go_on, step, (jnp.array(0), runs, empty))
    return runs, steps


def _map_runs(fn: Callable[[Any], Any], runs: Any) -> Any:
    """`vmap`; but one run alone is not batched, which would turn its branches into both sides of a select."""
    if jax.tree.leaves(runs)[0].shape[0] > 1:
        return jax.vmap(fn)(runs)
    return jax.tree.map(lambda leaf: leaf[None], fn(jax.tree.map(lambda leaf: leaf[0], runs)))


def _step(
    run: Run, search: Search, problem: Problem, goal: Goal, keeps_state: bool
) -> tuple[Run, Steps]:
    key, step_key = jax.random.split(run.key)
    state, info = search.step(step_key, run.state, problem)
    # With jax_enable_x64 some counts and losses become wider than they began.
    state = jax.tree.map(
        lambda new, old: new if new.dtype == old.dtype else new.astype(old.dtype), state, run.state
    )
    old = run.tally
    cost = info.layer_calls.astype(jnp.int32)
    num_free = jnp.where(cost == 0, old.num_free + 1, 0)
    left = goal.budget - old.layer_calls  # never below 0, where a sum could pass the largest int32
    is_counted = ~old.is_over & (cost <= left)
    pool = merge(old.pool, info.chains, info.loss)
    is_there = info.chains[:, 0] != PADDING
    new = Tally(
        pool,
        old.layer_calls + cost,
        old.num_chains + jnp.sum(is_there, dtype=jnp.int32),
        old.num_nonfinite + jnp.sum(is_there & ~jnp.isfinite(info.loss), dtype=jnp.int32),
        num_free,
        cost,
        (cost >= left) | (num_free >= MAX_FREE_STEPS) | (pool.loss[0] <= goal.target_loss),
    )
    tally = jax.tree.map(
        partial(jnp.where, is_counted), new, old._replace(cost=cost, is_over=jnp.array(True))
    )
    if keeps_state:
        state = jax.tree.map(partial(jnp.where, is_counted), state, run.state)
    return Run(key, state, tally), Steps(tally.layer_calls, tally.pool.loss[0], is_counted)


def empty_pool(size: int, problem: Problem) -> Pool:
    """Places for so many chains."""
    return Pool(
        jnp.full((size, problem.max_layers + 1), PADDING, jnp.int32),
        jnp.full(size, jnp.inf, jnp.float32),
    )


def merge(pool: Pool, chains: Int[Array, "P L"], loss: Float[Array, "P"]) -> Pool:
    """The best different chains of both; one whose loss is not finite is never among them."""
    rows = jnp.concatenate([pool.chains, chains.astype(jnp.int32)])
    losses = jnp.concatenate([pool.loss, loss.astype(pool.loss.dtype)])
    losses = jnp.where(jnp.isfinite(losses), losses, jnp.inf)
    *columns, losses = jax.lax.sort([*rows.T, losses], num_keys=rows.shape[1] + 1)
    rows = jnp.stack(columns, axis=1)
    is_repeat = jnp.append(False, jnp.all(rows[1:] == rows[:-1], axis=1))
    losses = jnp.where(is_repeat, jnp.inf, losses)
    best = jnp.argsort(losses)[: pool.loss.shape[0]]
    is_there = jnp.isfinite(losses[best])
    return Pool(jnp.where(is_there[:, None], rows[best], PADDING), losses[best])


def _make_result(tallies: Tally, steps: Steps, i: int, budget: int) -> Result:
    """The result of run `i`."""
    tally = jax.tree.map(lambda leaf: leaf[i], tallies)
    is_counted = steps.is_counted[:, i]
    if not is_counted.any():
        raise BudgetError(int(tally.cost), budget)
    is_found = np.isfinite(tally.pool.loss)
    return Result(
        best_chain=tally.pool.chains[0],
        best_loss=float(tally.pool.loss[0]),
        curve=Curve(
            np.asarray(steps.layer_calls)[is_counted, i], np.asarray(steps.best_loss)[is_counted, i]
        ),
        finalists=tally.pool.chains[is_found],
        finalist_losses=tally.pool.loss[is_found],
        layer_calls=int(tally.layer_calls),
        num_chains=int(tally.num_chains),
        num_nonfinite=int(tally.num_nonfinite),
    )
