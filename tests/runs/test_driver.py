"""The driver: budget, best so far, finalists, counts, programs, and invalid arguments."""

import dataclasses
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import make_bank
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted_search import Scripted, make_scripted

import jchain as jc
from jchain.pytree import pytree_dataclass
from jchain.search.protocol import is_deterministic, needs_gradient, needs_invertible


class Counting(Scripted):
    num_traces = 0

    def step(self, key, state, problem):
        Counting.num_traces += 1
        return super().step(key, state, problem)


def test_all_steps_of_a_run_share_one_program(problem):
    script = make_scripted([[(0, 3.0)], [(1, 2.0)]])
    search = pytree_dataclass(Counting)(script.chains, script.loss, script.cost)
    result = jc.run(jax.random.key(0), search, problem, budget=1000)
    assert len(result.curve.best_loss) == 200
    assert Counting.num_traces == 1


def test_an_unknown_argument_raises_an_error_that_names_it(problem):
    for run, keys in (
        (jc.run, jax.random.key(0)),
        (jc.run_many, jax.random.split(jax.random.key(0), 2)),
    ):
        with pytest.raises(TypeError, match="budgt"):
            inspect.unwrap(run)(keys, jc.RandomSearch(), problem, budgt=1)


def test_flags_of_a_search_default_to_false():
    flags = (
        is_deterministic,
        needs_gradient,
        needs_invertible,
    )
    search = make_scripted([[(0, 3.0)]])
    for flag in flags:
        assert not flag(search)


def test_the_budget_is_never_exceeded(problem):
    search = make_scripted([[(0, 3.0)], [(1, 2.0)], [(2, 1.0)]])
    result = jc.run(jax.random.key(0), search, problem, budget=14)
    assert (result.layer_calls, result.best_loss, result.num_scored) == (10, 2, 2)


def test_a_run_stops_at_its_target_loss(problem):
    search = make_scripted([[(0, 3.0)], [(1, 2.0)], [(2, 1.0)]])
    for target, expected in (
        (2.5, [5, 10]),
        (2.0, [5, 10]),
        (1.5, [5, 10, 15]),
        (0.5, [5, 10, 15, 20, 25]),
    ):
        result = jc.run(jax.random.key(0), search, problem, budget=25, target_loss=target)
        assert result.curve.layer_calls.tolist() == expected
    with pytest.raises(ValueError, match="expected target_loss to be a number, got nan"):
        jc.run(jax.random.key(0), search, problem, budget=25, target_loss=float("nan"))


def test_a_budget_below_one_layer_call_raises(problem):
    with pytest.raises(ValueError, match="expected budget to be at least 1, got 0"):
        jc.run(jax.random.key(0), make_scripted([[(0, 3.0)]]), problem, budget=0)


def test_a_search_is_stopped_after_100_zero_cost_steps(problem):
    result = jc.run(jax.random.key(0), make_scripted([[(0, 3.0)]], cost=0), problem, budget=4)
    assert len(result.curve.best_loss) == 100
    assert result.layer_calls == 0


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nonfinite_losses_are_counted_and_never_best(problem, bad):
    search = make_scripted([[(0, bad), (1, 4.0)], [(2, bad), (3, bad)]])
    result = jc.run(jax.random.key(0), search, problem, budget=10)
    assert (result.best_loss, result.num_nonfinite) == (4, 3)
    assert result.finalists[:, 0].tolist() == [1]


@settings(max_examples=20, deadline=None)
@given(
    st.lists(
        st.lists(
            st.tuples(st.integers(0, 3), st.integers(0, 70).map(lambda n: n / 8)),
            min_size=2,
            max_size=2,
        ),
        min_size=3,
        max_size=3,
    )
)
def test_best_so_far_never_rises(problem, rows):
    result = jc.run(jax.random.key(0), make_scripted(rows), problem, budget=15, num_finalists=4)
    assert np.all(np.diff(result.curve.best_loss) <= 0)
    assert result.best_loss == min(loss for row in rows for _, loss in row)
    assert len(np.unique(result.finalists, axis=0)) == len(
        {token for row in rows for token, _ in row}
    )


def test_a_search_that_is_not_a_pytree_raises(problem):
    class Plain:
        def init(self, key, problem): ...
        def step(self, key, state, problem): ...

    with pytest.raises(ValueError, match=r"class decorated with @jc.pytree_dataclass, got .*Plain"):
        jc.run(jax.random.key(0), Plain(), problem, budget=5)


