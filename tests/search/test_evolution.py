import jax
import jax.numpy as jnp
import numpy as np
from conftest import make_bank, make_batch

import jchain as jc
from jchain.search.moves import EDITS, draw_move


def test_mutations_are_uniform_over_the_neighbors(problem):
    chain = jnp.array([1, 2, 4, -1], jnp.int32)
    rows, is_neighbor = problem.space.neighbors(chain)
    expected = {tuple(row) for row in np.asarray(rows)[np.asarray(is_neighbor)].tolist()}
    keys = jax.random.split(jax.random.key(0), 4000)
    found = jax.jit(jax.vmap(lambda key: draw_move(key, problem, chain, EDITS)))(keys)
    children, counts = np.unique(np.asarray(found), axis=0, return_counts=True)
    assert {tuple(row) for row in children.tolist()} == expected
    # The tolerance is five standard deviations of a Poisson count.
    mean = 4000 / len(expected)
    assert np.abs(counts - mean).max() < 5 * np.sqrt(mean)


def test_a_mutation_returns_a_chain_without_neighbors_unchanged():
    problem = jc.Problem(make_bank(2, 1), make_batch(), max_layers=0)
    np.testing.assert_array_equal(draw_move(jax.random.key(0), problem, jnp.array([2]), EDITS), [2])


def test_the_oldest_chains_leave_and_tournament_winners_are_parents(problem):
    search = jc.Evolution(population_size=6, tournament_size=200, num_chains=2)
    state, step = search.init(jax.random.key(0), problem), jax.jit(search.step)
    born = []
    for seed in range(5):
        state, info = step(jax.random.key(seed), state, problem)
        born += np.asarray(info.chains).tolist()
        alive = np.asarray(state.chains).tolist()
        if len(born) >= 6:
            assert sorted(alive) == sorted(born[-6:])
    # A tournament this large is won by the best chain of the population.
    best = state.chains[jnp.argmin(state.loss)]
    rows, is_neighbor = problem.space.neighbors(best)
    _, info = step(jax.random.key(9), state, problem)
    children = {tuple(row) for row in np.asarray(info.chains).tolist()}
    assert children <= {tuple(row) for row in np.asarray(rows)[np.asarray(is_neighbor)].tolist()}
