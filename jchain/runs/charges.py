"""Totals of layer calls, some of which are on a part of the examples only.

A total is a whole number of layer calls, which int32 holds exactly, and a rest of fewer examples
than the split has. So a sum of millions of steps has no rounding error, as float32 would have.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jchain._typing import Array, Bool, Float, Int

# The largest whole number of layer calls of a step, a float32 that int32 holds with room for one.
_MAX_CALLS = 2**31 - 2**8


class Rest(NamedTuple):
    """What a total has beyond its whole layer calls: one layer on some of the examples."""

    examples: Int[Array, "*S"]  # from 0 to num_examples - 1
    num_examples: Int[Array, "*S"]


class Charge(NamedTuple):
    """What a step adds to the total of its run."""

    layer_calls: Int[Array, ""]  # whole layer calls to add
    rest: Rest | None  # of the total after the step; None if the search charges whole layer calls
    cost: Int[Array, ""]  # of the step, rounded up to whole layer calls

    def fits(self, budget: Int[ArrayLike, ""]) -> Bool[Array, ""]:
        """Return whether the charge is at most what is left of a budget.

        Args:
          budget: the budget minus the whole layer calls of the total before the step.
        """
        more = 0 if self.rest is None else (self.rest.examples > 0).astype(jnp.int32)
        # Compared with what is left, because the sum of the calls could overflow int32.
        return self.layer_calls + more <= budget


def charge_step(calls: Int[Array, ""] | Float[Array, ""], rest: Rest | None) -> Charge:
    """Add the cost of a step to the rest of a total.

    Args:
      calls: the layer calls of the step, in layer calls on the whole split. A float is rounded to
        whole examples.
      rest: the rest before the step; None if the search charges whole layer calls.
    """
    if rest is None:
        whole = calls.astype(jnp.int32)
        return Charge(whole, None, whole)
    whole = jnp.minimum(jnp.floor(calls), _MAX_CALLS)
    added = jnp.round((calls - whole) * rest.num_examples).astype(jnp.int32)
    whole, examples = whole.astype(jnp.int32), rest.examples + added
    after = Rest(examples % rest.num_examples, rest.num_examples)
    cost = whole + (added > 0)
    return Charge(whole + examples // rest.num_examples, after, cost)


def total_calls(
    layer_calls: Int[np.ndarray, "*S"],
    examples: Int[np.ndarray, "*S"],
    num_examples: Int[np.ndarray, "..."],
) -> Float[np.ndarray, "*S"]:
    """Return totals as float64.

    Args:
      layer_calls: the whole layer calls.
      examples: the examples of the rest.
      num_examples: the number of examples of the split, with leading axes of size 1 or those of the
        totals.
    """
    # NumPy's sum of two arrays without axes is not an array.
    return np.asarray(layer_calls.astype(np.float64) + examples / num_examples)
