"""README.md shows only what is true."""

import json
import re
import subprocess
from pathlib import Path

import jax
from conftest import optimizations

import jchain as jc
from jchain.cli.tables import print_summary

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "experiments" / "results"
README = (ROOT / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
MAX_BYTES = 9 * 1024


def test_readme_fits_on_one_page():
    assert len(README.encode()) <= MAX_BYTES


def test_readme_example_is_short():
    assert len([line for line in EXAMPLES[0].splitlines() if line.strip()]) <= 15


def test_readme_examples_run(capsys):
    scope = {}
    with optimizations():
        exec(compile(EXAMPLES[0], "README.md", "exec"), scope)
    chain, loss, accuracy = capsys.readouterr().out.rsplit(maxsplit=2)
    assert chain.endswith("net/0 -> net/1 -> net/head")
    assert (float(loss) < 0.5, float(accuracy) > 0.9) == (True, True)
    bank, data = scope["bank"], scope["data"]
    scope |= {"params_a": bank.get_params(0), "params_b": bank.get_params(1)}
    scope |= {"head_params": bank.get_params(12)}
    exec(compile(EXAMPLES[1], "README.md", "exec"), scope)
    assert (scope["bank"].num_layers, scope["bank"].num_heads) == (2, 1)
    exec(compile(EXAMPLES[2], "README.md", "exec"), scope)
    problem = jc.Problem(bank, data.search, max_layers=2)
    result = jc.run(jax.random.key(0), scope["Sampling"](), problem, budget=200)
    assert result.best_loss < 10.0


def test_readme_output_is_that_of_a_run(capsys):
    summary = json.loads((RESULTS / "main_job_seeds.json").read_text())
    assert (summary["config"]["task"], summary["seeds"]) == ("repair", [0, 1, 2, 3, 4])
    assert summary["config"]["command"] == "jchain search"
    print_summary(summary)
    printed = {line.rstrip() for line in capsys.readouterr().out.splitlines()}
    (block,) = re.findall(r"```text\n(.*?)```", README, re.DOTALL)
    lines = block.rstrip().splitlines()
    assert len(lines) > 10
    assert set(lines) <= printed
    assert summary["seconds"] < 120


def test_readme_demo_figures_match_the_experiment():
    result = json.loads((RESULTS / "main_job.json").read_text())
    job = result["candidates"]["repair"]
    rows, num = job["rows"], len(result["config"]["seeds"])
    text = " ".join(README.split())
    lower = rows["best parent"]["lower"]
    assert rows["plain net, same steps"]["lower"] == lower == num
    tuned = rows["plain net, fine-tuned on search"]["lower"]
    mean = job["rows"]["critic search"]["mean"]
    assert (
        f"on {num} other seeds, the best chain found has a mean loss of {mean:.3f}. It beats the "
        f"best parent and the plain net on all {lower}, and the fine-tuned plain net on {tuned}"
    ) in text
    assert f"There are {job['num_chains']:,} possible chains" in text
    assert not set(result["config"]["seeds"]) & {0, 1, 2, 3, 4}
    for row in ("best parent", "plain net, same steps", "random chains, median"):
        assert rows[row]["lower"] >= 0.9 * num
        assert rows[row]["difference"]["high"] < 0


def test_files_that_pages_name_exist():
    for name in ("README", "CONTRIBUTING", "experiments/README", "benchmarks/README"):
        path = ROOT / f"{name}.md"
        text = path.read_text()
        links = re.findall(r"\]\((?!http)([\w/.-]+)\)", text)
        for link in links:
            assert (path.parent / link).exists(), f"{path}: {link}"
        named = re.findall(r"`((?:experiments|benchmarks|jchain|tests|docs)/[\w/.-]+)`", text)
        for link in named:
            assert (ROOT / link).exists(), f"{path}: {link}"


def test_ci_runs_the_test_command_of_the_readme():
    commands = [line for line in README.splitlines() if line.startswith("python3")]
    (command,) = [line for line in commands if "pytest" in line]
    script = (ROOT / ".ci" / "run").read_text()
    assert command not in script
    (pattern,) = re.findall(r"\$\((grep .*) README.md\)", script)
    shell = ["bash", "-c", f"{pattern} README.md"]
    found = subprocess.run(shell, cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == command
