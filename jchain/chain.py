"""Chains as index arrays, `int32[L]`: zero or more layer tokens, one head token, then -1.

With `N` layers and `K` heads in the bank, tokens `0..N-1` are layers, `N..N+K-1` are heads, and -1
is padding. `L = max_layers + 1`. `ChainSpace` holds the sizes and everything that depends on them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jchain._typing import Array, Bool, Int, Key

PADDING = -1

# Chains from a user: an array of integers, or lists of integers.
ChainsLike = ArrayLike | Sequence[object]


@dataclass(frozen=True)
class ChainSpace:
    """Every chain that a problem allows: `min_layers` to `max_layers` layers, then one head.

    Hashable. `Problem.space` is the space of a problem.

    Attributes:
      num_layers: N, layers in the bank.
      num_heads: K, heads in the bank.
      max_layers: maximum number of layers in a chain; chains have `L = max_layers + 1` slots.
      min_layers: minimum number of layers in a chain.
    """

    num_layers: int
    num_heads: int
    max_layers: int
    min_layers: int = 0

    @property
    def num_chains(self) -> int:
        """The number of chains in the space."""
        depths = range(self.min_layers, self.max_layers + 1)
        return self.num_heads * sum(self.num_layers**depth for depth in depths)

    @property
    def num_neighbors(self) -> int:
        """M, the number of rows that `neighbors` returns."""
        return self.max_layers * (2 * self.num_layers + 1) + self.num_heads

    @property
    def head_alone(self) -> Int[Array, "L"]:
        """The first head alone: a chain that costs no layer call."""
        return jnp.full(self.max_layers + 1, PADDING, jnp.int32).at[0].set(self.num_layers)

    def count_layers(self, chains: Int[Array, "*P L"]) -> Int[Array, "*P"]:
        """The number of layers of each chain, which is also the slot of its head.

        Args:
          chains: tokens, `[..., L]`.
        """
        return count_layers(chains, self.num_layers)

    def sample(self, key: Key[Array, ""], num_chains: int) -> Int[Array, "P L"]:
        """Draw chains uniformly from the space, with replacement.

        Most of them are long, because most chains of the space are.

        Args:
          key: consumed.
          num_chains: number of chains to draw, P.
        """
        length_key, layer_key, head_key = jax.random.split(key, 3)
        # P(depth) is proportional to N^depth; the number of heads cancels. Use logs,
        # because N^depth overflows.
        depths = jnp.arange(self.min_layers, self.max_layers + 1)
        logits = depths * jnp.log(self.num_layers)
        length = self.min_layers + jax.random.categorical(length_key, logits, shape=(num_chains, 1))
        shape = (num_chains, self.max_layers + 1)
        layers = jax.random.randint(layer_key, shape, 0, self.num_layers)
        num_tokens = self.num_layers + self.num_heads
        heads = jax.random.randint(head_key, (num_chains, 1), self.num_layers, num_tokens)
        slots = jnp.arange(self.max_layers + 1)[None]
        chains = jnp.where(slots < length, layers, jnp.where(slots == length, heads, PADDING))
        return chains.astype(jnp.int32)

    def enumerate(self) -> Int[np.ndarray, "C L"]:
        """List every chain of the space: shorter chains first, in token order within each length.

        Check `num_chains` first if there may be too many for memory.
        """
        blocks = []
        for depth in range(self.min_layers, self.max_layers + 1):
            number = np.arange(self.num_layers**depth * self.num_heads)
            block = np.full((len(number), self.max_layers + 1), PADDING, np.int32)
            number, head = np.divmod(number, self.num_heads)
            block[:, depth] = self.num_layers + head
            for slot in reversed(range(depth)):
                number, block[:, slot] = np.divmod(number, self.num_layers)
            blocks.append(block)
        return np.concatenate(blocks)

    def neighbors(self, chain: Int[Array, "L"]) -> tuple[Int[Array, "M L"], Bool[Array, "M"]]:
        """List every chain of the space that is one edit away.

        The number of rows is fixed, so this can be jitted and vmapped. With `D = max_layers`, the
        rows are `D * N` swaps of a layer, `K` swaps of the head, `D * N` insertions, and `D`
        deletions.

        Args:
          chain: tokens, `[L]`.

        Returns:
          The chains, `[M, L]`, and a mask, `[M]`: True for rows that are chains of the space,
          differ from `chain`, and differ from all earlier rows.
        """
        num_layers, max_layers = self.num_layers, self.max_layers
        length = count_layers(chain, num_layers)
        slots, row = jnp.arange(max_layers + 1)[None], chain[None]
        at, token = (
            grid.reshape(-1, 1)
            for grid in jnp.meshgrid(jnp.arange(max_layers), jnp.arange(num_layers))
        )
        earlier = jnp.roll(chain, 1)

        swaps = jnp.where(slots == at, token, row)
        is_swap = (at[:, 0] < length) & (token[:, 0] != chain[at[:, 0]])

        head = num_layers + jnp.arange(self.num_heads)[:, None]
        head_swaps = jnp.where(slots == length, head, row)
        is_head_swap = head[:, 0] != chain[length]

        inserts = jnp.where(slots < at, row, jnp.where(slots == at, token, earlier[None]))
        # Inserting or deleting a layer in a run of equal layers gives the same chain at each slot
        # of the run: keep only the first.
        is_repeat = (at[:, 0] > 0) & (token[:, 0] == earlier[at[:, 0]])
        is_insert = (at[:, 0] <= length) & (length < max_layers) & ~is_repeat

        gap = jnp.arange(max_layers)
        later = jnp.roll(chain, -1).at[-1].set(PADDING)
        deletes = jnp.where(slots < gap[:, None], row, later[None])
        is_repeat = (gap > 0) & (chain[gap] == earlier[gap])
        is_delete = (gap < length) & (length > self.min_layers) & ~is_repeat

        chains = jnp.concatenate([swaps, head_swaps, inserts, deletes]).astype(chain.dtype)
        return chains, jnp.concatenate([is_swap, is_head_swap, is_insert, is_delete])

    def index(self, chains: Int[Array, "*P L"]) -> Int[Array, "*P"]:
        """Find the index of each chain in the enumeration of chains of every length.

        It is the row in `enumerate` of a space whose `min_layers` is 0; the `min_layers` of this
        space is ignored.

        Args:
          chains: tokens, `[..., L]`.

        Raises:
          ValueError: there are 2^31 chains or more, too many for a 32-bit index.
        """
        num_layers, num_heads, max_layers = self.num_layers, self.num_heads, self.max_layers
        if (total := ChainSpace(num_layers, num_heads, max_layers).num_chains) >= 2**31:
            raise ValueError(f"expected fewer than 2^31 chains, got {total:,}")
        spaces = [ChainSpace(num_layers, num_heads, depth) for depth in range(max_layers)]
        shorter = jnp.array([0, *(space.num_chains for space in spaces)])
        length = count_layers(chains, num_layers)
        layers = jnp.zeros_like(length)
        for slot in range(max_layers):
            layers = jnp.where(slot < length, layers * num_layers + chains[..., slot], layers)
        head = jnp.take_along_axis(chains, length[..., None], axis=-1)[..., 0] - num_layers
        return shorter[length] + layers * num_heads + head

    def validate(self, chains: ChainsLike) -> Int[np.ndarray, "*P L"]:
        """Return the chains as an int32 array, checked on the host.

        Chains with fewer than `min_layers` layers are accepted.

        Args:
          chains: tokens, `[L]` or `[P, L]`.

        Raises:
          ValueError: as for `jchain.chain.validate`.
        """
        return validate(chains, self.num_layers, self.num_heads, self.max_layers)


def validate(
    chains: ChainsLike, num_layers: int, num_heads: int, max_layers: int | None = None
) -> Int[np.ndarray, "*P L"]:
    """Return the chains as an int32 array, checked on the host.

    Args:
      chains: tokens, `[L]` or `[P, L]`.
      num_layers: N, layers in the bank.
      num_heads: K, heads in the bank.
      max_layers: if given, `L` must be `max_layers + 1`.

    Raises:
      ValueError: the tokens are not integers, have a wrong shape, are out of range, or are not in
        this order: layers, one head, -1. The message names the first invalid chain.
    """
    array = np.asarray(chains)
    expected = "[P, L]" if max_layers is None else f"[P, {max_layers + 1}]"
    if array.ndim not in (1, 2) or (max_layers is not None and array.shape[-1] != max_layers + 1):
        raise ValueError(
            f"expected chains of shape {expected} (L = max_layers + 1), got {list(array.shape)}: "
            "jc.chain.pad pads shorter chains; longer chains need a larger max_layers"
        )
    if not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"expected chains of integer tokens, got dtype {array.dtype}")
    rows = np.atleast_2d(array)
    _check_range(rows, num_layers, num_heads)
    _check_order(rows, num_layers)
    return array.astype(np.int32)


def _check_range(rows: np.ndarray, num_layers: int, num_heads: int) -> None:
    is_bad = (rows < PADDING) | (rows >= num_layers + num_heads)
    if is_bad.any():
        row, slot = np.argwhere(is_bad)[0]
        raise ValueError(
            f"chain {row}: token {rows[row, slot]} at slot {slot} is out of range: "
            f"expected 0..{num_layers - 1} (layers), "
            f"{num_layers}..{num_layers + num_heads - 1} (heads) or {PADDING} (padding)"
        )


def _check_order(rows: np.ndarray, num_layers: int) -> None:
    is_head = rows >= num_layers
    head_slot = np.where(is_head.any(axis=1), is_head.argmax(axis=1), rows.shape[1])
    is_before = np.arange(rows.shape[1]) < head_slot[:, None]
    is_after = np.arange(rows.shape[1]) > head_slot[:, None]
    for problem, is_bad in {
        "has no head token": ~is_head.any(axis=1),
        "has padding before its head": (is_before & (rows == PADDING)).any(axis=1),
        "has tokens after its head": (is_after & (rows != PADDING)).any(axis=1),
    }.items():
        if is_bad.any():
            row = int(is_bad.argmax())
            raise ValueError(
                f"chain {row} {problem}: expected layer tokens, then one head token, then "
                f"{PADDING}, got {rows[row].tolist()}"
            )


def pad(tokens: Sequence[Sequence[int]], max_layers: int | None = None) -> Int[np.ndarray, "P L"]:
    """Put chains of different lengths into one array, padded with -1.

    Args:
      tokens: for each chain, its layer tokens and its head.
      max_layers: `L - 1`; the number of layers of the longest chain if None.

    Raises:
      ValueError: no chain is given, or one is longer than `max_layers`.
    """
    if len(tokens) == 0:
        raise ValueError("expected at least one chain, got none")
    longest = max(len(chain) for chain in tokens)
    slots = longest if max_layers is None else max_layers + 1
    if longest > slots:
        raise ValueError(
            f"expected chains of at most {slots - 1} layers and a head, got one of {longest} tokens"
        )
    chains = np.full((len(tokens), slots), PADDING, np.int32)
    for row, chain in zip(chains, tokens, strict=True):
        row[: len(chain)] = chain
    return chains


def count_layers(chains: Int[Array, "*P L"], num_layers: int) -> Int[Array, "*P"]:
    """The number of layers of each chain, which is also the slot of its head.

    Args:
      chains: tokens, `[..., L]`.
      num_layers: N, layers in the bank.
    """
    return jnp.sum((chains >= 0) & (chains < num_layers), axis=-1)


def describe(tokens: ChainsLike, names: Sequence[str]) -> str:
    """The names along one chain, for example `net0/0 -> net1/2 -> net0/head`.

    Args:
      tokens: one chain, `[L]`.
      names: the name of each token.
    """
    return " -> ".join(names[int(token)] for token in np.asarray(tokens) if token != PADDING)
