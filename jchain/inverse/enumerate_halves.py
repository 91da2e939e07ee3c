"""All chains of so many layers, applied to one batch, as sketches: random projections of what each makes of it.

Layers act on examples one by one, so all prefixes of one length are one batch, and each layer is applied to all of them at once.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jchain._typing import Array, Float, Int
from jchain.engine.layer_calls import apply_all, apply_token
from jchain.groups import LayerGroup

# Numbers that a level of the tree may have where it is kept whole: more fall out of the cache.
_MAX_LEVEL = 2**21
# Seeds the projection. Constant, so that a search finds the same in every process.
_SKETCH_SEED = 0


class Half(NamedTuple):
    """What is enumerated: every sequence of `num_layers` layers, applied to `hidden` in turn."""

    layers: tuple[LayerGroup, ...]
    hidden: Float[Array, "B ..."]
    num_layers: int

    @property
    def num_tokens(self) -> int:
        """Layers to choose from."""
        return sum(len(group.tokens) for group in self.layers)

    @property
    def size(self) -> int:
        """Sequences, M."""
        return self.num_tokens**self.num_layers

    def advance(self, token: int) -> "Half":
        """The part of it whose first layer is this one."""
        hidden = apply_token(self.layers, jnp.asarray(token), self.hidden)
        return Half(self.layers, hidden, self.num_layers - 1)


def make_projection(num_numbers: int, num_sketch: int, dtype: Any) -> Float[Array, "F S"]:
    """Orthonormal columns, or none less than all numbers where a sketch has as many."""
    if num_numbers <= num_sketch:
        return jnp.eye(num_numbers, dtype=dtype)
    noise = jax.random.normal(jax.random.key(_SKETCH_SEED), (num_numbers, num_sketch), jnp.float32)
    return jnp.linalg.qr(noise)[0].astype(dtype)


def sketch_half(half: Half, projection: Float[Array, "F S"]) -> Float[Array, "M S"]:
    """A sketch of what each sequence makes of the batch, in the order of `decode`."""
    return _sketch(half.layers, half.hidden, projection, half.num_layers)


@partial(jax.jit, static_argnames="num_layers")
def _sketch(
    layers: tuple[LayerGroup, ...], hidden: Array, projection: Float[Array, "F S"], num_layers: int
) -> Float[Array, "M S"]:
    num_examples, shape = hidden.shape[0], hidden.shape[1:]
    num_tokens = sum(len(group.tokens) for group in layers)
    num_kept = _count_kept(hidden.size, num_tokens, num_layers)

    def grow(rows: Float[Array, "m B ..."], depth: int) -> Float[Array, "M S"]:
        if depth == num_layers:
            return rows.reshape(rows.shape[0], -1) @ projection
        flat = rows.reshape(-1, *shape)
        if depth < num_kept:
            return grow(apply_all(layers, flat).reshape(-1, num_examples, *shape), depth + 1)

        def go_on(token: Array) -> Array:
            return grow(apply_token(layers, token, flat).reshape(rows.shape), depth + 1)

        made = jax.lax.map(go_on, jnp.arange(num_tokens))
        return made.reshape(-1, made.shape[-1])

    return grow(hidden[None], 0)


def _count_kept(num_numbers: int, num_tokens: int, num_layers: int) -> int:
    """Levels of the tree that are kept whole, those that are small enough; behind them it is walked layer by layer."""
    kept = 0
    while kept < num_layers and num_numbers * num_tokens ** (kept + 1) <= _MAX_LEVEL:
        kept += 1
    return kept


@jax.jit
def apply_sequence(
    layers: tuple[LayerGroup, ...], tokens: Int[Array, "D"], hidden: Float[Array, "B ..."]
) -> Float[Array, "B ..."]:
    """Layers, one after another."""
    return jax.lax.scan(lambda h, token: (apply_token(layers, token, h), None), hidden, tokens)[0]


def decode(half: Half, places: Int[np.ndarray, "K"]) -> Int[np.ndarray, "K D"]:
    """The layers of the sequences at these places, in the order in which they are applied."""
    base, depth = half.num_tokens, half.num_layers
    kept = _count_kept(half.hidden.size, base, depth)
    # A level that is kept whole puts its layer before all others; a loop over the next layer goes before them, in turn.
    digits = (
        np.array(np.unravel_index(places, (base,) * depth)).reshape(depth, -1)
        if depth
        else np.zeros((0, len(places)))
    )
    order = [*range(kept, depth), *range(kept - 1, -1, -1)]
    sequences = np.empty((len(places), depth), np.int64)
    for slot, row in zip(order, digits, strict=True):
        sequences[:, slot] = row
    return sequences
