"""The description of a model: its modules, and the names of their params in a file.

To add a model family, write a module like `jchain.hub.gpt2`. It must define:

- Flax modules `Stem`, `Block`, and `Head`, whose params have the names and shapes of the tensors in
  the file;
- `MODEL_TYPES`, the values of `model_type` that the module supports;
- `make_architecture(config)`, which reads every option that changes an output, rejects the values
  that it does not support with `config.expect`, and returns an `Architecture`. Options that it does
  not read are ignored, so read the source of transformers for options that the family shares with
  no other.

`jchain.hub.decoder` has the parts of families that are built like Llama, and a new one of these
needs little more than its attention and its MLP. A block computes `x + attention_branch(x)`, then
the same with `mlp_branch`.

Then add the module's name to `FAMILIES` in `jchain/files/modules.py`, so that checkpoints and saved
banks find it. Also add cases to `tests/hub/test_parity.py`, which compares the family's outputs
with transformers' outputs, to `tests/hub/test_options.py`, which changes every option of its
config, and to `CONFIGS` in `tests/fuzz/targets.py`, which many tests run.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike


class FoldedScale(NamedTuple):
    """Factors of the first features of some params, which differ from block to block.

    Attributes:
      params: paths of the params in a block.
      size: number of features to multiply, along the last axis.
      scales: the factor of each block.
    """

    params: tuple[str, ...]
    size: int
    scales: tuple[float, ...]


class Architecture(NamedTuple):
    """The modules of a model, and how to find their params in a checkpoint.

    The params of a block are named as in the file, after `prefix` and `block_prefix`. The params of
    the stem and of the head are found through `stem_names` and `head_names`, which map each child
    module (or param that belongs to no child) to its name in the file. `prefix` is prepended to
    these names, except to a name that starts with a slash, which is used without the slash.

    Attributes:
      stem: the embeddings.
      blocks: the blocks, in the order of the model.
      head: the last norm and the output layer.
      prefix: start of all tensor names except the output layer's. Files that were saved
        without an output layer may omit this prefix.
      block_prefix: start of the tensor names of a block, after `prefix`; `{}` stands for the
        block's index.
      stem_names: map from each child of the stem to its name in the file.
      head_names: map from each child of the head to its name in the file. If embeddings are tied,
        the output layer has the name of the embeddings.
      unused_tensors: names of buffers that older files contain and that are ignored; `{}` stands
        for the index of a block.
      depth_option: name of the config option that holds the number of blocks.
      options_per_block: config options that list one entry for each block, with the entries of
        this model.
      indices_per_option: config options that list the indices of some blocks; for each block of
        this model, whether it is listed.
      fixed_options: config options of exported chains that differ from this model's, because their
        effect is part of the weights or of the options above.
      folded_scale: factors by which some weights are multiplied when they are read.
      is_tied_by_default: whether embeddings are tied if the config does not set
        `tie_word_embeddings`.
      has_transposed_maps: whether the weights of the affine maps of blocks are stored as
        `[inputs, outputs]`.
      vocab_size: number of tokens in the vocabulary; None for models of images.
      example_shape: shape of an input that the stem accepts.
      example_dtype: dtype of an input that the stem accepts.
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
    indices_per_option: Mapping[str, tuple[bool, ...]] = MappingProxyType({})
    fixed_options: Mapping[str, object] = MappingProxyType({})
    folded_scale: FoldedScale | None = None
    is_tied_by_default: bool = False
    has_transposed_maps: bool = False
    vocab_size: int | None = None
    example_shape: tuple[int, ...] = (1, 1)
    example_dtype: DTypeLike = jnp.int32
