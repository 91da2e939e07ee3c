"""Observations of prefixes: bank-independent features of what the layers did to the data.

Observations are computed from the activations of the prefix and its best head, so they cost head
calls but no layer calls. `observe` returns a few summary numbers, `observe_activations` and
`observe_gradients` return a sketch, and `Join` concatenates several observations.
"""

from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from jchain._typing import Activations, Array, Float, Int
from jchain.arguments import checked
from jchain.engine.draws import draw_signs
from jchain.engine.head_calls import evaluate_heads, prepare_heads
from jchain.engine.layer_calls import (
    apply_all,
    apply_token,
    count_examples_per_call,
    get_output_shape,
    has_large_outputs,
    map_in_parts,
)
from jchain.modules.activations import (
    check_floating,
    count_examples,
    join_floating,
    pull_back_floating,
)
from jchain.problem import Problem
from jchain.pytree import pick, upcast

NUM_FEATURES = 12
# The length of a sketch of activations or gradients, not counting the number for its scale.
NUM_SKETCHED = 64
# The maximum numbers of columns and rows of a regression. Wider activations are sketched.
_MAX_COLUMNS, _MAX_ROWS = 64, 128
_RIDGE = 0.1
_NUM_CG_STEPS = 8
# The seed of the sketch is constant, so that features are the same in every process and a trained
# critic can be saved.
_SKETCH_SEED = 0
LOSS_UNIT = 1e-3


class Observation(NamedTuple):
    """The features of one prefix, and its loss with each head."""

    features: Float[Array, "F"]  # [F], finite; F = NUM_FEATURES for `observe`
    loss: Float[Array, "K"]  # [K], loss of stopping with each head, without the layer penalty


@runtime_checkable
class Observe(Protocol):
    """A function that observes a prefix."""

    def __call__(self, problem: Problem, hidden: Activations, parent: Activations) -> Observation:
        """Observe a prefix.

        Args:
          problem: the heads, the labels, and the loss.
          hidden: the activations of the prefix, `[B, ...F]`, or a pytree of such arrays.
          parent: the activations of the prefix without its last layer, like `hidden`.
        """
        ...


@checked
def observe(problem: Problem, hidden: Activations, parent: Activations) -> Observation:
    """Observe `NUM_FEATURES` summary numbers of a prefix, and the losses of its heads.

    The features of the best head are the logs of three means of the examples' losses (arithmetic
    mean, root mean square, and the square of the mean square root), the accuracy, and the log size
    of the gradient of the loss with respect to outputs and to activations.

    The features of the activations are the log share of the labels, and of the gradient with
    respect to outputs, that ridge regression on the activations leaves unexplained; their log
    scale; the log participation ratio of their covariance; the log share of their variance within
    classes; and their log relative change from the parent. If activations are a pytree, they are
    the concatenated floating-point numbers of each example.

    The losses, the accuracy, the relative change, and the gradient with respect to activations use
    all examples. The other features use at most 128.

    Args:
      problem: the heads, the labels, and the loss.
      hidden: the activations of the prefix, `[B, ...F]`, or a pytree of such arrays.
      parent: the activations of the prefix without its last layer, like `hidden`.
    """
    heads, labels = _observe_heads(problem, hidden), _one_hot(problem, hidden)
    loss, best = heads.loss, heads.best
    hidden, parent = upcast(join_floating(hidden)), upcast(join_floating(parent))
    size = jnp.abs(heads.each).astype(jnp.float32)

    rows, residual = _sketch(hidden), heads.residual
    targets = residual if labels is None else jnp.concatenate([_sketch(labels), residual], axis=1)
    rows -= rows.mean(axis=0, keepdims=True)
    scale = jnp.sqrt(jnp.mean(rows**2) + 1e-12)
    rows /= scale
    covariance = rows.T @ rows / rows.shape[0]
    unexplained = _unexplained(rows, covariance, targets)
    num_labels = targets.shape[1] - residual.shape[1]
    features = [
        compress_loss(loss[best]),
        compress_loss(jnp.mean(size**2) ** 0.5),
        compress_loss(jnp.mean(size**0.5) ** 2),
        heads.accuracy[best],
        0.5 * jnp.log(jnp.mean(residual**2) + 1e-9),
        jnp.log(scale * jnp.sqrt(jnp.mean(heads.by_hidden**2)) + 1e-6),
        _log_share(unexplained[:, :num_labels] if num_labels else unexplained),
        _log_share(unexplained[:, num_labels:]),
        jnp.log(scale),
        jnp.log(jnp.trace(covariance) ** 2 / (jnp.sum(covariance**2) + 1e-12)),
        jnp.zeros(())
        if labels is None
        else jnp.log(1.0 - _between_classes(rows, _subsample(labels)) + 1e-4),
        0.5 * jnp.log(jnp.mean((hidden - parent) ** 2) / (jnp.mean(parent**2) + 1e-12) + 1e-12),
    ]
    stacked = jnp.stack([feature.astype(jnp.float32) for feature in features])
    return Observation(jnp.clip(jnp.nan_to_num(stacked), -20.0, 20.0), loss)


