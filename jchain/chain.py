"""Chains as index arrays: `int32[L]`, zero or more layer tokens, one head token, then -1 (see `validate`).

With `N` layers and `K` heads, tokens `0..N-1` are layers, `N..N+K-1` heads, -1 padding. `L = max_layers + 1`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jchain._typing import Array, Bool, Int, Key

PADDING = -1


@dataclass(frozen=True)
class ChainSpace:
    """Every chain that a problem allows: `min_layers` to `max_layers` layers, then one head.

    Hashable. `Problem.space` is that of a problem.
    """

    num_layers: int  # N, layers in the bank
    num_heads: int  # K, heads in the bank
    max_layers: int  # most layers in a chain; chains have L = max_layers + 1 slots
    min_layers: int = 0  # fewest layers in a chain

    @property
    def num_chains(self) -> int:
        """The number of chains in the space."""
        return count(self.num_layers, self.num_heads, self.max_layers, min_layers=self.min_layers)

    @property
    def num_neighbors(self) -> int:
        """M, the rows that `neighbors` returns."""
        return self.max_layers * (2 * self.num_layers + 1) + self.num_heads

    @property
    def head_alone(self) -> Int[Array, "L"]:
        """The first head alone: a chain that costs no layer call."""
        return bare(self.num_layers, self.max_layers)

    def count_layers(self, chains: Int[Array, "*P L"]) -> Int[Array, "*P"]:
        """How many layers each chain has, which is also the slot of its head."""
        return count_layers(chains, self.num_layers)

    def sample(self, key: Key[Array, ""], num_chains: int) -> Int[Array, "P L"]:
        """Chains drawn uniformly from the space, with replacement. Most are long, as most chains of the space are."""
        sizes = (self.num_layers, self.num_heads, self.max_layers)
        return sample(key, num_chains, *sizes, min_layers=self.min_layers)

    def enumerate(self) -> Int[np.ndarray, "C L"]:
        """Every chain of the space, shorter chains first, each length in the order of its tokens."""
        return enumerate_all(
            self.num_layers, self.num_heads, self.max_layers, min_layers=self.min_layers
        )

    def neighbors(self, chain: Int[Array, "L"]) -> tuple[Int[Array, "M L"], Bool[Array, "M"]]:
        """Every chain of the space that is one edit away, as padded rows and a mask of the rows that count."""
        return neighbors(chain, self.num_layers, self.num_heads, min_layers=self.min_layers)

    def index(self, chains: Int[Array, "*P L"]) -> Int[Array, "*P"]:
        """The place of each chain in the enumeration of chains of every length (`min_layers` of 0)."""
        return index(chains, self.num_layers, self.num_heads)

    def validate(self, chains: Any) -> Int[np.ndarray, "*P L"]:
        """The chains as an int32 array, checked on the host. Shorter chains than `min_layers` pass."""
        return validate(chains, self.num_layers, self.num_heads, self.max_layers)


def validate(
    chains: Any, num_layers: int, num_heads: int, max_layers: int | None = None
) -> Int[np.ndarray, "*P L"]:
    """The chains as an int32 array, on the host.

    Args:
      chains: tokens, `[L]` or `[P, L]`.
      num_layers: layers in the bank, N.
      num_heads: heads in the bank, K.
      max_layers: when given, `L` must be `max_layers + 1`.

    Raises:
      ValueError: the tokens are not integers, have another shape, are out of range, or are not layers, then one head,
        then -1; the message names the first chain that fails.
    """
    array = np.asarray(chains)
    expected = "[P, L]" if max_layers is None else f"[P, {max_layers + 1}]"
    if array.ndim not in (1, 2) or (max_layers is not None and array.shape[-1] != max_layers + 1):
        raise ValueError(
            f"expected chains of shape {expected} (L = max_layers + 1), got {list(array.shape)}: "
            "jc.chain.pad fills shorter ones, longer ones need more max_layers"
        )
    if not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"expected chains of integer tokens, got dtype {array.dtype}")
    rows = np.atleast_2d(array)
    _check_range(rows, num_layers, num_heads)
    _check_form(rows, num_layers)
    return array.astype(np.int32)


def _check_range(rows: np.ndarray, num_layers: int, num_heads: int) -> None:
    is_bad = (rows < PADDING) | (rows >= num_layers + num_heads)
    if is_bad.any():
        row, slot = np.argwhere(is_bad)[0]
        raise ValueError(
            f"chain {row}: token {rows[row, slot]} at slot {slot} is out of range: expected 0..{num_layers - 1} "
            f"(layers), {num_layers}..{num_layers + num_heads - 1} (heads) or {PADDING} (padding)"
        )


def _check_form(rows: np.ndarray, num_layers: int) -> None:
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
                f"chain {row} {problem}: expected layer tokens, then one head token, then {PADDING}, got "
                f"{rows[row].tolist()}"
            )


def pad(tokens: Sequence[Sequence[int]], max_layers: int | None = None) -> Int[np.ndarray, "P L"]:
    """Chains of different lengths as one array, -1 behind each.

    Args:
      tokens: for each chain its layer tokens and its head.
      max_layers: layers that fit; that of the longest chain when None.

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
    """How many layers each chain has, which is also the slot of its head."""
    return jnp.sum((chains >= 0) & (chains < num_layers), axis=-1)


def count(num_layers: int, num_heads: int, max_layers: int, *, min_layers: int = 0) -> int:
    """How many chains there are of `min_layers` to `max_layers` layers and a head."""
    return num_heads * sum(num_layers**depth for depth in range(min_layers, max_layers + 1))


