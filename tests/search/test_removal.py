"""Greedy removal, against a plain loop that drops the layer whose loss hurts least."""

import jax
import numpy as np
import pytest
import reference
from conftest import make_bank, make_batch

import jchain as jc

N = 6


def make_problem(max_layers=N, parents=((3, 0, 5, 1, 4, 2, N + 1),), num_layers=N, **kwargs):
    bank = make_bank(num_layers, 2, seed=2, parents=parents)
    return jc.Problem(bank, make_batch(), max_layers, **kwargs)


def pad(tokens, num_slots):
    return np.pad(np.array(tokens), (0, num_slots - len(tokens)), constant_values=-1)


def score(problem, tokens):
    return reference.chain_loss(problem, pad(tokens, problem.max_layers + 1))[0]


def remove_greedily(problem, parent, min_layers=0):
    """Return the best chain of each length, from the longest down."""
    found = [list(parent)]
    while len(found[-1]) - 1 > min_layers:
        shorter = [[*found[-1][:i], *found[-1][i + 1 :]] for i in range(len(found[-1]) - 1)]
        found.append(min(shorter, key=lambda tokens: score(problem, tokens)))
    return found[1:]


def run(problem, search, num_steps):
    """Take steps, and return the distinct chains that they reported, in order, and the cost."""
    search.check(problem)
    state, chains, calls = search.init(jax.random.key(0), problem), [], 0
    step = jax.jit(search.step)
    for _ in range(num_steps):
        state, info = step(jax.random.key(0), state, problem)
        chains += [tuple(row) for row in np.asarray(info.chains).tolist() if row[0] >= 0]
        calls += int(info.layer_calls)
    return chains, calls


@pytest.mark.parametrize("min_layers", [0, 2])
def test_a_pass_of_width_1_is_a_plain_loop(min_layers):
    problem = make_problem(min_layers=min_layers, layer_cost=0.01)
    search = jc.RemovalSearch(width=1, max_width=1, num_chains=N)
    chains, calls = run(problem, search, N + 2)
    path = remove_greedily(problem, problem.bank.parents[0], min_layers)
    for previous, best in zip([problem.bank.parents[0], *path], path, strict=False):
        found = [chain for chain in chains if sum(token >= 0 for token in chain) == len(best)]
        # Each chain of one layer less is scored once, and the best of them is shortened next.
        expected = {
            tuple(pad([*previous[:i], *previous[i + 1 :]], N + 1)) for i in range(len(best))
        }
        assert sorted(found) == sorted(expected)
        assert tuple(pad(best, N + 1)) in expected
    assert len(chains) == len(set(chains)) == sum(range(min_layers + 1, N + 1))
    # A pass that shares prefixes within each step, and none after it.
    later = [run(problem, search, N - min_layers)[1], calls]
    assert later[0] == later[1] > 0


def test_wider_passes_find_chains_that_greedy_removal_misses():
    problem = make_problem(max_layers=3, parents=((0, 1, 2, 3, 4, 5, N),), min_layers=3)
    chains, _ = run(problem, jc.RemovalSearch(width=1, max_width=64, num_chains=N), 500)
    subsets = jc.Problem(problem.bank, problem.data, 3, min_layers=3, space="subset")
    every = [tuple(row) for row in subsets.space.enumerate().tolist() if row[-1] == N]
    assert set(chains) == set(every)


def test_chains_that_are_too_long_are_charged_but_not_reported():
    problem = make_problem(max_layers=2)
    search = jc.RemovalSearch(width=1, max_width=1, num_chains=N)
    chains, calls = run(problem, search, N + 2)
    assert {sum(token >= 0 for token in chain) for chain in chains} == {1, 2, 3}
    wide = make_problem()
    assert calls == run(wide, search, N + 2)[1]


def test_all_parents_are_shortened_and_equal_layers_once():
    parents = ((0, 0, 0, 1, 4), (2, 2, 2, 3, 5), (1, 2, 4))
    problem = make_problem(4, parents, 4)
    chains, _ = run(problem, jc.RemovalSearch(width=2, max_width=2, num_chains=4), 2)
    expected = [(0, 0, 1, 4), (0, 0, 0, 4), (2, 2, 3, 5), (2, 2, 2, 5)]
    assert sorted(chains) == sorted((*chain, -1) for chain in expected)


def test_without_parents_all_layers_come_first():
    problem = make_problem(3, (), 3)
    chains, _ = run(problem, jc.RemovalSearch(width=2, max_width=2, num_chains=3), 2)
    pairs = [(1, 2), (0, 2), (0, 1)]
    assert sorted(chains) == sorted((*pair, head, -1) for pair in pairs for head in (3, 4))


def test_parents_outside_the_space_are_refused():
    problem = make_problem(parents=((0, 0, N),), min_layers=3)
    with pytest.raises(ValueError, match="expected a parent of at least 3 layers that is a chain"):
        jc.RemovalSearch().check(problem)
    for options in ({"width": 0}, {"width": 4, "max_width": 2}, {"num_chains": 0}):
        with pytest.raises(ValueError, match="expected"):
            jc.RemovalSearch(**options)
