"""Figures of runs: the loss over the cost, and the front."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from jchain.arguments import checked
from jchain.plot.axes import get_axes
from jchain.pytree import describe_type
from jchain.runs.front import Front
from jchain.runs.result import Result
from jchain.runs.result import front as merge_fronts

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_NUM_POINTS = 200
# Two-sided 95%.
_QUANTILE = 0.975


@checked
def curve(
    results: Result | Sequence[Result], *, label: str | None = None, ax: "Axes | None" = None
) -> "Axes":
    """Draw the best loss so far over the layer calls.

    Several results, such as those of `jchain.run_many`, are drawn as their mean with its 95%
    interval (Student's t), from where all of them have a finite loss.

    Args:
      results: the result of a run, or several.
      label: what the legend says.
      ax: the axes to draw on; None for a new figure.

    Raises:
      ValueError: if there is no result, or no run found a chain with a finite loss.
    """
    runs = [results] if isinstance(results, Result) else list(results)
    if not runs or not all(isinstance(run, Result) for run in runs):
        raise ValueError(f"expected a jc.Result or several, got {describe_type(results)}")
    ax = get_axes(ax)
    if len(runs) == 1:
        calls, loss = runs[0].curve
        is_found = np.isfinite(loss)
        _check_found(bool(np.any(is_found)))
        ax.step(calls[is_found], loss[is_found], where="post", label=label)
    else:
        last = max(run.layer_calls for run in runs)
        calls = np.unique(np.linspace(1, last, _NUM_POINTS).astype(int))
        # A run that is over keeps its best loss.
        losses = np.stack([run.curve.at(calls) for run in runs])
        is_found = np.isfinite(losses).all(axis=0)
        _check_found(bool(np.any(is_found)))
        calls, losses = calls[is_found], losses[:, is_found]
        mean, width = losses.mean(axis=0), _half_widths(losses)
        (line,) = ax.step(calls, mean, where="post", label=label)
        ax.fill_between(
            calls, mean - width, mean + width, step="post", alpha=0.2, color=line.get_color()
        )
    ax.set(xlabel="layer calls", ylabel="best loss so far")
    if label is not None:
        ax.legend()
    return ax


@checked
def front(
    results: Result | Sequence[Result] | Front,
    *,
    label: str | None = None,
    ax: "Axes | None" = None,
) -> "Axes":
    """Draw the lowest loss that each cost reaches.

    Args:
      results: the result of a run, several results, which are merged, or a front.
      label: what the legend says.
      ax: the axes to draw on; None for a new figure.

    Raises:
      ValueError: if there is no result.
    """
    found = results if isinstance(results, Front) else merge_fronts(results)
    ax = get_axes(ax)
    ax.step(found.cost, found.loss, where="post", marker="o", label=label)
    ax.set(xlabel="cost", ylabel="loss")
    if label is not None:
        ax.legend()
    return ax


def _check_found(is_found: bool) -> None:
    if not is_found:
        raise ValueError("expected runs that found a chain with a finite loss, got none")


def _half_widths(losses: np.ndarray) -> np.ndarray:
    """Return half the width of the 95% interval of the mean over the first axis."""
    from scipy.stats import sem, t

    return sem(losses, axis=0) * t.ppf(_QUANTILE, len(losses) - 1)
