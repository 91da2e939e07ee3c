"""Standard output that is closed or full, and terminals that are narrow."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console
from stopping import ENVIRONMENT

from jchain.cli import tables
from jchain.cli.tables import TextTable, print_text_table

RESULT = Path(__file__).parent.parent / "saved" / "result"
COMPARE = [sys.executable, "-W", "ignore", "-m", "jchain", "compare", str(RESULT)]


def test_a_reader_that_ends_early_is_no_error():
    read_end, write_end = os.pipe()
    os.close(read_end)
    done = subprocess.run(
        COMPARE, stdout=write_end, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT
    )
    os.close(write_end)
    assert done.returncode == 141
    assert done.stderr == ""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_behind_standard_output_is_told():
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            COMPARE, stdout=full, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT
        )
    assert done.returncode == 1
    assert done.stderr == (
        "jchain: error: cannot write to standard output: No space left on device\n"
    )


TABLE = TextTable(
    "loss by split",
    ["", "search, 280", "select, 100", "test, 499"],
    [
        ["best chain found", "0.062 ± 0.011 (98.1%)", "0.100 ± 0.020 (97.5%)", "0.131 ± 0.018"],
        ["a control with a long name", "0.083 ± 0.014 (97.2%)", "", "0.152 ± 0.021"],
    ],
)


@pytest.mark.parametrize("width", [20, 40, 60])
def test_a_narrow_terminal_gets_all_numbers(monkeypatch, capsys, width):
    monkeypatch.setattr(tables, "make_console", lambda: Console(width=width))
    print_text_table(TABLE)
    printed = " ".join(capsys.readouterr().out.split())
    assert "…" not in printed
    words = " ".join(cell for row in TABLE.rows for cell in row).split()
    assert not [word for word in words if word not in printed]


def test_a_wide_terminal_gets_a_table(monkeypatch, capsys):
    monkeypatch.setattr(tables, "make_console", lambda: Console(width=120))
    print_text_table(TABLE)
    lines = capsys.readouterr().out.splitlines()
    assert any("0.062 ± 0.011" in line and "0.131 ± 0.018" in line for line in lines)
