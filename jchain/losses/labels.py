"""Labels of tokens that carry more than the next token."""

from typing import Any, NamedTuple

from jchain._typing import Array, Float, Int


class TokenLabels(NamedTuple):
    """The labels of tokens, with weights or with the output of a parent model.

    The losses of `jc.hub` take these in place of an array of labels.

    Attributes:
      labels: the next tokens, `[*B, T]`; tokens with negative labels are ignored.
      weights: how much each token counts, `[*B, T]`, at least 0; None if all count the same. Tokens
        of weight 0 are ignored.
      parent: what `jc.hub.add_parent` computed; None if there is no parent.
    """

    labels: Int[Array, "*B T"]
    weights: Float[Array, "*B T"] | None = None
    parent: Any = None
