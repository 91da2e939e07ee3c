"""The names and shapes of the checkpoint tensors that hold a model's params."""

from collections.abc import Iterable
from functools import cache
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util

from jchain.hub.architecture import Architecture
from jchain.hub.checkpoint import Checkpoint, list_names
from jchain.hub.tensor_files import DTYPES

# Output layers that some files contain even if they are the same as the embeddings.
_OUTPUT_LAYERS = ("lm_head.weight", "embed_out.weight")

# A map from the path of a param to the name of a tensor, such as
# {"attn/c_attn/weight": "transformer.h.0.attn.c_attn.weight"}.
TensorNames = dict[str, str]
# A map from the path of a param to its shape.
Shapes = dict[str, tuple[int, ...]]


class ModelNames(NamedTuple):
    """The name of the tensor of each param, for each part of a model."""

    stem: TensorNames
    blocks: list[TensorNames]
    head: TensorNames

    def flatten(self) -> tuple[TensorNames, ...]:
        """List the parts in the order stem, blocks, and head."""
        return (self.stem, *self.blocks, self.head)


class ModelShapes(NamedTuple):
    """The shape of each param, for each part of a model."""

    stem: Shapes
    blocks: list[Shapes]
    head: Shapes
    features: int  # width of the activations between blocks

    def flatten(self) -> tuple[Shapes, ...]:
        """List the parts in the order stem, blocks, and head."""
        return (self.stem, *self.blocks, self.head)


def get_names(architecture: Architecture, prefix: str | None = None) -> ModelNames:
    """Return the name of the tensor of each param of a model.

    Args:
      architecture: the architecture of the model.
      prefix: start of all names; if None, the prefix of the architecture.
    """
    prefix = architecture.prefix if prefix is None else prefix
    shapes = get_shapes(architecture)
    return ModelNames(
        _get_part_names(shapes.stem, architecture.stem_names, prefix),
        [
            {
                path: prefix + architecture.block_prefix.format(i) + path.replace("/", ".")
                for path in block
            }
            for i, block in enumerate(shapes.blocks)
        ],
        _get_part_names(shapes.head, architecture.head_names, prefix),
    )


def _get_part_names(params: Iterable[str], names: dict[str, str], prefix: str) -> TensorNames:
    """Return the tensors of the stem or the head, given the names of its children in the file."""
    found = {}
    for path in params:
        child, *rest = path.split("/")
        name = names[child]
        found[path] = ".".join([name[1:] if name.startswith("/") else prefix + name, *rest])
    return found


def get_shapes(architecture: Architecture) -> ModelShapes:
    """Return the shape of each param of a model, without computing anything.

    Args:
      architecture: the architecture of the model.
    """
    x = jax.ShapeDtypeStruct(architecture.example_shape, architecture.example_dtype)
    stem, hidden = _trace(architecture.stem, x)
    blocks = [_trace(block, hidden)[0] for block in architecture.blocks]
    return ModelShapes(stem, blocks, _trace(architecture.head, hidden)[0], hidden.shape[-1])


def get_param_paths(module: nn.Module, features: int) -> tuple[str, ...]:
    """Return the paths of the params of a block, or of a part of one.

    Args:
      module: the block.
      features: width of the activations between blocks.
    """
    x = jax.ShapeDtypeStruct((1, 1, features), jnp.float32)
    return tuple(_trace(module, x)[0])


@cache
def _trace(module: nn.Module, x: jax.ShapeDtypeStruct) -> tuple[Shapes, jax.ShapeDtypeStruct]:
    """Return the shapes of a module's params, and the shape and dtype of its output for `x`."""
    out, variables = jax.eval_shape(module.init_with_output, jax.random.key(0), x)
    params: dict[str, jax.ShapeDtypeStruct] = traverse_util.flatten_dict(
        variables["params"], sep="/"
    )  # pyright: ignore[reportAssignmentType]
    return {path: leaf.shape for path, leaf in params.items()}, out


