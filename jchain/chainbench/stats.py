"""How runs are summed up: interquartile means and bootstrap intervals, stratified by problem.

Agarwal, Schwarzer, Castro, Courville and Bellemare 2021, arXiv:2108.13264. Scores are `[M, S]`, problems by seeds, lower is
better.
"""

from typing import Any, NamedTuple

import numpy as np

from jchain._typing import Float


class Estimate(NamedTuple):
    """A statistic and its 95% interval."""

    value: float
    low: float
    high: float


def iqm(
    scores: Float[np.ndarray, "M S"] | Any, *, seed: int = 0, num_resamples: int = 2000
) -> Estimate:
    """Interquartile mean: the mean of the middle half of all scores.

    Its percentile bootstrap interval draws seeds anew within each problem.

    Raises:
      ValueError: scores are not `[M, S]`, or not finite.
    """
    scores = _check(scores)

    def statistic(*rows: np.ndarray, axis: int = -1) -> Any:
        from scipy.stats import trim_mean

        return trim_mean(np.concatenate(rows, axis=axis), 0.25, axis=axis)

    return _bootstrap(tuple(scores), statistic, seed, num_resamples)


def probability_of_improvement(
    scores: Float[np.ndarray, "M S"] | Any,
    others: Float[np.ndarray, "M R"] | Any,
    *,
    seed: int = 0,
    num_resamples: int = 2000,
) -> Estimate:
    """How likely a run of the first search ends lower than one of the second on the same problem, a tie counting half.

    Raises:
      ValueError: as `iqm`, or there are not as many problems.
    """
    scores, others = _check(scores), _check(others)
    if len(scores) != len(others):
        raise ValueError(
            f"expected scores of the same problems, got {len(scores)} and {len(others)}"
        )

    def statistic(*rows: np.ndarray, axis: int = -1) -> Any:
        del axis  # scipy moves it last
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


def _check(scores: Any) -> np.ndarray:
    scores = np.asarray(scores, np.float64)
    if scores.ndim != 2 or scores.size == 0:
        raise ValueError(f"expected scores of shape [M, S], at least one, got {list(scores.shape)}")
    if not np.isfinite(scores).all():
        raise ValueError("expected finite scores, got nan or infinity")
    return scores


def _bootstrap(
    rows: tuple[np.ndarray, ...], statistic: Any, seed: int, num_resamples: int
) -> Estimate:
    from scipy.stats import bootstrap

    value = float(statistic(*rows))
    if all(row.size == 1 or np.ptp(row) == 0 for row in rows):
        # Drawing seeds anew changes nothing.
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
