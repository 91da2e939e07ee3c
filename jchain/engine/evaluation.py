"""Public functions that score chains.

Each function checks its arguments and then calls `jchain.engine.population`. The loss itself is
`Problem.loss_and_accuracy`. Each distinct (prefix, layer) pair of a population is computed once;
`jchain.engine.plans` chooses how the calls are made.
"""

import sys
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike

from jchain import chain as chain_lib
from jchain._typing import Activations, Array, Float, Int, PyTree
from jchain.arguments import check_integers, checked
from jchain.bank import Bank
from jchain.chain import ChainsLike
from jchain.data import Batch
from jchain.engine.backend import default_memory_limit, get_backend, has_own_program
from jchain.engine.layer_calls import apply_layers, apply_token, explain_wrong_input
from jchain.engine.plans import Plan
from jchain.engine.population import (
    Evaluation,
    Options,
    cast,
    pad_population,
    take_first,
)
from jchain.engine.prefix_sharing import count_calls
from jchain.engine.successive_halving import evaluate_rows
from jchain.engine.timing import estimate_seconds
from jchain.modules.host_batch import HostBatch
from jchain.problem import Problem
from jchain.pytree import describe_type, is_concrete
from jchain.stages import binding

_MAX_CHAINS = 2**22
_DTYPES = (jnp.bfloat16, jnp.float32)


class Explanation(NamedTuple):
    """The plan that `evaluate` would use for a population, with the calls and memory it takes.

    Attributes:
      plan: how the calls are made.
      num_chains: the number of chains, with repetitions.
      layer_calls: the number of distinct (prefix, layer) pairs: the nodes of the prefix tree.
      unshared_layer_calls: the number of layer calls that a loop over the chains would make.
      head_calls: the number of distinct chains.
      num_devices: the number of devices that the chains are divided among.
      num_bytes: the estimated size of activations and temporaries on each device, in bytes.
      memory_limit: the upper limit of `num_bytes`.
      seconds: the estimated time on this machine, without compilation; None unless measured.
    """

    plan: Plan
    num_chains: int
    layer_calls: int
    unshared_layer_calls: int
    head_calls: int
    num_devices: int
    num_bytes: int
    memory_limit: int
    seconds: float | None = None

    def __str__(self) -> str:
        took = "" if self.seconds is None else f", and about {self.seconds:,.2g} s"
        return (
            f"{self.num_chains:,} chains: {self.layer_calls:,} layer calls (a loop over chains "
            f"would make {self.unshared_layer_calls:,}) and {self.head_calls:,} head calls, by "
            f"{self.plan} on {self.num_devices} device(s), in about {self.num_bytes / 2**20:,.1f} "
            f"of at most {self.memory_limit / 2**20:,.0f} MiB each{took}"
        )


@checked
def apply_chain(bank: Bank, chain: ChainsLike, x: Activations) -> Float[Array, "B ..."]:
    """Apply one chain to one batch of raw input.

    The stem, the layers in order, and the head are applied one after another, with one branch per
    slot. This is the reference definition of what a chain computes.

    Args:
      bank: the bank with the layers and heads.
      chain: the tokens of the chain, `[L]`. They are checked unless they are traced.
      x: the raw input, `[B, ...]`, or a pytree of such arrays.

    Returns:
      The outputs of the head, `[B, ...]`.

    Raises:
      ValueError: if `chain` is not a chain of this bank, or the bank does not accept `x`.
    """
    tokens = jnp.asarray(bank.validate(chain) if is_concrete(chain) else chain)
    if tokens.ndim != 1:
        raise ValueError(f"expected one chain of shape [L], got {list(tokens.shape)}")
    if bank.stages is not None:
        bank = binding.bind(bank, x)
    with explain_wrong_input(bank, x):
        hidden, head = apply_layers(bank, tokens, x)
        return apply_token(bank.heads, head, hidden)


@checked
def predict(problem: Problem, chain: ChainsLike) -> Float[np.ndarray, "B ..."]:
    """Compute the outputs of one chain for all examples of the problem, in host memory.

    Use it for metrics that are not means over examples, such as the macro F1 score. If the problem
    has a `batch_size`, that many examples are on the device at a time.

    Args:
      problem: the bank, and the split of data.
      chain: the tokens of the chain, `[L]`.

    Returns:
      The outputs of the head, `[B, ...]`, in the order of the examples.

    Raises:
      ValueError: if `chain` is not a chain of this bank.
    """
    bank, tokens = problem.bank.without_names(), problem.bank.validate(chain)
    if tokens.ndim != 1:
        raise ValueError(f"expected one chain of shape [L], got {list(tokens.shape)}")
    if not isinstance(problem.data, HostBatch):
        return np.asarray(_apply_jitted(bank, jnp.asarray(tokens), problem.data.x))
    outputs = [
        np.asarray(_apply_jitted(bank, jnp.asarray(tokens), jax.tree.map(jnp.asarray, x)))
        for x, _ in problem.data.iterate()
    ]
    return np.concatenate(outputs)


