"""Costs in real units, compared with counts by hand."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import HEAD, init_params, make_bank

import jchain as jc
from jchain.engine.costs import UNITS

X = jax.ShapeDtypeStruct((3, 5), jnp.float32)


def make_stem_bank(dtype=jnp.float32):
    """Make a bank of two modules, two heads, and a stem from 7 to 5 features."""
    layers = [jc.layers.ResidualMLP(5, hidden=7), jc.layers.Dense(5), jc.layers.Dense(5)]
    params = [init_params(layer, jax.random.key(0), 1, (5,))[0] for layer in layers]
    stem = jc.layers.DenseHead(5)
    bank = jc.Bank.stack(
        layers,
        params,
        HEAD,
        init_params(HEAD, jax.random.key(1), 2, (5,)),
        stem=stem,
        stem_params=init_params(stem, jax.random.key(2), 1, (7,))[0],
    )
    return jax.tree.map(lambda leaf: leaf.astype(dtype), bank)


# Numbers of params: 5 * 7 + 7 + 7 * 5 + 5, 5 * 5 + 5, a head of 5 * 3 + 3, and a stem of 7 * 5 + 5.
RESIDUAL, DENSE, END, STEM = 82, 30, 18, 40


@pytest.mark.parametrize(("dtype", "size"), [(jnp.float32, 4), (jnp.bfloat16, 2)])
def test_params_and_bytes_by_hand(dtype, size):
    bank = make_stem_bank(dtype)
    params = [RESIDUAL, DENSE, DENSE, END + STEM, END + STEM]
    assert jc.token_costs(bank, "params").tolist() == params
    assert jc.token_costs(bank, "bytes").tolist() == [size * number for number in params]
    # A layer that occurs twice counts twice.
    found = jc.cost(bank, [[0, 1, 1, 3], [4]])
    assert found.params.tolist() == [RESIDUAL + 2 * DENSE + END + STEM, END + STEM]
    assert found.bytes.tolist() == [size * number for number in found.params]
    assert found.flops is None
    assert found.milliseconds is None
    assert jc.cost(bank, [0, 3, -1]).params == RESIDUAL + END + STEM


def test_an_exported_chain_has_the_params_that_were_counted():
    bank = make_stem_bank()
    exported = [bank.get_params(token) for token in (0, 1, 1, 3)]
    assert jc.cost(bank, [[0, 1, 1, 3]]).params == STEM + sum(
        leaf.size for leaf in jax.tree.leaves(exported)
    )


def test_statistics_count_as_bytes_but_not_as_params():
    class Norm(jc.layers.nn.Module):
        @jc.layers.nn.compact
        def __call__(self, x):
            return jc.layers.nn.BatchNorm(use_running_average=True)(x)

    variables = Norm().init(jax.random.key(0), jnp.ones((1, 5)))
    bank = jc.Bank.stack(Norm(), [variables], HEAD, init_params(HEAD, jax.random.key(1), 1, (5,)))
    assert jc.token_costs(bank, "params").tolist() == [10, END]
    assert jc.token_costs(bank, "bytes").tolist() == [80, 4 * END]


def count_conv(side, channels_in, channels_out):
    """Count the FLOPs of a 3x3 convolution and its bias: products with the border's zeros are free.

    Along an axis, all but 2 of the `3 * side` products are inside of the image.
    """
    taps = (3 * side - 2) ** 2
    return 2 * taps * channels_in * channels_out + side**2 * channels_out


def count_dense(size_in, size_out):
    return 2 * size_in * size_out + size_out


IMAGE = (8, 8, 4)
BY_HAND = [
    (jc.layers.Dense(6), (6,), count_dense(6, 6) + 6),
    (jc.layers.Dense(6), (2, 6), 2 * (count_dense(6, 6) + 6)),
    (jc.layers.ResidualMLP(6, hidden=3), (6,), count_dense(6, 3) + 3 + count_dense(3, 6) + 6),
    (jc.layers.ConvBlock(4, depth=2), IMAGE, 2 * (256 + count_conv(8, 4, 4)) + 256),
    (jc.layers.ConvStem(5, pool=2), IMAGE, count_conv(8, 4, 5) + 16 * 5 * 3),
    (jc.layers.DenseHead(3), IMAGE, count_dense(256, 3)),
    (
        jc.layers.ConvHead(3, pool=2),
        IMAGE,
        16 * 4 * 4
        + (count_dense(64, 120) + 120)
        + (count_dense(120, 84) + 84)
        + count_dense(84, 3),
    ),
    (jc.layers.PoolHead(3), IMAGE, 256 + 64 * 4 + count_dense(4, 3)),
    # A leaky ReLU compares, multiplies, and selects.
    (jc.layers.InvertibleDense(8), (8,), count_dense(8, 8) + 3 * 8),
    (jc.layers.InvertibleResidual(8), (8,), 2 * count_dense(8, 8) + 8 + 8),
]


def count_flops(module, shape, num_examples):
    """Count the FLOPs of a module by using it as the only head of a bank."""
    params = jax.eval_shape(module.init, jax.random.key(0), jnp.ones((1, *shape)))["params"]
    params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), params)
    bank = jc.Bank.stack(lambda _, x: x, [None], module, [params])
    x = jax.ShapeDtypeStruct((num_examples, *shape), jnp.float32)
    return jc.token_costs(bank, "flops", x=x)[1]


@pytest.mark.parametrize(
    ("module", "shape", "expected"), BY_HAND, ids=[type(row[0]).__name__ for row in BY_HAND]
)
def test_flops_by_hand(module, shape, expected):
    assert count_flops(module, shape, 3) == 3 * expected


@pytest.mark.parametrize(
    ("module", "shape", "products"),
    [
        # Queries, keys, and values; output; two dense layers; and attention to 16 positions.
        (
            jc.layers.TransformerBlock(64, num_heads=4),
            (16, 64),
            2 * 16 * 64 * (3 * 64 + 64 + 4 * 64 + 4 * 64) + 2 * 2 * 16 * 16 * 64,
        ),
        (jc.layers.AdditiveCoupling(64, hidden=64), (64,), 2 * 2 * 2 * 32 * 64),
    ],
    ids=["TransformerBlock", "AdditiveCoupling"],
)
def test_flops_are_those_of_the_products_and_few_others(module, shape, products):
    found = count_flops(module, shape, 2)
    assert 2 * products < found < 1.08 * 2 * products


def test_each_iteration_of_a_loop_counts():
    def scanned(weight, x):
        def outer(h, _):
            return jax.lax.fori_loop(0, 3, lambda _, h: h @ weight, h), None

        return jax.lax.scan(jax.checkpoint(outer), x, length=4)[0]

    def unknown(weight, x):
        return jax.lax.while_loop(lambda h: h.sum() < 9, lambda h: h @ weight, x)

    bank = jc.Bank.stack(
        [scanned, unknown], [jnp.eye(5)] * 2, HEAD, init_params(HEAD, jax.random.key(1), 1, (5,))
    )
    flops = jc.token_costs(bank, "flops", x=X)
    products = 12 * 2 * 3 * 5 * 5
    assert products <= flops[0] < products + 50  # counters of the loops
    assert np.isnan(flops[1])
    with pytest.raises(ValueError, match="expected token_costs that are finite and at least 0"):
        jc.Problem(bank, jc.Batch(jnp.ones((3, 5)), jnp.zeros(3, int)), 2, token_costs=flops)


def test_costs_of_a_chain_add_up_and_grow_with_the_batch():
    bank = make_stem_bank()
    x = jnp.ones((4, 7))
    flops = jc.token_costs(bank, "flops", x=x)
    stem = count_dense(7, 5)
    assert flops.tolist() == [
        4 * (count_dense(5, 7) + 7 + count_dense(7, 5) + 5),
        *[4 * (count_dense(5, 5) + 5)] * 2,
        *[4 * (stem + count_dense(5, 3))] * 2,
    ]
    found = jc.cost(bank, [[0, 2, 4], [1, 3]], x=x)
    np.testing.assert_allclose(found.flops, [flops[[0, 2, 4]].sum(), flops[[1, 3]].sum()])
    half = jc.token_costs(bank, "flops", x=jax.ShapeDtypeStruct((2, 7), jnp.float32))
    np.testing.assert_allclose(flops, 2 * half)
    assert (found.milliseconds > 0).all()
    milliseconds = jc.token_costs(bank, "milliseconds", x=x)
    # The layers of a group are measured once.
    assert milliseconds.shape == (5,)
    assert milliseconds[1] == milliseconds[2]
    assert milliseconds[3] == milliseconds[4]


def test_errors():
    bank = make_bank()
    with pytest.raises(ValueError, match=f"expected a unit of {', '.join(UNITS)}, got 'gflops'"):
        jc.token_costs(bank, "gflops")
    with pytest.raises(ValueError, match="expected x, a batch of raw input, for the unit 'flops'"):
        jc.token_costs(bank, "flops")
    batch = jc.Batch(jnp.ones((3, 5)), jnp.zeros(3))
    with pytest.raises(ValueError, match="expected x to be a batch .*, got Batch of 2"):
        inspect.unwrap(jc.token_costs)(bank, "flops", x=batch)
    with pytest.raises(ValueError, match=r"does not take an input of shape \[3, 4\]"):
        jc.cost(bank, [[4]], x=jnp.ones((3, 4)))
    with pytest.raises(ValueError, match="chain 0 has no head token"):
        jc.cost(bank, [[0, 1]])
    with pytest.raises(ValueError, match="expected a jc.Bank, got"):
        inspect.unwrap(jc.token_costs)(jnp.ones(3), "params")
