"""From a chain of a bank of blocks back to a checkpoint folder that `transformers` loads."""

import json
import os
import re
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import traverse_util

from jchain import chain as chain_lib
from jchain._typing import Int, PyTree
from jchain.bank import Bank
from jchain.files import find_umask
from jchain.hub.architecture import Architecture
from jchain.hub.checkpoint import CONFIG, INDEX, WEIGHTS, Checkpoint
from jchain.hub.loading import describe, find_places

# Written anew, or of the weights as they were.
_OWN_FILES = (CONFIG, "README.md", "mergekit.yaml")
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".onnx", ".gguf", ".index.json")


def export(
    bank: Bank,
    chain: Int[np.ndarray, "L"] | Sequence[int] | Any,
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    facts: dict[str, Any] | None = None,
    max_shard_size: int = 5 * 10**9,
) -> Path:
    """Write a chain as a checkpoint folder that `transformers` loads with `from_pretrained`.

    Blocks are numbered anew in the order of the chain; options of the config that count or list them follow. Tokenizer and
    other small files are copied. Beside them stand `mergekit.yaml`, the same as a passthrough merge, and a model card.

    Args:
      bank: of `jchain.hub.load`, its weights updated or not.
      chain: tokens, a head last; at least one block.
      source: the checkpoint folder that the bank came from: its config and its small files are taken from there.
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
    tokens = [int(t) for t in chain_lib.validate(np.asarray(chain), bank.num_layers, bank.num_heads) if t >= 0]
    if len(tokens) < 2:
        raise ValueError("expected a chain of at least one block, got a head alone")
    checkpoint = Checkpoint(source)
    config = make_config(bank, tokens, checkpoint)
    tensors = collect_tensors(bank, tokens, config, str(checkpoint.path / CONFIG))
    sources = {find_position(bank.names[tokens[0]])[0]: str(source)}
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
    try:
        os.chmod(folder, 0o777 & ~find_umask())
        for path in sorted(checkpoint.path.iterdir()):
            if path.is_file() and path.name not in _OWN_FILES and not path.name.endswith(_WEIGHT_SUFFIXES):
                shutil.copy(path, folder / path.name)
        (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        write_shards(folder, tensors, max_shard_size)
        (folder / "mergekit.yaml").write_text(make_recipe(bank, tokens, sources))
        (folder / "README.md").write_text(make_card(bank, tokens, facts or {}))
        os.rename(folder, out)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return out


def make_config(bank: Bank, tokens: Sequence[int], checkpoint: Checkpoint) -> dict[str, Any]:
    """The config of the source, for these blocks.

    Raises:
      ValueError: the bank's modules are not those of the source's config.
    """
    architecture = describe(checkpoint.config, str(checkpoint.path / CONFIG))
    positions = [find_position(bank.names[token])[1] for token in tokens[:-1]]
    modules = {token: group.module for group in (*bank.layers, *bank.heads) for token in group.tokens}
    if any(
        i >= len(architecture.blocks) or architecture.blocks[i] != modules[t]
        for i, t in zip(positions, tokens[:-1], strict=True)
    ):
        raise ValueError(f"expected a bank of the blocks of {checkpoint.path}, got {bank.names[tokens[0]]} and others")
    config = checkpoint.config | {architecture.depth_key: len(positions)}
    for key, values in architecture.per_block.items():
        if config.get(key) is not None or len(set(values)) > 1:
            config[key] = [values[i] for i in positions]
    if config.get("tie_word_embeddings", architecture.is_tied) and not share_embeddings(bank, tokens[-1], architecture):
        config["tie_word_embeddings"] = False
    return config


def find_position(name: str) -> tuple[str, int]:
    """Model and number of a block by its name, `model/3`, or `model/3+14` of a copy.

    Raises:
      ValueError: it is the name of no block.
    """
    found = re.fullmatch(r"(.+)/(\d+)(\+\d+)*", name)
    if found is None:
        raise ValueError(f"expected the name of a block, as model/3, got {name!r}")
    return found[1], int(found[2])


def share_embeddings(bank: Bank, head: int, architecture: Architecture) -> bool:
    """Whether the output layer has the weights of the embeddings, where the config says that they are one."""
    leaves = [flatten(params) for params in (bank.stem_params, bank.get_params(head))]
    stem, _, last = find_places(architecture)
    names = {name: leaves[0][path] for path, name in stem.items()}
    return all(np.array_equal(names[name], leaves[1][path]) for path, name in last.items() if name in names)


def collect_tensors(bank: Bank, tokens: Sequence[int], config: dict[str, Any], where: str) -> dict[str, np.ndarray]:
    """The tensors of the new checkpoint by name."""
    stem, blocks, head = find_places(describe(config, where))
    parts = [bank.stem_params, *(bank.get_params(token) for token in tokens)]
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
            "weight_map": {key: name for name, shard in zip(names, shards, strict=True) for key in shard},
        }
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def make_recipe(bank: Bank, tokens: Sequence[int], sources: dict[str, str]) -> str:
    """The chain as a passthrough merge of mergekit."""
    runs: list[list[Any]] = []
    for token in tokens[:-1]:
        model, place = find_position(bank.names[token])
        if runs and runs[-1][0] == model and runs[-1][2] == place:
            runs[-1][2] = place + 1
        else:
            runs.append([model, place, place + 1])
    lines = ["slices:"]
    for model, start, stop in runs:
        path = json.dumps(sources.get(model, model))
        lines += ["  - sources:", f"      - model: {path}", f"        layer_range: [{start}, {stop}]"]
    dtype = jax.tree.leaves(bank.layers[0].params)[0].dtype.name
    return "\n".join([*lines, "merge_method: passthrough", f"dtype: {dtype}"]) + "\n"


def make_card(bank: Bank, tokens: Sequence[int], facts: dict[str, Any]) -> str:
    """A model card: the chain and what is known of it."""
    rows = [f"| {name} | {value} |" for name, value in facts.items()]
    table = ["", "| | |", "|---|---|", *rows] if rows else []
    chain = " -> ".join(bank.names[token] for token in tokens)
    lines = ["---", "library_name: transformers", "tags: [jchain]", "---", "", f"Blocks in order: `{chain}`", *table]
    return "\n".join(lines) + "\n"
