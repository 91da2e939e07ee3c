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
from jchain.hub.adapter import Adapter, find_model, has_adapter, locate_base
from jchain.hub.architecture import Architecture
from jchain.hub.assembling import Source, Split, assemble_bank
from jchain.hub.checkpoint import CONFIG
from jchain.hub.families import make_architecture, read_architecture
from jchain.hub.folding import fold_scales
from jchain.hub.locating import ADAPTER_CONFIG, Location, choose_names, locate
from jchain.hub.opening import open_checkpoint
from jchain.hub.tensor_names import check_tensors, find_names, find_tied, get_names, get_shapes
from jchain.hub.tokenizing import compare_tokenizers, find_tokenizer
from jchain.hub.weights import RandomWeights, Weights
from jchain.pytree import describe_type

# A model whose vocabulary differs from the first model's by more rows is refused.
_MOST_ROWS = 1024


@partial(checked, but=("path", "pinned"))
def load(
    path: str | os.PathLike[str],
    *,
    adapter: str | os.PathLike[str] | None = None,
    dtype: DTypeLike | None = None,
    name: str | None = None,
    pinned: tuple[int, int] = (0, 0),
    sublayers: bool = False,
    alternate: bool = False,
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
      path: a folder with config.json and model.safetensors, or with shards and
        model.safetensors.index.json; a GGUF file, or a folder with one; the name of a model of the
        Hugging Face hub, `owner/name` or `owner/name@revision`, which is downloaded once; or a LoRA
        adapter, which names its model.
      adapter: a LoRA adapter to merge into the weights, as a folder or a name of the hub; None for
        none.
      dtype: dtype of the weights; if None, the dtype of the file, which is float32 for a GGUF file
        that is quantized or has tensors of several types.
      name: name of the model; if None, the name of the folder, the file, or the model of the hub.
      pinned: how many blocks to pin at the start and at the end.
      sublayers: whether the attention and the MLP of each block are layers of their own, named
        `name/0/attention`, `name/0/mlp`, and so on. They have separate residual branches, so a
        chain may drop, repeat, or reorder them apart.
      alternate: whether attention and MLP must alternate in a chain, beginning with attention, as
        in the model; only with `sublayers`.

    Raises:
      FileNotFoundError: if the checkpoint or one of its files is missing.
      ImportError: if a package is needed that is not installed: huggingface_hub for names of the
        hub, gguf for GGUF files.
      ValueError: if a file is damaged, the family or an option of the config is not supported, a
        tensor is missing, is not part of the model, has a wrong shape, or has a dtype other than
        float32, bfloat16, or float16, the folder has a model and an adapter, the adapter is not a
        plain LoRA of the model, all blocks are pinned, or `sublayers` is set for a model that
        applies attention and MLP in parallel.
    """
    if not isinstance(path, str | os.PathLike):
        raise ValueError(
            f"expected the path of one checkpoint, got {describe_type(path)}; "
            "jc.hub.load_many takes several"
        )
    location = locate(path)
    source = _open(location, name or location.name, adapter)
    return assemble_bank([source], dtype, Split(pinned, sublayers, alternate))


@partial(checked, but=("pinned",))
def load_many(
    paths: Sequence[str | os.PathLike[str]],
    *,
    dtype: DTypeLike | None = None,
    names: Sequence[str] | None = None,
    pinned: tuple[int, int] = (0, 0),
    sublayers: bool = False,
    alternate: bool = False,
) -> Bank:
    """Load several checkpoints of one architecture as one bank.

    The checkpoints can be fine-tunes of one model, LoRA adapters of it, or snapshots of its
    training. The layers are the blocks of the first model, named `a/0`, `a/1`, and so on, followed
    by the blocks of the other models. Each model has a head. The parents of the bank are the
    original models.

    If the models differ in their embeddings, or in the blocks that are pinned after them, every
    chain begins with the first model's. In this case, each other model has an additional layer,
    `b/embeddings`, whose token follows the tokens of all blocks. It replaces the result so far
    with the embeddings of its model, so it belongs at the beginning of a chain, as in the parents.
    Activations then contain the embeddings of all models.

    A model whose vocabulary has another size than the first model's, by a few tokens, contributes
    only its blocks: it has no embeddings, no head, and no parent.

    Args:
      paths: the checkpoints, each as in `load`.
      dtype: dtype of the weights; if None, the dtype of the files.
      names: names of the models; if None, the names as in `load`, preceded by what is needed to
        distinguish them.
      pinned: numbers of blocks of each model to pin at the beginning and at the end, as in `load`.
      sublayers: as in `load`.
      alternate: as in `load`.

    Raises:
      ValueError: if `paths` is not a list or is empty, `names` does not have one name for each
        path, two models have the same name, architectures or tokenizers differ, or `load` would
        raise it.
      FileNotFoundError, ImportError: if `load` would raise it.
    """
    for name, given in (("paths", paths), ("names", names)):
        if isinstance(given, str | os.PathLike):
            raise ValueError(f"expected a list of {name}, got {os.fspath(given)!r}")
    if len(paths) == 0:
        raise ValueError("expected at least one checkpoint, got none")
    if names is not None and len(names) != len(paths):
        raise ValueError(f"expected a name for each of {len(paths)} checkpoints, got {len(names)}")
    locations = [locate(path) for path in paths]
    names = choose_names(locations) if names is None else names
    if len(set(names)) < len(names):
        raise ValueError(f"expected different names, got {', '.join(names)}")
    sources = [_open(location, name) for location, name in zip(locations, names, strict=True)]
    _check_same_tokenizer([find_model(path) for path in paths])
    sources[1:] = [_compare(sources[0], source) for source in sources[1:]]
    return assemble_bank(sources, dtype, Split(pinned, sublayers, alternate))


@partial(checked, but=("pinned",))
def random_bank(
    key: Key[Array, ""],
    path: str | os.PathLike[str],
    *,
    name: str = "model",
    pinned: tuple[int, int] = (0, 0),
    sublayers: bool = False,
    alternate: bool = False,
) -> Bank:
    """Make the bank of an untrained transformer, with random weights in float32.

    The bank can be trained, or compared with the bank of a trained transformer.

    Args:
      key: the PRNG key for the initializers.
      path: folder with config.json, a GGUF file, or a name of the Hugging Face hub; weights are not
        read.
      name: name of the model.
      pinned: how many blocks to pin at the start and at the end, as in `load`.
      sublayers: as in `load`.
      alternate: as in `load`.

    Raises:
      FileNotFoundError: if config.json is missing.
      ValueError: if the family or an option of the config is not supported, all blocks are pinned,
        or the model does not fit into memory.
    """
    path = locate(path).path
    architecture = read_architecture(path)
    _check_size(architecture, os.fspath(path))
    names = get_names(architecture)
    weights = fold_scales(RandomWeights(key, architecture, names), architecture, names)
    source, split = Source(name, weights, architecture, names), Split(pinned, sublayers, alternate)
    return assemble_bank([source], None, split)


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


def _open(location: Location, name: str, adapter: str | os.PathLike[str] | None = None) -> Source:
    """Open and check a checkpoint, and merge an adapter if one is given or the checkpoint is one.

    Args:
      location: where the checkpoint is.
      name: name of the model.
      adapter: the adapter to merge, if the checkpoint is not one.
    """
    merged = None if adapter is None else Adapter(locate(adapter).path)
    if has_adapter(location.path) and (location.path / CONFIG).exists():
        if merged is None:
            raise ValueError(
                f"expected a model or an adapter in {location.path}, got both {CONFIG} and "
                f"{ADAPTER_CONFIG}: to merge the adapter, pass adapter={str(location.path)!r}; to "
                "leave it out, move it to another folder"
            )
    elif has_adapter(location.path):
        if merged is not None:
            raise ValueError(f"expected a model to merge {merged.path} into, got {location.path}")
        merged = Adapter(location.path)
        location = locate_base(merged)
    checkpoint = open_checkpoint(location.path)
    architecture = make_architecture(checkpoint.config, checkpoint.location, len(checkpoint.shapes))
    names = find_names(architecture, checkpoint)
    check_tensors(architecture, checkpoint, names)
    weights: Weights = checkpoint
    if merged is not None:
        blocks = {tensor for block in names.blocks for tensor in block.values()}
        transposed = frozenset(blocks) if architecture.has_transposed_maps else frozenset()
        weights = merged.merge(checkpoint, transposed, find_tied(names))
    return Source(name, fold_scales(weights, architecture, names), architecture, names)


def _check_same_tokenizer(models: Sequence[Path]) -> None:
    """Check that models encode text alike, except for tokens that one has in addition."""
    known = [path for path in map(find_tokenizer, models) if path is not None]
    for path in known[1:]:
        found = compare_tokenizers(known[0], path)
        if found.kind == "different":
            raise ValueError(
                f"expected checkpoints with the same tokenizer, got {known[0]} and {path}, which "
                f"differ in {found.difference}"
            )


def _compare(first: Source, other: Source) -> Source:
    """Check that two models have the same modules.

    Returns:
      The other model, without embeddings and head if its vocabulary has another size.
    """
    sizes = [source.architecture.vocab_size for source in (first, other)]
    if sizes[0] is not None and sizes[1] is not None and 0 < abs(sizes[0] - sizes[1]) <= _MOST_ROWS:
        own, theirs = first.architecture, other.architecture
        first, other = (
            source._replace(architecture=source.architecture._replace(stem=stem, head=head))
            for source, stem, head in (
                (first, own.stem.copy(vocabulary=0), own.head.copy(vocabulary=0)),
                (other, theirs.stem.copy(vocabulary=0), theirs.head.copy(vocabulary=0)),
            )
        )
        _check_same_architecture(first, other)
        return other._replace(architecture=theirs, has_ends=False)
    _check_same_architecture(first, other)
    return other


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
