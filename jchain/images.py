"""Image sets of tensorflow-datasets, read from array_record files without TensorFlow.

A set must be prepared once (`jchain prepare cifar10`, which needs TensorFlow for most sets). After
that, reading it needs only `tensorflow-datasets`, `array_record`, and `pillow`
(`pip install -e ".[data]"`). Only `prepare` downloads anything.
"""

import contextlib
import difflib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jchain._typing import Shaped
from jchain.arguments import checked
from jchain.pytree import get_first_line

# Number of examples to decode at a time.
_CHUNK = 4096
_FORMAT = "array_record"
_EXAMPLES = "mnist, fashion_mnist, cifar10"
# Community sets, `namespace:name`, would use the network.
_NAME = re.compile(r"([A-Za-z0-9_]+)(/[A-Za-z0-9_.+-]+)?(:\d+\.\d+\.\d+)?")
_FEATURES = "features.json"
_CLASS_KEYS = ("pythonClassName", "python_class_name", "type")


class Images(NamedTuple):
    """The images and labels of a data set; `test` is None if the set has no test split."""

    train: tuple[Shaped[np.ndarray, "B H W C"], Shaped[np.ndarray, "B"]]
    test: tuple[Shaped[np.ndarray, "B H W C"], Shaped[np.ndarray, "B"]] | None
    num_classes: int


@checked
def read(name: str, data_dir: str | Path | None = None) -> Images:
    """Read a prepared set of images and integer labels.

    Args:
      name: name of the set in tensorflow-datasets, such as `mnist`, `fashion_mnist`, or `cifar10`;
        `name/config` and `name:version` are accepted too.
      data_dir: the folder of prepared sets; if None, the default folder of tensorflow-datasets,
        which is `TFDS_DATA_DIR` or ~/tensorflow_datasets.

    Raises:
      ImportError: if tensorflow-datasets is not installed.
      FileNotFoundError: if the folder does not exist, or the set is not prepared in it.
      PermissionError: if the folder cannot be read.
      OSError: if a file is damaged.
      ValueError: if the name is unknown, the set does not hold images of one size with one class
        each, or it is stored in another format.
    """
    builder = _find_builder(name, data_dir)
    _check_is_prepared(builder, name, data_dir)
    image, label, num_classes = _get_feature_names(builder, name)
    splits = builder.info.splits
    if "train" not in splits:
        raise ValueError(
            f"expected {name} to have a split 'train', got {', '.join(sorted(splits))}"
        )
    parts = [_read_split(builder, name, s, image, label) for s in ("train", "test") if s in splits]
    sizes = {images.shape[1:] for images, _ in parts}
    if len(sizes) > 1:
        raise ValueError(f"expected images of one size in {name}, got {sorted(sizes)}")
    for _, labels in parts:
        if labels.min() < 0 or labels.max() >= num_classes:
            raise ValueError(
                f"expected labels in 0..{num_classes - 1} in {name}, "
                f"got {labels.min()}..{labels.max()}"
            )
    return Images(parts[0], parts[1] if len(parts) > 1 else None, num_classes)


@checked
def prepare(name: str, data_dir: str | Path | None = None) -> Path:
    """Download a set and write it as array_record files, unless it is already prepared.

    Args:
      name: name of the set in tensorflow-datasets.
      data_dir: the folder of prepared sets, see `read`.

    Returns:
      The folder that holds the set.

    Raises:
      ImportError: if tensorflow-datasets is not installed, or if the set needs TensorFlow and it is
        not installed.
      ValueError: if the name is unknown, or the set is prepared in another format.
      OSError: if the set could not be downloaded or written.
    """
    builder = _find_builder(name, data_dir)
    if builder.is_prepared():
        _check_format(builder, name)
        return Path(builder.data_dir)
    try:
        builder.download_and_prepare()
    except ImportError as error:
        raise ImportError(
            f'preparing {name} needs TensorFlow: pip install -e ".[prepare]" ({error})'
        ) from None
    return Path(builder.data_dir)


def _import_tfds() -> Any:
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise ImportError(
            f'image sets need tensorflow-datasets: pip install -e ".[data]" ({error})'
        ) from None
    return tfds


def _find_builder(name: str, data_dir: str | Path | None) -> Any:
    """Find the builder of a set without using the network."""
    tfds = _import_tfds()
    if not _NAME.fullmatch(name):
        raise ValueError(
            f"expected the name of a data set, such as {_EXAMPLES}, name/config, or name:1.0.0, "
            f"got {name!r}"
        )
    folder = None if data_dir is None else Path(data_dir).expanduser()
    if folder is not None and folder.exists() and not os.access(folder, os.R_OK | os.X_OK):
        raise PermissionError(f"cannot read the data folder {folder}")
    _check_feature_classes(tfds, name, folder)
    try:
        return tfds.builder(name, data_dir=folder, try_gcs=False, **_choose_format(tfds, name))
    except tfds.core.DatasetNotFoundError:
        near = difflib.get_close_matches(name, _list_sets(tfds), n=3)
        hint = (
            f"did you mean {' or '.join(near)}?"
            if near
            else f"expected a set of tensorflow-datasets, such as {_EXAMPLES}"
        )
        raise ValueError(f"unknown data set {name!r}: {hint}") from None
    except AssertionError as error:  # of a version that does not exist
        raise ValueError(f"cannot read {name}: {get_first_line(error)}") from None


