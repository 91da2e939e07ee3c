"""A check that a search keeps the contract of `jchain.search.protocol`."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jchain._typing import Array, Key, PyTree
from jchain.arguments import checked
from jchain.engine.evaluation import evaluate
from jchain.problem import Problem
from jchain.runs.driver import check_arguments
from jchain.search.protocol import Info, Search, charges_fractions, check_step

# Two ways of computing the same value may round differently.
_RTOL, _ATOL = 2e-3, 1e-5


class _Run(NamedTuple):
    """One run of a search."""

    states: list[PyTree]  # before each step, and after the last one
    infos: list[Info]  # of each step


class _Row(NamedTuple):
    """A chain that a step reported as scored."""

    step: int
    tokens: tuple[int, ...]
    loss: float


@checked
def check_search(
    search: Search, problem: Problem, *, key: Key[Array, ""] | None = None, num_steps: int = 3
) -> None:
    """Check that a search keeps its contract on a problem, for the tests of a new search.

    A few steps are run jitted, without `jit`, vmapped over two keys, and again with the same key.
    The check then compares these runs, evaluates all chains that they reported, and computes a
    lower bound on their cost. If the search charges fractions of layer calls, chains with a loss of
    `+inf` are left out of both.

    Args:
      search: the search to check.
      problem: the problem to run it on. A small one is enough.
      key: the PRNG key; `jax.random.key(0)` if None.
      num_steps: the number of steps per run.

    Raises:
      ValueError: if the search is not a registered pytree or does not accept the problem, if `step`
        does not return a state and a `jc.Info` with arrays of the right shapes, or with a line for
        each broken promise: the state changes its structure, shapes, or dtypes; jitted,
        eager, vmapped, or repeated runs differ; a row is not a chain of the problem's space; a loss
        is not its chain's loss; or a step costs less than its chains do.
    """
    check_arguments(search, problem, 1, 1)
    problem = problem.without_names()
    keys = jax.random.split(jax.random.key(0) if key is None else key, 2)

    def init(key: Array) -> PyTree:
        return search.init(key, problem)

    def step(key: Array, state: PyTree) -> tuple[PyTree, Info]:
        return check_step(search, search.step(key, state, problem), problem)

    # [T + 1, 2]: for each of two runs, the key of the first state and of each step.
    all_keys = jax.vmap(lambda key: jax.random.split(key, num_steps + 1), out_axes=1)(keys)
    own_keys, jitted_init, jitted_step = all_keys[:, 0], jax.jit(init), jax.jit(step)
    jitted = _take_steps(own_keys, jitted_init, jitted_step)
    may_stop = charges_fractions(search)
    findings = [
        *_check_states(jitted.states),
        *_check_rows(jitted.infos, problem, may_stop=may_stop),
    ]
    others = {
        "without jit": _take_steps(own_keys, init, step),
        "repeated with the same key": _take_steps(own_keys, jitted_init, jitted_step),
        "under vmap": _take_steps(
            all_keys,
            jax.jit(jax.vmap(init)),
            jax.jit(jax.vmap(step)),
            lambda tree: jax.tree.map(lambda leaf: leaf[0], tree),
        ),
    }
    for name, other in others.items():
        findings += _compare(jitted.infos, other.infos, name)
    if findings:
        lines = "".join(f"\n- {finding}" for finding in findings)
        raise ValueError(f"{type(search).__name__} breaks the contract of a search:{lines}")


def _take_steps(
    keys: Array,
    init: Callable[[Array], PyTree],
    step: Callable[[Array, PyTree], tuple[PyTree, Info]],
    read_fn: Callable[[PyTree], PyTree] = lambda tree: tree,
) -> _Run:
    """Run a search; `read_fn` picks one run out of states and infos."""
    state = init(keys[0])
    run = _Run([read_fn(state)], [])
    for key in keys[1:]:
        state, info = step(key, state)
        run.states.append(read_fn(state))
        run.infos.append(jax.tree.map(np.asarray, read_fn(info)))
    return run


def _check_states(states: list[PyTree]) -> list[str]:
    # Leaves are compared, because some nodes, such as groups of layers, equal only themselves.
    structures = [jax.tree.structure(state) for state in states]
    shapes = [[(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(state)] for state in states]
    for t in range(1, len(states)):
        if structures[t] != structures[0]:
            return [f"step {t - 1} changes the structure of the state"]
        if shapes[t] != shapes[0]:
            return [f"step {t - 1} changes the shapes or dtypes of the state"]
    return []


def _check_rows(infos: list[Info], problem: Problem, *, may_stop: bool) -> list[str]:
    """Check what the steps reported: chains, losses, and costs.

    With `may_stop`, a loss of `+inf` may mean that the chain was scored on some examples only.
    """
    findings, rows, seen = [], [], set()
    for t, info in enumerate(infos):
        is_chain = np.asarray(problem.space.contains(jnp.asarray(info.chains)))
        is_invalid = ~is_chain & (info.chains != -1).any(axis=1)
        if is_invalid.any():
            findings.append(
                f"step {t} reports {info.chains[is_invalid][0].tolist()}, which is not a chain of "
                f"{problem.min_layers} to {problem.max_layers} layers and a head"
            )
        is_scored = is_chain & np.isfinite(info.loss) if may_stop else is_chain
        chains = [tuple(int(token) for token in row) for row in info.chains[is_scored]]
        rows += [_Row(t, *pair) for pair in zip(chains, info.loss[is_scored], strict=True)]
        prefixes = {
            tokens[:length]
            for tokens in chains
            for length in range(1, sum(0 <= t < problem.bank.num_layers for t in tokens) + 1)
            if _ends_with_a_head(tokens[:length], problem)
        }
        least = len(prefixes - seen)
        seen |= prefixes
        if info.layer_calls < least - _ATOL:
            findings.append(
                f"step {t} costs {info.layer_calls.item():.10g} layer calls, but the prefixes of "
                f"its chains that no step had scored before cost at least {least}"
            )
    return findings + _check_losses(rows, problem)


def _ends_with_a_head(prefix: tuple[int, ...], problem: Problem) -> bool:
    """Return whether a head may follow a prefix.

    The layers of any other prefix may have been paid for by a step that could not report it.
    """
    if len(prefix) < problem.min_layers:
        return False
    stages = problem.space.stages
    if stages is None:
        return True
    written = stages.layer_stages[prefix[-1]][1]
    return any(stages.fits(head, written) for head in stages.head_stages)


def _check_losses(rows: list[_Row], problem: Problem) -> list[str]:
    if not rows:
        return ["no step reports a chain"]
    true = np.asarray(evaluate(problem, np.array([row.tokens for row in rows])).loss)
    found = np.array([row.loss for row in rows])
    is_wrong = ~np.isclose(found, true, rtol=_RTOL, atol=_ATOL)
    if not is_wrong.any():
        return []
    place = int(np.argmax(is_wrong))
    return [
        f"step {rows[place].step} reports a loss of {found[place]:.6g} for {[*rows[place].tokens]},"
        f" but its loss is {true[place]:.6g}"
    ]


def _compare(infos: list[Info], others: list[Info], name: str) -> list[str]:
    for t, (info, again) in enumerate(zip(infos, others, strict=True)):
        for field in Info._fields:
            value, expected = getattr(again, field), getattr(info, field)
            is_same = value.shape == expected.shape and np.allclose(
                value, expected, rtol=_RTOL, atol=_ATOL, equal_nan=True
            )
            if not is_same:
                return [f"{name}, step {t} returns a different {field}"]
    return []
