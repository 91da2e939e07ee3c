"""Long phases say how much of them is left."""

import time

import numpy as np
import pytest

import jchain as jc
from jchain.cli import progress


@pytest.mark.parametrize("part_size", [3, 20, 1000, None])
def test_parts_have_the_scores_of_the_whole(problem, part_size, capsys):
    chains = np.random.default_rng(0).permutation(problem.space.enumerate())[:50]
    expected = jc.evaluate(problem, chains)
    found = progress.evaluate_in_parts(problem, chains, "Scoring", part_size)
    np.testing.assert_allclose(found.loss, expected.loss, rtol=1e-6)
    np.testing.assert_allclose(found.accuracy, expected.accuracy, rtol=1e-6)
    assert ("Scoring ..." in capsys.readouterr().err) == (part_size in (3, 20))


def test_lines_say_the_time_that_is_left(monkeypatch, capsys):
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    with progress.show_parts("Scoring", 10) as advance:
        for _ in range(10):
            clock[0] += 20.0
            advance(1)
    lines = capsys.readouterr().err.splitlines()
    assert lines[:2] == ["Scoring ...", "Scoring: 2 of 10 parts, about 160 s left"]
    assert lines[-1] == "Scoring: 8 of 10 parts, about 40 s left"
