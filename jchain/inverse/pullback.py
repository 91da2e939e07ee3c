"""Working back from outputs: the activations that a suffix of a chain would need at its entry to give them.

Layers are undone exactly where they say how (`jchain.invertible`); a head, which maps to fewer numbers, has many inputs that give
the same outputs: those are its pseudo-inverse's, plus its null space.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jchain._typing import Array, Float, Int, PyTree
from jchain.bank import Bank
from jchain.engine.layer_calls import apply_token
from jchain.gradient.linearize import flatten_rows
from jchain.groups import LayerGroup, find_input_shape
from jchain.problem import Problem

# Outputs up to which a head is solved exactly, by as many steps.
_MAX_HEAD_STEPS, _HEAD_DAMPING = 16, 1e-6


class PullBack(NamedTuple):
    """What a suffix would need."""

    activations: Float[Array, "B ..."]  # [B, ...F], at its entry
    residual: Float[
        Array, "B"
    ]  # [B], what the suffix makes of them, less the outputs asked for, by the size of these
    null_space: Float[
        Array, "F D"
    ]  # [F, D], orthonormal, what the head's input may be moved by; D = 0 without a head


def invert_layers(bank: Bank) -> tuple[LayerGroup, ...]:
    """The layers that undo those of a bank, under the same tokens.

    Raises:
      ValueError: a layer has no inverse, or its weights are singular.
    """
    return tuple(_invert_group(group, bank.names) for group in bank.layers)


def _invert_group(group: LayerGroup, names: Sequence[str]) -> LayerGroup:
    made: list[Any] = []
    for place, token in enumerate(group.tokens):
        try:
            made.append(_invert_member(group, place))
        except ValueError as error:
            raise ValueError(f"layer {names[token] if names else token}: {error}") from None
    params = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(params for _, params in made))
    return LayerGroup(params, made[0][0], group.tokens)


def _invert_member(group: LayerGroup, place: int) -> tuple[Any, PyTree]:
    module: Any = group.module
    if not hasattr(module, "invert"):
        raise ValueError(
            f"{type(module).__name__} has no inverse: expected a module with invert(params)"
        )
    return module.invert(jax.tree.map(lambda leaf: leaf[place], group.params))


def inverse_groups(bank: Bank) -> tuple[LayerGroup | None, ...]:
    """Of each group the layers that undo its own, traced or not and unchecked; None where its module says not how."""

    def undo(group: LayerGroup) -> LayerGroup | None:
        module: Any = group.module
        if not hasattr(module, "invert"):
            return None
        modules: list[Any] = []

        def invert(params: PyTree) -> PyTree:
            inverse, params = module.invert(params)
            modules.append(inverse)
            return params

        params = jax.vmap(invert)(group.params)
        return LayerGroup(params, modules[0], group.tokens)

    return tuple(undo(group) for group in bank.layers)


def pull_back(
    bank: Bank,
    suffix: Int[Array, "_"] | Any,
    outputs: Float[Array, "B ..."],
    *,
    near: Float[Array, "B ..."] | None = None,
) -> PullBack:
    """The activations that a suffix of a chain would need at its entry to give these outputs, on the host: nothing is traced.

    Through a head, which must be affine, they are those whose input of the head is the least change of `near` (of zero when
    None: the least norm) that gives the outputs, or comes nearest to them: `h + (y - head(h)) pinv(W)`. Adding combinations of
    the null space to `near` gives all others.

    Args:
      bank: the layers.
      suffix: tokens, layers in the order of the chain and at most one head, behind them; padding is dropped.
      outputs: what it shall give, `[B, ...]`: of its last layer, or of its head.
      near: activations at the head's input, `[B, ...F]`; not read where the suffix has no head.

    Raises:
      ValueError: `suffix` is no end of a chain, a layer has no inverse or is singular, the head is not affine, outputs are not
        of the shape that it gives, `near` is not of the head's, or it is needed because that shape cannot be read off the
        layers' weights.
    """
    tokens = _check_suffix(bank, suffix)
    has_head = bool(tokens) and tokens[-1] >= bank.num_layers
    layers = tokens[:-1] if has_head else tokens
    outputs = jnp.asarray(outputs)
    if not jnp.issubdtype(outputs.dtype, jnp.floating):
        raise ValueError(f"expected floating-point outputs, got {outputs.dtype}")
    inverses = invert_layers(bank.take(sorted(set(layers)))) if layers else ()
    renamed = {token: place for place, token in enumerate(sorted(set(layers)))}
    null_space = jnp.zeros((0, 0), outputs.dtype)
    hidden = outputs
    if has_head:
        shape = _find_shape(bank) if near is None else near.shape[1:]
        near = jnp.zeros((outputs.shape[0], *shape), outputs.dtype) if near is None else near
        hidden, null_space = _pull_head(bank, tokens[-1], outputs, near)
    _check_outputs(bank, layers, hidden)
    for token in reversed(layers):
        hidden = apply_token(inverses, jnp.asarray(renamed[token]), hidden)
    made = hidden
    for token in layers:
        made = apply_token(bank.layers, jnp.asarray(token), made)
    if has_head:
        made = apply_token(bank.heads, jnp.asarray(tokens[-1]), made)
    return PullBack(hidden, measure_residual(made, outputs), null_space)


def solve_locally(
    layer: Callable[[Array], Array], hidden: Array, wanted: Array, num_steps: int, damping: float
) -> Array:
    """The least change of each example's input that gives what is wanted: `J^T (J J^T + damping)^-1 gap`, by conjugate gradients."""

    def solve(h: Array, wanted: Array) -> Array:
        def apply(h: Array) -> Array:
            return layer(h[None])[0]

        made, forward = jax.linearize(apply, h)
        back = jax.linear_transpose(forward, h)
        product = lambda v: forward(back(v)[0]) + damping * v  # noqa: E731
        return back(jax.scipy.sparse.linalg.cg(product, wanted - made, maxiter=num_steps)[0])[0]

    return jax.vmap(solve)(hidden, wanted)


