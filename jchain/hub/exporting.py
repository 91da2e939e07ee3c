"""From a chain of a bank of blocks back to a checkpoint folder that `transformers` loads."""

import json
import os
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
from flax import traverse_util

from jchain import chain as chain_lib
from jchain._typing import Int, PyTree
from jchain.bank import Bank
from jchain.files import find_umask
from jchain.hub.architecture import Architecture
from jchain.hub.checkpoint import CONFIG, INDEX, WEIGHTS, read_json
from jchain.hub.places import describe, find_places
from jchain.hub.wrapping import Entries, Entry, Exit, Restart, Within, find_restarts

# Written anew, or of the weights as they were.
_OWN_FILES = (CONFIG, "README.md", "mergekit.yaml")
# The one folder that belongs to a tokenizer: chat templates by name.
_TEMPLATES = "additional_chat_templates"
_WEIGHT_SUFFIXES = (
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".h5", ".msgpack", ".onnx", ".gguf", ".ot", ".tflite", ".npz",
    ".index.json",
)  # fmt: skip


class Model(NamedTuple):
    """A chain as the model that it is: no wrapped modules, no embeddings that are left behind."""

    stem: PyTree
    blocks: list[
        tuple[str, int, nn.Module, PyTree]
    ]  # of each its model, its number in it, its module and its params
    head: PyTree
    sources: tuple[str, str]  # the models of its embeddings and of its output layer


