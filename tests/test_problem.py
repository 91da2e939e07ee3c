import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import HEAD, init_params, make_bank, make_batch

import jchain as jc

X, Y = make_batch()


@pytest.mark.parametrize(
    ("data", "kwargs", "message"),
    [
        (jc.Batch(X, Y + 1), {}, r"expected labels in 0..2, the head's classes, got \d..3"),
        (
            jc.Batch(X, Y.at[3].set(-1)),
            {},
            "the head's classes, got -1..2; jc.hub.load_choices needs loss_fn=jc.hub.choice_loss",
        ),
        (jc.Batch(X, Y[:-1]), {}, r"one label per example, got x \[9, 5\] and y \[8\]"),
        (jc.Batch(X[:0], Y[:0]), {}, "one label per example, got x"),
        (jc.Batch(X[:, :4], Y), {}, r"ResidualMLP.* does not take an input of shape \[9, 4\]"),
        (jc.Batch(X.at[0, 0].set(jnp.nan), Y), {}, "expected finite examples"),
        (jc.Batch(X, Y), {"max_layers": -1}, "max_layers to be an integer in 0..4096, got -1"),
        (
            jc.Batch(X, Y),
            {"max_layers": True},
            "max_layers to be an integer, got True",
        ),
        (
            jc.Batch(X, Y),
            {"min_layers": 3},
            r"min_layers to be an integer in 0..2, got 3",
        ),
        (
            jc.Batch(X, Y),
            {"min_layers": -1},
            r"min_layers to be an integer in 0..2, got -1",
        ),
        (
            jc.Batch(X, Y),
            {"min_layers": True},
            r"min_layers to be an integer, got True",
        ),
        (
            jc.Batch(X, Y),
            {"layer_cost": jnp.zeros(3)},
            r"expected layer_cost to be a scalar or of shape \[4\], got shape \[3\]",
        ),
        (
            jc.Batch(X, Y),
            {"loss_fn": lambda a, b: a @ b.T},
            r"loss_fn does not take outputs \[9, 3\] and labels",
        ),
        (
            jc.Batch(X, Y),
            {"loss_fn": lambda a, b: b},
            "expected loss_fn to return floats, got int32",
        ),
    ],
)
def test_problem_rejects_bad_arguments(bank, data, kwargs, message):
    with pytest.raises(ValueError, match=message):
        jc.Problem(bank, data, **({"max_layers": 2} | kwargs))


def test_heads_must_agree():
    layer, other = jc.layers.Dense(5), jc.layers.DenseHead(4)
    bank = jc.Bank.stack(
        layer,
        init_params(layer, jax.random.key(0), 1, (5,)),
        other,
        init_params(other, jax.random.key(0), 1, (5,)),
    )
    both = jc.Bank.concat([bank, make_bank(1, 1)])
    with pytest.raises(ValueError, match=r"heads of one output shape, got \[\[9, 4\], \[9, 3\]\]"):
        jc.Problem(both, jc.Batch(X, Y), max_layers=1)
    wide = init_params(HEAD, jax.random.key(0), 1, (6,))
    bank = jc.Bank.stack(layer, init_params(layer, jax.random.key(0), 1, (5,)), HEAD, wide)
    with pytest.raises(ValueError, match=r"head0 .* does not take an input of shape \[9, 5\]"):
        jc.Problem(bank, jc.Batch(X, Y), max_layers=1)


def test_layer_cost_is_added_per_layer(bank):
    chains = jc.chain.pad([[4], [0, 4], [1, 0, 5]])
    free = jc.evaluate(jc.Problem(bank, jc.Batch(X, Y), max_layers=2), chains).loss
    one = jc.evaluate(jc.Problem(bank, jc.Batch(X, Y), max_layers=2, layer_cost=0.5), chains).loss
    each = jc.evaluate(
        jc.Problem(bank, jc.Batch(X, Y), 2, layer_cost=jnp.array([1.0, 10, 0, 0])), chains
    ).loss
    np.testing.assert_allclose(one - free, [0, 0.5, 1.0], atol=1e-6)
    np.testing.assert_allclose(each - free, [0, 1, 11], atol=1e-5)


