"""Evaluation of splits that are read in parts equals evaluation of the whole."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import make_bank, make_batch

import jchain as jc
from jchain.engine.fingerprint import compute_fingerprints
from jchain.engine.parts import average_over_parts

NUM_EXAMPLES, SIZE = 23, 5


@pytest.fixture(scope="module")
def whole():
    return jc.Problem(make_bank(), make_batch(NUM_EXAMPLES), max_layers=2)


@pytest.fixture(scope="module")
def problem(whole):
    return dataclasses.replace(whole, data=jax.tree.map(np.asarray, whole.data), batch_size=SIZE)


def test_losses_of_all_chains_equal_those_of_the_whole(whole, problem):
    chains, out = jc.evaluate_all(problem)
    expected = jc.evaluate(whole, chains)
    np.testing.assert_allclose(out.loss, expected.loss, rtol=1e-6)
    np.testing.assert_allclose(out.accuracy, expected.accuracy, rtol=1e-6)
    assert (out.layer_calls, out.head_calls) == (expected.layer_calls, expected.head_calls)


@pytest.mark.parametrize("size", [1, 23, 1000])
def test_parts_may_have_any_size(whole, size):
    problem = dataclasses.replace(whole, batch_size=size)
    chains = whole.space.sample(jax.random.key(0), 5)
    expected = jc.evaluate(whole, chains).loss
    np.testing.assert_allclose(jc.evaluate(problem, chains).loss, expected, rtol=1e-6)


def test_files_mapped_to_memory_are_read_in_parts(tmp_path, whole):
    np.save(tmp_path / "x.npy", whole.data.x)
    x = np.load(tmp_path / "x.npy", mmap_mode="r")
    problem = jc.Problem(whole.bank, jc.Batch(x, np.asarray(whole.data.y)), 2, batch_size=SIZE)
    assert problem.data.source.leaves[0].base is not None  # still the file, not a copy
    chains = whole.space.sample(jax.random.key(0), 5)
    expected = jc.evaluate(whole, chains).loss
    np.testing.assert_allclose(jc.evaluate(problem, chains).loss, expected, rtol=1e-6)


def test_examples_with_several_inputs_are_read_in_parts(whole):
    x = np.asarray(whole.data.x)
    first, second = x + 1.0, -np.ones_like(x)
    bank = jc.Bank.stack(
        lambda p, h: {**h, "a": jnp.tanh(h["a"] * p)},
        [jnp.float32(0.5), jnp.float32(2.0)],
        lambda p, h: (h["a"] + h["b"])[:, :3] * p,
        [jnp.float32(1.0)],
    )
    data = jc.Batch({"a": first, "b": second}, np.asarray(whole.data.y))
    chains = jc.chain.pad([[0, 1, 2], [1, 1, 2], [2]], 2)
    losses = [
        jc.evaluate(jc.Problem(bank, data, 2, batch_size=size), chains).loss for size in (None, 4)
    ]
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-6)


def test_evaluation_in_parts_is_jitted_and_vmapped(whole, problem):
    chains = whole.space.sample(jax.random.key(0), 8).reshape(2, 4, 3)
    expected = jc.evaluate(whole, chains.reshape(8, 3)).loss.reshape(2, 4)
    found = jax.jit(jax.vmap(lambda rows: jc.evaluate(problem, rows).loss))(chains)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize("kind", ["linearized", "weights"])
def test_edit_scores_are_means_over_parts(whole, problem, kind):
    chain = np.array([1, 3, 5])
    expected = jc.gradient.score_edits(whole, chain, kind)
    found = jc.gradient.score_edits(problem, chain, kind)
    for name in found._fields:
        np.testing.assert_allclose(
            getattr(found, name), getattr(expected, name), rtol=1e-4, atol=1e-6, err_msg=name
        )
    np.testing.assert_array_equal(jc.swap_scores(problem, chain, kind), found.swap)


def test_predictions_of_all_parts_are_in_order(whole, problem):
    chain = np.array([1, 3, 5])
    expected = jc.apply_chain(whole.bank, chain, whole.data.x)
    for one in (whole, problem):
        outputs = jc.predict(one, chain)
        assert isinstance(outputs, np.ndarray)
        np.testing.assert_allclose(outputs, expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match=r"expected one chain of shape \[L\], got \[1, 3\]"):
        jc.predict(problem, chain[None])


def test_means_are_weighted_by_the_sizes_of_parts(problem):
    means = average_over_parts(problem, lambda part: (part.data.x.mean(axis=0), jnp.int32(47)))
    expected = problem.data.source.leaves[0].mean(axis=0)
    np.testing.assert_allclose(means[0], expected, rtol=1e-5, atol=1e-6)
    assert means[1] == 47
    assert means[1].dtype == jnp.int32


def test_other_data_has_another_fingerprint(whole, problem):
    chains = whole.space.sample(jax.random.key(0), 3)
    x, y = problem.data.source.take(slice(None))
    changed = x.copy()
    changed[-1, 0] += 1.0
    same, other = (
        dataclasses.replace(problem, data=jc.Batch(values, y)) for values in (x.copy(), changed)
    )
    found = [np.asarray(compute_fingerprints(p, chains)) for p in (problem, same, other)]
    np.testing.assert_array_equal(found[0], found[1])
    assert (found[0] != found[2]).all()


def test_explain_plans_for_one_part(whole, problem):
    chains = whole.space.sample(jax.random.key(0), 8)
    assert jc.explain_plan(problem, chains).num_bytes < jc.explain_plan(whole, chains).num_bytes
    assert (
        jc.explain_plan(problem, chains).layer_calls == jc.explain_plan(whole, chains).layer_calls
    )


@pytest.mark.slow
def test_the_memory_is_bounded_by_the_part():
    """50,000 examples with 784 features take 157 MB, and their activations as much again."""
    script = str(Path(__file__).parents[2] / "benchmarks" / "parts.py")
    peak = {}
    for size in (0, 1000):  # 0 for the whole split
        command = [sys.executable, script, str(size), "4"]
        out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        peak[size] = json.loads(out.splitlines()[-1])["peak"]
    assert peak[1000] < 300e6 < peak[0]
