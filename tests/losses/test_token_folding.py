"""Losses by parts of the outputs against float64 NumPy and against plain logits."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jchain.losses import (
    CrossEntropy,
    IsLargest,
    PartSizes,
    compute_at_once,
    score_tokens,
)
from jchain.modules import OutputMap

SIZES = [PartSizes(3, 10), PartSizes(100, 100), PartSizes(7, 37), PartSizes(2, 5), PartSizes(1, 1)]
NUM, FEATURES, OUTPUTS = 7, 5, 37
BOTH = (CrossEntropy(), IsLargest())


def make(dtype=np.float32, seed=0, scale=1.0, softcap=None, has_bias=True):
    rng = np.random.default_rng(seed)

    def draw(*shape):
        return jnp.asarray(rng.normal(size=shape), dtype)

    bias = draw(OUTPUTS) if has_bias else None
    output = OutputMap(draw(NUM, FEATURES), draw(OUTPUTS, FEATURES), bias, scale, softcap)
    return output, jnp.asarray(rng.integers(OUTPUTS, size=NUM))


def compute_logits(output):
    """Compute the logits in float64."""
    features, weight = (np.asarray(leaf, np.float64) for leaf in output[:2])
    logits = features @ weight.T
    if output.bias is not None:
        logits = logits + np.asarray(output.bias, np.float64)
    logits = output.scale * logits
    return logits if output.softcap is None else output.softcap * np.tanh(logits / output.softcap)


def compute_losses(logits, labels):
    shifted = logits - logits.max(axis=1, keepdims=True)
    log_softmax = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return -log_softmax[np.arange(len(labels)), labels]


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [("float32", 2e-6), ("bfloat16", 2e-6), ("float16", 2e-6)]
)
def test_values_are_those_of_float64_for_every_dtype(sizes, dtype, tolerance):
    # Products of half-precision numbers are exact in float32, so even these agree.
    output, labels = make(dtype)
    loss, is_largest = score_tokens(BOTH, output, (labels, labels), sizes)
    logits = compute_logits(output)
    assert loss.dtype == jnp.float32
    np.testing.assert_allclose(
        loss, compute_losses(logits, np.asarray(labels)), tolerance, tolerance
    )
    np.testing.assert_array_equal(is_largest, logits.argmax(axis=1) == np.asarray(labels))


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize(("scale", "softcap"), [(1.0, None), (0.25, 3.0)])
@pytest.mark.parametrize("has_bias", [False, True])
def test_gradients_are_those_of_plain_logits(sizes, scale, softcap, has_bias):
    output, labels = make(scale=scale, softcap=softcap, has_bias=has_bias)
    weights = jnp.linspace(-1, 2, NUM)

    def by_parts(arrays):
        loss, _ = score_tokens(BOTH, OutputMap(*arrays, scale, softcap), (labels, labels), sizes)
        return loss @ weights

    def plain(arrays):
        logits = OutputMap(*arrays, scale, softcap).compute()
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels) @ weights

    found, expected = (jax.jit(jax.grad(fn))(output[:3]) for fn in (by_parts, plain))
    for own, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(own, other, rtol=1e-5, atol=2e-6)
    # Of one array alone, without the rest.
    alone = jax.jit(jax.grad(lambda features: by_parts((features, *output[1:3]))))(output.features)
    np.testing.assert_allclose(alone, expected[0], rtol=1e-5, atol=2e-6)


def test_gradients_of_half_precision_are_added_up_in_float32():
    rng = np.random.default_rng(0)
    num = 4096  # in bfloat16, a sum of as many equal numbers would stop at 256 of them
    features = jnp.ones((num, 1), jnp.bfloat16)
    weight = jnp.asarray(rng.normal(size=(8, 1)), jnp.bfloat16)
    labels = jnp.zeros(num, jnp.int32)

    def compute(weight):
        loss = score_tokens(
            (CrossEntropy(),), OutputMap(features, weight), (labels,), PartSizes(16, 3)
        )
        return loss[0].sum()

    def plain(weight):
        logits = OutputMap(features.astype(jnp.float32), weight).compute()
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).sum()

    expected = jax.grad(plain)(weight.astype(jnp.float32))
    np.testing.assert_allclose(jax.grad(compute)(weight), expected, rtol=0.01, atol=num * 2e-3)


def test_the_gradient_of_the_weight_is_left_out_if_it_is_not_asked_for():
    output, labels = make()

    def compute(features, weight):
        output_map = OutputMap(features, weight)
        return score_tokens((CrossEntropy(),), output_map, (labels,), PartSizes(7, 10))[0].sum()

    def count(argnums):
        program = jax.make_jaxpr(jax.grad(compute, argnums))(*output[:2])
        return str(program).count("dot_general")

    # Each of the whole parts and the rest: logits, logits again, by features, by weight.
    assert (count(0), count((0, 1))) == (6, 8)


def test_equal_logits_are_broken_as_by_argmax():
    weight = jnp.array([[0.0], [1.0], [1.0], [0.5], [1.0]])
    output = OutputMap(jnp.ones((5, 1)), weight)
    labels = jnp.arange(5)
    for sizes in (PartSizes(5, 5), PartSizes(5, 2), PartSizes(2, 1)):
        (found,) = score_tokens((IsLargest(),), output, (labels,), sizes)
        np.testing.assert_array_equal(found, [0, 1, 0, 0, 0])
    none = jnp.full((5, 5), -jnp.inf)
    np.testing.assert_array_equal(compute_at_once(IsLargest(), none, labels), [1, 0, 0, 0, 0])


@pytest.mark.parametrize("sizes", SIZES)
def test_logits_that_are_not_finite_behave_as_plain_ones(sizes):
    output, _ = make()

    @jax.jit
    def compute_both(bias, labels):
        given = output._replace(bias=bias)
        plain = optax.softmax_cross_entropy_with_integer_labels(given.compute(), labels)
        return score_tokens((CrossEntropy(),), given, (labels,), sizes)[0], plain

    values = [-jnp.inf, jnp.inf, jnp.nan, 3e38, 1e4]
    for place in (0, 20, OUTPUTS - 1):
        for value in values:
            bias = output.bias.at[place].set(value)
            for label in (place, 1):
                labels = jnp.full(NUM, label)
                found, expected = compute_both(bias, labels)
                np.testing.assert_array_equal(jnp.isfinite(found), jnp.isfinite(expected))
                found, expected = (jnp.nan_to_num(leaf, posinf=0) for leaf in (found, expected))
                np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    nothing = output._replace(bias=jnp.full(OUTPUTS, -jnp.inf))
    found, _ = compute_both(nothing.bias, jnp.ones(NUM, int))
    assert not jnp.isfinite(found).any()


def test_a_label_out_of_range_is_not_finite():
    output, _ = make()
    labels = jnp.array([-1, OUTPUTS, OUTPUTS + 5, 0, 1, 2, 3])
    (found,) = score_tokens((CrossEntropy(),), output, (labels,), PartSizes(4, 10))
    np.testing.assert_array_equal(jnp.isfinite(found), [False] * 3 + [True] * 4)


def test_it_can_be_vmapped_and_differentiated():
    output, labels = make()
    rows = jnp.stack([output.features, 2 * output.features])

    def compute(features, weight):
        given = OutputMap(features, weight, output.bias)
        return score_tokens((CrossEntropy(),), given, (labels,), PartSizes(3, 10))[0].mean()

    gradient = jax.grad(compute, (0, 1))
    both = jax.vmap(gradient, in_axes=(0, None))(rows, output.weight)
    for i in range(2):
        for own, other in zip(both, gradient(rows[i], output.weight), strict=True):
            np.testing.assert_allclose(own[i], other, rtol=1e-5, atol=1e-6)


def test_no_more_logits_than_a_part_exist():
    output = OutputMap(jnp.ones((64, 8)), jnp.ones((4096, 8)))
    labels = jnp.zeros(64, jnp.int32)

    def compute(features, weight):
        given = OutputMap(features, weight)
        return score_tokens((CrossEntropy(),), given, (labels,), PartSizes(64, 128))[0].sum()

    program = jax.jit(jax.grad(compute)).lower(*output[:2]).compile()
    assert program.memory_analysis().temp_size_in_bytes < 64 * 4096 * 4 / 4
