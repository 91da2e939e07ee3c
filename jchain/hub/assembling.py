"""The assembly of a bank from one or several models.

The layers are the stacked blocks, the stem is the embeddings, and the heads are the output layers.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jchain._typing import PyTree
from jchain.bank import Bank
from jchain.groups import LayerGroup
from jchain.hub.architecture import Architecture
from jchain.hub.sublayers import Part, list_parts, select_names
from jchain.hub.tensor_names import ModelNames, TensorNames, get_shapes
from jchain.hub.weights import WeightReader, Weights, choose_dtype
from jchain.hub.wrapping import Entries, Entry, Exit, Restart, Within


class Source(NamedTuple):
    """A model that a bank is assembled from."""

    name: str
    weights: Weights
    architecture: Architecture
    names: ModelNames  # maps each param to the name of its tensor
    has_ends: bool = True  # whether its embeddings and its head are part of the bank


class Split(NamedTuple):
    """How the blocks of a model become layers.

    Attributes:
      pinned: numbers of blocks to pin at the beginning and at the end.
      has_sublayers: whether attention and MLP of each block are layers of their own.
      alternates: whether attention and MLP must alternate in a chain.
    """

    pinned: tuple[int, int] = (0, 0)
    has_sublayers: bool = False
    alternates: bool = False


def assemble_bank(sources: list[Source], dtype: DTypeLike | None, split: Split) -> Bank:
    """Assemble one bank from all models, which must have the same architecture.

    Args:
      sources: the models, at least one. The first one has its embeddings and its head.
      dtype: dtype of the weights; if None, the dtype of the files.
      split: how the blocks become layers.

    Raises:
      ValueError: if all blocks are pinned, blocks cannot be split, or weights have several dtypes
        or an unsupported one.
    """
    architecture = sources[0].architecture
    if split.alternates and not split.has_sublayers:
        raise ValueError("expected alternate=True only with sublayers=True")
    free = _get_free_blocks(split.pinned, len(architecture.blocks))
    parts = list_parts(architecture.blocks, free, is_split=split.has_sublayers)
    features = get_shapes(architecture).features
    reader = WeightReader(_choose_dtype(sources, dtype))

    # Heads are read first, so that tied embeddings share the memory of the stacked heads.
    ends = [source for source in sources if source.has_ends]
    head, head_params = _read_heads(reader, ends, free.stop, features)
    stem, stem_params = _read_stem(reader, ends, free.start)
    has_restarts = isinstance(stem, Entries)
    layers = _stack_layers(
        reader, sources, parts, features, is_within=has_restarts, alternates=split.alternates
    )
    if has_restarts:
        layers.append(_make_restarts(layers, len(ends), features))

    num_layers = sum(len(group.tokens) for group in layers)
    head_tokens = tuple(range(num_layers, num_layers + len(ends)))
    names, origins = _name_tokens(sources, parts, has_restarts=has_restarts)
    return Bank(
        layers=tuple(layers),
        heads=(LayerGroup(head_params, head, head_tokens),),
        stem_params=stem_params,
        stem=stem,
        names=names,
        origins=origins,
        parents=_list_parents(sources, len(parts), has_restarts=has_restarts),
    )


def _get_free_blocks(pinned: tuple[int, int], depth: int) -> range:
    """Return the indices of the blocks that are not pinned."""
    is_pair = isinstance(pinned, tuple | list) and len(pinned) == 2
    if not is_pair or not all(isinstance(number, int | np.integer) for number in pinned):
        raise ValueError(
            "expected pinned=(first, last), the numbers of blocks to pin at the start and at the "
            f"end, got {pinned!r}"
        )
    first, last = pinned
    if first < 0 or last < 0 or first + last >= depth:
        raise ValueError(
            f"expected fewer pinned blocks than the {depth} of the model, at least 0, got {pinned}"
        )
    return range(first, depth - last)


def _choose_dtype(sources: list[Source], dtype: DTypeLike | None) -> np.dtype:
    """Choose the dtype of all weights from the dtypes of the tensors to read."""
    found = {
        source.weights.dtypes[name]
        for source in sources
        for part in source.names.flatten()
        for name in part.values()
    }
    return choose_dtype(found, dtype, ", ".join(str(source.weights.path) for source in sources))


def _read_heads(
    reader: WeightReader, sources: list[Source], stop: int, features: int
) -> tuple[nn.Module, PyTree]:
    """Read the heads as one module and stacked params, with the pinned blocks from `stop` on."""
    architecture = sources[0].architecture
    pinned = architecture.blocks[stop:]
    if len(sources) == 1 and not pinned:
        source = sources[0]
        return architecture.head, reader.read_stack([(source.weights, source.names.head)])
    members = [
        (source.weights, _join_names({"head": source.names.head}, source.names.blocks[stop:]))
        for source in sources
    ]
    module = Exit(architecture.head, tuple(block.clone() for block in pinned), features)
    return module, reader.read_stack(members)


def _read_stem(reader: WeightReader, sources: list[Source], start: int) -> tuple[nn.Module, PyTree]:
    """Read the module and the params of the stem, with the pinned blocks before `start`.

    The module is `Entries` if the embeddings or pinned blocks of the models differ.
    """
    architecture = sources[0].architecture
    params = [
        reader.read(
            source.weights,
            _join_names({"stem": source.names.stem}, source.names.blocks[:start]),
        )
        for source in sources
    ]
    modules = [_make_entry(architecture, start, source.name) for source in sources]
    if any(not _is_same(params[0], other) for other in params[1:]):
        return Entries(tuple(modules)), {f"entries_{m}": entry for m, entry in enumerate(params)}
    if start > 0:
        return modules[0], params[0]
    return architecture.stem, params[0]["stem"]


def _make_entry(architecture: Architecture, num_pinned: int, source: str) -> Entry:
    """Make the module of a model's embeddings and its pinned first blocks."""
    # The modules are cloned, because Flax makes only one set of params for a module used twice.
    blocks = tuple(block.clone() for block in architecture.blocks[:num_pinned])
    return Entry(architecture.stem.clone(), blocks, source)


