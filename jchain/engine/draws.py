"""Random draws that do not depend on `jax_enable_x64`.

By default, JAX draws float64 and int64 numbers from other bits of the same key. All draws of jchain
name their dtype, so that a key gives the same numbers in both modes.
"""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jchain._typing import Array, Key


def draw_signs(key: Key[Array, ""], shape: tuple[int, ...], dtype: DTypeLike) -> Array:
    """Draw -1 or 1 with equal probability.

    `jax.random.rademacher` draws float64 numbers inside if `jax_enable_x64` is set.

    Args:
      key: the PRNG key; consumed by this call.
      shape: the shape of the result.
      dtype: the dtype of the result.
    """
    is_positive = jax.random.bernoulli(key, jnp.float32(0.5), shape)
    return (2 * is_positive.astype(jnp.int32) - 1).astype(dtype)
