import dataclasses

import jax
import numpy as np
import optax
import pytest
from policy_cases import POLICIES, SEARCH, run

import jchain as jc


@pytest.mark.slow
def test_tuning_lowers_the_loss_of_the_chain_found(two_group_problem):
    policy = dataclasses.replace(POLICIES["TuneFound"], num_steps=30)
    # Gradients are taken on the problem's own split, so they must lower its loss.
    outcome = policy.run(
        jax.random.key(0), SEARCH, two_group_problem, two_group_problem.data, budget=3000
    )
    chain = outcome.result.best_chain
    before = float(jc.evaluate(two_group_problem, chain[None]).loss[0])
    tokens = [token for token in chain.tolist() if token >= 0]
    assert outcome.update_calls == jc.updates.tune.training_cost(len(tokens) - 1, 9, 9, 30)
    assert outcome.result.best_loss < before
    assert set(np.flatnonzero(outcome.bank.get_versions())) == set(tokens)
    assert len(outcome.result.finalists) == 1


def test_tuning_that_raises_the_loss_is_discarded(two_group_problem):
    outcome = run(
        dataclasses.replace(POLICIES["TuneFound"], optimizer=optax.sgd(1e3)), two_group_problem
    )
    assert outcome.bank is two_group_problem.bank
    assert len(outcome.result.finalists) > 1
    assert outcome.update_calls > 0


def test_budget_errors_mention_the_calls_reserved_for_gradient_steps(problem):
    reserved = jc.updates.tune.training_cost(3, 20, 9, 5) + 3
    message = (
        rf"costs [0-9]+ layer calls here in addition to {reserved} for gradient steps, "
        rf"[0-9]+ in all, got {reserved + 1}"
    )
    with pytest.raises(ValueError, match=message):
        run(POLICIES["TuneFound"], problem, search=jc.RandomSearch(16), budget=reserved + 1)
