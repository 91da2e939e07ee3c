"""Imports: light at the top, and one way."""

import ast
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "jchain"
# Each module may import those before it.
ORDER = [
    "_typing", "pytree", "invertible", "layers", "files", "chain", "groups", "bank", "align", "images", "data", "train", "problem", "trie", "backend", "calls", "engine", "kernels", "evaluate", "memo", "env", "descent", "linearize", "inverse", "halves", "match", "meet", "joint", "weight_space", "gradient", "ideal", "tails", "advice", "trends", "layer_report", "features", "rewards", "encoding", "glimpse", "replay", "lookup", "critic", "pretrain",
    "progress", "search.base", "search", "hub.config", "hub.modules", "hub.wrapping", "hub.architecture", "hub.gpt2", "hub.llama", "hub.gpt_neox", "hub.vit", "hub.checkpoint", "hub.places", "hub.reading", "hub.loading", "hub.datasets", "hub.recipes", "hub.exporting", "hub.jobs", "hub", "tune", "nursery", "updates", "plot", "stats", "pipeline", "report", "chainbench", "distributed", "options", "__main__",
]  # fmt: skip
HEAVY = ("rlax", "mctx", "tensorflow_datasets", "matplotlib", "transformers")
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


def _run(code, **kwargs):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, **kwargs).stdout


def test_import_and_evaluation_load_nothing_heavy():
    assert _run(f"BANNED = {HEAVY!r}" + EVALUATE).strip() == "[]"


def test_evaluation_runs_with_only_jax_flax_optax_numpy_and_scikit_learn():
    others = ("rlax", "mctx", "distrax", "matplotlib", "safetensors", "jaxtyping", "beartype", "tensorflow_datasets")
    block = f"import sys\nBANNED = {others!r}\nsys.modules.update(dict.fromkeys(BANNED))\n"
    # A name that is None in sys.modules cannot be imported.
    assert _run(block + EVALUATE.replace("in sys.modules]", "in sys.modules and sys.modules[name]]")).strip() == "[]"


def _rank(name):
    best = [i for i, known in enumerate(ORDER) if name == known or name.startswith(known + ".")]
    assert best, f"{name} has no place in ORDER"
    return best[0] if name in ORDER else max(best)


def _imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "jchain":
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("jchain."):
            yield node.module.removeprefix("jchain.")


def test_modules_import_only_modules_before_them():
    for path in PACKAGE.rglob("*.py"):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        if name in ("__init__", "search.__init__", "hub.__init__"):
            continue
        for imported in _imports(path):
            assert _rank(imported) < _rank(name), f"{name} imports {imported}"


def test_searches_do_not_import_each_other():
    for path in (PACKAGE / "search").glob("*.py"):
        imported = {name for name in _imports(path) if name.startswith("search.")}
        assert imported <= {"search.base"}, f"{path.name} imports {imported}"
