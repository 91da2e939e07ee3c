"""The layer that would be wanted at a slot: what goes in there and what should come out, and which bank layer comes nearest.

The inverse answer to the gradient's question. What should come out is the loss's target, taken back through the head and the
layers behind the slot (target propagation, Lee et al. 2015, arXiv:1412.7525; the targets of one layer by the inverse of the next,
Bengio 2014, arXiv:1407.7906): exactly where a layer can be undone, and by damped local least squares where it cannot.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jchain import env
from jchain._typing import Array, Float, Int
from jchain.bank import Bank
from jchain.engine.backend import compiler_options, find_backend
from jchain.engine.layer_calls import apply_token, locate
from jchain.engine.plans import choose_chunk
from jchain.gradient.edit_scores import EditScores, add_layer_penalty
from jchain.gradient.linearize import (
    all_members,
    check_chain,
    flatten_rows,
    forward_pass,
    full_nan,
    map_layers,
)
from jchain.groups import LayerGroup
from jchain.inverse.pullback import inverse_groups, measure_residual, reach_target, solve_locally
from jchain.problem import Problem
from jchain.pytree import is_concrete

# Steps of conjugate gradients in a local least squares, and its damping in units of the mean square of the Jacobian of an identity.
_NUM_CG_STEPS, _DAMPING = 4, 0.1


class IdealLayer(NamedTuple):
    """The affine map that would be wanted, and how far each bank layer is from it."""

    kernel: Float[Array, "F F"]
    bias: Float[Array, "F"]
    residual: Float[
        Array, ""
    ]  # what it leaves of the targets, `|made - wanted| / |wanted|` over all examples
    by_weights: Float[
        Array, "N"
    ]  # [N], Frobenius distance of weights and bias; nan for layers that are no such map
    by_outputs: Float[Array, "N"]  # [N], what each layer leaves of the targets, likewise

    @property
    def nearest_by_weights(self) -> int:
        """The token of the layer whose weights are nearest; -1 where none are comparable."""
        return int(np.nanargmin(self.by_weights)) if np.isfinite(self.by_weights).any() else -1

    @property
    def nearest_by_outputs(self) -> int:
        """The token of the layer that leaves least: no bank layer leaves less."""
        return int(np.argmin(self.by_outputs))


def ideal_layer(
    bank: Bank,
    before: Float[Array, "B ..."],
    after: Float[Array, "B ..."],
    ridge: float | Float[Array, ""] = 1e-3,
) -> IdealLayer:
    """The least-squares layer from activations before a slot to those wanted behind it.

    For modules that are a matrix and an activation that can be undone (`InvertibleDense`) it is the matrix before the
    activation; else, and where a bank has several kinds of layers, an affine map without one.

    Args:
      bank: the layers.
      before: activations, `[B, ...F]`.
      after: what is wanted, `[B, ...F]`.
      ridge: weight of the squared size of the matrix, in units of the mean square of an activation.

    Raises:
      ValueError: shapes differ, or the ridge is negative.
    """
    if before.shape != after.shape or before.ndim < 2:
        raise ValueError(
            f"expected activations [B, ...F] and as many wanted, got {list(before.shape)} and {list(after.shape)}"
        )
    if is_concrete(ridge) and not ridge >= 0:
        raise ValueError(f"expected a ridge of at least 0, got {ridge}")
    module: Any = bank.layers[0].module if len(bank.layers) == 1 else None
    is_matrix = hasattr(module, "invert_activation") and not module.is_inverse
    # A layer of a matrix acts on the last axis; an affine map may mix all.
    rows, wanted = (
        a.reshape(-1, a.shape[-1]) if is_matrix else flatten_rows(a) for a in (before, after)
    )
    wanted = module.invert_activation(wanted) if is_matrix else wanted
    kernel, bias = _fit(rows, wanted, ridge)
    made = rows @ kernel + bias[None]
    made = (module.apply_activation(made) if is_matrix else made).reshape(after.shape)
    by_outputs = jnp.stack(
        [
            _leave(apply_token(bank.layers, jnp.asarray(token), before), after)
            for token in range(bank.num_layers)
        ]
    )
    by_weights = jnp.full(bank.num_layers, jnp.nan)
    if is_matrix:
        params = bank.layers[0].params
        gap = jnp.sum((params["kernel"] - kernel[None]) ** 2, axis=(1, 2))
        own = params["bias"] if "bias" in params else jnp.zeros((1, 1))
        distance = jnp.sqrt(gap + jnp.sum((own - bias[None]) ** 2, axis=1))
        by_weights = by_weights.at[np.array(bank.layers[0].tokens)].set(distance)
    return IdealLayer(kernel, bias, _leave(made, after), by_weights, by_outputs)


def _fit(rows: Float[Array, "B F"], wanted: Float[Array, "B G"], ridge: Any) -> tuple[Array, Array]:
    """Ridge regression; its bias is not shrunk."""
    mean, wanted_mean = (
        jnp.mean(rows, axis=0, keepdims=True),
        jnp.mean(wanted, axis=0, keepdims=True),
    )
    centered = rows - mean
    gram = centered.T @ centered
    size = rows.shape[0] * jnp.mean(rows**2)
    kernel = jnp.linalg.solve(
        gram + ridge * size * jnp.eye(len(gram), dtype=gram.dtype),
        centered.T @ (wanted - wanted_mean),
    )
    return kernel, (wanted_mean - mean @ kernel)[0]


def _leave(made: Array, wanted: Array) -> Float[Array, ""]:
    return measure_residual(made.reshape(1, -1), wanted.reshape(1, -1))[0]


def score_edits_by_target(
    problem: Problem,
    chain: Int[Array, "L"] | Any,
    *,
    rate: float | Float[Array, ""] = 1.0,
    is_exact: bool = False,
    is_projected: bool = True,
    members: tuple[Int[Array, "_"], ...] | None = None,
) -> EditScores:
    """Predicted change of loss of each edit, by how much nearer its layer's outputs are to what is wanted there.

    `|f_b(h_t) - wanted|^2 - |f_t(h_t) - wanted|^2`, summed over the split, by `|f_t(h_t) - wanted|^2`: of the way from what is
    there to what is wanted, the share that the edit covers, -1 where it is all. As much is taken to be saved of the loss, of what
    outputs that are as wanted would save. With the price of layers; of heads the exact change. What is wanted at the end is
    `jchain.inverse.target_outputs`, or so much of the way there.

    The cost for a chain of `D` layers is `D` layer calls forward; backward 1 for each layer that is undone exactly, and 12 for
    others; and for each of the `D` slots and, where the chain is not full, for its end, one for each layer that is scored.

    Args:
      problem: bank, split, loss.
      chain: tokens, `[L]`; checked where it is not traced.
      rate: how much of the way from the outputs to their target is wanted.
      is_exact: whether layers that can be undone are undone; else what is wanted before a layer is the damped least change of
        its input, as it is before layers that cannot.
      is_projected: whether outputs are compared along the change that is wanted of each example alone. Other directions are
        those that the layers behind hardly see, or that the target leaves free.
      members: for each group of the bank's layers, the places of those to be scored; all when None. Others are nan.

    Raises:
      ValueError: `chain` is no chain of this bank, or the loss has no target.
    """
    chain = check_chain(problem, chain)
    problem = problem.without_names()
    if members is None:
        members = all_members(problem.bank)
    backend = find_backend(problem, chain)
    run = _compile(backend if is_concrete((problem, chain, members)) else None)
    options = _Options(is_exact, is_projected, backend)
    return run(problem, chain, jnp.asarray(rate, jnp.float32), members, options=options)


class _Options(NamedTuple):
    """What is part of a program. Hashable."""

    is_exact: bool
    is_projected: bool
    backend: str


@cache
def _compile(backend: str | None) -> Any:
    flags = None if backend is None else compiler_options(backend)
    return jax.jit(_score, static_argnames="options", compiler_options=flags)


def _score(
    problem: Problem, chain: Array, rate: Array, members: Any, options: _Options
) -> EditScores:
    # A plain vmap would turn each layer call into one with gathered weights, and each branch into all of them.
    @jax.custom_batching.sequential_vmap
    def score(problem: Problem, chain: Array, rate: Array, members: Any) -> EditScores:
        return _score_one(problem, chain, rate, members, options)

    return score(problem, chain, rate, members)


def _score_one(
    problem: Problem, chain: Array, rate: Array, members: Any, options: _Options
) -> EditScores:
    bank, forward = problem.bank, forward_pass(problem, chain)
    length = forward.length
    inverses = inverse_groups(bank) if options.is_exact else (None,) * len(bank.layers)
    chunk = choose_chunk(bank.num_layers, forward.hidden[0], options.backend)
    last = reach_target(problem, chain[length], forward.hidden[length], rate)
    saving = forward.loss - env.head_loss(problem, chain[length], last)
    behind = jnp.concatenate([forward.hidden[1:], forward.hidden[-1:]])

    def go_back(after: Array, slot: Any) -> Any:
        """From what is wanted behind a slot to what is wanted before it."""
        is_there = slot[0] < jnp.minimum(length + 1, problem.max_layers)
        return jax.lax.cond(is_there, visit, skip, after, slot)

    def visit(after: Array, slot: Any) -> Any:
        t, token, hidden, made = slot
        is_layer = t < length
        before = jax.lax.cond(
            is_layer, partial(_undo, bank.layers, inverses, token), lambda _, a: a, hidden, after
        )
        compare, compare_before = (
            partial(_compare, saving, here, wanted, options.is_projected)
            for here, wanted in ((made, after), (hidden, before))
        )

        def score(out: Array) -> Any:
            return compare(out), compare_before(out)

        swap, insert = map_layers(score, bank, members, hidden, chunk)
        own = jnp.where(is_layer, token, bank.num_layers)
        swap = jnp.where(is_layer, swap.at[own].set(0.0), jnp.nan)
        insert = jnp.where(length < problem.max_layers, insert, jnp.nan)
        delete = jnp.where(is_layer, compare(hidden), jnp.nan)
        return before, (swap, insert, delete)

    def skip(after: Array, slot: Any) -> Any:
        return after, jax.tree.map(full_nan, jax.eval_shape(visit, after, slot)[1])

    slots = jnp.arange(chain.size), chain, forward.hidden, behind
    scores = jax.lax.scan(go_back, last, slots, reverse=True)[1]
    num_scored = sum(rows.shape[0] for rows in members)
    calls = (
        num_scored * jnp.minimum(length + 1, problem.max_layers)
        + length
        + _count_undoing(bank, inverses, chain)
    )
    return add_layer_penalty(problem, chain, forward, scores, calls)


def _compare(
    saving: Array, here: Array, wanted: Array, is_projected: bool, made: Array
) -> Float[Array, ""]:
    """`saving` by the share of the squared way from here to what is wanted that `made` leaves less than here, or along it alone."""
    dtype = jnp.promote_types(jnp.float32, here.dtype)
    change, way = (flatten_rows(a - here).astype(dtype) for a in (made, wanted))
    along, lengths = jnp.sum(change * way, axis=1), jnp.sum(way**2, axis=1)
    tiny = jnp.finfo(dtype).tiny
    size = along**2 / jnp.maximum(lengths, tiny) if is_projected else jnp.sum(change**2, axis=1)
    return saving * jnp.sum(size - 2 * along) / jnp.maximum(jnp.sum(lengths), tiny)


def _count_undoing(bank: Bank, inverses: Any, chain: Array) -> Int[Array, ""]:
    costs = np.zeros(bank.num_layers + bank.num_heads + 1, np.int32)
    for group, inverse in zip(bank.layers, inverses, strict=True):
        # Forward once more, a product there and one back for each step and for their start, and one back at the end.
        costs[list(group.tokens)] = 2 * (_NUM_CG_STEPS + 1) + 2 if inverse is None else 1
    return jnp.sum(jnp.asarray(costs)[chain])


def _undo(
    groups: tuple[LayerGroup, ...], inverses: Any, token: Array, hidden: Array, after: Array
) -> Array:
    """What a layer would have to read to give what is wanted behind it."""

    def undo(group: LayerGroup, inverse: LayerGroup | None) -> Callable[[Array], Array]:
        if inverse is not None:
            return partial(inverse.apply, member_of[token])
        layer = partial(group.apply, member_of[token])
        return lambda after: hidden + solve_locally(layer, hidden, after, _NUM_CG_STEPS, _DAMPING)

    group_of, member_of = locate(groups)
    branches = [undo(group, inverse) for group, inverse in zip(groups, inverses, strict=True)]
    return jax.lax.switch(group_of[token], branches, after)
