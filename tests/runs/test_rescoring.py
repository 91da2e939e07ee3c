"""Searches on a split that is read in parts report losses of the whole split."""

import dataclasses

import jax
import numpy as np
import pytest
from conftest import make_bank, make_batch
from small_searches import INVERTIBLE, SEARCHES

import jchain as jc
from jchain.runs.rescoring import get_seen_problem

FAST = ("LocalSearch",)


@pytest.fixture(scope="module")
def whole():
    return jc.Problem(make_bank(), make_batch(14), max_layers=2)


@pytest.fixture(scope="module")
def problem(whole):
    return dataclasses.replace(whole, batch_size=5)


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in SEARCHES],
)
def test_results_are_exact_on_the_whole_split(name, whole):
    if name in INVERTIBLE:
        whole = whole.with_bank(make_bank(layer=jc.layers.InvertibleDense(5)))
    problem = dataclasses.replace(whole, batch_size=5)
    starts = [[0, 1, 4]]
    result = jc.run(jax.random.key(0), SEARCHES[name], problem, budget=150, starts=starts)
    expected = jc.evaluate(whole, result.finalists).loss
    np.testing.assert_allclose(result.finalist_losses, expected, rtol=1e-5)
    assert len(result.finalists) > 5
    assert result.layer_calls <= 150


def test_searches_that_read_activations_see_the_first_part(problem):
    seen = {name: get_seen_problem(search, problem) for name, search in SEARCHES.items()}
    whole = {name for name, own in seen.items() if own is problem}
    assert whole == {
        "RandomSearch",
        "LocalSearch",
        "LocalSearch-moves",
        "Evolution",
        "Evolution-moves",
        "RemovalSearch",
        "QLearning",
        "ActorCritic",
        "ActorCritic-replay",
        "ActorCritic-weights",
    }
    assert {own.num_examples for name, own in seen.items() if name not in whole} == {5}


@pytest.mark.slow
def test_local_search_takes_the_same_path_as_on_the_whole(whole, problem):
    search = SEARCHES["LocalSearch"]
    results = [jc.run(jax.random.key(1), search, one, budget=120) for one in (whole, problem)]
    np.testing.assert_array_equal(results[0].finalists, results[1].finalists)
    assert results[0].layer_calls == results[1].layer_calls


def test_steps_on_a_part_are_charged_in_calls_on_the_whole_split(problem):
    # One step of beam search extends the empty prefix by 4 layers on 5 of 14 examples, which costs
    # ceil(4 * 5 / 14) = 2, and scores its chains on all examples, which costs 4.
    search = SEARCHES["BeamSearch"]
    one = dataclasses.replace(problem, max_layers=1)
    result = jc.run(jax.random.key(0), search, one, budget=100)
    assert result.curve.layer_calls[0] == 2 + 4
