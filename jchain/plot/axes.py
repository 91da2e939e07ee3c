"""The axes that a figure is drawn on."""

from typing import TYPE_CHECKING

from jchain.pytree import shorten

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def get_axes(ax: "Axes | None", size: tuple[float, float] = (6.4, 4.0)) -> "Axes":
    """Return the axes that were given, or those of a new figure, which is not shown.

    Args:
      ax: the axes, or None.
      size: width and height of a new figure, in inches.

    Raises:
      ValueError: if `ax` is something else.
    """
    if ax is not None:
        if isinstance(ax, type) or not hasattr(ax, "get_figure"):
            raise ValueError(f"expected ax to be axes of matplotlib or None, got {shorten(ax)}")
        return ax
    from matplotlib.figure import Figure

    return Figure(figsize=size, layout="constrained").subplots()
