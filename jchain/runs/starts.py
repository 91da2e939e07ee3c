"""Chains that are scored before the first step of a run, at which the search can begin."""

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from jchain import chain as chain_lib
from jchain._typing import Array, Float, Int
from jchain.chain import ChainsLike
from jchain.engine.control_flow import vmap_unless_one
from jchain.engine.evaluation import Evaluation, evaluate
from jchain.problem import Problem
from jchain.runs.front import merge_front
from jchain.runs.rescoring import get_seen_problem
from jchain.runs.result import RunState, Start, StopRule
from jchain.search.pool import merge
from jchain.search.protocol import Search, Startable


def list_starts(
    problem: Problem, starts: ChainsLike | Literal["parents"] | None
) -> Int[np.ndarray, "C L"]:
    """List the chains to score before the first step of a run.

    Args:
      problem: the problem to search.
      starts: as for `run`.

    Raises:
      ValueError: if a start is not a chain of the problem.
    """
    space, num_slots = problem.space, problem.max_layers + 1
    if isinstance(starts, str):
        if starts != "parents":
            raise ValueError(f'expected starts to be chains, "parents", or None, got {starts!r}')
        lengths = range(space.min_layers + 1, num_slots + 1)
        starts = [parent for parent in problem.bank.parents if len(parent) in lengths]
        if starts and problem.max_cost is not None:
            rows = chain_lib.pad(starts, space.max_layers)
            is_over = problem.exceeds_limit(problem.chain_cost(jnp.asarray(rows)))
            starts = [parent for parent, over in zip(starts, is_over, strict=True) if not over]
    if starts is None or (isinstance(starts, list | tuple) and len(starts) == 0):
        return np.zeros((0, num_slots), np.int32)
    rows = space.validate(starts)
    if len(rows) == 0:
        return rows
    if rows.ndim != 2:
        raise ValueError(f"expected starts of shape [C, {num_slots}], got {list(rows.shape)}")
    if (shortest := int((rows >= 0).sum(axis=1).min()) - 1) < space.min_layers:
        raise ValueError(
            f"expected starts of at least {space.min_layers} layers, got one of {shortest}"
        )
    return rows


def begin_at(
    runs: RunState,
    search: Search,
    problem: Problem,
    chains: Int[np.ndarray, "C L"],
    stop: StopRule,
) -> tuple[RunState, Start]:
    """Score chains once, charge them to every run, and let the search begin at them.

    Args:
      runs: the runs, from `init_runs`.
      search: the search.
      problem: the problem to search.
      chains: the starts, `[C, L]`.
      stop: the rule that ends each run.
    """
    problem = problem.without_names()
    out = evaluate(problem, chains)
    seen = get_seen_problem(search, problem)
    seen_loss = out.loss if seen is problem else evaluate(seen, chains).loss
    runs = _begin_at(runs, search, seen, problem.put(chains), out, seen_loss, stop)
    loss = np.asarray(out.loss)
    return runs, Start(int(out.layer_calls), float(loss.min()), loss.tolist())


@jax.jit
def _begin_at(
    runs: RunState,
    search: Search,
    problem: Problem,
    chains: Int[Array, "C L"],
    out: Evaluation,
    seen_loss: Float[Array, "C"],
    stop: StopRule,
) -> RunState:
    def begin_one(run: RunState) -> RunState:
        key, state, stats = run
        if isinstance(search, Startable):
            key, start_key = jax.random.split(key)
            started = search.start(start_key, state, problem, chains, seen_loss)
            state = jax.tree.map(lambda new, old: new.astype(old.dtype), started, state)
        pool = merge(stats.pool, chains, out.loss)
        stats = stats._replace(
            pool=pool,
            layer_calls=stats.layer_calls + out.layer_calls.astype(jnp.int32),
            num_scored=stats.num_scored + len(chains),
            num_nonfinite=stats.num_nonfinite + out.num_nonfinite.astype(jnp.int32),
            is_over=pool.loss[0] <= stop.target_loss,
            front=merge_front(stats.front, problem, chains, out.loss),
        )
        return RunState(key, state, stats)

    return vmap_unless_one(begin_one, runs)
