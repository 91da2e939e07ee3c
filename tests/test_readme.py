"""What README.md shows is true."""

import importlib.util
import json
import re
import subprocess
from pathlib import Path

import jax
from test_hub_datasets import make_checkpoint

import jchain as jc

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def make_model_and_text(folder):
    """What the second example reads: a tiny model of bytes, and a text."""
    options = {"model_type": "gpt2", "vocab_size": 256, "n_embd": 8, "n_layer": 6, "n_head": 2, "n_positions": 128}
    model = make_checkpoint(folder / "new")
    (model / "config.json").write_text(json.dumps(options))
    bank = jc.hub.init(jax.random.key(0), model)
    jc.hub.export(bank, bank.parents[0], model, folder / "model")
    (folder / "my.txt").write_text((ROOT / "README.md").read_text())


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
