import dataclasses
import pickle
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from conftest import make_bank

import jchain as jc
from jchain.agent import observations
from jchain.agent import replay_buffer as replay_lib
from jchain.agent.encoding import ActorCriticNetwork
from jchain.chain import PADDING
from jchain.search import actor_critic as ac
from jchain.search import base

NOTHING = jnp.zeros((4, 0))  # seen of a chain


@pytest.fixture(scope="module", params=[jc.TokenEncoding(8), jc.WeightEncoding(8)])
def agent(request, problem):
    search = jc.ActorCritic(encoding=request.param, num_chains=16)
    state = search.init(jax.random.key(0), problem)
    # Larger weights than at the start, so that the policy is far from uniform.
    return search, state._replace(params=jax.tree.map(lambda leaf: 3 * leaf, state.params))


def test_it_can_be_sent_to_another_process():
    search = jc.ActorCritic(encoding=jc.WeightEncoding(8))
    assert jax.tree.structure(pickle.loads(pickle.dumps(search))) == jax.tree.structure(search)


def test_the_elite_is_the_best_different_chains():
    a, b, c, d = ([0, 4, -1], [1, 4, -1], [4, -1, -1], [0, 1, 4])
    none = base.Pool(jnp.full((3, 3), PADDING), jnp.full(3, jnp.inf))
    first = base.merge(none, jnp.array([a, a, b, c]), jnp.array([2.0, 2.0, 1.0, jnp.inf]))
    np.testing.assert_array_equal(first.chains, [b, a, [PADDING] * 3])
    np.testing.assert_array_equal(first.loss, [1.0, 2.0, jnp.inf])
    second = base.merge(first, jnp.array([b, c, d]), jnp.array([1.0, 1.5, 1.7]))
    np.testing.assert_array_equal(second.chains, [b, c, d])


def test_prefixes_are_those_of_the_elite(problem):
    elite = base.Pool(
        jnp.array([[2, 0, 5, -1], [1, 4, -1, -1], [-1, -1, -1, -1]]), jnp.array([1.0, 2.0, jnp.inf])
    )
    keys = jax.random.split(jax.random.key(0), 2000)
    draw = jax.jit(jax.vmap(ac.draw_prefix, in_axes=(0, None, None, None)))

    def share(rate):
        drawn = draw(keys, elite, jnp.array(rate), problem)
        rows, count = np.unique(drawn, axis=0, return_counts=True)
        return {
            tuple(row[row >= 0].tolist()): n / len(keys) for row, n in zip(rows, count, strict=True)
        }

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
    controller, prefix = ActorCriticNetwork(search.encoding), jnp.array([3, 1, -1, -1])
    keys = jax.random.split(jax.random.key(0), 32)
    chains = jax.vmap(
        lambda k: ac.sample_chain(k, controller, state.params, state.sight, prefix, problem)
    )(keys).chain
    jc.chain.validate(chains, 4, 2, 3)
    np.testing.assert_array_equal(chains[:, :2], np.tile([3, 1], (32, 1)))
    assert len(np.unique(chains, axis=0)) > 1


def test_imitation_is_the_mean_log_likelihood_of_the_elite(agent, problem):
    search, state = agent
    controller, chains = (
        ActorCriticNetwork(search.encoding),
        jnp.array([[2, 0, 5, -1], [4, -1, -1, -1], [-1, -1, -1, -1]]),
    )
    expected = 0.0
    for chain, num_tokens in ((chains[0], 3), (chains[1], 1)):
        logits, _ = ac.replay_chain(controller, state.params, state.sight, chain, NOTHING, problem)
        log_prob = np.asarray(jax.nn.log_softmax(logits))
        # Two chains, L = 4 slots.
        expected -= sum(log_prob[t, chain[t]] for t in range(num_tokens)) / 4 / 2
    elite = base.Pool(chains, jnp.array([1.0, 2.0, jnp.inf]))
    loss = ac.imitation_loss(
        state.params, controller, state.sight, elite, jnp.zeros((3, 4, 0)), problem
    )
    np.testing.assert_allclose(loss, expected, rtol=1e-4)


