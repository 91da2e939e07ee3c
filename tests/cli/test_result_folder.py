import json
import shlex
import shutil
from pathlib import Path

import pytest
from command_line import SMALL

from jchain.__main__ import main


def test_a_result_is_replaced_only_with_replace(result_folder, tmp_path, capsys):
    folder = shutil.copytree(result_folder, tmp_path / "out")
    before = (folder / "result.json").read_bytes()
    (folder / "sweep.png").touch()
    argv = [
        "search",
        *SMALL,
        *shlex.split("--search random --quick --seed 1"),
        "--out",
        str(folder),
    ]
    assert main(argv) == 2
    err = capsys.readouterr().err
    assert "belongs to a search with other options: seed: 0 there, 1 here: pass --replace" in err
    assert (folder / "result.json").read_bytes() == before
    shutil.rmtree(folder / "run")  # as in a result of jchain 0.1.0
    assert main(argv) == 2
    assert "already holds a result: pass --replace" in capsys.readouterr().err
    assert main([*argv, "--replace"]) == 0
    assert json.loads((folder / "result.json").read_text())["config"]["seed"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert "out: bank.safetensors, curve.png, result.json, search.json" in capsys.readouterr().out
    assert not (folder / "sweep.png").exists()
    (folder / "notes.txt").write_text("mine")
    assert main([*argv, "--replace"]) == 2
    assert "holds files that are not a result of jchain (notes.txt)" in capsys.readouterr().err


@pytest.mark.slow
def test_a_result_may_be_written_to_the_working_directory(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    options = shlex.split("--quick --search random --layer-cost 0.5 --max-layers 1 --min-layers 1")
    assert main(["search", *SMALL, *options, "--out", "."]) == 0
    assert {path.name for path in Path().iterdir()} == {
        "bank.safetensors",
        "curve.png",
        "result.json",
        "run",
        "search.json",
    }
    # There is no layer penalty, as in all rows of the table.
    result = json.loads(Path("result.json").read_text())
    assert result["optimum"] == pytest.approx(result["loss"]["search"], rel=1e-5)


def test_folders_with_other_files_are_never_replaced(tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("mine")
    assert main(["search", *SMALL, "--out", str(tmp_path), "--replace"]) == 2
    assert "holds files that are not a result" in capsys.readouterr().err
    assert main(["search", *SMALL, "--out", str(tmp_path / "notes.txt"), "--replace"]) == 2
    assert "expected a folder for results, got the file" in capsys.readouterr().err
    assert main(["search", *SMALL, "--out", str(tmp_path / "notes.txt" / "out")]) == 2
    assert "expected a folder for results, got the file" in capsys.readouterr().err
    assert (tmp_path / "notes.txt").read_text() == "mine"
