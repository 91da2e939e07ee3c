"""One contract for all update policies. A policy that jchain exports must be listed in POLICIES."""

import dataclasses
from functools import partial

import jax
import numpy as np
import pytest
from policy_cases import AGENT, BUDGET, POLICIES, SEARCH, TRAIN, is_equal, run

import jchain as jc
from jchain import updates


def test_every_policy_is_in_the_contract():
    found = {name for name, cls in vars(updates).items() if hasattr(cls, "run")}
    assert found == {*POLICIES, "UpdatePolicy"}
    assert all(isinstance(policy, updates.UpdatePolicy) for policy in POLICIES.values())


# Two policies take long to compile; by default, only their own modules test them.
@pytest.fixture(
    params=[
        pytest.param(
            name, marks=pytest.mark.slow if name in ("SharedUpdates", "CloneThenTune") else ()
        )
        for name in POLICIES
    ],
    scope="module",
)
def policy(request):
    return POLICIES[request.param]


@pytest.fixture(scope="module")
def outcome(policy, two_group_problem):
    return run(policy, two_group_problem)


def test_losses_belong_to_the_returned_bank(policy, outcome, two_group_problem):
    result = outcome.result
    again = jc.evaluate(two_group_problem.with_bank(outcome.bank), result.finalists).loss
    np.testing.assert_allclose(result.finalist_losses, again, rtol=1e-5)
    front = jc.front(result)
    again = jc.evaluate(two_group_problem.with_bank(outcome.bank), front.chains).loss
    np.testing.assert_allclose(front.loss, again, rtol=1e-5)
    assert (front.loss[-1], front.cost[-1]) == (result.best_loss, result.best_cost)
    assert result.finalist_costs[0] == result.best_cost
    assert result.best_loss == result.finalist_losses[0] == min(result.finalist_losses)
    np.testing.assert_array_equal(result.best_chain, result.finalists[0])
    assert result.curve.best_loss[-1] == pytest.approx(result.best_loss)


def test_the_budget_covers_search_and_gradient_steps(policy, outcome):
    result = outcome.result
    assert 0.3 * BUDGET < result.layer_calls <= BUDGET
    assert result.curve.layer_calls[-1] == result.layer_calls
    assert (np.diff(result.curve.layer_calls) >= 0).all()
    assert (outcome.update_calls > 0) == (not isinstance(policy, updates.Frozen))
    if isinstance(policy, updates.SharedUpdates):  # chains of all steps, not just of the last part
        assert result.num_scored > AGENT.num_chains * len(result.curve.layer_calls)
    if isinstance(policy, updates.CloneThenTune):  # plus one chain of copies per round
        assert result.num_scored % AGENT.num_chains == policy.num_rounds


def test_the_same_key_gives_the_same_outcome(policy, outcome, two_group_problem):
    again = run(policy, two_group_problem)
    assert again.result.best_loss == outcome.result.best_loss
    assert is_equal(again.bank, outcome.bank)


def test_a_bank_can_be_saved_with_its_versions(outcome, tmp_path):
    outcome.bank.save(tmp_path / "bank.safetensors")
    assert is_equal(jc.Bank.load(tmp_path / "bank.safetensors"), outcome.bank)


def test_origins_name_the_updates(policy, outcome, two_group_problem):
    bank, versions = outcome.bank, np.asarray(outcome.bank.get_versions())
    old = dict(zip(two_group_problem.bank.names, two_group_problem.bank.origins, strict=True))
    for name, origin, version in zip(bank.names, bank.origins, versions, strict=True):
        expected = (
            "trained while searching"
            if isinstance(policy, updates.SharedUpdates)
            else "5 gradient steps from"
        )
        assert origin.startswith(expected) == (version > 0)
        assert version > 0 or old.get(name, origin) == origin


def test_a_training_split_that_does_not_fit_raises(policy, problem):
    if isinstance(policy, updates.Frozen):
        return
    with pytest.raises(ValueError, match="does not take"):
        policy.run(
            jax.random.key(0), AGENT, problem, jc.Batch(TRAIN.x[:, :3], TRAIN.y), budget=BUDGET
        )


