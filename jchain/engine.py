"""How the calls of a population are made: the plans, and the choice between them.

Each plan makes every distinct call once and keeps a bounded number of activations, whatever the number of chains. They
give the same losses up to the order of sums.
"""

import enum
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jchain._typing import Array, Bool, Int, PyTree
from jchain.groups import LayerGroup
from jchain.problem import Problem
from jchain.pytree import is_concrete
from jchain.trie import SortedChains, batch_rows, pad_to_multiple

# On CPU. Activations that should stay in the cache: those of one call, those that a batch of heads reads, and those of a
# block, in bytes.
_CALL_CACHE, _HEAD_CACHE, _BLOCK_CACHE = 2**20, 2**21, 2**24
_MAX_CPU_BLOCK = 64
_MIN_CPU_WIDTH = 8  # narrower batches gain nothing over single calls
_SIBLINGS = (1, 2, 8)
# Outputs of one call of a head, as the logits of a large vocabulary, beyond which examples go through it in parts; in bytes.
_OUTPUT_LIMIT = 2**26
# Elsewhere. Activations (or gathered weights) of one call that fill the device, in bytes, and the most nodes in a call.
_CALL_FILL, _MAX_WIDTH = 2**26, 256
# Share of the device's memory that a plan may use where no limit is given. Not of what is free at the moment, which
# would make another plan, and a new trace, of the same call.
_MEMORY_SHARE = 0.25
_CPU_INFO = Path("/proc/cpuinfo")


@runtime_checkable
class Plan(Protocol):
    """How calls are made. Hashable, as it is part of the program."""

    def count_bytes(self, problem: Problem, hidden: Any) -> int:
        """Activations and temporaries, in bytes, for layers that read `hidden`; an estimate."""
        ...

    def measure(self, problem: Problem, hidden: Array, population: SortedChains) -> tuple[Array, Array]:
        """Loss, without price, and accuracy of sorted chains, `[P]`; anything where a chain equals the one before."""
        ...


@dataclass(frozen=True)
class Walk:
    """One plain layer call at a time, depth first: keeps the activations along one chain."""

    def count_bytes(self, problem: Problem, hidden: Any) -> int:
        call = max(_find_call_bytes(problem.bank.layers, hidden), _find_head_bytes(problem, hidden, 1))
        return (problem.max_layers + 2) * _nbytes(hidden) + call

    def measure(self, problem: Problem, hidden: Array, population: SortedChains) -> tuple[Array, Array]:
        return _walk(problem, hidden, population)


class Share(enum.Enum):
    """What the nodes of one call have in common."""

    LAYER = "layer"  # one layer on several inputs: its weights are read once, the call is one on more examples
    PARENT = "parent"  # several layers on one input: a convolution of more channels, a wider product
    NOTHING = "nothing"  # several layers on as many inputs: batched products, but grouped convolutions, which are slow


@dataclass(frozen=True)
class Blocks:
    """Blocks of sorted chains, slot by slot: the nodes of a slot in batches, each one call.

    Attributes:
      block_size: chains that are worked off together; two generations of their activations are kept.
      widths: nodes in one call, ascending from 1, each a multiple of the one before: one program for each.
      share: what the nodes of a batch have in common.
      head_widths: chains in one call of a head, as `widths`.
    """

    block_size: int
    widths: tuple[int, ...] = (1,)
    share: Share = Share.LAYER
    head_widths: tuple[int, ...] = (1,)

    def __post_init__(self) -> None:
        if self.block_size < 1:
            raise ValueError(f"expected a block_size of at least 1, got {self.block_size}")
        for widths in (self.widths, self.head_widths):
            steps = pairwise(widths)
            if widths[:1] != (1,) or any(b <= a or b % a for a, b in steps):
                raise ValueError(f"expected widths that ascend from 1, each a multiple of the one before, got {widths}")

    def count_bytes(self, problem: Problem, hidden: Any) -> int:
        bank, size = problem.bank, _nbytes(hidden)
        kept = 2 * (self.block_size + 1) + problem.max_layers + 2
        weights = 0 if self.share is Share.LAYER else max(map(_find_member_bytes, bank.layers))
        # A call copies what it reads, and a batch of heads may be wider than one of layers.
        layers = self.widths[-1] * (_find_call_bytes(bank.layers, hidden) + weights)
        width = self.head_widths[-1]
        heads = _find_head_bytes(problem, hidden, width) + width * size
        return kept * size + max(layers, heads)

    def measure(self, problem: Problem, hidden: Array, population: SortedChains) -> tuple[Array, Array]:
        return _measure_blocks(self, problem, hidden, population)


