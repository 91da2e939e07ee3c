import jax
import numpy as np
import pytest

import jchain as jc
from jchain.agent.observations import NUM_FEATURES, observe
from jchain.chainbench import tabular


@pytest.fixture(scope="module")
def pair(problem):
    """A problem and its tabular form."""
    _, out = jc.evaluate_all(problem)
    features = np.concatenate(
        [level.features for level in jc.agent.pretrain.observe_prefixes(problem)]
    )
    return problem, tabular.make_problem(
        problem.bank, np.asarray(out.loss), problem.max_layers, features
    )


def test_every_chain_has_its_loss(pair):
    problem, tabular_problem = pair
    chains, out = jc.evaluate_all(problem)
    rows = np.random.default_rng(0).permutation(len(chains))
    found = jc.evaluate(tabular_problem, chains[rows])
    np.testing.assert_array_equal(found.loss, np.asarray(out.loss)[rows])
    assert found.layer_calls == jc.evaluate(problem, chains[rows]).layer_calls


def test_features_equal_those_of_the_prefix(pair):
    problem, tabular_problem = pair
    for prefix in ((), (2,), (3, 0)):
        hidden, number = problem.bank.embed(problem.data.x), tabular_problem.data.x
        parent, before = hidden, number
        for token in prefix:
            parent, before = hidden, number
            hidden = problem.bank.layers[0].apply(token, hidden)
            number = tabular_problem.bank.layers[0].apply(token, number)
        expected, found = (
            observe(problem, hidden, parent),
            tabular.observe(tabular_problem, number, before),
        )
        np.testing.assert_allclose(found.loss, expected.loss, rtol=1e-5)
        np.testing.assert_allclose(found.features, expected.features, rtol=1e-3, atol=1e-4)
        assert np.any(found.features)


@pytest.mark.parametrize(
    ("search", "tabular_search"),
    [
        pytest.param(jc.LocalSearch(), jc.LocalSearch(), marks=pytest.mark.slow),
        (jc.CriticSearch(), jc.CriticSearch(observe=tabular.observe)),
    ],
    ids=["LocalSearch", "CriticSearch"],
)
def test_a_search_scores_the_same_chains(pair, search, tabular_search):
    problem, tabular_problem = pair
    key = jax.random.key(3)
    expected = jc.run(key, search, problem, budget=150)
    found = jc.run(key, tabular_search, tabular_problem, budget=150)
    np.testing.assert_array_equal(found.curve.layer_calls, expected.curve.layer_calls)
    np.testing.assert_allclose(found.curve.best_loss, expected.curve.best_loss, rtol=1e-5)
    np.testing.assert_array_equal(found.best_chain, expected.best_chain)


def test_entry_features_equal_those_of_the_weights(pair, two_group_bank):
    problem, tabular_problem = pair
    grouped = jc.Problem(two_group_bank, problem.data, max_layers=1)
    loss = np.asarray(jc.evaluate_all(grouped)[1].loss)
    for bank, tabular_bank in (
        (problem.bank, tabular_problem.bank),
        (two_group_bank, tabular.make_problem(two_group_bank, loss, 1).bank),
    ):
        np.testing.assert_array_equal(
            tabular.entry_features(tabular_bank), jc.agent.encoding.entry_features(bank)
        )
    with pytest.raises(
        ValueError,
        match=r"expected the bank of a problem that jchain.chainbench.tabular.make_problem made",
    ):
        tabular.entry_features(problem.bank)


def test_an_infinite_loss_stays_infinite(problem):
    loss = np.asarray(jc.evaluate_all(problem)[1].loss).copy()
    loss[7] = np.inf
    tabular_problem = tabular.make_problem(problem.bank, loss, problem.max_layers)
    out = jc.evaluate_all(tabular_problem)[1].loss
    np.testing.assert_array_equal(out, loss)


def test_the_table_has_all_chains_even_with_min_layers(pair):
    problem, _ = pair
    chains, out = jc.evaluate_all(problem)
    loss = np.asarray(out.loss)
    tabular_problem = tabular.make_problem(problem.bank, loss, problem.max_layers, min_layers=2)
    long, found = jc.evaluate_all(tabular_problem)
    is_long = chains[:, 2] >= 0  # a third token means two layers
    np.testing.assert_array_equal(long, chains[is_long])
    np.testing.assert_array_equal(found.loss, loss[is_long])
    with pytest.raises(
        ValueError, match=f"expected the losses of all {len(loss):,} chains, got shape"
    ):
        tabular.make_problem(problem.bank, loss[is_long], problem.max_layers, min_layers=2)


