"""From a checkpoint folder to a bank: blocks stacked as they lie in the file, embeddings as stem, the output layer as head."""

import dataclasses
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jchain._typing import Array, Key, PyTree
from jchain.bank import Bank
from jchain.groups import LayerGroup
from jchain.hub.architecture import Architecture
from jchain.hub.checkpoint import CONFIG, Checkpoint
from jchain.hub.places import (
    Leaves,
    check_tensors,
    describe,
    find_base,
    find_places,
    find_shapes,
    read_architecture,
)
from jchain.hub.reading import Reader, Untrained, choose_dtype
from jchain.hub.wrapping import Entries, Entry, Exit, Restart, Within


class Source(NamedTuple):
    """One checkpoint, and which of its tensors is which param."""

    name: str
    checkpoint: Checkpoint | Untrained
    architecture: Architecture
    stem: Leaves
    blocks: list[Leaves]
    head: Leaves


def load(
    path: str | os.PathLike[str],
    *,
    dtype: Any = None,
    name: str | None = None,
    pinned: tuple[int, int] = (0, 0),
) -> Bank:
    """The bank of a pretrained transformer.

    Layers are its blocks in order, so that the tokens `0..n-1` and the head `n` are the model as it was, which is also the
    bank's parent; they are called `name/0`, `name/1` and so on. The stem is its embeddings, the head its last norm and
    output layer. Weights keep the layout of the file. Families: GPT-2, Llama (with Mistral, Qwen2, Qwen3), GPT-NeoX, ViT.

    The first and the last block of a trained transformer are seldom interchangeable with others. Blocks that are `pinned` are
    in every chain and are no tokens: they belong to the stem and to the head, and cost no layer calls.

    Args:
      path: a folder with config.json and model.safetensors, or shards with model.safetensors.index.json.
      dtype: of the weights; that of the file when None.
      name: of the model; that of the folder when None.
      pinned: how many blocks every chain begins and ends with.

    Raises:
      FileNotFoundError: the folder or a file of it is missing.
      ValueError: a file is damaged, the family or an option of the config is not supported, tensors are missing, or there are
        others than the config asks for, or of another shape, or of a dtype other than float32, bfloat16 and float16; or there
        are not more blocks than are pinned.
    """
    return _assemble([_open(path, name)], dtype, pinned)


