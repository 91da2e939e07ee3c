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


def test_the_search_begins_at_the_best_of_the_starts(problem):
    starts = np.asarray(problem.space.sample(jax.random.key(3), 5))
    losses = np.asarray(jc.evaluate(problem, starts).loss)
    search = jc.LocalSearch(num_chains=2, starts=starts)
    state, scored, calls = search.init(jax.random.key(0), problem), [], 0
    for i in range(3):
        state, info = jax.jit(search.step)(jax.random.key(i), state, problem)
        scored += np.asarray(info.chains).tolist()
        calls += int(info.layer_calls)
    assert scored == [*starts.tolist(), starts[-1].tolist()]
    np.testing.assert_array_equal(state.chain, starts[losses.argmin()])
    assert float(state.loss) == pytest.approx(losses.min(), rel=1e-5)
    assert calls == jc.explain(problem, starts).unshared_layer_calls
    found = jc.run(jax.random.key(1), search, problem, budget=100)
    assert found.best_loss <= losses.min() * (1 + 1e-6)
    near = set(map(tuple, np.asarray(problem.space.neighbors(state.chain)[0]).tolist()))
    _, info = search.step(jax.random.key(5), state, problem)
    assert set(map(tuple, np.asarray(info.chains).tolist())) <= near


def test_starts_that_are_not_chains_of_the_problem_raise(problem):
    bank, data = problem.bank, problem.data
    whole = [[0, 1, 2, bank.num_layers]]
    for starts, message in (
        (np.array([[0, bank.num_layers]]), "expected chains of shape"),
        (np.array(whole[0]), r"expected starts of shape \[S, 4\], got \[4\]"),
        (np.array([[0, 1, 2, 99]]), "token 99 at slot 3 is out of range"),
    ):
        with pytest.raises(ValueError, match=message):
            jc.run(jax.random.key(0), jc.LocalSearch(starts=starts), problem, budget=100)
    few = jc.Problem(bank, data, 3, min_layers=3)
    with pytest.raises(ValueError, match="expected starts of at least 3 layers, got one of 1"):
        jc.LocalSearch(starts=np.array([[0, bank.num_layers, -1, -1]])).check(few)


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