def test_a_loss_of_your_own(bank):
    def squared(outputs, y):
        return jnp.sum(jnp.square(outputs - y), axis=-1)

    target = jax.random.normal(jax.random.key(0), (9, 3))
    problem = jc.Problem(bank, jc.Batch(X, target), max_layers=1, loss_fn=squared)
    out = jc.evaluate(problem, [[2, 5]])
    expected = np.mean(np.sum(np.square(jc.apply_chain(bank, [2, 5], X) - target), axis=1))
    np.testing.assert_allclose(out.loss[0], expected, rtol=1e-6)
    assert np.isnan(out.accuracy[0])


def test_bad_input_shape_errors_name_the_stem():
    stem, y = jc.layers.ConvStem(4), jnp.arange(6) % 3
    x = jnp.ones((6, 8, 8, 1))
    modules = {"layer": jc.layers.ConvBlock(4), "head": jc.layers.DenseHead(3), "stem": stem}
    params = stem.init(jax.random.key(0), x)["params"]
    make = partial(
        jc.train.random, jax.random.key(0), **modules, stem_params=params, depth=1, num_steps=0
    )
    bank = make(jc.Batch(x, y), num_layers=2)
    for shape in ((6, 8, 8, 3), (6, 64)):
        words = rf"stem ConvStem\(4\) does not take an input of shape \{str(list(shape))[:-1]}\]"
        with pytest.raises(ValueError, match=words):
            jc.Problem(bank, jc.Batch(jnp.ones(shape), y), max_layers=1)
        with pytest.raises(ValueError, match=words):
            make(jc.Batch(jnp.ones(shape), y), num_layers=2)
    with pytest.raises(
        ValueError,
        match=r"head \(DenseHead\(3\)\), token 2, does not take an input of shape \[6, 16, 16, ",
    ):
        jc.Problem(bank, jc.Batch(jnp.ones((6, 16, 16, 1)), y), max_layers=1)


def test_accuracy_is_nan_unless_there_is_one_label_per_output(bank):
    data = make_batch()

    def loss_fn(outputs, y):
        return optax.softmax_cross_entropy_with_integer_labels(outputs, y[:, 0])

    column = jc.Problem(bank, jc.Batch(data.x, data.y[:, None]), 1, loss_fn=loss_fn)
    out = jc.evaluate(column, np.array([[0, bank.num_layers]]))
    assert np.isnan(out.accuracy).all()
    np.testing.assert_allclose(
        out.loss, jc.evaluate(jc.Problem(bank, data, 1), np.array([[0, bank.num_layers]])).loss
    )


def test_a_problem_prints_in_one_line(problem):
    assert repr(problem) == (
        f"Problem({problem.bank!r}, 9 examples float32[5], max_layers=3, min_layers=0)"
    )


TOKEN_COST = [1.0, 2.0, 4.0, 8.0, 0.5, 0.25]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"max_cost": 3.0}, "expected token_costs with max_cost, got only max_cost=3.0"),
        ({"token_costs": [1.0] * 4}, r"expected token_costs of shape \[6\], .* got shape \[4\]"),
        ({"token_costs": 1.0}, r"expected token_costs of shape \[6\], .* got shape \[\]"),
        ({"token_costs": [-1.0] * 6}, "finite and at least 0, got -1.0 to -1.0"),
        ({"token_costs": [np.nan] * 6}, "token_costs that are finite and at least 0"),
        (
            {"token_costs": TOKEN_COST, "max_cost": 2.2, "min_layers": 2},
            "max_cost of at least 2.25, the cost of the cheapest chain of at least 2 layers and a "
            "head, got 2.2",
        ),
        ({"token_costs": TOKEN_COST, "max_cost": 0.2}, "max_cost of at least 0.25, .* got 0.2"),
        ({"token_costs": TOKEN_COST, "max_cost": np.nan}, "max_cost of at least 0.25, .* got nan"),
        (
            {"token_costs": TOKEN_COST, "max_cost": [1.0, 2.0]},
            r"expected max_cost to be a scalar, got shape \[2\]",
        ),
    ],
)
def test_problem_rejects_bad_costs(bank, kwargs, message):
    with pytest.raises(ValueError, match=message):
        jc.Problem(bank, jc.Batch(X, Y), 2, **kwargs)
    assert jc.Problem(bank, jc.Batch(X, Y), 2, token_costs=TOKEN_COST, max_cost=0.25)