@checked
def observe_activations(problem: Problem, hidden: Activations, parent: Activations) -> Observation:
    """Observe the activations of a prefix as a sketch, `[NUM_SKETCHED + 1]`.

    The features are a count sketch (Charikar et al. 2002) of at most 128 examples, divided by their
    root mean square, and the log of this root mean square. If each example has one class as its
    label, the sketch is of the class means, because other examples of the same distribution share
    them.

    Args:
      problem: the heads, the labels, and the loss.
      hidden: the activations of the prefix, `[B, ...F]`, or a pytree of such arrays.
      parent: the activations of the prefix without its last layer, like `hidden`; not used.
    """
    loss, _ = _score_heads(problem, hidden)
    return Observation(_summarize(join_floating(hidden), _one_hot(problem, hidden)), loss)


@checked
def observe_gradients(problem: Problem, hidden: Activations, parent: Activations) -> Observation:
    """Observe the gradient of the best head's loss with respect to activations, as a sketch.

    The gradient is sketched in the same way as the activations in `observe_activations`.

    Args:
      problem: the heads, the labels, and the loss.
      hidden: the activations of the prefix, `[B, ...F]`, or a pytree of such arrays.
      parent: the activations of the prefix without its last layer, like `hidden`; not used.
    """
    heads = _observe_heads(problem, hidden)
    return Observation(_summarize(heads.by_hidden, _one_hot(problem, hidden)), heads.loss)


@dataclass(frozen=True)
class Join:
    """A function that observes with several functions and concatenates their features.

    Attributes:
      parts: the functions, such as `observe`.
    """

    parts: tuple[Observe, ...]

    def __call__(self, problem: Problem, hidden: Activations, parent: Activations) -> Observation:
        """Observe a prefix with all parts; the losses come from the first part.

        Args:
          problem: the heads, the labels, and the loss.
          hidden: the activations of the prefix, `[B, ...F]`, or a pytree of such arrays.
          parent: the activations of the prefix without its last layer, like `hidden`.
        """
        observed = [part(problem, hidden, parent) for part in self.parts]
        features = jnp.concatenate([part.features for part in observed])
        return Observation(features, observed[0].loss)


@checked
def compress_loss(loss: Float[Array, "*P"]) -> Float[Array, "*P"]:
    """Map losses to a nearly logarithmic scale that stays finite at 0 and below.

    This is `arcsinh(loss / 0.002)`. For losses well above 0.001, it is close to `log(loss)` plus a
    constant.

    Args:
      loss: the losses, `[...P]`.
    """
    return jnp.arcsinh(loss / (2 * LOSS_UNIT))


@checked
def lowest(loss: Float[Array, "K"]) -> Float[Array, ""]:
    """Return the lowest finite loss, or `+inf` if there is none.

    Args:
      loss: the loss of each head, `[K]`.
    """
    return jnp.min(jnp.where(jnp.isfinite(loss), loss, jnp.inf))


class _Heads(NamedTuple):
    """What an observation reads from the heads."""

    loss: Float[Array, "K"]
    accuracy: Float[Array, "K"]
    best: Int[Array, ""]  # the head with the lowest loss
    each: Float[Array, "B"]  # the losses of its examples
    # gradients of the sum of these losses with respect to the outputs of the head, as a sketch of
    # at most 128 examples, and with respect to the activations, joined like these
    residual: Float[Array, "b C"]
    by_hidden: Float[Array, "B ..."]


def _score_heads(problem: Problem, hidden: Activations) -> tuple[Array, Array]:
    """Compute the losses of the heads, and their accuracies."""
    heads = prepare_heads(problem, hidden)
    return evaluate_heads(problem, lambda h: apply_all(heads, pick(h, 0)), pick(hidden, None))


