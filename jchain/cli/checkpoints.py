"""The bank, the data, and the loss of `jchain search --checkpoint`."""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import optax

from jchain._typing import Array
from jchain.bank import Bank
from jchain.cli.config import SearchConfig, require
from jchain.cli.progress import print_progress
from jchain.data import SPLITS, Dataset
from jchain.hub.adapter import find_model
from jchain.hub.image_data import load_images
from jchain.hub.loading import load_many
from jchain.hub.losses import choice_accuracy, choice_loss
from jchain.hub.opening import read_config
from jchain.hub.questions import load_choices
from jchain.hub.text import load_text

# The largest sizes of train, search, select, and test if no sizes are given. They are small because
# a layer call processes all sequences of a split.
SIZES = (64, 32, 32, 64)
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
      OSError, ImportError: if the loader in `jchain.hub` raises it.
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
    if config.field is not None and not config.text:
        raise ValueError(f"expected --text with --field, got --field {config.field}")
    checkpoint, seed, sizes = config.checkpoint[0], config.seed, config.sizes
    most = None if sizes is not None else SIZES
    if config.data:
        data_dir = config.data_dir
        images = load_images(
            checkpoint, config.data, seed=seed, sizes=sizes, most=most, data_dir=data_dir
        )
        return EvalData(images)
    if config.choices:
        file, length = config.choices, config.length
        questions = load_choices(checkpoint, file, length=length, seed=seed, sizes=sizes, most=most)
        return EvalData(questions, choice_loss, choice_accuracy)
    files, length = require(config.text), config.length or _choose_length(checkpoint)
    text = load_text(
        checkpoint, files, length=length, seed=seed, sizes=sizes, most=most, field=config.field
    )
    if most is not None and [len(split.x) for split in text[:4]] == [*most]:
        print_progress(
            f"Text: {', '.join(map(str, SIZES))} sequences of {length} tokens in "
            f"{', '.join(SPLITS)}, drawn at random (--sizes sets their numbers)"
        )
    return EvalData(text)


def _choose_length(checkpoint: str) -> int:
    options, _ = read_config(find_model(checkpoint))
    positions = options.get("n_positions") or options.get("max_position_embeddings")
    # If the number of positions is not an integer, `load_text` rejects the model.
    return min(LENGTH, positions) if isinstance(positions, int) and positions > 0 else LENGTH


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
        pinned=(first, last),
        sublayers=config.sublayers,
        alternate=config.alternate,
    )
