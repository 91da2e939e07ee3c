"""Data sets in four disjoint splits.

Weights are trained on `train`, searches see only `search`, finalists are re-ranked on `select`, and
`test` is kept for the final report.
"""

import difflib
import itertools
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from jchain import images
from jchain._typing import Activations, PyTree
from jchain.arguments import check_integers, checked
from jchain.datasets.splitting import (
    SHARES,
    SPLITS,
    check_sizes,
    split_groups,
    split_stratified,
    take_stratified,
)
from jchain.datasets.standardization import Statistics, choose_statistics, standardize
from jchain.modules.activations import describe_shapes, is_floating, is_one_array
from jchain.pytree import describe_type, get_first_line, pick

__all__ = [
    "EVALUATION_SPLITS",
    "LOADERS",
    "SPLITS",
    "Batch",
    "Dataset",
    "Statistics",
    "concat",
    "load",
    "split",
]

# The splits that chains are scored on.
EVALUATION_SPLITS = SPLITS[1:]


# Examples [B, ...F], or a pytree of such arrays, and integer labels [B].
_Arrays = tuple[PyTree, np.ndarray]
T = TypeVar("T")


class Batch(NamedTuple):
    """Examples and their labels."""

    x: Activations  # [B, ...F], or a pytree of such arrays, if an example has several inputs
    # [B], integer classes, or other targets if the loss takes them: an array, or a pytree of arrays
    y: PyTree


@checked
def read_batch(data: object, array_fn: Callable[..., Any] = jnp.asarray) -> Batch:
    """Check that data is one split, and convert it to arrays.

    Args:
      data: what a user passes as a split.
      array_fn: the function that makes an array: `jnp.asarray`, or `np.asarray` to keep the split
        in host memory without copying it.

    Raises:
      ValueError: if it is not a pair of arrays, or of pytrees of arrays.
    """
    if not isinstance(data, tuple | list) or len(data) != 2:
        raise ValueError(
            "expected one split of data, such as data.search or jc.Batch(x, y), got "
            f"{describe_type(data)}"
        )
    convert_fn = partial(_as_array, array_fn=array_fn)
    x, y = data[0], _map_labels(convert_fn, data[1])
    return Batch(_map_inputs(convert_fn, x, jax.tree.leaves(y)[0].shape[:1]), y)


def _map_labels(convert_fn: Callable[[object, str], Any], y: object) -> PyTree:
    """Convert the arrays of labels; a plain list or tuple is the rows of a single array."""
    leaves, structure = jax.tree_util.tree_flatten_with_path(y)
    is_rows = isinstance(y, list | tuple) and not hasattr(y, "_fields")
    if is_rows or not leaves or jax.tree_util.treedef_is_leaf(structure):
        return convert_fn(y, "y")
    names = [f"y{jax.tree_util.keystr(path)}" for path, _ in leaves]
    return structure.unflatten(
        [convert_fn(leaf, name) for (_, leaf), name in zip(leaves, names, strict=True)]
    )


def _map_inputs(convert_fn: Callable[[object, str], T], x: object, size: tuple[int, ...]) -> T:
    """Convert each input of the examples, with its name, such as `x['mask']`.

    A container of arrays holds one input per array if each has the given number of examples. Lists
    and tuples of anything else are the rows of a single array.
    """
    leaves, structure = jax.tree_util.tree_flatten_with_path(x, is_leaf=_has_only_numbers)
    if not leaves or jax.tree_util.treedef_is_leaf(structure):
        return convert_fn(x, "x")
    if isinstance(x, tuple | list) and any(np.shape(leaf)[:1] != size for _, leaf in leaves):
        try:
            return convert_fn(x, "x")
        except ValueError:  # inputs of different sizes: `check_lengths` names the wrong one
            pass
    converted = [convert_fn(leaf, f"x{jax.tree_util.keystr(path)}") for path, leaf in leaves]
    return structure.unflatten(converted)


def _has_only_numbers(node: object) -> bool:
    """Return whether a node is a list or tuple of numbers, perhaps nested, but of no array."""
    is_sequence = isinstance(node, tuple | list) and len(node) > 0
    return is_sequence and not any(hasattr(leaf, "shape") for leaf in jax.tree.leaves(node))


def _as_array(value: object, name: str, array_fn: Callable[..., Any]) -> Any:
    try:
        return array_fn(value)
    except (TypeError, ValueError, RuntimeError) as error:  # torch raises RuntimeError
        raise ValueError(
            f"expected {name} as an array, got {describe_type(value)}: {get_first_line(error)}"
        ) from None


@checked
def check_lengths(data: Batch) -> None:
    """Check that there is at least one example, and one label per example.

    Args:
      data: examples and labels.

    Raises:
      ValueError: if there are no examples, or the numbers of examples and labels differ.
    """
    x, y = data
    pairs = itertools.product(*map(jax.tree_util.tree_leaves_with_path, (x, y)))
    for (path, leaf), (label_path, labels) in pairs:
        if leaf.ndim == 0 or leaf.shape[0] == 0 or labels.shape[:1] != leaf.shape[:1]:
            raise ValueError(
                "expected at least one example and one label per example, got "
                f"x{jax.tree_util.keystr(path)} {list(leaf.shape)} and "
                f"y{jax.tree_util.keystr(label_path)} {list(labels.shape)}"
            )


