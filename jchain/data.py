"""Data sets in four disjoint splits.

Weights are trained on `train`, searches see only `search`, finalists are re-ranked on `select`, and
`test` is kept for the final report.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from jchain import images
from jchain._typing import Array, Shaped

# Fractions of the examples that go to train, search, select, and test.
SHARES = (0.5, 0.2, 0.15, 0.15)
SPLITS = ("train", "search", "select", "test")
# The splits that chains are scored on.
EVALUATION_SPLITS = SPLITS[1:]


# Examples [B, ...F] and integer labels [B].
_Arrays = tuple[np.ndarray, np.ndarray]


class Batch(NamedTuple):
    """Examples and their labels."""

    x: Shaped[Array, "B ..."]  # [B, ...F]
    y: Shaped[Array, "B ..."]  # [B], integer classes, or other targets if the loss takes them


def check_lengths(data: Batch) -> None:
    """Check that there is at least one example, and one label per example.

    Args:
      data: examples and labels.

    Raises:
      ValueError: if there are no examples, or the numbers of examples and labels differ.
    """
    x, y = data
    if x.ndim == 0 or x.shape[0] == 0 or y.shape[:1] != x.shape[:1]:
        raise ValueError(
            "expected at least one example and one label per example, "
            f"got x {list(x.shape)} and y {list(y.shape)}"
        )


class Dataset(NamedTuple):
    """A data set in four disjoint, stratified splits, standardized with statistics of `train`."""

    train: Batch
    search: Batch
    select: Batch
    test: Batch
    name: str
    num_classes: int


def _load_digits() -> _Arrays:
    from sklearn.datasets import load_digits

    return load_digits(return_X_y=True)  # pyright: ignore[reportReturnType]


def _load_digit_images() -> _Arrays:
    x, y = _load_digits()
    return x.reshape(-1, 8, 8, 1), y


def _load_wine() -> _Arrays:
    from sklearn.datasets import load_wine

    return load_wine(return_X_y=True)  # pyright: ignore[reportReturnType]


def _load_breast_cancer() -> _Arrays:
    from sklearn.datasets import load_breast_cancer

    return load_breast_cancer(return_X_y=True)  # pyright: ignore[reportReturnType]


# Data sets whose files are part of scikit-learn's wheel.
LOADERS: dict[str, Callable[[], _Arrays]] = {
    "digits": _load_digits,
    "digits_8x8": _load_digit_images,
    "wine": _load_wine,
    "breast_cancer": _load_breast_cancer,
}


def load(
    name: str,
    seed: int = 0,
    *,
    sizes: Sequence[int] | None = None,
    data_dir: str | Path | None = None,
) -> Dataset:
    """Load a data set by name.

    Four data sets come with scikit-learn: `digits` (1,797 x 64, 10 classes), `digits_8x8` (the same
    examples as 8 x 8 x 1 images), `wine` (178 x 13, 3 classes), and `breast_cancer` (569 x 30, 2
    classes). All other names are image sets of tensorflow-datasets, such as `mnist`,
    `fashion_mnist`, and `cifar10`, which must be prepared first (`jchain prepare`,
    `jchain.images`). Their own test split becomes `test`, and the other three splits are cut from
    their train split in the same proportions.

    Args:
      name: name of the data set.
      seed: random seed that decides which examples go into which split: 50% train, 20% search, 15%
        select, and 15% test.
      sizes: number of examples in each of the four splits; if None, all examples are used.
      data_dir: the folder of prepared image sets; see `jchain.images.read`.

    Raises:
      ValueError: if the name is unknown, or `sizes` asks for more examples than there are.
      ImportError, OSError, ValueError: if the set cannot be read; see `jchain.images.read`.
    """
    if name in LOADERS:
        x, y = LOADERS[name]()
        return split(np.asarray(x), np.asarray(y), seed=seed, name=name, sizes=sizes)
    found = images.read(name, data_dir)
    return split(*found.train, seed=seed, name=name, test=found.test, sizes=sizes)


def split(
    x: np.ndarray,
    y: np.ndarray,
    *,
    seed: int = 0,
    name: str = "data",
    test: _Arrays | None = None,
    sizes: Sequence[int] | None = None,
    statistics: tuple[np.ndarray | float, np.ndarray | float] | None = None,
) -> Dataset:
    """Split and standardize your own examples, as `load` does.

    Each feature is standardized on its own; for images `[B, H, W, C]`, each channel is.

    Args:
      x: examples, `[B, ...F]`.
      y: integer labels `0..C-1`, `[B]`.
      seed: random seed that decides which examples go into which split.
      name: name of the data set.
      test: examples and labels of a fixed `test` split. If given, only the other three splits are
        cut from `x`.
      sizes: number of examples in each of the four splits, drawn in proportion to the classes; if
        None, all examples are used.
      statistics: mean and standard deviation of each feature or channel, to standardize with; those
        of `train` if None.

    Raises:
      ValueError: if lengths differ, labels are not integers of at least 0, values are not finite, a
        class has too few examples to be in every split, or `sizes` asks for more examples than
        there are.
    """
    sources = [_check(x, y)] if test is None else [_check(x, y), _check(*test)]
    num_classes = max(int(labels.max()) for _, labels in sources) + 1
    counts = [np.bincount(labels, minlength=num_classes) for _, labels in sources]
    least = 2 * len(SHARES)
    if min(c.min() for c in counts) < least:
        raise ValueError(
            f"expected at least {least} examples of each class, got {[c.tolist() for c in counts]}"
        )
    rng = np.random.default_rng(seed)
    shares = SHARES if test is None else SHARES[:3]
    parts = [(0, part) for part in _split_stratified(sources[0][1], shares, rng)]
    if test is not None:
        parts.append((1, np.arange(len(sources[1][1]))))
    if sizes is not None:
        check_sizes(sizes, [len(part) for _, part in parts])
        parts = [
            (i, take_stratified(sources[i][1], part, n, rng))
            for (i, part), n in zip(parts, sizes, strict=True)
        ]
    train = sources[0][0][parts[0][1]]
    # All positions of an image share the statistics of their channel.
    axes, dtype = ((0, 1, 2), np.float64) if train.ndim == 4 else (0, np.float32)
    own = (fn(train, axis=axes, dtype=dtype).astype(np.float32) for fn in (np.mean, np.std))
    mean, std = own if statistics is None else statistics
    # The standard deviation of a constant feature is only rounding error. Dividing by it would
    # give huge values in other splits.
    is_constant = np.equal(train.max(axis=axes), train.min(axis=axes)) & (statistics is None)
    std = np.where((std > 0) & ~is_constant, std, 1)

    def take(source: int, rows: np.ndarray) -> Batch:
        x, y = sources[source]
        return Batch(
            jnp.asarray((x[rows] - mean) / std, jnp.float32), jnp.asarray(y[rows], jnp.int32)
        )

    return Dataset(*(take(*part) for part in parts), name=name, num_classes=num_classes)


def _check(x: npt.ArrayLike, y: npt.ArrayLike) -> _Arrays:
    x, y = np.asarray(x), np.asarray(y)
    # Keep byte images as bytes until a split takes them, because they need a quarter of the memory.
    x = x if x.dtype == np.uint8 else x.astype(np.float32)
    if y.shape != x.shape[:1]:
        raise ValueError(
            f"expected one label per example, got x {list(x.shape)} and y {list(y.shape)}"
        )
    if not np.issubdtype(y.dtype, np.integer) or y.min() < 0:
        raise ValueError(f"expected integer labels 0..C-1, got {y.dtype} from {y.min()}")
    if not np.isfinite(x).all():
        raise ValueError("expected finite examples, got nan or infinity")
    return x, y


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


def _split_stratified(
    y: np.ndarray, shares: Sequence[float], rng: np.random.Generator
) -> list[np.ndarray]:
    """Return the rows of each split, with every class cut in the same proportions."""
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
    place = np.empty(len(order))
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        place[members] = (np.arange(len(members)) + rng.random()) / len(members)
    return order[np.argsort(place, kind="stable")[:size]]
