"""A chain of pretrained blocks as a plain model: one stem, blocks in order, one head."""

import re
from collections.abc import Sequence
from typing import NamedTuple, cast

import flax.linen as nn
import jax
import numpy as np
from flax import traverse_util

from jchain._typing import PyTree
from jchain.bank import Bank
from jchain.hub.architecture import Architecture
from jchain.hub.sublayers import ATTENTION, MLP, join_parts
from jchain.hub.tensor_names import Shapes, get_shapes
from jchain.hub.wrapping import Entries, Entry, Exit, Restart, Within


class ModelBlock(NamedTuple):
    """A block of a chain, with the model that it comes from.

    If attention and MLP are layers of their own, a block joins an attention with the MLP that
    follows it. If one of the two is missing, its weights are zero, so it adds nothing.
    """

    source: str  # name of the model; that of the attention if the MLP is from elsewhere
    position: int  # index of the block in the model
    module: nn.Module
    params: PyTree
    missing: str | None = None  # one of `jchain.hub.sublayers.KINDS`
    mlp_origin: tuple[str, int] | None = None  # source and position, if they are others
    zeros: tuple[str, ...] = ()  # the children of the block whose weights are zero
    num_layers: int = 1  # 2 if the block joins an attention and an MLP of the chain
    changes: tuple["Change", ...] = ()  # of these layers, how their weights differ

    @property
    def label(self) -> str:
        """The block in words, such as `model/3`, or `model/3 without mlp`."""
        label = f"{self.source}/{self.position}"
        if self.changes:
            return f"({' and '.join(change.name for change in self.changes)})"
        if self.missing is not None:
            return f"{label} without {self.missing}"
        if self.mlp_origin is None:
            return label
        return f"{label} with mlp of {self.mlp_origin[0]}/{self.mlp_origin[1]}"

    @property
    def sources(self) -> set[str]:
        """Names of the models that the weights come from."""
        found = {self.source} | (set() if self.mlp_origin is None else {self.mlp_origin[0]})
        return found | {change.other[0] for change in self.changes if change.other is not None}


class Change(NamedTuple):
    """A layer that was mixed or scaled in the bank, by `Bank.blend` or `Bank.scale`."""

    name: str  # of the layer
    other: tuple[str, int] | None  # source and position of the second layer of a mix
    weight: float | None  # of the second layer, if the mix is linear


class _Layer(NamedTuple):
    """A layer of a chain: a block, or the attention or the MLP of one."""

    source: str
    position: int
    kind: str | None
    change: Change | None
    module: nn.Module
    params: PyTree

    @property
    def changes(self) -> tuple[Change, ...]:
        """How the weights differ from those of the model."""
        return () if self.change is None else (self.change,)


class ChainModel(NamedTuple):
    """The model that a chain computes, with no wrapped modules or unused embeddings."""

    stem: PyTree  # params of the embeddings
    blocks: list[ModelBlock]
    head: PyTree  # params of the last norm and the output layer
    stem_source: str  # name of the model that the embeddings come from
    head_source: str  # name of the model that the output layer comes from

    @property
    def dtype(self) -> str:
        """The dtype of the weights, under the name that NumPy and PyTorch share."""
        return jax.tree.leaves(self.blocks[0].params)[0].dtype.name


def unfold_chain(bank: Bank, tokens: Sequence[int], architecture: Architecture) -> ChainModel:
    """Make the model that a chain computes.

    Layers before a restart have no effect and are omitted. Pinned blocks are included.

    Args:
      bank: a bank that `load` or `load_many` returned.
      tokens: tokens of the chain, without padding.
      architecture: the architecture of the models that the bank was loaded from.

    Raises:
      ValueError: if a layer of the chain is not from `load` or `load_many`, or does not fit the
        architecture.
    """
    entry, layers = _unfold_layers(bank, tokens[:-1])
    blocks = _join_layers(layers, get_shapes(architecture).blocks)
    head_source = bank.names[tokens[-1]].rpartition("/")[0]
    first, stem, stem_source = _unfold_stem(bank, entry, head_source)
    head_module, head = bank.find(tokens[-1])[0].module, bank.get_params(tokens[-1])
    last = []
    if isinstance(head_module, Exit):
        start = len(architecture.blocks) - len(head_module.blocks)
        last = _unfold_pinned(head_source, start, head_module, head)
        head = head["head"]
    return ChainModel(stem, first + blocks + last, head, stem_source, head_source)


def _unfold_layers(bank: Bank, tokens: Sequence[int]) -> tuple[int, list[_Layer]]:
    """Find the index of the model whose embeddings the layers start from, and list the layers."""
    entry, layers = 0, []
    for token in tokens:
        module, params = bank.find(token)[0].module, bank.get_params(token)
        if isinstance(module, Restart):
            entry, layers = _find_entry(params, bank.names[token]), []
            continue
        if isinstance(module, Within):
            module, params = module.block, params["block"]
        block = cast(nn.Module, module)  # checkpoints have linen modules only
        layers.append(_Layer(*parse_layer_name(bank.names[token]), block, params))
    return entry, layers


