"""Pure functions as modules."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from jchain._typing import PyTree


@dataclass(frozen=True)
class FunctionModule:
    """A pure function `apply_fn(params, x)` as a module.

    Two of these are equal if their functions are the same object.

    Attributes:
      apply_fn: the function, which maps any pytree of params and a batch to a batch.
    """

    apply_fn: Callable[[PyTree, PyTree], PyTree]

    def apply(self, variables: Mapping[str, PyTree], x: PyTree) -> PyTree:
        """Apply the function.

        Args:
          variables: a dict whose only collection is `params`.
          x: the activations of a batch, `[B, ...F]`, or a pytree of such arrays.
        """
        return self.apply_fn(variables["params"], x)
