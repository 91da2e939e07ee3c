"""Banks of frozen layers and heads, stacked so that a chain is an array of indices."""

import dataclasses
import os
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jchain import chain as chain_lib
from jchain import files
from jchain._typing import Activations, Array, Int, PyTree
from jchain.arguments import check_fields, check_integers, check_numbers, checked
from jchain.groups import (
    LayerGroup,
    describe_groups,
    group_by_module,
    put,
)
from jchain.merging import banks as merged
from jchain.merging.blending import BlendMethod
from jchain.modules import Module, ModuleLike, apply_stem, convert_stem, describe_module
from jchain.modules.pickling import Picklable
from jchain.pytree import pytree_dataclass, static
from jchain.stages.arguments import HeadStages, Stages
from jchain.stages.binding import check_input_shape, get_last_stage, make_table, unbind
from jchain.stages.table import StageTable
from jchain.tokens import (
    check_names,
    check_numbering,
    check_replacement,
    complete_names,
    replace_words,
)


@pytree_dataclass
class Bank(Picklable):
    """Frozen layers (tokens `0..N-1`), heads (tokens `N..N+K-1`), and an optional fixed stem.

    Build one with `Bank.stack`, `Bank.concat`, `Bank.load` or `jchain.train`.

    Attributes:
      layers: the layers, with one group of stacked params per module.
      heads: the heads, with one group of stacked params per module.
      stem_params: params of the stem, or all its collections; None if there is no stem.
      stem: fixed module that maps raw input to the shape that layers keep; None for the identity.
      names: the unique name of each token: N layers, then K heads.
      origins: for each token, a few words about where its weights come from.
      parents: the nets that the bank was cut from, each as a chain: layer tokens, then a head.
      num_steps: total number of gradient steps that trained the bank, over all its nets.
      versions: int32 `[N + K]`; the number of times that the weights of each token have been
        replaced. None if no weights have been replaced.

    Raises:
      ValueError: if the tokens of the layers are not 0..N-1, those of the heads not N..N+K-1,
        there is not one name per token, names repeat, a parent is not a chain, or a field is of
        another kind.
    """

    layers: tuple[LayerGroup, ...]
    heads: tuple[LayerGroup, ...]
    stem_params: PyTree = None
    stem: Module | None = static(default=None)
    names: tuple[str, ...] = static(default=())
    origins: tuple[str, ...] = static(default=())
    parents: tuple[tuple[int, ...], ...] = static(default=())
    num_steps: int = static(default=0)
    versions: Int[Array, "E"] | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        layers, heads = (
            [token for group in groups for token in group.tokens]
            for groups in (self.layers, self.heads)
        )
        check_numbering(layers, heads, self.names)
        self._check()

    def __repr__(self) -> str:
        parts = [describe_groups(self.layers, "layer"), describe_groups(self.heads, "head")]
        if self.stem is not None:
            parts.append(f"stem: {describe_module(self.stem)}")
        if self.names and None not in parts:
            parts.append(f"names {self.names[0]}..{self.names[self.num_layers - 1]}")
        return f"Bank({'; '.join(part or '...' for part in parts)})"

    @property
    def num_layers(self) -> int:
        """The number of layer tokens, N."""
        return sum(len(group.tokens) for group in self.layers)

    @property
    def num_heads(self) -> int:
        """The number of head tokens, K."""
        return sum(len(group.tokens) for group in self.heads)

    @property
    def stages(self) -> StageTable | None:
        """The stage that each layer and head reads and writes; None for a bank without stages."""
        return make_table(self.layers, self.heads, self.names)

    @checked
    def embed(self, x: Activations) -> PyTree:
        """Apply the stem to raw input, which gives the input of the first layer of a chain.

        Args:
          x: a batch of raw input, `[B, ...]`, or a pytree of such arrays.
        """
        return apply_stem(self.stem, self.stem_params, x)

    @checked
    def describe(self, chain: chain_lib.ChainsLike) -> str:
        """Return the names along one chain, for example `net0/0 -> net1/2 -> net0/head`.

        Args:
          chain: the tokens of one chain, `[L]`.

        Raises:
          ValueError: if `chain` is not a chain of this bank.
        """
        tokens = np.asarray(chain)
        if tokens.ndim != 1:
            raise ValueError(f"expected one chain of shape [L], got {list(tokens.shape)}")
        return chain_lib.describe(self.validate(tokens), self.names)

    @checked
    def validate(self, chains: chain_lib.ChainsLike) -> Int[np.ndarray, "*P L"]:
        """Check chains on the host and return them as an int32 array.

        Args:
          chains: one chain `[L]` or several `[P, L]`, with any number of slots L.

        Raises:
          ValueError: if a chain is invalid; see `jchain.chain.validate`.
        """
        return chain_lib.validate(chains, self.num_layers, self.num_heads, stages=self.stages)

    @staticmethod
    @partial(checked, but=("layer_params", "head_params"))
    def stack(
        layer: ModuleLike | Sequence[ModuleLike],
        layer_params: Sequence[PyTree] | None = None,
        head: ModuleLike | Sequence[ModuleLike] | None = None,
        head_params: Sequence[PyTree] | None = None,
        *,
        stem: ModuleLike | None = None,
        stem_params: PyTree = None,
        input_shape: PyTree = None,
        names: Sequence[str] | None = None,
        origins: Sequence[str] | None = None,
        parents: Sequence[Sequence[int]] = (),
        num_steps: int = 0,
        stages: Stages | None = None,
        head_stages: HeadStages | None = None,
    ) -> "Bank":
        """Build a bank from your own weights.

        A module is a Flax linen or nnx module, or a pure function `apply_fn(params, x)`.

        Args:
          layer: the module of all layers, or one module per layer. A layer's output must have the
            shape and dtype of its input, which may be a pytree of arrays.
          layer_params: for each layer, `layer.init(key, x)["params"]`, or all of
            `layer.init(key, x)` if it has other collections, such as `batch_stats`; any pytree for
            a function; None for an nnx module. None if all layers are nnx modules.
          head: the module of all heads, or one module per head.
          head_params: for each head, as for layers.
          stem: fixed module that maps raw input to the layers' input; None for the identity.
          stem_params: as for a layer.
          input_shape: the shape of the first layer's input without the batch dimension, to check
            the layers at once. If layers map a pytree of arrays, a pytree of shapes, or of
            `jax.ShapeDtypeStruct` for arrays that are not float32. None leaves the check to
            `Problem`, which has data.
          names: names of layers, or of layers and heads; `layer0`, ..., `head0`, ... by default.
          origins: for each layer and head, a few words about where its weights come from.
          parents: the nets that the layers come from, each as a chain: layer tokens, then a head.
          num_steps: number of gradient steps that trained the weights.
          stages: for layers of different shapes, the stage that a layer reads and the stage that it
            writes: one pair for all layers, or a list of one pair per layer. The stem writes 0.
          head_stages: the stage that heads read: one number for all heads, or a list of one number
            per head; the last stage by default.

        Raises:
          ValueError: if there is no layer or no head, a module is of another kind, modules and
            params differ in number, params do not stack, names are duplicated or missing, stages
            are invalid, a parent is not a chain, or `input_shape` does not fit the layers.
        """
        layers = group_by_module(layer, layer_params, "layer", 0, stages)
        num_layers = sum(len(group.tokens) for group in layers)
        head_stages = get_last_stage(layers) if head_stages is None else head_stages
        heads = group_by_module(head, head_params, "head", num_layers, head_stages)
        num_heads = sum(len(group.tokens) for group in heads)
        stem_module, stem_params = convert_stem(stem, stem_params)
        bank = Bank(
            layers=layers,
            heads=heads,
            stem_params=jax.tree.map(jnp.asarray, stem_params),
            stem=stem_module,
            names=complete_names(names, num_layers, num_heads),
            origins=tuple(("given",) * (num_layers + num_heads) if origins is None else origins),
            parents=tuple(tuple(int(token) for token in parent) for parent in parents),
            num_steps=num_steps,
        )
        if input_shape is not None:
            check_input_shape(bank.layers, bank.heads, input_shape, bank.names)
        return bank

    @staticmethod
    @checked
    def concat(banks: Sequence["Bank"]) -> "Bank":
        """Join banks, in the given order, with all layers before all heads.

        Layers of a module form one group. If any names collide, all get a prefix: `bank1/net0/2`.

        Args:
          banks: the banks to join, which must have the same stem.

        Raises:
          ValueError: if no bank is given, stems differ, or params of one module do not stack.
        """
        return merged.concat(banks)

    @checked
    def take(self, layers: Sequence[int], heads: Sequence[int] | None = None) -> "Bank":
        """Make a smaller bank from the given tokens, in the given order.

        A parent is dropped if any of its tokens is not kept.

        Args:
          layers: layer tokens to keep.
          heads: head tokens to keep (`N..N+K-1`); all heads if None.

        Raises:
          ValueError: if no layer or no head is kept, or a token repeats or is out of range.
        """
        return merged.take(self, layers, heads)

    @checked
    def reserve(self, num: int) -> "Bank":
        """Add `num` spare layers per module, which `replace` can fill without changing any shape.

        Until then, the new layers are copies of the module's layers, cycling through them. Their
        tokens are `N..N + num * G - 1`, with `num` tokens for each of the G modules. The tokens of
        the heads follow them.

        Args:
          num: number of layers to add per module.

        Raises:
          ValueError: if `num` is negative, or the bank already uses a name `spare{token}` that a
            new layer would get.
        """
        check_integers(at_least=0, num=num)
        return merged.reserve(self, num)

    @checked
    def blend(
        self,
        mixes: Sequence[tuple[int, int, float]],
        *,
        method: BlendMethod = "linear",
        base: int | Sequence[int] | None = None,
        density: float = 0.2,
    ) -> "Bank":
        """Add layers whose weights are mixed from those of two layers of one module.

        The layers can be the same block of two fine-tunes, or neighboring blocks of one model. The
        new tokens follow those of the layers, and are named `a ~ b (linear 0.5)`.

        Args:
          mixes: for each new layer, the tokens a and b of two layers, and a weight w.
          method: how weights are mixed. "linear": `(1 - w) a + w b`. "slerp": on the arc from a to
            b. "task_arithmetic": `base + w ((a - base) + (b - base))` (Ilharco et al. 2023,
            arXiv:2212.04089). "ties": the same, after conflicts of sign are resolved (Yadav et al.
            2023, arXiv:2306.01708).
          base: token of the layer that a and b were trained from, one for all mixes or one for
            each; only for "task_arithmetic" and "ties".
          density: share of the changed entries that "ties" keeps, above 0 and at most 1.

        Raises:
          ValueError: if layers have different modules, `base` is missing or not used, a weight is
            not finite, or there is not enough memory.
        """
        check_numbers(above=0, at_most=1, density=density)
        return merged.blend(self, mixes, method, base, density)

    @checked
    def scale(self, factors: Sequence[tuple[int, float]]) -> "Bank":
        """Add layers whose residual branches are those of other layers, multiplied by a factor.

        The new tokens follow those of the layers, and are named `a x 0.5`.

        Args:
          factors: for each new layer, the token of a residual layer, and the factor.

        Raises:
          ValueError: if a layer has no residual branch (see `jchain.merging.blending.HasBranch`),
            or a factor is not finite.
        """
        return merged.scale(self, factors)

    @checked
    def replace(
        self,
        tokens: Sequence[int],
        params: Sequence[PyTree],
        *,
        names: Sequence[str] | None = None,
        origins: Sequence[str] | None = None,
    ) -> "Bank":
        """Replace the weights of some tokens and increase their versions by one.

        All other tokens keep exactly the same weights.

        Args:
          tokens: the layers and heads to change, without repeats.
          params: for each token, the new params as a dict for its module.
          names: the new name of each token; unchanged if None.
          origins: for each token, where its new weights come from; unchanged if None.

        Raises:
          ValueError: if a token is out of range or repeats; params, names, or origins differ in
            number from the tokens; a name is already in use; or params differ in structure, shape,
            or dtype from those that they replace.
        """
        check_replacement(tokens, self.num_layers + self.num_heads, params, names, origins)
        bank = self
        for token, tree in zip(tokens, params, strict=True):
            group, _ = bank.find(token)
            bank = bank._replace_group(group, put(group, token, tree))
        bank = dataclasses.replace(
            bank,
            names=replace_words(self.names, tokens, names),
            origins=replace_words(self.origins, tokens, origins),
            versions=self.get_versions().at[np.array(tokens, int)].add(1),
        )
        return bank

    def _replace_group(self, group: LayerGroup, new: LayerGroup) -> "Bank":
        """Return the bank with `new` in place of its own `group`, without any checks."""
        return dataclasses.replace(
            self,
            layers=tuple(new if other is group else other for other in self.layers),
            heads=tuple(new if other is group else other for other in self.heads),
        )

    @checked
    def get_params(self, token: int) -> PyTree:
        """Return the params of one layer or head, or all its collections if it has others.

        Args:
          token: the token of the layer or head.

        Raises:
          ValueError: if the token is out of range.
        """
        group, index = self.find(token)
        return group.take(index)

    @checked
    def find(self, token: int) -> tuple[LayerGroup, int]:
        """Return `(group, index in the group)` of a layer or head.

        Args:
          token: the token of the layer or head.

        Raises:
          ValueError: if the token is out of range.
        """
        for group in (*self.layers, *self.heads):
            if token in group.tokens:
                return group, group.tokens.index(token)
        raise ValueError(
            f"expected a token in 0..{self.num_layers + self.num_heads - 1}, got {token}"
        )

    def get_versions(self) -> Int[Array, "E"]:
        """Return how many times the weights of each token have been replaced, `[N + K]`."""
        if self.versions is None:
            return jnp.zeros(self.num_layers + self.num_heads, jnp.int32)
        return self.versions

    def without_names(self) -> "Bank":
        """Drop the names, origins, parents, and step count, which compiled programs never read."""
        return dataclasses.replace(self, names=(), origins=(), parents=(), num_steps=0)

    @checked
    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the bank atomically to one file: safetensors with a JSON header.

        Args:
          path: the file to write.

        Raises:
          ValueError: if a module's fields or params cannot be written, or a function has no name by
            which it can be imported.
        """
        bare = unbind(self)
        names = [field.name for field in dataclasses.fields(bare)]
        files.write_bank(path, {name: getattr(bare, name) for name in names})

    @staticmethod
    @checked
    def load(path: str | os.PathLike[str], modules: Sequence[object] = ()) -> "Bank":
        """Read a bank that `save` wrote, with exactly the same bits.

        Args:
          path: the file to read.
          modules: your own modules that the bank uses: linen classes, functions, and instances of
            nnx modules (with any weights). jchain's and Flax's own classes need not be passed.

        Raises:
          FileNotFoundError: if the file does not exist.
          ValueError: if the file is damaged or truncated, or names an unknown module.
        """
        try:
            return Bank(**files.read_bank(path, modules))
        except ValueError as error:
            raise ValueError(f"{path}: {str(error).removeprefix(f'{path}: ')}") from None

    def _check(self) -> None:
        check_integers(at_least=0, num_steps=self.num_steps)
        check_names(self.names, self.origins)
        num = self.num_layers + self.num_heads
        if (versions := self.versions) is not None and versions.shape != (num,):
            raise ValueError(f"expected {num} versions, got {list(versions.shape)}")
        for parent in self.parents:
            self.validate(parent)