def _join_layers(layers: Sequence[_Layer], shapes: Sequence[Shapes]) -> list[ModelBlock]:
    """Join each attention with the MLP that directly follows it; `shapes` are those of blocks."""
    blocks, i = [], 0
    while i < len(layers):
        layer, rest = layers[i], layers[i + 1 : i + 2]
        if layer.kind is None:
            block = ModelBlock(layer.source, layer.position, layer.module, layer.params)
            blocks.append(block._replace(changes=layer.changes))
        elif layer.kind == ATTENTION and rest and rest[0].kind == MLP:
            blocks.append(_join(layer, rest[0], shapes))
            i += 1
        else:
            blocks.append(_complete(layer, shapes))
        i += 1
    return blocks


def _join(attention: _Layer, mlp: _Layer, shapes: Sequence[Shapes]) -> ModelBlock:
    """Join an attention and an MLP."""
    params = attention.params | mlp.params
    expected = _get_shapes(attention, shapes)
    found = {path: leaf.shape for path, leaf in _flatten(params).items()}
    if found != expected:
        raise ValueError(
            f"expected an MLP whose weights fit block {attention.position}, got that of "
            f"{mlp.source}/{mlp.position}"
        )
    own, other = (attention.source, attention.position), (mlp.source, mlp.position)
    return ModelBlock(
        *own,
        join_parts(attention.module),
        params,
        mlp_origin=None if own == other else other,
        num_layers=2,
        changes=attention.changes + mlp.changes,
    )


def _complete(layer: _Layer, shapes: Sequence[Shapes]) -> ModelBlock:
    """Complete an attention or an MLP to a block, with zeros for the other one."""
    own = _flatten(layer.params)
    dtype = next(iter(own.values())).dtype
    zeros = {
        path: np.zeros(shape, dtype)
        for path, shape in _get_shapes(layer, shapes).items()
        if path not in own
    }
    return ModelBlock(
        layer.source,
        layer.position,
        join_parts(layer.module),
        traverse_util.unflatten_dict(own | zeros, sep="/"),
        missing=MLP if layer.kind == ATTENTION else ATTENTION,
        zeros=tuple(dict.fromkeys(path.split("/")[0] for path in zeros)),
        changes=layer.changes,
    )


def _get_shapes(layer: _Layer, shapes: Sequence[Shapes]) -> Shapes:
    """Return the shapes of all params of the block that a layer belongs to."""
    if layer.position >= len(shapes):
        raise ValueError(
            f"expected a bank of the blocks of the source, which has {len(shapes)}, got "
            f"{layer.source}/{layer.position}"
        )
    return shapes[layer.position]


def _flatten(params: PyTree) -> dict[str, jax.Array]:
    return traverse_util.flatten_dict(params, sep="/")  # pyright: ignore[reportReturnType]


def _find_entry(params: PyTree, name: str) -> int:
    """Find the index of the model whose embeddings a restart selects."""
    shares = np.asarray(params["shares"], np.float32)
    if sorted(shares) != [0.0] * (len(shares) - 1) + [1.0]:
        raise ValueError(
            f"expected {name} to be the embeddings of one model, got shares {shares.tolist()}"
        )
    return 1 + int(shares.argmax())


def _unfold_stem(bank: Bank, entry: int, head_source: str) -> tuple[list[ModelBlock], PyTree, str]:
    """List the pinned first blocks, the params of the embeddings, and the name of their model.

    If the stem does not record the name of its model, all models have the same embeddings, which
    are attributed to the model of the head.
    """
    stem, params = bank.stem, bank.stem_params
    if isinstance(stem, Entries):
        stem, params = stem.entries[entry], params[f"entries_{entry}"]
    if not isinstance(stem, Entry):
        return [], params, head_source
    return _unfold_pinned(stem.source, 0, stem, params), params["stem"], stem.source


def _unfold_pinned(
    source: str, start: int, module: Entry | Exit, params: PyTree
) -> list[ModelBlock]:
    """List the pinned blocks of a stem or a head, whose indices in the model begin at `start`."""
    return [
        ModelBlock(source, start + i, block, params[f"blocks_{i}"])
        for i, block in enumerate(module.blocks)
    ]


def parse_layer_name(name: str) -> tuple[str, int, str | None, Change | None]:
    """Parse the name of a layer.

    Args:
      name: name of a block, such as `model/3`, or of an attention or MLP, such as `model/3/mlp`.
        Copies have names such as `model/3+14`, mixes such as `a/3 ~ b/3 (linear 0.5)`, and scaled
        layers such as `model/3 x 0.5`.

    Returns:
      The name of the model, the index of the block, its part, and how the weights were changed.

    Raises:
      ValueError: if `name` is not the name of a block, an attention, or an MLP.
    """
    mixed = re.fullmatch(r"(.+) ~ (.+) \((\w+) (\S+)\)(?:\+\d+)*", name, re.DOTALL)
    scaled = re.fullmatch(r"(.+) x (\S+?)(?:\+\d+)*", name, re.DOTALL)
    if mixed is not None:
        source, position, kind, _ = parse_layer_name(mixed[1])
        other = parse_layer_name(mixed[2])[:2]
        weight = float(mixed[4]) if mixed[3] == "linear" else None
        return source, position, kind, Change(name, other, weight)
    if scaled is not None:
        source, position, kind, _ = parse_layer_name(scaled[1])
        return source, position, kind, Change(name, None, None)
    found = re.fullmatch(rf"(.+?)/(\d+)(?:/({ATTENTION}|{MLP}))?(\+\d+)*", name, re.DOTALL)
    if found is None:
        raise ValueError(f"expected the name of a block, such as model/3, got {name!r}")
    return found[1], int(found[2]), found[3], None
