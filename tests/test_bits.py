"""The script that fingerprints what the library computes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "bits.py"


def run_script(*args):
    command = [sys.executable, str(SCRIPT), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.slow
def test_compare_detects_changed_fingerprints(tmp_path):
    before, after = tmp_path / "before.json", tmp_path / "after.json"
    for path in (before, after):
        done = run_script("--only", "data", "--out", path)
        assert done.returncode == 0, done.stderr
    assert run_script("--compare", before, after).returncode == 0
    entries = json.loads(after.read_text())
    name = next(iter(entries))
    entries[name]["sha256"] = "0"
    after.write_text(json.dumps(entries))
    done = run_script("--compare", before, after)
    assert done.returncode == 1
    assert name in done.stdout
