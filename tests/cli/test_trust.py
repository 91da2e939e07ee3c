"""A result of somebody else names no file that is read without being asked for."""

import json
import shutil
import sys

import pytest
from command_line import fail, search

from jchain.__main__ import main
from jchain.cli.trust import check_trust, sign


@pytest.fixture(autouse=True)
def home(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("home")))


def edit(folder, **changes):
    path = folder / "result.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | {"config": record["config"] | changes}))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made") / "out"
    search(folder, "--search", "random")
    return folder


def test_modules_that_a_foreign_result_names_are_not_run(made, tmp_path, capsys):
    shutil.copytree(made, tmp_path / "out")
    hostile = tmp_path / "hostile.py"
    hostile.write_text("import sys\nsys.modules['was_run'] = sys\n")
    edit(tmp_path / "out", modules=str(hostile))
    for command in (
        ["evaluate", str(tmp_path / "out")],
        ["search", "--config", str(tmp_path / "out"), "--out", str(tmp_path / "new")],
    ):
        err = fail(command, capsys)
        assert "was not made by you on this machine, and it names files to read: " in err
        assert str(hostile) in err
    assert "was_run" not in sys.modules
    assert main(["evaluate", str(tmp_path / "out"), "--trust"]) == 0
    assert sys.modules.pop("was_run") is sys


@pytest.mark.parametrize(
    "changes",
    [{"data_dir": "/data"}, {"data": "secret.npz"}, {"checkpoint": ["/model"]}, {"text": ["/a"]}],
    ids=lambda changes: next(iter(changes)),
)
def test_data_that_a_foreign_result_names_is_not_read(made, tmp_path, capsys, changes):
    shutil.copytree(made, tmp_path / "out")
    edit(tmp_path / "out", **changes)
    assert "Pass --trust" in fail(["evaluate", str(tmp_path / "out")], capsys)


@pytest.mark.parametrize("value", [False, 0, "", [], {}])
def test_a_file_must_be_named_by_text(made, tmp_path, capsys, monkeypatch, value):
    monkeypatch.chdir(tmp_path)
    if value != "":
        (tmp_path / str(value)).write_text("import sys\nsys.modules['was_run'] = sys\n")
    shutil.copytree(made, tmp_path / "out")
    edit(tmp_path / "out", modules=value)
    err = fail(["evaluate", str(tmp_path / "out")], capsys)
    assert "config.modules" in err or "Pass --trust" in err
    assert "was_run" not in sys.modules


def test_a_result_that_names_no_file_has_no_signature(made):
    assert json.loads((made / "result.json").read_text())["signature"] is None


def test_a_result_that_names_no_file_needs_no_trust(made, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "elsewhere"))
    assert main(["evaluate", str(made)]) == 0


def test_own_results_are_recognized_and_changed_ones_are_not(tmp_path):
    config = {"data_dir": "/data", "seed": 3}
    signature = sign(config)
    check_trust(config, signature, tmp_path, is_trusted=False)
    for changed, given in (
        ({**config, "data_dir": "/other"}, signature),
        (config, None),
        (config, "0" * 64),
        (config, 7),
    ):
        with pytest.raises(ValueError, match="it names files to read: /"):
            check_trust(changed, given, tmp_path, is_trusted=False)
        check_trust(changed, given, tmp_path, is_trusted=True)


def test_without_a_place_for_the_key_nothing_is_signed(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    assert sign({"data_dir": "/data"}) is None
    with pytest.raises(ValueError, match="Pass --trust"):
        check_trust({"data_dir": "/data"}, None, tmp_path, is_trusted=False)
