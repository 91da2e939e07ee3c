import itertools

import jax
import numpy as np
import pytest
from conftest import make_bank, make_batch

import jchain as jc


def test_a_tree_as_large_as_the_space_finds_the_best_chain(problem):
    small = jc.Problem(problem.bank, problem.data, 1)
    search = jc.MCTS(num_simulations=64)
    _, info = jax.jit(search.step)(jax.random.key(0), search.init(jax.random.key(0), small), small)
    assert float(info.loss.min()) == pytest.approx(
        float(jc.evaluate_all(small)[1].loss.min()), rel=1e-5
    )
    assert info.layer_calls == 4


def test_the_root_moves_down_until_a_head_and_starts_again():
    # Longer chains are better here.
    problem = jc.Problem(make_bank(seed=2), make_batch(), 3)
    search = jc.MCTS(num_simulations=24)
    state, step = search.init(jax.random.key(0), problem), jax.jit(search.step)
    lengths = []
    for key in jax.random.split(jax.random.key(1), 12):
        state, _ = step(key, state, problem)
        lengths.append(int(state.root.length))
        prefix = [token for token in state.root.chain.tolist() if token >= 0]
        hidden = problem.bank.embed(problem.data.x)
        for token in prefix:
            hidden = problem.bank.layers[0].apply(token, hidden)
        np.testing.assert_allclose(state.root.hidden, hidden, rtol=1e-5, atol=1e-5)
    assert 0 in lengths
    assert max(lengths) > 0
    assert all(b in (a + 1, 0) for a, b in itertools.pairwise(lengths))


def test_without_noise_the_key_does_not_matter(problem):
    for scale, is_same in ((0.0, True), (1.0, False)):
        search = jc.MCTS(num_simulations=4, gumbel_scale=scale)
        assert search.is_deterministic == is_same
        state, step = search.init(jax.random.key(0), problem), jax.jit(search.step)
        infos = [step(jax.random.key(seed), state, problem)[1] for seed in range(3)]
        assert is_same == all(np.array_equal(infos[0].chains, info.chains) for info in infos[1:])
