"""What a model family describes: the modules of a model, and the names of their params in a file.

To add a family, write a module like `jchain.hub.gpt2`. It needs Flax modules `Stem`, `Block` and
`Head` whose params have the names and shapes of the tensors in the file, `MODEL_TYPES` (the values
of `model_type` that it supports), and `make_architecture(config)`, which asks for every option that
changes an output and returns an `Architecture`. Then add the module's name to `FAMILIES` in
`jchain/files.py`, so that checkpoints and saved banks find it, and a case to
`tests/hub/test_parity.py`, which compares its outputs with those of transformers.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike


class Architecture(NamedTuple):
    """The modules of a model, and how to find their params in a checkpoint.

    The params of a block are named as in the file, after `prefix` and `block_prefix`. The params of
    the stem and of the head are found through `stem_names` and `head_names`, which map each child
    module (or param that belongs to no child) to its name in the file. A name that starts with a
    slash is complete without the slash; `prefix` is added to the others.

    Attributes:
      stem: the embeddings.
      blocks: in the order of the model.
      head: the last norm and the output layer.
      prefix: start of all tensor names except those of the output layer. Files that were saved
        without an output layer may omit it.
      block_prefix: start of the tensor names of a block, after `prefix`; `{}` is the block's index.
      stem_names: from each child of the stem to its name in the file.
      head_names: from each child of the head to its name in the file. With tied embeddings the
        output layer has the name of the embeddings.
      unused_tensors: buffers that older files contain and that are ignored; `{}` is the index of
        a block.
      depth_option: the option of the config that counts the blocks.
      options_per_block: options of the config that list one entry for each block, with the
        entries of this model.
      is_tied_by_default: whether embeddings are tied if the config does not set
        `tie_word_embeddings`.
      vocab_size: number of tokens that the stem knows; None for models of images.
      example_shape: shape of an input that the stem accepts.
      example_dtype: dtype of such an input.
    """

    stem: nn.Module
    blocks: tuple[nn.Module, ...]
    head: nn.Module
    prefix: str
    block_prefix: str
    stem_names: dict[str, str]
    head_names: dict[str, str]
    unused_tensors: tuple[str, ...] = ()
    depth_option: str = "num_hidden_layers"
    options_per_block: Mapping[str, tuple[object, ...]] = MappingProxyType({})
    is_tied_by_default: bool = False
    vocab_size: int | None = None
    example_shape: tuple[int, ...] = (1, 1)
    example_dtype: DTypeLike = jnp.int32
