"""Plans: ways to make the calls of a population, and the choice between them.

Each plan makes every distinct call once and keeps a bounded number of activations, for any number
of chains. All plans give the same losses up to the order of sums.
"""

from typing import Protocol, runtime_checkable

from jchain._typing import Array
from jchain.engine.backend import default_memory_limit
from jchain.engine.blocks import Blocks, Share
from jchain.engine.depth_first import DepthFirst
from jchain.engine.layer_calls import (
    ArrayShape,
    count_convolutions,
    find_member_bytes,
    find_outputs,
    nbytes,
)
from jchain.engine.prefix_sharing import SortedChains
from jchain.problem import Problem

# Limits on CPU, in bytes, so that activations stay in the processor's cache: activations of one
# call, of a batch of heads, and of a block.
_CALL_CACHE, _HEAD_CACHE, _BLOCK_CACHE = 2**20, 2**21, 2**24
_MAX_CPU_BLOCK = 64
_MIN_CPU_WIDTH = 8  # narrower batches are no faster than single calls
_SIBLINGS = (1, 2, 8)
# Other backends: bytes of activations (or gathered weights) with which one call fills the device,
# and the most nodes in a call.
_CALL_FILL, _MAX_WIDTH = 2**26, 256


@runtime_checkable
class Plan(Protocol):
    """How calls are made. Hashable, because it is a static argument of the compiled program."""

    def count_bytes(self, problem: Problem, hidden: ArrayShape) -> int:
        """Estimate activations and temporaries in bytes.

        Args:
          problem: bank, split, loss.
          hidden: the input of the layers, `[B, ...F]`. Only its shape and dtype are read.
        """
        ...

    def evaluate(
        self, problem: Problem, hidden: Array, population: SortedChains
    ) -> tuple[Array, Array]:
        """Return loss, without the layer penalty, and accuracy of sorted chains, `[P]` each.

        Results of a chain that equals the one before it are undefined.

        Args:
          problem: bank, split, loss.
          hidden: the input of the layers, `[B, ...F]`.
          population: the sorted chains.
        """
        ...


def choose_plan(
    problem: Problem, hidden: ArrayShape, num_chains: int, memory_limit: int | None, backend: str
) -> Plan:
    """Choose the plan that should be fastest for these shapes within the memory limit.

    On CPU one call of a large layer keeps the cores busy. Calls of smaller layers are batched as
    far as the cache allows: convolutions by their shared input, other layers by layer if the bank
    is small enough that layers repeat in a block. Layers of several convolutions are called one at
    a time. On other backends calls are wide enough to fill the device: convolutions by layer, other
    layers with gathered weights.

    Args:
      problem: bank, split, loss.
      hidden: the input of the layers, `[B, ...F]`. Only its shape and dtype are read.
      num_chains: number of chains, P.
      memory_limit: bytes for activations and temporaries; a quarter of the device's memory if None.
      backend: the platform, as `jax.default_backend()` names it.

    Raises:
      ValueError: the limit is too small for one node at a time.
    """
    limit = default_memory_limit() if memory_limit is None else memory_limit
    size = nbytes(hidden)
    smallest = DepthFirst().count_bytes(problem, hidden)
    if limit < smallest:
        raise ValueError(
            f"memory_limit is too small: expected at least {smallest:,} bytes, which one node at a "
            f"time needs with activations of {size:,} bytes along {problem.max_layers} layers, got "
            f"{limit:,}"
        )
    choose = _choose_on_cpu if backend == "cpu" else _choose_on_accelerator
    largest, least = choose(problem, hidden, num_chains)
    block_size = _floor_power_of_2(min(largest.block_size, num_chains))
    while len(largest.widths) > 1 and block_size >= max(least, 2):
        widths, head_widths = (
            tuple(width for width in ladder if width <= block_size)
            for ladder in (largest.widths, largest.head_widths)
        )
        plan = Blocks(block_size, widths, largest.share, head_widths)
        if plan.count_bytes(problem, hidden) <= limit:
            return plan
        block_size //= 2
    return DepthFirst()


def _choose_on_cpu(problem: Problem, hidden: ArrayShape, num_chains: int) -> tuple[Blocks, int]:
    """The plan without a memory limit, and the smallest block that is worth its overhead."""
    del num_chains
    size = nbytes(hidden)
    most_convolutions = max(count_convolutions(group, hidden) for group in problem.bank.layers)
    has_convolution = most_convolutions > 0
    width = min(16, _CALL_CACHE // size)
    widths = _SIBLINGS if has_convolution else _ladder(width) if width >= _MIN_CPU_WIDTH else (1,)
    if most_convolutions > 1:
        # Siblings share the input of the first convolution only. The others would become grouped
        # convolutions, which take two to five times as long.
        widths = (1,)
    head_size = max(size, nbytes(find_outputs(problem, hidden)))
    plan = Blocks(
        max(1, min(_MAX_CPU_BLOCK, _BLOCK_CACHE // (2 * size))),
        widths,
        # Siblings make one convolution of more channels, for any number of layers in the bank.
        Share.PARENT if has_convolution else Share.LAYER,
        _ladder(min(16, _HEAD_CACHE // head_size)),
    )
    return plan, _SIBLINGS[-1] if has_convolution else 2 * problem.bank.num_layers


def _choose_on_accelerator(
    problem: Problem, hidden: ArrayShape, num_chains: int
) -> tuple[Blocks, int]:
    """The plan without a memory limit, and the smallest block that is worth its overhead."""
    has_convolution = any(count_convolutions(group, hidden) for group in problem.bank.layers)
    weights = 0 if has_convolution else max(map(find_member_bytes, problem.bank.layers))
    widths = _ladder(min(_MAX_WIDTH, _CALL_FILL // max(nbytes(hidden), weights)))
    share = Share.LAYER if has_convolution else Share.NOTHING
    return Blocks(num_chains, widths, share, widths), 1


def choose_chunk(num_layers: int, hidden: ArrayShape, backend: str) -> int:
    """Return how many layers to call together on an input that they share.

    Args:
      num_layers: the number of layers to call.
      hidden: their input. Only its shape and dtype are read.
      backend: the platform, as `jax.default_backend()` names it.
    """
    widest = _SIBLINGS[-1] if backend == "cpu" else min(_MAX_WIDTH, _CALL_FILL // nbytes(hidden))
    return max(1, min(num_layers, widest))


def _ladder(max_width: int) -> tuple[int, ...]:
    """Widths `1, ..., w / 4, w`, where `w` is the largest power of two up to `max_width`."""
    widths, width = [], _floor_power_of_2(max_width)
    while width > 1:
        widths.append(width)
        width //= 4
    return (1, *reversed(widths))


def _floor_power_of_2(number: int) -> int:
    return 1 << (max(1, number).bit_length() - 1)
