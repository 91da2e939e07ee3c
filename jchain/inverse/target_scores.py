"""Target propagation: a target for each slot's output, and how near each layer comes to it.

The target outputs of the loss are pulled back through the head and the layers after the slot. This
is exact if a layer is invertible; otherwise, it takes a damped Gauss-Newton step. See Bengio 2014,
arXiv:1407.7906, where the inverse of the next layer gives a layer's target, and Lee et al. 2015,
arXiv:1412.7525. `fit_target_layer` fits the layer that would reach the target of a slot.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple, Protocol, TypeAlias, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jchain import env
from jchain._typing import Activations, Array, Float, Int
from jchain.arguments import checked
from jchain.bank import Bank
from jchain.engine.backend import get_backend, jit_for_problem
from jchain.engine.layer_calls import apply_token, infer_hidden, locate
from jchain.engine.plans import choose_chunk
from jchain.gradient.edit_scores import EditScores, add_layer_penalty
from jchain.gradient.linearize import (
    Slot,
    check_chain,
    find_members,
    flatten_rows,
    forward_pass,
    map_layers,
    scan_backward,
)
from jchain.groups import LayerGroup
from jchain.inverse.pullback import (
    gauss_newton_step,
    inverse_groups,
    reach_target,
    relative_residual,
)
from jchain.modules.activations import check_one_array
from jchain.problem import Problem
from jchain.pytree import is_concrete
from jchain.stages.binding import check_no_stages

# The number of steps of conjugate gradients in a Gauss-Newton step, and the damping of that step.
# For scale, the diagonal of `J J^T` is 1 for an identity layer.
_NUM_CG_STEPS, _DAMPING = 4, 0.1

Inverses: TypeAlias = tuple[LayerGroup | None, ...]
# The predicted changes in loss of the swaps, the insertions, and the deletion at one slot.
_SlotScores: TypeAlias = tuple[Array, Array, Array]


@runtime_checkable
class MatrixModule(Protocol):
    """A module that is a matrix, a bias, and an invertible activation, as `InvertibleDense` is."""

    is_inverse: bool

    def invert_activation(self, y: Array) -> Array:
        """Apply the inverse of the activation."""
        ...

    def apply_activation(self, x: Array) -> Array:
        """Apply the activation."""
        ...


class TargetLayer(NamedTuple):
    """The least-squares layer for a slot, and the distance of each bank layer from it."""

    kernel: Float[Array, "F F"]
    bias: Float[Array, "F"]
    residual: Float[Array, ""]  # `|outputs - targets| / |targets|` over all examples
    # [N], Frobenius distance of each bank layer's matrix and bias from the fitted ones; nan if the
    # bank's layers do not share a `MatrixModule`
    by_weights: Float[Array, "N"]
    by_outputs: Float[Array, "N"]  # [N], residual of each bank layer

    @property
    def nearest_by_weights(self) -> int:
        """The token of the layer with the nearest weights, or -1 if no layer is comparable."""
        return int(np.nanargmin(self.by_weights)) if np.isfinite(self.by_weights).any() else -1

    @property
    def nearest_by_outputs(self) -> int:
        """The token of the layer with the smallest residual."""
        return int(np.argmin(self.by_outputs))


@checked
def fit_target_layer(
    bank: Bank,
    before: Activations,
    after: Activations,
    ridge: float | Float[Array, ""] = 1e-3,
) -> TargetLayer:
    """Fit a layer to a slot by ridge regression from the slot's input to its target output.

    If all layers of the bank share a module that is a matrix, a bias, and an invertible activation
    (`InvertibleDense`), such a layer is fitted. Otherwise, an affine map is fitted.

    Args:
      bank: the bank with the layers.
      before: the activations before the slot, `[B, ...F]`.
      after: the target activations after the slot, `[B, ...F]`.
      ridge: the penalty on the squared norm of the matrix, in units of the mean square of an
        activation.

    Raises:
      ValueError: if activations or targets are not one array, the shapes differ, the ridge is
        negative, or the bank has stages.
    """
    check_no_stages(bank.layers, "a target layer")
    check_one_array(activations=before, targets=after)
    if before.shape != after.shape or before.ndim < 2:
        raise ValueError(
            "expected activations and targets of one shape [B, ...F], got "
            f"{list(before.shape)} and {list(after.shape)}"
        )
    if is_concrete(ridge) and not ridge >= 0:
        raise ValueError(f"expected a ridge of at least 0, got {ridge}")
    module = _get_matrix_module(bank)
    # A matrix module acts on the last axis; an affine map may mix all axes.
    rows, targets = (
        flatten_rows(a) if module is None else a.reshape(-1, a.shape[-1]) for a in (before, after)
    )
    targets = targets if module is None else module.invert_activation(targets)
    kernel, bias = _fit(rows, targets, ridge)
    outputs = rows @ kernel + bias[None]
    outputs = outputs if module is None else module.apply_activation(outputs)
    residual = _total_residual(outputs.reshape(after.shape), after)
    by_outputs = jnp.stack(
        [
            _total_residual(apply_token(bank.layers, jnp.asarray(token), before), after)
            for token in range(bank.num_layers)
        ]
    )
    by_weights = jnp.full(bank.num_layers, jnp.nan)
    if module is not None:
        params = bank.layers[0].params
        gap = jnp.sum((params["kernel"] - kernel[None]) ** 2, axis=(1, 2))
        own = params["bias"] if "bias" in params else jnp.zeros((1, 1))
        distance = jnp.sqrt(gap + jnp.sum((own - bias[None]) ** 2, axis=1))
        by_weights = by_weights.at[np.array(bank.layers[0].tokens)].set(distance)
    return TargetLayer(kernel, bias, residual, by_weights, by_outputs)


def _get_matrix_module(bank: Bank) -> MatrixModule | None:
    """Return the module that all layers share, if it applies a matrix before its activation."""
    module = bank.layers[0].module if len(bank.layers) == 1 else None
    return module if isinstance(module, MatrixModule) and not module.is_inverse else None


def _fit(
    rows: Float[Array, "B F"], targets: Float[Array, "B G"], ridge: ArrayLike
) -> tuple[Array, Array]:
    """Fit a kernel and an unpenalized bias by ridge regression."""
    mean, target_mean = (jnp.mean(a, axis=0, keepdims=True) for a in (rows, targets))
    centered = rows - mean
    gram = centered.T @ centered
    size = rows.shape[0] * jnp.mean(rows**2)
    kernel = jnp.linalg.solve(
        gram + ridge * size * jnp.eye(len(gram), dtype=gram.dtype),
        centered.T @ (targets - target_mean),
    )
    return kernel, (target_mean - mean @ kernel)[0]


def _total_residual(outputs: Array, targets: Array) -> Float[Array, ""]:
    """Compute the relative residual over all examples."""
    return relative_residual(outputs.reshape(1, -1), targets.reshape(1, -1))[0]


@checked
def score_edits_by_target(
    problem: Problem,
    chain: ArrayLike,
    *,
    step_size: float | Float[Array, ""] = 1.0,
    is_exact: bool = False,
    is_projected: bool = True,
    tokens: Sequence[int] | None = None,
) -> EditScores:
    """Predict the change in loss of each edit from how much nearer it comes to the slot's target.

    The score of layer `b` at slot `t` is `(|f_b(h_t) - target|^2 - |f_t(h_t) - target|^2) /
    |f_t(h_t) - target|^2`, where both numerator and denominator are summed over the split. This is
    minus the fraction of the squared distance to the target that the edit removes. It is multiplied
    by the decrease of the loss if the target were reached, and the layer penalty is added. Scores
    of heads are exact.

    For a chain of `D` layers, the forward pass costs `D` layer calls. In the backward pass, a layer
    with an exact inverse costs 1, and any other layer costs 12. Each scored layer costs 1 more at
    each of the `D` slots and, if the chain is not full, at its end.

    Args:
      problem: the bank, the split of data, and the loss.
      chain: the tokens of the chain, `[L]`. They are checked unless they are traced.
      step_size: the position of the target outputs, as a fraction of the way from the chain's
        outputs to `jchain.inverse.target_outputs`.
      is_exact: whether invertible layers are inverted exactly. If False, or if a layer is not
        invertible, a damped Gauss-Newton step of the layer's input gives the target before it.
      is_projected: whether outputs are compared only along each example's direction to its target.
        Other directions matter little: later layers hardly depend on them, or the target leaves
        them free.
      tokens: the layer tokens to score; None for all layers. Scores of other layers are nan.

    Raises:
      ValueError: if `chain` is not a chain of this bank, a token is not a layer or repeats,
        activations are not one array, or the loss has no target outputs.
    """
    members = find_members(problem.bank, tokens)
    return score_candidates_by_target(
        problem, chain, members, step_size=step_size, is_exact=is_exact, is_projected=is_projected
    )


@checked
def score_candidates_by_target(
    problem: Problem,
    chain: ArrayLike,
    members: tuple[Int[Array, "_"], ...],
    *,
    step_size: float | Float[Array, ""] = 1.0,
    is_exact: bool = False,
    is_projected: bool = True,
) -> EditScores:
    """Score edits as `score_edits_by_target` does, with layers that may be traced.

    Args:
      problem: as for `score_edits_by_target`.
      chain: as for `score_edits_by_target`.
      members: for each group of the bank's layers, the indices within the group to score.
      step_size: as for `score_edits_by_target`.
      is_exact: as for `score_edits_by_target`.
      is_projected: as for `score_edits_by_target`.
    """
    chain = check_chain(problem, chain)
    return _score(
        problem,
        chain,
        jnp.asarray(step_size, jnp.float32),
        members,
        is_exact=is_exact,
        is_projected=is_projected,
        backend=get_backend(problem, chain),
    )


@jit_for_problem(static_argnames=("is_exact", "is_projected", "backend"))
def _score(
    problem: Problem,
    chain: Array,
    step_size: Array,
    members: tuple[Array, ...],
    *,
    is_exact: bool,
    is_projected: bool,
    backend: str,
) -> EditScores:
    check_one_array(activations=infer_hidden(problem))

    # `cond_in_sequence` is not enough, because the whole function must run in sequence: a plain
    # vmap would gather the weights of each layer call and compute all sides of each branch.
    @jax.custom_batching.sequential_vmap
    def score(
        problem: Problem, chain: Array, step_size: Array, members: tuple[Array, ...]
    ) -> EditScores:
        return _score_one(problem, chain, step_size, members, is_exact, is_projected, backend)

    return score(problem, chain, step_size, members)


def _score_one(
    problem: Problem,
    chain: Array,
    step_size: Array,
    members: tuple[Array, ...],
    is_exact: bool,
    is_projected: bool,
    backend: str,
) -> EditScores:
    """Scan the slots backward; pull the target back through each slot, and compare layers to it."""
    bank, forward = problem.bank, forward_pass(problem, chain)
    length = forward.length
    inverses = inverse_groups(bank) if is_exact else (None,) * len(bank.layers)
    chunk = choose_chunk(bank.num_layers, forward.hidden[0], backend)
    last = reach_target(problem, chain[length], forward.hidden[length], step_size)
    saving = forward.loss - env.head_loss(problem, chain[length], last)

    def score_slot(target: Array, slot: Slot) -> tuple[Array, _SlotScores]:
        """Compute the target before a slot from the target after it, and the slot's scores."""
        is_layer = slot.position < length
        before = jax.lax.cond(
            is_layer,
            partial(_pull_target, bank.layers, inverses, slot.token),
            lambda _, a: a,
            slot.before,
            target,
        )
        compare, compare_before = (
            partial(_compare, saving, current, goal, is_projected)
            for current, goal in ((slot.after, target), (slot.before, before))
        )

        def score(out: Array) -> tuple[Array, Array]:
            return compare(out), compare_before(out)

        swap, insert = map_layers(score, bank, members, slot.before, chunk)
        own = jnp.where(is_layer, slot.token, bank.num_layers)
        swap = jnp.where(is_layer, swap.at[own].set(0.0), jnp.nan)
        insert = jnp.where(length < problem.max_layers, insert, jnp.nan)
        delete = jnp.where(is_layer, compare(slot.before), jnp.nan)
        return before, (swap, insert, delete)

    num_slots = jnp.minimum(length + 1, problem.max_layers)
    scores = scan_backward(score_slot, last, chain, forward, num_slots)
    num_scored = sum(rows.shape[0] for rows in members)
    calls = num_scored * num_slots + length + _count_backward_calls(bank, inverses, chain)
    return add_layer_penalty(problem, chain, forward, scores, calls)


