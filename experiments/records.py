"""Helpers that the experiments share: paths, search variants, and the storage of finished parts."""

import argparse
import ast
import dataclasses
import hashlib
import inspect
import multiprocessing
import os
import platform
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from importlib import import_module, metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy.stats import spearmanr

import jchain as jc
from jchain import files

CACHE = Path.home() / ".cache" / "jchain"
CHAINBENCH = CACHE / "chainbench"
RESULTS = Path(__file__).parent / "results"
_PACKAGE = Path(jc.__file__).resolve().parent
_LIBRARIES = ("jax", "flax", "optax", "rlax", "mctx", "numpy", "scipy", "scikit-learn")
# Modules that a module imports by name at run time, which no import statement shows.
_IMPORTED_BY_NAME = {"jchain.hub.families": files.FAMILIES}


def make_parser(
    doc: str | None, *, quick: str = "", has_folder: bool = False, has_workers: bool = False
) -> argparse.ArgumentParser:
    """Return a parser with the options that scripts share.

    Args:
      doc: docstring of the script.
      quick: help text of `--quick`; empty to leave the option out.
      has_folder: add `--folder`, the folder of ChainBench.
      has_workers: add `--workers`, the number of processes.
    """
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    if quick:
        parser.add_argument("--quick", action="store_true", help=quick)
    if has_folder:
        text = "folder of ChainBench (default: %(default)s)"
        parser.add_argument("--folder", type=Path, default=CHAINBENCH, help=text)
    if has_workers:
        text = "number of processes (default: %(default)s)"
        parser.add_argument("--workers", type=int, default=os.cpu_count(), help=text)
    return parser


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
    """Write `name`.json, the table as `name`.md and, if there is a figure, `name`.png."""
    out.mkdir(parents=True, exist_ok=True)
    files.write_json(out / f"{name}.json", result)
    files.write_atomically(out / f"{name}.md", lambda path: Path(path).write_text(table + "\n"))
    if draw is not None:
        files.write_atomically(out / f"{name}.png", draw)


def describe_search(search: Any) -> str:
    """Return the name and the fields of a search."""
    fields = [
        f"{f.name}={describe_value(getattr(search, f.name))}" for f in dataclasses.fields(search)
    ]
    return f"{type(search).__name__}({', '.join(fields)})"


def describe_value(value: Any) -> str:
    """Describe a value in one line.

    Functions are described by name, because their addresses change between runs, and critics
    without their weights.
    """
    if isinstance(value, jc.Critic):
        return "Critic()"
    return getattr(value, "__name__", None) or " ".join(repr(value).split())


def make_zero_shot_search(critic: jc.Critic | None) -> jc.CriticSearch:
    """Return a search that does not learn on its bank.

    Without a critic, it ranks prefixes by the loss of the best head.
    """
    return jc.CriticSearch(critic, ridge=jnp.inf, epsilon=0.0)


def use_tables(search: Any) -> Any:
    """Return the search for problems whose losses and observations come from tables.

    A field `observe` that has the library's default, and any field `entry_features`, are replaced
    by those of `jchain.chainbench.tabular`.
    """
    changes = {}
    for field in dataclasses.fields(search):
        value = getattr(search, field.name)
        if field.name == "observe" and value is jc.agent.observations.observe:
            changes["observe"] = jc.chainbench.tabular.observe
        elif field.name == "entry_features":
            changes["entry_features"] = jc.chainbench.tabular.entry_features
    return dataclasses.replace(search, **changes) if changes else search


def evaluate_swaps(problem: jc.Problem, chain: np.ndarray) -> np.ndarray:
    """Return the true change in loss for each layer at each slot, `[D, N]`.

    The change is 0 for the layer that the slot already holds, and nan for slots after the end of
    the chain.
    """
    shape = problem.max_layers, problem.bank.num_layers
    slots, tokens = (indices.reshape(-1) for indices in np.indices(shape))
    is_filled = slots < (chain >= 0).sum() - 1
    # Empty slots repeat the chain itself: chains of all lengths share one shape and one program.
    swaps = np.repeat(chain[None], 1 + slots.size, axis=0)
    swaps[1:][is_filled, slots[is_filled]] = tokens[is_filled]
    loss = np.asarray(jc.evaluate(problem, swaps).loss)
    return np.where(is_filled, loss[1:] - loss[0], np.nan).reshape(shape)


def correlate(a: np.ndarray, b: np.ndarray) -> float:
    """Compute Spearman's rank correlation; 0 if one of the arrays is constant."""
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return 0.0
    result: Any = spearmanr(a, b)
    return float(result.statistic)


def make_pool(workers: int) -> ProcessPoolExecutor:
    context = multiprocessing.get_context("spawn")
    if workers == 1:  # One process may use all cores.
        return ProcessPoolExecutor(1, mp_context=context)
    return ProcessPoolExecutor(
        workers, mp_context=context, initializer=_pin, initargs=(context.Value("i", 0),)
    )


def _pin(counter: Any) -> None:
    """Pin this process to one core.

    Otherwise, the threads of several processes would wait for each other.
    """
    with counter.get_lock():
        place, counter.value = counter.value, counter.value + 1
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[place % len(cores)]})


def keep(
    script: str | Path, name: str, inputs: object, make: Callable[[], Any]
) -> dict[str, np.ndarray]:
    """Return the arrays that `make` computes, from a file if an earlier run computed them.

    The file is stale, and the arrays are computed again, after a change of the inputs, of a
    library's version, or of code that the script can reach. This is the script itself, the
    experiment modules that it imports, the modules of jchain that these name as `jc.name`, and all
    modules that those import. Changes of comments and docstrings do not count.

    Args:
      script: path of the script that calls this, `__file__`.
      name: name of the file.
      inputs: everything else that the arrays depend on, as plain data or file contents.
      make: function that computes the arrays.

    Raises: ValueError: if a script, a module, or a name `jc.name` cannot be found.
    """
    path = CACHE / "experiments" / f"{name}-{_digest(script, inputs)}.safetensors"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_arrays(path, {}, make())
    return {key: np.asarray(array) for key, array in files.read_arrays(path)[1].items()}