def export(
    bank: Bank,
    chain: Int[np.ndarray, "L"] | Sequence[int] | Any,
    source: str | os.PathLike[str] | Mapping[str, str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    facts: dict[str, Any] | None = None,
    max_shard_size: int = 5 * 10**9,
) -> Path:
    """Write a chain as a checkpoint folder that `transformers` loads with `from_pretrained`.

    Blocks are numbered anew in the order of the chain; options of the config that count or list them follow. Tokenizer and
    other small files are copied. Beside them stand `mergekit.yaml`, the same as a passthrough merge, and a model card.

    Args:
      bank: of `jchain.hub.load` or `load_many`, its weights updated or not.
      chain: tokens, a head last; at least one block.
      source: the checkpoint folder that the bank came from, or of each model by name, where it came from several: config and
        small files are taken from the first, weights of none, and none are compared.
      out: the folder to write.
      facts: for the card, from what is told to its value: losses, data, the command.
      max_shard_size: bytes of a file of weights, at most, where more than one tensor is in it.

    Returns:
      `out`.

    Raises:
      FileExistsError: there is something at `out`.
      ValueError: `chain` is no chain of the bank, has no block, or the bank's params are not those of `source`'s family.
    """
    out = Path(out)
    if out.exists():
        raise FileExistsError(f"expected no folder at {out}, found one")
    if not isinstance(source, str | os.PathLike | Mapping):
        raise ValueError(f"expected a folder, or the folder of each model by name, got {source!r}")
    tokens = [
        int(t)
        for t in chain_lib.validate(np.asarray(chain), bank.num_layers, bank.num_heads)
        if t >= 0
    ]
    first = Path(source if isinstance(source, str | os.PathLike) else next(iter(source.values())))
    options = read_json(first / CONFIG)
    architecture = describe(options, str(first / CONFIG))
    model = unfold(bank, tokens, len(architecture.blocks))
    if not model.blocks:
        raise ValueError("expected a chain of at least one block, got a head alone")
    config = make_config(model, architecture, options, first)
    tensors = collect_tensors(model, config, str(first / CONFIG))
    _check_sources(model, source)
    changed = _find_changed(bank, tokens)
    paths = {
        name: str(source if isinstance(source, str | os.PathLike) else source.get(name, name))
        for name, *_ in model.blocks
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
    try:
        os.chmod(folder, 0o777 & ~find_umask())
        for path in sorted(first.iterdir()):
            if (
                path.is_file()
                and path.name not in _OWN_FILES
                and not path.name.endswith(_WEIGHT_SUFFIXES)
            ):
                shutil.copy(path, folder / path.name)
            elif path.is_dir() and path.name == _TEMPLATES:
                shutil.copytree(path, folder / path.name)
        (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        write_shards(folder, tensors, max_shard_size)
        (folder / "mergekit.yaml").write_text(make_recipe(model, paths, changed))
        (folder / "README.md").write_text(make_card(model, facts or {}, changed))
        os.rename(folder, out)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return out


def unfold(bank: Bank, tokens: Sequence[int], depth: int) -> Model:
    """The model that a chain is.

    Args:
      bank: of pretrained blocks.
      tokens: a chain.
      depth: blocks of the models that it came from.

    Raises:
      ValueError: a layer is none of those that `load` or `load_many` make.
    """
    modules = {
        token: group.module for group in (*bank.layers, *bank.heads) for token in group.tokens
    }
    entry = 0
    blocks: list[Any] = []
    for token in tokens[:-1]:
        module, params = modules[token], bank.get_params(token)
        if isinstance(module, Restart):
            shares = np.asarray(params["shares"], np.float32)
            if sorted(shares) != [0.0] * (len(shares) - 1) + [1.0]:
                raise ValueError(
                    f"expected {bank.names[token]} to be those of one model, got shares {shares.tolist()}"
                )
            entry, blocks = 1 + int(shares.argmax()), []
        else:
            source, place = find_position(bank.names[token])
            is_within = isinstance(module, Within)
            blocks.append(
                (
                    source,
                    place,
                    module.block if is_within else module,
                    params["block"] if is_within else params,
                )
            )
    head, params = modules[tokens[-1]], bank.get_params(tokens[-1])
    head_source = bank.names[tokens[-1]].rpartition("/")[0]
    stem, stem_params, stem_source = bank.stem, bank.stem_params, head_source
    if isinstance(stem, Entries):
        stem, stem_params = stem.entries[entry], stem_params[f"entries_{entry}"]
    if isinstance(stem, Entry):
        begin = zip(range(len(stem.blocks)), stem.blocks, _get_blocks(stem_params), strict=True)
        blocks = [(stem.source, *block) for block in begin] + blocks
        stem_params, stem_source = stem_params["stem"], stem.source
    if isinstance(head, Exit):
        end = zip(
            range(depth - len(head.blocks), depth), head.blocks, _get_blocks(params), strict=True
        )
        blocks += [(head_source, *block) for block in end]
        params = params["head"]
    return Model(stem_params, blocks, params, (stem_source, head_source))


def _get_blocks(params: PyTree) -> list[PyTree]:
    """Those of `Entry` or `Exit`, beside one part more."""
    return [params[f"blocks_{i}"] for i in range(len(params) - 1)]


def _check_sources(model: Model, source: Any) -> None:
    """That the folder of each model is known."""
    names = sorted({name for name, *_ in model.blocks} | set(model.sources))
    known = names[:1] if isinstance(source, str | os.PathLike) else [*source]
    if unknown := [name for name in names if name not in known]:
        raise ValueError(
            f"expected the folder of each model by name, {', '.join(names)}, got none of {', '.join(unknown)}"
        )


def _find_changed(bank: Bank, tokens: Sequence[int]) -> list[str]:
    """What of a chain has other weights than the checkpoint it came from."""
    versions = np.asarray(bank.get_versions())
    choices = find_restarts(bank)
    return sorted(
        {bank.names[token] for token in tokens if versions[token] > 0 and token not in choices}
    )


def make_config(
    model: Model, architecture: Architecture, options: dict[str, Any], source: Path
) -> dict[str, Any]:
    """The config of the source, for these blocks.

    Raises:
      ValueError: the blocks are not those of the source's config.
    """
    for name, place, module, _ in model.blocks:
        if place >= len(architecture.blocks) or architecture.blocks[place] != module:
            raise ValueError(f"expected a bank of the blocks of {source}, got {name}/{place}")
    config = options | {architecture.depth_key: len(model.blocks)}
    for key, values in architecture.per_block.items():
        if config.get(key) is not None or len(set(values)) > 1:
            config[key] = [values[place] for _, place, _, _ in model.blocks]
    if config.get("tie_word_embeddings", architecture.is_tied) and not share_embeddings(
        model, architecture
    ):
        config["tie_word_embeddings"] = False
    modules = tuple(module for _, _, module, _ in model.blocks)
    if describe(config, str(source)).blocks != modules:
        # What the config says by number is another block now.
        config |= {
            key: [values[place] for _, place, _, _ in model.blocks]
            for key, values in architecture.per_block.items()
        }
    if describe(config, str(source)).blocks != modules:
        raise ValueError(
            f"{source}: no config says that blocks are in this order, as it tells them apart by their number"
        )
    key = "torch_dtype" if "torch_dtype" in config else "dtype"
    return config | {key: find_dtype(model)}


def find_dtype(model: Model) -> str:
    """The dtype of the weights, by NumPy's name, which is torch's too."""
    return jax.tree.leaves(model.blocks[0][3])[0].dtype.name


def find_position(name: str) -> tuple[str, int]:
    """Model and number of a block by its name, `model/3`, or `model/3+14` of a copy.

    Raises:
      ValueError: it is the name of no block.
    """
    found = re.fullmatch(r"(.+)/(\d+)(\+\d+)*", name)
    if found is None:
        raise ValueError(f"expected the name of a block, as model/3, got {name!r}")
    return found[1], int(found[2])


def share_embeddings(model: Model, architecture: Architecture) -> bool:
    """Whether the output layer has the weights of the embeddings, where the config says that they are one."""
    leaves = [flatten(params) for params in (model.stem, model.head)]
    stem, _, last = find_places(architecture)
    names = {name: leaves[0][path] for path, name in stem.items()}
    return all(
        np.array_equal(names[name], leaves[1][path]) for path, name in last.items() if name in names
    )


def collect_tensors(model: Model, config: dict[str, Any], where: str) -> dict[str, np.ndarray]:
    """The tensors of the new checkpoint by name."""
    stem, blocks, head = find_places(describe(config, where))
    parts = [model.stem, *(params for *_, params in model.blocks), model.head]
    tensors: dict[str, np.ndarray] = {}
    for params, places in zip(parts, (stem, *blocks, head), strict=True):
        leaves = flatten(params)
        tensors |= {name: np.asarray(leaves[path]) for path, name in places.items()}
    return tensors


def flatten(params: PyTree) -> dict[str, Any]:
    """Params by path."""
    return traverse_util.flatten_dict(params, sep="/")


def write_shards(folder: Path, tensors: dict[str, np.ndarray], most: int) -> None:
    """One file, or as many as it takes, with an index."""
    from safetensors.numpy import save_file

    shards: list[dict[str, np.ndarray]] = [{}]
    for name, tensor in tensors.items():
        if shards[-1] and sum(other.nbytes for other in shards[-1].values()) + tensor.nbytes > most:
            shards.append({})
        shards[-1][name] = np.ascontiguousarray(tensor)
    names = (
        [WEIGHTS]
        if len(shards) == 1
        else [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    )
    for name, shard in zip(names, shards, strict=True):
        save_file(shard, folder / name, metadata={"format": "pt"})
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(tensor.nbytes for tensor in tensors.values())},
            "weight_map": {
                key: name for name, shard in zip(names, shards, strict=True) for key in shard
            },
        }
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def make_recipe(model: Model, paths: Mapping[str, str], changed: Sequence[str]) -> str:
    """The chain as a passthrough merge of mergekit, models by their paths. What it cannot say stands in comments."""
    runs: list[list[Any]] = []
    for name, place, _, _ in model.blocks:
        if runs and runs[-1][0] == name and runs[-1][2] == place:
            runs[-1][2] = place + 1
        else:
            runs.append([name, place, place + 1])
    lines = ["slices:"]
    if changed:
        lines.insert(
            0,
            f"# Not the same as the checkpoint beside it, in which {', '.join(changed)} have other weights.",
        )
    for part, source, name in zip(
        ("embeddings", "output layer"), model.sources, (runs[0][0], runs[-1][0]), strict=True
    ):
        if source != name:
            lines.insert(
                0,
                f"# Not the same as the checkpoint beside it, whose {part} come from {source}: mergekit takes {name}'s.",
            )
    for name, start, stop in runs:
        lines += [
            "  - sources:",
            f"      - model: {json.dumps(paths[name])}",
            f"        layer_range: [{start}, {stop}]",
        ]
    return "\n".join([*lines, "merge_method: passthrough", f"dtype: {find_dtype(model)}"]) + "\n"


def make_card(model: Model, facts: dict[str, Any], changed: Sequence[str]) -> str:
    """A model card: the chain and what is known of it."""
    rows = [f"| {name} | {value} |" for name, value in facts.items()]
    table = ["", "| | |", "|---|---|", *rows] if rows else []
    chain = " -> ".join(f"{name}/{place}" for name, place, _, _ in model.blocks)
    stem, head = model.sources
    told = f"Blocks in order: `{chain}`. Embeddings of {stem}, output layer of {head}."
    told += f" Trained on since: {', '.join(changed)}." if changed else ""
    lines = ["---", "library_name: transformers", "tags: [jchain]", "---", "", told, *table]
    return "\n".join(lines) + "\n"
