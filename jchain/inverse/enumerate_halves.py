"""Apply every sequence of a given number of layers to one batch, and sketch the activations.

A sketch is a random projection of the activations. Layers act on examples independently, so all
prefixes of the same length form one batch, and each layer is applied to all of them at once.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jchain._typing import Array, Float, Int
from jchain.engine.layer_calls import apply_all, apply_token
from jchain.groups import LayerGroup

# The largest number of activations in a tree level that is computed as one batch. Larger levels do
# not fit in the processor's cache.
_MAX_LEVEL = 2**21
# The seed of the projection. It is constant, so that a search finds the same chains in every
# process.
_SKETCH_SEED = 0


class Half(NamedTuple):
    """All sequences of `num_layers` layers that are applied to `hidden`."""

    layers: tuple[LayerGroup, ...]
    hidden: Float[Array, "B ..."]  # [B, ...F], the activations before the first layer
    num_layers: int

    @property
    def num_tokens(self) -> int:
        """The number of layers to choose from, N."""
        return sum(len(group.tokens) for group in self.layers)

    @property
    def num_sequences(self) -> int:
        """The number of sequences, `M = N^num_layers`."""
        return self.num_tokens**self.num_layers

    def advance(self, token: int) -> "Half":
        """Return the sequences that begin with this layer, as a half that starts after it."""
        hidden = apply_token(self.layers, jnp.asarray(token), self.hidden)
        return Half(self.layers, hidden, self.num_layers - 1)


def make_projection(num_features: int, num_sketch: int, dtype: DTypeLike) -> Float[Array, "F S"]:
    """Make a random projection with orthonormal columns.

    The projection is the identity if a sketch can hold all features.

    Args:
      num_features: the size of the activations of all examples together, F.
      num_sketch: the largest allowed size of a sketch; its size is `S = min(F, num_sketch)`.
      dtype: the dtype of the activations.
    """
    if num_features <= num_sketch:
        return jnp.eye(num_features, dtype=dtype)
    key = jax.random.key(_SKETCH_SEED)
    noise = jax.random.normal(key, (num_features, num_sketch), jnp.float32)
    return jnp.linalg.qr(noise)[0].astype(dtype)


def sketch_half(half: Half, projection: Float[Array, "F S"]) -> Float[Array, "M S"]:
    """Sketch the activations after each sequence, in the order of `decode_sequences`.

    The cost is about `M * N / (N - 1)` layer calls on the batch, because sequences share prefixes.

    Args:
      half: the half with the M sequences.
      projection: the projection of activations to sketches (`make_projection`).
    """
    return _sketch(half.layers, half.hidden, projection, half.num_layers)


@partial(jax.jit, static_argnames="num_layers")
def _sketch(
    layers: tuple[LayerGroup, ...], hidden: Array, projection: Float[Array, "F S"], num_layers: int
) -> Float[Array, "M S"]:
    num_examples, shape = hidden.shape[0], hidden.shape[1:]
    num_tokens = sum(len(group.tokens) for group in layers)
    num_batched = _count_batched_levels(hidden.size, num_tokens, num_layers)

    def expand(prefixes: Float[Array, "m B ..."], depth: int) -> Float[Array, "M S"]:
        if depth == num_layers:
            return prefixes.reshape(prefixes.shape[0], -1) @ projection
        flat = prefixes.reshape(-1, *shape)
        if depth < num_batched:
            children = apply_all(layers, flat).reshape(-1, num_examples, *shape)
            return expand(children, depth + 1)

        def expand_token(token: Array) -> Array:
            return expand(apply_token(layers, token, flat).reshape(prefixes.shape), depth + 1)

        sketches = jax.lax.map(expand_token, jnp.arange(num_tokens))
        return sketches.reshape(-1, sketches.shape[-1])

    return expand(hidden[None], 0)


def _count_batched_levels(num_features: int, num_tokens: int, num_layers: int) -> int:
    """Count the tree levels that are one batch each; deeper levels loop over the next layer."""
    num_batched = 0
    while num_batched < num_layers and num_features * num_tokens ** (num_batched + 1) <= _MAX_LEVEL:
        num_batched += 1
    return num_batched


@jax.jit
def apply_sequence(
    layers: tuple[LayerGroup, ...], tokens: Int[Array, "D"], hidden: Float[Array, "B ..."]
) -> Float[Array, "B ..."]:
    """Apply layers one after another.

    Args:
      layers: the groups of layers that tokens refer to.
      tokens: the tokens of the layers in the order in which they are applied, `[D]`.
      hidden: the activations before the first layer, `[B, ...F]`.
    """
    return jax.lax.scan(lambda h, token: (apply_token(layers, token, h), None), hidden, tokens)[0]


def decode_sequences(half: Half, rows: Int[np.ndarray, "K"]) -> Int[np.ndarray, "K D"]:
    """Return the layers of some rows of `sketch_half`, in the order in which they are applied.

    Args:
      half: the half with the sequences of D layers.
      rows: the indices of the rows, `[K]`.
    """
    base, depth = half.num_tokens, half.num_layers
    num_batched = _count_batched_levels(half.hidden.size, base, depth)
    # Each batched level adds its layer as the most significant digit so far. The loops over later
    # levels then add digits of their own; the first loop is the outermost one, so its digit is the
    # most significant.
    digits = (
        np.array(np.unravel_index(rows, (base,) * depth)).reshape(depth, -1)
        if depth
        else np.zeros((0, len(rows)))
    )
    order = [*range(num_batched, depth), *range(num_batched - 1, -1, -1)]
    sequences = np.empty((len(rows), depth), np.int64)
    for slot, digit in zip(order, digits, strict=True):
        sequences[:, slot] = digit
    return sequences
