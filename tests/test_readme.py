"""What README.md shows is true."""

import importlib.util
import json
import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_example_runs_and_is_short(capsys):
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len([line for line in example.splitlines() if line.strip()]) <= 15
    exec(compile(example, "README.md", "exec"), {})
    assert "routed/head" in capsys.readouterr().out


def test_files_and_scripts_it_names_exist():
    paths = re.findall(r"[(`]((?:experiments|benchmarks|jchain|tests)/[\w/.]+)[)`]", README)
    assert len(paths) >= 2
    for path in paths:
        assert (ROOT / path).exists(), path


def test_ci_runs_the_test_command_that_it_shows():
    (command,) = [line for line in README.splitlines() if line.startswith("python3") and "pytest" in line]
    script = (ROOT / ".ci" / "run").read_text()
    assert command not in script
    (pattern,) = re.findall(r"\$\((grep .*) README.md\)", script)
    found = subprocess.run(["bash", "-c", f"{pattern} README.md"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == command


def test_the_table_of_speed_shows_the_results(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    spec = importlib.util.spec_from_file_location("benchmark", ROOT / "benchmarks" / "evaluate.py")
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    result = json.loads((ROOT / "benchmarks" / "results" / "cpu.json").read_text())
    table = benchmark.format_tables(result).splitlines()[: 2 + len(result["rows"])]
    assert "\n".join(table) in README
    assert result["device"] in README


def test_the_table_of_searches_shows_the_results():
    table = (ROOT / "experiments" / "results" / "arena.md").read_text().strip()
    assert table.startswith("| search |")
    assert table in README
