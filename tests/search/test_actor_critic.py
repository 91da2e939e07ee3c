import dataclasses
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from conftest import make_bank

import jchain as jc
from jchain.agent import losses, observations
from jchain.agent.encoding import ActorCriticNetwork
from jchain.agent.policy import Policy, evaluate_actions
from jchain.agent.rollout import Rollout
from jchain.chain import PADDING
from jchain.search.pool import Pool, merge

NOTHING = jnp.zeros((4, 0))  # features of the prefixes of a chain, if nothing is observed


@pytest.fixture(scope="module", params=[jc.TokenEncoding(8), jc.WeightEncoding(8)])
def agent(request, problem):
    search = jc.ActorCritic(encoding=request.param, num_chains=16)
    state = search.init(jax.random.key(0), problem)
    # With larger weights than initially, the policy is far from uniform.
    return search, state._replace(params=jax.tree.map(lambda leaf: 3 * leaf, state.params))


def test_actor_critic_can_be_pickled():
    search = jc.ActorCritic(encoding=jc.WeightEncoding(8))
    assert jax.tree.structure(pickle.loads(pickle.dumps(search))) == jax.tree.structure(search)


def test_the_elite_is_the_best_different_chains():
    a, b, c, d = ([0, 4, -1], [1, 4, -1], [4, -1, -1], [0, 1, 4])
    none = Pool(jnp.full((3, 3), PADDING), jnp.full(3, jnp.inf))
    first = merge(none, jnp.array([a, a, b, c]), jnp.array([2.0, 2.0, 1.0, jnp.inf]))
    np.testing.assert_array_equal(first.chains, [b, a, [PADDING] * 3])
    np.testing.assert_array_equal(first.loss, [1.0, 2.0, jnp.inf])
    second = merge(first, jnp.array([b, c, d]), jnp.array([1.0, 1.5, 1.7]))
    np.testing.assert_array_equal(second.chains, [b, c, d])


def make_policy(search, state):
    return Policy(ActorCriticNetwork(search.encoding), state.params, state.inputs)


def test_imitation_is_the_mean_log_likelihood_of_the_elite(agent, problem):
    search, state = agent
    policy = make_policy(search, state)
    chains = jnp.array([[2, 0, 5, -1], [4, -1, -1, -1], [-1, -1, -1, -1]])
    expected = 0.0
    for chain, num_tokens in ((chains[0], 3), (chains[1], 1)):
        logits, _ = evaluate_actions(policy, chain, NOTHING, problem)
        log_prob = np.asarray(jax.nn.log_softmax(logits))
        # Two chains, L = 4 slots.
        expected -= sum(log_prob[t, chain[t]] for t in range(num_tokens)) / 4 / 2
    elite = Pool(chains, jnp.array([1.0, 2.0, jnp.inf]))
    loss = search._imitation_loss(policy, elite, jnp.zeros((3, 4, 0)), problem)
    np.testing.assert_allclose(loss, expected, rtol=1e-4)


@pytest.mark.parametrize("is_replaying", [False, True])
def test_the_loss_is_the_weighted_mean_over_chains(agent, problem, is_replaying):
    search, state = agent
    policy = make_policy(search, state)
    chains = jnp.array([[2, 0, 5, -1], [4, -1, -1, -1]])
    rewards = jnp.array([0.7, -0.2])
    batch = Rollout(chains, jnp.full((2, 4), -1.5), jnp.zeros((2, 4, 0)), jnp.zeros(2))
    terms = []
    for row, (chain, reward) in enumerate(zip(chains, rewards, strict=True)):
        logits, values = evaluate_actions(policy, chain, NOTHING, problem)
        length = problem.space.count_layers(chain)
        episode = losses.make_episode(chain, length, reward, values.dtype)
        if is_replaying:
            out = losses.vtrace_loss(logits, values, batch.log_probs[row], episode, search.lambda_)
        else:
            out = losses.ppo_loss(
                logits, values, batch.log_probs[row], episode, search.lambda_, search.clip
            )
        entropy = losses.entropy_loss(logits, episode.w_t)
        terms.append(
            out.actor + search.entropy_weight * entropy + search.critic_weight * out.critic
        )
    found = search._policy_loss(policy, batch, rewards, problem, is_replaying)
    np.testing.assert_allclose(found, np.mean(terms), rtol=1e-5)


def test_critic_value_by_hand(agent, problem):
    """The critic's two layers on top of the encoding, computed by hand."""
    search, state = agent
    chains = np.array([[2, 0, 5, -1], [4, -1, -1, -1], [3, 3, 1, 4]])
    found = search.value(state, problem, jnp.asarray(chains))
    log_prob = search.policy(state, problem, jnp.asarray(chains))
    params, encoding = state.params["controller"]["params"], search.encoding
    bound = {"params": params["encoding"]}
    for row, chain in enumerate(chains):
        carry = encoding.apply(bound, state.inputs.entries, NOTHING[0], method="init_carry")
        is_over = False
        for slot, token in enumerate(chain):
            encoded = encoding.apply(bound, carry, method="read")
            hidden = np.maximum(
                encoded @ params["value_hidden"]["kernel"] + params["value_hidden"]["bias"], 0
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
                state.inputs.entries,
                NOTHING[0],
                method="advance",
            )


