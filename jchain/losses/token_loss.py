"""What a loss must offer so that it can be computed without keeping the outputs of the head."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar, runtime_checkable

import numpy as np
import optax

from jchain._typing import Array, Bool, Float, PyTree
from jchain.losses.softmax import CrossEntropy

F = TypeVar("F", bound=Callable[..., Any])


@runtime_checkable
class TokenLoss(Protocol):
    """A loss, or an accuracy, that reads the logits of each token in parts of the vocabulary.

    The methods are pure, and instances are hashable. An instance belongs to a function `(outputs,
    y)`, which must compute the same (see `computed_by`).
    """

    def read_labels(self, y: PyTree) -> tuple[PyTree, Bool[Array, "*B"] | None]:
        """Return what `start`, `add`, and `finish` need to know about each token.

        Args:
          y: the labels of a split, with arrays `[*B, ...]`.

        Returns:
          The targets, arrays `[*B, ...]` with one row per token, which are not differentiated; and
          a mask of the tokens whose value is read, `[*B]`, or None for all of them. The head is
          not applied to the other tokens, and their value is 0.
        """
        ...

    def start(self, targets: PyTree, dtype: np.dtype) -> PyTree:
        """Return the carry of n tokens before the first part: floats, in arrays `[n, ...]`.

        Args:
          targets: the targets of the tokens, arrays `[n, ...]`.
          dtype: the dtype of the logits, float32 or wider.
        """
        ...

    def add(
        self, carry: PyTree, logits: Float[Array, "n V"], first: Array | int, targets: PyTree
    ) -> PyTree:
        """Return the carry after one more part of the vocabulary.

        Args:
          carry: the carry after the parts before this one.
          logits: the logits of this part.
          first: the index of its first logit in the vocabulary.
          targets: the targets of the tokens.
        """
        ...

    def finish(self, carry: PyTree, targets: PyTree) -> Float[Array, "n ..."]:
        """Return the value of each token, one number or several.

        Args:
          carry: the carry after all parts.
          targets: the targets of the tokens.
        """
        ...

    def reduce(self, values: Float[Array, "..."], y: PyTree) -> Float[Array, "b ..."]:
        """Return what the function returns, whose mean is the loss: `[B, ...]`, B examples.

        Args:
          values: the value of each token.
          y: the labels.
        """
        ...


def computed_by(token_loss: TokenLoss) -> Callable[[F], F]:
    """Return a decorator for a function `(outputs, y)` that a `TokenLoss` computes as well.

    The function becomes the loss of a problem as any other function does. If the head ends in a
    large linear map, jchain uses the `TokenLoss` in its place.

    Args:
      token_loss: what computes the same.
    """

    def decorate(function: F) -> F:
        function.token_loss = token_loss  # pyright: ignore[reportFunctionMemberAccess]
        return function

    return decorate


def find_token_loss(function: Callable[..., Any]) -> TokenLoss | None:
    """Return the `TokenLoss` that computes the same as a function of outputs and labels.

    Args:
      function: a loss or an accuracy.

    Returns:
      The `TokenLoss`, or None if there is none.
    """
    if function is optax.softmax_cross_entropy_with_integer_labels:
        return CrossEntropy()
    return getattr(function, "token_loss", None)


class ReadTokens(NamedTuple):
    """How many tokens of a split a loss reads, at most.

    The numbers are part of compiled programs, so they are rounded up to one of few.

    Attributes:
      total: of all examples.
      most: of one example.
    """

    total: int
    most: int

    def of_examples(self, num: int, *, may_repeat: bool) -> "ReadTokens":
        """Return the numbers for some of the examples.

        Args:
          num: the number of examples.
          may_repeat: whether an example may be among them more than once.
        """
        total = num * self.most
        return ReadTokens(total if may_repeat else min(self.total, total), self.most)


def count_tokens(losses: Sequence[TokenLoss], parts: Iterable[PyTree]) -> ReadTokens | None:
    """Count the tokens whose value some loss reads.

    Args:
      losses: the losses.
      parts: the labels of a split, in one or more parts, which are not traced.

    Returns:
      The numbers of tokens, or None if all are read.
    """
    counts, is_all = [], True
    for y in parts:
        masks = [loss.read_labels(y)[1] for loss in losses]
        found = [np.asarray(mask) for mask in masks if mask is not None]
        if len(found) < len(masks):
            return None
        is_read = np.logical_or.reduce(found)
        is_all = is_all and bool(is_read.all())
        counts.append(is_read.reshape(is_read.shape[0], -1).sum(axis=1))
    each = np.concatenate(counts)
    return None if is_all else ReadTokens(_round_up(int(each.sum())), _round_up(int(each.max())))


def _round_up(number: int) -> int:
    """Round up to a multiple of an eighth of the next lower power of two."""
    step = max(1, (1 << max(number.bit_length() - 1, 0)) // 8)
    return max(1, -(-number // step) * step)
