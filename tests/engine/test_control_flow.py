"""A rarely taken branch runs only for the elements that take it, even under `vmap`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jchain.engine.control_flow import cond_in_sequence


@pytest.fixture
def count_true_branches():
    """Count how often the true branch runs on the host."""
    taken = []

    def double(x, tree):
        jax.debug.callback(lambda x: taken.append(float(x)), x)
        return 2.0 * x + tree["a"]

    def run(predicate, x):
        return cond_in_sequence(predicate, double, lambda x, tree: -x, x, {"a": 1.0})

    return run, taken


def test_cond_in_sequence_equals_cond_for_one_element(count_true_branches):
    run, _ = count_true_branches
    assert jax.jit(run)(jnp.array(True), jnp.array(3.0)) == 7.0
    assert run(jnp.array(False), jnp.array(3.0)) == -3.0


def test_cond_in_sequence_under_vmap_runs_only_the_branch_taken(count_true_branches):
    run, taken = count_true_branches
    is_true, x = jnp.array([False, True, False, True]), jnp.arange(4.0)
    out = jax.jit(jax.vmap(run))(is_true, x)
    jax.effects_barrier()
    np.testing.assert_array_equal(out, [0.0, 3.0, -2.0, 7.0])
    assert sorted(taken) == [1.0, 3.0]


def test_cond_in_sequence_batched_predicate_with_shared_operand(count_true_branches):
    run, taken = count_true_branches
    out = jax.vmap(run, in_axes=(0, None))(jnp.array([True, False]), jnp.array(5.0))
    jax.effects_barrier()
    np.testing.assert_array_equal(out, [11.0, -5.0])
    assert taken == [5.0]
