"""Banks from checkpoint folders: of one model, several models, or a model with random weights."""

import dataclasses
import math
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import flax.linen as nn
import psutil
from jax.typing import DTypeLike

from jchain._typing import Array, Key
from jchain.arguments import checked
from jchain.bank import Bank
from jchain.hub.architecture import Architecture
from jchain.hub.assembling import Source, assemble_bank
from jchain.hub.checkpoint import CONFIG, Checkpoint
from jchain.hub.families import make_architecture, read_architecture
from jchain.hub.folding import fold_scales
from jchain.hub.tensor_names import check_tensors, find_prefix, get_names, get_shapes
from jchain.hub.weights import RandomWeights
from jchain.pytree import describe_type


@partial(checked, but=("path", "pinned"))
def load(
    path: str | os.PathLike[str],
    *,
    dtype: DTypeLike | None = None,
    name: str | None = None,
    pinned: tuple[int, int] = (0, 0),
) -> Bank:
    """Load a pretrained transformer as a bank of its blocks.

    The layers are the blocks in order, named `name/0`, `name/1`, and so on. The stem is the
    embeddings, and the head is the last norm and the output layer. The chain of the tokens `0..n`,
    which are all blocks and the head, is the original model; it is also the parent of the bank.
    Weights keep the layout of the file. docs/transformers.md lists the supported families, such as
    GPT-2, Llama, Mistral, Qwen, Gemma, Phi-3, OLMo, SmolLM3, GPT-NeoX, and ViT.

    The first and the last block of a trained transformer can seldom be replaced by other blocks, so
    they can be pinned. Pinned blocks are in every chain. They have no token, belong to the stem and
    to the head, and cost no layer calls.

    Args:
      path: folder with config.json and model.safetensors, or with shards and
        model.safetensors.index.json.
      dtype: dtype of the weights; if None, the dtype of the file.
      name: name of the model; if None, the name of the folder.
      pinned: how many blocks to pin at the start and at the end.

    Raises:
      FileNotFoundError: if the folder or one of its files is missing.
      ValueError: if a file is damaged, the family or an option of the config is not supported, a
        tensor is missing, is not part of the model, has a wrong shape, or has a dtype other than
        float32, bfloat16, or float16, or if all blocks are pinned.
    """
    return assemble_bank([_open(path, name)], dtype, pinned)


@partial(checked, but=("pinned",))
def load_many(
    paths: Sequence[str | os.PathLike[str]],
    *,
    dtype: DTypeLike | None = None,
    names: Sequence[str] | None = None,
    pinned: tuple[int, int] = (0, 0),
) -> Bank:
    """Load several checkpoints of one architecture as one bank.

    The checkpoints can be fine-tunes of one model, or snapshots of its training. The layers are the
    blocks of the first model, named `a/0`, `a/1`, and so on, followed by the blocks of the other
    models. Each model has a head. The parents of the bank are the original models.

    If the models differ in their embeddings, or in the blocks that are pinned after them, every
    chain begins with the first model's. In this case, each other model has an additional layer,
    `b/embeddings`, whose token follows the tokens of all blocks. It replaces the result so far
    with the embeddings of its model, so it belongs at the beginning of a chain, as in the parents.
    Activations then contain the embeddings of all models.

    Args:
      paths: the checkpoint folders.
      dtype: dtype of the weights; if None, the dtype of the files.
      names: names of the models; if None, the names of the folders.
      pinned: numbers of blocks of each model to pin at the beginning and at the end, as in `load`.

    Raises:
      ValueError: if `paths` is not a list or is empty, `names` does not have one name for each
        path, two models have the same name, architectures differ, or `load` would raise it.
      FileNotFoundError: if a folder or one of its files is missing.
    """
    for name, given in (("paths", paths), ("names", names)):
        if isinstance(given, str | os.PathLike):
            raise ValueError(f"expected a list of {name}, got {os.fspath(given)!r}")
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
            f"expected checkpoints with different names, got {', '.join(found)}; set names=[...]"
        )
    for source in sources[1:]:
        _check_same_architecture(sources[0], source)
    return assemble_bank(sources, dtype, pinned)


@partial(checked, but=("pinned",))
def random_bank(
    key: Key[Array, ""],
    path: str | os.PathLike[str],
    *,
    name: str = "model",
    pinned: tuple[int, int] = (0, 0),
) -> Bank:
    """Make the bank of an untrained transformer, with random weights in float32.

    The bank can be trained, or compared with the bank of a trained transformer.

    Args:
      key: the PRNG key for the initializers.
      path: folder with config.json; weights in the folder are not read.
      name: name of the model.
      pinned: how many blocks to pin at the start and at the end, as in `load`.

    Raises:
      FileNotFoundError: if config.json is missing.
      ValueError: if the family or an option of the config is not supported, all blocks are pinned,
        or the model does not fit into memory.
    """
    architecture = read_architecture(path)
    _check_size(architecture, str(Path(path) / CONFIG))
    names = get_names(architecture)
    weights = fold_scales(RandomWeights(key, architecture, names), architecture, names)
    return assemble_bank([Source(name, weights, architecture, names)], None, pinned)


def _check_size(architecture: Architecture, location: str) -> None:
    """Refuse new weights that do not fit into memory."""
    found = get_shapes(architecture)
    parts = (found.stem, *found.blocks, found.head)
    num_bytes = 4 * sum(math.prod(shape) for part in parts for shape in part.values())
    memory = psutil.virtual_memory().total
    if num_bytes > memory:
        raise ValueError(
            f"{location}: expected a model that fits into memory, {memory / 2**30:.1f} GiB, got "
            f"one with {num_bytes / 2**30:.1f} GiB of weights"
        )


def _open(path: str | os.PathLike[str], name: str | None) -> Source:
    """Open and check a checkpoint, which is named after its folder if no name is given."""
    if not isinstance(path, str | os.PathLike):
        raise ValueError(
            f"expected the path of one checkpoint, got {describe_type(path)}; "
            "jc.hub.load_many takes several"
        )
    checkpoint = Checkpoint(path)
    location, num_tensors = str(checkpoint.path / CONFIG), len(checkpoint.shapes)
    architecture = make_architecture(checkpoint.config, location, num_tensors)
    prefix = find_prefix(architecture, checkpoint)
    check_tensors(architecture, checkpoint, prefix)
    names = get_names(architecture, prefix)
    weights = fold_scales(checkpoint, architecture, names)
    return Source(name or checkpoint.path.resolve().name, weights, architecture, names)


def _check_same_architecture(first: Source, other: Source) -> None:
    """Check that the stem, the blocks, and the heads of two models have the same modules."""
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
    """Describe the first difference between two lists of modules by its value in each of them."""
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
