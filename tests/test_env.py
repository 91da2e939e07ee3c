import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import init_params, make_batch

import jchain as jc
from jchain import env


def play(problem, tokens):
    state, rewards = env.reset(problem), []
    for token in tokens:
        state, reward = env.step(problem, state, jnp.array(token))
        rewards.append(float(reward))
    return state, rewards


def make_prefix(tokens):
    return jnp.array([*tokens, *[-1] * (4 - len(tokens))])


def test_return_is_minus_the_loss(two_group_problem):
    problem = jc.Problem(two_group_problem.bank, two_group_problem.data, 3, layer_cost=0.25)
    for tokens in ([5], [3, 6], [0, 4, 2, 5]):
        state, rewards = play(problem, tokens)
        chains = jc.chain.pad([tokens], 3)
        np.testing.assert_allclose(rewards[-1], -jc.evaluate(problem, chains).loss[0], rtol=1e-6)
        assert rewards[:-1] == [0] * (len(tokens) - 1)
        assert state.is_done
        assert state.length == len(tokens) - 1
        np.testing.assert_array_equal(state.chain, chains[0])


def test_the_state_carries_the_activation_of_the_prefix(problem):
    state, _ = play(problem, [2, 1])
    bank, x = problem.bank, problem.data.x
    for token in (2, 1):
        x = bank.layers[0].apply(token, x)
    np.testing.assert_allclose(state.hidden, x, rtol=1e-6)


def test_layers_and_heads_are_appended_at_the_end_of_a_prefix(problem):
    chain, length = jnp.array([3, 1, -1, -1]), jnp.array(2)
    layers, heads = (f(problem, chain, length) for f in (env.append_layers, env.append_heads))
    np.testing.assert_array_equal(layers, [[3, 1, n, -1] for n in range(4)])
    np.testing.assert_array_equal(heads, [[3, 1, n, -1] for n in (4, 5)])


def test_legal_actions(problem):
    assert env.legal_actions(problem, jnp.array([2, 0, -1, -1])).tolist() == [True] * 6
    full = jnp.array([2, 0, 1, -1])
    assert env.legal_actions(problem, full).tolist() == [False] * 4 + [True] * 2


def test_heads_are_legal_from_min_layers_on(problem):
    problem = jc.Problem(problem.bank, problem.data, 3, min_layers=2)
    layers_only, all_of_them, heads_only = (
        [True] * 4 + [False] * 2,
        [True] * 6,
        [False] * 4 + [True] * 2,
    )
    legal = [env.legal_actions(problem, make_prefix([0] * n)).tolist() for n in range(4)]
    assert legal == [layers_only, layers_only, all_of_them, heads_only]
    with pytest.raises(
        ValueError, match=r"action 4 after 1 of at least 2 and at most 3 layers: .* a token in 0..3"
    ):
        play(problem, [0, 4])
    assert play(problem, [0, 1, 4])[0].is_done


def test_illegal_actions_are_refused_on_the_host(problem):
    state, _ = play(problem, [0, 0, 0])
    with pytest.raises(
        ValueError, match=r"illegal action 1 after 3 of at most 3 layers: expected a token in 4..5"
    ):
        env.step(problem, state, jnp.array(1))
    with pytest.raises(ValueError, match=r"illegal action 6 after 0 .* expected a token in 0..5"):
        env.step(problem, env.reset(problem), jnp.array(6))
    with pytest.raises(ValueError, match="illegal action -1"):
        env.step(problem, env.reset(problem), jnp.array(-1))


def test_a_done_episode_is_unchanged(problem):
    done, _ = play(problem, [0, 4])
    after, reward = env.step(problem, done, jnp.array(1))
    jax.tree.map(np.testing.assert_array_equal, after, done)
    assert reward == 0


def test_jit_and_vmap_agree_with_single_steps(two_group_problem):
    actions = jnp.array([[0, 6, 0], [4, 1, 5], [5, 0, 0]])
    step = jax.jit(jax.vmap(env.step, in_axes=(None, 0, 0)))
    states = jax.tree.map(lambda leaf: jnp.stack([leaf] * 3), env.reset(two_group_problem))
    total = jnp.zeros(3)
    for t in range(3):
        states, reward = step(two_group_problem, states, actions[:, t])
        total += reward
    for row, tokens in enumerate(([0, 6], [4, 1, 5], [5])):
        state, rewards = play(two_group_problem, tokens)
        np.testing.assert_allclose(total[row], rewards[-1], rtol=1e-6)
        np.testing.assert_array_equal(states.chain[row], state.chain)


