"""Statistics of runs: interquartile means and bootstrap intervals, stratified by problem.

The statistics follow Agarwal, Schwarzer, Castro, Courville, and Bellemare 2021,
arXiv:2108.13264. Scores have shape `[M, S]` for M problems and S seeds; lower scores are better.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from jchain._typing import Float
from jchain.arguments import check_at_least_one, checked, read_array


class Estimate(NamedTuple):
    """A statistic and its 95% bootstrap interval."""

    value: float
    low: float
    high: float


@checked
def iqm(
    scores: np.ndarray | Sequence[object], *, seed: int = 0, num_resamples: int = 2000
) -> Estimate:
    """Compute the interquartile mean: the mean of the middle half of all scores.

    The percentile bootstrap interval resamples the seeds within each problem.

    Args:
      scores: the scores of each problem and seed, `[M, S]`.
      seed: the random seed of the bootstrap.
      num_resamples: the number of bootstrap samples.

    Raises:
      ValueError: if the scores do not have shape `[M, S]` or are not finite.
    """
    scores = _check(scores)
    check_at_least_one(num_resamples=num_resamples)

    def statistic(*rows: np.ndarray, axis: int = -1) -> np.ndarray | np.floating:
        from scipy.stats import trim_mean

        return trim_mean(np.concatenate(rows, axis=axis), 0.25, axis=axis)

    return _bootstrap(tuple(scores), statistic, seed, num_resamples)


@checked
def probability_of_improvement(
    scores: np.ndarray | Sequence[object],
    others: np.ndarray | Sequence[object],
    *,
    seed: int = 0,
    num_resamples: int = 2000,
) -> Estimate:
    """Estimate the probability that a run of one search ends lower than a run of another.

    Both runs are on the same problem. A tie counts as half.

    Args:
      scores: the scores of the first search, `[M, S]`.
      others: the scores of the second search on the same problems, `[M, R]`.
      seed: the random seed of the bootstrap.
      num_resamples: the number of bootstrap samples.

    Raises:
      ValueError: as for `iqm`, or if the numbers of problems differ.
    """
    scores, others = _check(scores), _check(others)
    if len(scores) != len(others):
        raise ValueError(
            f"expected scores of the same problems, got {len(scores)} and {len(others)}"
        )

    check_at_least_one(num_resamples=num_resamples)

    def statistic(*rows: np.ndarray, axis: int = -1) -> np.ndarray | np.floating:
        del axis  # scipy moves the resampled axis last
        half = len(rows) // 2
        wins = [
            np.mean(
                (a[..., :, None] < b[..., None, :]) + 0.5 * (a[..., :, None] == b[..., None, :]),
                axis=(-2, -1),
            )
            for a, b in zip(rows[:half], rows[half:], strict=True)
        ]
        return np.mean(wins, axis=0)

    return _bootstrap((*scores, *others), statistic, seed, num_resamples)


def _check(scores: np.ndarray | Sequence[object]) -> Float[np.ndarray, "M S"]:
    scores = read_array("scores", scores, np.float64)
    if scores.ndim != 2 or scores.size == 0:
        raise ValueError(f"expected scores of shape [M, S], at least one, got {list(scores.shape)}")
    if not np.isfinite(scores).all():
        raise ValueError("expected finite scores, got nan or infinity")
    return scores


def _bootstrap(
    rows: tuple[np.ndarray, ...],
    statistic: Callable[..., np.ndarray | np.floating],
    seed: int,
    num_resamples: int,
) -> Estimate:
    from scipy.stats import bootstrap

    value = float(statistic(*rows))
    if all(row.size == 1 or np.ptp(row) == 0 for row in rows):
        # Resampling cannot change the value.
        return Estimate(value, value, value)
    rows = tuple(np.repeat(row, 2) if row.size == 1 else row for row in rows)
    interval = bootstrap(
        rows,
        statistic,
        n_resamples=num_resamples,
        method="percentile",
        vectorized=True,
        axis=-1,
        rng=seed,
        batch=100,
    ).confidence_interval
    return Estimate(value, float(interval.low), float(interval.high))
