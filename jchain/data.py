"""Data sets in four disjoint splits.

Weights are trained on `train`, searches see only `search`, finalists are re-ranked on `select`, and
`test` is kept for the final report.
"""

import difflib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from jchain import images
from jchain._typing import Activations, Array, PyTree, Shaped
from jchain.modules.activations import is_floating, is_one_array
from jchain.pytree import describe_type, get_first_line, pick

# Fractions of the examples that go to train, search, select, and test.
SHARES = (0.5, 0.2, 0.15, 0.15)
SPLITS = ("train", "search", "select", "test")
# The splits that chains are scored on.
EVALUATION_SPLITS = SPLITS[1:]


# Examples [B, ...F], or a pytree of such arrays, and integer labels [B].
_Arrays = tuple[PyTree, np.ndarray]
# The mean and the standard deviation of each feature.
_Scale = tuple[np.ndarray | np.floating | float, np.ndarray | np.floating | float]
T = TypeVar("T")


class Batch(NamedTuple):
    """Examples and their labels."""

    x: Activations  # [B, ...F], or a pytree of such arrays, if an example has several inputs
    y: Shaped[Array, "B ..."]  # [B], integer classes, or other targets if the loss takes them


def read_batch(data: object, array_fn: Callable[..., Any] = jnp.asarray) -> Batch:
    """Check that data is one split, and convert it to arrays.

    Args:
      data: what a user passes as a split.
      array_fn: the function that makes an array: `jnp.asarray`, or `np.asarray` to keep the split
        in host memory without copying it.

    Raises:
      ValueError: if it is not a pair of an array, or a pytree of arrays, and an array.
    """
    if not isinstance(data, tuple | list) or len(data) != 2:
        raise ValueError(
            "expected one split of data, such as data.search or jc.Batch(x, y), got "
            f"{describe_type(data)}"
        )
    convert_fn = partial(_as_array, array_fn=array_fn)
    x, y = data[0], convert_fn(data[1], "y")
    return Batch(_map_inputs(convert_fn, x, y.shape[:1]), y)


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


def check_lengths(data: Batch) -> None:
    """Check that there is at least one example, and one label per example.

    Args:
      data: examples and labels.

    Raises:
      ValueError: if there are no examples, or the numbers of examples and labels differ.
    """
    x, y = data
    for path, leaf in jax.tree_util.tree_leaves_with_path(x):
        if leaf.ndim == 0 or leaf.shape[0] == 0 or y.shape[:1] != leaf.shape[:1]:
            raise ValueError(
                "expected at least one example and one label per example, got "
                f"x{jax.tree_util.keystr(path)} {list(leaf.shape)} and y {list(y.shape)}"
            )


class Dataset(NamedTuple):
    """A data set in four disjoint, stratified splits, standardized with statistics of `train`."""

    train: Batch
    search: Batch
    select: Batch
    test: Batch
    name: str
    num_classes: int  # 0 if the targets are not classes


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
    sources = [_check(x, y)] if test is None else [_check(x, y), _check(*test)]
    is_labels = sources[0][1].ndim == 1 and np.issubdtype(sources[0][1].dtype, np.integer)
    num_classes = _count_classes([y for _, y in sources]) if is_labels else 0
    rng = np.random.default_rng(seed)
    shares = SHARES if test is None else SHARES[:3]
    # Without classes, treat all examples as one class.
    classes = [y if is_labels else np.zeros(len(y), int) for _, y in sources]
    if groups is None:
        cut = _split_stratified(classes[0], shares, rng)
    else:
        cut = _split_groups(groups, len(classes[0]), shares, rng)
    parts = [(0, part) for part in cut]
    if test is not None:
        parts.append((1, np.arange(len(classes[1]))))
    if sizes is not None:
        if groups is not None:
            raise ValueError("sizes cannot be combined with groups, because it would split groups")
        check_sizes(sizes, [len(part) for _, part in parts])
        parts = [
            (i, take_stratified(classes[i], part, n, rng))
            for (i, part), n in zip(parts, sizes, strict=True)
        ]
    train, structure = pick(sources[0][0], parts[0][1]), jax.tree.structure(sources[0][0])
    if (found := jax.tree.structure(sources[-1][0])) != structure:
        raise ValueError(f"expected test with the inputs of x, {structure}, got {found}")
    scales = _choose_scales(train, statistics)

    def take(source: int, rows: np.ndarray) -> Batch:
        x, y = sources[source]
        inputs = zip(jax.tree.leaves(x), scales, strict=True)
        return Batch(
            structure.unflatten([_standardize(leaf[rows], scale) for leaf, scale in inputs]),
            jnp.asarray(y[rows], jnp.int32 if is_labels else jnp.float32),
        )

    return Dataset(*(take(*part) for part in parts), name=name, num_classes=num_classes)


