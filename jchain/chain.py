"""Chains as index arrays, `int32[L]`: zero or more layer tokens, one head token, then -1.

With `N` layers and `K` heads in the bank, tokens `0..N-1` are layers, `N..N+K-1` are heads, and -1
is padding. `L = max_layers + 1`. `ChainSpace` holds these sizes and lists, samples, and checks the
chains that they allow.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jchain._typing import Array, Bool, Int, Key
from jchain.arguments import check_at_least_one, check_integers, checked, is_integer, read_array
from jchain.pytree import shorten
from jchain.stages import legal_chains
from jchain.stages.edits import Sizes, list_edits
from jchain.stages.table import StageTable

__all__ = ["PADDING", "ChainSpace", "ChainsLike", "count_layers", "describe", "pad", "validate"]

PADDING = -1
# The numbers of chains of longer chains take seconds to compute.
_MAX_LAYERS = 4096

# Chains as a user may pass them: an array of integers, or lists of integers.
ChainsLike = ArrayLike | Sequence[object]


@dataclass(frozen=True)
class ChainSpace:
    """The set of chains that a problem allows: `min_layers` to `max_layers` layers, then one head.

    A `ChainSpace` is hashable. `Problem.space` is the space of a problem. The `max_cost` of a
    problem is not part of its space: `jchain.env.sample_chains` and `jchain.env.neighbors` respect
    it.

    Attributes:
      num_layers: number of layers in the bank, N.
      num_heads: number of heads in the bank, K.
      max_layers: maximum number of layers in a chain; chains have `L = max_layers + 1` slots.
      min_layers: minimum number of layers in a chain.
      stages: the stages that layers and heads read and write, which chains must follow, or the
        positions of the layers, which must increase; None if any layer may follow any other.

    Raises:
      ValueError: if a number is not an integer, or out of range.
    """

    num_layers: int
    num_heads: int
    max_layers: int
    min_layers: int = 0
    stages: StageTable | None = None

    def __post_init__(self) -> None:
        check_integers(at_least=0, num_layers=self.num_layers)
        check_integers(at_least=1, num_heads=self.num_heads)
        check_min_layers(self.min_layers, check_max_layers(self.max_layers))

    @property
    def named_sizes(self) -> dict[str, int]:
        """The sizes of the axes that the annotations of arrays name."""
        return {"L": self.max_layers + 1}

    @property
    def positions(self) -> tuple[int, ...] | None:
        """The position of each layer, which must rise along a chain; None if there are none."""
        if self.stages is None or not self.stages.is_ordered:
            return None
        return tuple(position for position, _ in self.stages.layer_stages)

    @property
    def num_chains(self) -> int:
        """The number of chains in the space."""
        depths = range(self.min_layers, self.max_layers + 1)
        if self.stages is not None:
            counts = legal_chains.count_completions(self.stages, self.max_layers)
            return sum(counts[depth][0] for depth in depths)
        return self.num_heads * sum(self.num_layers**depth for depth in depths)

    @property
    def num_neighbors(self) -> int:
        """The number of rows that `neighbors` returns, M."""
        return self.max_layers * (2 * self.num_layers + 1) + self.num_heads

    @property
    def head_alone(self) -> Int[Array, "L"]:
        """The chain that has no layers, only the first head, and so costs no layer call.

        It fills rows whose loss is not used. It is illegal if this head reads a later stage.
        """
        return jnp.full(self.max_layers + 1, PADDING, jnp.int32).at[0].set(self.num_layers)

    @checked
    def count_layers(self, chains: Int[Array, "*P T"]) -> Int[Array, "*P"]:
        """Count the layers of each chain. The count is also the slot of the chain's head.

        Args:
          chains: int32 `[..., L]`; the tokens of each chain.
        """
        return count_layers(chains, self.num_layers)

    @checked
    def sample(self, key: Key[Array, ""], num_chains: int) -> Int[Array, "P L"]:
        """Draw chains uniformly from the space, with replacement.

        Most of the drawn chains are long, because most chains of the space are long. To draw chains
        within the `max_cost` of a problem, use `jchain.env.sample_chains`.

        Args:
          key: the PRNG key; consumed by this call.
          num_chains: number of chains to draw, P.
        """
        check_at_least_one(num_chains=num_chains)
        if self.stages is not None:
            return legal_chains.sample_chains(
                key, self.stages, self.min_layers, self.max_layers, num_chains
            )
        length_key, layer_key, head_key = jax.random.split(key, 3)
        # P(depth) is proportional to N^depth; the number of heads cancels. Logarithms avoid the
        # overflow of N^depth.
        depths = jnp.arange(self.min_layers, self.max_layers + 1)
        logits = (depths * jnp.log(self.num_layers)).astype(jnp.float32)
        length = self.min_layers + jax.random.categorical(length_key, logits, shape=(num_chains, 1))
        shape = (num_chains, self.max_layers + 1)
        layers = jax.random.randint(layer_key, shape, 0, self.num_layers, jnp.int32)
        num_tokens = self.num_layers + self.num_heads
        heads = jax.random.randint(
            head_key, (num_chains, 1), self.num_layers, num_tokens, jnp.int32
        )
        slots = jnp.arange(self.max_layers + 1)[None]
        chains = jnp.where(slots < length, layers, jnp.where(slots == length, heads, PADDING))
        return chains.astype(jnp.int32)

    def enumerate(self) -> Int[np.ndarray, "C L"]:
        """List every chain of the space, shorter chains first.

        Chains of the same length are in token order. A large space may not fit in memory, so check
        `num_chains` first.
        """
        if self.stages is not None:
            return legal_chains.enumerate_chains(self.stages, self.min_layers, self.max_layers)
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

    @checked
    def neighbors(self, chain: Int[Array, "L"]) -> tuple[Int[Array, "M L"], Bool[Array, "M"]]:
        """List every chain of the space that is one edit away from a chain.

        The number of rows is fixed, so this method can be jitted and vmapped. With
        `D = max_layers`, the rows are `D * N` swaps of a layer, `K` swaps of the head, `D * N`
        insertions, and `D` deletions. If the positions of layers must increase, the new layer of a
        swap is put at its place, which may be another slot. `jchain.env.neighbors` also respects
        the `max_cost` of a problem.

        Args:
          chain: int32 `[L]`; the tokens of the chain to edit.

        Returns:
          The chains, `[M, L]`, and a mask, `[M]`. The mask is True for rows that are chains of the
          space and differ from `chain` and from all earlier rows.
        """
        length = count_layers(chain, self.num_layers)
        sizes = Sizes(self.num_layers, self.num_heads, self.max_layers, self.min_layers)
        return list_edits(chain, length, sizes, self.stages)

    @checked
    def contains(self, chains: Int[Array, "*P T"]) -> Bool[Array, "*P"]:
        """Return whether each row is a chain of the space. Can be jitted, unlike `validate`.

        Args:
          chains: int32 `[..., L]`; the tokens of each row.
        """
        is_layer = (chains >= 0) & (chains < self.num_layers)
        is_head = (chains >= self.num_layers) & (chains < self.num_layers + self.num_heads)
        is_leading = jnp.cumprod(is_layer, axis=-1).astype(bool)  # with only layers up to here
        is_first = jnp.ones_like(is_leading[..., :1])
        is_reached = jnp.concatenate([is_first, is_leading[..., :-1]], axis=-1)
        has_head = (is_head & is_reached).any(axis=-1)
        is_padded = ((chains == PADDING) | is_reached).all(axis=-1)
        length = is_leading.sum(axis=-1)
        is_chain = has_head & is_padded & (length >= self.min_layers) & (length <= self.max_layers)
        return is_chain if self.stages is None else is_chain & self.stages.is_legal(chains)

    @checked
    def index(self, chains: Int[Array, "*P L"]) -> Int[Array, "*P"]:
        """Return the index of each chain among all chains of up to `max_layers` layers.

        This is the chain's row in `enumerate` of a space whose `min_layers` is 0. The `min_layers`
        of this space is ignored. The index of a chain that is not legal is undefined.

        Args:
          chains: int32 `[..., L]`; the tokens of each chain.

        Raises:
          ValueError: if there are 2^31 chains or more, too many for a 32-bit index.
        """
        num_layers, num_heads, max_layers = self.num_layers, self.num_heads, self.max_layers
        if (total := replace(self, min_layers=0).num_chains) >= 2**31:
            raise ValueError(f"expected fewer than 2^31 chains, got {total:,}")
        if self.stages is not None:
            length = count_layers(chains, num_layers)
            return legal_chains.index_chains(self.stages, max_layers, chains, length)
        spaces = [ChainSpace(num_layers, num_heads, depth) for depth in range(max_layers)]
        shorter = jnp.array([0, *(space.num_chains for space in spaces)])
        length = count_layers(chains, num_layers)
        layers = jnp.zeros_like(length)
        for slot in range(max_layers):
            layers = jnp.where(slot < length, layers * num_layers + chains[..., slot], layers)
        head = jnp.take_along_axis(chains, length[..., None], axis=-1)[..., 0] - num_layers
        return shorter[length] + layers * num_heads + head

    @checked
    def validate(self, chains: ChainsLike) -> Int[np.ndarray, "*P L"]:
        """Check chains on the host and return them as an int32 array.

        Chains with fewer than `min_layers` layers are accepted.

        Args:
          chains: one chain `[L]` or several `[P, L]`.

        Raises:
          ValueError: if a chain is invalid; see `jchain.chain.validate`.
        """
        return validate(chains, self.num_layers, self.num_heads, self.max_layers, self.stages)


@checked
def validate(
    chains: ChainsLike,
    num_layers: int,
    num_heads: int,
    max_layers: int | None = None,
    stages: StageTable | None = None,
) -> Int[np.ndarray, "*P L"]:
    """Check chains on the host and return them as an int32 array.

    Args:
      chains: one chain `[L]` or several `[P, L]`. Lists of tokens may be shorter and are padded.
      num_layers: number of layers in the bank, N.
      num_heads: number of heads in the bank, K.
      max_layers: maximum number of layers, so that `L` must be `max_layers + 1`; any `L` if None.
      stages: the stages that chains must follow, if the bank has stages.

    Raises:
      ValueError: if the tokens are not integers, have the wrong shape, are out of range, are not in
        this order: layers, one head, -1, or do not follow the stages. The message names the first
        invalid chain.
    """
    try:
        array = np.asarray(_pad_lists(chains, max_layers))
    except (TypeError, ValueError, OverflowError) as error:
        if str(error).startswith("expected "):
            raise
        raise ValueError(f"expected chains of integer tokens, got {shorten(chains)}") from None
    expected = "[P, L]" if max_layers is None else f"[P, {max_layers + 1}]"
    if array.ndim not in (1, 2) or (max_layers is not None and array.shape[-1] != max_layers + 1):
        raise ValueError(
            f"expected chains of shape {expected} (L = max_layers + 1), got {list(array.shape)}: "
            "jc.chain.pad pads shorter arrays; longer chains need a larger max_layers"
        )
    if not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"expected chains of integer tokens, got dtype {array.dtype}")
    rows = np.atleast_2d(array)
    _check_range(rows, num_layers, num_heads)
    _check_order(rows, num_layers)
    if stages is not None:
        stages.check(rows)
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


@partial(checked, but=("tokens",))
def pad(
    tokens: Sequence[Sequence[int] | np.ndarray | Array], max_layers: int | None = None
) -> Int[np.ndarray, "P L"]:
    """Put chains of different lengths into one array, padded with -1.

    Args:
      tokens: for each chain, its layer tokens and then its head token.
      max_layers: maximum number of layers, `L - 1`; by default, the layers of the longest chain.

    Raises:
      ValueError: if no chain is given, a chain is not a list of integers, or a chain has more than
        `max_layers` layers.
    """
    is_list = isinstance(tokens, Sequence) and not isinstance(tokens, str | bytes)
    if not is_list and not getattr(tokens, "ndim", 0):
        raise ValueError(f"expected chains as lists of tokens, got {shorten(tokens)}")
    if len(tokens) == 0:
        raise ValueError("expected at least one chain, got none")
    for chain in tokens:
        try:
            array = np.asarray(chain)
        except (TypeError, ValueError):  # lists of different lengths, or no numbers
            array = np.empty(0)
        if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
            got = f"{shorten(chain)} among {shorten(tokens)}"
            raise ValueError(f"expected chains of integer tokens, got {got}")
        if array.size > 0 and not -(2**31) <= int(array.min()) <= int(array.max()) < 2**31:
            raise ValueError(f"expected tokens below 2^31, got {chain!r}")
    longest = max(len(chain) for chain in tokens)
    slots = longest if max_layers is None else check_max_layers(max_layers) + 1
    if longest > slots:
        raise ValueError(
            f"expected chains of at most {slots - 1} layers and a head, got one of {longest} tokens"
        )
    chains = np.full((len(tokens), slots), PADDING, np.int32)
    for row, chain in zip(chains, tokens, strict=True):
        row[: len(chain)] = chain
    return chains


def _pad_lists(chains: ChainsLike, max_layers: int | None) -> ChainsLike:
    """Pad one list of tokens, or a list of such lists or arrays; return arrays unchanged."""
    if not isinstance(chains, list | tuple) or len(chains) == 0:
        return chains
    if all(np.ndim(row) == 1 for row in chains):  # pyright: ignore[reportArgumentType]
        return pad(chains, max_layers)  # pyright: ignore[reportArgumentType]
    if all(map(is_integer, chains)):
        return pad([chains], max_layers)[0]  # pyright: ignore[reportArgumentType]
    return chains


@checked
def count_layers(chains: Int[Array, "*P T"], num_layers: int) -> Int[Array, "*P"]:
    """Count the layers of each chain. The count is also the slot of the chain's head.

    Args:
      chains: int32 `[..., L]`; the tokens of each chain.
      num_layers: number of layers in the bank, N.
    """
    return jnp.sum((chains >= 0) & (chains < num_layers), axis=-1)


@checked
def describe(tokens: ChainsLike, names: Sequence[str]) -> str:
    """Return the names along one chain, for example `net0/0 -> net1/2 -> net0/head`.

    Args:
      tokens: the tokens of one chain, `[L]`.
      names: the name of each token of the bank.

    Raises:
      ValueError: if the tokens are not one row of integers, or a token has no name.
    """
    row = read_array("tokens", tokens)
    if row.ndim != 1 or (row.size and row.dtype.kind not in "iu"):
        raise ValueError(f"expected tokens of one chain, [L], got {row.dtype}{list(row.shape)}")
    if row.size and not -1 <= row.min() <= row.max() < len(names):
        raise ValueError(f"expected tokens in 0..{len(names) - 1}, or -1, got {row.tolist()}")
    return " -> ".join(names[int(token)] for token in row if token != PADDING)


@checked
def check_max_layers(value: object) -> int:
    """Check `max_layers` and return it as an int.

    Args:
      value: maximum number of layers in a chain.

    Raises:
      ValueError: if the value is not an integer in 0..4096.
    """
    if not is_integer(value) or not 0 <= value <= _MAX_LAYERS:
        kind = f"an integer in 0..{_MAX_LAYERS}"
        raise ValueError(f"expected max_layers to be {kind}, got {shorten(value)}")
    return int(value)


@checked
def check_min_layers(value: object, max_layers: int) -> int:
    """Check `min_layers` and return it as an int.

    Args:
      value: minimum number of layers in a chain.
      max_layers: maximum number of layers in a chain.

    Raises:
      ValueError: if the value is not an integer in `0..max_layers`.
    """
    if not is_integer(value) or not 0 <= value <= max_layers:
        raise ValueError(f"expected min_layers to be an integer in 0..{max_layers}, got {value!r}")
    return int(value)
