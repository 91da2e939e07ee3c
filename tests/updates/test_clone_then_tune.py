import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from policy_cases import BUDGET, POLICIES, is_equal, run

import jchain as jc
from jchain.pytree import pytree_dataclass


@pytest.mark.slow
def test_clones_join_the_bank_and_their_sources_stay_unchanged(two_group_problem):
    before = two_group_problem.bank
    bank = run(POLICIES["CloneThenTune"], two_group_problem).bank
    for token in range(5):
        assert is_equal(bank.get_params(token), before.get_params(token))
        assert bank.names[token] == before.names[token]
    for head in range(2):
        assert is_equal(bank.get_params(bank.num_layers + head), before.get_params(5 + head))
    # Each of two modules has 9 tokens: three rounds of up to three layers.
    assert bank.num_layers == 5 + 2 * 9
    is_clone = np.asarray(bank.get_versions()) > 0
    assert 1 <= is_clone.sum() <= 9
    for token in np.flatnonzero(is_clone):
        parent = bank.names[token].removesuffix(f"+{token}")
        assert bank.origins[token] == f"5 gradient steps from a copy of {parent}"
        source = bank.names.index(parent)
        assert not is_equal(bank.get_params(int(token)), bank.get_params(source))
    for token in np.flatnonzero(~is_clone[: bank.num_layers]):
        assert (token < 5) == (not bank.names[token].startswith("spare"))


@pytest.mark.slow
def test_capacity_limits_the_number_of_clones(problem):
    policy = dataclasses.replace(POLICIES["CloneThenTune"], capacity=2)
    bank = run(policy, problem).bank
    assert bank.num_layers == problem.bank.num_layers + 2
    assert (np.asarray(bank.get_versions()) > 0).sum() <= 2
    assert is_equal(bank.get_params(0), problem.bank.get_params(0))


class Counting(jc.ActorCritic):
    num_traces = 0

    def step(self, key, state, problem):
        Counting.num_traces += 1
        return super().step(key, state, problem)


@pytest.mark.slow
def test_all_rounds_share_one_program(problem):
    search = pytree_dataclass(Counting)(
        encoding=jc.TokenEncoding(features=8), num_chains=6, num_elites=4
    )
    run(POLICIES["CloneThenTune"], problem, search)
    num_traces_of_first_run = Counting.num_traces
    run(
        dataclasses.replace(POLICIES["CloneThenTune"], num_rounds=9, capacity=9),
        problem,
        search,
        seed=1,
    )
    assert Counting.num_traces == num_traces_of_first_run


@pytest.mark.slow
def test_a_search_without_refresh_restarts(problem):
    outcome = run(POLICIES["CloneThenTune"], problem, jc.LocalSearch(num_chains=3))
    again = jc.evaluate(problem.with_bank(outcome.bank), outcome.result.finalists).loss
    np.testing.assert_allclose(outcome.result.finalist_losses, again, rtol=1e-5)


@pytree_dataclass
class InOrder:
    """A search that scores all chains in order, at a given cost per chain and per refresh."""

    cost: int = 7
    refresh_cost: int = 11

    def init(self, key, problem):
        return jnp.array(0)

    def step(self, key, state, problem):
        space = jc.chain.ChainSpace(4, problem.bank.num_heads, problem.max_layers)
        chains = jnp.asarray(space.enumerate())
        # Head tokens come after the tokens reserved for copies.
        chain = jnp.where(
            chains[state] >= 4, chains[state] + problem.bank.num_layers - 4, chains[state]
        )
        return state + 1, jc.Info(
            chain[None], jc.evaluate(problem, chain[None]).loss, jnp.asarray(self.cost)
        )

    def refresh(self, state, problem, chains):
        return state, jnp.asarray(self.refresh_cost)


@pytest.mark.parametrize("budget", [pytest.param(1200, marks=pytest.mark.slow), 1203])
def test_rounds_are_charged_exactly_and_no_chain_is_scored_uncounted(problem, budget):
    policy = POLICIES["CloneThenTune"]
    outcome = run(policy, problem, InOrder(), budget=budget, num_finalists=200)
    result, bank = outcome.result, outcome.bank
    clones = [
        row
        for row in result.finalists.tolist()
        if any(bank.get_versions()[token] for token in row if token >= 0)
    ]
    others = sorted(tuple(row) for row in result.finalists.tolist() if row not in clones)
    num_steps = len(result.curve.layer_calls) - len(clones)
    expected = problem.space.enumerate()[:num_steps]
    expected = np.where(expected >= 4, expected + bank.num_layers - 4, expected)
    assert others == sorted(map(tuple, expected.tolist()))
    length = sum(sum(token >= 0 for token in row) - 1 for row in clones)
    assert outcome.update_calls == sum(
        jc.updates.tune.training_cost(sum(t >= 0 for t in row) - 1, 20, 9, 5) for row in clones
    )
    assert result.layer_calls == 7 * num_steps + outcome.update_calls + length + 11 * (
        policy.num_rounds - 1
    )


def test_the_cost_of_a_refresh_does_not_exceed_the_budget(problem):
    outcome = run(POLICIES["CloneThenTune"], problem, InOrder(refresh_cost=10_000))
    assert outcome.result.layer_calls <= BUDGET
    assert np.isfinite(outcome.result.best_loss)


@pytest.mark.slow
def test_the_bank_of_an_outcome_can_be_searched_again(two_group_problem):
    policy = POLICIES["CloneThenTune"]
    outcome = run(policy, two_group_problem)
    again = run(policy, two_group_problem.with_bank(outcome.bank), budget=BUDGET)
    assert again.bank.num_layers == outcome.bank.num_layers + 2 * 9
    assert len(set(again.bank.names)) == len(again.bank.names)


def test_a_problem_with_costs_raises(problem):
    problem = jc.Problem(problem.bank, problem.data, 3, token_costs=np.ones(6))
    with pytest.raises(ValueError, match="expected a problem without token_costs"):
        run(POLICIES["CloneThenTune"], problem)
