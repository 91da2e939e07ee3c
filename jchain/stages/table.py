"""The stages that the layers and heads of a bank read and write, and the chains that they allow.

The stem writes stage 0. A layer reads one stage and writes one, which may be the same. In a legal
chain, each layer and the head read the stage that the layer before them has written.

The same rule describes chains that keep the order of a model and repeat no layer: there, a layer at
position `p` writes stage `p + 1`, and may follow any stage up to `p` (`StageTable.from_positions`).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, NamedTuple, overload

import jax.numpy as jnp
import numpy as np

from jchain._typing import Array, Bool, Int

# Nothing reads this stage: it is what heads and padding write.
_END = -1


class LegalEdits(NamedTuple):
    """Which edits of a legal chain give a legal chain, as far as stages are concerned."""

    swap: Bool[Array, "L N"]
    insert: Bool[Array, "L N"]
    delete: Bool[Array, "L"]
    head: Bool[Array, "K"]


@dataclass(frozen=True)
class StageTable:
    """The stages of each layer and head of a bank. Hashable, so it can be a static value.

    Attributes:
      layer_stages: for each layer, the stage that it reads and the stage that it writes.
      head_stages: for each head, the stage that it reads.
      names: the names of the tokens, for errors; empty if there are none.
      is_ordered: whether a layer or head may follow every stage up to the one that it reads.
    """

    layer_stages: tuple[tuple[int, int], ...]
    head_stages: tuple[int, ...]
    names: tuple[str, ...] = field(default=(), compare=False)
    is_ordered: bool = False

    @staticmethod
    def from_positions(
        positions: Sequence[int], num_heads: int, names: tuple[str, ...] = ()
    ) -> "StageTable":
        """Make the table of chains whose positions increase from layer to layer.

        Args:
          positions: the position of each layer, at least 0.
          num_heads: number of heads; any chain may end with each of them.
          names: the names of the tokens, for errors.
        """
        last = 1 + max(positions, default=-1)
        pairs = tuple((int(position), int(position) + 1) for position in positions)
        return StageTable(pairs, (last,) * num_heads, names, is_ordered=True)

    @property
    def num_stages(self) -> int:
        """The number of stages, with stage 0."""
        pairs = (*self.layer_stages, *((stage, stage) for stage in self.head_stages))
        return 1 + max(stage for pair in pairs for stage in pair)

    @property
    def reads(self) -> Int[np.ndarray, "E"]:
        """The stage that each layer and head reads, `[N + K]`."""
        return np.array([*(read for read, _ in self.layer_stages), *self.head_stages], np.int32)

    @property
    def writes(self) -> Int[np.ndarray, "E"]:
        """The stage that each layer writes, `[N + K]`; -1 for heads."""
        return np.array(
            [*(write for _, write in self.layer_stages), *(_END for _ in self.head_stages)]
        )

    @overload
    def fits(self, read: int | np.integer, stage: int | np.integer) -> bool | np.bool_: ...

    @overload
    def fits(self, read: np.ndarray, stage: np.ndarray) -> np.ndarray: ...

    @overload
    def fits(self, read: Array | np.ndarray | int, stage: Array) -> Array: ...

    def fits(
        self,
        read: Array | np.ndarray | int | np.integer,
        stage: Array | np.ndarray | int | np.integer,
    ) -> Array | np.ndarray | bool | np.bool_:
        """Return whether a token that reads a stage may follow another stage.

        Args:
          read: the stage that the token reads, a number or an array.
          stage: the stage that was written before it, a number or an array.
        """
        return (stage >= 0) & (stage <= read) if self.is_ordered else read == stage

    def follow(self, chains: Int[Array, "*P L"]) -> Int[Array, "*P L"]:
        """Return the stage before each slot of chains or prefixes; -1 after the head.

        Args:
          chains: int32 `[..., L]`; the tokens of each chain, or of each prefix, padded with -1.
        """
        return self._follow(chains, jnp)

    def reached(self, prefixes: Int[Array, "*P L"]) -> Int[Array, "*P"]:
        """Return the stage after the last layer of each prefix, or of the layers of each chain.

        Args:
          prefixes: int32 `[..., L]`; the tokens of each prefix, padded with -1.
        """
        is_layer = (prefixes >= 0) & (prefixes < len(self.layer_stages))
        length = is_layer.sum(axis=-1, keepdims=True)
        last = jnp.take_along_axis(prefixes, jnp.maximum(length - 1, 0), axis=-1)
        written = jnp.asarray(self.writes)[jnp.maximum(last, 0)]
        return jnp.where(length > 0, written, 0)[..., 0]

    def is_legal(self, chains: Int[Array, "*P L"]) -> Bool[Array, "*P"]:
        """Return whether each token reads the stage that was written before it.

        Args:
          chains: int32 `[..., L]`; the tokens of each chain, or of each prefix, padded with -1.
        """
        return self._fits(chains, jnp).all(axis=-1)

    def can_swap(self, token: Int[Array, "*L"]) -> Bool[Array, "*L N"]:
        """Return whether each layer reads and writes the same stages as a layer.

        Args:
          token: the token of the layer, or of several, `[...]`.
        """
        read, write = jnp.asarray(self.reads)[token], jnp.asarray(self.writes)[token]
        return jnp.stack(
            [(read == own[0]) & (write == own[1]) for own in self.layer_stages], axis=-1
        )

    def get_fitting_heads(self, prefixes: Int[Array, "*P L"]) -> Bool[Array, "*P K"]:
        """Return which heads read the stage that each prefix has reached.

        Args:
          prefixes: int32 `[..., L]`; the tokens of each prefix, padded with -1.
        """
        stage = self.reached(prefixes)
        return jnp.stack([self.fits(head, stage) for head in self.head_stages], axis=-1)

    def get_legal_edits(self, chain: Int[Array, "L"]) -> LegalEdits:
        """Return which edits of a legal chain give a legal chain.

        Args:
          chain: int32 `[L]`; the tokens of the chain. Entries after the head are undefined.
        """
        reads, writes = jnp.asarray(self.reads), jnp.asarray(self.writes)
        num_layers = len(self.layer_stages)
        before = self.follow(chain)
        own, later = reads[jnp.maximum(chain, 0)], reads[jnp.maximum(jnp.roll(chain, -1), 0)]
        follows = self.fits(reads[None, :num_layers], before[:, None])
        written = writes[None, :num_layers]
        can_swap = follows & self.fits(later[:, None], written)
        if self.is_ordered:
            # The new layer is put at its place, so only its position must be free.
            is_layer = (chain >= 0) & (chain < num_layers)
            is_equal = is_layer[:, None] & (own[:, None] == reads[None, :num_layers])
            can_swap = is_equal.sum(axis=0)[None] == is_equal
        return LegalEdits(
            can_swap,
            follows & self.fits(own[:, None], written),
            self.fits(later, before),
            self.get_fitting_heads(chain),
        )

    def check(self, rows: Int[np.ndarray, "P L"]) -> None:
        """Check chains on the host.

        Args:
          rows: the tokens of each chain, layers and then a head.

        Raises:
          ValueError: if a layer or head does not read the stage before it.
        """
        is_bad = ~self._fits(rows, np)
        if is_bad.any():
            row, slot = np.argwhere(is_bad)[0]
            token, num_layers = int(rows[row, slot]), len(self.layer_stages)
            kind = f"layer {token}" if token < num_layers else f"head {token - num_layers}"
            name = f" {self.names[token]!r}" if self.names else ""
            before = self._follow(rows, np)[row, slot]
            if self.is_ordered:
                raise ValueError(
                    f"chain {row}: expected layers in the order of the model, each at most once, "
                    f"got {kind}{name} at slot {slot}, at position {self.reads[token]} after "
                    f"position {before - 1}"
                )
            raise ValueError(
                f"chain {row}: expected a chain whose layers follow each other: {kind}{name} reads "
                f"stage {self.reads[token]}, got stage {before} at slot {slot}"
            )

    def _follow(self, chains: Any, xp: ModuleType) -> Any:
        written = xp.where(chains >= 0, xp.asarray(self.writes)[xp.maximum(chains, 0)], _END)
        return xp.concatenate([xp.zeros_like(written[..., :1]), written[..., :-1]], axis=-1)

    def _fits(self, chains: Any, xp: ModuleType) -> Any:
        read = xp.asarray(self.reads)[xp.maximum(chains, 0)]
        return (chains < 0) | self.fits(read, self._follow(chains, xp))