def measure_residual(
    made: Float[Array, "B ..."], wanted: Float[Array, "B ..."]
) -> Float[Array, "B"]:
    """`|made - wanted| / |wanted|` of each example; where nothing is wanted, `|made|`."""
    error, size = (jnp.linalg.norm(flatten_rows(a), axis=1) for a in (made - wanted, wanted))
    return error / jnp.where(size > 0, size, 1.0)


def target_logits(
    labels: Int[Array, "B"], num_classes: int, confidence: float = 0.99
) -> Float[Array, "B C"]:
    """Logits of mean 0 whose softmax gives each label this probability, and the other classes the rest in equal shares.

    Raises:
      ValueError: the confidence is not between `1 / num_classes` and 1.
    """
    if not 1 / num_classes < confidence < 1:
        raise ValueError(f"expected a confidence between 1/{num_classes} and 1, got {confidence}")
    odds = jnp.log(confidence * (num_classes - 1) / (1 - confidence))
    return odds * (jax.nn.one_hot(labels, num_classes) - 1 / num_classes)


def target_outputs(outputs: Any, y: Array, loss_fn: Any, confidence: float = 0.99) -> Array:
    """Outputs of low loss: of the default loss `target_logits`, of others `y` itself where it has the shape of the outputs.

    Raises:
      ValueError: it has another shape.
    """
    if loss_fn is optax.softmax_cross_entropy_with_integer_labels:
        return target_logits(y, outputs.shape[-1], confidence).astype(outputs.dtype)
    if y.shape != outputs.shape:
        raise ValueError(
            f"expected targets of the shape of the outputs, {list(outputs.shape)}, or labels and the default loss, got "
            f"{y.dtype}{list(y.shape)}"
        )
    return y.astype(outputs.dtype)


def reach_target(
    problem: Problem,
    token: Int[Array, ""],
    hidden: Float[Array, "B ..."],
    rate: float | Float[Array, ""] = 1.0,
) -> Float[Array, "B ..."]:
    """What a head would have to read: the least change that moves its outputs so much of the way to their target.

    Raises:
      ValueError: the loss has no target.
    """
    head = partial(apply_token, problem.bank.heads, token)
    outputs = head(hidden)
    target = target_outputs(outputs, problem.data.y, problem.loss_fn)
    wanted = outputs + jnp.asarray(rate, outputs.dtype) * (target - outputs)
    num_steps = min(_MAX_HEAD_STEPS, outputs.size // outputs.shape[0])
    return hidden + solve_locally(head, hidden, wanted, num_steps, _HEAD_DAMPING)


def condition_numbers(
    bank: Bank, chain: Int[Array, "_"] | Any, x: Float[Array, "B ..."]
) -> Float[np.ndarray, "B"]:
    """How much a chain's layers may amplify a relative error that is taken back through them: of their Jacobian at each example,
    the largest singular value by the smallest, in float64 on the host; inf, or more than 1e15, where it is singular.
    A Jacobian of `F` features for each of `B` examples takes `8 B F^2` bytes.

    Args:
      bank: the layers.
      chain: tokens; heads and padding are dropped. One token gives the condition of one layer.
      x: raw input, `[B, ...]`.

    Raises:
      ValueError: `chain` has tokens that the bank has not.
    """
    tokens = [token for token in _check_suffix(bank, chain) if token < bank.num_layers]
    with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
        layers, hidden = jax.tree.map(_to_float64, (bank.layers, np.asarray(bank.embed(x))))
        size = hidden[0].size
        product = np.broadcast_to(np.eye(size), (len(hidden), size, size))
        for token in tokens:
            product = np.asarray(_find_jacobians(layers, jnp.asarray(token), hidden)) @ product
            hidden = apply_token(layers, jnp.asarray(token), hidden)
    return np.linalg.cond(product)


def _to_float64(leaf: Any) -> Array:
    return jnp.asarray(
        np.asarray(leaf, np.float64)
        if jnp.issubdtype(leaf.dtype, jnp.floating)
        else np.asarray(leaf)
    )


@jax.jit
def _find_jacobians(
    layers: tuple[LayerGroup, ...], token: Array, hidden: Array
) -> Float[Array, "B F F"]:
    """Of one layer at each example, outputs by inputs."""
    size = hidden[0].size

    def apply(x: Array) -> Array:
        return apply_token(layers, token, x.reshape(1, *hidden.shape[1:])).reshape(-1)

    return jax.lax.map(jax.jacrev(apply), hidden.reshape(-1, size), batch_size=16)


def _check_suffix(bank: Bank, suffix: Any) -> list[int]:
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
            f"expected a head (token {bank.num_layers} or more) at the end alone, got {found}"
        )
    return found


