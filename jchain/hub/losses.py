"""Losses and accuracies of next tokens and of answers to multiple-choice questions."""

import jax.numpy as jnp
import optax

from jchain._typing import Array, Float, Int
from jchain.arguments import checked
from jchain.hub.padding import find_text


@checked
def next_token_loss(outputs: Float[Array, "*B T V"], y: Int[Array, "*B T"]) -> Float[Array, "*B"]:
    """Compute the cross-entropy of the next token in nats, averaged over the tokens of a sequence.

    Args:
      outputs: logits of the next token.
      y: the next tokens; negative labels are ignored.

    Returns:
      The loss of each sequence; 0 if all labels of a sequence are ignored.
    """
    is_counted = y >= 0
    losses = optax.softmax_cross_entropy_with_integer_labels(outputs, jnp.maximum(y, 0))
    return jnp.sum(jnp.where(is_counted, losses, 0.0), axis=-1) / jnp.maximum(
        jnp.sum(is_counted, axis=-1), 1
    )


@checked
def next_token_accuracy(
    outputs: Float[Array, "*B T V"], y: Int[Array, "*B T"]
) -> Float[Array, "*B"]:
    """Compute the share of next tokens in each sequence that have the largest logit.

    Args:
      outputs: logits of the next token.
      y: the next tokens; negative labels are ignored.

    Returns:
      The accuracy of each sequence; 0 if all labels of a sequence are ignored.
    """
    is_counted = y >= 0
    is_correct = is_counted & (jnp.argmax(outputs, axis=-1) == y)
    return jnp.sum(is_correct, axis=-1) / jnp.maximum(jnp.sum(is_counted, axis=-1), 1)


@checked
def choice_loss(outputs: Float[Array, "B C T V"], y: Int[Array, "B C T"]) -> Float[Array, "B"]:
    """Compute the cross-entropy of the correct choice, in nats.

    The logit of a choice is the mean log-likelihood of its tokens. A choice without labels pads a
    question that has fewer choices than others, and does not count.

    Args:
      outputs: logits of the next token, with the correct choice first.
      y: the next tokens that are part of the choice; all other labels are negative.

    Returns:
      The loss of each question; 0 if it has no labels.
    """
    first = jnp.zeros(y.shape[:1], jnp.int32)
    return optax.softmax_cross_entropy_with_integer_labels(-_score_choices(outputs, y), first)


@checked
def choice_accuracy(outputs: Float[Array, "B C T V"], y: Int[Array, "B C T"]) -> Float[Array, "B"]:
    """Compute whether the correct choice has the highest mean log-likelihood of its tokens.

    A choice without labels does not count, as in `choice_loss`.

    Args:
      outputs: logits of the next token, with the correct choice first.
      y: the next tokens that are part of the choice; all other labels are negative.

    Returns:
      1 or 0 for each question; 0 if another choice has the same mean log-likelihood.
    """
    losses = _score_choices(outputs, y)
    others = jnp.min(losses[:, 1:], axis=1, initial=jnp.inf)
    return (losses[:, 0] < others).astype(jnp.float32)


def _score_choices(outputs: Float[Array, "B C T V"], y: Int[Array, "B C T"]) -> Float[Array, "B C"]:
    """Compute the loss of the tokens of each choice; infinite for the choices that are padding."""
    is_choice = find_text(y)[..., 0].at[:, 0].set(True)
    return jnp.where(is_choice, next_token_loss(outputs, y), jnp.inf)
