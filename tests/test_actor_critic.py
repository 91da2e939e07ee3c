import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

import jchain as jc
from jchain.chain import PADDING
from jchain.encoding import Controller
from jchain.search import actor_critic as ac
from jchain.search import base


@pytest.fixture(scope="module", params=[jc.TokenEncoding(8), jc.WeightEncoding(8)])
def agent(request, problem):
    search = jc.ActorCritic(encoding=request.param, num_chains=16)
    state = search.init(jax.random.key(0), problem)
    # Larger weights than at the start, so that the policy is far from uniform.
    return search, state._replace(params=jax.tree.map(lambda leaf: 3 * leaf, state.params))


def test_it_can_be_sent_to_another_process():
    search = jc.ActorCritic(encoding=jc.WeightEncoding(8))
    assert jax.tree.structure(pickle.loads(pickle.dumps(search))) == jax.tree.structure(search)


def test_rank_rewards_by_hand():
    np.testing.assert_allclose(ac.rank_rewards(jnp.array([2.0, 1.0, jnp.inf, 2.0, 9.0])), [0.25, 1.0, -1.0, 0.25, -0.5])


def test_the_elite_is_the_best_different_chains():
    a, b, c, d = ([0, 4, -1], [1, 4, -1], [4, -1, -1], [0, 1, 4])
    none = base.Pool(jnp.full((3, 3), PADDING), jnp.full(3, jnp.inf))
    first = base.merge(none, jnp.array([a, a, b, c]), jnp.array([2.0, 2.0, 1.0, jnp.inf]))
    np.testing.assert_array_equal(first.chains, [b, a, [PADDING] * 3])
    np.testing.assert_array_equal(first.loss, [1.0, 2.0, jnp.inf])
    second = base.merge(first, jnp.array([b, c, d]), jnp.array([1.0, 1.5, 1.7]))
    np.testing.assert_array_equal(second.chains, [b, c, d])


def test_prefixes_are_those_of_the_elite(problem):
    elite = base.Pool(jnp.array([[2, 0, 5, -1], [1, 4, -1, -1], [-1, -1, -1, -1]]), jnp.array([1.0, 2.0, jnp.inf]))
    keys = jax.random.split(jax.random.key(0), 2000)
    draw = jax.jit(jax.vmap(ac.draw_prefix, in_axes=(0, None, None, None)))

    def share(rate):
        drawn = draw(keys, elite, jnp.array(rate), problem)
        rows, count = np.unique(drawn, axis=0, return_counts=True)
        return {tuple(row[row >= 0].tolist()): n / len(keys) for row, n in zip(rows, count, strict=True)}

    # 1/2 for each chain; then 1/3 for each prefix of the first, 1/2 for each of the second.
    expected = {(2, 0): 1 / 6, (2,): 1 / 6, (1,): 1 / 4, (): 5 / 12}
    found = share(1.0)
    assert found.keys() == expected.keys()
    assert all(found[prefix] == pytest.approx(expected[prefix], abs=0.04) for prefix in expected)
    assert share(0.0) == {(): 1.0}
    empty = base.Pool(jnp.full((3, 4), PADDING), jnp.full(3, jnp.inf))
    assert np.all(draw(keys, empty, jnp.array(1.0), problem) == PADDING)


def test_chains_go_on_from_their_prefix(agent, problem):
    search, state = agent
    controller, prefix = Controller(search.encoding), jnp.array([3, 1, -1, -1])
    keys = jax.random.split(jax.random.key(0), 32)
    chains, _ = jax.vmap(lambda k: ac.sample_chain(k, controller, state.params, state.sight, prefix, problem))(keys)
    jc.chain.validate(chains, 4, 2, 3)
    np.testing.assert_array_equal(chains[:, :2], np.tile([3, 1], (32, 1)))
    assert len(np.unique(chains, axis=0)) > 1


def test_imitation_is_the_mean_log_likelihood_of_the_elite(agent, problem):
    search, state = agent
    controller, chains = Controller(search.encoding), jnp.array([[2, 0, 5, -1], [4, -1, -1, -1], [-1, -1, -1, -1]])
    expected = 0.0
    for chain, num_tokens in ((chains[0], 3), (chains[1], 1)):
        logits, _ = ac.replay_chain(controller, state.params, state.sight, chain, problem)
        log_prob = np.asarray(jax.nn.log_softmax(logits))
        # Two chains, L = 4 slots.
        expected -= sum(log_prob[t, chain[t]] for t in range(num_tokens)) / 4 / 2
    elite = base.Pool(chains, jnp.array([1.0, 2.0, jnp.inf]))
    loss = ac.imitation_loss(state.params, controller, state.sight, elite, problem)
    np.testing.assert_allclose(loss, expected, rtol=1e-4)


