"""A rarely taken branch runs only for the elements that take it, even under `vmap`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jchain as jc
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


PLANS = [
    None,
    jc.engine.DepthFirst(),
    jc.engine.Blocks(8),
    jc.engine.Blocks(8, (1, 4), jc.engine.Share.INPUT, (1, 4)),
    jc.engine.Blocks(8, (1, 4), jc.engine.Share.NOTHING, (1, 4)),
]


@pytest.mark.parametrize("plan", PLANS, ids=str)
@pytest.mark.parametrize("is_shared", [True, False])
def test_a_users_shard_map_may_check_its_types(two_group_problem, plan, is_shared):
    """Chains vary over the mesh, and the problem too or not."""
    problem = two_group_problem
    chains = problem.space.sample(jax.random.key(0), 20)
    mesh = jax.make_mesh((1,), ("a",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("a")

    def evaluate(chains, data):
        given = problem if is_shared else problem.with_data(data)
        return jc.evaluate(given, chains, plan=plan).loss

    spread = jax.shard_map(evaluate, mesh=mesh, in_specs=(spec, spec), out_specs=spec)
    np.testing.assert_allclose(
        jax.jit(spread)(chains, problem.data),
        jc.evaluate(problem, chains, plan=plan).loss,
        rtol=1e-6,
    )
