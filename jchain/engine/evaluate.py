"""Many chains at once, exactly: each distinct (prefix, layer) of a population is computed once (`jchain.engine.plans` says how)."""

import dataclasses
from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple, TypedDict, Unpack

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from jchain import chain as chain_lib
from jchain._typing import Array, Float, Int, Shaped
from jchain.bank import Bank
from jchain.engine.backend import compiler_options, default_memory_limit, find_backend
from jchain.engine.layer_calls import apply_token
from jchain.engine.plans import Plan, choose_plan
from jchain.engine.prefix_sharing import (
    SortedChains,
    count_calls,
    find_first_new,
    pad_to_multiple,
    sort_chains,
)
from jchain.problem import Problem
from jchain.pytree import is_concrete

_MAX_CHAINS = 2**22
_DTYPES = (jnp.bfloat16, jnp.float32)


class Options(TypedDict, total=False):
    """Keyword arguments of every function that evaluates chains.

    Attributes:
      dtype: of weights and activations, `jnp.float32` or `jnp.bfloat16`; as they are when not given. Losses are computed
        in float32. Largest relative error of a loss against float64, digits banks and chains of 4 layers: 7e-7 in
        float32, 8e-3 in bfloat16 (`benchmarks/precision.py`).
      memory_limit: bytes for activations and temporaries on each device; a quarter of its memory when not given.
      mesh: devices over which the chains are spread, all of them, whatever its axes. Sorted chains are cut into equal
        parts; a prefix that spans a cut is computed on both sides.
      plan: how the calls are made, a `Walk`, `Blocks` or `Fused`, in place of the choice of `jchain.engine.plans.choose_plan`.
    """

    dtype: Any
    memory_limit: int | None
    mesh: Mesh | None
    plan: Plan | None


class Evaluation(NamedTuple):
    """What `evaluate` found."""

    loss: Float[Array, "*P"]  # [P], +inf where it was not finite
    accuracy: Float[Array, "*P"]  # [P], share of examples; 0 where the loss was not finite
    layer_calls: Int[Array, ""]  # distinct (prefix, layer) of the population
    head_calls: Int[Array, ""]  # distinct chains

    @property
    def num_nonfinite(self) -> Int[Array, ""]:
        """Chains whose loss was not finite."""
        return jnp.sum(jnp.isinf(self.loss))


class Explanation(NamedTuple):
    """What evaluating a population takes."""

    plan: Plan
    num_chains: int
    layer_calls: int  # distinct (prefix, layer): the nodes of the population's tree of prefixes
    unshared_layer_calls: int  # what a loop over the chains would make
    head_calls: int  # distinct chains
    num_devices: int
    num_bytes: int  # activations and temporaries on each device, an estimate
    memory_limit: int  # what they may be, in bytes

    def __str__(self) -> str:
        return (
            f"{self.num_chains:,} chains: {self.layer_calls:,} layer calls (a loop over chains would make "
            f"{self.unshared_layer_calls:,}) and {self.head_calls:,} head calls, by {self.plan} on {self.num_devices} "
            f"device(s), in about {self.num_bytes / 2**20:,.1f} of at most {self.memory_limit / 2**20:,.0f} MiB each"
        )


def apply_chain(
    bank: Bank, chain: Int[Array, "L"] | Any, x: Shaped[Array, "B ..."]
) -> Float[Array, "B ..."]:
    """Outputs of one chain for one batch: stem, layers in order, head. The plain definition, one branch per slot.

    Args:
      bank: the layers.
      chain: tokens, `[L]`; checked where they are not traced.
      x: raw input, `[B, ...]`.

    Raises:
      ValueError: `chain` is no chain of this bank.
    """
    if is_concrete(chain):
        chain = chain_lib.validate(chain, bank.num_layers, bank.num_heads)
    if jnp.ndim(chain) != 1:
        raise ValueError(f"expected one chain of shape [L], got {list(jnp.shape(chain))}")
    chain = jnp.asarray(chain)
    hidden = bank.embed(x)
    for token in chain[:-1]:
        is_layer = (token >= 0) & (token < bank.num_layers)
        hidden = jax.lax.cond(
            is_layer, partial(apply_token, bank.layers), lambda _, h: h, token, hidden
        )
    return apply_token(bank.heads, chain[chain_lib.count_layers(chain, bank.num_layers)], hidden)