def find_names(architecture: Architecture, checkpoint: Checkpoint) -> ModelNames:
    """Find the name of the tensor of each param of a model in a file.

    Files that were saved from a model without its output layer may lack the prefix of all names.
    Embeddings that are tied to the output layer may have the name of either.

    Args:
      architecture: the architecture of the model.
      checkpoint: the checkpoint that holds the tensors.
    """
    has_prefix = any(name.startswith(architecture.prefix) for name in checkpoint.shapes)
    names = get_names(architecture, architecture.prefix if has_prefix else "")
    missing = find_tied(names) - checkpoint.shapes.keys()
    outputs = [name for name in _OUTPUT_LAYERS if name in checkpoint.shapes]
    if not missing or not outputs:
        return names
    stem, head = (
        {path: outputs[0] if name in missing else name for path, name in part.items()}
        for part in (names.stem, names.head)
    )
    return names._replace(stem=stem, head=head)


def find_tied(names: ModelNames) -> frozenset[str]:
    """Find the tensors that are both embeddings and output layer.

    Args:
      names: the name of the tensor of each param.
    """
    return frozenset(names.stem.values()) & frozenset(names.head.values())


def check_tensors(architecture: Architecture, checkpoint: Checkpoint, names: ModelNames) -> None:
    """Check that a checkpoint contains the tensors of a model and no others.

    Args:
      architecture: the architecture of the model.
      checkpoint: the checkpoint to check.
      names: the names of the tensors, which `find_names` returned.

    Raises:
      ValueError: if a tensor is missing, is not part of the model, or has a wrong shape or an
        unsupported dtype, or if the checkpoint contains an output layer that differs from the
        embeddings although they are tied.
    """
    shapes = get_shapes(architecture)
    expected = {
        name: part_shapes[path]
        for part_names, part_shapes in zip(names.flatten(), shapes.flatten(), strict=True)
        for path, name in part_names.items()
    }
    _check_no_surplus(architecture, checkpoint, expected)
    _check_shapes(checkpoint, expected)
    _check_tied(checkpoint, names)


def _check_no_surplus(architecture: Architecture, checkpoint: Checkpoint, expected: Shapes) -> None:
    """Check that no tensor of the model is missing and that there are no other tensors."""
    found = checkpoint.shapes.keys()
    if missing := expected.keys() - found:
        raise ValueError(
            f"{checkpoint.path}: expected tensors {list_names(missing)}, which are missing"
        )
    ignored = {
        prefix + name.format(i)
        for prefix in ("", architecture.prefix)
        for name in architecture.unused_tensors
        for i in range(len(architecture.blocks))
    }
    ignored |= set(_OUTPUT_LAYERS) if architecture.vocab_size is not None else set()
    if surplus := found - expected.keys() - ignored:
        raise ValueError(
            f"{checkpoint.path}: expected only tensors of the model that its config describes, "
            f"got {list_names(surplus)}"
        )


def _check_shapes(checkpoint: Checkpoint, expected: Shapes) -> None:
    """Check that tensors have the expected shapes and supported dtypes."""
    for name, shape in expected.items():
        found, dtype = checkpoint.shapes[name], checkpoint.dtypes[name]
        if found != shape:
            raise ValueError(
                f"{checkpoint.path}: expected {name} of shape {list(shape)} from its config, "
                f"got {list(found)}"
            )
        if dtype not in DTYPES.values():
            raise ValueError(
                f"{checkpoint.path}: expected {name} of {', '.join(DTYPES.values())}, got {dtype}"
            )


def _check_tied(checkpoint: Checkpoint, names: ModelNames) -> None:
    """Check that an output layer in the file equals the embeddings if they are tied."""
    outputs = checkpoint.shapes.keys() & set(_OUTPUT_LAYERS)
    for embeddings in find_tied(names):
        for name in outputs - {embeddings}:
            if not checkpoint.are_equal(name, embeddings):
                raise ValueError(
                    f"{checkpoint.path}: expected {name} to equal {embeddings}, as in a model with "
                    "tie_word_embeddings, got other values: set tie_word_embeddings to false to "
                    f"use them, or remove {name}"
                )
