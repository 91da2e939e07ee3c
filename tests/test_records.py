"""Kept results of the experiments are computed again when the code or the inputs change."""

import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

import jchain as jc

sys.path.insert(0, str(Path(__file__).parent.parent / "experiments"))
import records

EXPERIMENTS = Path(records.__file__).parent

SCRIPT = """
import jchain as jc
import helper
from records import correlate


def search_it(problem):
    return jc.run_many(problem, jc.LocalSearch(), helper.NUM_SEEDS)
"""
HELPER = """
import jchain as jc

NUM_SEEDS = 3
NAMES = jc.chainbench.NAMES
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A script, a module that it imports, and a copy of the package in `jchain`."""
    package = tmp_path / "jchain"
    shutil.copytree(Path(jc.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(records, "_PACKAGE", package)
    (tmp_path / "script.py").write_text(SCRIPT)
    (tmp_path / "helper.py").write_text(HELPER)
    return tmp_path


@pytest.fixture
def digest(folder):
    """Digest of the script, with a line added to one of the files."""

    def find(changed="script.py", line="", inputs=0):
        path = folder / changed
        source = path.read_text()
        path.write_text(f"{source}\n{line}\n")
        found = records._digest(folder / "script.py", inputs)
        path.write_text(source)
        return found

    return find


@pytest.mark.parametrize(
    "name",
    [
        "script.py",
        "helper.py",
        "jchain/runs/driver.py",
        "jchain/search/local_search.py",
        "jchain/engine/evaluation.py",
        "jchain/chainbench/problems.py",  # the imported module reaches this
        "jchain/chainbench/tabular.py",  # `records` reaches this
    ],
)
def test_a_changed_line_of_reached_code_changes_the_digest(digest, name):
    assert digest(name, "CHANGED = True") != digest()


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("script.py", "# A comment."),
        ("jchain/runs/driver.py", "# A comment."),
        ("jchain/search/linearized.py", "CHANGED = True"),
        ("jchain/hub/gpt2.py", "CHANGED = True"),
        ("jchain/__init__.py", "CHANGED = True"),
    ],
)
def test_comments_and_unreached_modules_do_not_change_the_digest(digest, name, line):
    assert digest(name, line) == digest()


def test_a_docstring_does_not_change_the_digest(folder, digest):
    plain = digest()
    (folder / "script.py").write_text(f'"""A docstring."""\n{SCRIPT}')
    assert digest() == plain


def test_inputs_change_the_digest(digest):
    assert digest(inputs=1) != digest()


def test_a_search_that_the_script_names_is_reached(folder, digest):
    (folder / "script.py").write_text(f"{SCRIPT}\nSEARCH = jc.LinearizedSearch()\n")
    assert digest("jchain/search/linearized.py", "CHANGED = True") != digest()


def test_modules_imported_by_name_are_reached(folder):
    (folder / "script.py").write_text("import jchain as jc\nbank = jc.hub.load('folder')\n")
    plain = records._digest(folder / "script.py", 0)
    path = folder / "jchain" / "hub" / "gpt2.py"
    path.write_text(f"{path.read_text()}\nCHANGED = True\n")
    assert records._digest(folder / "script.py", 0) != plain


@pytest.mark.parametrize(
    ("line", "missing"),
    [
        ("jc.no_such_search()", "no_such_search"),
        ("jc.gradient.no_such_score()", "gradient.no_such_score"),
        ("from jchain.no_such_module import name", "jchain.no_such_module"),
        ("from jchain.gradient import no_such_score", "jchain.gradient.no_such_score"),
        ("import no_such_module", "no_such_module"),
        ("from . import helper", "from . import helper"),
        ("package = jc.gradient", "jchain.gradient"),
    ],
)
def test_code_that_is_not_found_raises(digest, line, missing):
    with pytest.raises(ValueError, match=missing):
        digest(line=line)


def test_a_missing_script_or_module_raises(folder):
    with pytest.raises(ValueError, match=r"missing\.py"):
        records._digest(folder / "missing.py", 0)
    (folder / "jchain" / "search" / "local_search.py").unlink()
    with pytest.raises(ValueError, match=r"jchain\.search\.local_search"):
        records._digest(folder / "script.py", 0)


@pytest.mark.parametrize(
    ("attributes", "module"),
    [
        (("gradient", "score_edits"), "jchain.gradient.edit_scores"),
        (("chainbench", "stats", "iqm"), "jchain.chainbench.stats"),
        (("chainbench", "KINDS"), "jchain.chainbench.problems"),
        (("Bank", "load"), "jchain.bank"),
        (("train",), "jchain.train"),
        (("__version__",), None),
    ],
)
def test_names_resolve_to_the_module_that_defines_them(attributes, module):
    assert records._find_module("jchain", attributes) == module


def test_kept_arrays_are_computed_once(folder, monkeypatch):
    monkeypatch.setattr(records, "CACHE", folder)
    script, made = folder / "script.py", []

    def make():
        made.append(1)
        return {"a": np.arange(3)}

    for _ in range(2):
        np.testing.assert_array_equal(records.keep(script, "it", 0, make)["a"], np.arange(3))
    assert len(made) == 1
    records.keep(script, "it", 1, make)
    assert len(made) == 2


@pytest.mark.parametrize("script", sorted(EXPERIMENTS.glob("*.py")), ids=lambda path: path.stem)
def test_everything_that_an_experiment_names_is_found(script):
    assert records._digest(script, 0)