def choose_plan(problem: Problem, hidden: Any, num_chains: int, memory_limit: int | None, backend: str) -> Plan:
    """The plan that should be fastest for these shapes within the limit.

    On CPU one call of a larger layer keeps the cores busy; smaller ones are batched as far as the cache goes, convolutions
    by what they read, the rest by layer where the bank is small enough for layers to repeat in a block. Layers of several
    convolutions are called one at a time. Elsewhere calls are made wide enough to fill the device: convolutions by layer,
    the rest with gathered weights.

    Args:
      problem: bank, split, loss.
      hidden: what the layers read; only its shape and dtype are looked at.
      num_chains: P.
      memory_limit: bytes for activations and temporaries; a quarter of the device's memory when None.
      backend: the platform, as `jax.default_backend()` names it.

    Raises:
      ValueError: not even one node at a time fits.
    """
    limit = default_memory_limit() if memory_limit is None else memory_limit
    size = _nbytes(hidden)
    smallest = Walk().count_bytes(problem, hidden)
    if limit < smallest:
        raise ValueError(
            f"memory_limit is too small: expected at least {smallest:,} bytes, which one node at a time needs with "
            f"activations of {size:,} bytes along {problem.max_layers} layers, got {limit:,}"
        )
    most_convolutions = max(_count_convolutions(group, hidden) for group in problem.bank.layers)
    has_convolution = most_convolutions > 0
    if backend == "cpu":
        block_size = min(_MAX_CPU_BLOCK, _BLOCK_CACHE // (2 * size))
        # Siblings make one convolution of more channels, whatever the number of layers in the bank.
        share = Share.PARENT if has_convolution else Share.LAYER
        width = min(16, _CALL_CACHE // size)
        widths = _SIBLINGS if has_convolution else _ladder(width) if width >= _MIN_CPU_WIDTH else (1,)
        if most_convolutions > 1:
            # Siblings share the input of the first alone, and grouped convolutions take two to five times as long.
            widths = (1,)
        head_widths = _ladder(min(16, _HEAD_CACHE // max(size, _nbytes(_find_outputs(problem, hidden)))))
        least = _SIBLINGS[-1] if has_convolution else 2 * problem.bank.num_layers
    else:
        block_size, least = num_chains, 1
        share = Share.LAYER if has_convolution else Share.NOTHING
        weights = 0 if has_convolution else max(map(_find_member_bytes, problem.bank.layers))
        widths = _ladder(min(_MAX_WIDTH, _CALL_FILL // max(size, weights)))
        head_widths = widths
    block_size = _floor_power_of_2(min(block_size, num_chains))
    while block_size >= max(least, 2):
        if len(widths) == 1:
            break
        fitting, head_fitting = (tuple(w for w in ws if w <= block_size) for ws in (widths, head_widths))
        plan = Blocks(block_size, fitting, share, head_fitting)
        if plan.count_bytes(problem, hidden) <= limit:
            return plan
        block_size //= 2
    return Walk()


def choose_chunk(num_layers: int, hidden: Any, backend: str) -> int:
    """How many layers are called together on one input that they share."""
    widest = _SIBLINGS[-1] if backend == "cpu" else min(_MAX_WIDTH, _CALL_FILL // _nbytes(hidden))
    return max(1, min(num_layers, widest))


@cache
def compiler_options(backend: str) -> dict[str, str]:
    """Options for `jax.jit` around an evaluation, as `evaluate` itself passes them where it is not traced.

    XLA hands products and convolutions of 24 channels or more to YNNPACK on CPU, which on x86 takes longer than its Eigen
    kernels. With AVX2: 3x3 of 32 channels on 32x32 10.8 and 5.7 ms, 512 chains of 64-wide MLPs 140 and 115 ms. With
    AVX-512: 128 chains of such convolutions 2.6 and 1.5 s, of MLPs 39 and 33 ms, and of 512-wide ones alike. So only
    reductions are left to it there; other processors keep XLA's choice.
    """
    flags = _CPU_INFO.read_text() if backend == "cpu" and _CPU_INFO.exists() else ""
    if "avx2" not in flags:
        return {}
    options = {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_REDUCE"}
    try:
        jax.jit(lambda: 0, compiler_options=options).lower().compile()
    except jax.errors.JaxRuntimeError:  # a jaxlib that does not know this experimental option
        return {}
    return options


def find_backend(problem: Problem, *arrays: Array) -> str:
    """The platform of the devices on which a problem and other arrays lie, else the default one.

    Raises:
      ValueError: they lie on different devices.
    """
    devices = {
        frozenset(leaf.devices()) for leaf in jax.tree.leaves((problem, arrays)) if is_concrete(leaf) and leaf.committed
    }
    if len(devices) > 1:
        places = " and ".join(sorted(str(sorted(map(str, place))) for place in devices))
        raise ValueError(f"expected bank, data and chains on the same devices, got them on {places}")
    used = problem.mesh.devices.flat if problem.mesh is not None else next(iter(devices), ())
    return next((device.platform for device in used), jax.default_backend())


def default_memory_limit() -> int:
    """A quarter of the memory of the default device, in bytes."""
    stats = jax.local_devices()[0].memory_stats()
    total = stats["bytes_limit"] if stats else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return int(total * _MEMORY_SHARE)


def _nbytes(x: Any) -> int:
    return int(np.prod(x.shape)) * x.dtype.itemsize


def _find_member_bytes(group: LayerGroup) -> int:
    return sum(_nbytes(leaf) for leaf in jax.tree.leaves(group.params)) // len(group.tokens)


def _ladder(most: int) -> tuple[int, ...]:
    """Widths from 1 to the largest power of two that is at most `most`, four times apart but for the first step."""
    widths, width = [], _floor_power_of_2(most)
    while width > 1:
        widths.append(width)
        width //= 4
    return (1, *reversed(widths))


def _floor_power_of_2(number: int) -> int:
    return 1 << (max(1, number).bit_length() - 1)


def _equations(jaxpr: Any) -> Iterator[Any]:
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.tree.leaves(equation.params, is_leaf=lambda value: hasattr(value, "eqns")):
            if hasattr(inner, "eqns"):
                yield from _equations(inner)


def _trace(group: LayerGroup, hidden: Any) -> list[Any]:
    """The equations of one call."""
    member = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), group)
    return [*_equations(jax.make_jaxpr(lambda group, x: group.apply(0, x))(member, hidden).jaxpr)]


def _find_call_bytes(groups: tuple[LayerGroup, ...], hidden: Any) -> int:
    """An estimate of the temporaries of one call: twice the largest array that one of these makes."""
    made = [var.aval for group in groups for equation in _trace(group, hidden) for var in equation.outvars]
    return 2 * max((_nbytes(aval) for aval in made), default=0)


def _find_outputs(problem: Problem, hidden: Any) -> Any:
    """Shape and dtype of what heads return."""
    return jax.eval_shape(lambda problem, hidden: problem.bank.heads[0].apply(0, hidden), problem, hidden)


def find_part(problem: Problem, hidden: Any, width: int) -> int:
    """How many examples of `width` chains go through a head at a time; `hidden` is that of one."""
    parts = -(-width * _nbytes(_find_outputs(problem, hidden)) // _OUTPUT_LIMIT)
    return max(1, hidden.shape[0] // max(1, parts))


def _find_head_bytes(problem: Problem, hidden: Any, width: int) -> int:
    """An estimate of the temporaries of a call of heads for so many chains."""
    rows = find_part(problem, hidden, width)
    return width * _find_call_bytes(problem.bank.heads, jax.ShapeDtypeStruct((rows, *hidden.shape[1:]), hidden.dtype))


def measure_heads(problem: Problem, call: Callable[[Array], Array], hidden: Array) -> tuple[Array, Array]:
    """Loss, without price, and accuracy `[W]` of the outputs that `call` makes of activations `[W, B, ...F]`.

    Examples go through it in parts where outputs would be large, and what is returned is the mean of the parts by their size.
    """
    width, num = hidden.shape[:2]
    size = find_part(problem, hidden[0], width)

    def measure(rows: Array) -> tuple[Array, Array]:
        return jax.vmap(problem.take(rows).measure)(call(hidden[:, rows]))

    if size == num:
        return jax.vmap(problem.measure)(call(hidden))
    found, rest = map_parts(measure, num, size)
    found = jax.tree.map(lambda a: a.sum(axis=0) * size, found)
    if rest is not None:
        found = jax.tree.map(lambda a, b: a + num % size * b, found, rest)
    return jax.tree.map(lambda a: a / num, found)


def map_parts(run: Callable[[Int[Array, "_"]], Any], num: int, size: int) -> tuple[Any, Any]:
    """What `run` makes of the indices of so many of `num` examples at a time, stacked, and of those left over, None for none."""
    whole = jax.lax.map(lambda start: run(start + jnp.arange(size)), jnp.arange(num // size) * size)
    rest = num % size
    return whole, run(num - rest + jnp.arange(rest)) if rest else None


def _count_convolutions(group: LayerGroup, hidden: Any) -> int:
    return sum(equation.primitive.name == "conv_general_dilated" for equation in _trace(group, hidden))


def apply_token(groups: tuple[LayerGroup, ...], token: Int[Array, ""], hidden: Array) -> Array:
    """The member of `groups` with this token, applied to a batch: one layer call (or head call)."""
    group_of, member_of = locate(groups)
    branches = [partial(group.apply, member_of[token]) for group in groups]
    return jax.lax.switch(group_of[token], branches, hidden)


def apply_all(groups: tuple[LayerGroup, ...], hidden: Array) -> Array:
    """Every member of `groups` applied to one batch, `[E, B, ...G]` in the order of tokens: as many layer (or head) calls."""
    made: list[Any] = []
    for group in groups:

        def call(params: PyTree, module: nn.Module = group.module) -> Any:
            return module.apply({"params": params}, hidden)

        if _count_convolutions(group, hidden) > 1:
            # All but the first would become grouped convolutions, up to twice as slow on CPU as one member at a time.
            one_by_one = partial(jax.lax.map, call)
            made.append(jax.lax.platform_dependent(group.params, cpu=one_by_one, default=jax.vmap(call)))
        else:
            made.append(jax.vmap(call)(group.params))
    order = np.argsort([token for group in groups for token in group.tokens])
    return made[0] if len(made) == 1 else jnp.concatenate(made)[order]


def locate(groups: tuple[LayerGroup, ...]) -> tuple[Int[Array, "E"], Int[Array, "E"]]:
    """Group and place in the group of each token; -1 for tokens of none of these groups."""
    size = 1 + max(token for group in groups for token in group.tokens)
    group_of, member_of = np.full(size, -1), np.full(size, -1)
    for i, group in enumerate(groups):
        group_of[list(group.tokens)] = i
        member_of[list(group.tokens)] = np.arange(len(group.tokens))
    return jnp.asarray(group_of), jnp.asarray(member_of)


def _empty_results(problem: Problem, hidden: Array, size: int) -> tuple[Array, Array]:
    measured = jax.eval_shape(lambda h: problem.measure(problem.bank.heads[0].apply(0, h)), hidden)
    return jax.tree.map(lambda a: jnp.zeros(size, a.dtype), measured)


def _walk(problem: Problem, hidden: Array, population: SortedChains) -> tuple[Array, Array]:
    bank, (chains, length, first_new) = problem.bank, population
    num_chains, num_slots = chains.shape
    slots = jnp.arange(num_slots)[None]
    is_node = (slots >= first_new[:, None]) & (slots < length[:, None])
    nodes = jnp.nonzero(is_node.reshape(-1), size=is_node.size)[0]
    ends = jnp.nonzero(first_new <= length, size=num_chains + 1, fill_value=num_chains)[0]
    # Nodes that must be there before the head of each end can be called; none behind the last end.
    needs = jnp.append(jnp.cumsum(is_node.sum(axis=1)), is_node.size + 1)[ends]

    # Two flat loops, as a loop that carries the path without writing to it would copy it each time.
    def call_heads(num_done: Array, path: Array, end: Array, results: Any) -> tuple[Array, Any]:
        def call_head(carry: Any) -> Any:
            end, results = carry
            i = ends[end]
            call = jax.vmap(partial(apply_token, bank.heads, chains[i, length[i]]))
            measured = measure_heads(problem, call, path[length[i]][None])
            return end + 1, jax.tree.map(lambda a, b: a.at[i].set(b[0]), results, measured)

        return jax.lax.while_loop(lambda carry: needs[carry[0]] <= num_done, call_head, (end, results))

    def call_layer(n: Array, carry: Any) -> Any:
        path, end, results = carry
        i, t = jnp.divmod(nodes[n], num_slots)
        path = path.at[t + 1].set(apply_token(bank.layers, chains[i, t], path[t]))
        return path, *call_heads(n + 1, path, end, results)

    path = jnp.zeros((num_slots, *hidden.shape), hidden.dtype).at[0].set(hidden)
    carry = (path, *call_heads(jnp.array(0), path, jnp.array(0), _empty_results(problem, hidden, num_chains)))
    return jax.lax.fori_loop(0, is_node.sum(), call_layer, carry)[2]


def _measure_blocks(plan: Blocks, problem: Problem, hidden: Array, population: SortedChains) -> tuple[Array, Array]:
    num_chains, num_slots = population.chains.shape
    size = min(plan.block_size, num_chains)
    blocks = [a.reshape(-1, size, *a.shape[1:]) for a in pad_to_multiple(population, size)]
    path = jnp.zeros((num_slots, *hidden.shape), hidden.dtype)
    # Two generations of activations. Row 0 of each is that of the last chain of the block before.
    store = jnp.zeros((2 * (size + 1), *hidden.shape), hidden.dtype).at[0].set(hidden)
    _, results = jax.lax.scan(partial(_measure_block, plan, problem, hidden), (path, store), blocks)
    return jax.tree.map(lambda a: a.reshape(-1)[:num_chains], results)


def _measure_block(plan: Blocks, problem: Problem, hidden: Array, carry: Any, block: Any) -> tuple[Any, Any]:
    """Loss and accuracy `[C]` of one block.

    Args:
      plan: widths and what batches share.
      problem: bank, split, loss.
      hidden: the input of all chains, `[B, ...F]`.
      carry: activations after each slot of the last chain before this block, `[L, B, ...F]`, and the store, two
        generations of `C + 1` rows each, of which row 0 belongs to that chain.
      block: chains `[C, L]`, their lengths `[C]`, their first new slots `[C]`.
    """
    path, store = carry
    chains, length, first_new = block
    size, num_slots = chains.shape
    rows = jnp.arange(size)
    # Few heads are called for the same chain, but the same head for many.
    head_share = Share.LAYER if plan.share is Share.PARENT else plan.share

    def advance(carry: Any, slot: Any) -> Any:
        path, store, parent_of, results = carry
        t, tokens = slot
        parents = (t % 2) * (size + 1)
        children = size + 1 - parents
        origin = (0,) * hidden.ndim

        def call_head(carry: Any, call: Callable, start: Array, parent: Array) -> Any:
            store, values = carry
            measured = measure_heads(problem, call, store[parents + parent])
            values = jax.tree.map(lambda a, b: jax.lax.dynamic_update_slice(a, b, (start,)), values, measured)
            # XLA copies what a loop reads and never writes, here all activations: so write one number, after they are
            # read, in a row that is set below.
            mark = jnp.reshape(measured[0][0].astype(store.dtype), (1, *(1 for _ in origin)))
            return jax.lax.dynamic_update_slice(store, mark, (children, *origin)), values

        def call_layer(store: Array, call: Callable, start: Array, parent: Array) -> Array:
            made = call(store[parents + parent])
            return jax.lax.dynamic_update_slice(store, made, (children + 1 + start, *origin))

        is_end = (length == t) & (first_new <= t)
        carry = (store, _empty_results(problem, hidden, size))
        position, (store, values) = _call_batches(
            plan.head_widths, head_share, problem.bank.heads, tokens, parent_of, is_end, call_head, carry
        )
        results = jax.tree.map(lambda a, b: jnp.where(is_end, b[position], a), results, values)

        is_node = (first_new <= t) & (t < length)
        position, store = _call_batches(
            plan.widths, plan.share, problem.bank.layers, tokens, parent_of, is_node, call_layer, store
        )
        # A row without a new node goes on from that of the row before.
        latest = jax.lax.cummax(jnp.where(is_node, rows, -1))
        child_of = jnp.where(latest >= 0, position[latest] + 1, 0)
        store = store.at[children].set(path[t])
        path = path.at[t].set(store[children + child_of[-1]])
        return (path, store, child_of, results), None

    carry = (path, store.at[0].set(hidden), jnp.zeros_like(rows), _empty_results(problem, hidden, size))
    (path, store, _, results), _ = jax.lax.scan(advance, carry, (jnp.arange(num_slots), chains.T))
    return (path, store), results


def _call_batches(
    widths: tuple[int, ...],
    share: Share,
    groups: tuple[LayerGroup, ...],
    tokens: Int[Array, "C"],
    parent_of: Int[Array, "C"],
    is_call: Bool[Array, "C"],
    use: Callable[[Any, Callable, Array, Array], Any],
    carry: Any,
) -> tuple[Int[Array, "C"], Any]:
    """`carry = use(carry, call, start, parent)` for each batch.

    `call` maps the activations of `parent`, `[W, B, ...F]` or where it is shared `[B, ...F]`, to those of the batch.

    Returns:
      The place of each row among all calls, of which `start` is that of a batch's first, and the last carry.
    """
    group_of, member_of = locate(groups)
    group, member = group_of[tokens], member_of[tokens]
    shared = {Share.LAYER: member, Share.PARENT: parent_of, Share.NOTHING: jnp.zeros_like(member)}[share]
    widths = tuple(width for width in widths if width <= tokens.shape[0])
    batches = batch_rows(is_call, group, shared, len(groups), widths)
    for i, layers in enumerate(groups):
        for j, width in enumerate(widths):

            def run(
                n: Array, carry: Any, layers: LayerGroup = layers, i: int = i, j: int = j, width: int = width
            ) -> Any:
                start = batches.starts[i][j][n]
                batch = jax.lax.dynamic_slice(batches.order, (start,), (width,))
                members, parent = member[batch], parent_of[batch]
                if share is Share.LAYER:
                    return use(carry, jax.vmap(partial(layers.apply, members[0])), start, parent)
                if share is Share.PARENT:
                    call = jax.vmap(layers.apply, in_axes=(0, None))
                    return use(carry, partial(call, members), start, parent[0])
                return use(carry, partial(jax.vmap(layers.apply), members), start, parent)

            carry = jax.lax.fori_loop(0, batches.counts[i][j], run, carry)
    return batches.position, carry
