"""The front of a run, compared with a search through all chains that it scored."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import make_bank, make_batch
from scripted_search import Scripted, make_scripted

import jchain as jc
from jchain.runs.front import empty_front, find_front, merge_front

COSTS = np.array([1.0, 2.0, 3.5, 7.0, 0.5, 0.0], np.float32)


def find_slowly(chains, cost, loss):
    """Keep the rows that no other row beats; of equal rows, the first."""
    kept = []
    for i in range(len(cost)):
        rivals = [j for j in range(len(cost)) if cost[j] <= cost[i] and loss[j] <= loss[i]]
        is_beaten = any((cost[j], loss[j]) != (cost[i], loss[i]) or j < i for j in rivals)
        if np.isfinite(loss[i]) and not is_beaten:
            kept.append(i)
    kept.sort(key=lambda i: cost[i])
    return chains[kept], cost[kept], loss[kept]


@pytest.fixture(scope="module")
def costly(problem):
    return jc.Problem(problem.bank, problem.data, 3, token_costs=COSTS)


@pytest.mark.parametrize("has_costs", [False, True])
def test_the_front_is_that_of_all_scored_chains(problem, costly, has_costs):
    problem = costly if has_costs else problem
    rng = np.random.default_rng(0)
    chains = rng.permutation(problem.space.enumerate())[:60]
    layers = ((chains >= 0) & (chains < 4)).sum(axis=1)
    loss = (rng.integers(0, 9, 60) + 5 * (3 - layers)).astype(np.float32)  # many are equal
    loss[rng.random(60) < 0.1] = np.inf
    loss[3] = np.nan
    merge = jax.jit(merge_front)
    found = empty_front(problem)
    for rows in np.split(np.arange(60), 6):
        found = merge(found, problem, chains[rows], loss[rows])
    found = find_front(*map(np.asarray, found))
    table = COSTS if has_costs else np.array([1, 1, 1, 1, 0, 0], np.float32)
    cost = np.array([sum(table[token] for token in chain if token >= 0) for chain in chains])
    expected = find_slowly(chains, cost, np.where(np.isnan(loss), np.inf, loss))
    assert len(found.cost) > 2
    for own, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(own, other)


@pytest.mark.slow
def test_a_front_that_overflows_keeps_its_ends_and_the_largest_gains():
    bank = make_bank(100, 1)
    problem = jc.Problem(bank, make_batch(), 1, token_costs=np.arange(101.0))
    chains = jnp.array([[i, 100] for i in range(100)])
    gain = np.random.default_rng(0).permutation(np.arange(1.0, 100.0)).astype(np.float32)
    gain[-1] = 0.5  # the smallest gain, at the chain with the lowest loss
    loss = jnp.array(6000 - np.append(0, np.cumsum(gain)), jnp.float32)
    found = find_front(*map(np.asarray, merge_front(empty_front(problem), problem, chains, loss)))
    assert len(found.cost) == 64
    kept = sorted([0, 99, *(1 + np.argsort(-gain)[:62]).tolist()])
    assert found.chains[:, 0].tolist() == kept
    np.testing.assert_array_equal(found.cost, 100.0 + np.array(kept))
    np.testing.assert_array_equal(found.loss, np.asarray(loss)[kept])


def make_search():
    chains = [[0, 1, 4, -1], [3, 5, -1, -1], [5, -1, -1, -1], [0, 5, -1, -1], [2, 1, 0, 5]]
    return Scripted(jnp.array([chains], jnp.int32), jnp.array([[1.0, 2.0, 9.0, 4.0, jnp.inf]]))


def test_results_hold_costs_and_a_front(problem, costly):
    result = jc.run(jax.random.key(0), make_search(), costly, budget=5, num_finalists=2)
    assert result.best_cost == 3.5
    assert result.finalist_costs.tolist() == [3.5, 7.0]
    front = jc.front(result)
    assert front.chains.tolist() == [[5, -1, -1, -1], [0, 5, -1, -1], [0, 1, 4, -1]]
    assert front.cost.tolist() == [0.0, 1.0, 3.5]
    assert front.loss.tolist() == [9.0, 4.0, 1.0]
    # Without costs, they are numbers of layers.
    result = jc.run(jax.random.key(0), make_search(), problem, budget=5, num_finalists=2)
    assert (result.best_cost, result.finalist_costs.tolist()) == (2.0, [2.0, 1.0])
    assert jc.front(result).cost.tolist() == [0.0, 1.0, 2.0]
    assert jc.front(result).loss.tolist() == [9.0, 2.0, 1.0]


def test_a_step_over_budget_does_not_join_the_front(problem):
    search = make_scripted([[(0, 3.0)], [(1, 2.0)]])
    front = jc.front(jc.run(jax.random.key(0), search, problem, budget=9))
    assert front.loss.tolist() == [3.0]


def test_fronts_of_several_runs_are_merged(problem):
    keys = jax.random.split(jax.random.key(0), 2)
    results = jc.run_many(keys, jc.RandomSearch(num_chains=3), problem, budget=12)
    parts = [np.concatenate(parts) for parts in zip(*map(jc.front, results), strict=True)]
    for own, other in zip(jc.front(results), find_slowly(*parts), strict=True):
        np.testing.assert_array_equal(own, other)


def test_a_run_without_chains_has_an_empty_front(problem):
    result = jc.run(jax.random.key(0), make_scripted([[(0, np.inf)]]), problem, budget=5)
    assert np.isnan(result.best_cost)
    assert len(jc.front(result).cost) == len(result.finalist_costs) == 0


def test_front_rejects_what_has_none(problem):
    for bad in ([], jc.evaluate(problem, [[4]]), [3], 3):
        with pytest.raises(ValueError, match="expected a jc.Result or several, each with a front"):
            inspect.unwrap(jc.front)(bad)
