"""`jc.Staged` keeps the contract of a search, around each search of jchain."""

from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from conftest import make_bank, make_batch
from halving import halve_lists
from small_searches import INVERTIBLE, ORDERED, SEARCHES

import jchain as jc
from jchain.engine.successive_halving import make_rungs
from jchain.search.protocol import reads_activations

NUM, FRACTIONS, KEEP = 64, (1 / 8, 1), 1 / 3
RUNGS = make_rungs(FRACTIONS, KEEP, NUM)
# By default, two that read losses, with and without a rival, and one that reads activations.
DEFAULT = ("LocalSearch", "RandomSearch", "BeamSearch")
NAMES = [pytest.param(name, marks=() if name in DEFAULT else pytest.mark.slow) for name in SEARCHES]


def make_problem(name, **options):
    layer = {"layer": jc.layers.InvertibleDense(5)} if name in INVERTIBLE else {}
    # A removal scores chains of all layers, and reports those that are not too long.
    max_layers = 4 if name in ORDERED else 3
    return jc.Problem(make_bank(4, 2, **layer), make_batch(NUM), max_layers, **options)


def stage(search):
    return jc.Staged(search, FRACTIONS, KEEP)


def take_steps(search, problem, num):
    """Return the state before each step, its key, and its info."""
    step = jax.jit(search.step)
    state, rows = jax.jit(search.init)(jax.random.key(0), problem), []
    for key in jax.random.split(jax.random.key(1), num):
        new, info = step(key, state, problem)
        rows.append((state, key, info))
        state = new
    return rows


@pytest.mark.parametrize("name", NAMES)
def test_losses_and_costs_equal_those_of_plain_loops(name):
    problem, search = make_problem(name), stage(SEARCHES[name])
    rows = take_steps(search, problem, 6)
    if reads_activations(search.search):
        check_activations(search, problem, rows)
    else:
        check_losses(search, problem, rows)


def check_losses(search, problem, rows):
    """Each step halves the chains that are new, unless they were scored on all examples before."""
    scored = {}
    for state, _, info in rows:
        is_chain = np.asarray(info.chains)[:, 0] >= 0
        chains = [tuple(row) for row in np.asarray(info.chains)[is_chain].tolist()]
        rival = None
        if isinstance(search.search, jc.LocalSearch) and np.isfinite(state.inner.loss):
            rival = state.inner.chain.tolist()
        new = [chain for chain in chains if chain not in scored]
        known, cost = halve_lists(problem, new, RUNGS, rival if new else None)
        scored |= {chain: loss for chain, (loss, end) in known.items() if end == NUM}
        expected = [scored.get(chain, np.inf) for chain in chains]
        np.testing.assert_allclose(np.asarray(info.loss)[is_chain], expected, rtol=1e-5)
        assert Fraction(float(info.layer_calls)) == cost


def check_activations(search, problem, rows):
    """Each step is one on the first examples; chains that beat the best one so far go on."""
    part, inner_step = problem.take(slice(RUNGS.ends[0])), jax.jit(search.search.step)
    best, best_loss = None, np.inf
    for state, key, info in rows:
        _, inner = inner_step(key, state.inner, part)
        np.testing.assert_array_equal(info.chains, inner.chains)
        is_chain = np.asarray(inner.chains)[:, 0] >= 0
        chains = np.asarray(inner.chains)[is_chain]
        rival = None if best is None else best
        known, cost = halve_lists(problem, chains, RUNGS, rival, is_first_paid=True)
        expected = [known[tuple(row)] for row in chains.tolist()]
        loss = np.array([loss if end == NUM else np.inf for loss, end in expected])
        np.testing.assert_allclose(np.asarray(info.loss)[is_chain], loss, rtol=1e-5)
        assert np.isinf(np.asarray(info.loss)[~is_chain]).all()
        paid = Fraction(int(inner.layer_calls) * RUNGS.ends[0], NUM)
        assert Fraction(float(info.layer_calls)) == paid + cost
        if loss.min(initial=np.inf) < best_loss:
            best, best_loss = chains[loss.argmin()].tolist(), loss.min()


