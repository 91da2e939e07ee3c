import json
import shlex
import shutil
from pathlib import Path

import pytest
from command_line import SMALL

from jchain.__main__ import main
from jchain.cli import commands


def test_a_result_is_replaced_only_with_replace(result_folder, tmp_path, capsys, monkeypatch):
    folder = shutil.copytree(result_folder, tmp_path / "out")
    before = (folder / "result.json").read_bytes()
    options = ["--search", "random", "--quick", "--seed", "1"]
    argv = ["search", *SMALL, *options, "--out", str(folder)]
    assert main(argv) == 2
    assert "already holds a result: pass --replace" in capsys.readouterr().err
    assert (folder / "result.json").read_bytes() == before
    assert main([*argv, "--replace"]) == 0
    assert json.loads((folder / "result.json").read_text())["config"]["seed"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    run_pipeline, notes = commands.run_pipeline, folder / "notes.txt"

    def search_while_notes_are_taken(*args):
        notes.write_text("mine")
        return run_pipeline(*args)

    monkeypatch.setattr(commands, "run_pipeline", search_while_notes_are_taken)
    assert main([*argv, "--replace"]) == 0
    assert "out-2: bank.safetensors, curve.png, result.json" in capsys.readouterr().out
    assert notes.read_text() == "mine"
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
    }
    # There is no layer penalty, as in all rows of the table.
    result = json.loads(Path("result.json").read_text())
    assert result["optimum"] == pytest.approx(result["loss"]["search"], rel=1e-5)


def test_a_result_that_cannot_be_renamed_is_kept(tmp_path, capsys, monkeypatch):
    def refuse(*args):
        raise OSError("Device or resource busy")

    monkeypatch.setattr("os.rename", refuse)
    options = ["--search", "random", "--quick"]
    assert main(["search", *SMALL, *options, "--out", str(tmp_path / "out")]) == 2
    err = capsys.readouterr().err
    (folder,) = tmp_path.iterdir()
    assert f"Device or resource busy; the result is kept in {folder}" in err
    assert (folder / "result.json").exists()


def test_folders_with_other_files_are_never_replaced(tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("mine")
    assert main(["search", *SMALL, "--out", str(tmp_path), "--replace"]) == 2
    assert "holds files that are not a result" in capsys.readouterr().err
    assert main(["search", *SMALL, "--out", str(tmp_path / "notes.txt"), "--replace"]) == 2
    assert "expected a folder for results, got the file" in capsys.readouterr().err
    assert main(["search", *SMALL, "--out", str(tmp_path / "notes.txt" / "out")]) == 2
    assert "expected a folder for results, got the file" in capsys.readouterr().err
    assert (tmp_path / "notes.txt").read_text() == "mine"
