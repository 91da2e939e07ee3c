"""Heat maps over the slots of a chain and the entries of a bank."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from jchain._typing import Array, Float
from jchain.arguments import checked
from jchain.bank import Bank
from jchain.chain import ChainsLike
from jchain.plot.axes import get_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@checked
def swap_scores(
    bank: Bank,
    chain: ChainsLike,
    scores: Float[Array, "L N"] | Float[np.ndarray, "L N"],
    *,
    ax: "Axes | None" = None,
) -> "Axes":
    """Draw the predicted change of the loss if the layer at a slot is swapped for another one.

    Blue lowers the loss. The layers of the chain are marked.

    Args:
      bank: the bank, which names the layers.
      chain: the tokens of the chain, `[L]`.
      scores: what `jchain.swap_scores` returned for the chain, `[L, N]`. Rows without a layer are
        left out.
      ax: the axes to draw on; None for a new figure.

    Raises:
      ValueError: if the scores have another shape.
    """
    tokens = bank.validate(np.asarray(chain))
    values, num_layers = np.asarray(scores, np.float64), bank.num_layers
    if values.shape != (len(tokens), num_layers):
        raise ValueError(
            f"expected scores of shape [{len(tokens)}, {num_layers}], got {list(values.shape)}"
        )
    layers = tokens[(tokens >= 0) & (tokens < num_layers)]
    values = np.where(np.isfinite(values), values, np.nan)[: len(layers)]
    ax = get_axes(ax, (2.0 + 0.3 * num_layers, 1.5 + 0.35 * len(layers)))
    limit = np.nanmax(np.abs(values), initial=1e-12)
    image = ax.imshow(values, cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto")
    ax.scatter(layers, np.arange(len(layers)), marker="s", facecolors="none", edgecolors="black")
    _set_layers(ax, bank, len(layers))
    ax.figure.colorbar(image, ax=ax, label="predicted change of the loss")
    return ax


@checked
def policy(
    bank: Bank,
    probabilities: Float[Array, "L E"] | Float[np.ndarray, "L E"],
    *,
    ax: "Axes | None" = None,
) -> "Axes":
    """Draw the probability of each layer and head at each slot.

    Args:
      bank: the bank, which names the layers and heads.
      probabilities: a row per slot, `[L, N + K]`; for the actor-critic, `jnp.exp` of
        `search.policy(result.state, problem, chain[None])[0]`, of a result of
        `jc.run(..., keep_state=True)`.
      ax: the axes to draw on; None for a new figure.

    Raises:
      ValueError: if the probabilities have another shape.
    """
    values = np.asarray(probabilities, np.float64)
    num_entries = bank.num_layers + bank.num_heads
    if values.ndim != 2 or values.shape[1] != num_entries:
        raise ValueError(
            f"expected probabilities of shape [L, {num_entries}], got {list(values.shape)}"
        )
    ax = get_axes(ax, (2.0 + 0.3 * num_entries, 1.5 + 0.35 * len(values)))
    image = ax.imshow(values, cmap="viridis", vmin=0.0, vmax=1.0, aspect="auto")
    _set_layers(ax, bank, len(values), num_entries)
    ax.figure.colorbar(image, ax=ax, label="probability")
    return ax


@checked
def block_runs(
    changes: Float[Array, "D D"] | Float[np.ndarray, "D D"],
    *,
    labels: Sequence[str] | None = None,
    ax: "Axes | None" = None,
) -> "Axes":
    """Draw the change of the loss if one run of consecutive blocks of a model is changed.

    Blue lowers the loss.

    Args:
      changes: the change of the loss if blocks `i` to `j` are changed, `[D, D]`; nan where `j < i`.
        For example, `losses.repeated - losses.loss` of `jchain.hub.recipes.score_runs`.
      labels: the name of each block; their numbers from 0 by default.
      ax: the axes to draw on; None for a new figure.

    Raises:
      ValueError: if the changes are not a square matrix, or there is not one label per block.
    """
    values = np.asarray(changes, np.float64)
    if values.ndim != 2 or values.shape[0] != values.shape[1]:
        raise ValueError(f"expected changes of shape [D, D], got {list(values.shape)}")
    labels = [str(i) for i in range(len(values))] if labels is None else labels
    if len(labels) != len(values):
        raise ValueError(f"expected one label for each of {len(values)} blocks, got {len(labels)}")
    values = np.where(np.isfinite(values), values, np.nan)
    size = 2.5 + 0.25 * len(values)
    ax = get_axes(ax, (size + 1.5, size))
    limit = np.nanmax(np.abs(values), initial=1e-12)
    image = ax.imshow(values, cmap="RdBu_r", vmin=-limit, vmax=limit)
    ax.set_xticks(range(len(labels)), labels, rotation=90, fontsize=8)
    ax.set_yticks(range(len(labels)), labels, fontsize=8)
    ax.set(xlabel="last block", ylabel="first block")
    ax.figure.colorbar(image, ax=ax, label="change of the loss")
    return ax


def _set_layers(ax: "Axes", bank: Bank, num_slots: int, num_entries: int | None = None) -> None:
    """Name the columns after layers, and number the slots from 1."""
    names = bank.names[: bank.num_layers if num_entries is None else num_entries]
    ax.set_xticks(range(len(names)), names, rotation=90, fontsize=8)
    ax.set_yticks(range(num_slots), [str(slot) for slot in range(1, num_slots + 1)])
    ax.set_ylabel("slot")
