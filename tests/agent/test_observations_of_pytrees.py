"""What agents observe of activations that are pytrees is what they observe of one array."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import several_inputs as states

import jchain as jc
from jchain.agent import observations, pretrain

ALL = observations.Join(
    (
        observations.observe,
        observations.observe_activations,
        observations.observe_gradients,
    )
)
CHAIN = jnp.array([2, 1, 0, 4])


@pytest.mark.slow
def test_features_of_a_pair_are_those_of_one_array():
    pairs = states.make_pair_problem()
    observe = jax.jit(partial(observations.observe_chain, ALL))
    found, expected = observe(pairs, CHAIN), observe(states.make_packed_problem(pairs), CHAIN)
    assert found.shape == (4, 12 + 2 * 65)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    assert np.abs(found[0] - found[2]).max() > 0.1


def test_integers_and_booleans_are_not_observed():
    """Only their effect on the losses is."""
    problem = states.make_dict_problem()
    x = problem.data.x
    vector, mask, position = x["side"]
    other = x | {"side": (vector, ~mask, position + 1)}
    observe = jax.jit(observations.observe_activations)
    sketch, moved = observe(problem, x, x), observe(problem, other, other)
    np.testing.assert_array_equal(sketch.features, moved.features)
    assert np.abs(sketch.loss - moved.loss).max() > 1e-3


def test_all_prefixes_are_observed():
    pairs = states.make_pair_problem()
    short = jc.Problem(pairs.bank, pairs.data, 2)
    levels = pretrain.observe_prefixes(short)
    for length, level in enumerate(levels):
        prefixes = [row[:length] for row in short.space.enumerate() if row[length] == 3]
        losses = [
            min(states.find_loss(states.find_outputs(pairs, [*prefix, head])) for head in (3, 4))
            for prefix in prefixes
        ]
        expected = observations.compress_loss(jnp.asarray(losses))
        np.testing.assert_allclose(level.stop, expected, rtol=1e-5)


@pytest.mark.slow
def test_tables_hold_the_losses_of_pairs():
    pairs = states.make_pair_problem()
    table = jc.chainbench.tabular.tabulate(pairs, observations.observe)
    losses = (jc.evaluate_all(problem)[1].loss for problem in (table, pairs))
    np.testing.assert_allclose(*losses, rtol=1e-5)
