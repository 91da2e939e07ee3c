"""Checks of examples and labels before anything is computed."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jchain._typing import PyTree
from jchain.losses.labels import TokenLabels
from jchain.losses.token_loss import find_token_loss


def check_split(loss_fn: Callable[..., Any], x: PyTree, y: PyTree, num_classes: int) -> None:
    """Check that examples are finite, and that labels are among the classes of the head.

    Args:
      loss_fn: the loss. Labels are classes if it is the default one, or a loss of tokens, which
        ignores negative labels.
      x: the examples.
      y: the labels.
      num_classes: the number of outputs of the head for each label.

    Raises:
      ValueError: if an example is nan or infinite, or a label is out of range.
    """
    for leaf in jax.tree.leaves(x):
        if jnp.issubdtype(leaf.dtype, jnp.floating) and not jnp.isfinite(leaf).all():
            raise ValueError("expected finite examples, got nan or infinity")
    labels = y.labels if isinstance(y, TokenLabels) else y
    is_classes = loss_fn is optax.softmax_cross_entropy_with_integer_labels
    dtype = getattr(labels, "dtype", None)
    if dtype is None or not jnp.issubdtype(dtype, jnp.integer) or not find_token_loss(loss_fn):
        return
    low, high = int(labels.min()), int(labels.max())
    if (is_classes and low < 0) or high >= num_classes:
        hint = "; jc.hub.load_choices needs loss_fn=jc.hub.choice_loss"
        raise ValueError(
            f"expected labels in 0..{num_classes - 1}, the head's classes, got {low}..{high}"
            f"{hint if is_classes and low < 0 else ''}"
        )
