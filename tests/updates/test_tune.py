import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import several_inputs
from conftest import HEAD, LAYER, init_params, make_bank, make_batch
from policy_cases import is_equal

import jchain as jc
from jchain.updates import tune

SGD = optax.sgd(0.3)


def tune_by_hand(key, problem, tokens, num_steps, rate, tuned):
    """Run gradient descent on a dict of params per layer; a repeated layer has only one dict."""
    bank, (x, y) = problem.bank, problem.data
    module = {t: group.module for group in (*bank.layers, *bank.heads) for t in group.tokens}
    params = {t: bank.get_params(t) for t in set(tokens)}

    def loss(params, rows):
        hidden = jax.tree.map(lambda leaf: leaf[rows], x)
        for token in tokens:
            hidden = module[token].apply({"params": params[token]}, hidden)
        return optax.softmax_cross_entropy_with_integer_labels(hidden, y[rows]).mean()

    differentiate = jax.jit(jax.grad(loss))
    for t in range(num_steps):
        rows = jax.random.choice(
            jax.random.fold_in(key, t), len(y), (min(128, len(y)),), replace=False
        )
        gradient = differentiate(params, rows)
        params = {
            t: jax.tree.map(lambda p, g: p - rate * g, params[t], gradient[t])
            if t in tuned
            else params[t]
            for t in params
        }
    return params


@pytest.mark.parametrize(
    ("tokens", "tuned"), [([3, 1, 3, 5], None), ([0, 2, 1, 6], [2, 6]), ([5], None)]
)
def test_steps_equal_a_plain_loop(two_group_problem, tokens, tuned):
    problem, key = two_group_problem, jax.random.key(3)
    bank = tune.tune_chain(
        key, problem, jc.chain.pad([tokens], 3)[0], num_steps=4, optimizer=SGD, tokens=tuned
    )
    expected = tune_by_hand(key, problem, tokens, 4, 0.3, tuned or tokens)
    for token, params in expected.items():
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
            bank.get_params(token),
            params,
        )
    for token in range(7):
        is_tuned = token in (tuned or tokens)
        assert bank.get_versions()[token] == is_tuned
        assert is_equal(bank.get_params(token), problem.bank.get_params(token)) == (not is_tuned)
        assert (
            bank.origins[token] == "4 gradient steps from " * is_tuned + problem.bank.origins[token]
        )


def test_steps_on_several_inputs_equal_a_plain_loop():
    problem, tokens = several_inputs.make_dict_problem(max_layers=1), [2, 3]
    key = jax.random.key(3)
    bank = tune.tune_chain(key, problem, np.array(tokens), num_steps=1, optimizer=SGD)
    for token, params in tune_by_hand(key, problem, tokens, 1, 0.3, tokens).items():
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
            bank.get_params(token),
            params,
        )


def test_convolutions_unrolled_equal_a_compiled_loop(monkeypatch):
    layer, head = [jc.layers.ConvBlock(2, 1), jc.layers.ConvBlock(2, 2)], jc.layers.PoolHead(3)
    x = jax.random.normal(jax.random.key(0), (9, 4, 4, 2))
    data = jc.Batch(x, make_batch().y)
    bank = jc.train.random(
        jax.random.key(1), data, layer=layer, head=head, num_layers=4, depth=2, num_steps=0
    )
    problem = jc.Problem(bank, data, max_layers=3)
    chain = np.array([1, 2, 1, 4])
    unrolled = tune.tune_chain(jax.random.key(2), problem, chain, num_steps=3)
    monkeypatch.setattr(tune, "is_stepwise", lambda params: False)
    looped = tune.tune_chain(jax.random.key(2), problem, chain, num_steps=3)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), unrolled, looped
    )
    assert not is_equal(unrolled.get_params(1), bank.get_params(1))
    assert is_equal(unrolled.get_params(0), bank.get_params(0))


def test_invertible_layers_stay_invertible():
    layer = jc.layers.InvertibleDense(5)
    problem = jc.Problem(make_bank(layer=layer), make_batch(), max_layers=2)
    start = problem.bank.replace([0], [layer.project(problem.bank.get_params(0))])
    bank = tune.tune_chain(
        jax.random.key(0),
        problem.with_bank(start),
        np.array([0, 4, -1]),
        num_steps=5,
        optimizer=SGD,
    )
    params = bank.get_params(0)
    assert not is_equal(params, start.get_params(0))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), layer.project(params), params
    )


