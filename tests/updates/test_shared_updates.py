import jax
import numpy as np
import pytest
from policy_cases import AGENT, BUDGET, POLICIES, TRAIN, is_equal, run

import jchain as jc
from jchain.updates.policies import RunArguments


def test_a_search_without_refresh_raises(problem):
    with pytest.raises(ValueError, match="method refresh, such as ActorCritic, got LocalSearch"):
        run(POLICIES["SharedUpdates"], problem, jc.LocalSearch(num_chains=3))


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_budget_below_one_round_raises(two_group_problem):
    with pytest.raises(
        ValueError,
        match=r"75% pay for a step of the search and its gradient steps \([0-9]+ layer calls\)",
    ):
        run(POLICIES["SharedUpdates"], two_group_problem, budget=10)


@pytest.mark.slow
def test_the_search_begins_at_the_starts(two_group_problem):
    """Starts are charged, elites from the first step on, and thus trained and found."""
    problem = two_group_problem
    policy = POLICIES["SharedUpdates"]
    start = np.array([[3, 1, 6, -1]], np.int32)
    args = RunArguments(jax.random.key(0), AGENT, problem, TRAIN, BUDGET, 16, False, start)
    begun, nothing = policy._begin(args), policy._begin(args._replace(starts=start[:0]))
    assert (begun.start_calls, nothing.start_calls) == (2, 0)
    elite = begun.carry[0].elite
    np.testing.assert_array_equal(elite.chains[0], start[0])
    np.testing.assert_allclose(elite.loss[0], jc.evaluate(problem, start).loss[0], rtol=1e-5)
    assert not np.isfinite(nothing.carry[0].elite.loss).any()
    outcome = run(policy, problem, starts=start)
    assert outcome.result.layer_calls <= BUDGET
    assert np.asarray(outcome.bank.get_versions())[[3, 1, 6]].min() > 0