def load_many(
    paths: Sequence[str | os.PathLike[str]],
    *,
    dtype: Any = None,
    names: Sequence[str] | None = None,
    pinned: tuple[int, int] = (0, 0),
) -> Bank:
    """One bank of several checkpoints of one architecture: fine-tunes of a model, or snapshots of its training.

    Layers are the blocks of the first model, `a/0`, `a/1` and so on, then those of the others; each model has a head. Where
    embeddings differ (or blocks that are pinned behind them), a chain begins with those of the first model, and for each
    other model there is one more layer behind all blocks, `b/embeddings`, that puts its embeddings in place of all that was
    computed: it belongs at the beginning of a chain, as in the parents, which are the models as they were. Activations
    hold the embeddings of all models then.

    Args:
      paths: of the folders.
      dtype: as for `load`.
      names: of the models; those of the folders when None.
      pinned: as for `load`.

    Raises:
      ValueError: there is no path, names repeat, checkpoints differ in what their configs say of the model, or as `load`.
      FileNotFoundError: as `load`.
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
        _check_alike(sources[0], source)
    return _assemble(sources, dtype, pinned)


def init(
    key: Key[Array, ""],
    path: str | os.PathLike[str],
    *,
    name: str = "model",
    pinned: tuple[int, int] = (0, 0),
) -> Bank:
    """The bank of a transformer that was not trained: random weights in float32, to train it, or to compare with.

    Args:
      key: of the weights.
      path: a folder with config.json; weights in it are not looked at.
      name: of the model.
      pinned: as for `load`.

    Raises:
      FileNotFoundError: there is no config.json.
      ValueError: the family or an option of the config is not supported, or there are not more blocks than are pinned.
    """
    architecture = read_architecture(path)
    places = find_places(architecture)
    return _assemble(
        [Source(name, Untrained(key, architecture, places), architecture, *places)], None, pinned
    )


def _open(path: str | os.PathLike[str], name: str | None) -> Source:
    checkpoint = Checkpoint(path)
    architecture = describe(checkpoint.config, str(checkpoint.path / CONFIG))
    base = find_base(architecture, checkpoint)
    check_tensors(architecture, checkpoint, base)
    return Source(
        name or checkpoint.path.resolve().name,
        checkpoint,
        architecture,
        *find_places(architecture, base),
    )


def _check_alike(first: Source, other: Source) -> None:
    """That blocks, embeddings and output layers of two checkpoints are of the same modules."""
    one, two = first.architecture, other.architecture
    for part in ("stem", "blocks", "head"):
        if getattr(one, part) != getattr(two, part):
            raise ValueError(
                f"expected checkpoints of one architecture, but the {part} of {other.checkpoint.path} is "
                f"{_describe_difference(getattr(two, part), getattr(one, part))} in {first.checkpoint.path}"
            )


def _describe_difference(module: Any, other: Any) -> str:
    if isinstance(module, tuple):
        if len(module) != len(other):
            return f"{len(module)}, and {len(other)}"
        module, other = next((a, b) for a, b in zip(module, other, strict=True) if a != b)
    if type(module) is not type(other):
        return f"{type(module).__module__}.{type(module).__name__}, and {type(other).__module__}.{type(other).__name__}"
    fields = [
        field.name for field in dataclasses.fields(module) if field.name not in ("name", "parent")
    ]
    name = next(name for name in fields if getattr(module, name) != getattr(other, name))
    return f"of {name} {getattr(module, name)!r}, and of {getattr(other, name)!r}"


def _assemble(sources: list[Source], dtype: Any, pinned: tuple[int, int]) -> Bank:
    """The bank of all sources, whose architectures are alike."""
    architecture = sources[0].architecture
    depth = len(architecture.blocks)
    first, last = pinned
    if first < 0 or last < 0 or first + last >= depth:
        raise ValueError(
            f"expected fewer pinned blocks than the {depth} of the model, at least 0, got {pinned}"
        )
    found = {
        source.checkpoint.dtypes[name]
        for source in sources
        for leaves in (source.stem, *source.blocks, source.head)
        for name in leaves.values()
    }
    read = Reader(
        choose_dtype(found, dtype, ", ".join(str(source.checkpoint.path) for source in sources))
    )
    blocks = architecture.blocks
    begin, middle, end = blocks[:first], blocks[first : depth - last], blocks[depth - last :]
    features = find_shapes(architecture)[3]

    # Heads before embeddings, which may be the same tensors: so the stack is read, and the embeddings are a part of it.
    is_wrapped = last > 0 or len(sources) > 1
    places = [
        (
            source.checkpoint,
            _prefix_all({"head": source.head}, source.blocks[depth - last :])
            if is_wrapped
            else source.head,
        )
        for source in sources
    ]
    heads = read.stack(places)
    entries = [
        read.one(source.checkpoint, _prefix_all({"stem": source.stem}, source.blocks[:first]))
        for source in sources
    ]
    has_choice = any(not _is_same(entries[0], other) for other in entries[1:])
    modules = [_make_entry(architecture, begin, source.name) for source in sources]
    if has_choice:
        stem = Entries(tuple(modules))
        stem_params = {f"entries_{m}": params for m, params in enumerate(entries)}
    elif first:
        stem, stem_params = modules[0], entries[0]
    else:
        stem, stem_params = architecture.stem, entries[0]["stem"]
    exit_ = Exit(architecture.head, tuple(block.clone() for block in end), features)

    layers = _stack_layers(read, sources, middle, first, features, has_choice=has_choice)
    num_layers = sum(len(group.tokens) for group in layers)
    tokens = tuple(range(num_layers, num_layers + len(sources)))
    names, origins = _name(sources, range(first, depth - last), has_choice=has_choice)
    return Bank(
        layers=layers,
        heads=(LayerGroup(heads, exit_ if is_wrapped else architecture.head, tokens),),
        stem_params=stem_params,
        stem=stem,
        names=names,
        origins=origins,
        parents=_find_parents(len(sources), len(middle), has_choice=has_choice),
    )


def _stack_layers(
    read: Reader,
    sources: list[Source],
    blocks: tuple[nn.Module, ...],
    first: int,
    features: int,
    *,
    has_choice: bool,
) -> tuple[LayerGroup, ...]:
    """The blocks of all sources, from `first` on, a group for each module, and where they are a choice their embeddings."""
    layers, size = [], len(blocks)
    for module in dict.fromkeys(blocks):
        members = [(m, i) for m in range(len(sources)) for i in range(size) if blocks[i] == module]
        params = read.stack(
            [(sources[m].checkpoint, sources[m].blocks[first + i]) for m, i in members]
        )
        tokens = tuple(m * size + i for m, i in members)
        wrapped = ({"block": params}, Within(module, features)) if has_choice else (params, module)
        layers.append(LayerGroup(*wrapped, tokens))
    if has_choice:
        num = len(sources) * size
        shares = jnp.eye(len(sources) - 1, dtype=jax.tree.leaves(layers[0].params)[0].dtype)
        layers.append(
            LayerGroup({"shares": shares}, Restart(features), tuple(range(num, num + len(shares))))
        )
    return tuple(layers)


def _name(
    sources: list[Source], blocks: range, *, has_choice: bool
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names and origins of all tokens."""
    architecture = sources[0].architecture
    depth, family = len(architecture.blocks), architecture.stem.__module__.rpartition(".")[2]
    parts = [
        (f"{s.name}/{i}", f"block {i} of {depth}, {family} checkpoint {s.name}")
        for s in sources
        for i in blocks
    ]
    if has_choice:
        parts += [
            (f"{s.name}/embeddings", f"embeddings of {family} checkpoint {s.name}")
            for s in sources[1:]
        ]
    parts += [(f"{s.name}/head", f"head of {family} checkpoint {s.name}") for s in sources]
    names, origins = zip(*parts, strict=True)
    return names, origins


