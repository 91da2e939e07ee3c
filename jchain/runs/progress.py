"""Progress reports of a run: to a callback, and on a live line."""

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from jchain._typing import Float, Int

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID


class Progress(NamedTuple):
    """How far a run is, for a callback.

    Attributes:
      layer_calls: the layer calls spent so far; a float if the search charges fractions.
      seconds: the time spent so far, including that of earlier calls.
      best_chain: the best chain so far, `[L]`; all -1 if no chain had a finite loss.
      best_loss: its loss.
      chains: the chains that were scored since the last call of the callback, `[C, L]`.
      loss: their losses, `[C]`.
    """

    layer_calls: int | float
    seconds: float
    best_chain: Int[np.ndarray, "L"]
    best_loss: float
    chains: Int[np.ndarray, "C L"]
    loss: Float[np.ndarray, "C"]


class ProgressLine:
    """Context manager that shows a progress line during a run.

    Args:
      budget: the number of layer calls at which the bar is full.
      is_shown: whether to show the line, on standard error.
    """

    def __init__(self, budget: int, *, is_shown: bool) -> None:
        self._bar: RichProgress | None = None
        self._task: TaskID | None = None
        self._budget = budget
        self._is_shown = is_shown

    def __enter__(self) -> "ProgressLine":
        if self._is_shown:
            from rich import progress
            from rich.console import Console

            columns = (
                progress.TextColumn("{task.completed:,.0f} of {task.total:,.0f} layer calls"),
                progress.BarColumn(),
                progress.TextColumn("best loss {task.fields[best_loss]:.4f}"),
                progress.TimeRemainingColumn(),
            )
            self._bar = progress.Progress(*columns, console=Console(stderr=True))
            self._task = self._bar.add_task("search", total=self._budget, best_loss=float("inf"))
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, layer_calls: int, best_loss: float) -> None:
        """Update the line with the current totals.

        Args:
          layer_calls: the layer calls spent so far.
          best_loss: the lowest loss so far.
        """
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=layer_calls, best_loss=best_loss)
