"""`jchain compare` prints the figures of the results."""

import json
import shutil

import numpy as np
import pytest
from command_line import fail

from jchain.__main__ import main
from jchain.cli import compare


@pytest.fixture
def results(result_folder, tmp_path):
    """Three seeds of one search, and another search, with losses that are made up."""
    for i in range(4):
        folder = shutil.copytree(result_folder, tmp_path / f"r{i}")
        record = json.loads((folder / "result.json").read_text())
        record["loss"] = {"search": 0.5 + i, "select": 2.5 - i, "test": 1.0 + 0.5 * i}
        record["config"] |= {"seed": i, "out": str(folder)}
        record["layers"] = [f"layer{i}", "head"]
        if i == 3:
            record["config"]["search"] = "local"
            record["stopped_by"] = "SIGINT"
        (folder / "result.json").write_text(json.dumps(record))
    return [str(tmp_path / f"r{i}") for i in range(4)]


def test_seeds_of_one_search_share_a_row(results, capsys):
    assert main(["compare", *results, "--json"]) == 0
    first, second = json.loads(capsys.readouterr().out)
    assert (first["seeds"], second["seeds"]) == ([0, 1, 2], [3])
    assert first["loss"]["test"] == [1.0, 1.5, 2.0]
    assert first["layers"] == ["layer2", "head"]  # the lowest loss on select
    assert main(["compare", *results]) == 0
    shown = capsys.readouterr().out
    # The half width of the interval is 4.303 standard errors for three seeds.
    half = 4.3027 * np.std([1.0, 1.5, 2.0], ddof=1) / 3**0.5
    assert f"1.500 [{1.5 - half:.3f}, {1.5 + half:.3f}]" in " ".join(shown.split())
    assert "2.500" in shown
    assert (first["stopped_by"], second["stopped_by"]) == (None, "SIGINT")
    rows = compare.tabulate([compare.Compared(**row) for row in (first, second)]).rows
    assert [row[0].endswith(" (stopped)") for row in rows] == [False, True]


def test_what_is_no_result_is_refused(results, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert "expected a result folder, got" in fail(["compare", str(tmp_path / "empty")], capsys)
    path = tmp_path / "r0" / "result.json"
    path.write_text('{"config": {}}')
    assert "expected the field loss, got none" in fail(["compare", str(tmp_path / "r0")], capsys)