def test_a_loss_that_is_not_finite_has_a_reward_of_minus_infinity():
    layer, head = jc.layers.Dense(5), jc.layers.DenseHead(3)
    params = [
        jax.tree.map(lambda leaf: leaf * jnp.nan, p)
        for p in init_params(layer, jax.random.key(0), 1, (5,))
    ]
    bank = jc.Bank.stack(layer, params, head, init_params(head, jax.random.key(1), 1, (5,)))
    _, rewards = play(jc.Problem(bank, make_batch(), 1), [0, 1])
    assert rewards == [0, -np.inf]


COSTS = np.array([1.0, 2.0, 4.0, 8.0, 0.5, 0.25], np.float32)


def limit(problem, max_cost, min_layers=0):
    return jc.Problem(
        problem.bank, problem.data, 3, min_layers=min_layers, token_costs=COSTS, max_cost=max_cost
    )


@pytest.mark.parametrize("min_layers", [0, 2])
def test_a_token_is_legal_if_a_chain_within_the_limit_begins_with_it(problem, min_layers):
    limited = limit(problem, 4.6, min_layers)
    chains = [
        tuple(chain[chain >= 0].tolist())
        for chain in limited.space.enumerate()
        if COSTS[chain[chain >= 0]].sum() <= 4.6
    ]
    prefixes = {chain[:t] for chain in chains for t in range(len(chain))}
    assert len(prefixes) > 6
    for prefix in prefixes:
        expected = {chain[len(prefix)] for chain in chains if chain[: len(prefix)] == prefix}
        found = env.legal_actions(limited, make_prefix(prefix))
        assert set(np.flatnonzero(found).tolist()) == expected
    # Beyond the limit, the cheapest token remains.
    expensive = make_prefix([2, 2, 0])
    assert env.legal_actions(limited, expensive).tolist() == [False] * 5 + [True]


def test_a_token_over_the_limit_is_refused(problem):
    limited = limit(problem, 4.6)
    state, _ = play(limited, [2])
    with pytest.raises(
        ValueError, match="illegal action 0 .* that keeps the chain within max_cost"
    ):
        env.step(limited, state, jnp.array(0))
    assert np.isfinite(env.step(limited, state, jnp.array(4))[1])


@pytest.mark.parametrize("min_layers", [0, 2])
def test_sampled_chains_are_within_the_limit(problem, min_layers):
    limited = limit(problem, 4.6, min_layers)
    key = jax.random.key(0)
    chains = np.asarray(env.sample_chains(key, limited, 500))
    assert limited.space.contains(jnp.asarray(chains)).all()
    assert not limited.exceeds_limit(limited.chain_cost(jnp.asarray(chains))).any()
    # Every chain within the limit can be drawn, and chains that fit are kept as they are.
    every = limited.space.enumerate()
    is_within = np.where(every >= 0, COSTS[every], 0).sum(axis=1) <= 4.6
    if min_layers:
        assert {tuple(row) for row in chains} == {tuple(row) for row in every[is_within]}
    free = np.asarray(limited.space.sample(jax.random.split(key)[0], 500))
    fits = np.where(free >= 0, COSTS[free], 0).sum(axis=1) <= 4.6
    assert 10 < fits.sum() < 490
    np.testing.assert_array_equal(chains[fits], free[fits])
    np.testing.assert_array_equal(env.sample_chains(key, problem, 9), problem.space.sample(key, 9))


def test_neighbors_are_within_the_limit(problem):
    chain = jnp.array([1, 0, 4, -1])
    limited = limit(problem, 4.6)
    rows, is_neighbor = env.neighbors(limited, chain)
    free, is_free = limited.space.neighbors(chain)
    np.testing.assert_array_equal(rows, free)
    fits = np.where(free >= 0, COSTS[free], 0).sum(axis=1) <= 4.6
    np.testing.assert_array_equal(is_neighbor, is_free & fits)
    assert 3 < np.sum(is_neighbor) < np.sum(is_free)
