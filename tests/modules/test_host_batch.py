"""Splits in host memory: what they hold, and what they refuse."""

import copy
import dataclasses
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import make_bank, make_batch

import jchain as jc
from jchain.modules.host_batch import HostArrays, HostBatch


@pytest.fixture(scope="module")
def problem():
    return jc.Problem(make_bank(), make_batch(11), max_layers=2, batch_size=4)


def test_a_problem_knows_its_examples_and_first_part(problem):
    assert (problem.num_examples, problem.batch_size) == (11, 4)
    part = problem.first_part()
    assert (part.num_examples, part.batch_size) == (4, None)
    x, y = problem.data.source.take(slice(4))
    np.testing.assert_array_equal(part.data.x, x)
    np.testing.assert_array_equal(part.data.y, y)
    assert part.first_part() is part


def test_parts_are_consecutive_examples_under_jit(problem):
    x, y = problem.data.source.take(slice(None))
    for one in (problem, dataclasses.replace(problem, batch_size=None)):
        part = jax.jit(lambda start, one=one: one.read_part(start, 3).data)(5)
        np.testing.assert_array_equal(part.x, x[5:8])
        np.testing.assert_array_equal(part.y, y[5:8])
    assert [len(labels) for _, labels in problem.data.iterate()] == [4, 4, 3]


def test_sizes_can_be_changed_and_rows_taken(problem):
    whole = dataclasses.replace(problem, batch_size=None)
    assert isinstance(whole.data, jc.Batch)
    assert whole.num_examples == 11
    assert dataclasses.replace(problem, batch_size=3).data.size == 3
    for rows in (slice(2, 9), np.arange(2, 9)):
        few = problem.take(rows)
        assert (few.num_examples, few.batch_size) == (7, 4)
        np.testing.assert_array_equal(few.first_part().data.x, whole.data.x[2:6])


def test_doubles_become_what_jax_makes_of_them(problem):
    x, y = problem.data.source.take(slice(None))
    wide = jc.Problem(problem.bank, jc.Batch(x.astype(np.float64), y), 2, batch_size=4)
    chains = wide.space.sample(jax.random.key(0), 3)
    assert wide.read_part(0, 4).data.x.dtype == jnp.float32
    np.testing.assert_array_equal(jc.evaluate(wide, chains).loss, jc.evaluate(problem, chains).loss)


def test_rows_may_be_lists_of_numbers(problem):
    x, y = problem.data.source.take(slice(None))
    rows = jc.Problem(problem.bank, jc.Batch(x.tolist(), y.tolist()), 2, batch_size=4)
    chains = rows.space.sample(jax.random.key(0), 3)
    expected = jc.evaluate(problem, chains).loss
    np.testing.assert_allclose(jc.evaluate(rows, chains).loss, expected, rtol=1e-6)


def test_copies_and_pickles_hold_all_examples(problem):
    chains = problem.space.sample(jax.random.key(0), 3)
    expected = jc.evaluate(problem, chains).loss
    for other in (pickle.loads(pickle.dumps(problem)), copy.deepcopy(problem)):
        np.testing.assert_array_equal(jc.evaluate(other, chains).loss, expected)


def test_problems_on_the_same_arrays_share_programs(problem):
    same = HostBatch.make(HostArrays(*problem.data.source.take(slice(None))), 4)
    again = jc.Problem(problem.bank, problem.data, 2, batch_size=4)
    assert jax.tree.structure(again.data) == jax.tree.structure(problem.data)
    assert jax.tree.structure(same) != jax.tree.structure(problem.data)
    large = dataclasses.replace(problem, batch_size=100)
    longer = dataclasses.replace(large, max_layers=3)
    assert longer.data is large.data
    assert large.data.source is problem.data.source


def test_functions_that_need_all_examples_refuse(problem):
    message = "batch_size=4 and 11 examples: use problem.first_part"
    for read in (
        lambda: problem.data.x,
        lambda: problem.data.y,
        lambda: tuple(problem.data),
        lambda: jc.gradient.weight_gradients(problem, np.array([0, 4, -1])),
        lambda: jc.gradient.score_moves(problem, np.array([0, 4, -1])),
    ):
        with pytest.raises(ValueError, match=message):
            read()


def contrast(outputs, y):
    losses = optax.softmax_cross_entropy_with_integer_labels(outputs, y)
    return losses / losses.max()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "expected batch_size to be at least 1, got 0"),
        ({"batch_size": 4, "loss_fn": contrast}, "expected loss_fn to treat examples one by one"),
        ({"batch_size": 4, "accuracy_fn": contrast}, "expected accuracy_fn to treat examples"),
        ({"batch_size": 4, "mesh": True}, "without a mesh, or without batch_size, got both"),
    ],
)
def test_what_cannot_be_read_in_parts_is_refused(problem, arguments, message):
    if arguments.get("mesh"):
        arguments = {**arguments, "mesh": jax.make_mesh((1,), ("a",))}
    with pytest.raises(ValueError, match=message):
        jc.Problem(problem.bank, make_batch(11), 2, **arguments)


def test_values_of_all_parts_are_checked(problem):
    x, y = problem.data.source.take(slice(None))
    bad = x.copy()
    bad[-1, 0] = np.nan
    with pytest.raises(ValueError, match="expected finite examples"):
        jc.Problem(problem.bank, jc.Batch(bad, y), 2, batch_size=4)
    wrong = y.copy()
    wrong[-1] = 7
    with pytest.raises(ValueError, match=r"expected labels in 0..2, the head's classes, got"):
        jc.Problem(problem.bank, jc.Batch(x, wrong), 2, batch_size=4)
