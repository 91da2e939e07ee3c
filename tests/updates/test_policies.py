import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import make_batch

import jchain as jc
from jchain import updates
from jchain.pytree import pytree_dataclass
from jchain.updates.clones import CloneBank

SEARCH = jc.LocalSearch(num_chains=3)
AGENT = jc.ActorCritic(encoding=jc.TokenEncoding(features=8), num_chains=6, num_elites=4)
ADAM = optax.adam(0.01)
POLICIES = {
    "Frozen": updates.Frozen(),
    "TuneFound": updates.TuneFound(num_steps=5, optimizer=ADAM),
    "CloneThenTune": updates.CloneThenTune(num_rounds=3, num_steps=5, optimizer=ADAM),
    "SharedUpdates": updates.SharedUpdates(num_updates=2, optimizer=ADAM),
}
BUDGET = 1200
TRAIN = make_batch(20, seed=7)


def run(policy, problem, search=None, seed=0, budget=BUDGET, **kwargs):
    if search is None:  # an agent where the policy needs one, or its bank grows
        search = (
            AGENT if isinstance(policy, (updates.SharedUpdates, updates.CloneThenTune)) else SEARCH
        )
    return policy.run(jax.random.key(seed), search, problem, TRAIN, budget=budget, **kwargs)


def same(a, b):
    return all(
        np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


def test_every_policy_is_in_the_contract():
    found = {name for name, cls in vars(updates).items() if hasattr(cls, "run")}
    assert found == {*POLICIES, "Policy"}
    assert all(isinstance(policy, updates.Policy) for policy in POLICIES.values())


@pytest.fixture(params=POLICIES, scope="module")
def policy(request):
    return POLICIES[request.param]


@pytest.fixture(scope="module")
def outcome(policy, two_group_problem):
    return run(policy, two_group_problem)


def test_losses_are_those_of_the_bank_that_is_returned(policy, outcome, two_group_problem):
    result = outcome.result
    again = jc.evaluate(two_group_problem.with_bank(outcome.bank), result.finalists).loss
    np.testing.assert_allclose(result.finalist_losses, again, rtol=1e-5)
    assert result.best_loss == result.finalist_losses[0] == min(result.finalist_losses)
    np.testing.assert_array_equal(result.best_chain, result.finalists[0])
    assert result.curve.best_loss[-1] == pytest.approx(result.best_loss)


def test_the_budget_holds_for_search_and_gradient_steps_together(policy, outcome):
    result = outcome.result
    assert 0.3 * BUDGET < result.layer_calls <= BUDGET
    assert result.curve.layer_calls[-1] == result.layer_calls
    assert (np.diff(result.curve.layer_calls) >= 0).all()
    assert (outcome.update_calls > 0) == (not isinstance(policy, updates.Frozen))
    if isinstance(policy, updates.SharedUpdates):  # of all steps, not of the last part alone
        assert result.num_chains > AGENT.num_chains * len(result.curve.layer_calls)
    if isinstance(policy, updates.CloneThenTune):  # with the chain of copies of each round
        assert result.num_chains % AGENT.num_chains == policy.num_rounds


def test_the_same_key_gives_the_same_outcome(policy, outcome, two_group_problem):
    again = run(policy, two_group_problem)
    assert again.result.best_loss == outcome.result.best_loss
    assert same(again.bank, outcome.bank)


def test_a_bank_can_be_saved_with_its_versions(outcome, tmp_path):
    outcome.bank.save(tmp_path / "bank.safetensors")
    assert same(jc.Bank.load(tmp_path / "bank.safetensors"), outcome.bank)


def test_origins_tell_which_weights_were_updated(policy, outcome, two_group_problem):
    bank, versions = outcome.bank, np.asarray(outcome.bank.get_versions())
    old = dict(zip(two_group_problem.bank.names, two_group_problem.bank.origins, strict=True))
    for name, origin, version in zip(bank.names, bank.origins, versions, strict=True):
        said = (
            "trained while searching"
            if isinstance(policy, updates.SharedUpdates)
            else "5 gradient steps from"
        )
        assert origin.startswith(said) == (version > 0)
        assert version > 0 or old.get(name, origin) == origin


def test_a_split_that_does_not_fit_is_refused_before_anything(policy, problem):
    if isinstance(policy, updates.Frozen):
        return
    with pytest.raises(ValueError, match="does not take"):
        policy.run(
            jax.random.key(0), AGENT, problem, jc.Batch(TRAIN.x[:, :3], TRAIN.y), budget=BUDGET
        )


def test_frozen_leaves_every_byte(two_group_problem, tmp_path):
    problem = two_group_problem
    problem.bank.save(tmp_path / "before")
    outcome = run(POLICIES["Frozen"], problem)
    outcome.bank.save(tmp_path / "after")
    assert (tmp_path / "before").read_bytes() == (tmp_path / "after").read_bytes()
    alone = jc.run(jax.random.key(0), SEARCH, problem, budget=BUDGET)
    assert alone.best_loss == outcome.result.best_loss


def test_tuning_lowers_the_loss_of_the_chain_that_was_found(two_group_problem):
    policy = dataclasses.replace(POLICIES["TuneFound"], num_steps=30)
    # Gradients see the split of the problem itself, so that they must help.
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


def test_tuning_that_does_harm_is_undone(two_group_problem):
    outcome = run(
        dataclasses.replace(POLICIES["TuneFound"], optimizer=optax.sgd(1e3)), two_group_problem
    )
    assert outcome.bank is two_group_problem.bank
    assert len(outcome.result.finalists) > 1
    assert outcome.update_calls > 0


def test_clones_join_the_bank_and_leave_their_parents(two_group_problem):
    before = two_group_problem.bank
    bank = run(POLICIES["CloneThenTune"], two_group_problem).bank
    for token in range(5):
        assert same(bank.get_params(token), before.get_params(token))
        assert bank.names[token] == before.names[token]
    for head in range(2):
        assert same(bank.get_params(bank.num_layers + head), before.get_params(5 + head))
    # Three rounds of up to three layers, for each of two modules.
    assert bank.num_layers == 5 + 2 * 9
    is_clone = np.asarray(bank.get_versions()) > 0
    assert 1 <= is_clone.sum() <= 9
    for token in np.flatnonzero(is_clone):
        parent = bank.names[token].removesuffix(f"+{token}")
        assert bank.origins[token] == f"5 gradient steps from a copy of {parent}"
        source = bank.names.index(parent)
        assert not same(bank.get_params(int(token)), bank.get_params(source))
    for token in np.flatnonzero(~is_clone[: bank.num_layers]):
        assert (token < 5) == (not bank.names[token].startswith("place"))


@pytest.mark.slow
def test_no_more_clones_than_places(problem):
    policy = dataclasses.replace(POLICIES["CloneThenTune"], capacity=2)
    bank = run(policy, problem).bank
    assert bank.num_layers == problem.bank.num_layers + 2
    assert (np.asarray(bank.get_versions()) > 0).sum() <= 2
    assert same(bank.get_params(0), problem.bank.get_params(0))


def test_places_are_named_after_the_layers_of_which_they_hold_copies(two_group_problem):
    clone_bank = CloneBank.reserve(two_group_problem.bank, 4)
    chains = np.array([[5, 8, 13, -1], [4, 12, 14, -1]])
    renamed = clone_bank.replace_free_tokens(jnp.asarray(chains))
    np.testing.assert_array_equal(renamed, [[0, 0, 13, -1], [4, 4, 14, -1]])
    grown = two_group_problem.with_bank(clone_bank.bank)
    np.testing.assert_array_equal(jc.evaluate(grown, chains).loss, jc.evaluate(grown, renamed).loss)


def test_banks_without_names_have_clones_too(two_group_problem):
    clone_bank = CloneBank.reserve(two_group_problem.bank.without_names(), 4)
    chain = np.array([0, 13, -1, -1])
    clone_bank, clones = clone_bank.tune_clones(
        jax.random.key(0), two_group_problem.without_names(), chain, num_steps=1, optimizer=ADAM
    )
    assert clones[0] != 0
    assert not clone_bank.bank.names


def test_chains_to_begin_at_are_no_chains_of_a_bank_that_grows(problem):
    search = jc.LocalSearch(starts=np.array([[0, 4, -1, -1]]))
    with pytest.raises(ValueError, match="expected a search without starts"):
        run(POLICIES["CloneThenTune"], problem, search=search)


def test_a_budget_below_a_step_says_what_gradient_steps_take(problem):
    reserved = jc.updates.tune.training_cost(3, 20, 9, 5) + 3
    message = rf"costs [0-9]+ layer calls here besides {reserved} reserved for gradient steps, got {reserved + 1}"
    with pytest.raises(ValueError, match=message):
        run(POLICIES["TuneFound"], problem, search=jc.RandomSearch(16), budget=reserved + 1)


class Counting(jc.ActorCritic):
    num_traces = 0

    def step(self, key, state, problem):
        Counting.num_traces += 1
        return super().step(key, state, problem)


@pytest.mark.slow
def test_all_rounds_are_one_program(problem):
    search = pytree_dataclass(Counting)(
        encoding=jc.TokenEncoding(features=8), num_chains=6, num_elites=4
    )
    run(POLICIES["CloneThenTune"], problem, search)
    once = Counting.num_traces
    run(
        dataclasses.replace(POLICIES["CloneThenTune"], num_rounds=9, capacity=9),
        problem,
        search,
        seed=1,
    )
    assert Counting.num_traces == once


@pytest.mark.slow
def test_a_search_that_cannot_go_on_starts_anew(problem):
    outcome = run(POLICIES["CloneThenTune"], problem, jc.LocalSearch(num_chains=3))
    again = jc.evaluate(problem.with_bank(outcome.bank), outcome.result.finalists).loss
    np.testing.assert_allclose(outcome.result.finalist_losses, again, rtol=1e-5)


def test_shared_updates_need_a_search_that_can_go_on(problem):
    with pytest.raises(ValueError, match="method refresh, as ActorCritic, got LocalSearch"):
        run(POLICIES["SharedUpdates"], problem, jc.LocalSearch(num_chains=3))


def test_shared_updates_train_what_is_sampled(two_group_problem):
    outcome = run(POLICIES["SharedUpdates"], two_group_problem)
    versions = np.asarray(outcome.bank.get_versions())
    assert versions.sum() > 10
    for token in range(7):
        is_same = same(outcome.bank.get_params(token), two_group_problem.bank.get_params(token))
        assert is_same == (versions[token] == 0)


@pytest.mark.parametrize(
    ("policy", "words"),
    [
        (lambda: updates.TuneFound(num_steps=0), "num_steps of at least 1"),
        (lambda: updates.CloneThenTune(num_rounds=0), "num_rounds of at least 1"),
        (lambda: updates.CloneThenTune(capacity=0), "capacity of at least 1"),
        (lambda: updates.SharedUpdates(num_updates=0), "num_updates of at least 1"),
        (lambda: updates.SharedUpdates(final_share=1.0), "final_share above 0 and below 1"),
    ],
)
def test_bad_options_are_refused(policy, words):
    with pytest.raises(ValueError, match=words):
        policy()


@pytest.mark.parametrize("name", ["TuneFound", "CloneThenTune"])
def test_a_budget_that_gradient_steps_use_up_is_refused(problem, name):
    with pytest.raises(ValueError, match=r"more than the [0-9,]+ layer calls of gradient steps"):
        run(POLICIES[name], problem, budget=100)


@pytree_dataclass
class InTurn:
    """Scores all chains one after another, for as many calls each as it is told; going on costs something too."""

    cost: int = 7
    cost_again: int = 11

    def init(self, key, problem):
        return jnp.array(0)

    def step(self, key, state, problem):
        sizes = (4, problem.bank.num_heads, problem.max_layers)
        chains = jnp.asarray(jc.chain.enumerate_all(*sizes))
        # Heads come behind the places for copies.
        chain = jnp.where(
            chains[state] >= 4, chains[state] + problem.bank.num_layers - 4, chains[state]
        )
        return state + 1, jc.Info(
            chain[None], jc.evaluate(problem, chain[None]).loss, jnp.asarray(self.cost)
        )

    def refresh(self, state, problem, chains):
        return state, jnp.asarray(self.cost_again)


@pytest.mark.parametrize("budget", [pytest.param(1200, marks=pytest.mark.slow), 1203])
def test_rounds_are_charged_exactly_and_no_step_is_taken_that_is_not_counted(problem, budget):
    policy = POLICIES["CloneThenTune"]
    outcome = run(policy, problem, InTurn(), budget=budget, num_finalists=200)
    result, bank = outcome.result, outcome.bank
    clones = [
        row
        for row in result.finalists.tolist()
        if any(bank.get_versions()[token] for token in row if token >= 0)
    ]
    others = sorted(tuple(row) for row in result.finalists.tolist() if row not in clones)
    num_steps = len(result.curve.layer_calls) - len(clones)
    expected = jc.chain.enumerate_all(4, 2, 3)[:num_steps]
    expected = np.where(expected >= 4, expected + bank.num_layers - 4, expected)
    assert others == sorted(map(tuple, expected.tolist()))
    length = sum(sum(token >= 0 for token in row) - 1 for row in clones)
    assert outcome.update_calls == sum(
        jc.updates.tune.training_cost(sum(t >= 0 for t in row) - 1, 20, 9, 5) for row in clones
    )
    assert result.layer_calls == 7 * num_steps + outcome.update_calls + length + 11 * (
        policy.num_rounds - 1
    )


def test_what_going_on_costs_does_not_pass_the_budget(problem):
    outcome = run(POLICIES["CloneThenTune"], problem, InTurn(cost_again=10_000))
    assert outcome.result.layer_calls <= BUDGET
    assert np.isfinite(outcome.result.best_loss)


def broken(problem, token):
    """The same problem with a layer or head that makes everything overflow."""
    params = jax.tree.map(lambda leaf: leaf + 1e30, problem.bank.get_params(token))
    return problem.with_bank(problem.bank.replace([token], [params]))


@pytest.mark.slow
def test_a_layer_that_overflows_spoils_nothing_else(policy, two_group_problem):
    if isinstance(policy, updates.Frozen):
        return
    # Of the same shapes as above, so that it needs no program of its own.
    outcome = run(policy, broken(two_group_problem, 1))
    assert np.isfinite(outcome.result.best_loss)
    for token in (0, 2, 3, 4):
        assert all(
            np.isfinite(leaf).all() for leaf in jax.tree.leaves(outcome.bank.get_params(token))
        )


@pytest.mark.slow
def test_an_outcome_can_be_searched_again(policy, outcome, two_group_problem):
    if isinstance(policy, updates.CloneThenTune):
        again = run(policy, two_group_problem.with_bank(outcome.bank), budget=BUDGET)
        assert again.bank.num_layers == outcome.bank.num_layers + 2 * 9
        assert len(set(again.bank.names)) == len(again.bank.names)


@pytest.mark.slow
def test_chains_without_layers_end_a_search(problem):
    bare = jc.Problem(problem.bank, problem.data, max_layers=0)
    outcome = run(POLICIES["SharedUpdates"], bare)
    assert outcome.result.layer_calls == 0
    assert np.isfinite(outcome.result.best_loss)


def test_a_budget_without_a_round_of_shared_updates_is_refused(two_group_problem):
    with pytest.raises(
        ValueError,
        match="75% pay for a step of the search with its gradient steps, [0-9]+ layer calls here",
    ):
        run(POLICIES["SharedUpdates"], two_group_problem, budget=10)


@pytest.mark.parametrize("name", ["CloneThenTune", "SharedUpdates"])
def test_what_no_run_can_begin_with_is_refused(problem, name):
    with pytest.raises(ValueError, match="num_finalists of at least 1, got 1200 and 0"):
        run(POLICIES[name], problem, num_finalists=0)
    with pytest.raises(ValueError, match="budget of at most"):
        run(POLICIES[name], problem, budget=2**31)
