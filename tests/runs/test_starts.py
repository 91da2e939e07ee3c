"""Runs that begin at given chains."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import make_bank, make_batch
from small_searches import SEARCHES

import jchain as jc
from jchain.runs.result import StopRule
from jchain.runs.starts import begin_at, list_starts
from jchain.runs.stepping import init_runs
from jchain.search.protocol import Startable

# These continue along the activations of prefixes of their own; starts are scored beside them.
APART = ("BeamSearch", "RemovalSearch", "MCTS", "SuffixBeamSearch")


@pytest.fixture(scope="module")
def problem():
    return jc.Problem(make_bank(num_layers=4), make_batch(), max_layers=3)


@pytest.fixture(scope="module")
def starts(problem):
    return np.array([[1, 2, 4, -1], [3, 0, 1, 4], [2, 5, -1, -1]], np.int32)


@pytest.mark.parametrize("name", [name for name in SEARCHES if name not in APART])
def test_a_state_that_begins_at_starts_has_the_shapes_of_any_state(name, problem, starts):
    search = SEARCHES[name]
    assert isinstance(search, Startable)
    state = jax.eval_shape(lambda key: search.init(key, problem), jax.random.key(0))
    began = jax.eval_shape(
        lambda key, state: search.start(key, state, problem, jnp.asarray(starts), jnp.ones(3)),
        jax.random.key(0),
        state,
    )
    assert jax.tree.structure(began) == jax.tree.structure(state)
    assert [x.shape for x in jax.tree.leaves(began)] == [x.shape for x in jax.tree.leaves(state)]


def test_searches_without_a_start_method_are_those_that_say_so():
    assert [name for name in SEARCHES if not isinstance(SEARCHES[name], Startable)] == sorted(
        APART, key=list(SEARCHES).index
    )


@pytest.mark.parametrize(
    "name", ["RandomSearch", "BeamSearch", pytest.param("ActorCritic", marks=pytest.mark.slow)]
)
def test_starts_are_scored_charged_and_never_lost(name, problem, starts):
    out = jc.evaluate(problem, starts)
    result = jc.run(jax.random.key(0), SEARCHES[name], problem, budget=100, starts=starts)
    assert result.curve.layer_calls[0] == out.layer_calls == 6
    assert result.curve.best_loss[0] == out.loss.min()
    assert (np.diff(result.curve.best_loss) <= 0).all()
    assert result.layer_calls == result.curve.layer_calls[-1] <= 100
    rows = map(tuple, result.finalists.tolist())
    kept = dict(zip(rows, result.finalist_losses, strict=True))
    worst = result.finalist_losses[-1]
    for row, loss in zip(starts.tolist(), np.asarray(out.loss), strict=True):
        assert loss > worst or kept[tuple(row)] == pytest.approx(loss, rel=1e-5)


def test_the_parents_of_a_bank_are_the_starts_by_default(problem):
    parents = ((0, 1, 4), (0, 1, 2, 3, 4), (3, 5))
    bank = dataclasses.replace(problem.bank, parents=parents)
    whole = dataclasses.replace(problem, bank=bank, min_layers=2)
    assert list_starts(whole, "parents").tolist() == [[0, 1, 4, -1]]
    assert list_starts(dataclasses.replace(whole, min_layers=0), "parents").tolist() == [
        [0, 1, 4, -1],
        [3, 5, -1, -1],
    ]
    key, search = jax.random.key(1), jc.RandomSearch(num_chains=6)
    result = jc.run(key, search, whole, budget=40)
    assert result.curve.layer_calls[0] == 2
    alone, nothing = (
        jc.run(key, search, one, budget=40, starts=starts)
        for one, starts in ((whole, None), (dataclasses.replace(problem, min_layers=2), "parents"))
    )
    np.testing.assert_array_equal(alone.curve, nothing.curve)


def test_starts_may_be_lists_of_tokens_or_none_at_all(problem):
    assert list_starts(problem, [[0, 4], [1, 2, 3, 5]]).tolist() == [[0, 4, -1, -1], [1, 2, 3, 5]]
    for starts in (None, [], np.zeros((0, 4), np.int32)):
        assert list_starts(problem, starts).shape == (0, 4)


@pytest.mark.parametrize(
    ("starts", "message"),
    [
        (np.array([[0, 4]]), "expected chains of shape"),
        (np.array([0, 1, 2, 4]), r"expected starts of shape \[C, 4\], got \[4\]"),
        ([[0, 1, 99]], "token 99 at slot 2 is out of range"),
        (
            "models",
            "expected starts to be an array or a sequence or one of 'parents' or None, got 'm",
        ),
        ([[0, 4]], "expected starts of at least 2 layers, got one of 1"),
    ],
)
def test_starts_that_are_not_chains_of_the_problem_raise(problem, starts, message):
    problem = dataclasses.replace(problem, min_layers=2)
    with pytest.raises(ValueError, match=message):
        jc.run(jax.random.key(0), jc.RandomSearch(), problem, budget=100, starts=starts)


def test_a_budget_below_the_starts_and_one_step_names_both(problem, starts):
    with pytest.raises(
        jc.BudgetError, match="in addition to 6 for the starts, [0-9]+ in all, got 8"
    ):
        jc.run(jax.random.key(0), SEARCHES["RandomSearch"], problem, budget=8, starts=starts)


def test_a_start_that_reaches_the_target_ends_the_run(problem, starts):
    search, key = SEARCHES["RandomSearch"], jax.random.key(0)
    best = jc.evaluate(problem, starts).loss.min()
    result = jc.run(key, search, problem, budget=50, target_loss=float(best), starts=starts)
    assert (result.layer_calls, result.num_scored, len(result.curve.layer_calls)) == (6, 3, 1)


@pytest.mark.slow
def test_runs_share_their_starts(problem, starts):
    keys, search = jax.random.split(jax.random.key(2), 2), jc.LocalSearch(num_chains=3)
    results = jc.run_many(keys, search, problem, budget=60, starts=starts)
    for key, result in zip(keys, results, strict=True):
        alone = jc.run(key, search, problem, budget=60, starts=starts)
        np.testing.assert_array_equal(alone.curve.layer_calls, result.curve.layer_calls)
        np.testing.assert_allclose(alone.curve.best_loss, result.curve.best_loss, rtol=1e-5)


def test_critic_search_first_walks_along_the_best_start(problem, starts):
    search = jc.CriticSearch(width=16, epsilon=1.0)
    losses = jnp.array([2.0, 1.0, 3.0])
    state = search.init(jax.random.key(0), problem)
    state = search.start(jax.random.key(1), state, problem, jnp.asarray(starts), losses)
    step = jax.jit(search.step)
    for t in range(3):
        state, info = step(jax.random.key(t), state, problem)
        rows = np.asarray(info.chains[problem.space.count_layers(info.chains) == t + 1])
        assert len(rows) == 4 * 2
        assert (rows[:, :t] == starts[1][:t]).all()
    assert int(info.layer_calls) == 4  # activations of the walk are kept, not computed again


@pytest.mark.slow
def test_descents_begin_at_the_best_start(problem, starts):
    losses = jc.evaluate(problem, starts).loss
    best = starts[losses.argmin()]
    for search in (jc.LinearizedSearch(num_single=2), jc.TargetPropagation(num_chains=2)):
        state = search.init(jax.random.key(0), problem)
        state = search.start(jax.random.key(1), state, problem, jnp.asarray(starts), losses)
        _, info = search.step(jax.random.key(2), state, problem)
        np.testing.assert_array_equal(info.chains[0], best)
        assert float(info.loss[0]) == pytest.approx(float(losses.min()), rel=1e-5)


@pytest.mark.slow
def test_learners_learn_from_the_starts(problem, starts):
    losses, key = jc.evaluate(problem, starts).loss, jax.random.key(0)
    starts = jnp.asarray(starts)
    evolution = SEARCHES["Evolution"]
    state = evolution.start(key, evolution.init(key, problem), problem, starts, losses)
    assert int(state.num_born) == 3
    assert {tuple(row) for row in state.chains[:3].tolist()} == set(map(tuple, starts.tolist()))
    table = SEARCHES["QLearning"]
    state = table.start(key, table.init(key, problem), problem, starts, losses)
    changed = {tuple(index) for index in np.argwhere(np.asarray(state.values))}
    assert changed == {(2, 2, 4), (3, 1, 4), (1, 2, 5)}  # slot of the head, layer before it, head
    agent = SEARCHES["ActorCritic"]
    state = agent.start(key, agent.init(key, problem), problem, starts, losses)
    np.testing.assert_array_equal(state.elite.chains[:3], starts[jnp.argsort(losses)])


def test_a_run_from_starts_shares_the_compiled_steps_of_a_run_from_nothing(problem, starts):
    search = SEARCHES["LocalSearch"]
    runs = init_runs(jax.random.key(0)[None], search, problem, 4)
    stop = StopRule(np.int32(100), np.float32(-np.inf))
    began, _ = begin_at(runs, search, problem, starts, stop)
    types = [
        [(leaf.aval.str_short(), leaf.aval.weak_type) for leaf in jax.tree.leaves(each)]
        for each in (runs, began)
    ]
    assert types[0] == types[1]
    assert not any(is_weak for _, is_weak in types[0])