def _observe_heads(problem: Problem, hidden: Activations) -> _Heads:
    """Apply all heads, and differentiate the loss of the best one.

    If the outputs are large, examples are processed in parts.
    """
    check_floating(hidden)
    heads, num_layers = problem.bank.heads, problem.bank.num_layers
    if not has_large_outputs(problem, hidden, problem.bank.num_heads):
        outputs = apply_all(heads, hidden)
        loss, accuracy = jax.vmap(problem.loss_and_accuracy)(outputs)
        best = jnp.argmin(jnp.where(jnp.isfinite(loss), loss, jnp.inf))
        each, by_outputs, by_hidden = _differentiate(problem, best, hidden, outputs[best])
        return _Heads(loss, accuracy, best, each, _sketch(by_outputs), by_hidden)
    loss, accuracy = _score_heads(problem, hidden)
    best = jnp.argmin(jnp.where(jnp.isfinite(loss), loss, jnp.inf))

    def observe_part(rows: Array) -> tuple[Array, Array, Array]:
        part = pick(hidden, rows)
        outputs = apply_token(heads, num_layers + best, part)
        each, by_outputs, by_hidden = _differentiate(problem.take(rows), best, part, outputs)
        return each, _sketch_columns(_rows(by_outputs)), by_hidden

    num_examples = count_examples(hidden)
    size = count_examples_per_call(problem, hidden, 1)
    parts, rest = map_in_parts(observe_part, num_examples, size)
    each, residual, by_hidden = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), parts)
    if rest is not None:
        each, residual, by_hidden = (
            jnp.concatenate(pair) for pair in zip((each, residual, by_hidden), rest, strict=True)
        )
    return _Heads(loss, accuracy, best, each, _subsample(residual), by_hidden)


def _differentiate(
    problem: Problem, best: Array, hidden: Activations, outputs: Array
) -> tuple[Array, Array, Array]:
    """Return the losses of a head's examples, and two gradients of their sum.

    The gradients are with respect to the outputs of the head and with respect to the activations,
    joined like these.
    """
    heads, num_layers = problem.bank.heads, problem.bank.num_layers

    def sum_losses(out: Array) -> tuple[Array, Array]:
        each = _rows(problem.loss_fn(out, problem.data.y)).mean(axis=1)
        return each.sum(), each

    by_outputs, each = jax.grad(sum_losses, has_aux=True)(upcast(outputs))
    pull = pull_back_floating(lambda h: apply_token(heads, num_layers + best, h), hidden)
    by_hidden = join_floating(pull(by_outputs.astype(outputs.dtype)))
    return each, by_outputs, upcast(by_hidden)


def _summarize(
    array: Float[Array, "B ..."], labels: Float[Array, "B C"] | None
) -> Float[Array, "S"]:
    """Compute the sketch and the log scale of activations or gradients."""
    rows = _rows(_subsample(array)).astype(jnp.float32)
    rows = jnp.nan_to_num(rows, posinf=0.0, neginf=0.0)
    scale = jnp.sqrt(jnp.mean(rows**2) + 1e-12)
    if labels is not None:
        labels = _subsample(labels)
        rows = labels.T @ rows / (labels.sum(axis=0)[:, None] + 1e-6)
    place_key, sign_key = jax.random.split(jax.random.key(_SKETCH_SEED))
    place = jax.random.randint(place_key, (rows.size,), 0, NUM_SKETCHED, jnp.int32)
    sign = draw_signs(sign_key, (rows.size,), rows.dtype)
    sketch = jax.ops.segment_sum(rows.reshape(-1) * sign, place, NUM_SKETCHED)
    sketch /= scale * max(rows.size / NUM_SKETCHED, 1.0) ** 0.5
    return jnp.append(jnp.clip(sketch, -20.0, 20.0), jnp.clip(jnp.log(scale), -20.0, 20.0))


def _rows(array: Array) -> Float[Array, "B R"]:
    """Flatten each example to one row."""
    return array.reshape(array.shape[0], -1)


