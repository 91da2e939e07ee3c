"""Banks: frozen layers and heads as stacked params, so that a chain is an index array."""

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from jchain import chain as chain_lib
from jchain import files
from jchain._typing import Array, Int, PyTree, Shaped
from jchain.groups import (
    LayerGroup,
    check_keeps_shape,
    find_input_shape,
    group_by_module,
    merge,
    pick,
    put,
)
from jchain.pytree import pytree_dataclass, static


@pytree_dataclass
class Bank:
    """Frozen layers (tokens `0..N-1`), heads (tokens `N..N+K-1`), and an optional fixed stem before them.

    Build one with `Bank.stack`, `Bank.concat`, `Bank.load` or `jchain.train`.

    Attributes:
      layers: one group per module.
      heads: one group per module.
      stem_params: params of the stem, None without one.
      stem: fixed map from raw input to the shape that layers keep; None for the identity.
      names: a name for each token, N layers then K heads, all different.
      origins: where the weights of each token come from, in words.
      parents: the chains (layer tokens, then a head) of the nets that the bank was cut from.
      num_steps: gradient steps that made the bank.
      versions: how often the weights of each token were replaced since, int32 `[N + K]`; None for never.
    """

    layers: tuple[LayerGroup, ...]
    heads: tuple[LayerGroup, ...]
    stem_params: PyTree = None
    stem: nn.Module | None = static(default=None)
    names: tuple[str, ...] = static(default=())
    origins: tuple[str, ...] = static(default=())
    parents: tuple[tuple[int, ...], ...] = static(default=())
    num_steps: int = static(default=0)
    versions: Any = None

    @property
    def num_layers(self) -> int:
        """N, the number of layer tokens."""
        return sum(len(group.tokens) for group in self.layers)

    @property
    def num_heads(self) -> int:
        """K, the number of head tokens."""
        return sum(len(group.tokens) for group in self.heads)

    def embed(self, x: Shaped[Array, "B ..."]) -> Array:
        """The stem applied to raw input: what the first layer of a chain reads."""
        return x if self.stem is None else self.stem.apply({"params": self.stem_params or {}}, x)  # pyright: ignore[reportReturnType]

    def describe(self, chain: Any) -> str:
        """The names along one chain, `net0/0 -> net1/2 -> net0/head`.

        Raises:
          ValueError: `chain` is no chain of this bank.
        """
        tokens = np.asarray(chain)
        if tokens.ndim != 1:
            raise ValueError(f"expected one chain of shape [L], got {list(tokens.shape)}")
        return chain_lib.describe(
            chain_lib.validate(tokens, self.num_layers, self.num_heads), self.names
        )

    @staticmethod
    def stack(
        layer: nn.Module | Sequence[nn.Module],
        layer_params: Sequence[PyTree],
        head: nn.Module | Sequence[nn.Module],
        head_params: Sequence[PyTree],
        *,
        stem: nn.Module | None = None,
        stem_params: PyTree = None,
        names: Sequence[str] | None = None,
        origins: Sequence[str] | None = None,
        parents: Sequence[Sequence[int]] = (),
        num_steps: int = 0,
    ) -> "Bank":
        """A bank of your own weights.

        Args:
          layer: the module of all layers, or one for each; its output must have the shape of its input.
          layer_params: for each layer the dict that `layer.init(key, x)["params"]` returned.
          head: the module of all heads, or one for each.
          head_params: likewise for each head.
          stem: fixed map from raw input to the shape of the layers.
          stem_params: its params.
          names: a name per layer, or per layer and head; by default `layer0`, ..., `head0`, ...
          origins: where each layer and head comes from, in words.
          parents: chains of tokens of the nets that the layers come from.
          num_steps: gradient steps that made the weights.

        Raises:
          ValueError: there is no layer or no head, more or fewer modules than params, params that do not stack, a layer that
            changes the shape, names that repeat or are too few, a parent that is no chain. Where the shape of the input cannot
            be read off the params, the layers' shapes are checked when a `Problem` is built.
        """
        num_layers, num_heads = len(layer_params), len(head_params)
        if num_layers == 0 or num_heads == 0:
            raise ValueError(
                f"empty bank: expected at least one layer and one head, got {num_layers} and {num_heads}"
            )
        bank = Bank(
            layers=group_by_module(layer, layer_params, "layer", 0),
            heads=group_by_module(head, head_params, "head", num_layers),
            stem_params=jax.tree.map(jnp.asarray, stem_params),
            stem=stem,
            names=_complete_names(names, num_layers, num_heads),
            origins=tuple(origins or ("given",) * (num_layers + num_heads)),
            parents=tuple(tuple(int(token) for token in parent) for parent in parents),
            num_steps=num_steps,
        )
        bank._check()
        return bank

    @staticmethod
    def concat(banks: Sequence["Bank"]) -> "Bank":
        """One bank of all layers and heads: tokens in the order given, heads behind all layers, a group per module.

        Names that would repeat are prefixed with the place of their bank, `bank1/net0/2`. All banks must have the same
        stem.

        Raises:
          ValueError: no bank is given, stems differ, or params of one module do not stack.
        """
        if len(banks) == 0:
            raise ValueError("empty bank: expected at least one bank to concatenate, got none")
        _check_same_stem(banks)
        num_layers = sum(bank.num_layers for bank in banks)
        layer_offsets = np.cumsum([0] + [bank.num_layers for bank in banks])
        head_offsets = num_layers + np.cumsum([0] + [bank.num_heads for bank in banks])
        maps = [
            np.concatenate(
                [start + np.arange(bank.num_layers), head_start + np.arange(bank.num_heads)]
            )
            for bank, start, head_start in zip(banks, layer_offsets, head_offsets, strict=False)
        ]
        names, origins = _concat_names(banks)
        joined = Bank(
            layers=merge(
                [
                    (group, new)
                    for bank, new in zip(banks, maps, strict=True)
                    for group in bank.layers
                ]
            ),
            heads=merge(
                [
                    (group, new)
                    for bank, new in zip(banks, maps, strict=True)
                    for group in bank.heads
                ]
            ),
            stem_params=banks[0].stem_params,
            stem=banks[0].stem,
            names=names,
            origins=origins,
            parents=tuple(
                tuple(int(new[token]) for token in parent)
                for bank, new in zip(banks, maps, strict=True)
                for parent in bank.parents
            ),
            num_steps=sum(bank.num_steps for bank in banks),
            versions=None
            if all(bank.versions is None for bank in banks)
            else jnp.concatenate(
                [bank.get_versions()[: bank.num_layers] for bank in banks]
                + [bank.get_versions()[bank.num_layers :] for bank in banks]
            ),
        )
        joined._check()
        return joined

    def take(self, layers: Sequence[int], heads: Sequence[int] | None = None) -> "Bank":
        """A smaller bank, its tokens in the order given. Parents that need a token left out are left out too.

        Args:
          layers: layer tokens to keep.
          heads: head tokens to keep (`N..N+K-1`); all when None.

        Raises:
          ValueError: nothing is kept, a token repeats or is out of range.
        """
        num_layers, total = self.num_layers, self.num_layers + self.num_heads
        heads = range(num_layers, total) if heads is None else heads
        for kept, low, high, kind in (
            (layers, 0, num_layers, "layer"),
            (heads, num_layers, total, "head"),
        ):
            if (
                len(kept) == 0
                or len(set(kept)) != len(kept)
                or not all(low <= token < high for token in kept)
            ):
                raise ValueError(
                    f"expected different {kind} tokens in {low}..{high - 1}, at least one, got {[*kept]}"
                )
        order = [int(token) for token in (*layers, *heads)]
        new = np.full(total, -1)
        new[order] = np.arange(len(order))
        return Bank(
            layers=merge([(group, new) for group in self.layers]),
            heads=merge([(group, new) for group in self.heads]),
            stem_params=self.stem_params,
            stem=self.stem,
            names=tuple(self.names[token] for token in order) if self.names else (),
            origins=tuple(self.origins[token] for token in order) if self.names else (),
            parents=tuple(
                tuple(int(new[token]) for token in parent)
                for parent in self.parents
                if all(new[token] >= 0 for token in parent)
            ),
            num_steps=self.num_steps,
            versions=None if self.versions is None else self.versions[np.array(order)],
        )

    def reserve(self, num: int) -> "Bank":
        """The same bank with `num` more layers of each module, so that layers can be added later without a new shape.

        The places hold copies of the module's layers in turn until `replace` gives them other weights. They are the tokens
        `N..N + num * G - 1`, `num` of each of the G modules, and the heads come behind them.

        Args:
          num: places for each module.

        Raises:
          ValueError: `num` is below 0, or a layer is called as a place would be, `place` and its token.
        """
        if num < 0:
            raise ValueError(f"expected num of at least 0, got {num}")
        num_layers, num_new = self.num_layers, num * len(self.layers)
        copied = [group.tokens[i % len(group.tokens)] for group in self.layers for i in range(num)]
        order = [*range(num_layers), *copied, *range(num_layers, num_layers + self.num_heads)]
        layers = tuple(
            LayerGroup(
                pick(group.params, np.arange(len(group.tokens) + num) % len(group.tokens)),
                group.module,
                (*group.tokens, *range(num_layers + i * num, num_layers + (i + 1) * num)),
            )
            for i, group in enumerate(self.layers)
        )
        places = [f"place{num_layers + i}" for i in range(num_new)]
        bank = dataclasses.replace(
            self,
            layers=layers,
            heads=tuple(
                LayerGroup(
                    group.params, group.module, tuple(token + num_new for token in group.tokens)
                )
                for group in self.heads
            ),
            names=(*self.names[:num_layers], *places, *self.names[num_layers:])
            if self.names
            else (),
            origins=(
                *self.origins[:num_layers],
                *(f"free, a copy of {self.names[token]}" for token in copied),
                *self.origins[num_layers:],
            )
            if self.names
            else (),
            parents=tuple((*parent[:-1], parent[-1] + num_new) for parent in self.parents),
            versions=None if self.versions is None else self.versions[np.array(order)],
        )
        bank._check()
        return bank

    def replace(
        self,
        tokens: Sequence[int],
        params: Sequence[PyTree],
        *,
        names: Sequence[str] | None = None,
        origins: Sequence[str] | None = None,
    ) -> "Bank":
        """The same bank with other weights at some tokens, whose versions rise by one. The others keep theirs, to the bit.

        Args:
          tokens: layers and heads, all different.
          params: for each the dict that its module takes.
          names: their new names; as they were when None.
          origins: where their weights come from, in words; as they were when None.

        Raises:
          ValueError: a token is out of range or repeats, there are not as many params, names and origins as tokens, a name is
            taken, or params differ in structure, shape or dtype from those that they replace.
        """
        total = self.num_layers + self.num_heads
        if len(set(tokens)) != len(tokens) or not all(0 <= token < total for token in tokens):
            raise ValueError(f"expected different tokens in 0..{total - 1}, got {[*tokens]}")
        for given, kind in ((params, "params"), (names, "names"), (origins, "origins")):
            if given is not None and len(given) != len(tokens):
                raise ValueError(f"expected {kind} for {len(tokens)} tokens, got {len(given)}")
        groups = [*self.layers, *self.heads]
        for token, tree in zip(tokens, params, strict=True):
            i = next(i for i, group in enumerate(groups) if token in group.tokens)
            groups[i] = put(groups[i], token, tree)
        bank = dataclasses.replace(
            self,
            layers=tuple(groups[: len(self.layers)]),
            heads=tuple(groups[len(self.layers) :]),
            names=_substitute(self.names, tokens, names),
            origins=_substitute(self.origins, tokens, origins),
            versions=self.get_versions().at[np.array(tokens, int)].add(1),
        )
        bank._check()
        return bank

    def get_params(self, token: int) -> PyTree:
        """The weights of one layer or head.

        Raises:
          ValueError: there is no such token.
        """
        group, place = self.find(token)
        return pick(group.params, place)

    def find(self, token: int) -> tuple[LayerGroup, int]:
        """The group that holds a layer or head, and its place in that group.

        Raises:
          ValueError: there is no such token.
        """
        for group in (*self.layers, *self.heads):
            if token in group.tokens:
                return group, group.tokens.index(token)
        raise ValueError(
            f"expected a token in 0..{self.num_layers + self.num_heads - 1}, got {token}"
        )

    def get_versions(self) -> Int[Array, "E"]:
        """How often the weights of each token were replaced, `[N + K]`."""
        if self.versions is None:
            return jnp.zeros(self.num_layers + self.num_heads, jnp.int32)
        return self.versions

    def without_names(self) -> "Bank":
        """The same bank without what only people read of it, so that banks alike share compiled programs."""
        return dataclasses.replace(self, names=(), origins=(), parents=(), num_steps=0)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the bank to one file (safetensors with a JSON header), replacing what is there in one rename.

        Raises:
          ValueError: a module has a field that cannot be written as JSON.
        """
        parts = {"layers": self.layers, "heads": self.heads}
        header = {
            "stem": None if self.stem is None else files.encode_module(self.stem),
            "names": self.names,
            "origins": self.origins,
            "parents": self.parents,
            "num_steps": self.num_steps,
        } | {
            part: [files.encode_module(group.module) | {"tokens": group.tokens} for group in groups]
            for part, groups in parts.items()
        }
        trees = {
            part: {str(i): group.params for i, group in enumerate(groups)}
            for part, groups in parts.items()
        }
        arrays = traverse_util.flatten_dict(trees | {"stem": self.stem_params or {}}, sep="/")
        if self.versions is not None:
            arrays["versions"] = self.versions
        files.write_arrays(path, header, arrays)

    @staticmethod
    def load(path: str | os.PathLike[str], modules: Sequence[type[nn.Module]] = ()) -> "Bank":
        """The bank that `save` wrote, to the same bits.

        Args:
          path: the file.
          modules: classes of your own modules that the bank uses; those of `jchain.layers` and `flax.linen` are known.

        Raises:
          FileNotFoundError: there is no such file.
          ValueError: the file is damaged or truncated, or names a module that is not known.
        """
        header, arrays = files.read_arrays(path)
        trees = traverse_util.unflatten_dict(arrays, sep="/")

        def load_groups(part: str) -> tuple[LayerGroup, ...]:
            return tuple(
                LayerGroup(
                    trees.get(part, {}).get(str(i), {}),
                    files.decode_module(group, modules),
                    tuple(group["tokens"]),
                )
                for i, group in enumerate(header[part])
            )

        bank = Bank(
            layers=load_groups("layers"),
            heads=load_groups("heads"),
            stem_params=trees.get("stem"),
            stem=None if header["stem"] is None else files.decode_module(header["stem"], modules),
            names=tuple(header["names"]),
            origins=tuple(header["origins"]),
            parents=tuple(tuple(parent) for parent in header["parents"]),
            num_steps=header["num_steps"],
            versions=trees.get("versions"),
        )
        bank._check()
        return bank

    def _check(self) -> None:
        if len(set(self.names)) != len(self.names):
            repeated = sorted({name for name in self.names if self.names.count(name) > 1})
            raise ValueError(
                f"expected a different name for each layer and head, got {repeated} more than once"
            )
        if len(self.origins) != len(self.names):
            raise ValueError(
                f"expected {len(self.names)} origins, one per layer and head, got {len(self.origins)}"
            )
        for parent in self.parents:
            chain_lib.validate(np.asarray(parent), self.num_layers, self.num_heads)
        for group in self.layers:
            shape = find_input_shape(group)
            if shape is not None:
                check_keeps_shape(
                    group, jax.ShapeDtypeStruct((1, *shape), jnp.float32), of_any_dtype=True
                )


def check_stem(stem: nn.Module | None, params: PyTree, x: Any) -> Any:
    """Shape and dtype of what the first layer reads of raw input, which need only have `.shape` and `.dtype`.

    Raises:
      ValueError: the stem does not take such an input.
    """
    if stem is None:
        return x
    try:
        return jax.eval_shape(lambda x: stem.apply({"params": params or {}}, x), x)
    except Exception as error:  # whatever a user's module raises
        raise ValueError(
            f"stem {type(stem).__name__} does not take an input of shape {list(x.shape)}: {str(error).splitlines()[0]}"
        ) from None


def _substitute(
    words: tuple[str, ...], tokens: Sequence[int], new: Sequence[str] | None
) -> tuple[str, ...]:
    if new is None:
        return words
    said = dict(zip(tokens, new, strict=True))
    return tuple(said.get(token, word) for token, word in enumerate(words))


def _complete_names(
    names: Sequence[str] | None, num_layers: int, num_heads: int
) -> tuple[str, ...]:
    heads = tuple(f"head{i}" for i in range(num_heads))
    names = tuple(f"layer{i}" for i in range(num_layers)) if names is None else tuple(names)
    if len(names) not in (num_layers, num_layers + num_heads):
        raise ValueError(
            f"expected {num_layers} names (layers) or {num_layers + num_heads} (layers, then heads), got {len(names)}"
        )
    return names + heads if len(names) == num_layers else names


def _concat_names(banks: Sequence[Bank]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    all_names = [name for bank in banks for name in bank.names]
    is_unique = len(set(all_names)) == len(all_names)
    layers, heads = [], []
    for i, bank in enumerate(banks):
        prefix = "" if is_unique else f"bank{i}/"
        rows = [
            (prefix + name, origin) for name, origin in zip(bank.names, bank.origins, strict=True)
        ]
        layers += rows[: bank.num_layers]
        heads += rows[bank.num_layers :]
    names, origins = zip(*layers, *heads, strict=True)
    return names, origins


def _check_same_stem(banks: Sequence[Bank]) -> None:
    first = banks[0]
    structures = [jax.tree.structure(bank.stem_params or {}) for bank in banks]
    for i, bank in enumerate(banks):
        same_structure = bank.stem == first.stem and structures[i] == structures[0]
        if not same_structure or not all(
            np.array_equal(a, b)
            for a, b in zip(
                jax.tree.leaves(bank.stem_params), jax.tree.leaves(first.stem_params), strict=True
            )
        ):
            raise ValueError(
                f"expected banks with one and the same stem, but that of bank {i} differs from bank 0's"
            )
