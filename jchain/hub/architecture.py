"""What a family says of a checkpoint: its modules, and the tensors that are their params."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp


class Architecture(NamedTuple):
    """Modules whose params are called as in the file, but for what stands before their names.

    A place that begins with a slash is the name of a tensor's module as it stands, any other comes behind `base`.
    """

    stem: nn.Module
    blocks: tuple[nn.Module, ...]  # in the order of the model
    head: nn.Module
    base: str  # before all names but those of the output layer; a file of the bare model may leave it out
    block: str  # before the names of block {}
    stem_places: dict[str, str]  # from each child of the stem, or param of its own, to its place
    head_places: dict[
        str, str
    ]  # likewise of the head; with tied embeddings its output layer is where the stem's are
    unused: tuple[str, ...] = ()  # buffers that older files hold, {} for the number of a block
    depth_key: str = "num_hidden_layers"  # the option that counts the blocks
    per_block: Mapping[str, tuple[Any, ...]] = MappingProxyType(
        {}
    )  # options that may have an entry for each block, and these entries
    is_tied: bool = False  # of a file that does not say it
    vocabulary: int | None = None  # tokens that the stem takes; None for images
    example: tuple[int, ...] = (1, 1)  # shape of an input of the stem
    example_dtype: Any = jnp.int32