def _subsample(array: Float[Array, "B ..."]) -> Float[Array, "b ..."]:
    """Select at most 128 evenly spaced examples."""
    return array[:: -(-array.shape[0] // _MAX_ROWS)]


def _sketch(array: Float[Array, "B ..."]) -> Float[Array, "b C"]:
    """Reduce to at most 128 rows and 64 columns, preserving inner products in expectation."""
    return _sketch_columns(_rows(_subsample(array)))


def _sketch_columns(rows: Float[Array, "b R"]) -> Float[Array, "b C"]:
    rows = rows.astype(jnp.float32)
    if rows.shape[1] <= _MAX_COLUMNS:
        return rows
    place_key, sign_key = jax.random.split(jax.random.key(_SKETCH_SEED))
    place = jax.random.randint(place_key, rows.shape[1:], 0, _MAX_COLUMNS, jnp.int32)
    sign = draw_signs(sign_key, rows.shape[1:], rows.dtype)
    return jax.ops.segment_sum((rows * sign[None]).T, place, _MAX_COLUMNS).T


def _one_hot(problem: Problem, hidden: Activations) -> Float[Array, "B C"] | None:
    """Return one-hot labels, `[B, C]`, if each example has one class, and None otherwise."""
    y, outputs = problem.data.y, get_output_shape(problem, hidden)
    if not jnp.issubdtype(y.dtype, jnp.integer) or y.ndim != 1 or outputs.ndim != 2:
        return None
    return jax.nn.one_hot(y, outputs.shape[-1], dtype=jnp.float32)


def _unexplained(
    rows: Float[Array, "b C"], covariance: Float[Array, "C C"], targets: Float[Array, "b D"]
) -> Float[Array, "2 D"]:
    """Compute two sums of squares per target: of its ridge regression residual, and in total."""
    targets -= targets.mean(axis=0, keepdims=True)
    # A few steps of conjugate gradients are as good as the exact solution here, whereas a
    # factorization would be a library call outside the compiled program.
    weights, _ = jax.scipy.sparse.linalg.cg(
        lambda w: covariance @ w + _RIDGE * w,
        rows.T @ targets / rows.shape[0],
        tol=0.0,
        maxiter=_NUM_CG_STEPS,
    )
    return jnp.stack(
        [jnp.sum((targets - rows @ weights) ** 2, axis=0), jnp.sum(targets**2, axis=0)]
    )


def _log_share(unexplained: Float[Array, "2 D"]) -> Float[Array, ""]:
    """Compute the log of the unexplained share of all targets together."""
    left, whole = unexplained.sum(axis=1)
    return jnp.log(left / (whole + 1e-12) + 1e-4)


def _between_classes(rows: Float[Array, "B F"], labels: Float[Array, "B C"]) -> Float[Array, ""]:
    """Compute the share of the variance of centered rows that lies between class means."""
    means = labels.T @ rows / (labels.sum(axis=0)[:, None] + 1e-6)
    return jnp.sum((labels @ means) ** 2) / (jnp.sum(rows**2) + 1e-12)


class ObservedPrefix(NamedTuple):
    """A prefix with its activations and its observation."""

    # [B, ...F], activations, or a pytree of such arrays; None if nothing is observed
    hidden: Activations | None
    features: Float[Array, "F"]  # [F]; F is 0 if nothing is observed
    loss: Float[Array, "K"]  # [K], loss of stopping with each head, without the layer penalty


@checked
def observe_root(observe: Observe | None, problem: Problem) -> ObservedPrefix:
    """Observe the empty prefix.

    Args:
      observe: the function that observes, such as `observe`; None to observe nothing.
      problem: the bank, the split of data, and the loss.
    """
    if observe is None:
        return ObservedPrefix(None, jnp.zeros(0), jnp.zeros(problem.bank.num_heads))
    hidden = problem.bank.embed(problem.data.x)
    return ObservedPrefix(hidden, *observe(problem, hidden, hidden))


@checked
def observe_next(
    observe: Observe | None, problem: Problem, observed: ObservedPrefix, token: Int[Array, ""]
) -> ObservedPrefix:
    """Observe the prefix after one more layer, at the cost of one layer call.

    Args:
      observe: the function that observes, such as `observe`; None to observe nothing.
      problem: the bank, the split of data, and the loss.
      observed: the observed prefix without that layer.
      token: the token of the layer. A head or padding leaves the prefix unchanged.
    """
    if observe is None or observed.hidden is None:
        return observed
    is_layer = (token >= 0) & (token < problem.bank.num_layers)
    hidden = apply_token(problem.bank.layers, jnp.where(is_layer, token, 0), observed.hidden)
    after = ObservedPrefix(hidden, *observe(problem, hidden, observed.hidden))
    return jax.tree.map(
        lambda new, old: jnp.where(is_layer, new, old).astype(old.dtype), after, observed
    )


@checked
def observe_chain(
    observe: Observe | None, problem: Problem, chain: Int[Array, "L"]
) -> Float[Array, "L F"]:
    """Observe the prefix before each token of a chain, and return the features, `[L, F]`.

    At slots after the head, the features are those after all layers of the chain.

    Args:
      observe: the function that observes, such as `observe`; None to observe nothing.
      problem: the bank, the split of data, and the loss.
      chain: the chain, `[L]`.
    """

    def advance(observed: ObservedPrefix, token: Array) -> tuple[ObservedPrefix, Array]:
        return observe_next(observe, problem, observed, token), observed.features

    return jax.lax.scan(advance, observe_root(observe, problem), chain)[1]
