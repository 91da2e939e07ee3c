"""Drawings of chains: which layer is at which slot, and where it comes from."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import jax
import numpy as np

from jchain.arguments import checked
from jchain.bank import Bank
from jchain.chain import ChainsLike, pad
from jchain.plot.axes import get_axes
from jchain.pytree import shorten

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@checked
def chains(
    bank: Bank,
    chains: ChainsLike,
    *,
    labels: Sequence[str] | None = None,
    ax: "Axes | None" = None,
) -> "Axes":
    """Draw chains as rows of cells, one per slot, colored by the origin of the layer.

    The origin of `net0/2` is `net0`, and its cell shows `2`. A name without a slash is its own
    origin.

    Args:
      bank: the bank, which names the layers.
      chains: the tokens of one chain, `[L]`, or of several, `[P, L]`, or lists of tokens.
      labels: the name of each row; the numbers of the rows by default.
      ax: the axes to draw on; None for a new figure.

    Raises:
      ValueError: if a row is not a chain of the bank, or there are other than one label per row.
    """
    rows = chains if isinstance(chains, np.ndarray | jax.Array) else _pad(chains)
    rows = np.atleast_2d(bank.validate(rows))
    labels = [str(i) for i in range(len(rows))] if labels is None else list(labels)
    if len(labels) != len(rows):
        raise ValueError(f"expected one label for each of {len(rows)} chains, got {len(labels)}")
    names = [[bank.names[token] for token in row if token >= 0] for row in rows]
    return draw_chains(names, labels, num_slots=rows.shape[1], ax=ax)


def draw_chains(
    names: Sequence[Sequence[str]],
    labels: Sequence[str],
    *,
    num_slots: int | None = None,
    ax: "Axes | None" = None,
) -> "Axes":
    """Draw chains, given by the names of their layers, as `chains` does.

    Args:
      names: for each chain, the names of its layers and its head.
      labels: the name of each row.
      num_slots: number of columns; None for that of the longest chain.
      ax: the axes to draw on; None for a new figure.
    """
    origins = list(dict.fromkeys(_get_origin(name) for row in names for name in row))
    num_slots = max(map(len, names)) if num_slots is None else num_slots
    ax = get_axes(ax, (1.5 + 0.7 * num_slots, 1.0 + 0.4 * len(names)))
    for i, row in enumerate(names):
        for slot, name in enumerate(row):
            color = f"C{origins.index(_get_origin(name)) % 10}"
            ax.barh(i, 0.9, left=slot + 0.55, height=0.8, color=color, alpha=0.5)
            cell = name.rpartition("/")[2]
            # A cell holds about eight letters of the usual size.
            size = 8 * min(1.0, 8 / len(cell))
            ax.text(slot + 1, i, cell, ha="center", va="center", fontsize=size)
    for i, origin in enumerate(origins):
        ax.bar(0, 0, color=f"C{i % 10}", alpha=0.5, label=origin)
    ax.set(
        xlim=(0.5, num_slots + 0.5),
        xticks=range(1, num_slots + 1),
        yticks=range(len(names)),
        yticklabels=labels,
        xlabel="slot",
    )
    ax.invert_yaxis()
    ax.legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize=8)
    return ax


def _pad(chains: ChainsLike) -> np.ndarray:
    """Pad one list of tokens, or several."""
    if not isinstance(chains, Sequence) and np.ndim(chains) == 0:
        raise ValueError(f"expected chains as lists of tokens, got {shorten(chains)}")
    is_one = all(np.ndim(item) == 0 for item in chains)  # pyright: ignore
    return pad([chains] if is_one else chains)  # pyright: ignore


def _get_origin(name: str) -> str:
    return name.rpartition("/")[0] or name
