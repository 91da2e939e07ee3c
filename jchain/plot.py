"""Figures, written whole or not at all. matplotlib is imported when one is drawn."""

import os
from collections.abc import Mapping

from jchain.files import write_atomically
from jchain.search.base import Curve


def plot_curve(path: str | os.PathLike[str], curve: Curve, levels: Mapping[str, float]) -> None:
    """Best loss against layer calls as a PNG.

    Args:
      path: where to write.
      curve: of one run.
      levels: losses to compare with, by name, drawn as horizontal lines.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axes = figure.subplots()
    axes.step(curve.layer_calls, curve.best_loss, where="post", label="search")
    for i, (name, loss) in enumerate(levels.items()):
        axes.axhline(loss, linestyle="--", color=f"C{i + 1}", label=name)
    axes.set(xlabel="layer calls", ylabel="best loss on search", yscale="log")
    axes.grid(visible=True, which="both", alpha=0.3)
    axes.legend()
    write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=150))
