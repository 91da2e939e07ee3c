"""Helpers that run the command line in this process, with small sizes."""

import shlex

from jchain.__main__ import main

SMALL = shlex.split("--data wine --num-layers 4 --depth 2 --num-steps 30 --budget 300")


def search(folder, *options):
    """Search the wine data and write the result to the folder."""
    assert main(["search", *SMALL, "--out", str(folder), "--json", *options]) == 0


def fail(argv, capsys):
    """Run a command that exits with 2 and without a traceback, and return its output."""
    try:
        code = main(argv)
    except SystemExit as error:  # argparse itself exits
        code = error.code
    err = capsys.readouterr().err
    assert code == 2
    assert "Traceback" not in err
    return err


def check_bad_options(tmp_path, capsys, options, message):
    """Check that a search exits with 2, prints the message, and writes nothing."""
    assert message in fail(["search", *SMALL, "--out", str(tmp_path / "out"), *options], capsys)
    assert list(tmp_path.iterdir()) == []


def check_bad_checkpoint_options(models_folder, monkeypatch, capsys, options):
    """Check that a search in that folder exits with 2 and writes nothing; return its output."""
    monkeypatch.chdir(models_folder)
    err = fail(["search", *options, "--out", "refused"], capsys)
    assert [line for line in err.splitlines() if line.startswith("jchain: error")]
    assert not (models_folder / "refused").exists()
    return err
