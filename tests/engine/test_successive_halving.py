"""Successive halving equals a plain loop over lists, and never computes anything twice."""

from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import make_bank, make_batch
from halving import halve_lists

import jchain as jc
from jchain.engine import score_cache
from jchain.engine.population import Options
from jchain.engine.successive_halving import RungProblem, check_parts, halve, make_rungs

OPTIONS = Options(None, None, None, "cpu")
FRACTIONS, KEEP, NUM = (1 / 16, 1 / 4, 1), 1 / 4, 64
# Fewer programs to compile, where the number of rungs does not matter.
TWO = (1 / 4, 1)


@pytest.fixture(scope="module")
def problem():
    return jc.Problem(make_bank(), make_batch(NUM), 3, layer_cost=0.01)


@pytest.fixture(scope="module")
def chains(problem):
    return jc.env.sample_chains(jax.random.key(0), problem, 21)


def assert_equal(out, chains, known, cost):
    rows = list(map(tuple, np.asarray(chains).tolist()))
    partial, ends = np.array([known[row] for row in rows]).T
    np.testing.assert_array_equal(out.num_examples, ends)
    np.testing.assert_allclose(out.partial_loss, partial, rtol=1e-5)
    np.testing.assert_allclose(out.loss, np.where(ends == NUM, partial, np.inf), rtol=1e-5)
    assert Fraction(float(out.layer_calls)) == cost


def test_halving_equals_plain_loops(problem, chains):
    rungs = make_rungs(FRACTIONS, KEEP, NUM)
    out = halve(problem, chains, rungs=rungs, options=OPTIONS)
    assert_equal(out, chains, *halve_lists(problem, chains, rungs))
    # The cost is far below that of the whole.
    assert out.layer_calls < jc.evaluate(problem, chains).layer_calls / 3
    assert np.isfinite(out.loss).sum() == 2
    whole = jc.evaluate(problem, chains)
    is_whole = np.isfinite(out.loss)
    np.testing.assert_allclose(out.accuracy[is_whole], whole.accuracy[is_whole], rtol=1e-6)


@pytest.mark.parametrize("place", [0, 5])
def test_a_chain_that_does_not_beat_its_rival_stops(problem, chains, place):
    rungs = make_rungs(FRACTIONS, 1.0, NUM)
    losses = np.asarray(jc.evaluate(problem, chains).loss)
    rival = tuple(np.asarray(chains)[np.argsort(losses)[place]].tolist())
    out = halve(problem, chains, None, jnp.array(rival), rungs=rungs, options=OPTIONS)
    known, cost = halve_lists(problem, chains, rungs, rival)
    assert_equal(out, chains, known, cost)
    ends = np.asarray(out.num_examples)
    assert np.isinf(np.asarray(out.loss)[ends < NUM]).all()


def test_a_rival_of_padding_has_no_effect(problem, chains):
    rungs = make_rungs(TWO, KEEP, NUM)
    none = jnp.full(4, -1)
    out = halve(problem, chains, None, none, rungs=rungs, options=OPTIONS)
    plain = halve(problem, chains, rungs=rungs, options=OPTIONS)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), out, plain)


def test_known_first_losses_are_not_paid_again(problem, chains):
    rungs = make_rungs(TWO, KEEP, NUM)
    first = jc.evaluate(problem.take(slice(0, rungs.ends[0])), chains)
    plain = halve(problem, chains, rungs=rungs, options=OPTIONS)
    out = halve(problem, chains, None, None, first.loss, rungs=rungs, options=OPTIONS)
    np.testing.assert_allclose(out.loss, plain.loss, rtol=1e-6)
    paid = first.layer_calls * rungs.ends[0] / NUM
    assert float(out.layer_calls) == float(plain.layer_calls - paid)


def test_vmapped_equals_looped(problem, chains):
    rungs = make_rungs(TWO, KEEP, NUM)
    many = chains[:20].reshape(2, 10, 4)
    run = jax.jit(lambda rows: halve(problem, rows, rungs=rungs, options=OPTIONS))
    out = jax.vmap(run)(many)
    for i, rows in enumerate(many):
        jax.tree.map(
            lambda a, b, i=i: np.testing.assert_allclose(a[i], b, rtol=1e-5), out, run(rows)
        )


def test_data_in_parts_gives_the_same_losses(problem, chains):
    rungs = make_rungs(TWO, KEEP, NUM)
    host = jc.Problem(problem.bank, problem.data, 3, layer_cost=0.01, batch_size=12)
    out = halve(host, chains, rungs=rungs, options=OPTIONS)
    plain = halve(problem, chains, rungs=rungs, options=OPTIONS)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), out, plain)