def _compare(
    saving: Array, current: Array, target: Array, is_projected: bool, outputs: Array
) -> Float[Array, ""]:
    """Compute `saving` times the relative change of the squared distance to the target.

    If `is_projected` is True, only the direction to the target counts.
    """
    dtype = jnp.promote_types(jnp.float32, current.dtype)
    change, gap = (flatten_rows(a - current).astype(dtype) for a in (outputs, target))
    along, lengths = jnp.sum(change * gap, axis=1), jnp.sum(gap**2, axis=1)
    tiny = jnp.finfo(dtype).tiny
    size = along**2 / jnp.maximum(lengths, tiny) if is_projected else jnp.sum(change**2, axis=1)
    return saving * jnp.sum(size - 2 * along) / jnp.maximum(jnp.sum(lengths), tiny)


def _count_backward_calls(bank: Bank, inverses: Inverses, chain: Array) -> Int[Array, ""]:
    """Count the layer calls that it takes to pull the target back through a chain."""
    costs = np.zeros(bank.num_layers + bank.num_heads + 1, np.int32)
    for group, inverse in zip(bank.layers, inverses, strict=True):
        # A Gauss-Newton step takes one forward call, two products for the start and for each step
        # of conjugate gradients, and one product at the end.
        costs[list(group.tokens)] = 2 * (_NUM_CG_STEPS + 1) + 2 if inverse is None else 1
    return jnp.sum(jnp.asarray(costs)[chain])


def _pull_target(
    groups: tuple[LayerGroup, ...], inverses: Inverses, token: Array, hidden: Array, target: Array
) -> Array:
    """Pull a target back through a layer, to an input whose output is the target or near it."""

    def pull(group: LayerGroup, inverse: LayerGroup | None) -> Callable[[Array], Array]:
        if inverse is not None:
            return partial(inverse.apply, member_of[token])
        layer = partial(group.apply, member_of[token])
        return lambda target: (
            hidden + gauss_newton_step(layer, hidden, target, _NUM_CG_STEPS, _DAMPING)
        )

    group_of, member_of = locate(groups)
    branches = [pull(group, inverse) for group, inverse in zip(groups, inverses, strict=True)]
    return jax.lax.switch(group_of[token], branches, target)