def test_run_many_equals_runs_of_single_keys(problem):
    keys = jax.random.split(jax.random.key(0), 3)
    many = jc.run_many(keys, jc.Evolution(population_size=8, num_chains=4), problem, budget=150)
    for key, result in zip(keys, many, strict=True):
        alone = jc.run(key, jc.Evolution(population_size=8, num_chains=4), problem, budget=150)
        np.testing.assert_array_equal(result.best_chain, alone.best_chain)
        np.testing.assert_array_equal(result.curve.layer_calls, alone.curve.layer_calls)
        np.testing.assert_allclose(result.curve.best_loss, alone.curve.best_loss, rtol=1e-5)
        np.testing.assert_array_equal(result.finalists, alone.finalists)
        assert (result.layer_calls, result.num_scored) == (alone.layer_calls, alone.num_scored)
    with pytest.raises(
        ValueError, match=r"of shape \[S\], at least one, got an array key<fry>\[0\]"
    ):
        jc.run_many(keys[:0], jc.RandomSearch(), problem, budget=150)


def test_the_largest_int32_is_a_valid_budget(problem):
    search = make_scripted([[(0, 3.0)]] * 4, cost=2**30)  # half of the largest int32 budget
    result = jc.run(jax.random.key(0), search, problem, budget=2**31 - 1)
    assert (result.layer_calls, result.num_scored) == (2**30, 1)


def test_keys_of_another_kind_raise(problem):
    for key in (jax.random.PRNGKey(0), jax.random.split(jax.random.key(0))):
        with pytest.raises(ValueError, match="expected key to be one key of jax.random.key, got"):
            jc.run(key, jc.RandomSearch(), problem, budget=150)


def test_a_nonfinite_layer_cost_raises(problem):
    for cost in (np.nan, [0.0, 0.0, np.inf, 0.0]):
        with pytest.raises(ValueError, match="expected a finite layer_cost, got nan or infinity"):
            jc.Problem(problem.bank, problem.data, 3, layer_cost=cost)


def test_rows_without_a_chain_are_not_counted(problem):
    search = make_scripted([[(0, 3.0), (1, 4.0)]])
    empty = search.chains.at[0, 1].set(-1)
    search = Scripted(empty, search.loss.at[0, 1].set(jnp.inf), search.cost)
    result = jc.run(jax.random.key(0), search, problem, budget=10)
    assert (result.num_scored, result.num_nonfinite, len(result.finalists)) == (2, 0, 1)


def test_banks_that_differ_only_in_names_share_one_program(bank, problem):
    traces = []

    def loss_fn(outputs, y):
        traces.append(0)
        return -outputs[:, 0]

    renamed = make_bank(names=list("abcdef"))
    ours, theirs = (jc.Problem(b, problem.data, 3, loss_fn=loss_fn) for b in (bank, renamed))
    for call in (
        lambda p: jc.evaluate(p, [[0, 4, -1, -1]]).loss,
        lambda p: jc.run(jax.random.key(0), jc.RandomSearch(2), p, budget=20),
    ):
        call(ours)
        num_traces = len(traces)
        call(theirs)
        assert len(traces) == num_traces


def test_a_chain_over_the_limit_never_becomes_the_best(problem):
    """Also if a search reports a finite loss for it."""
    costs = np.array([5, 1, 1, 1, 1, 1], np.float32)
    limited = dataclasses.replace(problem, token_costs=costs, max_cost=2.0)
    search = make_scripted([[(0, 1.0), (2, 3.0)]])
    result = jc.run(jax.random.key(0), search, limited, budget=5, record="chains")
    np.testing.assert_array_equal(result.best_chain, [2, 4, -1, -1])
    assert (result.best_loss, result.num_nonfinite) == (3.0, 1)
    np.testing.assert_array_equal(result.scored.loss, [np.inf, 3.0])


def test_a_result_says_what_ended_the_run(problem):
    search = make_scripted([[(0, 3.0)], [(1, 2.0)]])
    key = jax.random.key(0)
    assert jc.run(key, search, problem, budget=14).ended_by == "budget"
    assert jc.run(key, search, problem, budget=10).ended_by == "budget"
    assert jc.run(key, search, problem, budget=1000, target_loss=2.5).ended_by == "target_loss"
    free = make_scripted([[(0, 3.0)]], cost=0)
    assert jc.run(key, free, problem, budget=1000).ended_by == "free_steps"
    stopped = jc.run(key, search, problem, budget=1000, callback=lambda progress: True)
    assert (stopped.ended_by, stopped.is_complete) == (None, False)
    assert jc.Result.from_json(stopped.to_json()).ended_by is None
