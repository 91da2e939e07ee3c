import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jchain as jc


def test_moves_to_better_neighbours_and_leaves_only_local_optima(problem):
    bank = problem.bank
    chains, out = jc.evaluate_all(problem)
    losses = dict(zip(map(tuple, chains.tolist()), np.asarray(out.loss).tolist(), strict=True))

    def neighbours(chain):
        rows, is_there = jc.chain.neighbours(jnp.array(chain), bank.num_layers, bank.num_heads)
        return set(map(tuple, np.asarray(rows)[np.asarray(is_there)].tolist()))

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
            assert all(losses[n] >= losses[old] * (1 - 1e-5) for n in neighbours(old))
            restarts += 1
        elif new != old:
            assert new in neighbours(old)
            assert float(state.loss) == pytest.approx(losses[new], rel=1e-5)
            assert float(state.loss) < old_loss
            moves += 1
    assert moves > 5
    assert restarts > 1


def test_every_neighbour_is_tried_once_before_a_restart(problem):
    search = jc.LocalSearch(num_chains=4)
    state = search.init(jax.random.key(0), problem)
    best = jnp.array(-1.0)  # nothing is better than this
    state = state._replace(loss=best)
    rows, is_there = jc.chain.neighbours(state.chain, problem.bank.num_layers, problem.bank.num_heads)
    tried = []
    while not np.isinf(state.loss):
        state, info = search.step(jax.random.key(1), state, problem)
        tried += np.asarray(info.chains).tolist()
    tried = tried[: int(is_there.sum())]
    assert sorted(tried) == sorted(np.asarray(rows)[np.asarray(is_there)].tolist())