def test_a_chain_that_is_not_finite_stops(problem, chains):
    x = problem.data.x.at[0].set(3e38)
    broken = jc.Problem(problem.bank, jc.Batch(x, problem.data.y), 3)
    rungs = make_rungs((1 / 4, 1), 1.0, NUM)
    out = halve(broken, chains, rungs=rungs, options=OPTIONS)
    is_finite = np.isfinite(jc.evaluate(broken, chains).loss)
    np.testing.assert_array_equal(np.isfinite(out.loss), is_finite)
    assert not is_finite.all()


@pytest.mark.slow
def test_the_cache_stores_only_losses_of_the_whole_split(problem, chains):
    rungs = RungProblem.make(problem, make_rungs(TWO, KEEP, NUM))
    cache = score_cache.init(problem)
    cache, loss, _ = score_cache.evaluate_cached(cache, rungs, chains)
    stored = np.asarray(score_cache.is_cached(cache, problem, chains))
    np.testing.assert_array_equal(stored, np.isfinite(loss))
    assert 0 < stored.sum() < len(stored)
    # Those that stopped compete again, without those that are known.
    cache, again, calls = score_cache.evaluate_cached(cache, rungs, chains)
    np.testing.assert_array_equal(np.asarray(again)[stored], np.asarray(loss)[stored])
    rest = np.asarray(chains)[~stored]
    known, cost = halve_lists(problem, rest, rungs.rungs)
    assert Fraction(float(calls)) == cost
    expected = [known[tuple(row)][1] == NUM for row in rest.tolist()]
    np.testing.assert_array_equal(np.isfinite(again)[~stored], expected)


def test_evaluate_of_a_problem_with_rungs_is_staged(problem, chains):
    rungs = make_rungs(TWO, KEEP, NUM)
    out = jc.evaluate(RungProblem.make(problem, rungs), chains)
    expected = halve(problem, chains, rungs=rungs, options=OPTIONS)
    np.testing.assert_allclose(out.loss, expected.loss)
    assert out.layer_calls == expected.layer_calls


@pytest.mark.parametrize(
    ("fractions", "keep", "words"),
    [
        ((1 / 1000, 1), 0.25, r"fractions\[0\] = 0.001 of 64 examples, which adds none"),
        ((0.5, 0.501, 1), 0.25, r"fractions\[1\] = 0.501 of 64 examples, which adds none"),
        ((1 / 4, 1 / 16, 1), 0.25, "fractions that rise and end in 1"),
        ((1 / 4, 1 / 4, 1), 0.25, "fractions that rise and end in 1"),
        ((1 / 16, 1 / 4), 0.25, "fractions that rise and end in 1"),
        ((), 0.25, "fractions that rise and end in 1"),
        ((0, 1), 0.25, r"fractions\[0\] to be a finite number above 0"),
        ((float("nan"), 1), 0.25, r"fractions\[0\] to be a finite number above 0"),
        ((0.5, 2), 0.25, r"fractions\[1\] to be a finite number above 0 and of at most 1, got 2"),
        ((0.5, 1), 0, "keep to be a finite number above 0"),
        ((0.5, 1), 1.5, "keep to be a finite number above 0 and of at most 1"),
    ],
)
def test_wrong_fractions_are_named(fractions, keep, words):
    with pytest.raises(ValueError, match=words):
        make_rungs(fractions, keep, NUM)


def test_evaluate_staged_checks_its_arguments_and_works_under_jit(problem, chains):
    out = jc.evaluate_staged(problem, np.asarray(chains).tolist())
    known, cost = halve_lists(problem, chains, make_rungs(FRACTIONS, KEEP, NUM))
    assert_equal(out, chains, known, cost)
    traced = jax.jit(lambda rows: jc.evaluate_staged(problem, rows))(chains)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), traced, out)
    with pytest.raises(ValueError, match="expected chains"):
        jc.evaluate_staged(problem, chains[0])
    with pytest.raises(ValueError, match="adds none"):
        jc.evaluate_staged(problem, chains, fractions=(1 / 1000, 1))


def test_a_loss_that_is_no_mean_over_examples_is_refused(problem):
    def spread(outputs, y):
        return jnp.abs(outputs - outputs.mean(axis=0, keepdims=True)).sum(axis=-1)

    wrong = jc.Problem(problem.bank, problem.data, 3, loss_fn=spread)
    with pytest.raises(ValueError, match=r"loss_fn to treat examples one by one.*jc\.Staged"):
        check_parts(wrong)
    check_parts(problem)


def test_the_share_is_rounded_up_without_rounding_errors():
    rungs = make_rungs((0.5, 1), 0.1, NUM)
    assert [rungs.count_kept(num) for num in (1, 10, 11, 30)] == [1, 1, 2, 3]