def test_tables_of_other_sizes_raise(problem):
    loss = np.asarray(jc.evaluate_all(problem)[1].loss)
    with pytest.raises(
        ValueError, match=f"expected the losses of all {len(loss):,} chains, got shape"
    ):
        tabular.make_problem(problem.bank, loss[:-1], problem.max_layers)
    for shape in ((5, 0), (len(loss), NUM_FEATURES)):
        with pytest.raises(ValueError, match="expected features .V, F. of at most"):
            tabular.make_problem(problem.bank, loss, problem.max_layers, np.zeros(shape))


def test_missing_features_raise(problem):
    loss = np.asarray(jc.evaluate_all(problem)[1].loss)
    for other in (problem, tabular.make_problem(problem.bank, loss, problem.max_layers)):
        with pytest.raises(
            ValueError,
            match="expected a problem that .*make_problem made with features",
        ):
            jc.run(jax.random.key(0), jc.CriticSearch(observe=tabular.observe), other, budget=50)


def test_features_of_any_number_are_looked_up_but_a_search_may_need_its_own(problem):
    loss = np.asarray(jc.evaluate_all(problem)[1].loss)
    features = np.random.default_rng(0).normal(size=(85, 20)).astype(np.float32)
    tabular_problem = tabular.make_problem(problem.bank, loss, problem.max_layers, features)
    number = tabular_problem.bank.layers[0].apply(2, tabular_problem.data.x)
    np.testing.assert_array_equal(
        tabular.observe(tabular_problem, number, number).features, features[3]
    )
    with pytest.raises(
        ValueError, match=f"expected {NUM_FEATURES} features of a prefix, got shape .20."
    ):
        jc.run(
            jax.random.key(0), jc.CriticSearch(observe=tabular.observe), tabular_problem, budget=50
        )


@pytest.mark.slow
def test_an_observing_agent_samples_the_same_chains(problem):
    """Features from the table and features from applied layers lead to the same chains."""
    observe = jc.agent.observations.Join(
        (jc.agent.observations.observe_activations, jc.agent.observations.observe_gradients)
    )
    tabular_problem = tabular.tabulate(problem, observe)
    np.testing.assert_allclose(
        jc.evaluate_all(tabular_problem)[1].loss, jc.evaluate_all(problem)[1].loss, rtol=1e-5
    )
    key = jax.random.key(0)
    results = [
        jc.run(
            key,
            jc.ActorCritic(jc.ObservedEncoding(observe_fn, 8), 6, 1, entry_features=entries),
            target,
            budget=60,
        )
        for observe_fn, entries, target in (
            (observe, jc.agent.encoding.entry_features, problem),
            (tabular.observe, tabular.entry_features, tabular_problem),
        )
    ]
    np.testing.assert_array_equal(results[0].curve.layer_calls, results[1].curve.layer_calls)
    np.testing.assert_allclose(results[0].curve.best_loss, results[1].curve.best_loss, rtol=1e-5)


def test_every_prefix_is_tabulated(bank, problem):
    """This includes prefixes with the maximum number of layers, and layer penalties."""
    penalized = jc.Problem(bank, problem.data, 2, layer_cost=[0.1, 0.0, 0.3, 0.02])
    tabular_problem = tabular.tabulate(penalized, observe)
    np.testing.assert_allclose(
        jc.evaluate_all(tabular_problem)[1].loss, jc.evaluate_all(penalized)[1].loss, rtol=1e-5
    )
    layers, numbers = bank.layers[0], tabular_problem.bank.layers[0]
    parent, before = layers.apply(3, problem.data.x), numbers.apply(3, tabular_problem.data.x)
    hidden, number = layers.apply(1, parent), numbers.apply(1, before)
    expected, found = (
        observe(penalized, hidden, parent),
        tabular.observe(tabular_problem, number, before),
    )
    np.testing.assert_allclose(found.features, expected.features, rtol=1e-3, atol=1e-4)
    with pytest.raises(ValueError, match="expected at most 16,777,216 prefixes, got"):
        tabular.tabulate(jc.Problem(bank, problem.data, 13), observe)


@pytest.mark.slow
def test_a_limit_of_the_cost_is_tabulated(problem):
    cost = [1.0, 2.0, 3.0, 4.0, 0.5, 0.2]
    limited = jc.Problem(
        problem.bank, problem.data, 2, min_layers=1, token_costs=cost, max_cost=4.0
    )
    chains, out = jc.evaluate_all(limited)
    tabular = jc.chainbench.tabular.tabulate(limited, jc.agent.observations.observe)
    assert 0 < np.isinf(out.loss).sum() < len(chains)
    np.testing.assert_allclose(jc.evaluate(tabular, chains).loss, out.loss, rtol=1e-5)
