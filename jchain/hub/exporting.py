"""Export a chain of a bank of blocks as a checkpoint folder that `transformers` loads."""

import json
import os
import secrets
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import numpy as np
from flax import traverse_util

from jchain import chain as chain_lib
from jchain._typing import Array, Int, PyTree
from jchain.arguments import checked
from jchain.bank import Bank
from jchain.hub.architecture import Architecture
from jchain.hub.chain_model import ChainModel, unfold_chain
from jchain.hub.checkpoint import CONFIG, INDEX, WEIGHTS, JsonObject, read_json
from jchain.hub.families import make_architecture
from jchain.hub.model_card import make_card, make_mergekit_recipe
from jchain.hub.tensor_names import get_names
from jchain.hub.wrapping import find_restarts

CARD, RECIPE = "README.md", "mergekit.yaml"
# Files that are not copied from the source, because they are generated.
_OWN_FILES = (CONFIG, CARD, RECIPE)
# The only folder that can belong to a tokenizer; it holds chat templates by name.
_TEMPLATES = "additional_chat_templates"
# Endings of files that are not copied from the source, because they contain its weights.
_WEIGHT_SUFFIXES = (
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".h5", ".msgpack", ".onnx", ".gguf",
    ".ot", ".tflite", ".npz", ".index.json",
)  # fmt: skip

Source = str | os.PathLike[str] | Mapping[str, str | os.PathLike[str]]


@checked
def export(
    bank: Bank,
    chain: Int[Array, "L"] | Int[np.ndarray, "L"] | Sequence[int],
    source: Source,
    out: str | os.PathLike[str],
    *,
    facts: Mapping[str, object] | None = None,
    max_shard_size: int = 5 * 10**9,
) -> Path:
    """Write a chain as a checkpoint folder that `transformers` loads with `from_pretrained`.

    The blocks are numbered in the order of the chain, and the config options that count or list
    blocks are adapted. The tokenizer and other small files are copied. The folder also contains a
    model card and `mergekit.yaml`, which describes the chain as a passthrough merge.

    Args:
      bank: a bank that `jchain.hub.load` or `load_many` returned; its weights may have been updated
        since.
      chain: tokens of at least one block, then of a head; padding is allowed.
      source: the checkpoint folder that the bank was loaded from or, for a bank of several models,
        a map from the name of each model to its folder. The config and small files are read from
        the first folder. No weights are read.
      out: the folder to write, which must not exist.
      facts: rows of the model card, as a map from label to value, such as losses, data, or the
        command; None for no rows.
      max_shard_size: maximum number of bytes in one file of weights; a file with a single tensor
        may be larger.

    Returns:
      `out` as a `Path`.

    Raises:
      FileExistsError: if `out` exists.
      ValueError: if `chain` is not a chain of the bank or has no block, the blocks of the bank do
        not match the config in `source`, `source` has no folder for one of the models, or a small
        file is a link that leads out of its folder.
    """
    out = Path(out)
    if out.exists():
        raise FileExistsError(f"{out} already exists; choose another output folder")
    if not isinstance(source, str | os.PathLike | Mapping):
        raise ValueError(f"expected a folder, or the folder of each model by name, got {source!r}")
    valid = chain_lib.validate(np.asarray(chain), bank.num_layers, bank.num_heads)
    tokens = [int(token) for token in valid if token != chain_lib.PADDING]
    first = Path(next(iter(source.values())) if isinstance(source, Mapping) else source)
    options = read_json(first / CONFIG)
    small_files = _list_small_files(first)
    architecture = make_architecture(options, str(first / CONFIG))
    model = unfold_chain(bank, tokens, len(architecture.blocks))
    if not model.blocks:
        raise ValueError("expected a chain of at least one block, got a head alone")
    config = make_config(model, architecture, options, first)
    tensors = collect_tensors(model, config, str(first / CONFIG))
    paths = _get_paths(model, source)
    changed = _list_changed(bank, tokens)
    texts = {
        CONFIG: json.dumps(config, indent=2) + "\n",
        RECIPE: make_mergekit_recipe(model, paths, changed),
        CARD: make_card(model, facts or {}, changed),
    }
    _write_folder(out, first, small_files, texts, tensors, max_shard_size)
    return out


def _get_paths(model: ChainModel, source: Source) -> dict[str, str]:
    """Return the folder of each model that is part of the chain, by name."""
    used = {block.source for block in model.blocks} | {model.stem_source, model.head_source}
    names = sorted(used)
    known = source if isinstance(source, Mapping) else {names[0]: source}
    if unknown := [name for name in names if name not in known]:
        raise ValueError(
            f"expected the folder of each model by name, {', '.join(names)}, got none of "
            f"{', '.join(unknown)}"
        )
    return {name: str(known[name]) for name in names}


def _list_changed(bank: Bank, tokens: Sequence[int]) -> list[str]:
    """List the names of the chain's layers and head that were trained after loading."""
    versions = np.asarray(bank.get_versions())
    trained = {token for token in tokens if versions[token] > 0}
    return sorted({bank.names[token] for token in trained - find_restarts(bank)})


