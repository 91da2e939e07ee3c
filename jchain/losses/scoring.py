"""Mean loss and accuracy, from the outputs of a head or from the input of its last step."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jchain._typing import Array, Float, PyTree
from jchain.losses.folding import PartSizes, mask_values, score_tokens
from jchain.losses.softmax import IsLargest
from jchain.losses.token_loss import TokenLoss, find_token_loss
from jchain.modules.output_map import OutputMap
from jchain.pytree import upcast


def score_outputs(
    loss_fn: Callable[..., Any],
    accuracy_fn: Callable[..., Any] | None,
    outputs: Float[Array, "B ..."],
    y: PyTree,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Compute the loss and the accuracy of outputs.

    Args:
      loss_fn: function `(outputs, y) -> [B, ...]` whose mean is the loss.
      accuracy_fn: such a function, whose mean is the accuracy; None for the default of
        `jchain.Problem`.
      outputs: the outputs of a head.
      y: the labels.
    """
    outputs = upcast(outputs)
    loss = jnp.mean(loss_fn(outputs, y).astype(outputs.dtype))
    if accuracy_fn is not None:
        return loss, jnp.mean(accuracy_fn(outputs, y), dtype=loss.dtype)
    if not has_default_accuracy(y, outputs.shape):
        return loss, jnp.full_like(loss, jnp.nan)
    return loss, jnp.mean(jnp.argmax(outputs, axis=-1) == y, dtype=loss.dtype)


def has_default_accuracy(y: PyTree, shape: tuple[int, ...]) -> bool:
    """Return whether labels are integers, one per row of outputs.

    Args:
      y: the labels.
      shape: the shape of the outputs.
    """
    dtype = getattr(y, "dtype", None)
    return dtype is not None and jnp.issubdtype(dtype, jnp.integer) and y.shape == shape[:-1]


def find_token_losses(
    loss_fn: Callable[..., Any],
    accuracy_fn: Callable[..., Any] | None,
    y: PyTree,
    shape: tuple[int, ...],
) -> tuple[TokenLoss, ...] | None:
    """Return what computes the loss and, if there is one, the accuracy of each token.

    Args:
      loss_fn: as for `score_outputs`.
      accuracy_fn: as for `score_outputs`.
      y: the labels.
      shape: the shape of the outputs.

    Returns:
      One or two of them; None if a function needs all outputs at once.
    """
    found = [find_token_loss(loss_fn)]
    if accuracy_fn is not None:
        found.append(find_token_loss(accuracy_fn))
    elif has_default_accuracy(y, shape):
        found.append(IsLargest())
    return None if None in found else tuple(loss for loss in found if loss is not None)


def score_output_map(
    losses: tuple[TokenLoss, ...],
    output: OutputMap,
    y: PyTree,
    sizes: PartSizes,
    most_read: int | None,
) -> tuple[Float[Array, "b ..."], ...]:
    """Compute what each loss function returns, `[B, ...]`, without keeping the outputs.

    Args:
      losses: the losses.
      output: the last step of a head, with features `[*B, F]`.
      y: the labels.
      sizes: the size of a part of the outputs.
      most_read: the largest number of tokens that a loss reads in all; the others are left out.
        None to compute all.
    """
    shape = output.features.shape[:-1]
    num = output.features.size // output.features.shape[-1]
    read = [loss.read_labels(y) for loss in losses]
    targets, masks = [own for own, _ in read], [mask for _, mask in read]
    flat, rows = _flatten((output.features, tuple(targets)), len(shape)), None
    if most_read is not None and most_read < num and None not in masks:
        is_read = jnp.stack([jnp.asarray(mask).reshape(-1) for mask in masks]).any(axis=0)
        rows = jnp.nonzero(is_read, size=max(1, most_read), fill_value=num)[0]
        flat = jax.tree.map(lambda leaf: leaf[jnp.minimum(rows, num - 1)], flat)
    values = score_tokens(losses, output._replace(features=flat[0]), flat[1], sizes)
    if rows is not None:
        values = [
            jnp.zeros((num, *own.shape[1:]), own.dtype).at[rows].set(own, mode="drop")
            for own in values
        ]
    return tuple(
        loss.reduce(mask_values(own.reshape(*shape, *own.shape[1:]), mask), y)
        for loss, own, mask in zip(losses, values, masks, strict=True)
    )


def _flatten(tree: PyTree, num_axes: int) -> PyTree:
    """Join the leading axes of each array."""
    return jax.tree.map(lambda leaf: jnp.asarray(leaf).reshape(-1, *leaf.shape[num_axes:]), tree)
