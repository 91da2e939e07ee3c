"""Predict the change of a chain's loss from vector-Jacobian products (vjps) of its outputs.

A `LossPredictor` chooses cotangents of the outputs. The dot products of their vjps with a change of
activations are coordinates of the first-order change of the outputs. The predictor turns these
coordinates into a change in the loss.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jchain._typing import Array, Float, Int, PyTree
from jchain.engine.draws import draw_signs
from jchain.engine.head_calls import compute_head_loss, is_read_in_parts
from jchain.engine.layer_calls import apply_token, count_examples_per_call, map_in_parts
from jchain.gradient.linearize import ForwardPass
from jchain.modules.activations import count_examples, put_floating, take_floating
from jchain.problem import Problem
from jchain.pytree import pick, upcast

# With up to `_MAX_OUTPUTS` outputs per example, the default number of vjps is the number of
# outputs. With more outputs, it is `_NUM_WIDE`.
_MAX_OUTPUTS, _NUM_WIDE = 64, 17
# The seed for the samples of wide outputs. It is constant, so that the scores of a chain are the
# same in every process.
_SAMPLE_SEED = 0


class LossPredictor(NamedTuple):
    """A way to predict the change in the loss from a change of the outputs."""

    num_products: int  # the number of vector-Jacobian products, R
    # maps the index of a product to its cotangent, which has the shape of the outputs and is at
    # least float32
    cotangent_fn: Callable[[Array], Array]
    # maps the dot products of the vjps with a change of activations, `[B, R]`, to the change of
    # loss
    predict_fn: Callable[[Array], Array]
    is_sampled: bool = False  # whether the cotangents are samples for a mean over all examples


def compute_head_vjps(
    problem: Problem,
    chain: Int[Array, "L"],
    forward: ForwardPass,
    kind: str,
    num_products: int | None,
) -> tuple[LossPredictor, PyTree]:
    """Compute the loss predictor of a chain, and its vjps at the head's input, `[R, B, ...F]`.

    If activations are a pytree, so are the vjps. Only floating-point leaves have them; the others
    are None.

    If the outputs would be large, examples go through the head in parts, unless each output or
    class has its own vjp. For `"activations"`, a loss that reads the outputs in parts never keeps
    them.

    Args:
      problem: the bank, the split of data, and the loss.
      chain: the tokens of the chain, `[L]`.
      forward: the forward pass of the chain.
      kind: the kind of scores, `"linearized"` or `"activations"`.
      num_products: the number of vjps; see `make_loss_predictor`.

    Raises:
      ValueError: if there are too few products, or activations are float16: the gradient of a mean
        over many labels would underflow.
    """
    hidden = pick(forward.hidden, forward.length)
    if any(leaf.dtype == jnp.float16 for leaf in jax.tree.leaves(hidden)):
        raise ValueError(
            "expected activations of bfloat16 or wider for gradients, got float16: "
            "reload the weights, e.g. with dtype=jnp.float32"
        )
    head = partial(apply_token, problem.bank.heads, chain[forward.length])

    def pull_back(
        part: Problem, hidden: PyTree, share: float, key: Array
    ) -> tuple[LossPredictor, PyTree]:
        def apply(floating: PyTree) -> Array:
            return head(put_floating(hidden, floating))

        outputs, vjp_fn = jax.vjp(apply, take_floating(hidden))
        predictor = make_loss_predictor(part, outputs, kind, num_products, share, key)
        # Compute one vjp at a time: cotangents of wide outputs are the largest arrays here.
        return predictor, jax.lax.map(
            lambda i: vjp_fn(predictor.cotangent_fn(i).astype(outputs.dtype))[0],
            jnp.arange(predictor.num_products),
        )

    if kind == "activations" and is_read_in_parts(problem, hidden):

        def compute_loss(floating: PyTree) -> Array:
            token = chain[forward.length]
            return compute_head_loss(problem, token, put_floating(hidden, floating))

        gradient = jax.grad(compute_loss)(take_floating(hidden))
        predictor = make_loss_predictor(problem, jax.eval_shape(head, hidden), kind, num_products)
        return predictor, pick(gradient, None)

    key, num = jax.random.key(_SAMPLE_SEED), count_examples(hidden)
    size, outputs = count_examples_per_call(problem, hidden, 1), jax.eval_shape(head, hidden)
    if size == num or not (kind == "activations" or _is_sampled(problem, outputs, num_products)):
        return pull_back(problem, hidden, 1.0, key)

    def pull_back_part(rows: Array) -> PyTree:
        part_key = jax.random.fold_in(key, rows[0])
        return pull_back(problem.take(rows), pick(hidden, rows), rows.size / num, part_key)[1]

    vjps, rest = map_in_parts(pull_back_part, num, size)
    vjps = jax.tree.map(_join_parts, vjps)
    if rest is not None:
        vjps = jax.tree.map(lambda *leaves: jnp.concatenate(leaves, axis=1), vjps, rest)
    return make_loss_predictor(problem, outputs, kind, num_products), vjps


def _join_parts(vjps: Float[Array, "P R b ..."]) -> Float[Array, "R B ..."]:
    """Join the examples of parts."""
    return jnp.moveaxis(vjps, 0, 1).reshape(vjps.shape[1], -1, *vjps.shape[3:])


def make_loss_predictor(
    problem: Problem,
    outputs: Any,
    kind: str,
    num_products: int | None,
    share: float = 1.0,
    key: Array | None = None,
) -> LossPredictor:
    """Make the loss predictor for the first two kinds of scores of `score_edits`.

    Args:
      problem: the problem, whose split has the examples of the outputs.
      outputs: the outputs of the head. Their shape and dtype are enough if no cotangent is computed
        and no output has its own vjp.
      kind: the kind of scores, `"linearized"` or `"activations"`.
      num_products: the number of vjps; None for a default that depends on the outputs.
      share: the fraction of all examples that are in `problem`.
      key: the PRNG key of the samples; None for a constant key.

    Raises:
      ValueError: if there are too few products.
    """
    if isinstance(outputs, jax.Array):
        outputs = upcast(outputs)
    key = jax.random.key(_SAMPLE_SEED) if key is None else key
    grad_fn = jax.grad(lambda outputs: share * problem.loss_and_accuracy(outputs)[0])
    if kind == "activations":
        return LossPredictor(1, lambda _: grad_fn(outputs), lambda dots: dots.sum())
    num_products = _count_products(outputs, num_products)
    if has_classes(problem, outputs):
        return _predict_from_classes(problem, outputs, num_products)
    if not _is_sampled(problem, outputs, num_products):
        return _predict_from_outputs(problem, outputs)
    is_softmax = problem.loss_fn is optax.softmax_cross_entropy_with_integer_labels
    least = 2 if is_softmax else 3
    if num_products < least:
        raise ValueError(
            f"expected num_products to be at least {least} for outputs like these, "
            f"got {num_products}"
        )
    if is_softmax:
        return _predict_from_labels(
            outputs, grad_fn, key, num_products - 1, problem.data.y.size / share
        )
    return _predict_from_signs(outputs, grad_fn, key, (num_products - 1) // 2)


def _count_products(outputs: Any, num_products: int | None) -> int:
    if num_products is not None:
        return num_products
    num_outputs = outputs.size // outputs.shape[0]
    return num_outputs if num_outputs <= _MAX_OUTPUTS else _NUM_WIDE


def _is_sampled(problem: Problem, outputs: Any, num_products: int | None) -> bool:
    num_outputs = outputs.size // outputs.shape[0]
    return (
        not has_classes(problem, outputs) and _count_products(outputs, num_products) < num_outputs
    )


def has_classes(problem: Problem, outputs: Any) -> bool:
    """Return whether the loss is a softmax cross-entropy with one label per example.

    Args:
      problem: the problem with the loss.
      outputs: the outputs of a head, or only their shape and dtype.
    """
    is_softmax = problem.loss_fn is optax.softmax_cross_entropy_with_integer_labels
    return is_softmax and len(outputs.shape) == 2 and outputs.shape[1] > 1


def _predict_from_classes(problem: Problem, logits: Array, num_products: int) -> LossPredictor:
    """Predict a softmax loss from the margins of the other classes over the label.

    The likeliest of the other classes have one vjp each. The remaining classes share one, for their
    softmax-weighted mean.
    """
    label = problem.data.y[:, None]
    num_classes = logits.shape[1]
    is_whole = num_products >= num_classes - 1
    num_single = num_classes - 1 if is_whole else num_products - 1
    others = jnp.where(jnp.arange(num_classes)[None] == label, -jnp.inf, logits)
    top, single = jax.lax.top_k(others, num_single)
    rest = jnp.put_along_axis(others, single, -jnp.inf, axis=1, inplace=False)
    own = jnp.take_along_axis(logits, label, axis=1)
    margins, mean = top - own, jnp.zeros_like(logits)
    if not is_whole:
        margins = jnp.concatenate(
            [margins, jax.nn.logsumexp(rest, axis=1, keepdims=True) - own], axis=1
        )
        mean = jax.nn.softmax(rest)
    padded = jnp.pad(single, ((0, 0), (0, 1)))

    def cotangent_fn(i: Array) -> Array:
        one = jax.nn.one_hot(padded[:, i], num_classes, dtype=logits.dtype)
        return jnp.where(i < num_single, one, mean) - jax.nn.one_hot(
            label[:, 0], num_classes, dtype=logits.dtype
        )

    def compute_loss(margins: Array) -> Array:
        return jax.nn.logsumexp(jnp.pad(margins, ((0, 0), (1, 0))), axis=1).mean()

    return LossPredictor(
        margins.shape[1],
        cotangent_fn,
        lambda dots: compute_loss(margins + dots) - compute_loss(margins),
    )


def _predict_from_outputs(problem: Problem, outputs: Array) -> LossPredictor:
    loss = problem.loss_and_accuracy(outputs)[0]
    num_outputs = outputs.size // outputs.shape[0]

    def cotangent_fn(i: Array) -> Array:
        row = jnp.zeros(num_outputs, outputs.dtype).at[i].set(1.0)
        return jnp.broadcast_to(row.reshape(1, *outputs.shape[1:]), outputs.shape)

    return LossPredictor(
        num_outputs,
        cotangent_fn,
        lambda dots: problem.loss_and_accuracy(outputs + dots.reshape(outputs.shape))[0] - loss,
    )


def _predict_from_labels(
    outputs: Any,
    grad_fn: Callable[[Array], Array],
    key: Array,
    num_samples: int,
    num_labels: float,
) -> LossPredictor:
    """Predict to second order, with the Hessian as a mean over labels sampled from the softmax.

    In expectation, this is the Fisher information.
    """

    def sample(i: Array) -> Array:
        label = jax.random.categorical(jax.random.fold_in(key, i), outputs)
        residual = jax.nn.one_hot(label, outputs.shape[-1], dtype=outputs.dtype) - jax.nn.softmax(
            outputs
        )
        return residual / num_labels**0.5

    def cotangent_fn(i: Array) -> Array:
        return jax.lax.cond(i == 0, lambda: grad_fn(outputs), lambda: sample(i - 1))

    def predict_fn(dots: Array) -> Array:
        return dots[:, 0].sum() + 0.5 * jnp.sum(dots[:, 1:] ** 2) / num_samples

    return LossPredictor(1 + num_samples, cotangent_fn, predict_fn, True)


def _predict_from_signs(
    outputs: Any, grad_fn: Callable[[Array], Array], key: Array, num_samples: int
) -> LossPredictor:
    """Predict to second order, with the Hessian as a mean over random signs (Hutchinson).

    Each sample takes two vjps.
    """

    def sample(i: Array) -> Array:
        sign_key = jax.random.fold_in(key, i % num_samples)
        signs = draw_signs(sign_key, outputs.shape, outputs.dtype)
        return jax.lax.cond(
            i < num_samples, lambda: signs, lambda: jax.jvp(grad_fn, (outputs,), (signs,))[1]
        )

    def cotangent_fn(i: Array) -> Array:
        return jax.lax.cond(i == 0, lambda: grad_fn(outputs), lambda: sample(i - 1))

    def predict_fn(dots: Array) -> Array:
        signs, products = dots[:, 1 : 1 + num_samples], dots[:, 1 + num_samples :]
        return dots[:, 0].sum() + 0.5 * jnp.sum(signs * products) / num_samples

    return LossPredictor(1 + 2 * num_samples, cotangent_fn, predict_fn, True)