def _digest(script: str | Path, inputs: object) -> str:
    versions = [metadata.version(name) for name in _LIBRARIES]
    digest = hashlib.sha256(repr((inputs, versions)).encode())
    for path in _find_files(Path(script).resolve()):
        digest.update(repr((path.name, _parse(path.read_text()).code)).encode())
    return digest.hexdigest()[:16]


class _Source(NamedTuple):
    """A parsed Python file."""

    code: str  # without comments and docstrings
    imports: tuple[tuple[str, str], ...]  # module, and the name imported from it or ""
    chains: tuple[tuple[str, tuple[str, ...]], ...]  # imported object, and attributes of it


@cache
def _parse(source: str) -> _Source:
    tree = ast.parse(source)
    imports, targets = [], {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                imports.append((alias.name, ""))
                top = alias.name.partition(".")[0]
                targets[alias.asname or top] = alias.name if alias.asname else top
        elif isinstance(node, ast.ImportFrom):
            if node.level > 0 or node.module is None:
                raise ValueError(f"expected absolute imports, got {ast.unparse(node)}")
            for alias in node.names:
                imports.append((node.module, alias.name))
                targets[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    chains = [
        (targets[name], attributes) for name, attributes in _find_chains(tree) if name in targets
    ]
    return _Source(_strip(tree), tuple(imports), tuple(chains))


def _find_chains(tree: ast.Module) -> list[tuple[str, tuple[str, ...]]]:
    """Find all `name.a.b` of a file, each at its full length.

    Each is returned as the name and its attributes.
    """
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    inner = {id(node.value) for node in nodes}
    chains = []
    for node in nodes:
        if id(node) in inner:
            continue
        attributes, root = [], node
        while isinstance(root, ast.Attribute):
            attributes.append(root.attr)
            root = root.value
        if isinstance(root, ast.Name):
            chains.append((root.id, tuple(reversed(attributes))))
    return chains


def _strip(tree: ast.Module) -> str:
    """Remove comments and docstrings, which change no result."""
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
            and ast.get_docstring(node) is not None
        ):
            node.body = node.body[1:]
    return ast.dump(tree)


def _find_files(script: Path) -> list[Path]:
    """Find the script and every file of the experiments and of jchain that it reaches."""
    todo, found = [script, Path(__file__).resolve()], set()
    while todo:
        path = todo.pop()
        if path in found:
            continue
        if not path.exists():
            raise ValueError(f"expected a script, got {path}, which does not exist")
        found.add(path)
        try:
            todo += _find_reached(path)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
    return sorted(found)


def _find_reached(path: Path) -> list[Path]:
    """Find the files that a file reaches directly."""
    source, modules, scripts = _parse(path.read_text()), [], []
    for module, name in source.imports:
        if module.partition(".")[0] != "jchain":
            scripts += _find_scripts(module, path.parent)
        elif not _is_package(module):
            modules.append(module)
        elif name and not _is_package(f"{module}.{name}"):
            modules.append(_find_definition(module, name))
    for target, attributes in source.chains:
        if _is_package(target):
            modules.append(_find_module(target, attributes))
    for importer, names in _IMPORTED_BY_NAME.items():
        if path == _find_path(importer):
            modules += names
    return [*scripts, *(_find_path(module) for module in modules if module is not None)]


def _find_scripts(module: str, folder: Path) -> list[Path]:
    """Find the file of an experiment module; return no file for a module of a library."""
    for place in (folder, Path(__file__).resolve().parent):
        if (place / f"{module}.py").exists():
            return [place / f"{module}.py"]
    if find_spec(module.partition(".")[0]) is None:
        raise ValueError(f"expected a module of the experiments or of a library, got {module}")
    return []


def _find_module(package: str, attributes: tuple[str, ...]) -> str | None:
    """Find the module that defines `package.a.b`; None for an attribute like `__version__`."""
    found, module = import_module(package), package
    for name in attributes:
        if not hasattr(found, name):
            raise ValueError(f"expected a name of {package}, got {'.'.join(attributes)}")
        value = getattr(found, name)
        if inspect.ismodule(value):
            module = value.__name__
        elif inspect.ismodule(found):
            module = _find_definition(found.__name__, name)
        found = value
    if module is not None and _is_package(module):
        raise ValueError(f"expected a name inside of the package {module}, got the package")
    return module


def _find_definition(module: str, name: str) -> str | None:
    """Find the module from which a package's `__init__` imports a name."""
    if not _is_package(module):
        return module
    if name.startswith("__"):
        return None
    for source, imported in _parse(_find_path(module).read_text()).imports:
        if imported == name and source != module:
            return _find_definition(source, name)
    return f"{module}.{name}"


def _is_package(module: str) -> bool:
    folders = module.split(".")
    return folders[0] == "jchain" and _PACKAGE.joinpath(*folders[1:], "__init__.py").exists()


def _find_path(module: str) -> Path:
    """Find the file of a module of jchain.

    For a package, this is its `__init__`, which has no code of its own.
    """
    path = _PACKAGE.joinpath(*module.split(".")[1:]).with_suffix(".py")
    if not path.exists():
        path = path.with_suffix("") / "__init__.py"
    if not path.exists():
        raise ValueError(f"expected a module of jchain, got {module}, which has no file")
    return path
