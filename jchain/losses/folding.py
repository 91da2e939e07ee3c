"""Losses of tokens from the input of a large linear map, by parts of its outputs and of the tokens.

No more logits than those of one part exist at a time. The backward pass computes them again, and
adds up gradients in float32 or wider. Cut Cross-Entropy (Wijmans et al. 2024, arXiv:2411.09009) and
Liger Kernel (Hsu et al. 2024, arXiv:2410.10989) do this for the cross-entropy; here any `TokenLoss`
is folded over the parts. Only reverse-mode derivatives exist.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero

from jchain._typing import Array, Float, PyTree
from jchain.losses.token_loss import TokenLoss
from jchain.modules.output_map import OutputMap, squash
from jchain.pytree import upcast, vary_like


class PartSizes(NamedTuple):
    """The sizes of a part of the logits.

    Attributes:
      num_tokens: the number of tokens.
      num_outputs: the number of logits of each token.
    """

    num_tokens: int
    num_outputs: int


class _Settings(NamedTuple):
    """What is static."""

    losses: tuple[TokenLoss, ...]
    num_outputs: int  # of a part
    scale: float
    softcap: float | None


class _Arrays(NamedTuple):
    """What a fold reads, or the gradients of it, which are None if they are not needed."""

    features: Any  # [P, t, F], tokens in P parts of t
    weight: Any  # [V, F]
    bias: Any  # [V], or None if there is none


def score_tokens(
    losses: tuple[TokenLoss, ...],
    output: OutputMap,
    targets: tuple[PyTree, ...],
    sizes: PartSizes,
) -> tuple[Array, ...]:
    """Compute the value that each loss has for each token, `[n, ...]`.

    Products are added up in float32 or wider, also for weights in half precision. The gradients
    with respect to the features, the weight, and the bias are those of the values; targets have
    none.

    Args:
      losses: the losses. They share the logits.
      output: the last step of a head, with features `[n, F]`.
      targets: for each loss, the targets of the tokens, arrays `[n, ...]`.
      sizes: the size of a part.
    """
    num = output.features.shape[0]
    num_parts = -(-num // sizes.num_tokens)
    size = -(-num // num_parts)

    def cut(leaf: Array) -> Array:
        padding = [(0, num_parts * size - num)] + [(0, 0)] * (np.ndim(leaf) - 1)
        return jnp.pad(leaf, padding).reshape((num_parts, size, *leaf.shape[1:]))

    num_outputs = min(sizes.num_outputs, output.weight.shape[0])
    settings = _Settings(losses, num_outputs, output.scale, output.softcap)
    arrays = _Arrays(cut(output.features), output.weight, output.bias)
    # The type that custom_vjp gives to a result is object.
    values: Any = _fold(settings, arrays, jax.tree.map(cut, targets))
    return tuple(jax.lax.collapse(value, 0, 2)[:num] for value in values)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _fold(settings: _Settings, arrays: _Arrays, targets: PyTree) -> tuple[Array, ...]:
    """Compute the value of each token, `[P, t]`, for each loss."""
    return _map_parts(
        lambda features, targets: _finish(
            settings, _run(settings, arrays._replace(features=features), targets)[0], targets
        ),
        arrays.features,
        targets,
    )


def _fold_forward(
    settings: _Settings, arrays: Any, targets: Any
) -> tuple[tuple[Array, ...], PyTree]:
    has_weight_gradient = arrays.weight.perturbed or (
        arrays.bias is not None and arrays.bias.perturbed
    )
    arrays, targets = jax.tree.map(
        lambda leaf: leaf.value, (arrays, targets), is_leaf=lambda leaf: hasattr(leaf, "perturbed")
    )

    def run(features: Array, targets: PyTree) -> tuple[tuple[Array, ...], PyTree]:
        last, carries = _run(settings, arrays._replace(features=features), targets)
        return _finish(settings, last, targets), (last, carries)

    values, kept = _map_parts(run, arrays.features, targets)
    # The structure of what is kept tells whether the weight needs a gradient.
    return values, (arrays, targets, kept, () if has_weight_gradient else None)


def _fold_backward(
    settings: _Settings, kept: PyTree, cotangents: tuple[Any, ...]
) -> tuple[_Arrays, None]:
    arrays, targets, carries, flag = kept
    cotangents = tuple(
        jnp.zeros(ct.shape, ct.dtype)  # pyright: ignore[reportArgumentType]
        if isinstance(ct, SymbolicZero)
        else ct
        for ct in cotangents
    )
    wide = _wide(arrays)
    total = None
    if flag is not None:
        total = jax.tree.map(
            lambda leaf: vary_like(jnp.zeros(leaf.shape, wide), arrays, cotangents),
            (arrays.weight, arrays.bias),
        )

    def pull_back(total: PyTree, part: PyTree) -> tuple[PyTree, Array]:
        features, targets, carries, cotangents = part
        return _pull_back(
            settings, arrays._replace(features=features), targets, carries, cotangents, total
        )

    total, by_features = jax.lax.scan(
        pull_back, total, (arrays.features, targets, carries, cotangents)
    )
    gradients = _Arrays(by_features, *((None, None) if total is None else total))
    return _Arrays(*map(_cast_like, gradients, arrays)), None


_fold.defvjp(_fold_forward, _fold_backward, symbolic_zeros=True)


def _cast_like(gradient: Array | None, array: Array | None) -> Array | None:
    return None if gradient is None or array is None else gradient.astype(array.dtype)


def _map_parts(fn: Any, features: Array, targets: PyTree) -> PyTree:
    """Apply a function to each part of the tokens."""
    if features.shape[0] > 1:
        return jax.lax.map(lambda part: fn(*part), (features, targets))
    one = fn(*jax.tree.map(lambda leaf: leaf[0], (features, targets)))
    return jax.tree.map(lambda leaf: leaf[None], one)


def _wide(arrays: _Arrays) -> np.dtype:
    """Return the dtype of logits and sums: float32, or wider if the arrays are."""
    return np.dtype(
        jnp.promote_types(
            arrays.features.dtype, jnp.promote_types(jnp.float32, arrays.weight.dtype)
        )
    )


def _operand(leaf: Array) -> Array:
    # XLA on CPU cannot sum products of float16 in float32.
    return leaf.astype(jnp.float32) if leaf.dtype == jnp.float16 else leaf


def _read_part(arrays: _Arrays, first: Array | int, size: int) -> tuple[Array, Array | None]:
    """Return the weight and the bias of a part of the outputs."""
    weight, bias = (
        None if leaf is None else jax.lax.dynamic_slice_in_dim(leaf, first, size)
        for leaf in (arrays.weight, arrays.bias)
    )
    assert weight is not None
    return _operand(weight), bias


def _multiply(arrays: _Arrays, weight: Array, bias: Array | None) -> Float[Array, "t v"]:
    wide, features = _wide(arrays), _operand(arrays.features)
    out = jnp.matmul(features, weight.T, preferred_element_type=wide)
    return out if bias is None else out + bias.astype(wide)[None]


def _add(
    settings: _Settings, carry: PyTree, linear: Array, first: Array | int, targets: PyTree
) -> PyTree:
    """Add a part to the carries of all losses, from the outputs of the linear part."""
    logits = squash(linear, settings.scale, settings.softcap)
    return tuple(
        loss.add(own, logits, first, target)
        for loss, own, target in zip(settings.losses, carry, targets, strict=True)
    )


def _finish(settings: _Settings, carry: PyTree, targets: PyTree) -> tuple[Array, ...]:
    rows = zip(settings.losses, carry, targets, strict=True)
    return tuple(loss.finish(own, target) for loss, own, target in rows)


def _run(settings: _Settings, arrays: _Arrays, targets: PyTree) -> tuple[PyTree, PyTree]:
    """Fold the losses over all outputs of one part of the tokens, `[t, F]`.

    Returns:
      The last carry, and the carries before each part, of which the stack has those of whole parts.
    """
    size = settings.num_outputs
    num_whole, rest = divmod(arrays.weight.shape[0], size)
    carry = tuple(
        loss.start(target, _wide(arrays))
        for loss, target in zip(settings.losses, targets, strict=True)
    )
    carry = jax.tree.map(lambda leaf: vary_like(leaf, arrays, targets), carry)

    def step(carry: PyTree, i: Array) -> tuple[PyTree, PyTree]:
        linear = _multiply(arrays, *_read_part(arrays, i * size, size))
        return _add(settings, carry, linear, i * size, targets), carry

    carry, carries = jax.lax.scan(step, carry, jnp.arange(num_whole))
    if not rest:
        return carry, (carries, None)
    first = num_whole * size
    linear = _multiply(arrays, *_read_part(arrays, first, rest))
    return _add(settings, carry, linear, first, targets), (carries, carry)


def _pull_back(
    settings: _Settings,
    arrays: _Arrays,
    targets: PyTree,
    kept: PyTree,
    cotangents: tuple[Array, ...],
    total: PyTree,
) -> tuple[PyTree, Float[Array, "t F"]]:
    """Pull cotangents of the values of one part of the tokens back to the arrays.

    Args:
      settings: what is static.
      arrays: what the fold read, with the features of this part, `[t, F]`.
      targets: the targets of this part.
      kept: the last carry and the carries before each part of the outputs.
      cotangents: the cotangents of the values.
      total: the gradients of the weight and the bias so far, or None if they are not needed.

    Returns:
      The new `total`, and the gradient of the features.
    """
    last, (carries, before_rest) = kept
    size, wide = settings.num_outputs, _wide(arrays)
    num_whole, rest = divmod(arrays.weight.shape[0], size)
    cotangent = jax.vjp(lambda carry: _finish(settings, carry, targets), last)[1](cotangents)[0]

    def pull_back(state: PyTree, carry: PyTree, first: Array | int, size: int) -> PyTree:
        cotangent, by_features, total = state
        weight, bias = _read_part(arrays, first, size)
        linear = _multiply(arrays, weight, bias)
        add = jax.vjp(
            lambda carry, linear: _add(settings, carry, linear, first, targets), carry, linear
        )[1]
        cotangent, by_linear = add(cotangent)
        # Products of half-precision numbers are added up in float32.
        narrow = by_linear.astype(weight.dtype)
        by_features += jnp.matmul(narrow, weight, preferred_element_type=wide)
        if total is not None:
            features = _operand(arrays.features)
            parts = jnp.matmul(narrow.T, features, preferred_element_type=wide), by_linear.sum(0)
            total = jax.tree.map(
                lambda leaf, new: _add_rows(leaf, new, first),
                total,
                (parts[0], None if bias is None else parts[1]),
            )
        return cotangent, by_features, total

    by_features = vary_like(jnp.zeros(arrays.features.shape, wide), arrays, targets, cotangents)
    state = cotangent, by_features, total
    if rest:
        state = pull_back(state, before_rest, num_whole * size, rest)
    state, _ = jax.lax.scan(
        lambda state, part: (pull_back(state, part[1], part[0] * size, size), None),
        state,
        (jnp.arange(num_whole), carries),
        reverse=True,
    )
    return state[2], state[1]


def _add_rows(leaf: Array, rows: Array, first: Array | int) -> Array:
    """Add rows to those of an array that begin at `first`."""
    old = jax.lax.dynamic_slice_in_dim(leaf, first, rows.shape[0])
    return jax.lax.dynamic_update_slice_in_dim(leaf, old + rows, first, 0)


def compute_at_once(loss: TokenLoss, outputs: Float[Array, "*B V"], y: PyTree) -> Array:
    """Compute what a function `(outputs, y)` returns, from all logits at once.

    Args:
      loss: the loss.
      outputs: the logits.
      y: the labels.
    """
    targets, is_read = loss.read_labels(y)
    shape, wide = outputs.shape[:-1], upcast(outputs)
    flat = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[len(shape) :]), targets)
    carry = loss.start(flat, wide.dtype)
    values = loss.finish(loss.add(carry, wide.reshape(-1, wide.shape[-1]), 0, flat), flat)
    return loss.reduce(mask_values(values.reshape(*shape, *values.shape[1:]), is_read), y)


def mask_values(values: Float[Array, "..."], is_read: Array | None) -> Float[Array, "..."]:
    """Set the values of the tokens that are not read to 0.

    Args:
      values: the value of each token, with axes after those of the tokens if it is several numbers.
      is_read: the mask of the tokens that are read, `[*B]`; None for all.
    """
    if is_read is None:
        return values
    axes = (1,) * (values.ndim - is_read.ndim)
    return jnp.where(is_read.reshape(*is_read.shape, *axes), values, 0)
