"""Padding at the end of rows of tokens."""

import jax.numpy as jnp

from jchain._typing import Array, Bool, Int


def find_text(y: Int[Array, "*B T"]) -> Bool[Array, "*B T"]:
    """Find the tokens of the text in rows that are padded at the end.

    The last token of a text has a label, so what follows the last label of a row is padding. The
    tokens of a question have no labels, but are followed by those of the choice.

    Args:
      y: the next tokens; negative labels are ignored by the loss.
    """
    return jnp.cumulative_sum((y >= 0)[..., ::-1], axis=-1)[..., ::-1] > 0
