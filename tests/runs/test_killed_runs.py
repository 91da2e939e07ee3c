"""Runs that are killed with SIGKILL at random moments continue to the same bits."""

import killing
import pytest
import small_searches


def test_killed_runs_continue_to_the_same_bits(tmp_path):
    assert killing.check(tmp_path, ["LocalSearch"], num_kills=10) >= 5


@pytest.mark.slow
def test_killed_runs_of_all_searches_continue_to_the_same_bits(tmp_path):
    assert killing.check(tmp_path, [*small_searches.SEARCHES], num_kills=50) >= 30