def test_replay_gives_the_log_probabilities_of_the_rollout(agent, problem):
    search, state = agent
    controller = ActorCriticNetwork(search.encoding)
    nothing = jnp.full(4, PADDING)
    for seed in range(6):
        sample = ac.sample_chain(
            jax.random.key(seed), controller, state.params, state.sight, nothing, problem
        )
        chain, log_prob = sample.chain, sample.log_prob
        jc.chain.validate(chain, 4, 2, 3)
        logits, values = ac.replay_chain(
            controller, state.params, state.sight, chain, NOTHING, problem
        )
        length = int(jc.chain.count_layers(chain, 4))
        expected = jax.nn.log_softmax(logits)[jnp.arange(length + 1), chain[: length + 1]]
        np.testing.assert_allclose(log_prob[: length + 1], expected, rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(log_prob[length + 1 :], 0)
        assert np.ptp(values[: length + 1]) > 0 or length == 0


def test_layers_are_never_taken_in_the_last_slot(agent, problem):
    search, state = agent
    controller, chain = ActorCriticNetwork(search.encoding), jnp.array([0, 1, 2, 4])
    logits, _ = ac.replay_chain(controller, state.params, state.sight, chain, NOTHING, problem)
    assert np.all(jax.nn.softmax(logits[3])[:4] == 0)
    assert np.all(jax.nn.softmax(logits[2]) > 0)


class Episode(NamedTuple):
    """One chain, with what its loss is made of, in NumPy."""

    rollout: ac.Rollout
    values: np.ndarray  # [3], before each token
    log_prob: np.ndarray  # [3, E]
    ratio: np.ndarray  # [3], of the policy now to that of then


REWARD = 0.7


@pytest.fixture
def episode(agent, problem):
    search, state = agent
    chain = jnp.array([2, 0, 5, -1])
    controller = ActorCriticNetwork(search.encoding)
    logits, values = ac.replay_chain(controller, state.params, state.sight, chain, NOTHING, problem)
    logits, values = np.asarray(logits, np.float64), np.asarray(values, np.float64)
    log_prob = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    moved = np.array([0.5, 0.0, -0.5])
    old = log_prob[np.arange(3), [2, 0, 5]] - moved
    old = jnp.append(jnp.array(old, jnp.float32), 0.0)
    rollout = ac.Rollout(chain[None], old[None], jnp.array([REWARD]), NOTHING[None])
    return Episode(rollout, values[:3], log_prob[:3], np.exp(moved))


def loss_of(search, state, rollout, problem):
    return search._rollout_loss(
        state.params, ActorCriticNetwork(search.encoding), state.sight, rollout, problem
    )


def add_up(search, actor, log_prob, error):
    """Actor, entropy and critic terms; means run over the L = 4 slots."""
    entropy = -np.sum(np.exp(log_prob) * log_prob, axis=1)
    critic = search.critic_weight * 0.5 * np.sum(error**2)
    return (-actor.sum() - search.entropy_weight * entropy.sum() + critic) / 4


def test_the_loss_by_hand(agent, episode, problem):
    search, state = agent
    # lambda returns backward: G_t = r_t + (1 - lambda) v_{t+1} + lambda G_{t+1}
    lam, returns, values = search.lambda_, np.zeros(3), episode.values
    returns[2] = REWARD
    for t in (1, 0):
        returns[t] = (1 - lam) * values[t + 1] + lam * returns[t + 1]
    advantage = returns - values
    surrogate = np.minimum(episode.ratio * advantage, np.clip(episode.ratio, 0.8, 1.2) * advantage)
    expected = add_up(search, surrogate, episode.log_prob, advantage)
    np.testing.assert_allclose(
        loss_of(search, state, episode.rollout, problem), expected, rtol=1e-4
    )


def test_the_loss_with_replay_by_hand(agent, episode, problem):
    search, state = agent
    search = dataclasses.replace(search, num_replays=1)
    lam, values, clipped = search.lambda_, episode.values, np.minimum(episode.ratio, 1.0)
    following, rewards = np.append(values[1:], 0.0), np.array([0.0, 0.0, REWARD])
    # v_s - V(x_s) = rho_s (r_s + V(x_{s+1}) - V(x_s)) + lambda c_s (v_{s+1} - V(x_{s+1})), arXiv:1802.01561 (1)
    error = np.zeros(4)
    for t in (2, 1, 0):
        error[t] = (
            clipped[t] * (rewards[t] + following[t] - values[t]) + lam * clipped[t] * error[t + 1]
        )
    # rho_s (r_s + v_{s+1} - V(x_s)), with the error of the next step mixed in by lambda.
    advantage = clipped * (rewards + following + lam * error[1:] - values)
    chosen = episode.log_prob[np.arange(3), [2, 0, 5]]
    expected = add_up(search, advantage * chosen, episode.log_prob, error[:3])
    np.testing.assert_allclose(
        loss_of(search, state, episode.rollout, problem), expected, rtol=1e-4
    )


def test_the_oldest_chains_make_room(problem):
    def make(losses):
        chains = jnp.array([[4, -1, -1, -1], [5, -1, -1, -1]], jnp.int32)
        log_prob = jnp.zeros((2, 4)).at[:, 0].set(-losses)
        return ac.Sample(chains, log_prob, jnp.zeros((2, 4, 1)) + losses[:, None, None], losses)

    def draw(replay):
        return replay_lib.recall(jax.random.key(0), replay, 50)

    replay = replay_lib.remember(
        replay_lib.empty_replay(3, problem, jnp.zeros(1)), make(jnp.array([1.0, 2.0]))
    )
    drawn = draw(replay)
    assert set(np.asarray(drawn.loss).tolist()) == {1.0, 2.0}
    np.testing.assert_array_equal(drawn.chain[:, 0], np.where(drawn.loss == 1.0, 4, 5))
    np.testing.assert_array_equal(drawn.log_prob[:, 0], -drawn.loss)
    np.testing.assert_array_equal(drawn.features[:, 2, 0], drawn.loss)
    replay = replay_lib.remember(replay, make(jnp.array([3.0, 4.0])))
    assert set(np.asarray(draw(replay).loss).tolist()) == {2.0, 3.0, 4.0}


def test_value_by_hand(agent, problem):
    """What the critic's two layers make of the encoding, walked by hand."""
    search, state = agent
    chains = np.array([[2, 0, 5, -1], [4, -1, -1, -1], [3, 3, 1, 4]])
    found = search.value(state, jnp.asarray(chains), problem)
    log_prob = search.policy(state, jnp.asarray(chains), problem)
    params, encoding = state.params["controller"]["params"], search.encoding
    bound = {"params": params["encoding"]}
    for row, chain in enumerate(chains):
        carry = encoding.apply(bound, state.sight.entries, NOTHING[0], method="initial_carry")
        is_over = False
        for slot, token in enumerate(chain):
            seen = encoding.apply(bound, carry, method="read")
            hidden = np.maximum(
                seen @ params["value_hidden"]["kernel"] + params["value_hidden"]["bias"], 0
            )
            value = (hidden @ params["value_out"]["kernel"] + params["value_out"]["bias"])[0]
            np.testing.assert_allclose(
                found[row, slot], 0.0 if is_over else value, rtol=1e-4, atol=1e-5
            )
            if not is_over:
                np.testing.assert_allclose(np.exp(log_prob[row, slot]).sum(), 1.0, rtol=1e-5)
            is_over |= token >= 4
            carry = encoding.apply(
                bound,
                carry,
                jnp.array(max(token, 0)),
                state.sight.entries,
                NOTHING[0],
                method="advance",
            )


@pytest.mark.slow
def test_the_critic_learns_the_value_of_its_policy(problem):
    """With rewards of a fixed scale and a policy that hardly moves: the mean reward of the chains that it takes."""
    search = jc.ActorCritic(
        num_chains=64, learning_rate=1e-2, imitation_weight=0.0, restart_rate=0.0, lambda_=1.0, entropy_weight=50.0,
        reward_fn=jc.agent.rewards.log_rewards, num_replays=16,
    )  # fmt: skip
    state, step = search.init(jax.random.key(0), problem), jax.jit(search.step)
    rewards = []
    for key in jax.random.split(jax.random.key(1), 100):
        state, info = step(key, state, problem)
        rewards.append(np.asarray(jc.agent.rewards.log_rewards(info.loss)).mean())
    root = search.value(state, info.chains[:1], problem)[0, 0]
    assert abs(float(root) - np.mean(rewards[50:])) < 0.1


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


@pytest.mark.slow
def test_refreshed_agents_see_what_the_new_weights_do(problem):
    search = jc.ActorCritic(
        encoding=OBSERVING, num_chains=6, num_elites=4, num_replays=2, replay_size=8
    )
    state, _ = search.step(jax.random.key(1), search.init(jax.random.key(0), problem), problem)
    params = jax.tree.map(lambda leaf: 1.5 * leaf, problem.bank.get_params(0))
    now = problem.with_bank(problem.bank.replace([0], [params]))
    after, layer_calls = search.refresh(state, now, jnp.full((1, 4), -1))
    expected = jax.vmap(lambda chain: observations.observe_chain(OBSERVING.observe, now, chain))(
        after.elite.chains
    )
    length = jc.chain.count_layers(after.elite.chains, 4)
    for row, wanted, slots in zip(after.elite_features, expected, length, strict=True):
        np.testing.assert_allclose(row[: slots + 1], wanted[: slots + 1], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
        after.elite.loss, jc.evaluate(now, after.elite.chains).loss, rtol=1e-6
    )
    assert layer_calls == jc.evaluate(now, state.elite.chains).layer_calls
    assert after.replay.num_stored == 0
    step = jax.jit(search.step)
    assert jnp.isfinite(step(jax.random.key(2), after, now)[1].loss).all()


OBSERVING = jc.JointEncoding(
    (jc.TokenEncoding(8), jc.ObservedEncoding(jc.agent.observations.observe_activations, 8))
)


@pytest.mark.slow
def test_what_is_seen_is_kept_beside_chains(problem):
    """Of sampled, replayed and best chains it is what walking them anew shows, so updates see what the policy saw."""
    search = jc.ActorCritic(
        encoding=OBSERVING, num_chains=6, num_replays=4, replay_size=8, restart_rate=0.5
    )
    state, step = jax.jit(search.init)(jax.random.key(0), problem), jax.jit(search.step)
    for key in jax.random.split(jax.random.key(1), 3):
        state, info = step(key, state, problem)
    look = jax.jit(
        jax.vmap(lambda chain: observations.observe_chain(OBSERVING.observe, problem, chain))
    )
    assert np.ptp(look(info.chains)[:, 1]) > 0
    for chains, features in (
        (state.elite.chains, state.elite_features),
        (state.replay.chains, state.replay.features),
    ):
        rows = np.flatnonzero(np.asarray(chains)[:, 0] >= 0)
        expected, length = look(chains), jc.chain.count_layers(chains, 4)
        for row in rows:
            upto = int(length[row]) + 1
            np.testing.assert_allclose(
                features[row, :upto], expected[row, :upto], rtol=1e-3, atol=1e-4
            )
    there = np.asarray(state.elite.loss) < np.inf

    @jax.jit
    @jax.vmap
    def replay(chain, seen):
        return ac.replay_chain(
            ActorCriticNetwork(OBSERVING), state.params, state.sight, chain, seen, problem
        )

    _, values = replay(state.elite.chains, state.elite_features)
    found = jax.jit(search.value)(state, state.elite.chains, problem)
    is_before_end = (
        np.arange(4) <= np.asarray(jc.chain.count_layers(state.elite.chains, 4))[:, None]
    )
    np.testing.assert_allclose(
        found[there], np.where(is_before_end, values, 0)[there], rtol=1e-3, atol=1e-4
    )


@pytest.mark.slow
def test_params_of_other_banks_are_where_it_starts(problem):
    search = jc.ActorCritic(encoding=OBSERVING, num_chains=6)
    other = jc.Problem(make_bank(3, 1, seed=8), problem.data, max_layers=2)
    params = jc.agent.pretrain.pretrain_agent(
        jax.random.key(0), search, [other, other], num_steps=2
    )
    warm = dataclasses.replace(search, params=params)
    state = warm.init(jax.random.key(5), problem)
    jax.tree.map(np.testing.assert_array_equal, state.params, params)
    fresh = search.init(jax.random.key(5), problem).params
    assert any(
        np.any(a != b) for a, b in zip(jax.tree.leaves(fresh), jax.tree.leaves(params), strict=True)
    )
    jc.run(jax.random.key(0), warm, problem, budget=40)
    with pytest.raises(
        ValueError, match="expected params of the controller of this encoding, .*, got"
    ):
        dataclasses.replace(warm, encoding=jc.TokenEncoding(8)).init(jax.random.key(0), problem)