def _find_shape(bank: Bank) -> tuple[int, ...]:
    shape = find_input_shape(bank.layers[0])
    if shape is None:
        raise ValueError(
            "expected near=, activations at the head's input: their shape cannot be read off the layers"
        )
    return shape


def _check_outputs(bank: Bank, layers: list[int], hidden: Array) -> None:
    if not layers:
        return
    try:
        made = jax.eval_shape(
            lambda h: apply_token(bank.layers, jnp.asarray(layers[-1]), h), hidden
        )
    except Exception as error:  # whatever a user's module raises
        raise ValueError(
            f"expected outputs of the layers' shape, got {list(hidden.shape)}: {str(error).splitlines()[0]}"
        ) from None
    if made.shape != hidden.shape:
        raise ValueError(f"expected outputs of shape {list(made.shape)}, got {list(hidden.shape)}")


def _pull_head(bank: Bank, token: int, outputs: Array, near: Array) -> tuple[Array, Array]:
    try:
        jax.eval_shape(lambda h: apply_token(bank.heads, jnp.asarray(token), h), near)
    except Exception as error:  # whatever a user's module raises
        raise ValueError(
            f"expected near of the head's shape, got {list(near.shape)}: {str(error).splitlines()[0]}"
        ) from None
    kernel, bias = as_affine(bank, token, near[:1])
    if outputs.shape[1:] != bias.shape or near.shape[0] != outputs.shape[0]:
        raise ValueError(
            f"expected outputs [B, {', '.join(map(str, bias.shape))}] for as many examples as near, got "
            f"{list(outputs.shape)} and {list(near.shape)}"
        )
    left, values, right = np.linalg.svd(kernel)
    rank = int(
        np.sum(values > values.max() * max(kernel.shape) * float(jnp.finfo(outputs.dtype).eps))
    )
    inverse = (right[:rank].T / values[:rank]) @ left[:, :rank].T
    gap = flatten_rows(outputs - apply_token(bank.heads, jnp.asarray(token), near))
    change = gap @ jnp.asarray(inverse, gap.dtype)
    return near + change.reshape(near.shape), jnp.asarray(left[:, rank:], outputs.dtype)


def as_affine(
    bank: Bank, token: int, x: Float[Array, "1 ..."]
) -> tuple[Float[np.ndarray, "F C"], Float[np.ndarray, "..."]]:
    """Kernel and bias of a head that is an affine map, read off what it makes of the unit vectors.

    Args:
      bank: the heads.
      token: of the head.
      x: one example of its input, for the shape.

    Raises:
      ValueError: it is not affine.
    """

    def head(rows: Array) -> Array:
        return apply_token(bank.heads, jnp.asarray(token), rows.reshape(-1, *x.shape[1:]))

    size = x[0].size
    probe = jax.random.normal(jax.random.key(0), (4, size), x.dtype)
    bias = head(jnp.zeros((1, size), x.dtype))
    kernel = flatten_rows(head(jnp.eye(size, dtype=x.dtype)) - bias)
    made, wanted = flatten_rows(head(probe)), probe @ kernel + flatten_rows(bias)
    if not np.allclose(made, wanted, rtol=1e-3, atol=1e-3 * float(jnp.abs(wanted).max())):
        raise ValueError(
            f"expected an affine head, such as DenseHead, got one that is not: token {token}"
        )
    return np.asarray(kernel, np.float64), np.asarray(bias[0])
