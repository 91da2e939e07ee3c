"""Losses and accuracies of the next token, of multiple choice, and weighted sums of losses.

Each reads the logits in parts, so that jchain never keeps the logits of a large vocabulary, and
applies the head only to the tokens that count (`jchain.losses`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax

from jchain._typing import Array, Bool, Float, Int, PyTree
from jchain.arguments import check_functions, check_numbers, checked
from jchain.losses import (
    CrossEntropy,
    IsLargest,
    TokenLabels,
    TokenLoss,
    computed_by,
    find_token_loss,
)


def read_token_labels(y: Int[Array, "*B T"] | TokenLabels) -> TokenLabels:
    """Return labels with weights and a parent, or without them.

    Args:
      y: the labels.
    """
    return y if isinstance(y, TokenLabels) else TokenLabels(y)


def find_counted(y: Int[Array, "*B T"] | TokenLabels) -> Bool[Array, "*B T"]:
    """Return the mask of the tokens that count.

    Args:
      y: the labels. Tokens with a negative label or the weight 0 do not count.
    """
    given = read_token_labels(y)
    is_counted = given.labels >= 0
    return is_counted if given.weights is None else is_counted & (given.weights > 0)


def average_tokens(
    values: Float[Array, "*B T"], y: Int[Array, "*B T"] | TokenLabels
) -> Float[Array, "*B"]:
    """Compute the weighted mean over the tokens of each sequence that count; 0 if none does.

    Args:
      values: the value of each token.
      y: the labels.
    """
    is_counted, weights = find_counted(y), read_token_labels(y).weights
    total = jnp.where(is_counted, values, 0.0)
    if weights is None:
        return jnp.sum(total, axis=-1) / jnp.maximum(jnp.sum(is_counted, axis=-1), 1)
    weights = jnp.where(is_counted, weights, 0.0).astype(values.dtype)
    norm = jnp.sum(weights, axis=-1)
    return jnp.sum(total * weights, axis=-1) / jnp.where(norm > 0, norm, 1.0)


def _read_next_tokens(y: PyTree) -> tuple[Array, Array]:
    """Return the label of each token, 0 if it is ignored, and the mask of those that count."""
    return jnp.maximum(read_token_labels(y).labels, 0), find_counted(y)


class _NextTokenLoss(CrossEntropy):
    """Computes `next_token_loss`."""

    def read_labels(self, y: PyTree) -> tuple[Array, Array]:
        return _read_next_tokens(y)

    def reduce(self, values: Float[Array, "*B T"], y: PyTree) -> Float[Array, "*B"]:
        return average_tokens(values, y)


class _ChoiceLoss(_NextTokenLoss):
    """Computes `choice_loss`."""

    def reduce(self, values: Float[Array, "B C T"], y: PyTree) -> Float[Array, "B"]:
        return _compare_choices(average_tokens(values, y), y)


class _ChoiceAccuracy(_NextTokenLoss):
    """Computes `choice_accuracy`."""

    def reduce(self, values: Float[Array, "B C T"], y: PyTree) -> Float[Array, "B"]:
        return _is_first_best(average_tokens(values, y), y)


class _NextTokenAccuracy(IsLargest):
    """Computes `next_token_accuracy`."""

    def read_labels(self, y: PyTree) -> tuple[Array, Array]:
        return _read_next_tokens(y)

    def reduce(self, values: Float[Array, "*B T"], y: PyTree) -> Float[Array, "*B"]:
        return average_tokens(values, y)


def _cross_entropy(outputs: Array, y: Int[Array, "*B T"] | TokenLabels) -> Float[Array, "*B"]:
    labels, _ = _read_next_tokens(y)
    losses = optax.softmax_cross_entropy_with_integer_labels(outputs, labels)
    return average_tokens(losses, y)


@checked
@computed_by(_NextTokenLoss())
def next_token_loss(
    outputs: Float[Array, "*B T V"], y: Int[Array, "*B T"] | TokenLabels
) -> Float[Array, "*B"]:
    """Compute the cross-entropy of the next token in nats, averaged over the tokens of a sequence.

    Args:
      outputs: logits of the next token.
      y: the next tokens; negative labels are ignored. With `TokenLabels`, the average is weighted.

    Returns:
      The loss of each sequence; 0 if all labels of a sequence are ignored.
    """
    return _cross_entropy(outputs, y)


@checked
@computed_by(_NextTokenAccuracy())
def next_token_accuracy(
    outputs: Float[Array, "*B T V"], y: Int[Array, "*B T"] | TokenLabels
) -> Float[Array, "*B"]:
    """Compute the share of next tokens in each sequence that have the largest logit.

    Args:
      outputs: logits of the next token.
      y: the next tokens; negative labels are ignored. With `TokenLabels`, the share is weighted.

    Returns:
      The accuracy of each sequence; 0 if all labels of a sequence are ignored.
    """
    labels = read_token_labels(y).labels
    is_correct = jnp.argmax(outputs, axis=-1) == labels
    return average_tokens(is_correct.astype(jnp.float32), y)


@checked
@computed_by(_ChoiceLoss())
def choice_loss(
    outputs: Float[Array, "B C T V"], y: Int[Array, "B C T"] | TokenLabels
) -> Float[Array, "B"]:
    """Compute the cross-entropy of the correct choice, in nats.

    The logit of a choice is the mean log-likelihood of its tokens. A choice without any is left
    out.

    Args:
      outputs: logits of the next token, with the correct choice first.
      y: the next tokens that are part of the choice; all other labels are negative.

    Returns:
      The loss of each question; 0 if it has no labels.
    """
    return _compare_choices(_cross_entropy(outputs, y), y)


@checked
@computed_by(_ChoiceAccuracy())
def choice_accuracy(
    outputs: Float[Array, "B C T V"], y: Int[Array, "B C T"] | TokenLabels
) -> Float[Array, "B"]:
    """Compute whether the correct choice has the highest mean log-likelihood of its tokens.

    Args:
      outputs: logits of the next token, with the correct choice first.
      y: the next tokens that are part of the choice; all other labels are negative. A choice
        without any is left out.

    Returns:
      1 or 0 for each question; 0 if another choice has the same mean log-likelihood.
    """
    return _is_first_best(_cross_entropy(outputs, y), y)


def _leave_out_empty(losses: Float[Array, "B C"], y: PyTree) -> Float[Array, "B C"]:
    """Set the loss of a choice without tokens, which is padding, to infinity."""
    is_choice = find_counted(y).any(axis=-1).at[:, 0].set(True)
    return jnp.where(is_choice, losses, jnp.inf)


def _compare_choices(losses: Float[Array, "B C"], y: PyTree) -> Float[Array, "B"]:
    first = jnp.zeros(losses.shape[:1], jnp.int32)
    logits = -_leave_out_empty(losses, y)
    return optax.softmax_cross_entropy_with_integer_labels(logits, first)


def _is_first_best(losses: Float[Array, "B C"], y: PyTree) -> Float[Array, "B"]:
    losses = _leave_out_empty(losses, y)
    others = jnp.min(losses[:, 1:], axis=1, initial=jnp.inf)
    return (losses[:, 0] < others).astype(jnp.float32)


@dataclass(frozen=True)
class _MixedTokens:
    """Computes a `MixedLoss` whose parts can all be computed by a `TokenLoss`."""

    losses: tuple[TokenLoss, ...]
    weights: tuple[float, ...]

    def read_labels(self, y: PyTree) -> tuple[tuple[PyTree, ...], Array | None]:
        read = [loss.read_labels(y) for loss in self.losses]
        masks = [mask for _, mask in read if mask is not None]
        is_read = None
        if len(masks) == len(read):
            is_read = jnp.stack(masks).any(axis=0)
        return tuple(targets for targets, _ in read), is_read

    def start(self, targets: PyTree, dtype: np.dtype) -> tuple[PyTree, ...]:
        pairs = zip(self.losses, targets, strict=True)
        return tuple(loss.start(own, dtype) for loss, own in pairs)

    def add(self, carry: PyTree, logits: Array, first: Array | int, targets: PyTree) -> PyTree:
        rows = zip(self.losses, carry, targets, strict=True)
        return tuple(loss.add(state, logits, first, own) for loss, state, own in rows)

    def finish(self, carry: PyTree, targets: PyTree) -> Float[Array, "n M"]:
        rows = zip(self.losses, carry, targets, strict=True)
        return jnp.stack([loss.finish(state, own) for loss, state, own in rows], axis=-1)

    def reduce(self, values: Float[Array, "*B M"], y: PyTree) -> Float[Array, "B"]:
        parts = [loss.reduce(values[..., i], y) for i, loss in enumerate(self.losses)]
        return _add_weighted(parts, self.weights)


@dataclass(frozen=True)
class MixedLoss:
    """A weighted sum of losses, each averaged over everything but the examples.

    Attributes:
      losses: functions `(outputs, y) -> [B, ...]`.
      weights: the weight of each.
    """

    losses: tuple[Callable[[Array, Any], Array], ...]
    weights: tuple[float, ...]

    def __call__(self, outputs: Float[Array, "B ..."], y: PyTree) -> Float[Array, "B"]:
        """Compute the weighted sum of the losses of each example.

        Args:
          outputs: the outputs of the head.
          y: the labels, which each loss must take.
        """
        return _add_weighted([loss(outputs, y) for loss in self.losses], self.weights)

    @property
    def token_loss(self) -> TokenLoss | None:
        """What computes this without keeping the outputs, or None if a loss needs them."""
        found = [find_token_loss(loss) for loss in self.losses]
        known = tuple(loss for loss in found if loss is not None)
        return _MixedTokens(known, self.weights) if len(known) == len(found) else None


def _add_weighted(parts: list[Array], weights: tuple[float, ...]) -> Float[Array, "B"]:
    means = [part.reshape(part.shape[0], -1).mean(axis=1) for part in parts]
    return sum((weight * mean for weight, mean in zip(weights, means, strict=True)), jnp.zeros(()))


@checked
def mixed_loss(parts: Sequence[tuple[Callable[[Any, Any], Any], float]]) -> MixedLoss:
    """Make a weighted sum of losses, such as `kl_to_parent` and `next_token_loss`.

    Args:
      parts: pairs of a loss and its weight.

    Returns:
      The loss, for `jchain.Problem(loss_fn=)`.

    Raises:
      ValueError: if there is no loss, or a weight is not a finite number.
    """
    if not parts:
        raise ValueError("expected at least one loss with its weight, got none")
    for i, (loss, weight) in enumerate(parts):
        check_functions(**{f"loss {i}": loss})
        check_numbers(is_finite=True, **{f"weight {i}": weight})
    losses, weights = zip(*parts, strict=True)
    return MixedLoss(tuple(losses), tuple(float(weight) for weight in weights))
