"""Figures hold the numbers that they were given."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jchain as jc


@pytest.fixture(scope="module")
def results(problem):
    keys = jax.random.split(jax.random.key(0), 3)
    return jc.run_many(keys, jc.RandomSearch(num_chains=4), problem, budget=90)


def test_a_curve_is_that_of_the_result(results):
    ax = jc.plot.curve(results[0], label="random")
    line = ax.lines[0]
    np.testing.assert_array_equal(line.get_xdata(), results[0].curve.layer_calls)
    np.testing.assert_array_equal(line.get_ydata(), results[0].curve.best_loss)
    assert ax.get_legend().get_texts()[0].get_text() == "random"
    # Another curve on the same axes.
    assert jc.plot.curve(results[1], ax=ax) is ax
    assert len(ax.lines) == 2


def test_several_curves_are_their_mean_and_interval(results):
    ax = jc.plot.curve(results)
    x, y = ax.lines[0].get_data()
    last = [result.best_loss for result in results]
    assert y[-1] == pytest.approx(np.mean(last), rel=1e-6)
    assert x[-1] == max(result.layer_calls for result in results)
    edges = ax.collections[0].get_paths()[0].vertices[:, 1]
    half = 4.3027 * np.std(last, ddof=1) / 3**0.5
    assert edges.min() <= y[-1] - half * 0.999
    assert np.isclose(edges, y[-1] + half, rtol=1e-4).any()


def test_a_front_is_that_of_the_runs(results):
    front = jc.front(results)
    for given in (results, front):
        x, y = jc.plot.front(given).lines[0].get_data()
        np.testing.assert_array_equal(x, front.cost)
        np.testing.assert_array_equal(y, front.loss)


def test_chains_are_drawn_with_the_names_of_their_layers(bank):
    ax = jc.plot.chains(bank, [[0, 3, 4], [2, 5]], labels=["a", "b"])
    texts = [text.get_text() for text in ax.texts]
    assert texts == ["layer0", "layer3", "head0", "layer2", "head1"]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["a", "b"]
    one = jc.plot.chains(bank, [0, 3, 4])
    assert [text.get_text() for text in one.texts] == texts[:3]
    with pytest.raises(ValueError, match="expected one label for each of 2 chains, got 1"):
        jc.plot.chains(bank, [[0, 4], [2, 5]], labels=["a"])


def test_maps_show_the_scores(problem, bank):
    chain = np.array([0, 3, 4, -1])
    scores = jc.swap_scores(problem, chain)
    ax = jc.plot.swap_scores(bank, chain, scores)
    np.testing.assert_allclose(ax.images[0].get_array(), scores[:2], rtol=1e-6)
    np.testing.assert_array_equal(ax.collections[0].get_offsets(), [[0, 0], [3, 1]])
    with pytest.raises(ValueError, match=r"expected scores of shape \[4, 4\], got \[2, 4\]"):
        jc.plot.swap_scores(bank, chain, scores[:2])
    search = jc.ActorCritic(encoding=jc.TokenEncoding(8), num_chains=4)
    state = search.init(jax.random.key(0), problem)
    probabilities = jnp.exp(search.policy(state, problem, jnp.asarray(chain)[None]))[0]
    ax = jc.plot.policy(bank, probabilities)
    np.testing.assert_allclose(ax.images[0].get_array(), probabilities, rtol=1e-6)
    with pytest.raises(ValueError, match=r"expected probabilities of shape \[L, 6\]"):
        jc.plot.policy(bank, probabilities[:, :2])


def test_a_map_of_runs_of_blocks_has_their_names():
    changes = np.where(np.tri(3, k=-1, dtype=bool), np.nan, np.arange(9).reshape(3, 3) - 4.0)
    ax = jc.plot.block_runs(changes, labels=["1", "2", "3"])
    np.testing.assert_array_equal(np.ma.filled(ax.images[0].get_array(), np.nan), changes)
    assert [label.get_text() for label in ax.get_xticklabels()] == ["1", "2", "3"]
    with pytest.raises(ValueError, match="expected one label for each of 3 blocks, got 1"):
        jc.plot.block_runs(changes, labels=["1"])


def test_what_is_no_result_is_refused(results):
    with pytest.raises(ValueError, match="expected a jc.Result or several, got list of 0"):
        jc.plot.curve([])
    nothing = results[0]._replace(curve=jc.Curve(np.array([4]), np.array([np.inf], np.float32)))
    with pytest.raises(ValueError, match="expected runs that found a chain"):
        jc.plot.curve(nothing)