def _stack_layers(
    reader: WeightReader,
    sources: list[Source],
    parts: list[Part],
    features: int,
    *,
    is_within: bool,
    alternates: bool,
) -> list[LayerGroup]:
    """Stack the layers of all models, in one group for each module."""
    layers = []
    for module in dict.fromkeys(part.module for part in parts):
        members = [
            (m, i) for m in range(len(sources)) for i, p in enumerate(parts) if p.module == module
        ]
        params = reader.read_stack(
            [
                (
                    sources[m].weights,
                    select_names(parts[i], sources[m].names.blocks[parts[i].position], features),
                )
                for m, i in members
            ]
        )
        tokens = tuple(m * len(parts) + i for m, i in members)
        stages = parts[members[0][1]].stages if alternates else (0, 0)
        wrapped = ({"block": params}, Within(module, features)) if is_within else (params, module)
        layers.append(LayerGroup(*wrapped, tokens, stages=stages))
    return layers


def _make_restarts(layers: list[LayerGroup], num_sources: int, features: int) -> LayerGroup:
    """Make one restart for each model except the first; their tokens follow the blocks' tokens."""
    num_blocks = sum(len(group.tokens) for group in layers)
    dtype = jax.tree.leaves(layers[0].params)[0].dtype
    shares = jnp.eye(num_sources - 1, dtype=dtype)
    tokens = tuple(range(num_blocks, num_blocks + num_sources - 1))
    return LayerGroup({"shares": shares}, Restart(features), tokens)


def _name_tokens(
    sources: list[Source], parts: list[Part], *, has_restarts: bool
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """List the names and the origins of all tokens."""
    architecture, ends = sources[0].architecture, [source for source in sources if source.has_ends]
    depth, family = len(architecture.blocks), architecture.stem.__module__.rpartition(".")[2]
    tokens = [
        (
            f"{source.name}/{part.label}",
            f"{part.description} of {depth}, {family} checkpoint {source.name}",
        )
        for source in sources
        for part in parts
    ]
    if has_restarts:
        tokens += [
            (f"{source.name}/embeddings", f"embeddings of {family} checkpoint {source.name}")
            for source in ends[1:]
        ]
    tokens += [
        (f"{source.name}/head", f"head of {family} checkpoint {source.name}") for source in ends
    ]
    names, origins = zip(*tokens, strict=True)
    return names, origins


def _list_parents(
    sources: list[Source], num_parts: int, *, has_restarts: bool
) -> tuple[tuple[int, ...], ...]:
    """List the original models as chains: a restart if one is needed, the layers, and the head."""
    num_blocks = len(sources) * num_parts
    ends = [m for m, source in enumerate(sources) if source.has_ends]
    num_layers = num_blocks + (len(ends) - 1 if has_restarts else 0)
    return tuple(
        (
            *((num_blocks + k - 1,) if has_restarts and k > 0 else ()),
            *range(m * num_parts, (m + 1) * num_parts),
            num_layers + k,
        )
        for k, m in enumerate(ends)
    )


def _join_names(part: dict[str, TensorNames], blocks: list[TensorNames]) -> TensorNames:
    """Map the path of each param of an `Entry` or an `Exit` to the name of its tensor."""
    children = part | {f"blocks_{i}": names for i, names in enumerate(blocks)}
    return {
        f"{child}/{path}": name for child, names in children.items() for path, name in names.items()
    }


def _is_same(params: PyTree, other: PyTree) -> bool:
    """Check whether two trees of params have the same values."""
    pairs = zip(jax.tree.leaves(params), jax.tree.leaves(other), strict=True)
    return all(np.array_equal(a, b) for a, b in pairs)
