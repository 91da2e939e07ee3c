"""The pull-back of outputs through an affine head, by its pseudoinverse."""

import jax
import jax.numpy as jnp
import numpy as np

from jchain._typing import Array, Float
from jchain.bank import Bank
from jchain.engine.layer_calls import apply_token
from jchain.gradient.linearize import flatten_rows
from jchain.pytree import get_first_line


def pull_back_head(
    bank: Bank, token: int, outputs: Float[Array, "B ..."], near: Float[Array, "B ..."]
) -> tuple[Float[Array, "B ..."], Float[Array, "F D"]]:
    """Find the input of an affine head that gives the outputs and is nearest to `near`.

    Args:
      bank: the bank with the heads.
      token: the token of the head.
      outputs: the desired outputs of the head, `[B, ...]`.
      near: activations at the head's input, `[B, ...F]`.

    Returns:
      The input, and orthonormal directions that do not change the outputs, `[F, D]`.

    Raises:
      ValueError: if the head is not affine, or a shape does not fit.
    """
    try:
        jax.eval_shape(lambda h: apply_token(bank.heads, jnp.asarray(token), h), near)
    except Exception as error:  # whatever a user's module raises
        raise ValueError(
            f"expected near of the shape of the head's input, got {list(near.shape)}: "
            f"{get_first_line(error)}"
        ) from None
    kernel, bias = _as_affine(bank, token, near[:1])
    if outputs.shape[1:] != bias.shape or near.shape[0] != outputs.shape[0]:
        raise ValueError(
            f"expected outputs [B, {', '.join(map(str, bias.shape))}] and near with the same B, "
            f"got {list(outputs.shape)} and {list(near.shape)}"
        )
    left, values, right = np.linalg.svd(kernel)
    tolerance = values.max() * max(kernel.shape) * float(jnp.finfo(outputs.dtype).eps)
    rank = int(np.sum(values > tolerance))
    inverse = (right[:rank].T / values[:rank]) @ left[:, :rank].T
    gap = flatten_rows(outputs - apply_token(bank.heads, jnp.asarray(token), near))
    change = gap @ jnp.asarray(inverse, gap.dtype)
    return near + change.reshape(near.shape), jnp.asarray(left[:, rank:], outputs.dtype)


def _as_affine(
    bank: Bank, token: int, x: Float[Array, "1 ..."]
) -> tuple[Float[np.ndarray, "F C"], Float[np.ndarray, "..."]]:
    """Find the kernel and bias of an affine head from its outputs for zero and unit vectors."""

    def head(rows: Array) -> Array:
        return apply_token(bank.heads, jnp.asarray(token), rows.reshape(-1, *x.shape[1:]))

    size = x[0].size
    probe = jax.random.normal(jax.random.key(0), (4, size), x.dtype)
    bias = head(jnp.zeros((1, size), x.dtype))
    kernel = flatten_rows(head(jnp.eye(size, dtype=x.dtype)) - bias)
    outputs, affine = flatten_rows(head(probe)), probe @ kernel + flatten_rows(bias)
    if not np.allclose(outputs, affine, rtol=1e-3, atol=1e-3 * float(jnp.abs(affine).max())):
        raise ValueError(
            f"expected an affine head, such as DenseHead, got one that is not: token {token}"
        )
    return np.asarray(kernel, np.float64), np.asarray(bias[0])
