"""The cross-entropy of a softmax, and whether the label has the largest logit, by parts."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jchain._typing import Array, Float, Int, PyTree


class LogSumExp(NamedTuple):
    """A running `log(sum(exp(logits)))`: the largest logit so far, and the sum relative to it.

    This is the online softmax of Milakov and Gimelshein (2018, arXiv:1805.02867).
    """

    largest: Float[Array, "n"]
    total: Float[Array, "n"]

    @staticmethod
    def start(num: int, dtype: np.dtype) -> "LogSumExp":
        """Return the sum of no logits.

        Args:
          num: the number of tokens.
          dtype: the dtype of the logits.
        """
        return LogSumExp(jnp.full(num, -jnp.inf, dtype), jnp.zeros(num, dtype))

    def add(self, logits: Float[Array, "n V"]) -> "LogSumExp":
        """Add more logits.

        Args:
          logits: the logits of each token.
        """
        # The result does not depend on the reference point, so no gradient passes through it.
        before = jax.lax.stop_gradient(self.largest)
        largest = jnp.maximum(before, jax.lax.stop_gradient(logits).max(axis=1))
        shift = jnp.where(jnp.isfinite(largest), largest, 0)  # inf - inf would be nan
        total = self.total * jnp.exp(before - shift)
        return LogSumExp(largest, total + jnp.exp(logits - shift[:, None]).sum(axis=1))

    def finish(self) -> Float[Array, "n"]:
        """Return the log of the sum."""
        largest = jax.lax.stop_gradient(self.largest)
        return jnp.log(self.total) + jnp.where(jnp.isfinite(largest), largest, 0)


def pick_logit(
    own: Float[Array, "n"], logits: Float[Array, "n V"], first: Array | int, label: Int[Array, "n"]
) -> Float[Array, "n"]:
    """Return the logit of each label if it is in this part, and what was found before otherwise.

    Args:
      own: what was found before; nan if nothing was.
      logits: the logits of this part.
      first: the index of its first logit.
      label: the index of the logit to pick.
    """
    place = label - first
    is_inside = (place >= 0) & (place < logits.shape[1])
    return jnp.where(is_inside, _take_one(logits, jnp.where(is_inside, place, 0)), own)


@jax.custom_jvp
def _take_one(logits: Float[Array, "n V"], place: Int[Array, "n"]) -> Float[Array, "n"]:
    """Take one logit of each token."""
    return jnp.take_along_axis(logits, place[:, None], axis=1, mode="promise_in_bounds")[:, 0]


@_take_one.defjvp
def _(
    primals: tuple[Array, Array], tangents: tuple[Array, Array]
) -> tuple[Float[Array, "n"], Float[Array, "n"]]:
    logits, place = primals
    # Its transpose is a comparison, which XLA fuses, and not a scatter into zeros.
    is_own = jnp.arange(logits.shape[1])[None] == place[:, None]
    return _take_one(logits, place), jnp.where(is_own, tangents[0], 0).sum(axis=1)


def _take(logits: Float[Array, "n V"], place: Int[Array, "n k"]) -> tuple[Array, Array]:
    """Return whether places are in a part, and the logits there."""
    is_inside = (place >= 0) & (place < logits.shape[1])
    return is_inside, jnp.take_along_axis(
        logits, jnp.where(is_inside, place, 0), axis=1, mode="promise_in_bounds"
    )


def pick_logits(
    own: Float[Array, "n k"],
    logits: Float[Array, "n V"],
    first: Array | int,
    indices: Int[Array, "n k"],
) -> Float[Array, "n k"]:
    """Return the logits at several indices, as `pick_logit` does at one.

    Args:
      own: what was found before.
      logits: the logits of this part.
      first: the index of its first logit.
      indices: the indices of the logits to pick.
    """
    return jnp.where(*_take(logits, indices - first), own)


class CrossEntropy:
    """The softmax cross-entropy of each token with its label, in nats.

    It computes `optax.softmax_cross_entropy_with_integer_labels`. A label out of range has a loss
    of nan.
    """

    def read_labels(self, y: PyTree) -> tuple[PyTree, Array | None]:
        """Return the label of each token; all tokens are read."""
        return y, None

    def start(self, targets: PyTree, dtype: np.dtype) -> tuple[LogSumExp, Array]:
        """Return the carry before the first part: the sum, and the label's logit once found."""
        num = targets.shape[0]
        return LogSumExp.start(num, dtype), jnp.full(num, jnp.nan, dtype)

    def add(
        self, carry: tuple[LogSumExp, Array], logits: Array, first: Array | int, targets: PyTree
    ) -> tuple[LogSumExp, Array]:
        """Add the logits of a part."""
        total, own = carry
        return total.add(logits), pick_logit(own, logits, first, targets)

    def finish(self, carry: tuple[LogSumExp, Array], targets: PyTree) -> Float[Array, "n"]:
        """Return the cross-entropy of each token."""
        del targets
        total, own = carry
        return total.finish() - own

    def reduce(self, values: Float[Array, "*B"], y: PyTree) -> Float[Array, "*B"]:
        """Return the values themselves."""
        del y
        return values


class IsLargest:
    """Whether the label of each token has the largest logit: 1 or 0.

    Of several largest logits the first one counts, as for `jnp.argmax`. If a logit is nan, so is
    the loss, and this value does not matter.
    """

    def read_labels(self, y: PyTree) -> tuple[PyTree, Array | None]:
        """Return the label of each token; all tokens are read."""
        return y, None

    def start(self, targets: PyTree, dtype: np.dtype) -> tuple[Array, Array, Array]:
        """Return the carry before the first part: three logits that are not found yet."""
        none = jnp.full(targets.shape[0], -jnp.inf, dtype)
        return jnp.full_like(none, jnp.nan), none, none

    def add(
        self, carry: tuple[Array, Array, Array], logits: Array, first: Array | int, targets: PyTree
    ) -> tuple[Array, Array, Array]:
        """Update the label's logit, the largest logit, and the largest before the label."""
        own, largest, before = carry
        logits = jax.lax.stop_gradient(logits)
        index = first + jnp.arange(logits.shape[1])[None]
        earlier = jnp.where(index < targets[:, None], logits, -jnp.inf)
        return (
            pick_logit(own, logits, first, targets),
            jnp.maximum(largest, logits.max(axis=1)),
            jnp.maximum(before, earlier.max(axis=1)),
        )

    def finish(self, carry: tuple[Array, Array, Array], targets: PyTree) -> Float[Array, "n"]:
        """Return 1 or 0 for each token."""
        own, largest, before = carry
        is_first = (targets == 0) | (before < own)
        return ((own == largest) & is_first).astype(own.dtype)

    def reduce(self, values: Float[Array, "*B"], y: PyTree) -> Float[Array, "*B"]:
        """Return the values themselves."""
        del y
        return values