def _write_folder(
    out: Path,
    source: Path,
    small_files: Sequence[Path],
    texts: Mapping[str, str],
    tensors: dict[str, np.ndarray],
    max_shard_size: int,
) -> None:
    """Write the folder under a temporary name, then rename it, so that `out` is never partial."""
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = out.parent / f".{out.name}.{secrets.token_hex(4)}"
    folder.mkdir()
    try:
        _copy_files(small_files, source, folder)
        write_shards(folder, tensors, max_shard_size)
        for name, text in texts.items():
            (folder / name).write_text(text)
        os.rename(folder, out)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _list_small_files(source: Path) -> list[Path]:
    """List the tokenizer and all other files that do not contain weights.

    A link may lead to a file of the folder, or of the blobs of a Hugging Face cache that the folder
    is a snapshot of.

    Raises:
      ValueError: if a link leads elsewhere, for example to a private file.
    """
    paths = [
        path
        for path in [*source.iterdir(), *(source / _TEMPLATES).glob("*")]
        if path.is_file() and path.name not in _OWN_FILES
        if not path.name.endswith(_WEIGHT_SUFFIXES)
    ]
    root = source.resolve()
    places = [root]
    if root.parent.name == "snapshots":
        places.append(root.parent.parent / "blobs")
    for path in paths:
        if not any(path.resolve().is_relative_to(place) for place in places):
            raise ValueError(
                f"expected only files of {source} to copy, got {path.relative_to(source)}, a link "
                f"to {path.resolve()}: replace it by a copy if the file belongs to the model"
            )
    return sorted(paths)


def _copy_files(paths: Sequence[Path], source: Path, folder: Path) -> None:
    for path in paths:
        copy = folder / path.relative_to(source)
        copy.parent.mkdir(exist_ok=True)
        shutil.copy(path, copy)


def make_config(
    model: ChainModel, architecture: Architecture, options: JsonObject, source: Path
) -> JsonObject:
    """Make the config of a chain from the config of its source.

    Args:
      model: the model that the chain computes.
      architecture: the architecture of the source.
      options: content of the source's config.json.
      source: folder of the source, for error messages.

    Raises:
      ValueError: if the blocks are not the source's, or no config can describe their order.
    """
    for block in model.blocks:
        known = architecture.blocks
        if block.position >= len(known) or known[block.position] != block.module:
            raise ValueError(
                f"expected a bank of the blocks of {source}, got {block.source}/{block.position}"
            )
    config = options | {architecture.depth_option: len(model.blocks)}
    config |= dict(architecture.fixed_options)
    for key, has_option in architecture.indices_per_option.items():
        config[key] = [i for i, block in enumerate(model.blocks) if has_option[block.position]]
    per_block = {
        key: [values[block.position] for block in model.blocks]
        for key, values in architecture.options_per_block.items()
    }
    for key, values in architecture.options_per_block.items():
        if config.get(key) is not None or len(set(values)) > 1:
            config[key] = per_block[key]
    is_tied = config.get("tie_word_embeddings", architecture.is_tied_by_default)
    if is_tied and not has_tied_embeddings(model, architecture):
        config["tie_word_embeddings"] = False
    modules = tuple(block.module for block in model.blocks)
    if make_architecture(config, str(source)).blocks != modules:
        # Without these lists, options such as max_window_layers would select blocks by new index.
        config |= per_block
    if make_architecture(config, str(source)).blocks != modules:
        raise ValueError(
            f"{source}: expected blocks in an order that a config can describe, got an order that "
            "conflicts with options that select blocks by index"
        )
    key = "torch_dtype" if "torch_dtype" in config else "dtype"
    return config | {key: model.dtype}


def has_tied_embeddings(model: ChainModel, architecture: Architecture) -> bool:
    """Check whether all params that the architecture ties to the embeddings are equal to them.

    Args:
      model: the model that a chain computes.
      architecture: the architecture of its source.
    """
    stem, head = _flatten(model.stem), _flatten(model.head)
    names = get_names(architecture)
    embeddings = {name: stem[path] for path, name in names.stem.items()}
    return all(
        np.array_equal(embeddings[name], head[path])
        for path, name in names.head.items()
        if name in embeddings
    )


def collect_tensors(model: ChainModel, config: JsonObject, location: str) -> dict[str, np.ndarray]:
    """Collect the tensors of the exported checkpoint by name.

    Args:
      model: the model that the chain computes.
      config: the config of the chain, which `make_config` returned.
      location: path of the source's config, for error messages.
    """
    names = get_names(make_architecture(config, location))
    parts = [model.stem, *(block.params for block in model.blocks), model.head]
    tensors: dict[str, np.ndarray] = {}
    for params, part_names in zip(parts, names.flatten(), strict=True):
        leaves = _flatten(params)
        tensors |= {name: np.asarray(leaves[path]) for path, name in part_names.items()}
    return tensors


def _flatten(params: PyTree) -> dict[str, jax.Array]:
    """Flatten params into a map from path to leaf."""
    return traverse_util.flatten_dict(params, sep="/")  # pyright: ignore[reportReturnType]


def write_shards(folder: Path, tensors: dict[str, np.ndarray], max_shard_size: int) -> None:
    """Write tensors to one file, or to several with an index.

    Args:
      folder: the folder to write to.
      tensors: the tensors by name.
      max_shard_size: maximum number of bytes in a file; a file with a single tensor may be larger.
    """
    from safetensors.numpy import save_file

    shards: list[dict[str, np.ndarray]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > max_shard_size:
            shards.append({})
            size = 0
        shards[-1][name] = np.ascontiguousarray(tensor)
        size += tensor.nbytes
    num = len(shards)
    names = [f"model-{i + 1:05}-of-{num:05}.safetensors" for i in range(num)]
    if num == 1:
        names = [WEIGHTS]
    for name, shard in zip(names, shards, strict=True):
        save_file(shard, folder / name, metadata={"format": "pt"})
    if num > 1:
        weight_map = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
        total_size = sum(tensor.nbytes for tensor in tensors.values())
        index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
