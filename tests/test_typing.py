"""Another project's type checker sees jchain's types."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "jchain"
# Each marked line misuses jchain once.
USES = """
import jax
import jchain as jc

data = jc.data.load("digits", seed=0)
layer, head = jc.layers.ResidualMLP(64), jc.layers.DenseHead(10)
bank = jc.train.routed(jax.random.key(0), data.train, layer=layer, head=head)
problem = jc.Problem(bank, data.search, max_layers=4)
result = jc.run(jax.random.key(1), jc.LocalSearch(), problem, budget=1_000)
loss: float = result.best_loss
jc.evaluate(problem, result.finalists, memory_limt=1)  # misuse
jc.Problem(bank, data.search, max_layers="four")  # misuse
costs = jc.token_costs(bank, "params")
limited = jc.Problem(bank, data.search, 4, layer_cost=0.1, token_costs=costs, max_cost=9)
jc.Problem(bank, data.search, 4, layer_cost="free")  # misuse
jc.run(jax.random.key(1), jc.LocalSearch(num_chain=4), problem, budget=1_000)  # misuse
jc.train.random(jax.random.key(0), data.train, layer=layer, head=head, is_routed=1)  # misuse
name: str = result.curve.best_loss  # misuse
"""
MISUSES = {i for i, line in enumerate(USES.splitlines(), 1) if line.endswith("# misuse")}


def find_lines(output):
    """Find the line numbers of uses.py that a checker complains about."""
    rows = [line for line in output.splitlines() if "uses.py:" in line and "error" in line]
    return {int(row.split("uses.py:")[1].split(":")[0]) for row in rows}


def test_the_package_says_that_it_is_typed():
    assert (PACKAGE / "py.typed").exists()


@pytest.mark.parametrize("checker", [pytest.param("mypy", marks=pytest.mark.slow), "pyright"])
def test_type_checker_reports_exactly_the_misuses(checker, tmp_path, monkeypatch):
    program = shutil.which(checker, path=str(Path(sys.executable).parent))
    if program is None:
        pytest.skip(f"{checker} is not installed")
    (tmp_path / "uses.py").write_text(USES)
    options = {
        "mypy": ["--python-executable", sys.executable, "--no-incremental"],
        "pyright": ["--pythonpath", sys.executable],
    }
    monkeypatch.setenv("MYPYPATH", "")
    command = [program, *options[checker], "uses.py"]
    out = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True).stdout
    assert find_lines(out) == MISUSES, out
