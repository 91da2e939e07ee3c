"""Data: four splits that never meet. `train` makes weights, `search` is searched on, `select` re-ranks, `test` reports."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jchain._typing import Array, Shaped

# Shares of train, search, select and test.
SHARES = (0.5, 0.2, 0.15, 0.15)
SPLITS = ("train", "search", "select", "test")


class Batch(NamedTuple):
    """Examples and their labels."""

    x: Shaped[Array, "B ..."]  # [B, ...F]
    y: Shaped[Array, "B ..."]  # [B], integer classes unless the loss wants something else


class Dataset(NamedTuple):
    """The four splits of a data set: stratified, disjoint, standardized with the statistics of `train`."""

    train: Batch
    search: Batch
    select: Batch
    test: Batch
    name: str
    num_classes: int


def _load_digits() -> Any:
    from sklearn.datasets import load_digits

    return load_digits(return_X_y=True)


def _load_wine() -> Any:
    from sklearn.datasets import load_wine

    return load_wine(return_X_y=True)


def _load_breast_cancer() -> Any:
    from sklearn.datasets import load_breast_cancer

    return load_breast_cancer(return_X_y=True)


# Each gives x [B, ...F] and integer labels y [B], from files that scikit-learn's wheel holds.
LOADERS: dict[str, Callable[[], Any]] = {
    "digits": _load_digits,
    "wine": _load_wine,
    "breast_cancer": _load_breast_cancer,
}


def load(name: str, seed: int = 0) -> Dataset:
    """A data set by name: `digits` (1,797 x 64, 10 classes), `wine` (178 x 13, 3), `breast_cancer` (569 x 30, 2).

    Args:
      name: which.
      seed: which examples go into which split; the shares are 50% train, 20% search, 15% select, 15% test.

    Raises:
      ValueError: there is no data set of that name.
    """
    if name not in LOADERS:
        raise ValueError(f"unknown data set {name!r}: expected one of {', '.join(sorted(LOADERS))}")
    x, y = LOADERS[name]()
    return split(np.asarray(x), np.asarray(y), seed=seed, name=name)


def split(x: np.ndarray, y: np.ndarray, *, seed: int = 0, name: str = "data") -> Dataset:
    """Your own examples as a data set, split and standardized as `load` does.

    Args:
      x: examples, `[B, ...F]`.
      y: integer labels `0..C-1`, `[B]`.
      seed: which examples go into which split.
      name: what to call it.

    Raises:
      ValueError: lengths differ, labels are no integers from 0, values are not finite, or a class has too few examples
        to be in every split.
    """
    x, y = np.asarray(x, np.float32), np.asarray(y)
    if y.shape != x.shape[:1]:
        raise ValueError(f"expected one label per example, got x {list(x.shape)} and y {list(y.shape)}")
    if not np.issubdtype(y.dtype, np.integer) or y.min() < 0:
        raise ValueError(f"expected integer labels 0..C-1, got {y.dtype} from {y.min()}")
    if not np.isfinite(x).all():
        raise ValueError("expected finite examples, got nan or infinity")
    counts = np.bincount(y)
    if counts.min() < len(SHARES) * 2:
        raise ValueError(f"expected at least {len(SHARES) * 2} examples of each class, got {counts.tolist()}")
    parts = _split_stratified(y, np.random.default_rng(seed))
    train = x[parts[0]]
    mean, std = train.mean(axis=0), train.std(axis=0)
    x = (x - mean) / np.where(std > 0, std, 1)
    batches = [Batch(jnp.asarray(x[part]), jnp.asarray(y[part], jnp.int32)) for part in parts]
    return Dataset(*batches, name=name, num_classes=len(counts))


def _split_stratified(y: np.ndarray, rng: np.random.Generator) -> list[np.ndarray]:
    """Indices of each split. Every class is cut at the same shares."""
    parts: list[list[np.ndarray]] = [[] for _ in SHARES]
    for label in np.unique(y):
        members = rng.permutation(np.flatnonzero(y == label))
        cuts = np.round(np.cumsum(SHARES)[:-1] * len(members)).astype(int)
        for part, piece in zip(parts, np.split(members, cuts), strict=True):
            part.append(piece)
    return [rng.permutation(np.concatenate(part)) for part in parts]
