"""Predict the change in loss of each edit of a chain from the chain's gradient.

This takes one forward pass of the chain, one backward pass of a few vector-Jacobian products, and
one call of each candidate layer at each slot. The layers after a candidate are not applied again.
At slot `t`, the chain has layer `f_t` with input `h_t`. A candidate `f_b` changes the input of the
next slot by `f_b(h_t) - f_t(h_t)`. To first order, the outputs change by the Jacobian of all later
layers times this difference.
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jchain._typing import Array, Float, Int, PyTree
from jchain.arguments import checked
from jchain.chain import ChainsLike
from jchain.engine.backend import get_backend, jit_for_problem
from jchain.engine.layer_calls import apply_token, infer_hidden
from jchain.engine.parts import average_over_parts
from jchain.gradient import weight_space
from jchain.gradient.exchanges import score_exchanges
from jchain.gradient.joint_moves import JointMoves, join
from jchain.gradient.linearize import (
    ForwardPass,
    all_members,
    check_chain,
    find_members,
    forward_pass,
    scan_backward,
)
from jchain.gradient.loss_predictor import (
    compute_head_vjps,
    has_classes,
    make_loss_predictor,
)
from jchain.gradient.slot_scores import KINDS, Carry, ScoreKind, StaticArgs, score_slot
from jchain.groups import LayerGroup
from jchain.modules import unwrap
from jchain.modules.activations import check_floating, pull_back_floating, take_floating
from jchain.problem import Problem
from jchain.pytree import get_first_line, is_concrete, pick

# The largest number of examples that predictions of joint moves use.
_MAX_ROWS = 128


class EditScores(NamedTuple):
    """The predicted change in loss of each edit of a chain.

    Scores include the layer penalty. They are nan if they are unknown, or if the chain would not
    follow the stages of the bank. They ignore `max_cost`: the mask of `jchain.env.neighbors` is
    False for edits over the limit.

    Attributes:
      swap: `[L, N]`; layer `b` replaces the layer at slot `t`. 0 if they are the same layer, nan if
        the slot has no layer.
      insert: `[L, N]`; layer `b` is inserted before slot `t`. nan after the head, and if the chain
        is full.
      delete: `[L]`; the layer at slot `t` is deleted. nan if the slot has no layer, or the chain
        has only `Problem.min_layers` layers.
      head: `[K]`; head `k` replaces the chain's head. Exact.
      loss: the loss of the chain itself, with the layer penalty.
      layer_calls: the cost of the scores in layer calls.
    """

    swap: Float[Array, "L N"]
    insert: Float[Array, "L N"]
    delete: Float[Array, "L"]
    head: Float[Array, "K"]
    loss: Float[Array, ""]
    layer_calls: Int[Array, ""]

    @property
    def flat(self) -> Float[Array, "M"]:
        """All scores, `[M]`, in the order of the rows of `ChainSpace.neighbors`."""
        last = self.swap.shape[0] - 1
        return jnp.concatenate(
            [
                self.swap[:last].T.reshape(-1),
                self.head,
                self.insert[:last].T.reshape(-1),
                self.delete[:last],
            ]
        )


@checked
def swap_scores(
    problem: Problem, chain: ChainsLike, kind: ScoreKind = "linearized"
) -> Float[Array, "L N"]:
    """Predict the change in loss when each layer of the bank replaces the one at each slot.

    This is short for `score_edits(problem, chain, kind).swap`.

    Args:
      problem: the bank, the split of data, and the loss.
      chain: the tokens of the chain, `[L]`. They are checked unless they are traced.
      kind: the kind of score; see `score_edits`.

    Returns:
      The scores, `[L, N]`: 0 for the chain's own layer, nan if unknown.

    Raises:
      ValueError: for the same reasons as `score_edits`.
    """
    return score_edits(problem, chain, kind).swap


@checked
def score_edits(
    problem: Problem,
    chain: ChainsLike,
    kind: ScoreKind = "linearized",
    *,
    learning_rate: float = 1e-2,
    num_products: int | None = None,
) -> EditScores:
    """Predict the change in loss of every edit of a chain.

    There are four kinds of scores, where `R` is the number of vector-Jacobian products that are
    pulled back along the chain:

    - `"linearized"` evaluates the loss at the outputs plus their first-order change. `R` is
      `num_products`; by default it is the number of outputs of an example if that is at most 64,
      else 17. With fewer products than outputs, the method depends on the loss:

        - For a softmax with one class label per example, the most likely wrong classes each get one
          product (their margin over the label); all remaining classes share one. For `C` classes,
          `C - 1` products cover all.
        - Any other loss is expanded to second order in the outputs (Gauss-Newton). Its Hessian is
          an expectation over samples: labels drawn from the softmax for cross-entropy (Fisher),
          otherwise random signs (Hutchinson), which take two products each.

    - `"activations"` expands the loss to first order in the activations:
      `<dL/dh_{t+1}, f_b(h_t) - f_t(h_t)>`, with `R = 1`.
    - `"weights"` expands the loss to first order in the weights: `<dL/dW_t, W_b - W_t>`. It scores
      swaps of layers that share a module; the scores of other edits are nan.
    - `"nearest"` adds `|W_b - W_t|^2 / (2 learning_rate)` to `"weights"`. This ranks layers by
      their distance to the weights after a step of gradient descent, `W_t - learning_rate dL/dW_t`.

    For a chain of `D` layers, the first two kinds cost `(2 + R) D` layer calls, plus `N` for each
    of the `D` slots, plus `N` more if the chain is not full. The last two kinds cost `4 D` layer
    calls. The function works under `jit` and `vmap`; a `vmap` runs one chain after another.

    If activations are a pytree, only the changes of its floating-point leaves are predicted.
    Scores are nan in three cases: for a layer whose outputs are not finite, for edits before a
    layer whose gradient is exactly 0 (for example a layer that rounds its input), and for all edits
    if the loss of the chain itself is not finite.

    Args:
      problem: the bank, the split of data, and the loss.
      chain: the tokens of the chain, `[L]`. They are checked unless they are traced.
      kind: one of the four kinds above.
      learning_rate: the step size for `"nearest"`.
      num_products: the number of vector-Jacobian products for `"linearized"`; None for the default
        described above.

    Raises:
      ValueError: if `chain` is invalid for this bank, the kind is unknown, activations (or weights,
        if the kind needs their gradient) are not floating-point, a layer or head cannot be
        differentiated, a number is not positive, or there are too few products.
    """
    chain = _check(problem, chain, kind, num_products)
    if is_concrete(learning_rate) and not learning_rate > 0:
        raise ValueError(f"expected a positive learning_rate, got {learning_rate}")
    rate, backend = jnp.asarray(learning_rate, jnp.float32), get_backend(problem, chain)

    def score(part: Problem) -> EditScores:
        members = all_members(part.bank)
        return _score(
            part, chain, rate, members, kind=kind, num_products=num_products, backend=backend
        )[0]

    return average_over_parts(problem, score)


@checked
def weight_gradients(problem: Problem, chain: ChainsLike) -> Float[Array, "L W"]:
    """Compute the gradient of the loss with respect to the weights of the layer at each slot.

    This costs four layer calls per layer.

    Args:
      problem: the bank, the split of data, and the loss. All layers must share one module.
      chain: the tokens of the chain, `[L]`. They are checked unless they are traced.

    Returns:
      The gradients, `[L, W]`: each row holds the leaves of a layer's params, flattened and
      concatenated. Rows of slots without a layer are nan.

    Raises:
      ValueError: if the layers have more than one module, and for the same reasons as
        `score_edits`.
    """
    chain = _check(problem, chain, "weights")
    weight_space.only_group(problem.bank)
    return _compute_weight_gradients(problem.without_names(), chain)


@jax.jit
def _compute_weight_gradients(problem: Problem, chain: Array) -> Array:
    _check_gradients(problem, "weights")
    return weight_space.flatten_gradients(problem, chain, forward_pass(problem, chain))


@checked
def score_moves(
    problem: Problem,
    chain: ChainsLike,
    *,
    num_best: int = 4,
    num_pairs: int = 16,
    tokens: Sequence[int] | None = None,
    num_products: int | None = None,
) -> tuple[EditScores, JointMoves]:
    """Compute linearized edit scores, and joint moves that combine the best swaps of each slot.

    Joint moves cost no additional layer calls.

    Args:
      problem: the bank, the split of data, and the loss.
      chain: the tokens of the chain, `[L]`. They are checked unless they are traced.
      num_best: the number of swaps per slot that joint moves combine, at most N.
      num_pairs: the number of pairs of swaps to return, at most `(L num_best)^2`.
      tokens: the layer tokens to score; None for all layers. Scores of other layers are nan.
      num_products: the number of vector-Jacobian products; see `score_edits`.

    Returns:
      The edit scores and the joint moves.

    Raises:
      ValueError: if a number is not positive or is too large, a token is not a layer or repeats,
        and for the same reasons as `score_edits`.
    """
    members = find_members(problem.bank, tokens)
    return score_candidates(problem, chain, members, num_best, num_pairs, num_products)


def score_candidates(
    problem: Problem,
    chain: ChainsLike,
    members: tuple[Int[Array, "_"], ...],
    num_best: int,
    num_pairs: int,
    num_products: int | None,
) -> tuple[EditScores, JointMoves]:
    """Score edits and joint moves as `score_moves` does, with layers that may be traced.

    Args:
      problem: as for `score_moves`.
      chain: as for `score_moves`.
      members: for each group of the bank's layers, the indices within the group to score.
      num_best: as for `score_moves`.
      num_pairs: as for `score_moves`.
      num_products: as for `score_moves`.
    """
    chain = _check(problem, chain, "linearized", num_products)
    num_layers, most_pairs = problem.bank.num_layers, (chain.size * num_best) ** 2
    if not 1 <= num_best <= num_layers or not 1 <= num_pairs <= most_pairs:
        raise ValueError(
            f"expected num_best in 1..{num_layers} and num_pairs in 1..{most_pairs}, "
            f"got {num_best} and {num_pairs}"
        )
    scores, joint = _score(
        problem,
        chain,
        jnp.float32(1.0),
        members,
        kind="linearized",
        num_products=num_products,
        num_best=num_best,
        num_pairs=num_pairs,
        backend=get_backend(problem, chain),
    )
    assert joint is not None  # num_best is at least 1
    return scores, joint


def choose_products(problem: Problem) -> int | None:
    """Choose `num_products` for a search, which scores many chains.

    Args:
      problem: the problem, whose loss and outputs determine the number.

    Returns:
      2 for a softmax over classes (one product for the likeliest class other than the label, and
      one for all remaining classes), else None.
    """
    outputs = jax.eval_shape(
        lambda x: problem.bank.heads[0].apply(0, problem.bank.embed(x)), problem.data.x
    )
    return 2 if has_classes(problem, outputs) else None


def _check(
    problem: Problem, chain: ChainsLike, kind: str, num_products: int | None = None
) -> Array:
    if num_products is not None and num_products < 1:
        raise ValueError(f"expected num_products to be at least 1, got {num_products}")
    if kind not in KINDS:
        raise ValueError(f"expected a kind of {', '.join(KINDS)}, got {kind!r}")
    return check_chain(problem, chain)


def _check_gradients(problem: Problem, kind: str) -> None:
    """Raise ValueError if gradients do not exist.

    This check is slow, so it is called only while the scores are traced.
    """
    bank = problem.bank
    hidden = infer_hidden(problem)
    check_floating(hidden)
    for groups, is_by_weights in (
        (bank.layers, kind in ("weights", "nearest")),
        (bank.heads, False),
    ):
        for group in groups:
            _check_gradient(group, hidden, is_by_weights)


def _check_gradient(group: LayerGroup, hidden: PyTree, is_by_weights: bool) -> None:
    name = type(unwrap(group.module)).__name__
    if is_by_weights:
        for leaf in jax.tree.leaves(group.params):
            if not jnp.issubdtype(leaf.dtype, jnp.floating):
                raise ValueError(
                    f"layer {name}: expected floating-point weights, which have a gradient, "
                    f"got {leaf.dtype}"
                )

    def pull_back(hidden: PyTree) -> PyTree:
        outputs = take_floating(group.apply(0, hidden))
        if not jax.tree.leaves(outputs):
            raise ValueError("its output is not floating-point")
        return pull_back_floating(partial(group.apply, 0), hidden)(outputs)

    try:
        jax.eval_shape(pull_back, hidden)
    except Exception as error:  # whatever a user's module raises
        raise ValueError(f"{name} cannot be differentiated: {get_first_line(error)}") from None


@jit_for_problem(static_argnames=("kind", "num_products", "num_best", "num_pairs", "backend"))
def _score(
    problem: Problem,
    chain: Int[Array, "L"],
    learning_rate: Float[Array, ""],
    members: tuple[Int[Array, "_"], ...],
    *,
    kind: ScoreKind,
    num_products: int | None,
    num_best: int = 0,
    num_pairs: int = 0,
    backend: str,
) -> tuple[EditScores, JointMoves | None]:
    _check_gradients(problem, kind)

    # A plain vmap would gather the weights of each layer and compute both sides of each branch.
    @jax.custom_batching.sequential_vmap
    def score(
        problem: Problem, chain: Array, learning_rate: Array, members: tuple[Array, ...]
    ) -> tuple[EditScores, JointMoves | None]:
        if kind in ("weights", "nearest"):
            rate = learning_rate if kind == "nearest" else None
            return _score_by_weights(problem, chain, rate), None
        static = StaticArgs(kind, num_products, num_best, num_pairs, backend)
        return _score_by_outputs(problem, chain, members, static)

    return score(problem, chain, learning_rate, members)


def _score_by_weights(
    problem: Problem, chain: Int[Array, "L"], learning_rate: Float[Array, ""] | None
) -> EditScores:
    forward = forward_pass(problem, chain)
    swap = weight_space.score_swaps_by_weights(problem, chain, forward, learning_rate)
    unknown = jnp.full_like(swap, jnp.nan)
    parts = (swap, unknown, unknown[:, 0])
    return add_layer_penalty(problem, chain, forward, parts, 4 * forward.length)


def _score_by_outputs(
    problem: Problem,
    chain: Int[Array, "L"],
    members: tuple[Int[Array, "_"], ...],
    static: StaticArgs,
) -> tuple[EditScores, JointMoves | None]:
    forward = forward_pass(problem, chain)
    predictor, vjps = compute_head_vjps(problem, chain, forward, static.kind, static.num_products)
    # Samples represent a mean over all examples, so no example may be left out.
    stride = 1 if predictor.is_sampled else -(-problem.num_examples // _MAX_ROWS)
    rows = slice(None, None, stride)
    step_fn = partial(score_slot, problem, forward.length, members, predictor, rows, static)
    num_slots = jnp.minimum(forward.length + 1, problem.max_layers)
    last = Carry(vjps, jnp.array(True))
    swap, insert, delete, best = scan_backward(step_fn, last, chain, forward, num_slots)
    num_scored = sum(indices.shape[0] for indices in members)
    calls = num_scored * num_slots + (2 + predictor.num_products) * forward.length
    joint = None
    if best is not None:
        predict_fn = predictor.predict_fn
        if not predictor.is_sampled:
            hidden = pick(pick(forward.hidden, forward.length), rows)
            outputs = apply_token(problem.bank.heads, chain[forward.length], hidden)
            predict_fn = make_loss_predictor(
                problem.take(rows), outputs, static.kind, static.num_products
            ).predict_fn
        joint = join(problem, chain, *best, predict_fn, static.num_pairs)
    return add_layer_penalty(problem, chain, forward, (swap, insert, delete), calls), joint


def add_layer_penalty(
    problem: Problem,
    chain: Array,
    forward: ForwardPass,
    scores: tuple[Array, Array, Array],
    layer_calls: Array,
) -> EditScores:
    """Add the layer penalty to the scores of a chain, and return them as `EditScores`.

    Args:
      problem: the problem, whose `layer_cost` gives the layer penalty.
      chain: the tokens of the chain, `[L]`.
      forward: the forward pass of the chain, which gives the exact scores of heads.
      scores: the scores of swaps `[L, N]`, insertions `[L, N]`, and deletions `[L]`, without the
        layer penalty; not finite if unknown.
      layer_calls: the cost of the scores in layer calls.
    """
    num_layers = problem.bank.num_layers
    swap, insert, delete = scores
    cost = jnp.broadcast_to(problem.layer_cost, (num_layers,))
    own = cost[jnp.clip(chain, 0, num_layers - 1)]
    head = (forward.heads - forward.loss).at[chain[forward.length] - num_layers].set(0.0)
    stages = problem.space.stages
    if stages is not None and stages.is_ordered:
        swap = score_exchanges(stages, chain, swap, insert, delete)
    insert = jnp.where(forward.length < problem.max_layers, insert, jnp.nan)
    delete = jnp.where(forward.length > problem.min_layers, delete, jnp.nan)
    if stages is not None:
        given, masks = (swap, insert, delete, head), stages.get_legal_edits(chain)
        swap, insert, delete, head = (
            jnp.where(mask, part, jnp.nan) for mask, part in zip(masks, given, strict=True)
        )
    parts = swap + cost[None] - own[:, None], insert + cost[None], delete - own, head
    is_known = jnp.isfinite(forward.loss)
    parts = (jnp.where(jnp.isfinite(part) & is_known, part, jnp.nan) for part in parts)
    return EditScores(*parts, forward.loss + problem.penalty(chain), layer_calls)
