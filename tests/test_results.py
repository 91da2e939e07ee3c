"""Figures on result pages match the JSON files that the scripts wrote."""

import importlib
import importlib.util
import json
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
EXPERIMENTS = (ROOT / "experiments" / "README.md").read_text()
BENCHMARKS = (ROOT / "benchmarks" / "README.md").read_text()


def read_json(path):
    return json.loads((ROOT / path).read_text())


def test_the_table_of_speed_shows_the_results(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    path = ROOT / "benchmarks" / "evaluate.py"
    spec = importlib.util.spec_from_file_location("benchmark", path)
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    result = read_json("benchmarks/results/cpu.json")
    table = benchmark.format_tables(result).splitlines()[: 2 + len(result["rows"])]
    assert "\n".join(table) in BENCHMARKS
    assert result["device"] in BENCHMARKS


def test_the_speed_of_transformers_is_that_of_the_results():
    result = read_json("benchmarks/results/hub_cpu.json")
    (text,) = re.findall(
        r"Chains of the blocks of a GPT-2.*?`benchmarks/hub.py`", BENCHMARKS, re.DOTALL
    )
    for row in result["rows"]:
        assert f"{row['torch_seconds'] / row['seconds']:.2f}" in text
    low, *_, high = sorted(row["of_limit"] for row in result["rows"])
    assert f"{100 * low:.0f} to {high:.0%} of the limit" in text


def test_the_table_of_parts_shows_the_results(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    parts = importlib.import_module("parts")
    result = read_json("benchmarks/results/parts_cpu.json")
    assert parts.format_table(result) in BENCHMARKS
    assert all(row["relative_error"] <= 1e-6 for row in result["rows"])
    peak = result["peak_bytes_above_data"]
    assert peak["1000"] < 300e6
    assert peak["None"] > result["data_bytes"]


def test_the_table_of_searches_shows_the_results():
    table = (ROOT / "experiments" / "results" / "arena.md").read_text().strip()
    assert table.startswith("| search |")
    assert table in EXPERIMENTS


def test_the_table_of_transformers_shows_the_results():
    result = read_json("experiments/results/transformer_depth.json")
    wins, mix = result["wins"], result["mix"]
    losses = [f"{row['loss']:.3f}" for row in wins.values()]
    found = [f"{row['found']['loss']:.3f}" for row in wins.values()]
    counts = [f"{row['found']['lower']}, {row['found']['equal']}" for row in wins.values()]
    for name, cells in [
        ("best recipe", losses),
        ("local search from recipes", found),
        ("found is lower in, equal in, of 5 models", counts),
    ]:
        assert f"| {name} | {' | '.join(cells)} |" in EXPERIMENTS
    best = mix["local search from recipes"]
    words = [f"{best['value']:.3f} (interval {best['low']:.3f} to {best['high']:.3f})"]
    words += [
        f"{mix[name]['value']:.3f}" for name in ("fine-tune a", "fine-tune b", "soup of both")
    ]
    for figure in words:
        assert figure in EXPERIMENTS


def test_the_cost_of_saving_is_that_of_the_results(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    saving = importlib.import_module("saving")
    result = read_json("benchmarks/results/saving_cpu.json")
    assert saving.format_table(result) in BENCHMARKS
    assert all(row["saving"]["ratio"] < 1.03 for row in result["rows"])
    assert max(result["big_state_stops"]) < 0.5


def test_memory_is_that_of_the_results_and_keeps_its_promise(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    memory = importlib.import_module("memory")
    rows = read_json("benchmarks/results/memory_cpu.json")["rows"]
    assert memory.format_table(rows) in BENCHMARKS
    for row in rows:
        if row["call"] == "evaluate":
            assert row["taken"] <= 1.14 * row["promised"]
            assert row["limit"] is None or row["taken"] <= row["limit"] * 2**20


def test_the_table_of_heads_shows_the_results(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    head_loss = importlib.import_module("head_loss")
    result = read_json("benchmarks/results/head_loss_cpu.json")
    assert head_loss.format_table(result) in BENCHMARKS
    for row in result["rows"]:
        assert row["relative_error"] <= 1e-4
        assert row["speedup"] > 2 or (row["work"] != "loss" and row["speedup"] > 0.95)
        assert 4 * row["parts_bytes"] < row["kept_bytes"]