@jax.jit
def _apply_jitted(bank: Bank, tokens: Int[Array, "L"], x: PyTree) -> Array:
    return apply_chain(bank, tokens, x)


@checked
def evaluate(
    problem: Problem,
    chains: ChainsLike,
    *,
    dtype: DTypeLike | None = None,
    memory_limit: int | None = None,
    mesh: Mesh | None = None,
    plan: Plan | None = None,
) -> Evaluation:
    """Compute the loss and accuracy of many chains, or of one.

    Each distinct (prefix, layer) pair is computed once, so chains that share a prefix share its
    cost. The function works under `jit` and `vmap`: a `vmap` over populations of one problem
    evaluates them together, and a `vmap` over problems evaluates them in sequence. Populations of
    the same size share one compiled program.

    Args:
      problem: the bank, the split of data, and the loss.
      chains: the tokens of the chains, `[P, L]` with `L = max_layers + 1`, or of one chain, `[L]`.
        They are checked unless they are traced.
      dtype: the dtype of weights and activations, `jnp.float32` or `jnp.bfloat16`; None keeps their
        dtypes. Integers and booleans keep theirs. Losses are computed in float32. On digits banks
        and chains of 4 layers, the largest relative error of a loss compared with float64 is 7e-7
        in float32 and 8e-3 in bfloat16 (`benchmarks/precision.py`).
      memory_limit: the number of bytes that activations and temporaries may take on each device;
        None for a quarter of the device's memory.
      mesh: a mesh, with any axes, over whose devices the chains are spread; None for the mesh of
        the problem. The sorted chains are cut into equal parts, and a prefix that spans a cut is
        computed on both devices.
      plan: how the calls are made: a `jchain.engine.DepthFirst`, `Blocks`, or `Fused`. If None,
        `jchain.engine.choose_plan` chooses it.

    Returns:
      The loss and accuracy of each chain, `[P]`, or of the one chain, as scalars, and the layer
      calls and head calls that they cost.

    Raises:
      ValueError: if a row is not a chain of this bank, there are no rows, jchain or a layer does
        not support the dtype, memory_limit is too small for one node or for the given plan, or the
        inputs are on different devices.
    """
    tokens = _check_chains(problem, chains, num_axes=(1, 2))
    rows = tokens.reshape(-1, tokens.shape[-1])
    out = _evaluate_any_size(problem, rows, dtype, memory_limit, mesh, plan)
    is_one = tokens.ndim == 1
    return out._replace(loss=out.loss[0], accuracy=out.accuracy[0]) if is_one else out


@checked
def pick_best(problem: Problem, chains: ChainsLike, data: Batch) -> Int[np.ndarray, "L"]:
    """Score chains on another split, and return the one with the lowest loss there.

    Args:
      problem: the bank and the loss. Its own split is not used.
      chains: the tokens of the chains, `[P, L]`, such as `result.finalists`.
      data: the split that decides: usually `data.select`, which the search has not seen.

    Returns:
      The tokens of the best chain, `[L]`; the first one of several that are equally good.

    Raises:
      ValueError: if a row is not a chain of this bank, there are no rows, no loss is finite, or the
        bank or the loss does not accept the split.
    """
    rows = _check_chains(problem, chains)
    loss = np.asarray(evaluate(problem.with_data(data), rows).loss)
    if not np.isfinite(loss).any():
        raise ValueError(f"expected a chain of finite loss, got {len(loss)} that have none")
    return np.asarray(rows)[loss.argmin()]


def evaluate_filled(problem: Problem, chains: Int[Array, "P L"]) -> Evaluation:
    """Evaluate chains of which some are `ChainSpace.head_alone`, whose loss is not used.

    `evaluate` would refuse these on the host if that head reads a later stage.

    Args:
      problem: the bank, the split of data, and the loss.
      chains: the tokens of the chains, `[P, L]`.

    Returns:
      The same as from `evaluate`; the loss of a chain that does not follow the stages is `+inf`.
    """
    if problem.bank.stages is None:
        return evaluate(problem, chains)
    placed, tokens, options = _place(problem, chains, None, None, None, None)
    return evaluate_rows(placed, tokens, options=options)


