"""Totals of fractional layer calls are exact, in the budget, the curve, files, and results."""

import json
from fractions import Fraction
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import make_bank, make_batch
from hypothesis import given, settings
from hypothesis import strategies as st

import jchain as jc
from jchain.pytree import pytree_dataclass
from jchain.runs.charges import Rest, charge_step, total_calls

NUM = 7  # sevenths are no binary fractions


class State(NamedTuple):
    t: jax.Array


@pytree_dataclass
class Fractional:
    """Score the same chain in each step, at costs that repeat."""

    cost: jax.Array  # [T]
    charges_fractions = True

    def init(self, key, problem):
        return State(jnp.array(0))

    def step(self, key, state, problem):
        cost = self.cost[state.t % len(self.cost)]
        chains = jnp.array([[0, 4, -1, -1]], jnp.int32)
        loss = jnp.ones(1) / (1 + state.t.astype(jnp.float32))
        return State(state.t + 1), jc.Info(chains, loss, cost)


@pytest.fixture(scope="module")
def problem():
    return jc.Problem(make_bank(), make_batch(NUM), 3)


def make_search(*sevenths):
    return Fractional(jnp.array([number / 7 for number in sevenths], jnp.float32))


def test_sums_of_fractions_have_no_rounding_error(problem):
    result = jc.run(jax.random.key(0), make_search(1, 3), problem, budget=20, starts=None)
    sevenths = np.cumsum(np.tile([1, 3], 40))
    np.testing.assert_allclose(result.curve.layer_calls, sevenths[: len(result.curve[0])] / 7)
    assert result.layer_calls == 20.0 == result.curve.layer_calls[-1]
    assert isinstance(result.layer_calls, float)
    assert result.ended_by == "budget"
    assert result.curve.layer_calls.dtype == np.float64


def test_the_budget_is_never_exceeded_by_a_fraction(problem):
    result = jc.run(jax.random.key(0), make_search(5), problem, budget=2, starts=None)
    assert Fraction(result.layer_calls).limit_denominator(7) == Fraction(10, 7)
    with pytest.raises(jc.BudgetError, match="one step, which costs 2 layer calls here, got 1"):
        jc.run(jax.random.key(0), make_search(8), problem, budget=1, starts=None)


def test_a_resumed_run_has_the_same_fractions(problem, tmp_path):
    search, key = make_search(1, 3, 5), jax.random.key(0)
    whole = jc.run(key, search, problem, budget=9, record="chains", starts=[[0, 1, 4]])
    for budget in (4, 9):
        found = jc.run(
            key,
            search,
            problem,
            budget=budget,
            record="chains",
            starts=[[0, 1, 4]],
            checkpoint_dir=tmp_path,
        )
    np.testing.assert_array_equal(found.curve.layer_calls, whole.curve.layer_calls)
    np.testing.assert_array_equal(found.scored.layer_calls, whole.scored.layer_calls)
    assert found.layer_calls == whole.layer_calls
    rows = [json.loads(line) for line in (tmp_path / "chains.jsonl").read_text().splitlines()]
    assert [row["layer_calls"] for row in rows] == whole.scored.layer_calls.tolist()
    with pytest.raises(ValueError, match=r"budget of at least 9 layer calls, .* got 8"):
        jc.run(key, search, problem, budget=8, starts=[[0, 1, 4]], checkpoint_dir=tmp_path)


def test_json_keeps_fractions_and_whole_numbers(problem):
    for search, kind in ((make_search(1, 3), float), (jc.RandomSearch(2), int)):
        result = jc.run(jax.random.key(0), search, problem, budget=9)
        again = jc.Result.from_json(result.to_json())
        assert type(again.layer_calls) is type(result.layer_calls) is kind
        np.testing.assert_array_equal(again.curve.layer_calls, result.curve.layer_calls)
        assert again.curve.layer_calls.dtype == (np.float64 if kind is float else np.int32)


def test_a_callback_and_several_runs_get_fractions(problem):
    seen = []
    jc.run(jax.random.key(0), make_search(1), problem, budget=1, starts=None, callback=seen.append)
    assert seen[-1].layer_calls == 1.0
    keys = jax.random.split(jax.random.key(0), 2)
    for result in jc.run_many(keys, make_search(1, 3), problem, budget=8, starts=None):
        assert result.layer_calls == 8.0


def test_steps_that_cost_nothing_end_a_run(problem):
    result = jc.run(jax.random.key(0), make_search(0), problem, budget=9, starts=None)
    assert (result.ended_by, result.layer_calls) == ("free_steps", 0.0)


@settings(deadline=None, max_examples=30)
@given(
    st.integers(2, 1000),
    st.lists(st.integers(0, 2**20), min_size=1, max_size=20),
)
def test_totals_are_exact_rationals(num_examples, costs):
    """Costs of up to 2^20 layer calls times examples, as float32 numbers of layer calls."""
    whole, rest = 0, Rest(jnp.array(0), jnp.array(num_examples))
    for cost in costs:
        charge = charge_step(jnp.float32(cost / num_examples), rest)
        whole, rest = whole + int(charge.layer_calls), charge.rest
        assert int(charge.cost) == -(-cost // num_examples)
    assert whole * num_examples + int(rest.examples) == sum(costs)
    total = total_calls(np.array(whole), *map(np.asarray, rest))
    assert total == pytest.approx(sum(costs) / num_examples, rel=1e-12)


def test_a_float_without_the_flag_is_refused(problem):
    @pytree_dataclass
    class Wrong(Fractional):
        charges_fractions = False

    with pytest.raises(ValueError, match=r"layer_calls as an integer scalar, got float32\[\]"):
        jc.run(jax.random.key(0), Wrong(jnp.ones(1)), problem, budget=9, starts=None)
