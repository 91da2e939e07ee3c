"""What experiments share: where ChainBench lies, how searches run on it, and keeping what was computed."""

import ast
import contextlib
import dataclasses
import hashlib
import inspect
import json
import multiprocessing
import os
import platform
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy.stats import spearmanr

import jchain as jc
from jchain.files import read_arrays, write_arrays, write_atomically, write_json

CACHE = Path.home() / ".cache" / "jchain"
CHAINBENCH = CACHE / "chainbench"


def describe_machine() -> dict[str, Any]:
    return {
        "device": f"{jax.devices()[0].device_kind}, {platform.machine()}",
        "versions": {
            "python": platform.python_version(),
            "jax": jax.__version__,
            "jchain": jc.__version__,
        },
    }


def write_results(
    out: Path,
    name: str,
    result: dict[str, Any],
    table: str,
    draw: Callable[[str], None] | None = None,
) -> None:
    """What an experiment found, as `name`.json, .md and, where there is a figure, .png."""
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / f"{name}.json", result)
    write_atomically(out / f"{name}.md", lambda path: Path(path).write_text(table + "\n"))
    if draw is not None:
        write_atomically(out / f"{name}.png", draw)


def zero_shot(critic: jc.Critic | None) -> jc.CriticSearch:
    """A search that learns nothing of the bank it searches; without a critic it ranks by the loss of the best head."""
    return jc.CriticSearch(critic, ridge=jnp.inf, epsilon=0.0)


def is_deterministic(search: Any) -> bool:
    """Whether one run says it all."""
    return isinstance(search, jc.BeamSearch) or (
        isinstance(search, jc.CriticSearch) and search.epsilon == 0.0
    )


def look_up(search: Any) -> Any:
    """The same search for problems whose losses are looked up."""
    if isinstance(search, jc.CriticSearch) and search.observe is jc.CriticSearch().observe:
        return dataclasses.replace(search, observe=jc.chainbench.tabular.observe)
    if isinstance(search, jc.ActorCritic):
        return dataclasses.replace(search, entry_features=jc.chainbench.tabular.entry_features)
    return search


def try_swaps(problem: jc.Problem, chain: np.ndarray) -> np.ndarray:
    """The true change of loss of each layer at each slot, `[D, N]`: 0 of the one that is there, nan behind the chain's end."""
    shape = problem.max_layers, problem.bank.num_layers
    slots, tokens = (indices.reshape(-1) for indices in np.indices(shape))
    is_there = slots < (chain >= 0).sum() - 1
    # The chain itself where there is no swap: one shape for chains of all lengths, so one program.
    swaps = np.repeat(chain[None], 1 + slots.size, axis=0)
    swaps[1:][is_there, slots[is_there]] = tokens[is_there]
    loss = np.asarray(jc.evaluate(problem, swaps).loss)
    return np.where(is_there, loss[1:] - loss[0], np.nan).reshape(shape)


def correlate(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's rank correlation; 0 where one of them is constant."""
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return 0.0
    result: Any = spearmanr(a, b)
    return float(result.statistic)


def make_pool(workers: int) -> ProcessPoolExecutor:
    context = multiprocessing.get_context("spawn")
    if workers == 1:  # it may have all cores
        return ProcessPoolExecutor(1, mp_context=context)
    return ProcessPoolExecutor(
        workers, mp_context=context, initializer=_pin, initargs=(context.Value("i", 0),)
    )


def _pin(counter: Any) -> None:
    """A core for each process, where the system allows it: their threads would only wait for each other."""
    with counter.get_lock():
        place, counter.value = counter.value, counter.value + 1
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[place % len(cores)]})


def keep(
    code: Sequence[Callable[..., Any]],
    name: str,
    inputs: Any,
    make: Callable[[], Any],
    *,
    uses: Sequence[Any] = (),
) -> dict[str, np.ndarray]:
    """The arrays that `make` returns; from a file when they were made before, so that an interrupted run goes on.

    They are made again when their inputs change, this module, one of these functions, a constant (numbers, strings, lists of
    them) that they name, a library, or a module of jchain that the functions or objects reach: those that they name, and all
    that these import.

    Args:
      code: the functions of the experiment that make them.
      name: of the file.
      inputs: what the arrays depend on beside: plain data or file contents.
      make: makes them.
      uses: objects of jchain that the functions are given.
    """
    path = CACHE / "experiments" / f"{name}-{_digest(code, inputs, uses)}.safetensors"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_arrays(path, {}, make())
    return {key: np.asarray(array) for key, array in read_arrays(path)[1].items()}


def _digest(code: Sequence[Callable[..., Any]], inputs: Any, uses: Sequence[Any]) -> str:
    digest = hashlib.sha256(
        repr((inputs, [metadata.version(name) for name in _LIBRARIES])).encode()
    )
    modules = {type(use).__module__ for use in uses}
    for function in code:
        source = inspect.getsource(function)
        nodes = [*ast.walk(ast.parse(source))]
        names = sorted({node.id for node in nodes if isinstance(node, ast.Name)})
        digest.update(repr((_strip(source), _find_constants(function, names))).encode())
        modules |= {_find_module(node) for node in nodes if isinstance(node, ast.Attribute)}
    for path in (Path(__file__), *(_PACKAGE / name for name in _add_imports(modules))):
        digest.update(_strip(path.read_text()).encode())
    return digest.hexdigest()[:16]


_PACKAGE = Path(jc.__file__).parent
_LIBRARIES = ("jax", "flax", "optax", "rlax", "mctx", "numpy", "scipy", "scikit-learn")


def _find_constants(function: Callable[..., Any], names: Sequence[str]) -> dict[str, str]:
    """What these names stand for where the function is written, as far as it is plain data."""
    scope, found = vars(sys.modules[function.__module__]), {}
    for name in names:
        # Functions and objects are no JSON.
        with contextlib.suppress(KeyError, TypeError):
            found[name] = json.dumps(scope[name])
    return found


def _find_module(node: ast.expr) -> str:
    """The module of what stands for `jc.name.name`; empty where it is not jchain's."""
    names = []
    while isinstance(node, ast.Attribute):
        names.append(node.attr)
        node = node.value
    if not isinstance(node, ast.Name) or node.id != "jc":
        return ""
    found: Any = jc
    for name in reversed(names):
        found = getattr(found, name, found)
    return found.__name__ if inspect.ismodule(found) else str(getattr(found, "__module__", ""))


def _add_imports(modules: set[str]) -> list[str]:
    """Files of the modules of jchain among these, and of all that they import."""
    todo, found = sorted(modules), set()
    while todo:
        name = todo.pop()
        path = _PACKAGE / f"{name.removeprefix('jchain.').replace('.', '/')}.py"
        if name in found or not name.startswith("jchain.") or not path.exists():
            continue
        found.add(name)
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module is not None:
                todo += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return sorted(f"{name.removeprefix('jchain.').replace('.', '/')}.py" for name in found)


def _strip(source: str) -> str:
    """Code without comments and docstrings, which change no result."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
            and ast.get_docstring(node) is not None
        ):
            node.body = node.body[1:]
    return ast.dump(tree)
