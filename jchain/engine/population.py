"""The compiled program that evaluates a population.

It casts the problem, sorts the chains, spreads them over devices, and runs a plan.
"""

import dataclasses
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from jchain._typing import Activations, Array, Float, Int, PyTree
from jchain.data import Batch
from jchain.engine.backend import jit_for_problem
from jchain.engine.parts import average_over_parts
from jchain.engine.plans import Plan, choose_plan
from jchain.engine.prefix_sharing import (
    SortedChains,
    count_calls,
    find_first_new,
    pad_to_multiple,
    sort_chains,
)
from jchain.problem import Problem

_Results = tuple[Array, Array]
_MAX_KEPT_SIZES = 32


class Evaluation(NamedTuple):
    """The losses and accuracies of a population, or of one chain, and their cost.

    Attributes:
      loss: the loss of each chain, `[P]`, with the layer penalty; `+inf` if it was not finite. A
        scalar for one chain.
      accuracy: the accuracy of each chain, `[P]`, the mean over examples; 0 if the loss was not
        finite. A scalar for one chain.
      layer_calls: the number of distinct (prefix, layer) pairs of the population.
      head_calls: the number of distinct chains.
    """

    loss: Float[Array, "*P"]
    accuracy: Float[Array, "*P"]
    layer_calls: Int[Array, ""]
    head_calls: Int[Array, ""]

    @property
    def num_nonfinite(self) -> Int[Array, ""]:
        """The number of chains whose loss was not finite."""
        return jnp.sum(jnp.isinf(self.loss))


class Options(NamedTuple):
    """The arguments that are part of the compiled program, in a hashable form."""

    dtype: np.dtype | None
    memory_limit: int | None
    plan: Plan | None
    backend: str

    def choose(self, problem: Problem, hidden: PyTree, num_chains: int) -> Plan:
        """Return the given plan, or choose one if no plan was given.

        Raises:
          ValueError: if the given plan, or the evaluation of one node at a time, needs more memory
            than the limit.
        """
        if self.plan is None:
            return choose_plan(problem, hidden, num_chains, self.memory_limit, self.backend)
        needed = self.plan.count_bytes(problem, hidden)
        if self.memory_limit is not None and needed > self.memory_limit:
            raise ValueError(
                f"expected a plan of at most {self.memory_limit:,} bytes, but {self.plan} needs "
                f"{needed:,}"
            )
        return self.plan


@jit_for_problem(static_argnames=("options",))
def evaluate_population(
    problem: Problem, chains: Int[Array, "P L"], *, options: Options
) -> Evaluation:
    """Evaluate chains whose shape has already been checked.

    Args:
      problem: the bank, the split of data, and the loss.
      chains: the tokens of the chains, `[P, L]`. The loss of a row that is not a chain of the bank
        is `+inf`.
      options: the static options; see `jchain.evaluate`.
    """
    loss, accuracy = _evaluate_together(problem, chains, options)
    loss += problem.penalty(chains)
    is_chain = dataclasses.replace(problem.space, min_layers=0).contains(chains)
    is_finite = is_chain & jnp.isfinite(loss)
    return Evaluation(
        jnp.where(is_finite, loss, jnp.inf),
        jnp.where(is_finite, accuracy, 0.0),
        *count_calls(chains, problem.bank.num_layers),
    )


def pad_population(chains: Int[np.ndarray, "P L"]) -> Int[np.ndarray, "Q L"]:
    """Pad chains to a size of 1, 3, 7, 15, ..., so that few sizes are compiled.

    The last chain in sorted order is repeated, which costs no call. Sizes below a power of two have
    the plan of the sizes that they replace, and so the same bits.

    Args:
      chains: the tokens of the chains.
    """
    rows = chains
    for slot in range(chains.shape[1]):
        rows = rows[rows[:, slot] == rows[:, slot].max()]
    num_padding = 2 ** len(chains).bit_length() - 1 - len(chains)
    return np.concatenate([chains, np.repeat(rows[:1], num_padding, axis=0)])


def take_first(evaluation: Evaluation, num_chains: int) -> Evaluation:
    """Return the evaluation of the first chains of a population.

    Args:
      evaluation: the evaluation of the population.
      num_chains: how many chains to keep.
    """
    if num_chains not in _kept_sizes:
        if len(_kept_sizes) == _MAX_KEPT_SIZES:
            _slice.clear_cache()  # pyright: ignore[reportAttributeAccessIssue]
            _kept_sizes.clear()
        _kept_sizes.add(num_chains)
    loss, accuracy = _slice((evaluation.loss, evaluation.accuracy), num_chains)
    return evaluation._replace(loss=loss, accuracy=accuracy)


# The sizes whose programs `_slice` keeps.
_kept_sizes: set[int] = set()


