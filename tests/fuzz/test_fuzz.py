"""Damaged files of each kind end in one clear error; `run.py` tries more of them."""

import subprocess
import sys
from pathlib import Path

import pytest
from fuzz.targets import TARGETS
from stopping import ENVIRONMENT

# Their files are made by a search.
SLOW = ("result, evaluate", "result, compare", "search.json")
QUICK = [name for name in TARGETS if name not in SLOW]


@pytest.mark.parametrize(
    "names", [QUICK, pytest.param(SLOW, marks=pytest.mark.slow)], ids=["quick", "slow"]
)
def test_damaged_files_end_in_one_clear_error(names):
    only = [word for name in names for word in ("--only", name)]
    script = str(Path(__file__).with_name("run.py"))
    done = subprocess.run(
        [sys.executable, script, "--num", "100", "--together", *only],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(done.stdout.splitlines()) == len(names)
    assert all(" refused" in line for line in done.stdout.splitlines())
