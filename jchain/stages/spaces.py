"""The space of a problem: all chains, or those that keep the order of the models."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from jchain.arguments import is_integer
from jchain.chain import ChainSpace
from jchain.pytree import shorten
from jchain.stages.table import StageTable

if TYPE_CHECKING:

    class Space:
        """A field that accepts a kind of space or positions, and holds a `ChainSpace`."""

        def __get__(self, instance: object, owner: object) -> ChainSpace: ...
        def __set__(self, instance: object, value: ChainSpace | str | Sequence[int]) -> None: ...

else:
    # `jchain.Problem` checks this field itself.
    Space = object


@runtime_checkable
class _Bank(Protocol):
    """What `make_space` reads of a `jchain.Bank`."""

    @property
    def num_layers(self) -> int: ...
    @property
    def num_heads(self) -> int: ...
    @property
    def names(self) -> tuple[str, ...]: ...
    @property
    def parents(self) -> tuple[tuple[int, ...], ...]: ...
    @property
    def stages(self) -> StageTable | None: ...


def make_space(given: object, bank: _Bank, max_layers: int, min_layers: int) -> ChainSpace:
    """Make the space of a problem.

    Args:
      given: `"chains"`, `"subset"`, the position of each layer, or the space of another problem,
        whose positions are kept.
      bank: the bank.
      max_layers: maximum number of layers in a chain.
      min_layers: minimum number of layers in a chain.

    Raises:
      ValueError: if `given` is none of these, a layer has no position or several, the bank has
        stages and positions, or no chain is possible.
    """
    if isinstance(given, ChainSpace):
        given = "chains" if given.positions is None else given.positions
    positions = read_positions(given, bank.parents, bank.num_layers, bank.names)
    stages = bank.stages
    if positions is not None:
        if stages is not None:
            raise ValueError(
                "expected a bank without stages with space='subset', or positions, got a bank with "
                "stages"
            )
        stages = StageTable.from_positions(positions, bank.num_heads, bank.names)
    sizes = bank.num_layers, bank.num_heads, max_layers, min_layers
    space = ChainSpace(*sizes, stages)
    if stages is not None and space.num_chains == 0:
        how = "from stage 0 to the stage of a head, got none: max_layers may be too small"
        if positions is not None:
            how = f"at rising positions, got {len(set(positions))} positions"
        raise ValueError(f"expected a chain of {min_layers} to {max_layers} layers {how}")
    return space


def read_positions(
    given: object, parents: Sequence[Sequence[int]], num_layers: int, names: Sequence[str]
) -> tuple[int, ...] | None:
    """Read the positions of layers from the argument `space` of a problem.

    Args:
      given: `"chains"`, `"subset"`, or the position of each layer.
      parents: the parents of the bank, which give the positions for `"subset"`.
      num_layers: the number of layers of the bank.
      names: the names of its tokens, for errors; may be empty.

    Returns:
      The position of each layer; None for `"chains"`.

    Raises:
      ValueError: if the argument is neither, or a layer has no position or several.
    """
    if isinstance(given, str) and given in ("chains", "subset"):
        return None if given == "chains" else _find_positions(parents, num_layers, names)
    if not isinstance(given, Sequence) or isinstance(given, str):
        raise ValueError(
            "expected space to be 'chains', 'subset', or the position of each layer, got "
            f"{shorten(given)}"
        )
    if len(given) != num_layers or not all(is_integer(p) and 0 <= p < 2**15 for p in given):
        raise ValueError(
            f"expected space to hold the positions of {num_layers} layers, integers from 0 to "
            f"32,767, got {shorten(list(given))}"
        )
    return tuple(int(position) for position in given)


def _find_positions(
    parents: Sequence[Sequence[int]], num_layers: int, names: Sequence[str]
) -> tuple[int, ...]:
    """Find the position of each layer in its parent; without parents, its token.

    Parents are aligned at their ends, because a parent may begin with a layer for its embeddings.
    """
    if not parents:
        return tuple(range(num_layers))
    longest = max(map(len, parents))
    found: list[set[int]] = [set() for _ in range(num_layers)]
    for parent in parents:
        for position, token in enumerate(parent[:-1], start=longest - len(parent)):
            found[token].add(position)
    for token, positions in enumerate(found):
        if len(positions) != 1:
            name = repr(names[token]) if names else str(token)
            where = f"at slots {sorted(positions)}" if positions else "in none"
            raise ValueError(
                "expected each layer at one slot of the parents with space='subset', got layer "
                f"{name} {where}: pass the position of each layer as space"
            )
    return tuple(positions.pop() for positions in found)