def _choose_scales(train: PyTree, statistics: tuple[PyTree, PyTree] | None) -> list[_Scale | None]:
    """Return the scale of each input, and None for inputs that stay as they are."""
    inputs = jax.tree.leaves(train)
    given = [statistics] * len(inputs)
    if statistics is not None and not is_one_array(train):
        parts = (jax.tree.leaves(jax.tree.broadcast(part, train)) for part in statistics)
        given = [*zip(*parts, strict=True)]
    return [
        _choose_scale(leaf, own) if is_one_array(train) or is_floating(leaf) else None
        for leaf, own in zip(inputs, given, strict=True)
    ]


def _choose_scale(train: np.ndarray, statistics: _Scale | None) -> _Scale:
    """Return the mean and standard deviation of each feature, which is 1 where it would be 0."""
    if statistics is not None:
        mean, std = statistics
        return mean, np.where(std > 0, std, 1)
    # All positions of an image share the statistics of their channel.
    axes, dtype = ((0, 1, 2), np.float64) if train.ndim == 4 else (0, np.float32)
    mean, std = (fn(train, axis=axes, dtype=dtype).astype(np.float32) for fn in (np.mean, np.std))
    # The standard deviation of a constant feature is only rounding error. Dividing by it would
    # give huge values in other splits.
    is_constant = np.equal(train.max(axis=axes), train.min(axis=axes))
    return mean, np.where((std > 0) & ~is_constant, std, 1)


def _standardize(x: np.ndarray, scale: _Scale | None) -> Array:
    if scale is None:
        return jnp.asarray(x)
    mean, std = scale
    return jnp.asarray((x - mean) / std, jnp.float32)


def _check(x: object, targets: npt.ArrayLike) -> _Arrays:
    y: np.ndarray = _as_array(targets, "y", np.asarray)
    x = _map_inputs(_check_numbers, x, y.shape[:1])
    if is_one_array(x):
        # Keep byte images as bytes until a split takes them: they need a quarter of the memory.
        x = x if x.dtype == np.uint8 else x.astype(np.float32)
    else:
        x = jax.tree.map(lambda leaf: leaf.astype(np.float32) if is_floating(leaf) else leaf, x)
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
    if not all(np.isfinite(leaf).all() for leaf in (*jax.tree.leaves(x), y)):
        raise ValueError("expected finite examples and targets, got nan or infinity")
    if y.ndim == 1 and np.issubdtype(y.dtype, np.integer) and y.min() < 0:
        raise ValueError(f"expected integer labels 0..C-1, got {y.dtype} from {y.min()}")
    return x, y


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


def _split_groups(
    groups: npt.ArrayLike, num_examples: int, shares: Sequence[float], rng: np.random.Generator
) -> list[np.ndarray]:
    """Return the rows of each split, with all examples of a group in the same split."""
    groups = np.asarray(groups)
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
    rank = np.empty(len(order))
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        rank[members] = (np.arange(len(members)) + rng.random()) / len(members)
    return order[np.argsort(rank, kind="stable")[:size]]
