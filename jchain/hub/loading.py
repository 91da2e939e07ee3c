"""From a checkpoint folder to a bank: blocks stacked as they lie in the file, embeddings as stem, the output layer as head."""

import dataclasses
import math
import os
from collections.abc import Iterable, Sequence
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from jchain._typing import Array, Key, PyTree
from jchain.bank import Bank
from jchain.files import FAMILIES
from jchain.groups import LayerGroup
from jchain.hub.architecture import Architecture
from jchain.hub.checkpoint import CONFIG, DTYPES, Checkpoint, list_names, read_json
from jchain.hub.config import Config
from jchain.hub.wrapping import Entries, Entry, Exit, Restart, Within

# XLA on CPU takes arrays that begin at such an address as they are.
_ALIGNMENT = 64
_OUTPUTS = ("lm_head.weight", "embed_out.weight")
Leaves = dict[str, str]
Shapes = dict[str, tuple[int, ...]]


class Source(NamedTuple):
    """One checkpoint, and which of its tensors is which param."""

    name: str
    checkpoint: "Checkpoint | _Untrained"
    architecture: Architecture
    stem: Leaves
    blocks: list[Leaves]
    head: Leaves


def load(
    path: str | os.PathLike[str], *, dtype: Any = None, name: str | None = None, pinned: tuple[int, int] = (0, 0)
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
    sources = [_open(path, name) for path, name in zip(paths, names or [None] * len(paths), strict=True)]
    found = [source.name for source in sources]
    if len(set(found)) < len(found):
        raise ValueError(f"expected checkpoints of different names, got {', '.join(found)}: pass names=")
    for source in sources[1:]:
        _check_alike(sources[0], source)
    return _assemble(sources, dtype, pinned)


def init(
    key: Key[Array, ""], path: str | os.PathLike[str], *, name: str = "model", pinned: tuple[int, int] = (0, 0)
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
    folder = Path(path)
    architecture = describe(read_json(folder / CONFIG), str(folder / CONFIG))
    places = find_places(architecture)
    return _assemble([Source(name, _Untrained(key, architecture, places), architecture, *places)], None, pinned)


class _Untrained:
    """Random weights, by the names that they would have in a checkpoint."""

    def __init__(self, key: Array, architecture: Architecture, places: tuple[Leaves, list[Leaves], Leaves]) -> None:
        self.path = Path()
        stem, blocks, head = places
        stem_key, head_key, *keys = jax.random.split(key, 2 + len(blocks))
        x = jnp.zeros(architecture.example, architecture.example_dtype)
        hidden, stem_params = architecture.stem.init_with_output(stem_key, x)
        modules = zip(architecture.blocks, keys, strict=True)
        # The head first: where its weights are those of the embeddings, these stay.
        params = [
            architecture.head.init(head_key, hidden),
            stem_params,
            *(module.init(key, hidden) for module, key in modules),
        ]
        self._arrays = {
            names[path]: np.asarray(leaf)
            for variables, names in zip(params, (head, stem, *blocks), strict=True)
            for path, leaf in traverse_util.flatten_dict(variables["params"], sep="/").items()
        }
        self.shapes = {name: array.shape for name, array in self._arrays.items()}
        self.dtypes = {name: array.dtype.name for name, array in self._arrays.items()}

    def read(self, name: str, row: np.ndarray) -> None:
        row[...] = self._arrays[name]


def _open(path: str | os.PathLike[str], name: str | None) -> Source:
    checkpoint = Checkpoint(path)
    architecture = describe(checkpoint.config, str(checkpoint.path / CONFIG))
    base = find_base(architecture, checkpoint)
    _check_tensors(architecture, checkpoint, base)
    return Source(name or checkpoint.path.resolve().name, checkpoint, architecture, *find_places(architecture, base))


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
    fields = [field.name for field in dataclasses.fields(module) if field.name not in ("name", "parent")]
    name = next(name for name in fields if getattr(module, name) != getattr(other, name))
    return f"of {name} {getattr(module, name)!r}, and of {getattr(other, name)!r}"


def _assemble(sources: list[Source], dtype: Any, pinned: tuple[int, int]) -> Bank:
    """The bank of all sources, whose architectures are alike."""
    architecture = sources[0].architecture
    depth = len(architecture.blocks)
    first, last = pinned
    if first < 0 or last < 0 or first + last >= depth:
        raise ValueError(f"expected fewer pinned blocks than the {depth} of the model, at least 0, got {pinned}")
    read = _Reader(_choose_dtype([source.checkpoint for source in sources], dtype))
    begin, middle, end = (architecture.blocks[part] for part in _cut(first, depth - last))
    features = find_shapes(architecture)[3]

    # Heads before embeddings, which may be the same tensors: so the stack is read, and the embeddings are a part of it.
    is_wrapped = last > 0 or len(sources) > 1
    places = [
        (
            source.checkpoint,
            _prefix_all({"head": source.head}, source.blocks[depth - last :]) if is_wrapped else source.head,
        )
        for source in sources
    ]
    heads = read.stack(places)
    entries = [
        read.one(source.checkpoint, _prefix_all({"stem": source.stem}, source.blocks[:first])) for source in sources
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

    size = len(middle)
    layers = []
    for module in dict.fromkeys(middle):
        members = [(m, i) for m in range(len(sources)) for i in range(size) if middle[i] == module]
        leaves = [(sources[m].checkpoint, sources[m].blocks[first + i]) for m, i in members]
        params = read.stack(leaves)
        tokens = tuple(m * size + i for m, i in members)
        layers.append(
            LayerGroup({"block": params}, Within(module, features), tokens)
            if has_choice
            else LayerGroup(params, module, tokens)
        )
    num_blocks = len(sources) * size
    others = sources[1:] if has_choice else []
    if others:
        shares = jnp.eye(len(others), dtype=jax.tree.leaves(stem_params)[0].dtype)
        tokens = tuple(range(num_blocks, num_blocks + len(others)))
        layers.append(LayerGroup({"shares": shares}, Restart(features), tokens))
    num_layers = num_blocks + len(others)
    family = architecture.stem.__module__.rpartition(".")[2]
    blocks = range(first, depth - last)
    return Bank(
        layers=tuple(layers),
        heads=(
            LayerGroup(
                heads, exit_ if is_wrapped else architecture.head, tuple(num_layers + m for m in range(len(sources)))
            ),
        ),
        stem_params=stem_params,
        stem=stem,
        names=(
            *(f"{source.name}/{i}" for source in sources for i in blocks),
            *(f"{source.name}/embeddings" for source in others),
            *(f"{source.name}/head" for source in sources),
        ),
        origins=(
            *(f"block {i} of {depth}, {family} checkpoint {source.name}" for source in sources for i in blocks),
            *(f"embeddings of {family} checkpoint {source.name}" for source in others),
            *(f"head of {family} checkpoint {source.name}" for source in sources),
        ),
        parents=tuple(
            (
                *((num_blocks + m - 1,) if has_choice and m else ()),
                *range(m * size, (m + 1) * size),
                num_layers + m,
            )
            for m in range(len(sources))
        ),
    )


def _cut(first: int, last: int) -> tuple[slice, slice, slice]:
    return slice(None, first), slice(first, last), slice(last, None)


def _make_entry(architecture: Architecture, blocks: tuple[nn.Module, ...], source: str) -> Entry:
    # A module that comes twice would be one with one set of weights.
    return Entry(architecture.stem.clone(), tuple(block.clone() for block in blocks), source)


def _prefix_all(parts: dict[str, Leaves], blocks: list[Leaves]) -> Leaves:
    """Places of params by their paths in `Entry` or `Exit`."""
    whole = parts | {f"blocks_{i}": leaves for i, leaves in enumerate(blocks)}
    return {f"{part}/{path}": name for part, leaves in whole.items() for path, name in leaves.items()}


def _is_same(params: PyTree, other: PyTree) -> bool:
    pairs = zip(jax.tree.leaves(params), jax.tree.leaves(other), strict=True)
    return all(np.array_equal(a, b) for a, b in pairs)


def describe(options: dict[str, Any], where: str) -> Architecture:
    """The modules of a config.

    Raises:
      ValueError: the family, or an option, is not supported.
    """
    config = Config(options, where)
    kind = config.require("model_type")
    families: dict[str, Any] = {
        known: family for family in map(import_module, FAMILIES) for known in family.MODEL_TYPES
    }
    if kind not in families:
        raise config.refuse("model_type", kind, ", ".join(families))
    try:
        architecture = families[kind].describe(config)
        config.finish()
        find_shapes(architecture)
    except (TypeError, ZeroDivisionError, AttributeError) as error:  # an option of another type than the family takes
        reason = str(error).splitlines()[0]
        raise ValueError(f"{config.where}: an option has a value that does not fit: {reason}") from None
    return architecture


def find_places(architecture: Architecture, base: str | None = None) -> tuple[Leaves, list[Leaves], Leaves]:
    """For stem, each block and head the tensor of each param, `{"attn/c_attn/weight": "transformer.h.0.attn.c_attn.weight"}`.

    Args:
      architecture: of the checkpoint.
      base: what stands before all names; that of the architecture when None.
    """
    base = architecture.base if base is None else base
    stem, blocks, head, _ = find_shapes(architecture)

    def place(params: Iterable[str], places: dict[str, str]) -> Leaves:
        found = {}
        for path in params:
            child, *rest = path.split("/")
            there = places[child]
            found[path] = ".".join([there[1:] if there.startswith("/") else base + there, *rest])
        return found

    return (
        place(stem, architecture.stem_places),
        [
            {path: base + architecture.block.format(i) + path.replace("/", ".") for path in shapes}
            for i, shapes in enumerate(blocks)
        ],
        place(head, architecture.head_places),
    )


def find_shapes(architecture: Architecture) -> tuple[Shapes, list[Shapes], Shapes, int]:
    """The shape of each param of stem, blocks and head, and the width that blocks keep."""
    x = jax.ShapeDtypeStruct(architecture.example, architecture.example_dtype)
    stem, hidden = _init(architecture.stem, x)
    blocks = [_init(block, hidden)[0] for block in architecture.blocks]
    return stem, blocks, _init(architecture.head, hidden)[0], hidden.shape[-1]


@cache
def _init(module: nn.Module, x: Any) -> tuple[Shapes, Any]:
    """Shapes of the params of a module for such an input, and what it makes of it."""
    out, variables = jax.eval_shape(module.init_with_output, jax.random.key(0), x)
    params: dict[str, Any] = traverse_util.flatten_dict(variables["params"], sep="/")  # pyright: ignore[reportAssignmentType]
    return {path: leaf.shape for path, leaf in params.items()}, out


def find_base(architecture: Architecture, checkpoint: Checkpoint) -> str:
    """What stands before all names of this file: nothing where it was saved without a task's head."""
    is_there = any(name.startswith(architecture.base) for name in checkpoint.shapes)
    return architecture.base if is_there else ""


def _check_tensors(architecture: Architecture, checkpoint: Checkpoint, base: str) -> None:
    """That the file holds what the modules take, and nothing else."""
    stem, blocks, head = find_places(architecture, base)
    shapes = find_shapes(architecture)
    expected = {
        name: of[path]
        for places, of in zip((stem, *blocks, head), (shapes[0], *shapes[1], shapes[2]), strict=True)
        for path, name in places.items()
    }
    where, there = checkpoint.path, checkpoint.shapes
    if missing := expected.keys() - there.keys():
        raise ValueError(f"{where}: expected tensors {list_names(missing)}, which are missing")
    buffers = {base + name.format(i) for name in architecture.unused for i in range(len(blocks))}
    # Some files hold an output layer although it is that of the embeddings.
    buffers |= set(_OUTPUTS) if architecture.vocabulary is not None else set()
    if surplus := there.keys() - expected.keys() - buffers:
        raise ValueError(
            f"{where}: tensors {list_names(surplus)} belong to no part of the model that its config describes"
        )
    for name, shape in expected.items():
        if there[name] != shape:
            raise ValueError(f"{where}: expected {name} of shape {list(shape)} by its config, got {list(there[name])}")
        if checkpoint.dtypes[name] not in DTYPES.values():
            raise ValueError(f"{where}: expected {name} of {', '.join(DTYPES.values())}, got {checkpoint.dtypes[name]}")


class _Reader:
    """Tensors of checkpoints as arrays, each read once."""

    def __init__(self, dtype: Any) -> None:
        self._dtype = dtype
        self._rows: dict[tuple[Path, str], np.ndarray] = {}

    def one(self, checkpoint: Any, places: Leaves) -> PyTree:
        """The params of one module, which share memory with what was read before of the same tensors."""
        return _nest({path: self._read(checkpoint, name) for path, name in places.items()})

    def stack(self, members: list[tuple[Any, Leaves]]) -> PyTree:
        """The params of several modules, each leaf `[n, ...]`, without a second copy of any."""
        stacks = {}
        for path in members[0][1]:
            checkpoint, places = members[0]
            stacks[path] = _allocate((len(members), *checkpoint.shapes[places[path]]), self._dtype)
            for row, (checkpoint, places) in zip(stacks[path], members, strict=True):
                checkpoint.read(places[path], row)
                self._rows[checkpoint.path, places[path]] = row
        return _nest(stacks)

    def _read(self, checkpoint: Any, name: str) -> np.ndarray:
        if (checkpoint.path, name) not in self._rows:
            row = _allocate(checkpoint.shapes[name], self._dtype)
            checkpoint.read(name, row)
            self._rows[checkpoint.path, name] = row
        return self._rows[checkpoint.path, name]


def _allocate(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Memory that XLA on CPU takes as it is."""
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(shape)


def _nest(leaves: dict[str, np.ndarray]) -> PyTree:
    # Without a copy, which `jnp.asarray` would make.
    return traverse_util.unflatten_dict({path: jax.device_put(leaf) for path, leaf in leaves.items()}, sep="/")


def _choose_dtype(checkpoints: list[Any], dtype: Any) -> np.dtype:
    """The dtype of all weights."""
    found = sorted({name for checkpoint in checkpoints for name in checkpoint.dtypes.values()})
    if dtype is None and len(found) > 1:
        where = ", ".join(str(checkpoint.path) for checkpoint in checkpoints)
        raise ValueError(f"{where}: expected weights of one dtype, got {', '.join(found)}: pass dtype=")
    return jnp.dtype(found[0] if dtype is None else dtype)