@checked
def concat(batches: Sequence[Batch]) -> Batch:
    """Concatenate the examples of several splits.

    Args:
      batches: splits with the same inputs, such as `[data.search, data.select]`.

    Raises:
      ValueError: if there are none, or their inputs, shapes, or targets differ.
    """
    read = [read_batch(batch) for batch in batches]
    kinds = [str(jax.tree.map(lambda leaf: (*leaf.shape[1:], leaf.dtype), one)) for one in read]
    if len(set(kinds)) != 1:
        raise ValueError(
            f"expected splits with the same inputs, got "
            f"{[describe_shapes(tuple(one)) for one in read]}"
        )
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *read)


class Dataset(NamedTuple):
    """A data set in four disjoint splits.

    Classes are stratified unless examples are grouped. Floating-point inputs are standardized with
    `statistics`, by default those of `train`.
    """

    train: Batch
    search: Batch
    select: Batch
    test: Batch
    name: str
    num_classes: int  # 0 if the targets are not classes
    statistics: Statistics | None = None  # None if examples are not standardized, such as tokens

    @checked
    def standardize(self, x: PyTree) -> Activations:
        """Standardize new examples, with the statistics of this data set.

        Args:
          x: new examples as they were before `split`, `[B, ...F]`, or a pytree of such arrays.

        Returns:
          What layers of a bank for this data set take.

        Raises:
          ValueError: if examples have other inputs or shapes than those of this data set, or are
            not finite numbers.
        """
        known = self.train.x
        if is_one_array(known):
            arrays = _check_numbers(x, "x")
        elif (found := jax.tree.structure(x)) != (structure := jax.tree.structure(known)):
            raise ValueError(f"expected examples with the inputs {structure}, got {found}")
        else:
            arrays = jax.tree.map(lambda leaf: _check_numbers(leaf, "x"), x)
        leaves = jax.tree_util.tree_leaves_with_path(arrays)
        for (path, leaf), example in zip(leaves, jax.tree.leaves(known), strict=True):
            if leaf.ndim == 0 or leaf.shape[1:] != example.shape[1:]:
                sizes = ", ".join(("B", *map(str, example.shape[1:])))
                raise ValueError(
                    f"expected x{jax.tree_util.keystr(path)} of shape [{sizes}], got "
                    f"{list(leaf.shape)}"
                )
            _check_finite(leaf)
        if self.statistics is None:
            return jax.tree.map(jnp.asarray, arrays)
        return standardize(_to_float32(arrays), self.statistics)


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


@checked
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
    known = ", ".join(LOADERS)
    if not isinstance(name, str):
        raise ValueError(
            f"expected the name of a data set ({known}, ...), got {describe_type(name)}"
        )
    if Path(name).suffix in (".csv", ".npy", ".npz", ".parquet"):
        raise ValueError(
            f"expected the name of a data set ({known}, ...), got the file {name!r}: read it, and "
            "pass its arrays to jc.data.split(x, y)"
        )
    close = difflib.get_close_matches(name.lower(), LOADERS, n=1, cutoff=0.8)
    if close:
        raise ValueError(
            f"expected the name of a data set ({known}, ...), got {name!r}; did you mean "
            f"{close[0]!r}?"
        )
    try:
        found = images.read(name, data_dir)
    except (ImportError, FileNotFoundError, ValueError) as error:
        raise type(error)(f"{error}; {known} need no preparation") from None
    return split(*found.train, seed=seed, name=name, test=found.test, sizes=sizes)


