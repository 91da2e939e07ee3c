"""Export a chain of a bank of blocks as a checkpoint folder that `transformers` loads."""

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from flax import traverse_util

from jchain import chain as chain_lib
from jchain._typing import Array, Int, PyTree
from jchain.arguments import check_integers, checked
from jchain.bank import Bank
from jchain.hub.adapter import find_model
from jchain.hub.architecture import Architecture
from jchain.hub.chain_model import ChainModel, unfold_chain
from jchain.hub.checkpoint import CONFIG, JsonObject
from jchain.hub.export_folder import check_out, write_folder
from jchain.hub.families import make_architecture
from jchain.hub.gguf_header import Header
from jchain.hub.gguf_tokenizer import TOKENIZER, make_tokenizer_files
from jchain.hub.merge_recipe import make_mergekit_recipe
from jchain.hub.model_card import make_card
from jchain.hub.opening import find_gguf, read_config
from jchain.hub.origins import find_origin
from jchain.hub.small_files import clean_options, read_licenses, read_small_files
from jchain.hub.tensor_names import get_names
from jchain.hub.wrapping import find_restarts

CARD, RECIPE = "README.md", "mergekit.yaml"

Source = str | os.PathLike[str] | Mapping[str, str | os.PathLike[str]]


class _Base(NamedTuple):
    """What an export takes from its first source."""

    options: JsonObject  # of config.json
    location: str  # of the options, for error messages
    small_files: dict[str, bytes]  # content by name


@checked
def export(
    bank: Bank,
    chain: Int[Array, "L"] | Int[np.ndarray, "L"] | Sequence[int],
    source: Source,
    out: str | os.PathLike[str],
    *,
    facts: Mapping[str, object] | None = None,
    scores: Mapping[str, Mapping[str, object]] | None = None,
    max_shard_size: int = 5 * 10**9,
) -> Path:
    """Write a chain as a checkpoint folder that `transformers` loads with `from_pretrained`.

    The blocks are numbered in the order of the chain. If attention and MLP are layers of their own,
    each attention and the MLP that follows it become one block, and an attention or an MLP that
    stands alone becomes a block whose other part has zero weights. The config options that count
    or list blocks are adapted. The files of the tokenizer and of the license, and the settings of
    generation and of images are copied, and nothing else. The folder also contains a model card and
    `mergekit.yaml`, which describes the chain as a passthrough merge.

    The files have the permissions of the umask. Paths of this machine are only in `mergekit.yaml`,
    for models that are not from the Hugging Face Hub's cache.

    Args:
      bank: a bank that `jchain.hub.load` or `load_many` returned; its weights may have been updated
        since.
      chain: tokens of at least one block, then of a head; padding is allowed.
      source: what the bank was loaded from, as in `load`: a checkpoint folder, a GGUF file, a name
        on the Hugging Face hub, or an adapter. For a bank of several models, a map from the name of
        each model to its source. The config, the tokenizer, and small files are read from the first
        one, and licenses from all. No weights are read.
      out: the folder to write, which must not exist.
      facts: rows of a table of the model card, as a map from label to value, such as the data or
        the command; None for no table.
      scores: rows of another table: a map from label to a map from column to value, as in
        `{"this chain": {"loss": 3.2}, "original": {"loss": 2.9}}`; None for no table.
      max_shard_size: maximum number of bytes in one file of weights; a file with a single tensor
        may be larger.

    Returns:
      `out` as a `Path`.

    Raises:
      FileExistsError: if `out` exists.
      ValueError: if `chain` is not a chain of the bank or has no block, the blocks of the bank do
        not match the config in `source`, `source` has no folder for one of the models, a small
        file is damaged or a link that leads out of its folder, or `out` cannot be made.
      OSError: if there is not enough space, or a file cannot be written. Nothing is left then.
    """
    out = Path(out)
    check_out(out)
    check_integers(at_least=1, at_most=2**62, max_shard_size=max_shard_size)
    valid = chain_lib.validate(np.asarray(chain), bank.num_layers, bank.num_heads)
    tokens = [int(token) for token in valid if token != chain_lib.PADDING]
    first = _read_base(next(iter(_list_given(source).values())))
    architecture = make_architecture(first.options, first.location)
    model = unfold_chain(bank, tokens, architecture)
    if not model.blocks:
        raise ValueError("expected a chain of at least one block, got a head alone")
    config = make_config(model, architecture, first.options, first.location)
    tensors = collect_tensors(model, config, first.location)
    folders = _find_folders(model, source)
    small_files = first.small_files | _read_other_licenses(folders, first.small_files)
    origins = {name: find_origin(*found) for name, found in folders.items()}
    changed, depth = _list_changed(bank, tokens), len(architecture.blocks)
    texts = {
        CONFIG: json.dumps(config, indent=2) + "\n",
        RECIPE: make_mergekit_recipe(
            model, origins, changed, _list_changed_options(config, architecture)
        ),
        CARD: make_card(
            model,
            origins,
            depth,
            name=out.name,
            facts=facts or {},
            scores=scores or {},
            changed=changed,
            usage=_list_classes(architecture, small_files),
        ),
    }
    encoded = {name: text.encode("utf-8", "backslashreplace") for name, text in texts.items()}
    write_folder(out, small_files | encoded, tensors, max_shard_size)
    return out


