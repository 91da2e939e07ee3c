"""Attention and MLP of a block as two layers, for blocks that apply them one after the other."""

from collections.abc import Sequence
from typing import NamedTuple

import flax.linen as nn

from jchain.hub.tensor_names import TensorNames, get_param_paths

ATTENTION, MLP = "attention", "mlp"
KINDS = (ATTENTION, MLP)
# A layer reads the first stage and writes the second. So attention and MLP alternate.
ALTERNATING_STAGES = {ATTENTION: (0, 1), MLP: (1, 0)}


class Part(NamedTuple):
    """A block, or the attention or the MLP of a block."""

    module: nn.Module
    position: int  # index of the block in the model
    kind: str | None = None  # one of `KINDS`; None for a whole block

    @property
    def label(self) -> str:
        """The part's name after that of its model, such as `3` or `3/mlp`."""
        return str(self.position) if self.kind is None else f"{self.position}/{self.kind}"

    @property
    def description(self) -> str:
        """The part in words, such as `block 3` or `mlp of block 3`."""
        block = f"block {self.position}"
        return block if self.kind is None else f"{self.kind} of {block}"

    @property
    def stages(self) -> tuple[int, int]:
        """The stages that the part reads and writes if attention and MLP alternate."""
        return (0, 0) if self.kind is None else ALTERNATING_STAGES[self.kind]


def list_parts(blocks: Sequence[nn.Module], free: range, *, is_split: bool) -> list[Part]:
    """List the layers that blocks give.

    Args:
      blocks: the blocks of a model.
      free: indices of the blocks to use.
      is_split: whether attention and MLP of each block are layers of their own.

    Raises:
      ValueError: if the blocks apply attention and MLP in parallel.
    """
    if not is_split:
        return [Part(blocks[i], i) for i in free]
    return [
        Part(module, i, kind)
        for i in free
        for kind, module in zip(KINDS, split_block(blocks[i]), strict=True)
    ]


def split_block(block: nn.Module) -> tuple[nn.Module, nn.Module]:
    """Return the attention and the MLP of a block, each with its norms and its residual branch.

    The two modules, applied one after the other, compute the block.

    Args:
      block: the block. Its class has the fields `has_attention` and `has_mlp`.

    Raises:
      ValueError: if the block applies attention and MLP in parallel.
    """
    if getattr(block, "is_parallel", False) or not hasattr(block, "has_mlp"):
        family = type(block).__module__.rpartition(".")[2]
        raise ValueError(
            "expected blocks that apply attention and MLP one after the other, as sublayers=True "
            f"needs, got blocks of {family} that apply them in parallel"
        )
    return block.copy(has_mlp=False), block.copy(has_attention=False)


def join_parts(part: nn.Module) -> nn.Module:
    """Return the block that an attention or an MLP was split from.

    Args:
      part: a module that `split_block` returned.
    """
    return part.copy(has_attention=True, has_mlp=True)


def select_names(part: Part, names: TensorNames, features: int) -> TensorNames:
    """Select the tensors of a part of a block.

    Args:
      part: the part.
      names: map from each param of the block to the name of its tensor.
      features: width of the activations between blocks.
    """
    if part.kind is None:
        return names
    return {path: names[path] for path in get_param_paths(part.module, features)}
