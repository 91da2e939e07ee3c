import numpy as np
import pytest
from policy_cases import POLICIES, is_equal, run

import jchain as jc


def test_a_search_without_refresh_raises(problem):
    with pytest.raises(ValueError, match="method refresh, such as ActorCritic, got LocalSearch"):
        run(POLICIES["SharedUpdates"], problem, jc.LocalSearch(num_chains=3))


def test_only_sampled_layers_are_trained(two_group_problem):
    outcome = run(POLICIES["SharedUpdates"], two_group_problem)
    versions = np.asarray(outcome.bank.get_versions())
    assert versions.sum() > 10
    for token in range(7):
        is_same = is_equal(outcome.bank.get_params(token), two_group_problem.bank.get_params(token))
        assert is_same == (versions[token] == 0)


@pytest.mark.slow
def test_a_search_over_heads_alone_ends(problem):
    no_layers = jc.Problem(problem.bank, problem.data, max_layers=0)
    outcome = run(POLICIES["SharedUpdates"], no_layers)
    assert outcome.result.layer_calls == 0
    assert np.isfinite(outcome.result.best_loss)


def test_a_budget_below_one_round_raises(two_group_problem):
    with pytest.raises(
        ValueError,
        match=r"75% pay for a step of the search and its gradient steps \([0-9]+ layer calls\)",
    ):
        run(POLICIES["SharedUpdates"], two_group_problem, budget=10)