def test_replay_gives_the_log_probabilities_of_the_rollout(agent, problem):
    search, state = agent
    controller = Controller(search.encoding)
    nothing = jnp.full(4, PADDING)
    for seed in range(6):
        chain, log_prob = ac.sample_chain(jax.random.key(seed), controller, state.params, state.sight, nothing, problem)
        jc.chain.validate(chain, 4, 2, 3)
        logits, values = ac.replay_chain(controller, state.params, state.sight, chain, problem)
        length = int(jc.chain.count_layers(chain, 4))
        expected = jax.nn.log_softmax(logits)[jnp.arange(length + 1), chain[: length + 1]]
        np.testing.assert_allclose(log_prob[: length + 1], expected, rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(log_prob[length + 1 :], 0)
        assert np.ptp(values[: length + 1]) > 0 or length == 0


def test_layers_are_never_taken_in_the_last_slot(agent, problem):
    search, state = agent
    logits, _ = ac.replay_chain(
        Controller(search.encoding), state.params, state.sight, jnp.array([0, 1, 2, 4]), problem
    )
    assert np.all(jax.nn.softmax(logits[3])[:4] == 0)
    assert np.all(jax.nn.softmax(logits[2]) > 0)


def test_the_loss_by_hand(agent, problem):
    """Actor, entropy and critic terms for one chain, written out in NumPy."""
    search, state = agent
    controller = Controller(search.encoding)
    chain, reward = jnp.array([2, 0, 5, -1]), 0.7
    logits, values = ac.replay_chain(controller, state.params, state.sight, chain, problem)
    logits, values = np.asarray(logits, np.float64), np.asarray(values, np.float64)
    log_prob = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    old = np.array([log_prob[t, a] for t, a in enumerate([2, 0, 5])]) - [0.5, 0.0, -0.5]
    # lambda returns backward: G_t = r_t + (1 - lambda) v_{t+1} + lambda G_{t+1}
    lam, returns = search.lambda_, np.zeros(3)
    returns[2] = reward
    for t in (1, 0):
        returns[t] = (1 - lam) * values[t + 1] + lam * returns[t + 1]
    advantage = returns - values[:3]
    ratio = np.exp([0.5, 0.0, -0.5])
    surrogate = np.minimum(ratio * advantage, np.clip(ratio, 0.8, 1.2) * advantage)
    entropy = -np.sum(np.exp(log_prob[:3]) * log_prob[:3], axis=1)
    # Means run over the L = 4 slots.
    expected = (
        -surrogate.sum() - search.entropy_weight * entropy.sum() + search.critic_weight * 0.5 * np.sum(advantage**2)
    ) / 4
    rollout = ac.Rollout(chain[None], jnp.append(jnp.array(old, jnp.float32), 0.0)[None], jnp.array([reward]))
    loss = search._ppo_loss(state.params, controller, state.sight, rollout, problem)
    np.testing.assert_allclose(loss, expected, rtol=1e-4)


def test_the_policy_improves(problem):
    """The chains it samples after 60 steps have a lower mean loss than nearly all that it sampled at first."""
    search = jc.ActorCritic(num_chains=32, entropy_weight=0.05)
    state, step = search.init(jax.random.key(0), problem), jax.jit(search.step)
    losses = []
    for key in jax.random.split(jax.random.key(1), 60):
        state, info = step(key, state, problem)
        losses.append(np.asarray(info.loss))
    assert np.mean(losses[-1]) < np.quantile(losses[0], 0.1)


def test_refreshed_elites_have_the_losses_of_the_new_weights(problem):
    search = jc.ActorCritic(encoding=jc.TokenEncoding(features=8), num_chains=6, num_elites=4)
    state, _ = search.step(jax.random.key(1), search.init(jax.random.key(0), problem), problem)
    params = jax.tree.map(lambda leaf: 1.5 * leaf, problem.bank.get_params(0))
    now = problem.with_bank(problem.bank.replace([0], [params]))
    other = jnp.array([[3, 2, 4, -1], [-1, -1, -1, -1]])
    after, layer_calls = search.refresh(state, now, other)
    expected = jnp.concatenate([state.elite.chains, other[:1]])
    loss = jc.evaluate(now, expected).loss
    order = jnp.argsort(loss)[:4]
    np.testing.assert_allclose(after.elite.loss, loss[order], rtol=1e-6)
    np.testing.assert_array_equal(after.elite.chains, expected[order])
    stale = [row for row in np.asarray(expected).tolist() if 0 in row or row == [3, 2, 4, -1]]
    assert layer_calls == reference.count_calls(stale, 4)[0]
    assert not np.array_equal(after.sight.entries, state.sight.entries)
    jax.tree.map(np.testing.assert_array_equal, after.params, state.params)
