"""Problems that differ in what they compute differ in their fingerprint, and only those."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import make_batch

import jchain as jc
from jchain.engine.fingerprint import compute_fingerprints

CHAINS = jnp.array([[0, 1, 4, -1], [5, -1, -1, -1]])


def weigh(weight):
    def decorate(function):
        @functools.wraps(function)
        def weighted(outputs, y):
            return weight * function(outputs, y)

        return weighted

    return decorate


def scaled(outputs, y, *, scale):
    return scale * optax.softmax_cross_entropy_with_integer_labels(outputs, y)


def make_default(scale):
    def loss(outputs, y, scale=scale):
        return scaled(outputs, y, scale=scale)

    return loss


def make_nested(scale):
    if scale == 1:
        return lambda outputs, y: jax.vmap(lambda o: 1 * o.sum())(outputs)
    return lambda outputs, y: jax.vmap(lambda o: 2 * o.sum())(outputs)


def make_with_array(scale):
    weights = scale * np.ones(2000)
    weights[1000] += scale  # in the middle, which repr leaves out
    return lambda outputs, y: outputs.sum(axis=1) * weights.sum()


def make_recursive(scale):
    def power(x, n):
        return x if n == 0 else scale * power(x, n - 1)

    return lambda outputs, y: power(outputs.sum(axis=1), 2)


LOSSES = {
    "keywords of a partial": lambda scale: functools.partial(scaled, scale=scale),
    "defaults": make_default,
    "a decorator": lambda scale: weigh(scale)(optax.softmax_cross_entropy_with_integer_labels),
    "constants of an inner function": make_nested,
    "an array": make_with_array,
    "a jitted function": lambda scale: jax.jit(functools.partial(scaled, scale=scale)),
    "a function that calls itself": make_recursive,
}


@pytest.mark.parametrize("how", LOSSES)
def test_losses_that_differ_have_other_fingerprints(bank, how):
    found = [
        compute_fingerprints(
            jc.Problem(bank, make_batch(), 3, loss_fn=LOSSES[how](scale)), CHAINS
        ).tolist()
        for scale in (1, 1, 2)
    ]
    assert found[0] == found[1]
    assert not set(found[0]) & set(found[2])


def test_fingerprints_are_the_same_under_jit(problem):
    found = jax.jit(compute_fingerprints)(problem, CHAINS)
    np.testing.assert_array_equal(found, compute_fingerprints(problem, CHAINS))


def test_costs_and_their_limit_are_part_of_the_fingerprint(problem):
    def find(**kwargs):
        return compute_fingerprints(jc.Problem(problem.bank, problem.data, 3, **kwargs), CHAINS)

    cost = np.arange(6.0)
    found = [
        find(),
        find(token_costs=cost),
        find(token_costs=cost, max_cost=5.0),
        find(token_costs=cost, max_cost=6.0),
        find(token_costs=cost[::-1].copy(), max_cost=6.0),
    ]
    assert len({int(row[0]) for row in found}) == len(found)
    np.testing.assert_array_equal(find(), compute_fingerprints(problem, CHAINS))
