"""From a config to modules, and to the tensors of a checkpoint that are their params."""

import os
from collections.abc import Iterable
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
from flax import traverse_util

from jchain.files import FAMILIES
from jchain.hub.architecture import Architecture
from jchain.hub.checkpoint import CONFIG, DTYPES, Checkpoint, list_names, read_json
from jchain.hub.config import Config

# Of an output layer, which some files hold although it is that of the embeddings.
_OUTPUTS = ("lm_head.weight", "embed_out.weight")
Leaves = dict[str, str]
Shapes = dict[str, tuple[int, ...]]


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
    except (
        TypeError,
        ZeroDivisionError,
        AttributeError,
    ) as error:  # an option of another type than the family takes
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"{config.where}: an option has a value that does not fit: {reason}"
        ) from None
    return architecture


def read_architecture(folder: str | os.PathLike[str]) -> Architecture:
    """The modules of the config of a checkpoint folder.

    Raises:
      FileNotFoundError: there is no config.json.
      ValueError: it is no JSON, or as `describe`.
    """
    path = Path(folder) / CONFIG
    return describe(read_json(path), str(path))


def find_places(
    architecture: Architecture, base: str | None = None
) -> tuple[Leaves, list[Leaves], Leaves]:
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


def check_tensors(architecture: Architecture, checkpoint: Checkpoint, base: str) -> None:
    """Check that the file holds what the modules take, and nothing else.

    Raises:
      ValueError: tensors are missing, there are others, or one is of another shape or of a dtype that is not read; or there is
        an output layer beside embeddings that it should be, and differs.
    """
    stem, blocks, head = find_places(architecture, base)
    shapes = find_shapes(architecture)
    expected = {
        name: of[path]
        for places, of in zip(
            (stem, *blocks, head), (shapes[0], *shapes[1], shapes[2]), strict=True
        )
        for path, name in places.items()
    }
    where, there = checkpoint.path, checkpoint.shapes
    if missing := expected.keys() - there.keys():
        raise ValueError(f"{where}: expected tensors {list_names(missing)}, which are missing")
    buffers = {base + name.format(i) for name in architecture.unused for i in range(len(blocks))}
    buffers |= set(_OUTPUTS) if architecture.vocabulary is not None else set()
    if surplus := there.keys() - expected.keys() - buffers:
        raise ValueError(
            f"{where}: tensors {list_names(surplus)} belong to no part of the model that its config describes"
        )
    for name, shape in expected.items():
        if there[name] != shape:
            raise ValueError(
                f"{where}: expected {name} of shape {list(shape)} by its config, got {list(there[name])}"
            )
        if checkpoint.dtypes[name] not in DTYPES.values():
            raise ValueError(
                f"{where}: expected {name} of {', '.join(DTYPES.values())}, got {checkpoint.dtypes[name]}"
            )
    for embeddings in set(stem.values()) & set(head.values()):
        for name in there.keys() & set(_OUTPUTS):
            if not checkpoint.are_equal(name, embeddings):
                raise ValueError(
                    f"{where}: expected {name} to be {embeddings}, as tie_word_embeddings says, got other numbers: set "
                    "it to false to use them, or remove them"
                )
