"""What README.md shows is true."""

import re
import subprocess
from pathlib import Path

import jax

import jchain as jc

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
MAX_BYTES = 9 * 1024


def test_it_is_one_page():
    assert len(README.encode()) <= MAX_BYTES


def test_the_example_is_short():
    assert len([line for line in EXAMPLES[0].splitlines() if line.strip()]) <= 15


def test_the_examples_run(capsys):
    scope = {}
    exec(compile(EXAMPLES[0], "README.md", "exec"), scope)
    assert "routed/head" in capsys.readouterr().out
    bank, data = scope["bank"], scope["data"]
    scope |= {"another_bank": bank, "head_params": bank.get_params(12)}
    scope |= {"params_a": bank.get_params(0), "params_b": bank.get_params(1)}
    exec(compile(EXAMPLES[1], "README.md", "exec"), scope)
    assert (scope["bank"].num_layers, scope["both"].num_layers) == (2, 14)
    exec(compile(EXAMPLES[2], "README.md", "exec"), scope)
    problem = jc.Problem(bank, data.search, max_layers=2)
    result = jc.run(jax.random.key(0), scope["Sampling"](), problem, budget=200)
    assert result.best_loss < 10.0


def test_files_and_scripts_it_names_exist():
    for name in ("README", "CONTRIBUTING", "experiments/README", "benchmarks/README"):
        path = ROOT / f"{name}.md"
        text = path.read_text()
        links = re.findall(r"\]\((?!http)([\w/.-]+)\)", text)
        for link in links:
            assert (path.parent / link).exists(), f"{path}: {link}"
        named = re.findall(r"`((?:experiments|benchmarks|jchain|tests|docs)/[\w/.-]+)`", text)
        for link in named:
            assert (ROOT / link).exists(), f"{path}: {link}"


def test_ci_runs_the_test_command_that_it_shows():
    commands = [line for line in README.splitlines() if line.startswith("python3")]
    (command,) = [line for line in commands if "pytest" in line]
    script = (ROOT / ".ci" / "run").read_text()
    assert command not in script
    (pattern,) = re.findall(r"\$\((grep .*) README.md\)", script)
    shell = ["bash", "-c", f"{pattern} README.md"]
    found = subprocess.run(shell, cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == command