def _find_parents(num_sources: int, size: int, *, has_choice: bool) -> tuple[tuple[int, ...], ...]:
    """Each model as it was: its embeddings, where they are a choice and it is not the first, its blocks, and its head."""
    num_blocks = num_sources * size
    num_layers = num_blocks + (num_sources - 1 if has_choice else 0)
    starts = [() if m == 0 or not has_choice else (num_blocks + m - 1,) for m in range(num_sources)]
    return tuple(
        (*start, *range(m * size, (m + 1) * size), num_layers + m) for m, start in enumerate(starts)
    )


def _make_entry(architecture: Architecture, blocks: tuple[nn.Module, ...], source: str) -> Entry:
    # A module that comes twice would be one with one set of weights.
    return Entry(architecture.stem.clone(), tuple(block.clone() for block in blocks), source)


def _prefix_all(parts: dict[str, Leaves], blocks: list[Leaves]) -> Leaves:
    """Places of params by their paths in `Entry` or `Exit`."""
    whole = parts | {f"blocks_{i}": leaves for i, leaves in enumerate(blocks)}
    return {
        f"{part}/{path}": name for part, leaves in whole.items() for path, name in leaves.items()
    }


def _is_same(params: PyTree, other: PyTree) -> bool:
    pairs = zip(jax.tree.leaves(params), jax.tree.leaves(other), strict=True)
    return all(np.array_equal(a, b) for a, b in pairs)
