import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from conftest import make_batch

import jchain as jc
from jchain import env
from jchain.engine import layer_calls
from jchain.search.prefixes import end_children, end_prefixes, extend_prefix


def test_a_prefix_is_extended_by_every_layer(problem):
    prefix, hidden = jnp.array([2, -1, -1, -1]), problem.bank.layers[0].apply(2, problem.data.x)
    chains, outputs = extend_prefix(problem, prefix, jnp.array(1), hidden)
    np.testing.assert_array_equal(chains, [[2, n, -1, -1] for n in range(4)])
    for token in range(4):
        np.testing.assert_allclose(
            outputs[token], problem.bank.layers[0].apply(token, hidden), rtol=1e-5, atol=1e-6
        )


def test_prefixes_that_are_not_scored_leave_empty_rows(problem):
    prefixes = jnp.array([[0, -1, -1, -1], [1, 3, -1, -1]])
    loss = jnp.array([[1.0, 2.0], [3.0, jnp.nan]])
    chains, losses = end_prefixes(
        problem, prefixes, jnp.array([1, 2]), loss, jnp.array([False, True])
    )
    np.testing.assert_array_equal(chains, [[-1] * 4, [-1] * 4, [1, 3, 4, -1], [1, 3, 5, -1]])
    np.testing.assert_array_equal(losses, [np.inf, np.inf, 3.0, np.inf])


def test_the_empty_prefix_ends_with_its_children(problem):
    state, loss, yes = env.reset(problem), jnp.arange(8.0).reshape(4, 2), jnp.array(True)
    children = env.append_layers(problem, state.chain, state.length)
    args = (state.chain, state.length, state.hidden, children, loss, yes)
    chains, losses = end_children(problem, *args, yes)
    np.testing.assert_array_equal(chains[:2, 0], [4, 5])
    expected = [reference.chain_loss(problem, [head])[0] for head in (4, 5)]
    np.testing.assert_allclose(losses[:2], expected, rtol=1e-5)
    np.testing.assert_array_equal(losses[2:], np.arange(8))
    # Cases without children, and with chains that need a layer.
    assert np.isinf(end_children(problem, *args, jnp.array(False))[1][2:]).all()
    longer = jc.Problem(problem.bank, problem.data, 3, min_layers=1)
    assert (end_children(longer, *args, yes)[0][:2] == -1).all()


def test_a_head_alone_over_the_limit_of_the_cost_has_no_finite_loss(problem):
    cost = np.array([1.0, 1.0, 1.0, 1.0, 2.0, 5.0], np.float32)
    limited = dataclasses.replace(problem, token_costs=cost, max_cost=4.0)
    state, loss, yes = env.reset(limited), jnp.arange(8.0).reshape(4, 2), jnp.array(True)
    children = env.append_layers(limited, state.chain, state.length)
    args = (state.chain, state.length, state.hidden, children, loss, yes)
    found = end_children(limited, *args, yes)[1][:2]
    assert (np.isfinite(found[0]), np.isinf(found[1])) == (True, True)


def scale(params, x):
    return x * params


@pytest.mark.parametrize(
    "search", [jc.BeamSearch(max_width=2), jc.CriticSearch(width=4), jc.MCTS(num_simulations=8)]
)
def test_a_finite_chain_after_a_prefix_whose_heads_overflow_is_found(search):
    """Layer 0 makes numbers that only layer 1 brings back; of 7 chains, [0, 1] is the best."""
    x = jnp.array([[1.0, -1.0], [-1.0, 1.0]])
    bank = jc.Bank.stack(
        scale, [jnp.float32(1e30), jnp.float32(-1e-30)], scale, [jnp.float32(1e10)]
    )
    problem = jc.Problem(bank, jc.Batch(x, jnp.array([1, 0])), 2)
    loss = jc.evaluate(problem, jc.chain.pad([[0, 2], [2], [1, 2], [0, 1, 2]], 2)).loss
    assert not np.isfinite(loss[0])
    assert loss[3] < loss[2] < loss[1]
    result = jc.run(jax.random.key(0), search, problem, budget=40)
    assert result.best_chain.tolist() in ([0, 1, 2], [1, 0, 2])
    assert result.best_loss == loss[3]


def test_a_prefix_of_nan_is_not_extended():
    bank = jc.Bank.stack(scale, [jnp.float32(np.nan), jnp.float32(0.5)], scale, [jnp.float32(1)])
    problem = jc.Problem(bank, jc.Batch(jnp.eye(2), jnp.array([0, 1])), 3)
    search = jc.BeamSearch(width=4, max_width=4)
    result = jc.run(jax.random.key(0), search, problem, budget=100)
    # The empty prefix, [1], and [1, 1] are extended by both layers.
    assert result.layer_calls == 6
    assert result.num_nonfinite == 3


@pytest.mark.slow
@pytest.mark.parametrize("name", ["BeamSearch", "CriticSearch"])
def test_heads_with_large_outputs_are_called_for_one_prefix_at_a_time(problem, monkeypatch, name):
    search = {"BeamSearch": jc.BeamSearch(max_width=4), "CriticSearch": jc.CriticSearch(width=8)}
    expected = jc.run(jax.random.key(0), search[name], problem, budget=100)
    jax.clear_caches()
    jc.clear_caches()
    monkeypatch.setattr(layer_calls, "_OUTPUT_LIMIT", 100)  # 2 of 9 examples at a time
    other = jc.Problem(problem.bank, make_batch(), 3)
    result = jc.run(jax.random.key(0), search[name], other, budget=100)
    np.testing.assert_array_equal(result.best_chain, expected.best_chain)
    np.testing.assert_allclose(result.finalist_losses, expected.finalist_losses, rtol=1e-5)
    jax.clear_caches()
    jc.clear_caches()