def evaluate(
    problem: Problem, chains: Int[Array, "P L"] | Any, **options: Unpack[Options]
) -> Evaluation:
    """Loss and accuracy of many chains, each distinct (prefix, layer) computed once.

    Works under `jit` and `vmap`. Under a `vmap` over populations of one problem, they are computed together; over
    problems, one after another. Populations of one size share one compiled program.

    Args:
      problem: bank, split, loss.
      chains: tokens, `[P, L]`, `L = max_layers + 1`; checked where they are not traced.
      **options: see `Options`.

    Raises:
      ValueError: some row is no chain of this bank, or there are none; the dtype is not supported, by jchain or by a
        layer; memory_limit is too small for one node, or for the plan that was given; inputs lie on different devices.
    """
    chains = _check_chains(problem, chains)
    return _evaluate(*_place(problem, chains, options))


def evaluate_all(
    problem: Problem, **options: Unpack[Options]
) -> tuple[Int[np.ndarray, "P L"], Evaluation]:
    """Every chain of `min_layers` to `max_layers` layers and its evaluation, in the order of `chain.enumerate_all`.

    Raises:
      ValueError: there are more than 4,194,304, or as `evaluate`.
    """
    sizes = (problem.bank.num_layers, problem.bank.num_heads, problem.max_layers)
    num_chains = chain_lib.count(*sizes, min_layers=problem.min_layers)
    if num_chains > _MAX_CHAINS:
        raise ValueError(f"expected at most {_MAX_CHAINS:,} chains to evaluate, got {num_chains:,}")
    chains = chain_lib.enumerate_all(*sizes, min_layers=problem.min_layers)
    return chains, _evaluate(*_place(problem, chains, options))


def evaluate_prefixes(
    problem: Problem, chains: Int[Array, "P L"] | Any, **options: Unpack[Options]
) -> Evaluation:
    """Loss and accuracy of stopping each chain after each of its layers, by every head, for no layer call more.

    Args:
      problem: bank, split, loss.
      chains: tokens, `[P, L]`; their heads are not looked at.
      **options: see `Options`.

    Returns:
      An evaluation whose loss and accuracy are `[P, L, K]`: after `t` layers by head `k`, and `+inf` and 0 where the chain
      has fewer than `t`, which `num_nonfinite` counts too.

    Raises:
      ValueError: as `evaluate`.
    """
    chains = jnp.asarray(_check_chains(problem, chains))
    num_layers, num_heads = problem.bank.num_layers, problem.bank.num_heads
    num_chains, num_slots = chains.shape
    length = chain_lib.count_layers(chains, num_layers)[:, None]
    stop = jnp.arange(num_slots)[None]
    # Stops behind the end repeat it, which costs nothing.
    end = jnp.minimum(stop, length)[:, :, None, None]
    slots = jnp.arange(num_slots)[None, None, None]
    head = num_layers + jnp.arange(num_heads)[None, None, :, None]
    stopped = jnp.where(
        slots < end, chains[:, None, None], jnp.where(slots == end, head, chain_lib.PADDING)
    )
    out = _evaluate(*_place(problem, stopped.reshape(-1, num_slots), options))
    is_there = (stop <= length)[..., None]
    loss, accuracy = (a.reshape(num_chains, num_slots, num_heads) for a in (out.loss, out.accuracy))
    return out._replace(
        loss=jnp.where(is_there, loss, jnp.inf), accuracy=jnp.where(is_there, accuracy, 0.0)
    )


