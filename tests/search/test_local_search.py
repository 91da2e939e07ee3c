import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jchain as jc


def test_local_search_restarts_only_at_local_optima(problem):
    chains, out = jc.evaluate_all(problem)
    losses = dict(zip(map(tuple, chains.tolist()), np.asarray(out.loss).tolist(), strict=True))

    def neighbors(chain):
        rows, is_neighbor = problem.space.neighbors(jnp.array(chain))
        return set(map(tuple, np.asarray(rows)[np.asarray(is_neighbor)].tolist()))

    search = jc.LocalSearch(num_chains=3)
    state = search.init(jax.random.key(0), problem)
    step = jax.jit(search.step)
    moves = restarts = 0
    for key in jax.random.split(jax.random.key(1), 150):
        old = tuple(state.chain.tolist())
        old_loss = float(state.loss)
        state, _ = step(key, state, problem)
        new = tuple(state.chain.tolist())
        if np.isinf(state.loss):
            assert all(losses[n] >= losses[old] * (1 - 1e-5) for n in neighbors(old))
            restarts += 1
        elif new != old:
            assert new in neighbors(old)
            assert float(state.loss) == pytest.approx(losses[new], rel=1e-5)
            assert float(state.loss) < old_loss
            moves += 1
    assert moves > 5
    assert restarts > 1


@pytest.mark.slow
def test_the_search_begins_at_the_best_of_the_starts(problem):
    starts = problem.space.sample(jax.random.key(3), 5)
    losses = jc.evaluate(problem, starts).loss
    search = jc.LocalSearch(num_chains=2)
    first = search.init(jax.random.key(0), problem)
    state = search.start(jax.random.key(1), first, problem, starts, losses)
    np.testing.assert_array_equal(state.chain, starts[losses.argmin()])
    assert float(state.loss) == float(losses.min())
    near = set(map(tuple, np.asarray(problem.space.neighbors(state.chain)[0]).tolist()))
    _, info = search.step(jax.random.key(5), state, problem)
    assert set(map(tuple, np.asarray(info.chains).tolist())) <= near


def test_each_neighbor_is_tried_once_before_a_restart(problem):
    search = jc.LocalSearch(num_chains=4)
    state = search.init(jax.random.key(0), problem)
    best = jnp.array(-1.0)  # lower than every loss, so the search never moves
    state = state._replace(loss=best)
    rows, is_neighbor = problem.space.neighbors(state.chain)
    tried = []
    while not np.isinf(state.loss):
        state, info = search.step(jax.random.key(1), state, problem)
        tried += np.asarray(info.chains).tolist()
    tried = tried[: int(is_neighbor.sum())]
    assert sorted(tried) == sorted(np.asarray(rows)[np.asarray(is_neighbor)].tolist())
