"""The axes that a figure is drawn on."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def get_axes(ax: "Axes | None", size: tuple[float, float] = (6.4, 4.0)) -> "Axes":
    """Return the axes that were given, or those of a new figure, which is not shown.

    Args:
      ax: the axes, or None.
      size: width and height of a new figure, in inches.
    """
    if ax is not None:
        return ax
    from matplotlib.figure import Figure

    return Figure(figsize=size, layout="constrained").subplots()
