"""What chains cost in real units: parameters, bytes of weights, FLOPs, and milliseconds."""

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, jaxpr_as_fun

from jchain._typing import Activations, Array, Float, Int, PyTree
from jchain.arguments import checked
from jchain.bank import Bank
from jchain.chain import ChainsLike
from jchain.data import Batch
from jchain.engine.backend import compiler_options
from jchain.engine.layer_calls import nbytes
from jchain.groups import check_keeps_shape, infer_head_output
from jchain.modules import Module, apply_module, check_stem, split_variables
from jchain.pytree import describe_type, pick
from jchain.stages.binding import infer_stage_shapes, unbind

UNITS = ("params", "bytes", "flops", "milliseconds")
# `token_costs` checks the unit itself.
if TYPE_CHECKING:
    Unit: TypeAlias = Literal["params", "bytes", "flops", "milliseconds"]
else:
    Unit: TypeAlias = str
# The units that need a batch.
_MEASURED = ("flops", "milliseconds")
# A time is the median of at least 5 calls, and of up to 100 calls within about 0.1 s.
_MIN_CALLS, _MAX_CALLS, _SECONDS = 5, 100, 0.1


class Cost(NamedTuple):
    """What each chain costs as a model of its own: the stem, its layers in order, and its head.

    Attributes:
      params: the number of parameters, `[P]`; a scalar for one chain, as for all fields.
      bytes: the size of all weights, `[P]`, with other collections such as statistics.
      flops: the FLOPs of one forward pass of the batch, `[P]`; None without a batch.
      milliseconds: the time of one forward pass of the batch, `[P]`; None without a batch.
    """

    params: Int[np.ndarray, "*P"]
    bytes: Int[np.ndarray, "*P"]
    flops: Float[np.ndarray, "*P"] | None
    milliseconds: Float[np.ndarray, "*P"] | None


@checked
def cost(bank: Bank, chains: ChainsLike, *, x: PyTree | None = None) -> Cost:
    """Compute what chains cost: parameters, bytes of weights, FLOPs, and milliseconds.

    The cost of a chain is the sum of the `token_costs` of its tokens. A layer that occurs twice in
    a chain counts twice, because an exported checkpoint holds a copy for each occurrence.

    Args:
      bank: the bank that the chains are built from.
      chains: the tokens of one chain `[L]`, or of several, `[P, L]` or a list of lists.
      x: a batch of raw input, `[B, ...]`, or a `jax.ShapeDtypeStruct` of one. FLOPs and
        milliseconds are those of the whole batch, so pass a single example, `x[:1]`, for FLOPs per
        example. Without a batch, they are None.

    Raises:
      ValueError: if a chain is invalid, or a module does not accept the batch.
    """
    tokens = bank.validate(chains)

    def add_up(unit: Unit) -> Float[np.ndarray, "*P"]:
        costs = token_costs(bank, unit, x=x)
        return np.asarray(np.where(tokens >= 0, costs[tokens], 0.0).sum(axis=-1))

    return Cost(
        add_up("params").astype(np.int64),
        add_up("bytes").astype(np.int64),
        None if x is None else add_up("flops"),
        None if x is None else add_up("milliseconds"),
    )


@checked
def token_costs(bank: Bank, unit: Unit, *, x: PyTree | None = None) -> Float[np.ndarray, "E"]:
    """Compute what each layer and head of a bank costs, for `jchain.Problem(token_costs=...)`.

    Every chain has the stem and one head, so the cost of a head includes that of the stem. The
    costs of a chain's tokens then add up to the cost of the whole model. Weights that a stem and a
    head share, such as tied embeddings, are counted in both.

    FLOPs are counted by XLA in the program before its optimization, so they are the same on all
    backends. A multiply-add counts as 2 FLOPs, an elementwise operation as 1 per element, and
    exponentials, square roots, and the like as 0. Each iteration of a scan is counted. A layer
    with a `while_loop`, whose number of iterations is unknown, has nan FLOPs, and a custom kernel
    counts what it tells XLA.

    A time is the median over repeated calls of the compiled layer on the default backend, after a
    first call. It is measured once per group, because the layers of a group run the same program.
    It includes the time to start one program, so the sum over a chain of tiny layers is longer
    than the time of the whole chain as one program.

    Args:
      bank: the bank with the layers and heads.
      unit: `"params"`, `"bytes"`, `"flops"`, or `"milliseconds"`.
      x: a batch of raw input, `[B, ...]`, or a `jax.ShapeDtypeStruct` of one, for which zeros are
        used; FLOPs and milliseconds are those of the whole batch. The other units do not use it.

    Returns:
      The costs, float64 `[N + K]`: N layers, then K heads.

    Raises:
      ValueError: if the unit is unknown, FLOPs or milliseconds are asked for without a batch, or a
        module does not accept the batch.
    """
    if not isinstance(bank, Bank):
        raise ValueError(f"expected a jc.Bank, got {describe_type(bank)}")
    if unit not in UNITS:
        raise ValueError(f"expected a unit of {', '.join(UNITS)}, got {unit!r}")
    if unit in _MEASURED and x is None:
        raise ValueError(f"expected x, a batch of raw input, for the unit {unit!r}, got None")
    bank, batch, hidden = unbind(bank), None, {}
    if unit in _MEASURED and x is not None:
        batch = _make_batch(x)
        hidden = _check_batch(bank, batch)

    def measure(
        module: Module, trees: tuple[PyTree, PyTree], given: Activations | None
    ) -> float | int:
        if unit == "params":
            return sum(leaf.size for leaf in jax.tree.leaves(trees[0]))
        if unit == "bytes":
            return sum(nbytes(leaf) for leaf in jax.tree.leaves(trees))
        run = _count_flops if unit == "flops" else _time_calls
        return run(lambda own, x: apply_module(module, own[0], own[1], x), trees, given)

    costs = np.zeros(bank.num_layers + bank.num_heads)
    for group in (*bank.layers, *bank.heads):
        member = pick((group.params, group.state), 0)
        costs[list(group.tokens)] = measure(group.module, member, hidden.get(group.stages[0]))
    if bank.stem is not None:
        stem = split_variables(bank.stem, bank.stem_params)
        costs[bank.num_layers :] += measure(bank.stem, stem, batch)
    return costs


