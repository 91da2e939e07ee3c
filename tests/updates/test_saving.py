"""A policy that is stopped continues to the same bits."""

import jax
import numpy as np
import pytest
from policy_cases import POLICIES, run
from stopping import assert_equal

import jchain as jc

CHANGING = ("SharedUpdates", "CloneThenTune")


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow if name in CHANGING else ()) for name in POLICIES],
)
def test_a_policy_that_is_stopped_ends_with_the_same_outcome(name, two_group_problem, tmp_path):
    policy, num_stops = POLICIES[name], 0
    whole = run(policy, two_group_problem)
    # Each of these calls ends after a few steps.
    for _ in range(8):
        out = run(policy, two_group_problem, checkpoint_dir=tmp_path / "run", max_seconds=1e-9)
        num_stops += out.result.stopped_by == "max_seconds"
        assert out.result.is_complete == (out.result.stopped_by is None)
    assert num_stops > 1
    for _ in range(2):  # the second call finds a run that is over
        out = run(policy, two_group_problem, checkpoint_dir=tmp_path / "run", save_every=1e-3)
        assert_equal(out.result, whole.result)
        assert out.update_calls == whole.update_calls
        assert (out.bank.names, out.bank.origins) == (whole.bank.names, whole.bank.origins)
        assert jax.tree.structure(out.bank) == jax.tree.structure(whole.bank)
        for leaf, expected in zip(
            jax.tree.leaves(out.bank), jax.tree.leaves(whole.bank), strict=True
        ):
            np.testing.assert_array_equal(leaf, expected)


def test_a_time_limit_of_0_is_refused(two_group_problem):
    policy = jc.updates.TuneFound(num_steps=5)
    with pytest.raises(ValueError, match=r"expected max_seconds in seconds, above 0, got 0.0"):
        run(policy, two_group_problem, max_seconds=0.0)


@pytest.mark.slow
@pytest.mark.parametrize("name", CHANGING)
def test_what_differs_is_named(name, two_group_problem, tmp_path):
    policy, folder = POLICIES[name], tmp_path / "run"
    stop = {"checkpoint_dir": folder, "max_seconds": 1e-9}
    run(policy, two_group_problem, **stop)
    with pytest.raises(ValueError, match="budget: 1200 there, 1400 here"):
        run(policy, two_group_problem, budget=1400, **stop)
    other = jc.updates.CloneThenTune(num_rounds=2, num_steps=5)
    with pytest.raises(ValueError, match=r"policy\."):
        run(other, two_group_problem, **stop)
