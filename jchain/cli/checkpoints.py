"""The options of `jchain search --checkpoint`, as bank, data and loss."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jchain.bank import Bank
from jchain.data import Dataset
from jchain.hub.checkpoint import CONFIG, read_json
from jchain.hub.datasets import choice_accuracy, choice_loss, load_choices, load_images, load_text
from jchain.hub.loading import load_many
from jchain.hub.wrapping import Restart

# Examples of train, search, select and test where no sizes are given, at most: a layer call is of all sequences of a split.
SIZES = (64, 64, 64, 256)
# Tokens of a sequence where no length is given, or as many as the model has positions.
LENGTH = 128
KINDS = ("text", "choices", "data")


class Task(NamedTuple):
    """What chains of pretrained blocks are searched for."""

    data: Dataset
    options: dict[str, Any]  # of `Problem`: how it is judged


def load_task(config: Mapping[str, Any]) -> Task:
    """Splits and loss, by the first checkpoint.

    Raises:
      ValueError: not one of text, choices and data is given, or as the function that reads them.
      FileNotFoundError, OSError, ImportError: likewise.
    """
    given = [kind for kind in KINDS if config.get(kind)]
    if len(given) != 1:
        raise ValueError(
            f"expected one of --text, --choices and --data with --checkpoint, got {', '.join(given) or 'none'}"
        )
    checkpoint, seed, sizes = config["checkpoint"][0], config["seed"], config.get("sizes")
    length = config.get("length")
    if length is not None and (length < 1 or config.get("data")):
        raise ValueError(f"expected --length of at least 1, and none with --data, got {length}")
    if config.get("data"):
        most = None if sizes is not None else SIZES
        data_dir = config.get("data_dir")
        return Task(
            load_images(
                checkpoint, config["data"], seed, sizes=sizes, most=most, data_dir=data_dir
            ),
            {},
        )
    if config.get("choices"):

        def read(sizes: Any) -> Dataset:
            return load_choices(
                checkpoint, config["choices"], length=length, seed=seed, sizes=sizes
            )

        return Task(_cap(read, sizes), {"loss_fn": choice_loss, "accuracy_fn": choice_accuracy})

    options = read_json(Path(checkpoint) / CONFIG)
    positions = options.get("n_positions") or options.get("max_position_embeddings")
    # One that is no number is refused by `load_text`.
    default = min(LENGTH, positions) if isinstance(positions, int) and positions > 0 else LENGTH

    def read(sizes: Any) -> Dataset:
        return load_text(
            checkpoint, config["text"], length=length or default, seed=seed, sizes=sizes
        )

    return Task(_cap(read, sizes), {})


def _cap(read: Any, sizes: Any) -> Dataset:
    if sizes is not None:
        return read(sizes)
    data = read(None)
    splits = {
        name: type(batch)(batch.x[:most], batch.y[:most])
        for name, batch, most in zip(
            ("train", "search", "select", "test"), data[:4], SIZES, strict=True
        )
    }
    return data._replace(**splits)


def load_bank(config: Mapping[str, Any]) -> Bank:
    """The blocks of the checkpoints.

    Raises:
      As `jchain.hub.load_many`.
    """
    return load_many(
        config["checkpoint"],
        dtype=config.get("dtype") and jnp.dtype(config["dtype"]),
        names=name_models(config["checkpoint"]),
        pinned=tuple(config["pinned"]),
    )


def name_models(paths: list[str]) -> list[str]:
    """The last parts of the paths, as many as it takes to tell them apart."""
    parts = [Path(os.path.abspath(path)).parts for path in paths]
    for num in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-num:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    raise ValueError(f"expected different checkpoints, got {', '.join(map(str, paths))}")


def price_layers(bank: Bank, cost: float) -> Any:
    """The price of a layer, or where there are embeddings, which are no block and have none, of each layer."""
    if cost == 0 or not any(isinstance(group.module, Restart) for group in bank.layers):
        return cost
    prices = np.full(bank.num_layers, cost, np.float32)
    for group in bank.layers:
        if isinstance(group.module, Restart):
            prices[list(group.tokens)] = 0.0
    return prices