def _check_feature_classes(tfds: Any, name: str, folder: Path | None) -> None:
    """Refuse prepared sets of features that tensorflow-datasets does not define.

    It would import any module that such a file names.
    """
    base = _NAME.fullmatch(name)[1]  # pyright: ignore[reportOptionalSubscript]
    if folder is None:
        folders = [Path(path) for path in tfds.core.utils.file_utils.list_data_dirs()]
    else:
        folders = [folder]
    features = [getattr(tfds.features, feature) for feature in tfds.features.__all__]
    known = {f"{feature.__module__}.{feature.__qualname__}" for feature in features}
    for place in folders:
        # name/version/features.json or name/config/version/features.json
        for pattern in ("*", "*/*"):
            for path in sorted((place / base).glob(f"{pattern}/{_FEATURES}")):
                _check_feature_file(path, known)


def _check_feature_file(path: Path, known: set[str]) -> None:
    try:
        named = set(_find_class_names(json.loads(path.read_text())))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"cannot read {path}: {get_first_line(error)}") from None
    if unknown := sorted(named - known):
        raise ValueError(
            f"expected features that tensorflow-datasets defines in {path}, got {unknown[0]}"
        )


def _find_class_names(value: object) -> Iterator[str]:
    """List the classes that a features.json names, in its present and in its old format."""
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            content = json.loads(value)  # the content of a feature, as text
            yield from () if isinstance(content, str) else _find_class_names(content)
    if isinstance(value, list):
        for item in value:
            yield from _find_class_names(item)
    if isinstance(value, dict):
        for key, item in value.items():
            if key in _CLASS_KEYS and isinstance(item, str):
                yield item
            yield from _find_class_names(item)


def _choose_format(tfds: Any, name: str) -> dict[str, str]:
    """Request array_record files, except for sets without code, which have a fixed format."""
    base = name.split("/")[0].split(":")[0]
    return {"file_format": _FORMAT} if base in _list_sets(tfds) else {}


def _list_sets(tfds: Any) -> list[str]:
    # Listing community sets would use the network.
    return tfds.list_builders(with_community_datasets=False)


def _check_is_prepared(builder: Any, name: str, data_dir: str | Path | None) -> None:
    if not builder.is_prepared():
        option = "" if data_dir is None else f" --data-dir {data_dir}"
        raise FileNotFoundError(
            f"data set {name} is not prepared in {Path(builder.data_dir).parents[1]}: "
            f"run jchain prepare {name}{option}"
        )
    _check_format(builder, name)


def _check_format(builder: Any, name: str) -> None:
    found = builder.info.file_format
    if found is None or found.value != _FORMAT:
        raise ValueError(
            f"expected {name} to be prepared as {_FORMAT} files, "
            f"got {found and found.value} in {builder.data_dir}"
        )


def _get_feature_names(builder: Any, name: str) -> tuple[str, str, int]:
    """Return the names of the image feature and the label feature, and the number of classes."""
    tfds, features, keys = _import_tfds(), builder.info.features, builder.info.supervised_keys
    if (
        keys is None
        or len(keys) != 2
        or not all(isinstance(key, str) and key in features for key in keys)
    ):
        raise ValueError(
            f"expected {name} to have images and labels, got features {', '.join(features)} "
            f"and no pair of them for supervised learning"
        )
    image, label = keys
    if not isinstance(features[image], tfds.features.Image) or not isinstance(
        features[label], tfds.features.ClassLabel
    ):
        kinds = [type(features[key]).__name__ for key in keys]
        raise ValueError(
            f"expected {name} to have an Image and a ClassLabel, got {kinds[0]} and {kinds[1]}"
        )
    return image, label, features[label].num_classes


def _read_split(
    builder: Any, name: str, split: str, image: str, label: str
) -> tuple[np.ndarray, np.ndarray]:
    source = builder.as_data_source(split=split)
    size = builder.info.splits[split].num_examples
    if len(source) != size or size == 0:
        raise OSError(
            f"expected {size} examples in split {split} of {name}, at least one, got {len(source)}"
        )
    images, labels = [], []
    for start in range(0, size, _CHUNK):
        try:
            rows = source.__getitems__(range(start, min(start + _CHUNK, size)))
        except (RuntimeError, ValueError, OSError) as error:
            raise OSError(
                f"cannot read split {split} of {name} in {builder.data_dir}: {error}"
            ) from None
        shapes = {row[image].shape for row in rows} | {images[0].shape[1:] for _ in images[:1]}
        if len(shapes) > 1:
            raise ValueError(
                f"expected images of one size in {name}, "
                f"got {', '.join(str(list(s)) for s in sorted(shapes)[:3])}"
            )
        images.append(np.stack([row[image] for row in rows]))
        labels.append(np.array([row[label] for row in rows], np.int64))
    return np.concatenate(images), np.concatenate(labels)