def test_training_on_chains_changes_only_their_layers_and_heads(two_group_problem):
    problem = two_group_problem
    chains = jnp.array([[0, 3, 5, -1], [-1, -1, -1, -1], [0, 0, 4, 5]])
    before = tune.init(problem.bank, optax.adam(0.1))
    train_on = jax.jit(tune.train_on, static_argnames="optimizer")
    after = train_on(jax.random.key(0), before, problem, chains, optimizer=optax.adam(0.1))
    np.testing.assert_array_equal(after.bank.versions, [2, 0, 0, 1, 1, 2, 0])
    for token in range(7):
        is_same = is_equal(after.bank.get_params(token), problem.bank.get_params(token))
        assert is_same == (token in (1, 2, 6))
    # Each layer has its own Adam state, which counts only that layer's steps.
    counts = [state[0].count.tolist() for state in after.opt_states]
    assert counts == [[2, 0, 0], [1, 1], [2, 0]]


def test_training_on_one_chain_equals_tuning_it(problem):
    chain, key = jnp.array([2, 0, 5, -1]), jax.random.key(4)
    state = tune.train_on(key, tune.init(problem.bank, SGD), problem, chain[None], SGD)
    tuned = tune.tune_chain(key, problem, chain, num_steps=1, optimizer=SGD)
    banks = state.bank.without_names(), tuned.without_names()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), *banks)


def test_training_cost():
    # 10 steps of 3 calls for each of 4 layers, on minibatches of half the split's size.
    assert tune.training_cost(4, 1000, 256, 10) == 60
    assert tune.training_cost(np.array([1, 2]), 1000, 256) == 5
    assert tune.training_cost(4, 64, 256, 10) == 30
    assert tune.training_cost(0, 1000, 256, 10) == 0


def test_invalid_input_raises(problem):
    key, chain = jax.random.key(0), np.array([0, 4, -1, -1])
    with pytest.raises(ValueError, match="head"):
        tune.tune_chain(key, problem, np.array([0, 1, 2, 3]))
    with pytest.raises(ValueError, match=r"tokens of the chain \[0, 4\], got 10 and \[1\]"):
        tune.tune_chain(key, problem, chain, num_steps=10, tokens=[1])
    with pytest.raises(ValueError, match="num_steps of at least 0"):
        tune.tune_chain(key, problem, chain, num_steps=-1)
    assert tune.tune_chain(key, problem, chain, num_steps=0) is problem.bank


def test_a_chain_without_layers_tunes_only_its_head():
    bank = make_bank(layer=nn.LayerNorm())
    problem = jc.Problem(bank, make_batch(), max_layers=1)
    tuned = tune.tune_chain(jax.random.key(0), problem, np.array([4, -1]), num_steps=2)
    np.testing.assert_array_equal(tuned.get_versions(), [0, 0, 0, 0, 1, 0])


def test_modules_without_params_can_be_in_a_tuned_chain():
    class Scale(nn.Module):
        @nn.compact
        def __call__(self, x):
            return 2 * x

    bank = jc.Bank.stack(
        [Scale(), *[LAYER] * 2],
        [{}, *init_params(LAYER, jax.random.key(0), 2, (5,))],
        HEAD,
        init_params(HEAD, jax.random.key(1), 1, (5,)),
    )
    problem = jc.Problem(bank, make_batch(), max_layers=3)
    tuned = tune.tune_chain(jax.random.key(0), problem, np.array([0, 1, 3, -1]), num_steps=2)
    assert not is_equal(tuned.get_params(1), bank.get_params(1))
    state = tune.train_on(
        jax.random.key(0), tune.init(bank, SGD), problem, jnp.array([[0, 2, 3, -1]]), SGD
    )
    np.testing.assert_array_equal(state.bank.versions, [1, 0, 1, 1])
    nameless = tune.tune_chain(
        jax.random.key(0), problem.without_names(), np.array([1, 3, -1, -1]), num_steps=2
    )
    assert nameless.names == ()


def test_steps_to_nonfinite_weights_are_skipped(problem):
    chain = jnp.array([[2, 0, 5, -1]])
    state = tune.init(problem.bank, optax.sgd(1e38))
    for seed in range(3):
        state = tune.train_on(jax.random.key(seed), state, problem, chain, optax.sgd(1e38))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.bank))


@pytest.mark.parametrize("dtype", [jnp.float16, pytest.param(jnp.bfloat16, marks=pytest.mark.slow)])
def test_half_precision_banks_are_trained_in_float32_and_rounded_once(problem, dtype):
    """Adam fails in half precision: its epsilon is 0 in float16, its decay is 1 in bfloat16."""
    half = jax.tree.map(lambda leaf: leaf.astype(dtype), problem.bank)
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), half)
    chain, key = np.array([2, 1, 4, -1]), jax.random.key(0)
    tuned, expected = (
        tune.tune_chain(
            key, problem.with_bank(bank), chain, num_steps=10, optimizer=optax.adam(1e-2)
        )
        for bank in (half, wide)
    )
    for token in chain[:3].tolist():
        rounded = jax.tree.map(lambda leaf: leaf.astype(dtype), expected.get_params(token))
        assert is_equal(tuned.get_params(token), rounded)
        assert not is_equal(tuned.get_params(token), half.get_params(token))
