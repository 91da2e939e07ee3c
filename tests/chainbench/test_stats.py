import numpy as np
import pytest
import scipy.stats

from jchain.chainbench import stats


def test_iqm_by_hand():
    # The middle half of 1..8 is 3, 4, 5, 6.
    scores = np.array([[8.0, 1, 3, 6], [2, 5, 100, 4]])
    scores[scores == 100] = 7
    assert stats.iqm(scores).value == 4.5
    scores[1, 2] = 1e9
    assert stats.iqm(scores).value == (3 + 4 + 5 + 6) / 4


def test_probability_of_improvement_by_hand():
    # Problem 0: 1 beats 2 and 3, 2 ties 2 and beats 3: (2 + 1.5) / 4. Problem 1: never.
    out = stats.probability_of_improvement(
        np.array([[1.0, 2], [9, 9]]), np.array([[2.0, 3], [1, 8]])
    )
    assert out.value == pytest.approx((3.5 / 4 + 0) / 2)
    assert out.low <= out.value <= out.high


def test_intervals_equal_scipy():
    scores = np.random.default_rng(0).exponential(size=(3, 12))
    ours = stats.iqm(scores, seed=5, num_resamples=500)
    theirs = scipy.stats.bootstrap(
        tuple(scores),
        lambda a, b, c: scipy.stats.trim_mean([*a, *b, *c], 0.25),
        n_resamples=500,
        method="percentile",
        vectorized=False,
        rng=5,
        batch=100,
    ).confidence_interval
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high))
    assert ours.low < ours.value < ours.high


def test_the_bootstrap_stays_within_problems():
    # Problems differ, seeds do not: resampling changes nothing.
    scores = np.repeat(np.arange(4.0)[:, None], 6, axis=1)
    assert stats.iqm(scores) == (1.5, 1.5, 1.5)
    # Only one problem has seeds that differ.
    scores[0] = np.linspace(-1, 1, 6)
    out = stats.iqm(scores)
    assert 1.0 <= out.low <= out.high <= 2.0


def test_an_interval_contains_the_true_value_about_95_times_in_100():
    rng = np.random.default_rng(0)
    outs = [stats.iqm(rng.normal(size=(4, 20)), num_resamples=300) for _ in range(200)]
    inside = np.mean([out.low <= 0 <= out.high for out in outs])
    assert 0.88 < inside < 0.99


def test_bad_scores_raise():
    for bad in (np.zeros(3), np.zeros((0, 2))):
        with pytest.raises(
            ValueError, match=r"expected scores of shape \[M, S\], at least one, got"
        ):
            stats.iqm(bad)
    with pytest.raises(ValueError, match="expected finite scores"):
        stats.iqm(np.array([[1.0, np.inf]]))
    with pytest.raises(ValueError, match="expected scores of the same problems, got 2 and 3"):
        stats.probability_of_improvement(np.zeros((2, 2)), np.zeros((3, 2)))
