"""What README.md shows is true."""

import importlib.util
import json
import re
import subprocess
from pathlib import Path

from checkpoints import make_model_and_text

import jchain as jc

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_the_examples_are_short():
    assert len(EXAMPLES) == 2
    for example in EXAMPLES:
        assert len([line for line in example.splitlines() if line.strip()]) <= 15


def test_the_example_runs(capsys):
    exec(compile(EXAMPLES[0], "README.md", "exec"), {})
    assert "routed/head" in capsys.readouterr().out


def test_the_example_of_pretrained_transformers_runs(tmp_path, monkeypatch):
    """But for the line that needs transformers: it is run by test_hub_parity.py."""
    monkeypatch.chdir(tmp_path)
    make_model_and_text(tmp_path)
    lines = [line for line in EXAMPLES[1].splitlines() if "transformers" not in line]
    exec(compile("\n".join(lines), "README.md", "exec"), {})
    assert jc.hub.load("shallower").num_layers <= 4 + 2


def test_files_and_scripts_it_names_exist():
    paths = re.findall(r"[(`]((?:experiments|benchmarks|jchain|tests)/[\w/.]+)[)`]", README)
    assert len(paths) >= 2
    for path in paths:
        assert (ROOT / path).exists(), path


def test_ci_runs_the_test_command_that_it_shows():
    (command,) = [
        line for line in README.splitlines() if line.startswith("python3") and "pytest" in line
    ]
    script = (ROOT / ".ci" / "run").read_text()
    assert command not in script
    (pattern,) = re.findall(r"\$\((grep .*) README.md\)", script)
    found = subprocess.run(
        ["bash", "-c", f"{pattern} README.md"], cwd=ROOT, capture_output=True, text=True, check=True
    )
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


def test_the_table_of_transformers_shows_the_results():
    result = json.loads((ROOT / "experiments" / "results" / "transformer_depth.json").read_text())
    wins, mix = result["wins"], result["mix"]
    for name, cells in [
        ("best recipe", [f"{row['loss']:.3f}" for row in wins.values()]),
        (
            "local search that begins at recipes",
            [f"{row['found']['loss']:.3f}" for row in wins.values()],
        ),
        (
            "lower, equal in, of 5 models",
            [f"{row['found']['lower']}, {row['found']['equal']}" for row in wins.values()],
        ),
    ]:
        assert f"| {name} | {' | '.join(cells)} |" in README
    found = mix["local search from recipes"]
    said = [f"{found['value']:.3f}\n[{found['low']:.3f}, {found['high']:.3f}]"]
    said.append(" and ".join(f"{mix[f'fine-tune {name}']['value']:.3f}" for name in "ab"))
    said.append(f"the mean of their weights {mix['soup of both']['value']:.3f}")
    for words in said:
        assert words in README


def test_the_speed_of_transformers_is_that_of_the_results():
    result = json.loads((ROOT / "benchmarks" / "results" / "hub_cpu.json").read_text())
    (said,) = re.findall(
        r"- Chains of the blocks of a GPT-2.*?`benchmarks/hub.py`", README, re.DOTALL
    )
    for row in result["rows"]:
        assert f"{row['torch_seconds'] / row['seconds']:.2f}" in said
    low, *_, high = sorted(row["of_limit"] for row in result["rows"])
    assert f"{100 * low:.0f} to {high:.0%} of the limit" in said
