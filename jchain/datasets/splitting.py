"""Which examples go into which split."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from jchain.arguments import read_array

# Fractions of the examples that go to train, search, select, and test.
SHARES = (0.5, 0.2, 0.15, 0.15)
SPLITS = ("train", "search", "select", "test")


def split_groups(
    groups: npt.ArrayLike, num_examples: int, shares: Sequence[float], rng: np.random.Generator
) -> list[np.ndarray]:
    """Return the rows of each split, with all examples of a group in the same split.

    Args:
      groups: the group of each example, `[B]`.
      num_examples: the number of examples, B.
      shares: the fraction of the examples that goes to each split.
      rng: the random generator that breaks ties and orders the rows.

    Raises:
      ValueError: if there is not one group per example, or there are fewer groups than splits.
    """
    groups = read_array("groups", groups)
    if groups.shape != (num_examples,):
        raise ValueError(f"expected groups of shape [{num_examples}], got {list(groups.shape)}")
    names, member_of, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    if len(names) < len(shares):
        raise ValueError(f"expected at least {len(shares)} groups, got {len(names)}")
    part_of = np.empty(len(names), int)
    wanted = np.array(shares) / np.sum(shares) * num_examples
    filled = np.zeros(len(shares))
    # The largest groups first, each into the split that lacks the largest part of its examples.
    order = rng.permutation(len(names))
    for group in order[np.argsort(-sizes[order], kind="stable")]:
        part = int(np.argmax((wanted - filled) / wanted))
        part_of[group] = part
        filled[part] += sizes[group]
    return [rng.permutation(np.flatnonzero(part_of[member_of] == p)) for p in range(len(shares))]


def check_sizes(sizes: Sequence[int], available: Sequence[int]) -> None:
    """Check the sizes of the four splits.

    Args:
      sizes: number of examples in train, search, select, and test.
      available: number of examples that each split can have at most.

    Raises:
      ValueError: if there are not four sizes, or a size is below 1 or above the available number.
    """
    if len(sizes) != len(SPLITS) or any(
        not 1 <= size <= most for size, most in zip(sizes, available, strict=False)
    ):
        raise ValueError(
            f"expected sizes of {', '.join(SPLITS)} of at least 1 and at most {list(available)}, "
            f"got {list(sizes)}"
        )


def split_stratified(
    y: np.ndarray, shares: Sequence[float], rng: np.random.Generator
) -> list[np.ndarray]:
    """Return the rows of each split, with every class cut in the same proportions.

    Args:
      y: integer labels, `[B]`.
      shares: the fraction of the examples that goes to each split.
      rng: the random generator that assigns examples to splits.
    """
    parts: list[list[np.ndarray]] = [[] for _ in shares]
    for label in np.unique(y):
        members = rng.permutation(np.flatnonzero(y == label))
        cuts = np.round(np.cumsum(shares)[:-1] / np.sum(shares) * len(members)).astype(int)
        for part, piece in zip(parts, np.split(members, cuts), strict=True):
            part.append(piece)
    return [rng.permutation(np.concatenate(part)) for part in parts]


def take_stratified(
    y: np.ndarray, rows: np.ndarray, size: int, rng: np.random.Generator
) -> np.ndarray:
    """Draw `size` of the given rows, with nearly the same class proportions.

    Args:
      y: labels of all rows, `[B]`.
      rows: indices of the rows to draw from.
      size: number of rows to draw.
      rng: the random generator that decides which rows are drawn.
    """
    order = rng.permutation(rows)
    labels = y[order]
    # The rank of each row among the rows of its class, as a fraction. The rows with the smallest
    # ranks are a stratified sample.
    rank = np.empty(len(order))
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        rank[members] = (np.arange(len(members)) + rng.random()) / len(members)
    return order[np.argsort(rank, kind="stable")[:size]]
