"""What the experiments keep must be made again when its code changes, and only then."""

import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

import jchain as jc

sys.path.insert(0, str(Path(__file__).parent.parent / "experiments"))
import records


def search_it(problem):
    return jc.run_many(problem)


@pytest.fixture
def digest(tmp_path, monkeypatch):
    """Digests of what a copy of the package would make, with a line of code added to some of its modules."""
    package = tmp_path / "jchain"
    shutil.copytree(Path(jc.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(records, "_PACKAGE", package)

    def find(*changed, line="CHANGED = True", inputs=0, uses=()):
        sources = {name: (package / name).read_text() for name in changed}
        for name, source in sources.items():
            (package / name).write_text(f"{source}\n{line}\n")
        found = records._digest((search_it,), inputs, uses)
        for name, source in sources.items():
            (package / name).write_text(source)
        return found

    return find


def test_results_hang_on_the_modules_that_they_reach(digest):
    uses = (jc.LocalSearch(),)
    plain = digest(uses=uses)
    assert digest(uses=uses) == plain
    for name in ("search/base.py", "search/local_search.py", "memo.py", "engine.py"):
        assert digest(name, uses=uses) != plain
    for name in ("search/linearized.py", "gradient.py", "trends.py"):
        assert digest(name, uses=uses) == plain
        if name != "trends.py":
            assert digest(name, uses=(jc.LinearizedSearch(),)) != digest(
                uses=(jc.LinearizedSearch(),)
            )
    assert digest("search/base.py", line="# A comment.", uses=uses) == plain
    assert digest(inputs=1, uses=uses) != plain


def test_what_is_kept_is_not_made_again(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "CACHE", tmp_path)
    made = []

    def make():
        made.append(1)
        return {"a": np.arange(3)}

    for _ in range(2):
        np.testing.assert_array_equal(records.keep((search_it,), "it", 0, make)["a"], np.arange(3))
    assert len(made) == 1
    records.keep((search_it,), "it", 1, make)
    assert len(made) == 2