def _list_given(source: Source) -> dict[str, str | os.PathLike[str]]:
    """List what was given for each model by name; a single one has no name."""
    if isinstance(source, str | os.PathLike):
        return {"": source}
    if not isinstance(source, Mapping) or not source:
        raise ValueError(f"expected a folder, or the folder of each model by name, got {source!r}")
    return dict(source)


def _read_base(given: str | os.PathLike[str]) -> "_Base":
    """Read what an export takes from its first source."""
    path = find_model(given)
    options, location = read_config(path)
    small_files = read_small_files(path) if path.is_dir() else {}
    file = find_gguf(path)
    if file is not None and TOKENIZER not in small_files:
        texts = make_tokenizer_files(Header(file))
        small_files |= {name: text.encode() for name, text in texts.items()}
    return _Base(options, location, small_files)


def _find_folders(model: ChainModel, source: Source) -> dict[str, tuple[str, Path]]:
    """Find what was given for each model that is part of the chain, and its folder, by name."""
    used = set().union(*(block.sources for block in model.blocks))
    used |= {model.stem_source, model.head_source}
    names, known = sorted(used), _list_given(source)
    if not isinstance(source, Mapping):
        known = {names[0]: known[""]}
    if unknown := [name for name in names if name not in known]:
        raise ValueError(
            f"expected the folder of each model by name, {', '.join(names)}, got none of "
            f"{', '.join(unknown)}"
        )
    return {name: (os.fspath(known[name]), find_model(known[name])) for name in names}


def _read_other_licenses(
    folders: Mapping[str, tuple[str, Path]], small_files: Mapping[str, bytes]
) -> dict[str, bytes]:
    """Read the licenses that the other models have in addition to those of the first one."""
    known, others = set(small_files.values()), {}
    for model_name, (_, folder) in folders.items():
        if not folder.is_dir():
            continue
        for name, content in read_licenses(folder).items():
            if content not in known:
                safe = re.sub(r"[^\w.-]", "_", model_name)
                others[f"{Path(name).stem}_{safe}{Path(name).suffix}"] = content
    return others


def _list_classes(architecture: Architecture, small_files: Iterable[str]) -> list[str]:
    """List the classes of transformers that load an exported folder."""
    if architecture.vocab_size is None:
        is_complete = "preprocessor_config.json" in small_files
        return ["AutoModelForImageClassification", *["AutoImageProcessor"] * is_complete]
    is_complete = any(name.startswith(("tokenizer.", "vocab.", "spiece.")) for name in small_files)
    return ["AutoModelForCausalLM", *["AutoTokenizer"] * is_complete]


def _list_changed(bank: Bank, tokens: Sequence[int]) -> list[str]:
    """List the names of the chain's layers and head that were trained after loading."""
    versions = np.asarray(bank.get_versions())
    trained = {token for token in tokens if versions[token] > 0}
    return sorted({bank.names[token] for token in trained - find_restarts(bank)})


def _list_changed_options(config: JsonObject, architecture: Architecture) -> list[str]:
    """List the options with an entry per block that differ from those of the first blocks."""
    num = config[architecture.depth_option]
    return [
        key
        for key, values in architecture.options_per_block.items()
        if key in config and config[key] != list(values[:num])
    ]


def make_config(
    model: ChainModel, architecture: Architecture, options: JsonObject, location: str
) -> JsonObject:
    """Make the config of a chain from the config of its source.

    Args:
      model: the model that the chain computes.
      architecture: the architecture of the source.
      options: content of the source's config.json.
      location: path of the source's config, for error messages.

    Raises:
      ValueError: if the blocks are not the source's, or no config can describe their order.
    """
    for block in model.blocks:
        known = architecture.blocks
        if block.position >= len(known) or known[block.position] != block.module:
            raise ValueError(f"expected a bank of the blocks of {location}, got {block.label}")
    config = clean_options(options) | {architecture.depth_option: len(model.blocks)}
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
    if make_architecture(config, location).blocks != modules:
        # Without these lists, options such as max_window_layers would select blocks by new index.
        config |= per_block
    if make_architecture(config, location).blocks != modules:
        raise ValueError(
            f"{location}: expected blocks in an order that a config can describe, got an order "
            "that conflicts with options that select blocks by index"
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