def explain(
    problem: Problem, chains: Int[Array, "P L"] | Any, **options: Unpack[Options]
) -> Explanation:
    """What `evaluate` would do with the same arguments, without doing it.

    Raises:
      ValueError: as `evaluate`.
    """
    problem, chains, settings = _place(problem, _check_chains(problem, chains), options)
    num_devices = 1 if problem.mesh is None else problem.mesh.size
    share = -(-chains.shape[0] // num_devices)
    cast = jax.eval_shape(lambda problem: _cast(problem, settings.dtype), problem)
    hidden = jax.eval_shape(lambda problem: problem.bank.embed(problem.data.x), cast)
    plan = settings.choose(cast, hidden, share)
    layer_calls, head_calls = count_calls(chains, problem.bank.num_layers)
    limit = settings.memory_limit
    return Explanation(
        plan=plan,
        num_chains=chains.shape[0],
        layer_calls=int(layer_calls),
        unshared_layer_calls=int(chain_lib.count_layers(chains, problem.bank.num_layers).sum()),
        head_calls=int(head_calls),
        num_devices=num_devices,
        num_bytes=plan.count_bytes(cast, hidden),
        memory_limit=default_memory_limit() if limit is None else limit,
    )


class _Settings(NamedTuple):
    """Options that are part of a program. Hashable."""

    dtype: Any
    memory_limit: int | None
    plan: Plan | None
    backend: str

    def choose(self, problem: Problem, hidden: Any, num_chains: int) -> Plan:
        if self.plan is None:
            return choose_plan(problem, hidden, num_chains, self.memory_limit, self.backend)
        needed = self.plan.count_bytes(problem, hidden)
        if self.memory_limit is not None and needed > self.memory_limit:
            raise ValueError(
                f"expected a plan of at most {self.memory_limit:,} bytes, but {self.plan} needs {needed:,}"
            )
        return self.plan


def _check_chains(problem: Problem, chains: Any) -> Any:
    if is_concrete(chains):
        chains = chain_lib.validate(
            chains, problem.bank.num_layers, problem.bank.num_heads, problem.max_layers
        )
    expected = f"[P, {problem.max_layers + 1}]"
    if jnp.ndim(chains) != 2 or chains.shape[0] == 0 or chains.shape[1] != problem.max_layers + 1:
        raise ValueError(
            f"expected chains of shape {expected}, at least one, got {list(jnp.shape(chains))}"
        )
    return chains


def _place(problem: Problem, chains: Any, options: Options) -> tuple[Problem, Array, _Settings]:
    """Checks of the options, and the inputs where they are computed."""
    dtype, memory_limit, mesh = (
        options.get("dtype"),
        options.get("memory_limit"),
        options.get("mesh"),
    )
    if dtype is not None and jnp.dtype(dtype) not in map(jnp.dtype, _DTYPES):
        raise ValueError(f"expected a dtype of bfloat16 or float32, got {jnp.dtype(dtype).name}")
    if memory_limit is not None and memory_limit < 1:
        raise ValueError(f"expected a memory_limit of at least 1 byte, got {memory_limit}")
    if mesh is not None:
        problem = problem.on(mesh)
    problem, chains = problem.without_names(), problem.put(chains)
    settings = _Settings(
        dtype and jnp.dtype(dtype), memory_limit, options.get("plan"), find_backend(problem, chains)
    )
    return problem, chains, settings


def _evaluate(problem: Problem, chains: Int[Array, "P L"], settings: _Settings) -> Evaluation:
    # Only the outermost jit may have options of the compiler.
    is_outermost = is_concrete((problem, chains))
    return _compile(settings.backend if is_outermost else None)(problem, chains, settings)


@cache
def _compile(backend: str | None) -> Callable[[Problem, Array, _Settings], Evaluation]:
    options = None if backend is None else compiler_options(backend)
    return jax.jit(_compute, static_argnames="settings", compiler_options=options)


def _compute(problem: Problem, chains: Int[Array, "P L"], settings: _Settings) -> Evaluation:
    loss, accuracy = _measure(problem, chains, settings)
    loss += problem.layer_penalty(chains)
    is_finite = jnp.isfinite(loss)
    return Evaluation(
        jnp.where(is_finite, loss, jnp.inf),
        jnp.where(is_finite, accuracy, 0.0),
        *count_calls(chains, problem.bank.num_layers),
    )


def _measure(
    problem: Problem, chains: Int[Array, "P L"], settings: _Settings
) -> tuple[Array, Array]:
    """Loss `[P]` without price and accuracy `[P]`.

    A plain vmap of `_measure_sorted` would batch its loops, computing and copying whole blocks for the slowest
    population, and turn each layer call into one with gathered weights: 15 to 30 times slower for convolutions on CPU.
    """

    @jax.custom_batching.custom_vmap
    def measure(problem: Problem, chains: Array) -> tuple[Array, Array]:
        return _measure_sorted(problem, chains, settings)

    @measure.def_vmap
    def _(axis_size: int, is_batched: Any, problem: Problem, chains: Array) -> Any:
        if not any(jax.tree.leaves(is_batched[0])):
            out = _measure(problem, chains.reshape(-1, chains.shape[-1]), settings)
            return jax.tree.map(lambda a: a.reshape(axis_size, -1), out), (True, True)
        leaves, structure = jax.tree.flatten((problem, chains))
        flags = jax.tree.leaves(is_batched)

        def measure_one(batched: list[Array]) -> tuple[Array, Array]:
            rest = iter(batched)
            args = [next(rest) if flag else leaf for leaf, flag in zip(leaves, flags, strict=True)]
            problem, chains = jax.tree.unflatten(structure, args)
            return _measure(problem, chains, settings)

        batched = [leaf for leaf, flag in zip(leaves, flags, strict=True) if flag]
        return jax.lax.map(measure_one, batched), (True, True)

    return measure(problem, chains)


def _cast(problem: Problem, dtype: Any) -> Problem:
    """The problem with weights and floating input in `dtype`; labels and prices as they are."""
    if dtype is None:
        return problem

    def cast(leaf: Array) -> Array:
        return leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

    # Checks again that the layers keep the shape, and so the dtype, of their input.
    return dataclasses.replace(
        problem,
        bank=jax.tree.map(cast, problem.bank),
        data=problem.data._replace(x=cast(problem.data.x)),
    )


def _measure_sorted(
    problem: Problem, chains: Int[Array, "P L"], settings: _Settings
) -> tuple[Array, Array]:
    problem = _cast(problem, settings.dtype)
    hidden = problem.bank.embed(problem.data.x)
    population, source = sort_chains(chains, problem.bank.num_layers)
    measure_fn = _measure_part if problem.mesh is None else _measure_on_mesh
    results = measure_fn(problem, hidden, population, settings)
    # A chain equal to the one before it was not computed: it takes the results of the first of its run.
    return jax.tree.map(lambda a: a[source], results)


def _measure_part(
    problem: Problem, hidden: Array, population: SortedChains, settings: _Settings
) -> tuple[Array, Array]:
    plan = settings.choose(problem, hidden, population.chains.shape[0])
    return plan.measure(problem, hidden, population)


def _measure_on_mesh(
    problem: Problem, hidden: Array, population: SortedChains, settings: _Settings
) -> tuple[Array, Array]:
    """An equal part of the sorted chains on each device of the mesh, results on all."""
    mesh, num_chains = problem.mesh, population.chains.shape[0]
    assert mesh is not None
    axis = mesh.axis_names[0]

    def measure(
        problem: Problem, hidden: Array, chains: Array, length: Array
    ) -> tuple[Array, Array]:
        part = SortedChains(chains, length, find_first_new(chains))
        results = _measure_part(problem, hidden, part, settings)
        return jax.tree.map(lambda a: jax.lax.all_gather(a, axis, tiled=True), results)

    chains, length, _ = pad_to_multiple(population, mesh.size)
    everywhere, in_parts = PartitionSpec(), PartitionSpec(axis)
    spread = jax.shard_map(
        measure,
        mesh=mesh,
        in_specs=(everywhere, everywhere, in_parts, in_parts),
        out_specs=everywhere,
        # all_gather makes results equal on all devices, which the check cannot see.
        check_vma=False,
    )
    return jax.tree.map(lambda a: a[:num_chains], spread(problem, hidden, chains, length))
