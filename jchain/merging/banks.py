"""Banks made from other banks."""

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar, Protocol, TypeVar, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from jchain._typing import Array, Int, PyTree
from jchain.groups import LayerGroup, add_copies, check_same_stem, merge_groups, move_tokens
from jchain.merging.blending import (
    BlendMethod,
    Member,
    blend_layers,
    read_blends,
    read_factors,
    scale_layers,
)
from jchain.modules import Module
from jchain.stages.binding import unbind
from jchain.tokens import (
    check_tokens,
    concat_names,
    layers_then_heads,
    move_chains,
    renumber,
    spare_words,
)


@runtime_checkable
class _Bank(Protocol):
    """What the functions below read of a `jchain.Bank`, which uses them."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def layers(self) -> tuple[LayerGroup, ...]: ...
    @property
    def heads(self) -> tuple[LayerGroup, ...]: ...
    @property
    def stem_params(self) -> PyTree: ...
    @property
    def stem(self) -> Module | None: ...
    @property
    def names(self) -> tuple[str, ...]: ...
    @property
    def origins(self) -> tuple[str, ...]: ...
    @property
    def parents(self) -> tuple[tuple[int, ...], ...]: ...
    @property
    def num_steps(self) -> int: ...
    @property
    def versions(self) -> Int[Array, "E"] | None: ...
    @property
    def num_layers(self) -> int: ...
    @property
    def num_heads(self) -> int: ...
    def find(self, token: int) -> tuple[LayerGroup, int]: ...
    def get_versions(self) -> Int[Array, "E"]: ...


B = TypeVar("B", bound=_Bank)


def concat(banks: Sequence[B]) -> B:
    """Join banks, as `Bank.concat` does.

    Args:
      banks: the banks to join.

    Raises:
      ValueError: if no bank is given, stems differ, or params of one module do not stack.
    """
    if len(banks) == 0:
        raise ValueError("empty bank: expected at least one bank to concatenate, got none")
    banks = [unbind(bank) for bank in banks]
    check_same_stem([(bank.stem, bank.stem_params) for bank in banks])
    num_layers = [bank.num_layers for bank in banks]
    new_tokens = renumber(num_layers, [bank.num_heads for bank in banks])
    pairs = list(zip(banks, new_tokens, strict=True))
    versions = None
    if any(bank.versions is not None for bank in banks):
        given = [(bank.get_versions(), bank.num_layers) for bank in banks]
        versions = jnp.concatenate([v[:n] for v, n in given] + [v[n:] for v, n in given])
    return dataclasses.replace(
        banks[0],
        layers=merge_groups([(group, new) for bank, new in pairs for group in bank.layers]),
        heads=merge_groups([(group, new) for bank, new in pairs for group in bank.heads]),
        names=layers_then_heads(concat_names([bank.names for bank in banks]), num_layers),
        origins=layers_then_heads([bank.origins for bank in banks], num_layers),
        parents=sum((move_chains(bank.parents, new) for bank, new in pairs), ()),
        num_steps=sum(bank.num_steps for bank in banks),
        versions=versions,
    )


def take(bank: B, layers: Sequence[int], heads: Sequence[int] | None) -> B:
    """Make a smaller bank, as `Bank.take` does.

    Args:
      bank: the bank.
      layers: layer tokens to keep.
      heads: head tokens to keep; all heads if None.

    Raises:
      ValueError: if no layer or no head is kept, or a token repeats or is out of range.
    """
    num_layers, total = bank.num_layers, bank.num_layers + bank.num_heads
    heads = range(num_layers, total) if heads is None else heads
    check_tokens(layers, range(num_layers), "layer")
    check_tokens(heads, range(num_layers, total), "head")
    order = [int(token) for token in (*layers, *heads)]
    new = np.full(total, -1)
    new[order] = np.arange(len(order))
    return dataclasses.replace(
        bank,
        layers=merge_groups([(group, new) for group in bank.layers]),
        heads=merge_groups([(group, new) for group in bank.heads]),
        names=tuple(bank.names[token] for token in order) if bank.names else (),
        origins=tuple(bank.origins[token] for token in order) if bank.names else (),
        parents=move_chains(bank.parents, new),
        versions=None if bank.versions is None else bank.versions[np.array(order)],
    )


def reserve(bank: B, num: int) -> B:
    """Add spare layers, as `Bank.reserve` does.

    Args:
      bank: the bank.
      num: number of layers to add per module, at least 0.

    Raises:
      ValueError: if the bank already uses a name that a new layer would get.
    """
    start = bank.num_layers
    copied = [group.tokens[i % len(group.tokens)] for group in bank.layers for i in range(num)]
    layers = tuple(
        add_copies(group, range(start + i * num, start + (i + 1) * num))
        for i, group in enumerate(bank.layers)
    )
    names, origins = spare_words(bank.names, bank.origins, start, copied)
    return _extend(bank, layers, names, origins, bank.get_versions()[np.array(copied, int)])


def blend(
    bank: B,
    mixes: Sequence[tuple[int, int, float]],
    method: BlendMethod,
    base: int | Sequence[int] | None,
    density: float,
) -> B:
    """Add layers that are mixed from others, as `Bank.blend` does.

    Args:
      bank: the bank.
      mixes: for each new layer, the tokens of two layers, and a weight.
      method: how they are mixed.
      base: token of the layer that both come from, one for all mixes or one for each.
      density: share of the changed entries that "ties" keeps.

    Raises:
      ValueError: as `Bank.blend`.
    """
    blends = read_blends(mixes, method, base, bank.num_layers)
    members = blend_layers(bank.find, blends, method, density)
    names = [
        f"{bank.names[one.first]} ~ {bank.names[one.second]} ({method} {one.weight:g})"
        for one in blends
        if bank.names
    ]
    return _add(bank, members, names, f"{method} blend")


def scale(bank: B, factors: Sequence[tuple[int, float]]) -> B:
    """Add layers whose residual branches are scaled, as `Bank.scale` does.

    Args:
      bank: the bank.
      factors: tokens of layers, each with a factor.

    Raises:
      ValueError: as `Bank.scale`.
    """
    found = read_factors(factors, bank.num_layers)
    members = scale_layers(bank.find, found)
    names = [f"{bank.names[token]} x {factor:g}" for token, factor in found if bank.names]
    return _add(bank, members, names, "scaled branch")


def _add(bank: B, members: Sequence[Member], names: Sequence[str], origin: str) -> B:
    """Add new members to groups of the bank."""
    start = bank.num_layers
    tokens = range(start, start + len(members))
    pairs = list(zip(tokens, members, strict=True))
    layers = tuple(
        _add_to_group(group, {token: new for token, new in pairs if new.group is group})
        for group in bank.layers
    )
    new_origins = [origin] * len(names)
    all_names = (*bank.names[:start], *names, *bank.names[start:])
    origins = (*bank.origins[:start], *new_origins, *bank.origins[start:])
    return _extend(bank, layers, all_names, origins, jnp.zeros(len(members), jnp.int32))


def _add_to_group(group: LayerGroup, members: dict[int, Member]) -> LayerGroup:
    """Return the group with new members, which are given by token."""
    if not members:
        return group
    new = [(member.params, member.state) for member in members.values()]
    stacked = jax.tree.map(lambda *rows: jnp.stack(rows), *new)
    params, state = jax.tree.map(
        lambda a, b: jnp.concatenate([a, b]), (group.params, group.state), stacked
    )
    tokens = (*group.tokens, *members)
    return dataclasses.replace(group, params=params, tokens=tokens, state=state)


def _extend(
    bank: B,
    layers: tuple[LayerGroup, ...],
    names: tuple[str, ...],
    origins: tuple[str, ...],
    versions: Int[Array, "n"],
) -> B:
    """Return the bank with more layers, whose tokens precede those of the heads."""
    start, own = bank.num_layers, bank.versions
    if own is not None:
        own = jnp.concatenate([own[:start], versions, own[start:]])
    return dataclasses.replace(
        bank,
        layers=layers,
        heads=move_tokens(bank.heads, len(versions)),
        names=names,
        origins=origins,
        parents=tuple((*parent[:-1], parent[-1] + len(versions)) for parent in bank.parents),
        versions=own,
    )