@pytest.mark.parametrize(
    ("make_policy", "message"),
    [
        (lambda: updates.TuneFound(num_steps=0), "num_steps to be at least 1"),
        (lambda: updates.CloneThenTune(num_rounds=0), "num_rounds to be at least 1"),
        (lambda: updates.CloneThenTune(capacity=0), "capacity to be at least 1"),
        (lambda: updates.SharedUpdates(num_updates=0), "num_updates to be at least 1"),
        (lambda: updates.SharedUpdates(final_share=1.0), "final_share above 0 and below 1"),
    ],
)
def test_sizes_out_of_range_raise(make_policy, message):
    with pytest.raises(ValueError, match=message):
        make_policy()


@pytest.mark.parametrize("name", ["TuneFound", "CloneThenTune"])
def test_a_budget_used_up_by_gradient_steps_raises(problem, name):
    with pytest.raises(ValueError, match=r"more than the [0-9,]+ layer calls of gradient steps"):
        run(POLICIES[name], problem, budget=100)


@pytest.mark.parametrize("name", ["CloneThenTune", "SharedUpdates"])
def test_arguments_out_of_range_raise(problem, name):
    with pytest.raises(ValueError, match="expected num_finalists to be at least 1, got 0"):
        run(POLICIES[name], problem, num_finalists=0)
    with pytest.raises(ValueError, match="budget to be at most"):
        run(POLICIES[name], problem, budget=2**31)


def break_layer(problem, token):
    """Make the weights of one layer or head so large that its outputs overflow."""
    params = jax.tree.map(lambda leaf: leaf + 1e30, problem.bank.get_params(token))
    return problem.with_bank(problem.bank.replace([token], [params]))


@pytest.mark.slow
def test_a_layer_that_overflows_leaves_other_layers_finite(policy, two_group_problem):
    if isinstance(policy, updates.Frozen):
        return
    # The shapes are the same as in the tests above, so the compiled program is reused.
    outcome = run(policy, break_layer(two_group_problem, 1))
    assert np.isfinite(outcome.result.best_loss)
    for token in (0, 2, 3, 4):
        assert all(
            np.isfinite(leaf).all() for leaf in jax.tree.leaves(outcome.bank.get_params(token))
        )


@pytest.mark.parametrize(
    "name", ["Frozen", "TuneFound", pytest.param("CloneThenTune", marks=pytest.mark.slow)]
)
def test_policies_begin_at_the_parents_of_the_bank(name, two_group_problem):
    bank = two_group_problem.bank
    parent = (0, 3, bank.num_layers + 1)
    problem = two_group_problem.with_bank(dataclasses.replace(bank, parents=(parent,)))
    result = run(POLICIES[name], problem).result
    chain = jc.chain.pad([parent], problem.max_layers)
    loss = jc.evaluate(problem, chain).loss[0]
    assert (result.curve.layer_calls[0], result.curve.best_loss[0]) == (2, pytest.approx(loss))
    assert result.best_loss <= loss


def test_a_budget_is_checked_on_a_bank_of_any_weights(policy, two_group_problem):
    other = jax.tree.map(lambda leaf: leaf * 0.5, two_group_problem.bank)
    problem = two_group_problem.with_bank(other)
    search = AGENT if isinstance(policy, updates.SharedUpdates | updates.CloneThenTune) else SEARCH
    check = partial(policy.check_budget, jax.random.key(0), search, problem, TRAIN)
    check(budget=BUDGET)
    reserved = {"TuneFound": 60, "CloneThenTune": 180}.get(type(policy).__name__, 0)
    for budget in (3, reserved + 3):
        with pytest.raises(ValueError, match=f"got {budget}$") as checked:
            check(budget=budget)
        with pytest.raises(ValueError, match=f"got {budget}$") as ran:
            run(policy, two_group_problem, budget=budget)
        assert str(checked.value) == str(ran.value)


@pytest.mark.slow
def test_the_least_budget_is_named_exactly(two_group_problem):
    policy = POLICIES["Frozen"]
    check = partial(policy.check_budget, jax.random.key(0), SEARCH, two_group_problem, TRAIN)
    starts = [[0, 1, 5], [2, 5]]
    with pytest.raises(jc.BudgetError, match="in addition to 3 for the starts") as error:
        check(budget=3, starts=starts)
    least = error.value.cost + error.value.reserved
    assert f"{least} in all, got 3" in str(error.value)
    check(budget=least, starts=starts)
    with pytest.raises(jc.BudgetError):
        check(budget=least - 1, starts=starts)
