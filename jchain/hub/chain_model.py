"""A chain of pretrained blocks as a plain model: one stem, blocks in order, one head."""

import re
from collections.abc import Sequence
from typing import NamedTuple, cast

import flax.linen as nn
import jax
import numpy as np

from jchain._typing import PyTree
from jchain.bank import Bank
from jchain.hub.wrapping import Entries, Entry, Exit, Restart, Within


class ModelBlock(NamedTuple):
    """A block of a chain, with the model that it comes from."""

    source: str  # name of the model
    position: int  # index of the block in the model
    module: nn.Module
    params: PyTree


class ChainModel(NamedTuple):
    """The model that a chain computes, with no wrapped modules or unused embeddings."""

    stem: PyTree  # params of the embeddings
    blocks: list[ModelBlock]
    head: PyTree  # params of the last norm and the output layer
    stem_source: str  # name of the model that the embeddings come from
    head_source: str  # name of the model that the output layer comes from

    @property
    def dtype(self) -> str:
        """The dtype of the weights, under the name that NumPy and PyTorch share."""
        return jax.tree.leaves(self.blocks[0].params)[0].dtype.name


def unfold_chain(bank: Bank, tokens: Sequence[int], depth: int) -> ChainModel:
    """Make the model that a chain computes.

    Layers before a restart have no effect and are omitted. Pinned blocks are included.

    Args:
      bank: a bank that `load` or `load_many` returned.
      tokens: tokens of the chain, without padding.
      depth: number of blocks of the models that the bank was loaded from.

    Raises:
      ValueError: if a layer of the chain is not a block or a restart from `load` or `load_many`.
    """
    entry, blocks = _unfold_layers(bank, tokens[:-1])
    head_source = bank.names[tokens[-1]].rpartition("/")[0]
    first, stem, stem_source = _unfold_stem(bank, entry, head_source)
    head_module, head = bank.find(tokens[-1])[0].module, bank.get_params(tokens[-1])
    last = []
    if isinstance(head_module, Exit):
        start = depth - len(head_module.blocks)
        last = _unfold_pinned(head_source, start, head_module, head)
        head = head["head"]
    return ChainModel(stem, first + blocks + last, head, stem_source, head_source)


def _unfold_layers(bank: Bank, tokens: Sequence[int]) -> tuple[int, list[ModelBlock]]:
    """Find the index of the model whose embeddings the layers start from, and list the blocks."""
    entry, blocks = 0, []
    for token in tokens:
        module, params = bank.find(token)[0].module, bank.get_params(token)
        if isinstance(module, Restart):
            entry, blocks = _find_entry(params, bank.names[token]), []
            continue
        if isinstance(module, Within):
            module, params = module.block, params["block"]
        block = cast(nn.Module, module)  # checkpoints have linen modules only
        blocks.append(ModelBlock(*parse_block_name(bank.names[token]), block, params))
    return entry, blocks


def _find_entry(params: PyTree, name: str) -> int:
    """Find the index of the model whose embeddings a restart selects."""
    shares = np.asarray(params["shares"], np.float32)
    if sorted(shares) != [0.0] * (len(shares) - 1) + [1.0]:
        raise ValueError(
            f"expected {name} to be the embeddings of one model, got shares {shares.tolist()}"
        )
    return 1 + int(shares.argmax())


def _unfold_stem(bank: Bank, entry: int, head_source: str) -> tuple[list[ModelBlock], PyTree, str]:
    """List the pinned first blocks, the params of the embeddings, and the name of their model.

    If the stem does not record the name of its model, all models have the same embeddings, which
    are attributed to the model of the head.
    """
    stem, params = bank.stem, bank.stem_params
    if isinstance(stem, Entries):
        stem, params = stem.entries[entry], params[f"entries_{entry}"]
    if not isinstance(stem, Entry):
        return [], params, head_source
    return _unfold_pinned(stem.source, 0, stem, params), params["stem"], stem.source


def _unfold_pinned(
    source: str, start: int, module: Entry | Exit, params: PyTree
) -> list[ModelBlock]:
    """List the pinned blocks of a stem or a head, whose indices in the model begin at `start`."""
    return [
        ModelBlock(source, start + i, block, params[f"blocks_{i}"])
        for i, block in enumerate(module.blocks)
    ]


def parse_block_name(name: str) -> tuple[str, int]:
    """Parse the name of a block into the name of its model and its index in the model.

    Args:
      name: name of a block, such as `model/3`, or `model/3+14` for a copy.

    Raises:
      ValueError: if `name` is not the name of a block.
    """
    found = re.fullmatch(r"(.+)/(\d+)(\+\d+)*", name, re.DOTALL)
    if found is None:
        raise ValueError(f"expected the name of a block, such as model/3, got {name!r}")
    return found[1], int(found[2])
