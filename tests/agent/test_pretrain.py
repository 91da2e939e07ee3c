import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import assert_trees_close, make_bank, make_batch

import jchain as jc
from jchain.agent.observations import compress_loss


@pytest.fixture(scope="module")
def small():
    return jc.Problem(
        make_bank(3, 2, seed=3), make_batch(), max_layers=3, layer_cost=[0.1, 0.0, 0.02]
    )


@pytest.fixture(scope="module")
def training_set(small):
    return jc.agent.pretrain.make_training_set(small)


@pytest.mark.slow
def test_targets_are_the_best_losses_of_chains_with_each_prefix(small, training_set):
    check_training_set(small, training_set)
    fixed = jc.Problem(small.bank, small.data, 3, layer_cost=small.layer_cost, min_layers=3)
    check_training_set(fixed, jc.agent.pretrain.make_training_set(fixed))


def check_training_set(small, training_set):
    chains, out = jc.evaluate_all(small)
    loss = compress_loss(out.loss)
    prefixes = [(a,) for a in range(3)] + [(a, b) for a in range(3) for b in range(3)]
    assert training_set.sizes == (3, 9)
    for i, prefix in enumerate(prefixes):
        has_prefix = (chains[:, : len(prefix)] == prefix).all(axis=1)
        np.testing.assert_allclose(training_set.best[i], loss[has_prefix].min(), rtol=1e-4)
        stops = jc.evaluate(small, jc.chain.pad([(*prefix, 3), (*prefix, 4)], 3)).loss
        np.testing.assert_allclose(training_set.stop[i], compress_loss(stops.min()), rtol=1e-4)


@pytest.mark.slow
def test_a_critic_learns_and_steers_the_search(small, training_set):
    critic = jc.pretrain_critic(jax.random.key(0), [training_set], num_steps=1000, width=8)
    error = np.abs(
        training_set.stop - critic.gain(jnp.asarray(training_set.inputs)) - training_set.best
    )
    assert error.mean() < 0.5 * np.abs(training_set.stop - training_set.best).mean()
    search = jc.CriticSearch(critic, width=8, ridge=jnp.inf, epsilon=0.0)
    state = jax.jit(search.init)(jax.random.key(0), small)
    state, _ = jax.jit(search.step)(jax.random.key(0), state, small)
    # The search predicts the first prefixes as the critic does.
    place = np.argsort(state.prefixes.chains[1, :3, 0])
    expected = training_set.stop[:3] - critic.gain(jnp.asarray(training_set.inputs[:3]))
    np.testing.assert_allclose(
        np.asarray(state.prefixes.prior_prediction[1, :3])[place], expected, rtol=1e-3, atol=1e-3
    )


def test_pretrain_rejects_bad_input(small):
    with pytest.raises(ValueError, match="max_layers of at least 2, got 1"):
        jc.agent.pretrain.make_training_set(jc.Problem(small.bank, small.data, 1))
    with pytest.raises(ValueError, match="at most 1,048,576 prefixes, got"):
        jc.agent.pretrain.make_training_set(jc.Problem(small.bank, small.data, 20))
    for problems, options in (([], {}), ([small], {"num_steps": 0}), ([small], {"width": 0})):
        with pytest.raises(ValueError, match="at least one problem"):
            jc.pretrain_critic(jax.random.key(0), problems, **options)


@pytest.mark.slow
def test_an_agent_carries_params_from_problem_to_problem(small):
    agent = jc.ActorCritic(jc.WeightEncoding(4), 4, 1)
    other = jc.Problem(make_bank(3, 2, seed=9), make_batch(), max_layers=3)
    found = jc.agent.pretrain.pretrain_agent(jax.random.key(0), agent, [small, other], num_steps=2)
    init_key, *keys = jax.random.split(jax.random.key(0), 3)
    state = agent.init(init_key, small)
    for key, problem in zip(keys, (small, other), strict=True):
        init_key, step_key = jax.random.split(key)
        state = agent.init(init_key, problem)._replace(
            params=state.params, opt_state=state.opt_state
        )
        for step in jax.random.split(step_key, 2):
            state, _ = jax.jit(agent.step)(step, state, problem)
    assert_trees_close(found, state.params, rtol=1e-4, atol=1e-5)
    for problems, num_steps in (([], 2), ([small], 0)):
        with pytest.raises(
            ValueError, match="expected at least one problem and num_steps of at least 1, got"
        ):
            jc.agent.pretrain.pretrain_agent(
                jax.random.key(0), agent, problems, num_steps=num_steps
            )


def test_prefixes_without_a_finite_loss_are_not_examples(small, training_set):
    broken = training_set._replace(
        stop=np.where(np.arange(len(training_set.stop)) == 4, np.inf, training_set.stop)
    )
    critic = jc.pretrain_critic(jax.random.key(0), [broken], num_steps=5, width=8)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(critic))
    with pytest.raises(ValueError, match="expected problems with chains of finite loss, got none"):
        jc.pretrain_critic(
            jax.random.key(0),
            [training_set._replace(best=np.full_like(training_set.best, np.nan))],
            num_steps=5,
        )


def test_a_problem_with_a_limit_of_the_cost_is_refused():
    problem = jc.Problem(make_bank(3, 2), make_batch(), 3, token_costs=[1.0] * 5, max_cost=2.0)
    with pytest.raises(ValueError, match="expected a problem without max_cost, got max_cost=2.0"):
        jc.pretrain_critic(jax.random.key(0), [problem])