def sample(
    key: Key[Array, ""],
    num_chains: int,
    num_layers: int,
    num_heads: int,
    max_layers: int,
    *,
    min_layers: int = 0,
) -> Int[Array, "P L"]:
    """Chains drawn uniformly, with replacement, from all `count(...)` of them (so most are long)."""
    length_key, layer_key, head_key = jax.random.split(key, 3)
    # P(depth) is proportional to N^depth; the number of heads cancels. In logs, as N^depth overflows.
    logits = jnp.arange(min_layers, max_layers + 1) * jnp.log(num_layers)
    length = min_layers + jax.random.categorical(length_key, logits, shape=(num_chains, 1))
    layers = jax.random.randint(layer_key, (num_chains, max_layers + 1), 0, num_layers)
    heads = jax.random.randint(head_key, (num_chains, 1), num_layers, num_layers + num_heads)
    slots = jnp.arange(max_layers + 1)[None]
    chains = jnp.where(slots < length, layers, jnp.where(slots == length, heads, PADDING))
    return chains.astype(jnp.int32)


def enumerate_all(
    num_layers: int, num_heads: int, max_layers: int, *, min_layers: int = 0
) -> Int[np.ndarray, "P L"]:
    """Every chain of `min_layers` to `max_layers` layers and a head, shorter chains first, in the order of their tokens.

    `count(...)` says how many that is before any memory is taken.
    """
    blocks = []
    for depth in range(min_layers, max_layers + 1):
        number = np.arange(num_layers**depth * num_heads)
        block = np.full((len(number), max_layers + 1), PADDING, np.int32)
        number, head = np.divmod(number, num_heads)
        block[:, depth] = num_layers + head
        for slot in reversed(range(depth)):
            number, block[:, slot] = np.divmod(number, num_layers)
        blocks.append(block)
    return np.concatenate(blocks)


def bare(num_layers: int, max_layers: int) -> Int[Array, "L"]:
    """The first head alone: a chain that costs no layer call."""
    return jnp.full(max_layers + 1, PADDING, jnp.int32).at[0].set(num_layers)


def index(chains: Int[Array, "*P L"], num_layers: int, num_heads: int) -> Int[Array, "*P"]:
    """The place of each chain in `enumerate_all` of chains of every length.

    Raises:
      ValueError: there are so many chains that a place does not fit 32 bits.
    """
    max_layers = chains.shape[-1] - 1
    if count(num_layers, num_heads, max_layers) >= 2**31:
        raise ValueError(
            f"expected fewer than 2^31 chains, got {count(num_layers, num_heads, max_layers):,}"
        )
    length = count_layers(chains, num_layers)
    shorter = jnp.array([0, *(count(num_layers, num_heads, depth) for depth in range(max_layers))])
    layers = jnp.zeros_like(length)
    for slot in range(max_layers):
        layers = jnp.where(slot < length, layers * num_layers + chains[..., slot], layers)
    head = jnp.take_along_axis(chains, length[..., None], axis=-1)[..., 0] - num_layers
    return shorter[length] + layers * num_heads + head


def neighbors(
    chain: Int[Array, "L"], num_layers: int, num_heads: int, *, min_layers: int = 0
) -> tuple[Int[Array, "M L"], Bool[Array, "M"]]:
    """Every chain of at least `min_layers` layers that is one edit away, in a fixed number of rows, so that it can be jitted
    and vmapped.

    Rows, with `D = max_layers` slots for layers: `D * N` swaps of a layer, `K` swaps of the head, `D * N` insertions,
    `D` deletions.

    Returns:
      The chains and the mask of the rows that are chains, differ from `chain`, and stand only once.
    """
    max_layers = chain.shape[0] - 1
    length = count_layers(chain, num_layers)
    slots, row = jnp.arange(max_layers + 1)[None], chain[None]
    at, token = (
        grid.reshape(-1, 1) for grid in jnp.meshgrid(jnp.arange(max_layers), jnp.arange(num_layers))
    )
    earlier = jnp.roll(chain, 1)

    swaps = jnp.where(slots == at, token, row)
    is_swap = (at[:, 0] < length) & (token[:, 0] != chain[at[:, 0]])

    head = num_layers + jnp.arange(num_heads)[:, None]
    head_swaps = jnp.where(slots == length, head, row)
    is_head_swap = head[:, 0] != chain[length]

    inserts = jnp.where(slots < at, row, jnp.where(slots == at, token, earlier[None]))
    # In a run of equal layers, inserting one more, or deleting one, gives the same chain at each place: keep the first.
    is_repeat = (at[:, 0] > 0) & (token[:, 0] == earlier[at[:, 0]])
    is_insert = (at[:, 0] <= length) & (length < max_layers) & ~is_repeat

    gap = jnp.arange(max_layers)
    later = jnp.roll(chain, -1).at[-1].set(PADDING)
    deletes = jnp.where(slots < gap[:, None], row, later[None])
    is_delete = (gap < length) & (length > min_layers) & ~((gap > 0) & (chain[gap] == earlier[gap]))

    chains = jnp.concatenate([swaps, head_swaps, inserts, deletes]).astype(chain.dtype)
    return chains, jnp.concatenate([is_swap, is_head_swap, is_insert, is_delete])


def describe(tokens: Any, names: Sequence[str]) -> str:
    """The names along one chain, `net0/0 -> net1/2 -> net0/head`, padding left out."""
    return " -> ".join(names[int(token)] for token in np.asarray(tokens) if token != PADDING)