@checked
def split(
    x: PyTree,
    y: np.ndarray,
    *,
    seed: int = 0,
    groups: npt.ArrayLike | None = None,
    name: str = "data",
    test: _Arrays | None = None,
    sizes: Sequence[int] | None = None,
    statistics: tuple[PyTree, PyTree] | None = None,
) -> Dataset:
    """Split and standardize your own examples, as `load` does.

    Each feature (each channel, for images `[B, H, W, C]`) is standardized independently. If an
    example has several inputs, those of integers and booleans, such as positions and masks, stay as
    they are.

    Args:
      x: examples, `[B, ...F]`, or a pytree of such arrays, such as a dict of the inputs.
      y: integer labels `0..C-1`, `[B]`, or other targets: numbers `[B]` or `[B, ...]`, such as
        those of a regression, or several labels per example, `[B, C]` of 0 and 1. Integers `[B]`
        are labels, and every class is in every split; other targets are split at random.
      seed: random seed that decides which examples go into which split.
      groups: the group of each example, `[B]`, such as a patient: all examples of a group are in
        the same split. None if examples are independent.
      name: name of the data set.
      test: examples and labels of a fixed `test` split. If given, only the other three splits are
        cut from `x`.
      sizes: number of examples in each of the four splits, drawn in proportion to the classes; if
        None, all examples are used. Not with `groups`.
      statistics: mean and standard deviation of each feature or channel, to standardize with; those
        of `train` if None. For several inputs, both are pytrees like `x`, or one number for all.

    Raises:
      ValueError: if lengths differ, `test` has other inputs than `x`, labels are negative or not
        numbers, values are not finite, a class has too few examples or there are too few groups to
        be in every split, or `sizes` asks for more examples than there are.
    """
    check_integers(at_least=0, at_most=2**32 - 1, seed=seed)
    sources = [_check(x, y)] if test is None else [_check(x, y), _check(*test)]
    is_labels = sources[0][1].ndim == 1 and np.issubdtype(sources[0][1].dtype, np.integer)
    num_classes = _count_classes([y for _, y in sources]) if is_labels else 0
    rng = np.random.default_rng(seed)
    shares = SHARES if test is None else SHARES[:3]
    # Without classes, treat all examples as one class.
    classes = [y if is_labels else np.zeros(len(y), int) for _, y in sources]
    if groups is None:
        cut = split_stratified(classes[0], shares, rng)
    else:
        cut = split_groups(groups, len(classes[0]), shares, rng)
    parts = [(0, part) for part in cut]
    if test is not None:
        parts.append((1, np.arange(len(classes[1]))))
    if sizes is not None:
        if groups is not None:
            raise ValueError("expected sizes or groups, got both: a size would split groups")
        check_sizes(sizes, [len(part) for _, part in parts])
        parts = [
            (i, take_stratified(classes[i], part, n, rng))
            for (i, part), n in zip(parts, sizes, strict=True)
        ]
    train, structure = pick(sources[0][0], parts[0][1]), jax.tree.structure(sources[0][0])
    if (found := jax.tree.structure(sources[-1][0])) != structure:
        raise ValueError(f"expected test with the inputs of x, {structure}, got {found}")
    kept = choose_statistics(train, statistics)

    def take(source: int, rows: np.ndarray) -> Batch:
        x, y = sources[source]
        return Batch(
            standardize(pick(x, rows), kept),
            jnp.asarray(y[rows], jnp.int32 if is_labels else jnp.float32),
        )

    return Dataset(
        *(take(*part) for part in parts), name=name, num_classes=num_classes, statistics=kept
    )


def _check(x: object, targets: npt.ArrayLike) -> _Arrays:
    y: np.ndarray = _as_array(targets, "y", np.asarray)
    x = _to_float32(_map_inputs(_check_numbers, x, y.shape[:1]))
    for path, leaf in jax.tree_util.tree_leaves_with_path(x):
        if y.ndim == 0 or y.shape[:1] != leaf.shape[:1]:
            raise ValueError(
                f"expected one label per example, got x{jax.tree_util.keystr(path)} "
                f"{list(leaf.shape)} and y {list(y.shape)}"
            )
    if y.dtype == bool:
        y = y.astype(np.float32 if y.ndim > 1 else np.int32)
    if not np.issubdtype(y.dtype, np.number) or np.iscomplexobj(y):
        raise ValueError(
            f"expected integer labels 0..C-1, or targets that are numbers, got {y.dtype}: number "
            "the classes, for example with np.unique(y, return_inverse=True)[1]"
        )
    _check_finite(*jax.tree.leaves(x), y)
    if y.ndim == 1 and np.issubdtype(y.dtype, np.integer) and y.min() < 0:
        raise ValueError(f"expected integer labels 0..C-1, got {y.dtype} from {y.min()}")
    return x, y


def _to_float32(x: PyTree) -> PyTree:
    if is_one_array(x):
        # Keep byte images as bytes until a split takes them: they need a quarter of the memory.
        return x if x.dtype == np.uint8 else x.astype(np.float32)
    return jax.tree.map(lambda leaf: leaf.astype(np.float32) if is_floating(leaf) else leaf, x)


def _check_finite(*arrays: np.ndarray) -> None:
    if not all(np.isfinite(array).all() for array in arrays):
        raise ValueError("expected finite examples and targets, got nan or infinity")


def _check_numbers(value: object, name: str) -> np.ndarray:
    x = _as_array(value, name, np.asarray)
    if not np.issubdtype(x.dtype, np.number) and x.dtype != bool:
        where = "" if name == "x" else f" at {name}"
        raise ValueError(f"expected examples that are numbers, got {x.dtype}{where}")
    return x


def _count_classes(labels: Sequence[np.ndarray]) -> int:
    num_classes = max(int(y.max()) for y in labels) + 1
    counts = [np.bincount(y, minlength=num_classes) for y in labels]
    least = 2 * len(SHARES)
    if min(c.min() for c in counts) < least:
        raise ValueError(
            f"expected at least {least} examples of each class, got {[c.tolist() for c in counts]}"
            "; if y is not a class label, pass it as float"
        )
    return num_classes
