"""Plans for making the calls of a population, and the choice between them.

Each plan makes every distinct call once and keeps a bounded number of activations, for any number
of chains. All plans give the same losses, except for the order of sums.
"""

from typing import Protocol, runtime_checkable

from jchain._typing import Activations, Array, PyTree
from jchain.arguments import checked
from jchain.engine.backend import default_memory_limit
from jchain.engine.blocks import Blocks, Share
from jchain.engine.depth_first import DepthFirst
from jchain.engine.head_calls import is_read_in_parts
from jchain.engine.layer_calls import (
    count_convolutions,
    get_member_bytes,
    get_output_shape,
    nbytes,
)
from jchain.engine.prefix_sharing import SortedChains
from jchain.problem import Problem

# Limits on CPU, in bytes, that keep the activations of one call, of a batch of heads, and of a
# block in the processor's cache.
_CALL_CACHE, _HEAD_CACHE, _BLOCK_CACHE = 2**20, 2**21, 2**24
_MAX_CPU_BLOCK = 64
_MIN_CPU_WIDTH = 8  # narrower batches are no faster than single calls
_SIBLINGS = (1, 2, 8)
# For other backends: the bytes of activations (or gathered weights) at which one call fills the
# device, and the largest number of nodes in a call.
_CALL_FILL, _MAX_WIDTH = 2**26, 256


@runtime_checkable
class Plan(Protocol):
    """A way to make calls.

    Plans are hashable, because a plan is a static argument of the compiled program.
    """

    def count_bytes(self, problem: Problem, hidden: PyTree) -> int:
        """Estimate the size of activations and temporaries in bytes.

        Args:
          problem: the bank, the split of data, and the loss.
          hidden: the input of the first layer. Only its shapes and dtypes are read.
        """
        ...

    def evaluate(
        self, problem: Problem, hidden: Activations, population: SortedChains
    ) -> tuple[Array, Array]:
        """Compute loss, without the layer penalty, and accuracy of sorted chains, `[P]` each.

        The results of a chain that equals the chain before it are undefined.

        Args:
          problem: the bank, the split of data, and the loss.
          hidden: the input of the first layer, `[B, ...F]`, or a pytree of such arrays.
          population: the sorted chains.
        """
        ...


@checked
def choose_plan(
    problem: Problem, hidden: PyTree, num_chains: int, memory_limit: int | None, backend: str
) -> Plan:
    """Choose the plan that should be fastest for these shapes within the memory limit.

    On CPU, one call of a large layer keeps the cores busy. Calls of smaller layers are batched as
    far as the cache allows. Convolutions are batched by their shared input. Other layers are
    batched by layer, if the bank is small enough that layers repeat within a block. Layers with
    several convolutions are called one at a time.

    On other backends, batches are wide enough to fill the device. Convolutions are batched by
    layer, and other layers with gathered weights.

    Args:
      problem: the bank, the split of data, and the loss.
      hidden: the input of the first layer. Only its shapes and dtypes are read.
      num_chains: the number of chains, P.
      memory_limit: the number of bytes that activations and temporaries may take; None for a
        quarter of the device's memory.
      backend: the name of the platform, as returned by `jax.default_backend()`.

    Raises:
      ValueError: if the limit is too small to evaluate even one node at a time.
    """
    limit = default_memory_limit() if memory_limit is None else memory_limit
    size = nbytes(hidden)
    smallest = DepthFirst().count_bytes(problem, hidden)
    if limit < smallest:
        raise ValueError(
            f"expected a memory_limit of at least {smallest:,} bytes, to evaluate one chain at a "
            f"time (activations of {size:,} bytes along {problem.max_layers} layers), got {limit:,}"
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


def _choose_on_cpu(problem: Problem, hidden: PyTree, num_chains: int) -> tuple[Blocks, int]:
    """Return the plan without a memory limit, and the smallest block worth its overhead."""
    del num_chains
    size = nbytes(hidden)
    most_convolutions = max(count_convolutions(group, hidden) for group in problem.bank.layers)
    has_convolution = most_convolutions > 0
    width = min(16, _CALL_CACHE // size)
    widths = _SIBLINGS if has_convolution else _ladder(width) if width >= _MIN_CPU_WIDTH else (1,)
    if most_convolutions > 1:
        # Siblings share the input of only their first convolution. The other convolutions would
        # become grouped, which takes two to five times as long.
        widths = (1,)
    head_size = max(size, nbytes(get_output_shape(problem, hidden)))
    # A head whose outputs are read in parts keeps the cores busy by itself.
    is_in_parts = is_read_in_parts(problem, hidden)
    plan = Blocks(
        max(1, min(_MAX_CPU_BLOCK, _BLOCK_CACHE // (2 * size))),
        widths,
        # Siblings form one convolution of more channels, whatever the number of layers in the bank.
        Share.INPUT if has_convolution else Share.LAYER,
        (1,) if is_in_parts else _ladder(min(16, _HEAD_CACHE // head_size)),
    )
    return plan, _SIBLINGS[-1] if has_convolution else 2 * problem.bank.num_layers


def _choose_on_accelerator(problem: Problem, hidden: PyTree, num_chains: int) -> tuple[Blocks, int]:
    """Return the plan without a memory limit, and the smallest block worth its overhead."""
    has_convolution = any(count_convolutions(group, hidden) for group in problem.bank.layers)
    weights = 0 if has_convolution else max(map(get_member_bytes, problem.bank.layers))
    widths = _ladder(min(_MAX_WIDTH, _CALL_FILL // max(nbytes(hidden), weights)))
    share = Share.LAYER if has_convolution else Share.NOTHING
    # A head whose outputs are read in parts fills the device by itself.
    head_widths = (1,) if is_read_in_parts(problem, hidden) else widths
    return Blocks(num_chains, widths, share, head_widths), 1


def choose_chunk(num_layers: int, hidden: PyTree, backend: str) -> int:
    """Return the number of layers to call together on a shared input.

    Args:
      num_layers: the number of layers to call in total.
      hidden: the shared input. Only its shapes and dtypes are read.
      backend: the name of the platform, as returned by `jax.default_backend()`.
    """
    widest = _SIBLINGS[-1] if backend == "cpu" else min(_MAX_WIDTH, _CALL_FILL // nbytes(hidden))
    return max(1, min(num_layers, widest))


def _ladder(max_width: int) -> tuple[int, ...]:
    """Return widths `1, ..., w / 4, w`; `w` is the largest power of two up to `max_width`."""
    widths, width = [], _floor_power_of_2(max_width)
    while width > 1:
        widths.append(width)
        width //= 4
    return (1, *reversed(widths))


def _floor_power_of_2(number: int) -> int:
    return 1 << (max(1, number).bit_length() - 1)
