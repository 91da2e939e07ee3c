"""Load banks from checkpoint folders: one model, several of one architecture, or random weights."""

import dataclasses
import os
from collections.abc import Sequence

import flax.linen as nn
from jax.typing import DTypeLike

from jchain._typing import Array, Key
from jchain.bank import Bank
from jchain.hub.architecture import Architecture
from jchain.hub.assembling import Source, assemble_bank
from jchain.hub.checkpoint import CONFIG, Checkpoint
from jchain.hub.families import make_architecture, read_architecture
from jchain.hub.tensor_names import check_tensors, find_names, find_prefix
from jchain.hub.weights import RandomWeights


def load(
    path: str | os.PathLike[str],
    *,
    dtype: DTypeLike | None = None,
    name: str | None = None,
    pinned: tuple[int, int] = (0, 0),
) -> Bank:
    """Load a pretrained transformer as a bank of its blocks.

    The layers are the blocks in order. The chain of all blocks and the head, tokens `0..n`, is the
    original model, which is also the bank's parent. Layers are named `name/0`, `name/1` and so on.
    The stem is the embeddings, and the head is the last norm and the output layer. Weights keep the
    layout of the file. Supported families are GPT-2, Llama (also Mistral, Qwen2 and Qwen3),
    GPT-NeoX and ViT.

    The first and the last block of a trained transformer can seldom be replaced by others. Pinned
    blocks are in every chain. They have no token, belong to the stem and to the head, and cost no
    layer calls.

    Args:
      path: folder with config.json and model.safetensors, or with shards and
        model.safetensors.index.json.
      dtype: of the weights; that of the file if None.
      name: of the model; that of the folder if None.
      pinned: how many blocks are pinned at the beginning and at the end.

    Raises:
      FileNotFoundError: the folder or one of its files is missing.
      ValueError: a file is damaged, the family or an option of the config is not supported, a
        tensor is missing, is not part of the model, has a wrong shape or a dtype other than
        float32, bfloat16 and float16, or no block is left that is not pinned.
    """
    return assemble_bank([_open(path, name)], dtype, pinned)


def load_many(
    paths: Sequence[str | os.PathLike[str]],
    *,
    dtype: DTypeLike | None = None,
    names: Sequence[str] | None = None,
    pinned: tuple[int, int] = (0, 0),
) -> Bank:
    """Load several checkpoints of one architecture as one bank.

    The checkpoints are fine-tunes of one model, or snapshots of its training. The layers are the
    blocks of the first model, `a/0`, `a/1` and so on, then those of the other models. Each model
    has a head. The bank's parents are the original models.

    If embeddings differ, or blocks that are pinned after them, every chain begins with those of the
    first model. Each other model then has one more layer after all blocks, `b/embeddings`, which
    replaces the result so far with the embeddings of its model. It belongs at the beginning of a
    chain, as in the parents. Activations then contain the embeddings of all models.

    Args:
      paths: of the folders.
      dtype: of the weights; that of the files if None.
      names: of the models; those of the folders if None.
      pinned: how many blocks of each model are pinned at the beginning and at the end, as in
        `load`.

    Raises:
      ValueError: `paths` is empty, two models have the same name, architectures differ, or as in
        `load`.
      FileNotFoundError: a folder or one of its files is missing.
    """
    if len(paths) == 0:
        raise ValueError("expected at least one checkpoint, got none")
    if names is not None and len(names) != len(paths):
        raise ValueError(f"expected a name for each of {len(paths)} checkpoints, got {len(names)}")
    sources = [
        _open(path, name) for path, name in zip(paths, names or [None] * len(paths), strict=True)
    ]
    found = [source.name for source in sources]
    if len(set(found)) < len(found):
        raise ValueError(
            f"expected checkpoints of different names, got {', '.join(found)}: pass names="
        )
    for source in sources[1:]:
        _check_same_architecture(sources[0], source)
    return assemble_bank(sources, dtype, pinned)


def init(
    key: Key[Array, ""],
    path: str | os.PathLike[str],
    *,
    name: str = "model",
    pinned: tuple[int, int] = (0, 0),
) -> Bank:
    """Make the bank of an untrained transformer, with random weights in float32.

    It can be trained, or compared with a trained one.

    Args:
      key: for the initializers.
      path: folder with config.json; weights in it are not read.
      name: of the model.
      pinned: how many blocks are pinned at the beginning and at the end, as in `load`.

    Raises:
      FileNotFoundError: config.json is missing.
      ValueError: the family or an option of the config is not supported, or no block is left that
        is not pinned.
    """
    architecture = read_architecture(path)
    names = find_names(architecture)
    weights = RandomWeights(key, architecture, names)
    return assemble_bank([Source(name, weights, architecture, names)], None, pinned)


def _open(path: str | os.PathLike[str], name: str | None) -> Source:
    """A checked checkpoint, named after its folder if no name is given."""
    checkpoint = Checkpoint(path)
    architecture = make_architecture(checkpoint.config, str(checkpoint.path / CONFIG))
    prefix = find_prefix(architecture, checkpoint)
    check_tensors(architecture, checkpoint, prefix)
    names = find_names(architecture, prefix)
    return Source(name or checkpoint.path.resolve().name, checkpoint, architecture, names)


def _check_same_architecture(first: Source, other: Source) -> None:
    """Check that the stem, the blocks and the heads of two models have the same modules."""
    own, theirs = (_list_modules(source.architecture) for source in (first, other))
    for part, modules in own.items():
        if modules != theirs[part]:
            expected, got = _describe_difference(modules, theirs[part])
            raise ValueError(
                f"expected checkpoints with the same {part}, got {got} in {other.weights.path} "
                f"and {expected} in {first.weights.path}"
            )


def _list_modules(architecture: Architecture) -> dict[str, tuple[nn.Module, ...]]:
    return {
        "stem": (architecture.stem,),
        "blocks": architecture.blocks,
        "head": (architecture.head,),
    }


def _describe_difference(
    modules: tuple[nn.Module, ...], others: tuple[nn.Module, ...]
) -> tuple[str, str]:
    """The first difference between two lists of modules: its value in each of them."""
    if len(modules) != len(others):
        return f"{len(modules)} blocks", f"{len(others)} blocks"
    module, other = next((a, b) for a, b in zip(modules, others, strict=True) if a != b)
    if type(module) is not type(other):
        name, other_name = (f"{type(m).__module__}.{type(m).__name__}" for m in (module, other))
        return name, other_name
    fields = [field.name for field in dataclasses.fields(module)]
    name = next(
        name
        for name in fields
        if name not in ("name", "parent") and getattr(module, name) != getattr(other, name)
    )
    return f"{name}={getattr(module, name)!r}", f"{name}={getattr(other, name)!r}"
