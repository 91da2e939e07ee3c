"""Find the activations that a suffix of a chain maps to given outputs.

Layers are inverted exactly if their module has a method `invert` (`jchain.invertible`). A head
usually has fewer outputs than inputs, so many inputs give the same outputs: the pseudo-inverse
gives one of these inputs, and the null space gives all others.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple, Protocol, runtime_checkable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from jchain._typing import Activations, Array, Float, Int, PyTree, Shaped
from jchain.arguments import check_integers, checked
from jchain.bank import Bank
from jchain.engine.layer_calls import apply_token, explain_wrong_input
from jchain.gradient.linearize import flatten_rows
from jchain.groups import LayerGroup
from jchain.inverse.pullback_head import pull_back_head
from jchain.modules.activations import check_one_array, to_one_array
from jchain.problem import Problem
from jchain.pytree import get_first_line, is_concrete, shorten
from jchain.stages.binding import check_no_stages

# The maximum number of steps of conjugate gradients for a head, and their damping. They take one
# step per output, so heads with at most this number of outputs are solved exactly.
_MAX_HEAD_STEPS, _HEAD_DAMPING = 16, 1e-6


@runtime_checkable
class Invertible(Protocol):
    """A module whose layers have an inverse."""

    def invert(self, params: PyTree) -> tuple[nn.Module, PyTree]:
        """Return the module and the params of the inverse layer."""
        ...


class PullBack(NamedTuple):
    """The result of pulling outputs back through a suffix.

    Attributes:
      activations: the activations at the entry of the suffix, `[B, ...F]`.
      residual: `|suffix(activations) - outputs| / |outputs|` of each example, `[B]`.
      null_space: orthonormal directions along which the head's input may move, `[F, D]`; D is 0
        without a head.
    """

    activations: Float[Array, "B ..."]
    residual: Float[Array, "B"]
    null_space: Float[Array, "F D"]


@checked
def invert_layers(bank: Bank) -> tuple[LayerGroup, ...]:
    """Invert a bank's layers on the host. Each inverse has the token of its layer.

    Args:
      bank: the bank, whose layers must all be invertible.

    Raises:
      ValueError: if a layer has no inverse, its weights are singular, or the bank has stages.
    """
    check_no_stages(bank.layers, "inverses of layers")
    return tuple(_invert_group(group, bank.names) for group in bank.layers)


def _invert_group(group: LayerGroup, names: Sequence[str]) -> LayerGroup:
    inverses: list[tuple[nn.Module, PyTree]] = []
    for index, token in enumerate(group.tokens):
        try:
            inverses.append(_invert_member(group, index))
        except ValueError as error:
            raise ValueError(f"layer {names[token] if names else token}: {error}") from None
    params = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(params for _, params in inverses))
    return LayerGroup(params, inverses[0][0], group.tokens)


def _invert_member(group: LayerGroup, index: int) -> tuple[nn.Module, PyTree]:
    module = group.module
    if not isinstance(module, Invertible):
        raise ValueError(
            f"{type(module).__name__} has no inverse: expected a module with invert(params)"
        )
    return module.invert(jax.tree.map(lambda leaf: leaf[index], group.params))


def inverse_groups(bank: Bank) -> tuple[LayerGroup | None, ...]:
    """Invert each group of layers; the result is None for groups whose module has no inverse.

    Unlike `invert_layers`, this function may be traced, and it does not check whether a layer is
    singular.

    Args:
      bank: the bank with the layers.
    """

    def invert_group(group: LayerGroup) -> LayerGroup | None:
        module = group.module
        if not isinstance(module, Invertible):
            return None
        modules: list[nn.Module] = []

        def invert(params: PyTree) -> PyTree:
            inverse, params = module.invert(params)
            modules.append(inverse)
            return params

        params = jax.vmap(invert)(group.params)
        return LayerGroup(params, modules[0], group.tokens)

    return tuple(invert_group(group) for group in bank.layers)


@checked
def pull_back(
    bank: Bank,
    suffix: ArrayLike | Sequence[object],
    outputs: Float[Array, "B ..."],
    *,
    near: Float[Array, "B ..."] | None = None,
) -> PullBack:
    """Find activations at the entry of a suffix that give the desired outputs, on the host.

    If the suffix has a head, the head must be affine. Its input is the smallest change of `near`
    that gives the outputs, or the least-squares solution if no input gives them:
    `near + (y - head(near)) pinv(W)`. Adding combinations of the null space to `near` gives all
    other solutions.

    Args:
      bank: the bank with the layers and heads.
      suffix: the tokens of the layers in the order of the chain, then at most one head; padding is
        dropped.
      outputs: the desired outputs of the head, or of the last layer if there is no head,
        `[B, ...]`.
      near: activations at the head's input, `[B, ...F]`; None for zeros. Unused if the suffix has
        no head.

    Raises:
      ValueError: if `suffix` is not the end of a chain, a layer has no inverse or is singular, the
        head is not affine, a shape does not fit, or `near` is None and its shape cannot be found
        from the layers' weights.
    """
    tokens = _check_suffix(bank, suffix)
    has_head = bool(tokens) and tokens[-1] >= bank.num_layers
    layers = tokens[:-1] if has_head else tokens
    outputs = to_one_array(outputs, "outputs")
    if not jnp.issubdtype(outputs.dtype, jnp.floating):
        raise ValueError(f"expected floating-point outputs, got {outputs.dtype}")
    inverses = invert_layers(bank.take(sorted(set(layers)))) if layers else ()
    renamed = {token: index for index, token in enumerate(sorted(set(layers)))}
    null_space = jnp.zeros((0, 0), outputs.dtype)
    hidden = outputs
    if has_head:
        if near is None:
            near = jnp.zeros((outputs.shape[0], *_guess_shape(bank)), outputs.dtype)
        check_one_array(near=near)
        hidden, null_space = pull_back_head(bank, tokens[-1], outputs, near)
    _check_outputs(bank, layers, hidden)
    for token in reversed(layers):
        hidden = apply_token(inverses, jnp.asarray(renamed[token]), hidden)
    reached = hidden
    for token in layers:
        reached = apply_token(bank.layers, jnp.asarray(token), reached)
    if has_head:
        reached = apply_token(bank.heads, jnp.asarray(tokens[-1]), reached)
    return PullBack(hidden, relative_residual(reached, outputs), null_space)


def gauss_newton_step(
    layer_fn: Callable[[Array], Array], hidden: Array, target: Array, num_steps: int, damping: float
) -> Array:
    """Compute the damped least-norm step of each example's input toward a target output.

    The step is `J^T (J J^T + damping)^-1 (target - layer(h))`.

    Args:
      layer_fn: a function from inputs `[B, ...F]` to outputs `[B, ...]`; J is its Jacobian at one
        example.
      hidden: the current inputs, `[B, ...F]`.
      target: the desired outputs, `[B, ...]`.
      num_steps: the number of steps of conjugate gradients.
      damping: the number that is added to the diagonal of `J J^T`.
    """

    def solve(h: Array, target: Array) -> Array:
        def apply(h: Array) -> Array:
            return layer_fn(h[None])[0]

        outputs, forward = jax.linearize(apply, h)
        back = jax.linear_transpose(forward, h)
        product = lambda v: forward(back(v)[0]) + damping * v  # noqa: E731
        return back(jax.scipy.sparse.linalg.cg(product, target - outputs, maxiter=num_steps)[0])[0]

    return jax.vmap(solve)(hidden, target)


def relative_residual(
    outputs: Float[Array, "B ..."], target: Float[Array, "B ..."]
) -> Float[Array, "B"]:
    """Compute the residual `|outputs - target| / |target|` of each example.

    If the target is zero, the residual is `|outputs|`.

    Args:
      outputs: the actual outputs, `[B, ...]`.
      target: the desired outputs, `[B, ...]`.
    """
    error, size = (jnp.linalg.norm(flatten_rows(a), axis=1) for a in (outputs - target, target))
    return error / jnp.where(size > 0, size, 1.0)


@checked
def target_logits(
    labels: Int[Array, "B"], num_classes: int, confidence: float = 0.99
) -> Float[Array, "B C"]:
    """Compute logits of mean 0 whose softmax gives each label the probability `confidence`.

    The other classes share the remaining probability equally.

    Args:
      labels: the label of each example, `[B]`.
      num_classes: the number of classes, C.
      confidence: the probability of the label.

    Raises:
      ValueError: if there are fewer than 2 classes, a label is not one of them, or the confidence
        is not between `1 / num_classes` and 1.
    """
    check_integers(at_least=2, num_classes=num_classes)
    if is_concrete(labels) and labels.size:
        rows = np.asarray(labels)
        if not 0 <= rows.min() <= rows.max() < num_classes:
            raise ValueError(f"expected labels in 0..{num_classes - 1}, got {shorten(rows)}")
    if not 1 / num_classes < confidence < 1:
        raise ValueError(f"expected a confidence between 1/{num_classes} and 1, got {confidence}")
    odds = jnp.log(confidence * (num_classes - 1) / (1 - confidence))
    return odds * (jax.nn.one_hot(labels, num_classes) - 1 / num_classes)


@checked
def target_outputs(
    outputs: Float[Array, "B ..."],
    y: Shaped[Array, "B ..."],
    loss_fn: Callable[..., Array],
    confidence: float = 0.99,
) -> Float[Array, "B ..."]:
    """Return outputs with a low loss.

    They are `target_logits` for the default loss, and `y` itself for any other loss.

    Args:
      outputs: the outputs of the head, `[B, ...]`. Only their shape and dtype are used.
      y: the labels or targets of the examples.
      loss_fn: the loss function of the problem.
      confidence: the probability of the label; see `target_logits`.

    Raises:
      ValueError: if the loss is not the default loss, and `y` does not have the shape of the
        outputs.
    """
    if loss_fn is optax.softmax_cross_entropy_with_integer_labels:
        return target_logits(y, outputs.shape[-1], confidence).astype(outputs.dtype)
    if y.shape != outputs.shape:
        raise ValueError(
            "expected targets of the shape of the outputs, "
            f"{list(outputs.shape)}, or labels and the default loss, got "
            f"{y.dtype}{list(y.shape)}"
        )
    return y.astype(outputs.dtype)


@checked
def reach_target(
    problem: Problem,
    token: Int[Array, ""],
    hidden: Activations,
    step_size: float | Float[Array, ""] = 1.0,
) -> Float[Array, "B ..."]:
    """Return the head's input after the smallest change that gives the `target_outputs`.

    Args:
      problem: the bank, the examples, and the loss.
      token: the token of the head.
      hidden: the head's current input, `[B, ...F]`.
      step_size: the fraction of the way from the current outputs to their target.

    Returns:
      The changed input, `[B, ...F]`.

    Raises:
      ValueError: if activations are not one array, or the loss has no `target_outputs`.
    """
    check_one_array(activations=hidden)
    head = partial(apply_token, problem.bank.heads, token)
    outputs = head(hidden)
    target = target_outputs(outputs, problem.data.y, problem.loss_fn)
    goal = outputs + jnp.asarray(step_size, outputs.dtype) * (target - outputs)
    num_steps = min(_MAX_HEAD_STEPS, outputs.size // outputs.shape[0])
    return hidden + gauss_newton_step(head, hidden, goal, num_steps, _HEAD_DAMPING)


@checked
def condition_numbers(
    bank: Bank, chain: ArrayLike | Sequence[object], x: Activations
) -> Float[np.ndarray, "B"]:
    """Compute the condition number of the Jacobian of a chain's layers at each example.

    It bounds how much the inverses of the layers amplify a relative error. If a Jacobian is
    singular, the condition number is inf or more than 1e15. The computation runs in float64 on the
    host and takes `8 B F^2` bytes for `F` features and `B` examples.

    Args:
      bank: the bank with the layers.
      chain: the tokens of the chain; a head and padding are ignored. A single token gives the
        condition number of that layer.
      x: the raw input, `[B, ...]`.

    Raises:
      ValueError: if a token is out of range, activations are not one array, or the bank does not
        accept `x`.
    """
    with explain_wrong_input(bank, x):
        check_one_array(activations=jax.eval_shape(bank.embed, x))
        jax.eval_shape(
            partial(apply_token, bank.layers, jnp.array(0)), jax.eval_shape(bank.embed, x)
        )
    tokens = [token for token in _check_suffix(bank, chain) if token < bank.num_layers]
    with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
        layers, hidden = jax.tree.map(_to_float64, (bank.layers, np.asarray(bank.embed(x))))
        size = hidden[0].size
        product = np.broadcast_to(np.eye(size), (len(hidden), size, size))
        for token in tokens:
            product = np.asarray(_compute_jacobians(layers, jnp.asarray(token), hidden)) @ product
            hidden = apply_token(layers, jnp.asarray(token), hidden)
    return np.linalg.cond(product)


def _to_float64(leaf: ArrayLike) -> Array:
    array = np.asarray(leaf)
    is_floating = jnp.issubdtype(array.dtype, jnp.floating)
    return jnp.asarray(array.astype(np.float64) if is_floating else array)


@jax.jit
def _compute_jacobians(
    layers: tuple[LayerGroup, ...], token: Array, hidden: Array
) -> Float[Array, "B F F"]:
    """Compute the Jacobian of one layer at each example, outputs by inputs."""
    size = hidden[0].size

    def apply(x: Array) -> Array:
        return apply_token(layers, token, x.reshape(1, *hidden.shape[1:])).reshape(-1)

    return jax.lax.map(jax.jacrev(apply), hidden.reshape(-1, size), batch_size=16)


def _check_suffix(bank: Bank, suffix: ArrayLike | Sequence[object]) -> list[int]:
    check_no_stages(bank.layers, "inverses of layers")
    tokens = np.asarray(suffix)
    if tokens.ndim != 1 or not (np.issubdtype(tokens.dtype, np.integer) or tokens.size == 0):
        raise ValueError(
            f"expected integer tokens of shape [L], got {tokens.dtype}{list(tokens.shape)}"
        )
    found = [int(token) for token in np.trim_zeros(tokens + 1, "b") - 1]
    last = bank.num_layers + bank.num_heads
    if any(not 0 <= token < last for token in found):
        raise ValueError(f"expected tokens in 0..{last - 1}, got {found}")
    if any(token >= bank.num_layers for token in found[:-1]):
        raise ValueError(
            f"expected a head (token {bank.num_layers} or more) only at the end, got {found}"
        )
    return found


def _guess_input_shape(group: LayerGroup) -> tuple[int, ...] | None:
    """Guess the input shape of a group from the sizes of its params, or None if none fits.

    The sizes are tried one by one, because Flax rejects shapes that do not fit its kernels.
    """
    sizes = sorted({size for leaf in jax.tree.leaves(group.params) for size in leaf.shape[1:]})
    accepted = []
    for spatial in ((), (8,), (8, 8)):
        for size in sizes:
            shape = (*spatial, size)
            try:
                out = jax.eval_shape(group.apply, 0, jax.ShapeDtypeStruct((1, *shape), jnp.float32))
            except Exception:
                continue
            if out.shape == (1, *shape):
                return shape
            accepted.append(shape)
    return accepted[0] if accepted else None


def _guess_shape(bank: Bank) -> tuple[int, ...]:
    shape = _guess_input_shape(bank.layers[0])
    if shape is None:
        raise ValueError(
            "expected near, the activations at the head's input, got None: the layers' weights do "
            "not determine their shape"
        )
    return shape


def _check_outputs(bank: Bank, layers: list[int], hidden: Array) -> None:
    if not layers:
        return
    try:
        expected = jax.eval_shape(
            lambda h: apply_token(bank.layers, jnp.asarray(layers[-1]), h), hidden
        )
    except Exception as error:  # whatever a user's module raises
        raise ValueError(
            f"expected outputs of the layers' shape, got {list(hidden.shape)}: "
            f"{get_first_line(error)}"
        ) from None
    if expected.shape != hidden.shape:
        raise ValueError(
            f"expected outputs of shape {list(expected.shape)}, got {list(hidden.shape)}"
        )