@checked
def evaluate_all(
    problem: Problem,
    *,
    dtype: DTypeLike | None = None,
    memory_limit: int | None = None,
    mesh: Mesh | None = None,
    plan: Plan | None = None,
) -> tuple[Int[np.ndarray, "P L"], Evaluation]:
    """Evaluate every chain that has `min_layers` to `max_layers` layers.

    Args:
      problem: the bank, the split of data, the loss, and the allowed numbers of layers.
      dtype: the dtype of weights and activations; see `evaluate`.
      memory_limit: the memory limit of each device in bytes; see `evaluate`.
      mesh: the devices over which the chains are spread; see `evaluate`.
      plan: how the calls are made; see `evaluate`.

    Returns:
      The chains in the order of `problem.space.enumerate()`, and their evaluation.

    Raises:
      ValueError: if there are more than 4,194,304 chains, and for the same reasons as `evaluate`.
    """
    num_chains = problem.space.num_chains
    if num_chains > _MAX_CHAINS:
        raise ValueError(
            f"expected at most {_MAX_CHAINS:,} chains to evaluate, got {num_chains:,}; search them "
            "with jc.run, or lower max_layers"
        )
    chains = problem.space.enumerate()
    placed, tokens, options = _place(problem, chains, dtype, memory_limit, mesh, plan)
    return chains, evaluate_rows(placed, tokens, options=options)


@checked
def evaluate_prefixes(
    problem: Problem,
    chains: ChainsLike,
    *,
    dtype: DTypeLike | None = None,
    memory_limit: int | None = None,
    mesh: Mesh | None = None,
    plan: Plan | None = None,
) -> Evaluation:
    """Evaluate every prefix of each chain with every head.

    This costs no more layer calls than an evaluation of the chains alone.

    Args:
      problem: the bank, the split of data, and the loss.
      chains: the tokens of the chains, `[P, L]`. Their heads are ignored.
      dtype: the dtype of weights and activations; see `evaluate`.
      memory_limit: the memory limit of each device in bytes; see `evaluate`.
      mesh: the devices over which the chains are spread; see `evaluate`.
      plan: how the calls are made; see `evaluate`.

    Returns:
      An evaluation whose loss and accuracy are `[P, L, K]`: entry `[p, t, k]` is for the first `t`
      layers of chain `p` with head `k`. If the chain has fewer than `t` layers, the loss is `+inf`
      and the accuracy is 0; `num_nonfinite` counts these entries too.

    Raises:
      ValueError: for the same reasons as `evaluate`.
    """
    tokens = _check_chains(problem, chains)
    xp = np if isinstance(tokens, np.ndarray) else jnp
    num_chains, num_slots = tokens.shape
    num_heads = problem.bank.num_heads
    length = xp.sum((tokens >= 0) & (tokens < problem.bank.num_layers), axis=-1)[:, None]
    stop = xp.arange(num_slots)[None]
    # Entries after the last layer repeat the whole chain, which costs nothing.
    end = xp.minimum(stop, length)[:, :, None, None]
    slots = xp.arange(num_slots)[None, None, None]
    head = problem.bank.num_layers + xp.arange(num_heads)[None, None, :, None]
    stopped = xp.where(
        slots < end, tokens[:, None, None], xp.where(slots == end, head, chain_lib.PADDING)
    )
    rows = stopped.reshape(-1, num_slots).astype(np.int32)
    out = _evaluate_any_size(problem, rows, dtype, memory_limit, mesh, plan)
    is_prefix = (stop <= length)[..., None]
    loss, accuracy = (a.reshape(num_chains, num_slots, num_heads) for a in (out.loss, out.accuracy))
    return out._replace(
        loss=jnp.where(is_prefix, loss, jnp.inf), accuracy=jnp.where(is_prefix, accuracy, 0.0)
    )