@pytest.mark.parametrize("name", NAMES)
def test_a_run_reports_only_losses_of_the_whole_split(name):
    problem = make_problem(name)
    result = jc.run(jax.random.key(0), stage(SEARCHES[name]), problem, budget=40, record="chains")
    assert len(result.finalists) >= 1
    for chains, losses in (
        (result.finalists, result.finalist_losses),
        (result.front.chains, result.front.loss),
        (result.best_chain[None], [result.best_loss]),
    ):
        expected = [reference.chain_loss(problem, chain)[0] for chain in chains]
        np.testing.assert_allclose(losses, expected, rtol=1e-5)
    assert result.curve.best_loss[-1] == result.best_loss
    is_scored = np.isfinite(result.scored.loss)
    assert result.num_nonfinite == (~is_scored).sum()
    assert result.layer_calls <= 40
    assert result.curve.layer_calls[-1] == result.layer_calls == result.scored.layer_calls[-1]


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name == "LocalSearch" else pytest.mark.slow)
        for name in SEARCHES
    ],
)
def test_staged_keeps_the_contract(name):
    jc.check_search(stage(SEARCHES[name]), make_problem(name))


@pytest.mark.slow
def test_each_of_several_runs_is_charged_as_if_it_were_alone():
    problem, search = make_problem("LocalSearch"), stage(jc.LocalSearch(num_chains=3))
    keys = jax.random.split(jax.random.key(0), 2)
    together = jc.run_many(keys, search, problem, budget=20)
    for key, result in zip(keys, together, strict=True):
        alone = jc.run(key, search, problem, budget=20)
        assert result.layer_calls == alone.layer_calls
        np.testing.assert_array_equal(result.curve.layer_calls, alone.curve.layer_calls)
        np.testing.assert_allclose(result.curve.best_loss, alone.curve.best_loss, rtol=1e-5)


@pytest.mark.slow
def test_data_in_parts_gives_the_same_run():
    problem, search = make_problem("LocalSearch"), stage(jc.LocalSearch(num_chains=3))
    host = make_problem("LocalSearch", batch_size=12)
    whole, parts = (jc.run(jax.random.key(0), search, own, budget=20) for own in (problem, host))
    np.testing.assert_array_equal(whole.curve.layer_calls, parts.curve.layer_calls)
    np.testing.assert_allclose(whole.curve.best_loss, parts.curve.best_loss, rtol=1e-5)


def test_a_search_that_reads_activations_needs_a_first_fraction_within_a_part():
    host = make_problem("BeamSearch", batch_size=4)
    with pytest.raises(
        ValueError, match="first fraction of at most batch_size=4 .* got 8 examples"
    ):
        stage(jc.BeamSearch()).check(host)
    jc.Staged(jc.BeamSearch(), (1 / 16, 1)).check(host)


def test_wrong_searches_and_fractions_are_named():
    problem = make_problem("LocalSearch")
    with pytest.raises(ValueError, match="whole layer calls, got Staged"):
        jc.Staged(jc.Staged(jc.LocalSearch()))
    with pytest.raises(ValueError, match=r"fractions\[0\] = 0.001 of 64 examples, which adds none"):
        jc.run(jax.random.key(0), jc.Staged(jc.LocalSearch(), (1 / 1000, 1)), problem, budget=20)
    with pytest.raises(ValueError, match="rise and end in 1"):
        jc.Staged(jc.LocalSearch(), (1, 1 / 4))
    assert jc.Staged(jc.LocalSearch(), [1 / 4, 1]).fractions == (1 / 4, 1)


def test_updates_that_count_whole_layer_calls_refuse_it():
    problem, search = make_problem("LocalSearch"), jc.Staged(jc.LocalSearch())
    train = make_batch(8)
    for policy, words in (
        (jc.updates.CloneThenTune(), "whole layer calls with CloneThenTune, got Staged"),
        (jc.updates.SharedUpdates(), "a method refresh.*got Staged"),
    ):
        with pytest.raises(ValueError, match=words):
            policy.run(jax.random.key(0), search, problem, train, budget=1000)


@pytest.mark.slow
def test_the_cost_of_tuning_is_added_to_fractions():
    problem, search = make_problem("LocalSearch"), stage(jc.LocalSearch(num_chains=3))
    policy = jc.updates.TuneFound(num_steps=1)
    out = policy.run(jax.random.key(0), search, problem, make_batch(8), budget=60)
    assert out.result.layer_calls % 1 != 0
    assert out.result.layer_calls == out.result.curve.layer_calls[-1] <= 60
    assert jnp.isfinite(out.result.best_loss)
