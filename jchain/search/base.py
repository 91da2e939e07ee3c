"""What every search is, and the one loop that runs it."""

from functools import cache
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jchain._typing import Array, Float, Int, Key
from jchain.chain import PADDING
from jchain.engine import compiler_options, find_backend
from jchain.problem import Problem
from jchain.progress import Progress

# A search that charges nothing so often in a row has nothing left to ask.
_MAX_FREE_STEPS = 100


class Info(NamedTuple):
    """What one step did."""

    chains: Int[Array, "P L"]  # [P, L], the chains it scored
    loss: Float[Array, "P"]  # [P], +inf where it was not finite
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


class Curve(NamedTuple):
    """Best loss against cost, after each step."""

    layer_calls: Int[np.ndarray, "T"]
    best_loss: Float[np.ndarray, "T"]


class Result(NamedTuple):
    """What a run found on its problem."""

    best_chain: Int[np.ndarray, "L"]  # all -1 when no chain had a finite loss
    best_loss: float
    curve: Curve
    finalists: Int[np.ndarray, "Q L"]  # the best different chains, best first, to be re-ranked on `select`
    finalist_losses: Float[np.ndarray, "Q"]
    layer_calls: int
    num_chains: int  # scored, repeats included
    num_nonfinite: int  # of them, with a loss that was not finite


class _Pool(NamedTuple):
    """The best different chains so far; +inf marks an empty place."""

    chains: Int[Array, "Q L"]
    loss: Float[Array, "Q"]


def run(
    key: Key[Array, ""],
    search: Search,
    problem: Problem,
    *,
    budget: int,
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
      problem: what to minimise over.
      budget: layer calls.
      num_finalists: how many different chains to keep for re-ranking.
      progress: show a live line with layer calls, best loss and time left.
      mesh: devices over which the chains of each step are spread (see `jchain.evaluate`). Where they belong to several
        processes, all must make this call with equal arguments, and all get the result.

    Raises:
      ValueError: the search is not a registered pytree, or the budget is smaller than one step.
    """
    if budget < 1 or num_finalists < 1:
        raise ValueError(f"expected a budget and num_finalists of at least 1, got {budget} and {num_finalists}")
    if jax.tree.leaves(search) == [search]:
        raise ValueError(f"expected a search registered as a pytree (jchain.pytree), got {type(search).__name__}")
    problem = problem if mesh is None else problem.on(mesh)
    key, init_key = jax.random.split(problem.put(key))
    state = _init(init_key, search, problem)
    empty = _Pool(
        jnp.full((num_finalists, problem.max_layers + 1), PADDING, jnp.int32), jnp.full(num_finalists, jnp.inf)
    )
    pool = problem.put(empty)
    step = _compile_step(find_backend(problem))
    cost = layer_calls = num_chains = num_nonfinite = num_free = 0
    curve = []
    with Progress(budget, is_shown=progress) as line:
        while layer_calls < budget and num_free < _MAX_FREE_STEPS:
            key, step_key = jax.random.split(key)
            state, next_pool, info = step(step_key, search, state, problem, pool)
            cost = int(info.layer_calls)
            if layer_calls + cost > budget:
                break
            pool, layer_calls = next_pool, layer_calls + cost
            num_free = 0 if cost else num_free + 1
            loss = np.asarray(info.loss)
            num_chains += loss.size
            num_nonfinite += int(np.sum(~np.isfinite(loss)))
            curve.append((layer_calls, float(pool.loss[0])))
            line.update(layer_calls, float(pool.loss[0]))
    if not curve:
        raise ValueError(f"expected a budget of at least one step, which costs {cost} layer calls here, got {budget}")
    calls, losses = zip(*curve, strict=True)
    is_found = np.isfinite(pool.loss)
    return Result(
        best_chain=np.asarray(pool.chains[0]),
        best_loss=float(pool.loss[0]),
        curve=Curve(np.array(calls), np.array(losses)),
        finalists=np.asarray(pool.chains)[is_found],
        finalist_losses=np.asarray(pool.loss)[is_found],
        layer_calls=layer_calls,
        num_chains=num_chains,
        num_nonfinite=num_nonfinite,
    )


@jax.jit
def _init(key: Array, search: Search, problem: Problem) -> Any:
    return search.init(key, problem)


@cache
def _compile_step(backend: str) -> Any:
    return jax.jit(_step, compiler_options=compiler_options(backend))


def _step(key: Array, search: Search, state: Any, problem: Problem, pool: _Pool) -> tuple[Any, _Pool, Info]:
    state, info = search.step(key, state, problem)
    return state, _merge(pool, info), info


def _merge(pool: _Pool, info: Info) -> _Pool:
    """The best different chains of both."""
    chains = jnp.concatenate([pool.chains, info.chains.astype(jnp.int32)])
    loss = jnp.concatenate([pool.loss, info.loss.astype(pool.loss.dtype)])
    loss = jnp.where(jnp.isfinite(loss), loss, jnp.inf)
    *columns, loss = jax.lax.sort([*chains.T, loss], num_keys=chains.shape[1] + 1)
    chains = jnp.stack(columns, axis=1)
    is_repeat = jnp.append(False, jnp.all(chains[1:] == chains[:-1], axis=1))
    loss = jnp.where(is_repeat, jnp.inf, loss)
    best = jnp.argsort(loss)[: pool.loss.shape[0]]
    return _Pool(chains[best], loss[best])