def _make_batch(x: PyTree) -> Activations:
    """Return a batch as arrays: zeros if only their shapes are given."""
    leaves, kinds = jax.tree.leaves(x), jax.Array | np.ndarray | jax.ShapeDtypeStruct
    is_batch = all(isinstance(leaf, kinds) and leaf.shape and leaf.shape[0] > 0 for leaf in leaves)
    if isinstance(x, Batch) or not leaves or not is_batch:
        raise ValueError(
            "expected x to be a batch of raw input [B, ...] or a jax.ShapeDtypeStruct of one, with "
            f"at least one example, got {describe_type(x)}"
        )

    def make(leaf: object) -> Array:
        if isinstance(leaf, jax.ShapeDtypeStruct):
            return jnp.zeros(leaf.shape, leaf.dtype)
        return jnp.asarray(leaf)  # pyright: ignore[reportArgumentType]

    return jax.tree.map(make, x)


def _check_batch(bank: Bank, x: Activations) -> dict[int, Activations]:
    """Check that all modules accept a batch, and return the input of the layers of each stage.

    The inputs of later stages are zeros.
    """
    hidden = check_stem(bank.stem, bank.stem_params, x)
    if bank.stages is not None:
        shapes = infer_stage_shapes(bank.layers, bank.heads, hidden, bank.names)
        zeros = {stage: jnp.zeros(own.shape, own.dtype) for stage, own in shapes.items()}
        return zeros | {0: bank.embed(x)}
    for group in bank.layers:
        check_keeps_shape(group, hidden, bank.names)
    for group in bank.heads:
        infer_head_output(group, hidden, bank.names)
    return {0: bank.embed(x)}


def _count_flops(fn: Callable[..., object], *args: PyTree) -> float:
    """Count the FLOPs of a function, with all iterations of its loops."""
    return _read_flops(fn, *args) + _count_repeats(jax.make_jaxpr(fn)(*args).jaxpr)


def _read_flops(fn: Callable[..., object], *args: PyTree) -> float:
    """Return XLA's count of the program before optimization, which counts a loop's body once.

    The optimized program is not used, because it holds library calls that XLA counts as 0, and
    some elementwise operations twice.
    """
    analysis = jax.jit(fn).lower(*args).cost_analysis()
    return float(analysis.get("flops", 0.0)) if analysis else 0.0


def _count_repeats(jaxpr: Jaxpr) -> float:
    """Count the FLOPs that XLA leaves out: those of the later iterations of each scan."""
    total = 0.0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "while":
            return float("nan")
        if equation.primitive.name == "scan":
            body = equation.params["jaxpr"]
            fn, args = jaxpr_as_fun(body), [jnp.zeros(a.shape, a.dtype) for a in body.in_avals]
            total += equation.params["length"] * _count_flops(fn, *args) - _read_flops(fn, *args)
            continue
        for inner in jax.tree.leaves(equation.params, is_leaf=lambda p: hasattr(p, "eqns")):
            if isinstance(inner, Jaxpr | ClosedJaxpr):
                total += _count_repeats(inner.jaxpr if isinstance(inner, ClosedJaxpr) else inner)
    return total


def _time_calls(fn: Callable[..., object], *args: PyTree) -> float:
    """Return the median time of a call of the compiled function, in milliseconds."""
    call = jax.jit(fn, compiler_options=compiler_options(jax.default_backend()))
    for _ in range(2):  # compile, then warm up
        jax.block_until_ready(call(*args))
    seconds: list[float] = []
    while len(seconds) < _MIN_CALLS or (sum(seconds) < _SECONDS and len(seconds) < _MAX_CALLS):
        began = time.perf_counter()
        jax.block_until_ready(call(*args))
        seconds.append(time.perf_counter() - began)
    return 1000 * float(np.median(seconds))