@pytest.mark.slow
def test_the_critic_learns_the_value_of_its_policy(problem):
    """If the policy hardly changes, the value is the mean reward of its chains (fixed scale)."""
    search = jc.ActorCritic(
        num_chains=64,
        learning_rate=1e-2,
        imitation_weight=0.0,
        restart_rate=0.0,
        lambda_=1.0,
        entropy_weight=50.0,
        reward_fn=jc.agent.rewards.log_rewards,
        num_replays=16,
    )
    state, step = search.init(jax.random.key(0), problem), jax.jit(search.step)
    rewards = []
    for key in jax.random.split(jax.random.key(1), 100):
        state, info = step(key, state, problem)
        rewards.append(np.asarray(jc.agent.rewards.log_rewards(info.loss)).mean())
    root = search.value(state, problem, info.chains[:1])[0, 0]
    assert abs(float(root) - np.mean(rewards[50:])) < 0.1


@pytest.mark.slow
def test_the_policy_improves(problem):
    """The mean loss after 60 steps is below that of 90% of the chains of the first step."""
    search = jc.ActorCritic(num_chains=32, entropy_weight=0.05)
    state, step = search.init(jax.random.key(0), problem), jax.jit(search.step)
    losses = []
    for key in jax.random.split(jax.random.key(1), 60):
        state, info = step(key, state, problem)
        losses.append(np.asarray(info.loss))
    assert np.mean(losses[-1]) < np.quantile(losses[0], 0.1)


def test_actor_critic_flags():
    plain, scored = jc.ActorCritic(), jc.ActorCritic(score_kind="linearized")
    assert (plain.needs_gradient, scored.needs_gradient) == (False, True)
    assert not plain.is_deterministic
    assert not plain.needs_invertible


@pytest.mark.slow
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
    assert not np.array_equal(after.inputs.entries, state.inputs.entries)
    jax.tree.map(np.testing.assert_array_equal, after.params, state.params)


@pytest.mark.slow
def test_refreshed_agents_observe_the_new_weights(problem):
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
    assert after.replay_buffer.num_added == 0
    step = jax.jit(search.step)
    assert jnp.isfinite(step(jax.random.key(2), after, now)[1].loss).all()


OBSERVING = jc.JointEncoding(
    (jc.TokenEncoding(8), jc.ObservedEncoding(jc.agent.observations.observe_activations, 8))
)


@pytest.mark.slow
def test_observed_features_are_kept_with_chains(problem):
    """They equal new observations of the sampled, replayed, and best chains."""
    search = jc.ActorCritic(
        encoding=OBSERVING, num_chains=6, num_replays=4, replay_size=8, restart_rate=0.5
    )
    state, step = jax.jit(search.init)(jax.random.key(0), problem), jax.jit(search.step)
    for key in jax.random.split(jax.random.key(1), 3):
        state, info = step(key, state, problem)
    observe = jax.jit(
        jax.vmap(lambda chain: observations.observe_chain(OBSERVING.observe, problem, chain))
    )
    assert np.ptp(observe(info.chains)[:, 1]) > 0
    for chains, features in (
        (state.elite.chains, state.elite_features),
        (state.replay_buffer.chains, state.replay_buffer.features),
    ):
        rows = np.flatnonzero(np.asarray(chains)[:, 0] >= 0)
        expected, length = observe(chains), jc.chain.count_layers(chains, 4)
        for row in rows:
            upto = int(length[row]) + 1
            np.testing.assert_allclose(
                features[row, :upto], expected[row, :upto], rtol=1e-3, atol=1e-4
            )
    there = np.asarray(state.elite.loss) < np.inf

    policy = make_policy(search, state)

    @jax.jit
    @jax.vmap
    def evaluate(chain, features):
        return evaluate_actions(policy, chain, features, problem)

    _, values = evaluate(state.elite.chains, state.elite_features)
    found = jax.jit(search.value)(state, problem, state.elite.chains)
    is_before_end = (
        np.arange(4) <= np.asarray(jc.chain.count_layers(state.elite.chains, 4))[:, None]
    )
    np.testing.assert_allclose(
        found[there], np.where(is_before_end, values, 0)[there], rtol=1e-3, atol=1e-4
    )


@pytest.mark.slow
def test_actor_critic_starts_from_params_of_other_banks(problem):
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
        ValueError, match="expected params of this encoding's network, with .* of shape .*, got"
    ):
        dataclasses.replace(warm, encoding=jc.TokenEncoding(8)).init(jax.random.key(0), problem)
