"""A live line: layer calls, best loss, time left."""

from typing import Any


class Progress:
    """Context manager around a search; shows nothing unless `is_shown`."""

    def __init__(self, budget: int, *, is_shown: bool) -> None:
        self._bar: Any = None
        self._budget = budget
        self._is_shown = is_shown

    def __enter__(self) -> "Progress":
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
        """Show where the search stands."""
        if self._bar is not None:
            self._bar.update(self._task, completed=layer_calls, best_loss=best_loss)
