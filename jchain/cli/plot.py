"""Figures of results, which are written atomically.

matplotlib is imported only when a figure is drawn.
"""

import os
from collections.abc import Mapping, Sequence

import numpy as np

from jchain.cli.records import FOUND, Summary, SweepRow
from jchain.files import write_atomically
from jchain.gradient.layer_report import LayerReport
from jchain.runs.result import Curve


def plot_curve(path: str | os.PathLike[str], curve: Curve, levels: Mapping[str, float]) -> None:
    """Plot the best loss against layer calls, and write a PNG.

    Args:
      path: the file to write.
      curve: the curve of one run.
      levels: losses to compare with, by name; each is drawn as a horizontal line.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axes = figure.subplots()
    axes.step(curve.layer_calls, curve.best_loss, where="post", label="search")
    for i, (name, loss) in enumerate(levels.items()):
        axes.axhline(loss, linestyle="--", color=f"C{i + 1}", label=name)
    is_positive = all(
        (np.asarray(losses) > 0).all() for losses in (curve.best_loss, [*levels.values()])
    )
    axes.set(
        xlabel="layer calls",
        ylabel="best loss on search",
        yscale="log" if is_positive else "linear",
    )
    axes.grid(visible=True, which="both", alpha=0.3)
    axes.legend()
    write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=150))


def plot_sweep(path: str | os.PathLike[str], rows: Sequence[SweepRow]) -> None:
    """Plot the loss on `test` against the number of layers, and write a PNG.

    There is one line for the chains that were found, and one for each recipe.

    Args:
      path: the file to write.
      rows: the field `sweep` of a result of `jchain search --sweep`.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axes = figure.subplots()
    for name in dict.fromkeys(name for row in rows for name in row["recipes"]):
        points = [
            (r["max_layers"], r["recipes"][name]["loss"]["test"])
            for r in rows
            if name in r["recipes"]
        ]
        axes.plot(*zip(*points, strict=True), marker="s", linestyle="--", label=name)
    points = [(row["max_layers"], row["loss"]["test"]) for row in rows]
    axes.plot(*zip(*points, strict=True), marker="o", color="black", label="best chain found")
    axes.set(
        xlabel="maximum number of layers, not counting pinned blocks",
        ylabel="loss on test",
        xticks=[x for x, _ in points],
    )
    axes.grid(visible=True, alpha=0.3)
    axes.legend()
    write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=150))


def plot_seeds(path: str | os.PathLike[str], summary: Summary) -> None:
    """Plot the losses of the best chain found and the controls on `test`, and write a PNG.

    Each seed is a dot.

    Args:
      path: the file to write.
      summary: the summary of all seeds.
    """
    from matplotlib.figure import Figure

    rows = {name: row for name, row in summary["rows"].items() if row["mean"] is not None}
    figure = Figure(figsize=(8, 1 + 0.3 * len(rows)), layout="constrained")
    axes = figure.subplots()
    for position, (name, row) in enumerate(rows.items()):
        color = "C3" if name == FOUND else "C0"
        losses = [loss for loss in row["loss"] if loss is not None]
        axes.plot(losses, [position] * len(losses), "o", color=color, alpha=0.5)
        axes.plot(np.mean(losses), position, "|", color=color, markersize=16)
    labels = [f"{name}, {row['mean_accuracy']:.1%}" for name, row in rows.items()]
    axes.set(xlabel="loss on test, one dot per seed; labels give the mean accuracy", xscale="log")
    axes.set_yticks(range(len(rows)), labels)
    axes.invert_yaxis()
    axes.grid(visible=True, axis="x", alpha=0.3)
    write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=150))


def plot_layers(path: str | os.PathLike[str], reports: Sequence[LayerReport]) -> None:
    """Plot totals by layer and importance by weight index, and write a PNG.

    Args:
      path: the file to write.
      reports: the reports that `jchain.gradient.layer_report.report_layers` returned; all layers
        must have tensors with the same names and shapes.

    Raises:
      ValueError: if there is no layer or the tensors differ.
    """
    from matplotlib.figure import Figure

    shapes = {
        tuple((name, tensor.weights.shape) for name, tensor in report.tensors.items())
        for report in reports
    }
    if len(shapes) != 1:
        raise ValueError(
            "expected at least one layer, with tensors of the same names and shapes, got "
            f"{len(shapes)} kinds"
        )
    names = [f"{report.slot}: {report.name}" for report in reports]
    totals = [report.reduce()[""] for report in reports]
    tensors = [*reports[0].tensors]
    figure = Figure(
        figsize=(11, 2.2 + 0.45 * len(reports) * (1 + len(tensors) / 2)), layout="constrained"
    )
    heights = [1, max(1, (len(tensors) + 1) // 2)]
    subfigures = figure.subfigures(2, height_ratios=heights)
    top, below = subfigures  # pyright: ignore[reportGeneralTypeIssues]
    labels = {
        "weights": "root mean square weight",
        "gradient": "root mean square gradient",
        "importance": "importance, sum of |w dL/dw|",
        "fisher": "empirical Fisher, sum",
    }
    bars = top.subplots(1, 4, sharey=True)
    for axes, (key, label) in zip(bars, labels.items(), strict=True):
        axes.barh(names, [total[key] for total in totals])
        axes.set(xlabel=label)
    # This puts the first slot on top in all four axes, which share their limits.
    bars[0].invert_yaxis()
    panels = below.subplots(-(-len(tensors) // 2), 2, squeeze=False).ravel()
    for axes, name in zip(panels, tensors, strict=False):
        rows = np.stack([np.ravel(report.tensors[name].importance) for report in reports])
        image = axes.imshow(np.log10(rows + 1e-12), aspect="auto", interpolation="nearest")
        axes.set(title=f"log10 importance, {name}", xlabel="weight index", ylabel="slot")
        below.colorbar(image, ax=axes)
    for axes in panels[len(tensors) :]:
        axes.set_visible(False)
    write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=130))
