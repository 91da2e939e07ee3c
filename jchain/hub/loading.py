"""From a checkpoint folder to a bank: blocks stacked as they lie in the file, embeddings as stem, the output layer as head."""

import math
import os
from collections.abc import Iterable
from functools import cache
from importlib import import_module
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from jchain._typing import PyTree
from jchain.bank import Bank
from jchain.files import HUB
from jchain.groups import LayerGroup
from jchain.hub.architecture import Architecture
from jchain.hub.checkpoint import CONFIG, DTYPES, Checkpoint, list_names
from jchain.hub.config import Config

# XLA on CPU takes arrays that begin at such an address as they are.
_ALIGNMENT = 64
Leaves = dict[str, str]
Shapes = dict[str, tuple[int, ...]]


def load(path: str | os.PathLike[str], *, dtype: Any = None, name: str | None = None) -> Bank:
    """The bank of a pretrained transformer.

    Layers are its blocks in order, so that the tokens `0..n-1` and the head `n` are the model as it was, which is also the
    bank's parent; they are called `name/0`, `name/1` and so on. The stem is its embeddings, the head its last norm and
    output layer. Weights keep the layout of the file. Families: GPT-2, Llama (with Mistral, Qwen2, Qwen3), GPT-NeoX, ViT.

    Args:
      path: a folder with config.json and model.safetensors, or shards with model.safetensors.index.json.
      dtype: of the weights; that of the file when None.
      name: of the model; that of the folder when None.

    Raises:
      FileNotFoundError: the folder or a file of it is missing.
      ValueError: a file is damaged, the family or an option of the config is not supported, tensors are missing, or there are
        others than the config asks for, or of another shape, or of a dtype other than float32, bfloat16 and float16.
    """
    checkpoint = Checkpoint(path)
    architecture = describe(checkpoint.config, str(checkpoint.path / CONFIG))
    prefix = name or checkpoint.path.resolve().name
    base = find_base(architecture, checkpoint)
    _check_tensors(architecture, checkpoint, base)
    stem, blocks, head = find_places(architecture, base)
    read = _Reader(checkpoint, _choose_dtype(checkpoint, dtype))
    depth = len(blocks)
    layers = []
    for module in dict.fromkeys(architecture.blocks):
        tokens = tuple(i for i, other in enumerate(architecture.blocks) if other == module)
        layers.append(LayerGroup(read.stack([blocks[i] for i in tokens]), module, tokens))
    where = f"{architecture.stem.__module__.rpartition('.')[2]} checkpoint"
    return Bank(
        layers=tuple(layers),
        heads=(LayerGroup(read.only(head), architecture.head, (depth,)),),
        stem_params=read.one(stem),
        stem=architecture.stem,
        names=(*(f"{prefix}/{i}" for i in range(depth)), f"{prefix}/head"),
        origins=(*(f"block {i} of {depth}, {where} {prefix}" for i in range(depth)), f"head of {where} {prefix}"),
        parents=(tuple(range(depth + 1)),),
    )


def describe(options: dict[str, Any], where: str) -> Architecture:
    """The modules of a config.

    Raises:
      ValueError: the family, or an option, is not supported.
    """
    config = Config(options, where)
    kind = config.require("model_type")
    families: dict[str, Any] = {known: family for family in map(import_module, HUB) for known in family.MODEL_TYPES}
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
    stem, blocks, head = find_shapes(architecture)

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


def find_shapes(architecture: Architecture) -> tuple[Shapes, list[Shapes], Shapes]:
    """The shape of each param of stem, blocks and head."""
    x = jax.ShapeDtypeStruct(architecture.example, architecture.example_dtype)
    stem, hidden = _init(architecture.stem, x)
    return stem, [_init(block, hidden)[0] for block in architecture.blocks], _init(architecture.head, hidden)[0]


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
    buffers |= {"lm_head.weight"} if architecture.vocabulary is not None else set()
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
    """Tensors of a checkpoint as arrays, each read once."""

    def __init__(self, checkpoint: Checkpoint, dtype: Any) -> None:
        self._checkpoint, self._dtype = checkpoint, dtype
        self._shared: dict[str, np.ndarray] = {}

    def one(self, places: Leaves) -> PyTree:
        """The params of one module."""
        return _nest({path: self._read_once(name) for path, name in places.items()})

    def only(self, places: Leaves) -> PyTree:
        """A stack of one module, which shares memory with what `one` returned of the same tensors."""
        return _nest({path: self._read_once(name)[None] for path, name in places.items()})

    def stack(self, places: list[Leaves]) -> PyTree:
        """The params of several modules, each leaf `[n, ...]`, without a second copy of any."""
        return _nest({path: self._fill([each[path] for each in places]) for path in places[0]})

    def _read_once(self, name: str) -> np.ndarray:
        if name not in self._shared:
            self._shared[name] = self._fill([name])[0]
        return self._shared[name]

    def _fill(self, names: list[str]) -> np.ndarray:
        shape = self._checkpoint.shapes[names[0]]
        made = _allocate((len(names), *shape), self._dtype)
        for row, name in zip(made, names, strict=True):
            self._checkpoint.read(name, row)
        return made


def _allocate(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Memory that XLA on CPU takes as it is."""
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(shape)


def _nest(leaves: dict[str, np.ndarray]) -> PyTree:
    # Without a copy, which `jnp.asarray` would make.
    return traverse_util.unflatten_dict({path: jax.device_put(leaf) for path, leaf in leaves.items()}, sep="/")


def _choose_dtype(checkpoint: Checkpoint, dtype: Any) -> np.dtype:
    """The dtype of all weights."""
    found = sorted(set(checkpoint.dtypes.values()))
    if dtype is None and len(found) > 1:
        raise ValueError(f"{checkpoint.path}: expected weights of one dtype, got {', '.join(found)}: pass dtype=")
    return jnp.dtype(found[0] if dtype is None else dtype)
