"""Random splits of sequences and questions."""

import math
from collections.abc import Sequence

import numpy as np

from jchain._typing import Int
from jchain.data import SHARES, SPLITS

Sizes = Sequence[int] | None
# The maximum number of examples in each split; None for no maximum.
Most = Sequence[int | None] | None


def count_needed(sizes: Sizes, most: Most) -> int | None:
    """Count the examples from which `split_at_random` makes all splits of the wanted sizes.

    Args:
      sizes: number of examples in each split, or None.
      most: maximum number of examples in each split, or None.

    Returns:
      The number of examples; None if all are needed.
    """
    if sizes is not None:
        return sum(sizes)
    if most is None:
        return None
    counts = [
        None if num is None else math.ceil((num + 1) / share)
        for num, share in zip(most, SHARES, strict=True)
    ]
    return None if None in counts else max(num for num in counts if num is not None)


def check_sizes(sizes: Sizes, most: Most) -> None:
    """Check the sizes of splits, before anything is read.

    Args:
      sizes: number of examples in each split, or None.
      most: maximum number of examples in each split, or None.

    Raises:
      ValueError: if there is not one number of at least 1 for each split.
    """
    for name, values in (("sizes", sizes), ("most", most)):
        numbers = [num for num in values or (1,) if num is not None]
        is_complete = values is None or len(values) == len(SPLITS)
        if not is_complete or min(numbers, default=1) < 1:
            given = [*values] if values is not None else None
            raise ValueError(f"expected {name} of {', '.join(SPLITS)} of at least 1, got {given}")


def split_at_random(
    num: int, seed: int, sizes: Sizes, most: Most = None
) -> list[Int[np.ndarray, "E"]]:
    """Choose the examples of each split at random.

    Args:
      num: number of examples.
      seed: seed of the choice.
      sizes: number of examples in each split; if None, 50% are for train, 20% for search, 15% for
        select, and 15% for test.
      most: maximum number of examples to keep in each split; None for no maximum.

    Returns:
      The indices of the examples of each split.

    Raises:
      ValueError: if there are fewer examples than `sizes` asks for.
    """
    order = np.random.default_rng(seed).permutation(num)
    others = np.maximum(1, np.floor(np.array(SHARES[1:]) * num).astype(int))
    given = np.array([num - others.sum(), *others] if sizes is None else sizes)
    if given.shape != (len(SPLITS),) or given.min() < 1 or given.sum() > num:
        raise ValueError(
            f"expected sizes of {', '.join(SPLITS)} of at least 1 and at most {num} in all, got "
            f"{[*map(int, given)]}"
        )
    parts = np.split(order, np.cumsum(given))[: len(SPLITS)]
    kept = most or (None,) * len(SPLITS)
    return [part[:num] for part, num in zip(parts, kept, strict=True)]