@checked
def explain_plan(
    problem: Problem,
    chains: ChainsLike,
    *,
    dtype: DTypeLike | None = None,
    memory_limit: int | None = None,
    mesh: Mesh | None = None,
    plan: Plan | None = None,
    measure: bool = False,
) -> Explanation:
    """Describe the plan, the calls, and the memory of `evaluate` with the same arguments.

    Nothing is computed, unless the time is measured.

    Args:
      problem: the bank, the split of data, and the loss.
      chains: the tokens of the chains, `[P, L]` with `L = max_layers + 1`, or of one chain, `[L]`.
      dtype: the dtype of weights and activations; see `evaluate`.
      memory_limit: the memory limit of each device in bytes; see `evaluate`.
      mesh: the devices over which the chains are spread; see `evaluate`.
      plan: how the calls are made; see `evaluate`.
      measure: whether to estimate the time, by timing a few chains on a few examples.

    Raises:
      ValueError: for the same reasons as `evaluate`.
    """
    tokens = _check_chains(problem, chains, num_axes=(1, 2))
    given = tokens = tokens.reshape(-1, tokens.shape[-1])
    problem, tokens, options = _place(problem, tokens, dtype, memory_limit, mesh, plan)
    num_devices = 1 if problem.mesh is None else problem.mesh.size
    chains_per_device = -(-tokens.shape[0] // num_devices)
    part = problem.first_part()
    shapes = jax.eval_shape(lambda problem: cast(problem, options.dtype), part)
    hidden = jax.eval_shape(lambda problem: problem.bank.embed(problem.data.x), shapes)
    chosen = options.choose(shapes, hidden, chains_per_device)
    layer_calls, head_calls = count_calls(tokens, problem.bank.num_layers)
    return Explanation(
        plan=chosen,
        num_chains=tokens.shape[0],
        layer_calls=int(layer_calls),
        unshared_layer_calls=int(problem.space.count_layers(tokens).sum()),
        head_calls=int(head_calls),
        num_devices=num_devices,
        num_bytes=chosen.count_bytes(shapes, hidden),
        memory_limit=default_memory_limit() if memory_limit is None else memory_limit,
        seconds=estimate_seconds(problem, np.asarray(given), options) if measure else None,
    )


def _check_chains(
    problem: Problem, chains: ChainsLike, num_axes: tuple[int, ...] = (2,)
) -> Array | np.ndarray:
    """Return the chains as an array, after a check of their shape and, unless traced, values."""
    if not isinstance(problem, Problem):
        raise ValueError(f"expected a jc.Problem, got {describe_type(problem)}")
    tokens = problem.space.validate(chains) if is_concrete(chains) else jnp.asarray(chains)
    shape = tokens.shape
    if len(shape) not in num_axes or 0 in shape or shape[-1] != problem.max_layers + 1:
        raise ValueError(
            f"expected chains of shape [P, {problem.max_layers + 1}], at least one, got "
            f"{list(shape)}"
        )
    return tokens


def _evaluate_any_size(
    problem: Problem,
    chains: Array | np.ndarray,
    dtype: DTypeLike | None,
    memory_limit: int | None,
    mesh: Mesh | None,
    plan: Plan | None,
) -> Evaluation:
    """Evaluate a population by the program of its size, or of a larger size.

    Each new size would compile a new program, and a process has room for some hundred of them.
    Traced chains are not padded. With a mesh, all are: its processes must run the same program, but
    may have used other sizes before.
    """
    num_chains, is_alone = len(chains), mesh is None and problem.mesh is None
    if isinstance(chains, np.ndarray) and not (is_alone and has_own_program(num_chains)):
        chains = pad_population(chains)
    placed, rows, options = _place(problem, chains, dtype, memory_limit, mesh, plan)
    out = evaluate_rows(placed, rows, options=options)
    return out if len(rows) == num_chains else take_first(out, num_chains)


def _is_supported(dtype: DTypeLike) -> bool:
    try:
        # NumPy reads a tuple as a structured dtype.
        is_one = not isinstance(dtype, tuple | list | dict)
        return is_one and jnp.dtype(dtype) in map(jnp.dtype, _DTYPES)
    except (TypeError, ValueError):  # not a dtype, such as torch.float32
        return False


def _place(
    problem: Problem,
    chains: Array | np.ndarray,
    dtype: DTypeLike | None,
    memory_limit: int | None,
    mesh: Mesh | None,
    plan: Plan | None,
) -> tuple[Problem, Array, Options]:
    """Check all arguments except the chains, and move the inputs to the devices."""
    if dtype is not None and not _is_supported(dtype):
        raise ValueError(f"expected a dtype of jnp.bfloat16 or jnp.float32, got {dtype!r}")
    if memory_limit is not None:
        check_integers(at_least=1, at_most=sys.maxsize, memory_limit=memory_limit)
    if mesh is not None:
        problem = problem.with_mesh(mesh)
    problem, tokens = problem.without_names(), problem.put(chains)
    options = Options(
        None if dtype is None else jnp.dtype(dtype),
        memory_limit,
        plan,
        get_backend(problem, tokens),
    )
    return problem, tokens, options