def test_a_chain_over_the_limit_has_an_infinite_loss_and_no_other_loss_changes(bank):
    free = jc.Problem(bank, jc.Batch(X, Y), 2, layer_cost=0.1)
    limited = jc.Problem(
        bank, jc.Batch(X, Y), 2, layer_cost=0.1, token_costs=TOKEN_COST, max_cost=4.5
    )
    chains, out = jc.evaluate_all(free)
    cost = np.array([sum(TOKEN_COST[token] for token in chain if token >= 0) for chain in chains])
    np.testing.assert_array_equal(limited.chain_cost(jnp.asarray(chains)), cost)
    found = jc.evaluate(limited, chains)
    assert 10 < (cost > 4.5).sum() < len(cost)
    assert (cost == 4.5).any()
    np.testing.assert_array_equal(found.loss, np.where(cost > 4.5, np.inf, out.loss))
    assert found.num_nonfinite == (cost > 4.5).sum()
    # Prefixes are judged with each head.
    by_prefix = jc.evaluate_prefixes(limited, [[0, 2, 4], [2, 2, 4]]).loss
    np.testing.assert_array_equal(np.isinf(by_prefix[0]), [[False] * 2, [False] * 2, [True] * 2])
    np.testing.assert_array_equal(np.isinf(by_prefix[1]), [[False] * 2, [False] * 2, [True] * 2])
    prefixes = jnp.array([[-1, -1, -1], [2, -1, -1], [3, -1, -1]])
    tight = jc.Problem(bank, jc.Batch(X, Y), 2, token_costs=TOKEN_COST, max_cost=4.25)
    expected = [[0, 0], [np.inf, 0], [np.inf, np.inf]]
    np.testing.assert_array_equal(tight.head_penalties(prefixes), expected)


def test_without_costs_a_chain_costs_its_number_of_layers(bank):
    problem = jc.Problem(bank, jc.Batch(X, Y), 2)
    chains = jnp.asarray(jc.chain.pad([[4], [0, 4], [1, 0, 5]]))
    np.testing.assert_array_equal(problem.chain_cost(chains), [0, 1, 2])
    assert not problem.exceeds_limit(problem.chain_cost(chains)).any()


def test_rounding_does_not_exclude_a_chain_at_the_limit(bank):
    cost = np.full(6, 0.1) + np.arange(6) * 1e-3
    problem = jc.Problem(
        bank, jc.Batch(X, Y), 10, token_costs=1e9 * cost, max_cost=1e9 * (cost[:4].sum() + cost[4])
    )
    chains = [list(order) for order in itertools.permutations(range(4))]
    chains = jnp.asarray(jc.chain.pad([[*order, 4] for order in chains], 10))
    assert not problem.exceeds_limit(problem.chain_cost(chains)).any()
    assert problem.exceeds_limit(problem.chain_cost(chains) * (1 + 1e-5)).all()


def test_limits_share_one_program(bank):
    traces = []

    def loss_fn(outputs, y):
        traces.append(0)
        return outputs[:, 0]

    for limit in (2.0, 5.0):
        problem = jc.Problem(
            bank, jc.Batch(X, Y), 2, loss_fn=loss_fn, token_costs=TOKEN_COST, max_cost=limit
        )
        num_checks = len(traces)
        jc.evaluate(problem, [[0, 2, 4]])
    assert len(traces) == num_checks
