"""The bank, the data, and the loss of `jchain search --checkpoint`."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import optax

from jchain._typing import Array
from jchain.bank import Bank
from jchain.cli.config import SearchConfig, require
from jchain.data import SPLITS, Batch, Dataset
from jchain.hub.checkpoint import CONFIG, read_json
from jchain.hub.datasets import load_choices, load_images, load_text
from jchain.hub.loading import load_many
from jchain.hub.losses import choice_accuracy, choice_loss

# The largest sizes of train, search, select, and test if no sizes are given. They are small because
# a layer call processes all sequences of a split.
SIZES = (64, 64, 64, 256)
# Default number of tokens in a sequence; a model with fewer positions gets sequences as long as
# it accepts.
LENGTH = 128

LossFn = Callable[[Array, Array], Array]


class EvalData(NamedTuple):
    """The splits, and the functions that compute the loss and accuracy of chains on them."""

    data: Dataset
    loss_fn: LossFn = optax.softmax_cross_entropy_with_integer_labels
    accuracy_fn: LossFn | None = None


def load_data(config: SearchConfig) -> EvalData:
    """Load the splits and the loss, in the format that the first checkpoint needs.

    Args:
      config: the resolved options.

    Raises:
      ValueError: if not exactly one of text, choices, and data is given, or if it cannot be loaded.
      OSError, ImportError: if the loader in `jchain.hub.datasets` raises it.
    """
    kinds = {"text": config.text, "choices": config.choices, "data": config.data}
    given = [kind for kind, value in kinds.items() if value]
    if len(given) != 1 or not config.checkpoint:
        raise ValueError(
            "expected one of --text, --choices, and --data with --checkpoint, got "
            f"{', '.join(given) or 'none'}"
        )
    if config.length is not None and (config.length < 1 or config.data):
        raise ValueError(
            f"expected --length to be at least 1, and none with --data, got {config.length}"
        )
    checkpoint, seed = config.checkpoint[0], config.seed
    if config.data:
        most = None if config.sizes is not None else SIZES
        data_dir = config.data_dir
        images = load_images(
            checkpoint, config.data, seed=seed, sizes=config.sizes, most=most, data_dir=data_dir
        )
        return EvalData(images)
    if config.choices:
        file, length = config.choices, config.length
        questions = _load_at_most(
            lambda sizes: load_choices(checkpoint, file, length=length, seed=seed, sizes=sizes),
            config.sizes,
        )
        return EvalData(questions, choice_loss, choice_accuracy)
    files, length = require(config.text), config.length or _choose_length(Path(checkpoint))
    text = _load_at_most(
        lambda sizes: load_text(checkpoint, files, length=length, seed=seed, sizes=sizes),
        config.sizes,
    )
    return EvalData(text)


def _choose_length(checkpoint: Path) -> int:
    options = read_json(checkpoint / CONFIG)
    positions = options.get("n_positions") or options.get("max_position_embeddings")
    # If the number of positions is not an integer, `load_text` rejects the model.
    return min(LENGTH, positions) if isinstance(positions, int) and positions > 0 else LENGTH


def _load_at_most(
    load_fn: Callable[[Sequence[int] | None], Dataset], sizes: Sequence[int] | None
) -> Dataset:
    if sizes is not None:
        return load_fn(sizes)
    data = load_fn(None)
    splits = {
        name: Batch(batch.x[:most], batch.y[:most])
        for name, batch, most in zip(SPLITS, data[:4], SIZES, strict=True)
    }
    return data._replace(**splits)


def load_bank(config: SearchConfig) -> Bank:
    """Load the blocks of the checkpoints as a bank.

    Args:
      config: the resolved options.

    Raises:
      ValueError, OSError: if `jchain.hub.load_many` raises it.
    """
    paths = list(require(config.checkpoint))
    first, last = require(config.pinned)
    return load_many(
        paths,
        dtype=None if config.dtype is None else jnp.dtype(config.dtype),
        names=name_models(paths),
        pinned=(first, last),
    )


def name_models(paths: Sequence[str]) -> list[str]:
    """Name each model by the last parts of its path.

    The names use the fewest parts that make them all different.

    Args:
      paths: the checkpoint folders.

    Raises:
      ValueError: if two paths are equal.
    """
    parts = [Path(os.path.abspath(path)).parts for path in paths]
    for num in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-num:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    raise ValueError(f"expected different checkpoints, got {', '.join(map(str, paths))}")
