"""The package has one folder per family, imports point one way, and nothing is too long."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "jchain"
MODULES = sorted(PACKAGE.rglob("*.py"))
MAX_TOP_LEVEL_MODULES = 18
MAX_MODULE_LINES = 450
MAX_FUNCTION_LINES = 60
MAX_ANY = 150
# Each family may import the families before it. `env` and `align` are top-level modules that use
# the engine.
IMPORT_ORDER = [
    ("_typing", "pytree", "arguments"),
    ("modules",),
    ("losses",),
    ("invertible", "layers"),
    ("files", "chain", "groups", "tokens", "cost_limits", "stages"),
    ("merging",),
    ("bank",),
    ("datasets",),
    ("align", "images", "data"),
    ("training_loop",),
    ("train", "problem"),
    ("engine",),
    ("env",),
    ("gradient",),
    ("inverse",),
    ("agent",),
    ("search",),
    ("runs",),
    ("plot",),
    ("updates",),
    ("tasks",),
    ("chainbench",),
    ("hub",),
    ("cli",),
    ("__main__",),
]
LEVEL = {name: level for level, names in enumerate(IMPORT_ORDER) for name in names}
HEAVY = ("rlax", "mctx", "tensorflow_datasets", "matplotlib", "transformers", "gguf")
LATE = ("jchain.cli.pipeline", "jchain.cli.parser", "jchain.hub.loading")
EVALUATE = """
import sys, jax, jchain as jc
data = jc.data.load("wine")
layer, head = jc.layers.Dense(13), jc.layers.DenseHead(3)
params = [m.init(jax.random.key(0), data.search.x)["params"] for m in (layer, head)]
bank = jc.Bank.stack(layer, params[:1], head, params[1:])
chains, out = jc.evaluate_all(jc.Problem(bank, data.search, max_layers=1))
assert chains.shape == (2, 2) and out.loss.shape == (2,)
print([name for name in BANNED if name in sys.modules])
"""


def run_code(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)


def test_import_and_evaluation_load_nothing_heavy():
    assert run_code(f"BANNED = {HEAVY + LATE!r}" + EVALUATE).stdout.strip() == "[]"


def test_evaluation_runs_with_only_jax_flax_optax_numpy_and_scikit_learn():
    banned = ("rlax", "mctx", "distrax", "matplotlib", "safetensors", "jaxtyping", "beartype")
    banned += ("tensorflow_datasets", "psutil")
    block = f"import sys\nBANNED = {banned!r}\nsys.modules.update(dict.fromkeys(BANNED))\n"
    # A name that is None in sys.modules cannot be imported.
    code = block + EVALUATE.replace("in sys.modules]", "in sys.modules and sys.modules[name]]")
    assert run_code(code).stdout.strip() == "[]"


def name_module(path):
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


NAMES = {name_module(path) for path in MODULES}


def find_imports(path):
    """Yield the modules of the package that a module imports, also in functions and type checks."""
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.ImportFrom) or not (node.module or "").startswith("jchain"):
            continue
        module = node.module.removeprefix("jchain").removeprefix(".")
        for alias in node.names:
            inner = f"{module}.{alias.name}".removeprefix(".")
            yield inner if inner in NAMES else module


def find_level(name):
    return LEVEL[name.split(".")[0]]


@pytest.mark.parametrize("path", MODULES, ids=name_module)
def test_imports_point_down(path):
    name = name_module(path)
    for imported in find_imports(path):
        if name and imported.split(".")[0] != name.split(".")[0]:
            assert find_level(imported) <= find_level(name), f"{name} imports {imported}"


def test_no_import_cycles():
    graph = {name_module(path): set(find_imports(path)) for path in MODULES if name_module(path)}
    done, path = set(), []

    def visit(name):
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name in done:
            return
        path.append(name)
        for imported in graph.get(name, ()):
            visit(imported)
        path.pop()
        done.add(name)

    for name in graph:
        visit(name)


def test_searches_do_not_import_each_other():
    shared = {"descent", "moves", "pool", "prefixes", "protocol"}
    for path in (PACKAGE / "search").glob("*.py"):
        if path.stem != "__init__":
            imported = {name for name in find_imports(path) if name.startswith("search.")}
            others = imported - {f"search.{name}" for name in shared}
            assert not others, f"{path.name} imports {others}"


def test_there_are_few_top_level_modules():
    assert len(list(PACKAGE.glob("*.py"))) <= MAX_TOP_LEVEL_MODULES


@pytest.mark.parametrize("path", MODULES, ids=name_module)
def test_modules_and_functions_are_short(path):
    source = path.read_text()
    assert source.count("\n") <= MAX_MODULE_LINES
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            docstring = ast.get_docstring(node) or ""
            num_lines = node.end_lineno - node.lineno - docstring.count("\n")
            assert num_lines <= MAX_FUNCTION_LINES, f"{node.name}: {num_lines} lines"


def test_any_is_rare():
    used = sum(
        isinstance(node, ast.Name) and node.id == "Any"
        for path in MODULES
        for node in ast.walk(ast.parse(path.read_text()))
    )
    assert used <= MAX_ANY


def test_tests_mirror_the_folders():
    tests = {
        path.relative_to(Path(__file__).parent) for path in Path(__file__).parent.rglob("test_*.py")
    }
    families = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    tests = {path for path in tests if path.parts[0] != "fuzz"}
    assert {path.parts[0] for path in tests if len(path.parts) > 1} == families