@partial(jax.jit, static_argnums=1)
def _slice(arrays: _Results, num_rows: int) -> _Results:
    return jax.tree.map(lambda a: a[:num_rows], arrays)


def cast(problem: Problem, dtype: np.dtype | None) -> Problem:
    """Convert the floating-point weights and input of a problem to a dtype.

    Labels, layer costs, and inputs of integers and booleans are unchanged.

    Args:
      problem: the problem to convert.
      dtype: the dtype of weights and input; None to return the problem unchanged.

    Raises:
      ValueError: if a layer does not keep this dtype.
    """
    if dtype is None:
        return problem

    def cast_leaf(leaf: Array) -> Array:
        return leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

    bank = jax.tree.map(cast_leaf, problem.bank)
    data = Batch(jax.tree.map(cast_leaf, problem.data.x), problem.data.y)
    # `replace` checks again that each layer keeps the shape and dtype of its input. It would also
    # forget how many tokens the loss reads, because it cannot count traced labels.
    dataclasses.replace(problem, bank=bank, data=data)
    return problem.with_bank(bank).with_examples(data.x)


def _evaluate_together(problem: Problem, chains: Int[Array, "P L"], options: Options) -> _Results:
    """Compute loss, without the layer penalty, and accuracy; under `vmap`, as one population.

    A plain vmap of `_evaluate_sorted` would batch its loops, so that each step computes and copies
    whole blocks until the slowest population is done. It would also turn each layer call into one
    with gathered weights. This is 15 to 30 times slower for convolutions on CPU.
    """

    @jax.custom_batching.custom_vmap
    def evaluate(problem: Problem, chains: Array) -> _Results:
        return _evaluate_sorted(problem, chains, options)

    @evaluate.def_vmap
    def _(
        axis_size: int, is_batched: PyTree, problem: Problem, chains: Array
    ) -> tuple[_Results, tuple[bool, bool]]:
        if not any(jax.tree.leaves(is_batched[0])):
            out = _evaluate_together(problem, chains.reshape(-1, chains.shape[-1]), options)
            return jax.tree.map(lambda a: a.reshape(axis_size, -1), out), (True, True)
        leaves, structure = jax.tree.flatten((problem, chains))
        flags = jax.tree.leaves(is_batched)

        def evaluate_one(batched: list[Array]) -> _Results:
            rest = iter(batched)
            args = [next(rest) if flag else leaf for leaf, flag in zip(leaves, flags, strict=True)]
            problem, chains = jax.tree.unflatten(structure, args)
            return _evaluate_together(problem, chains, options)

        batched = [leaf for leaf, flag in zip(leaves, flags, strict=True) if flag]
        return jax.lax.map(evaluate_one, batched), (True, True)

    return evaluate(problem, chains)


def _evaluate_sorted(problem: Problem, chains: Int[Array, "P L"], options: Options) -> _Results:
    """Sort the chains, evaluate each distinct chain, and copy its results to equal chains."""
    population, source = sort_chains(chains, problem.bank.num_layers)

    def evaluate(problem: Problem) -> _Results:
        problem = cast(problem, options.dtype)
        hidden = problem.bank.embed(problem.data.x)
        evaluate_fn = _evaluate_part if problem.mesh is None else _evaluate_on_mesh
        return evaluate_fn(problem, hidden, population, options)

    return jax.tree.map(lambda a: a[source], average_over_parts(problem, evaluate))


def _evaluate_part(
    problem: Problem, hidden: Activations, population: SortedChains, options: Options
) -> _Results:
    plan = options.choose(problem, hidden, population.chains.shape[0])
    return plan.evaluate(problem, hidden, population)


def _evaluate_on_mesh(
    problem: Problem, hidden: Activations, population: SortedChains, options: Options
) -> _Results:
    """Evaluate an equal part of the chains on each device, and gather the results everywhere."""
    mesh, num_chains = problem.mesh, population.chains.shape[0]
    assert mesh is not None
    axis = mesh.axis_names[0]

    def evaluate(problem: Problem, hidden: PyTree, chains: Array, length: Array) -> _Results:
        part = SortedChains(chains, length, find_first_new(chains))
        results = _evaluate_part(problem, hidden, part, options)
        return jax.tree.map(lambda a: jax.lax.all_gather(a, axis, tiled=True), results)

    chains, length, _ = pad_to_multiple(population, mesh.size)
    everywhere, in_parts = PartitionSpec(), PartitionSpec(axis)
    spread = jax.shard_map(
        evaluate,
        mesh=mesh,
        in_specs=(everywhere, everywhere, in_parts, in_parts),
        out_specs=everywhere,
        # JAX's check cannot tell that all_gather makes the results equal on all devices.
        check_vma=False,
    )
    return jax.tree.map(lambda a: a[:num_chains], spread(problem, hidden, chains, length))
