"""Padding at the end of rows of tokens."""

import jax.numpy as jnp

from jchain.hub.padding import find_text


def test_the_text_of_a_row_ends_at_its_last_label():
    y = jnp.array([[-1, -1, 3, 0, -1, -1], [-1, 5, -1, 2, -1, 7], [-1] * 6])
    assert find_text(y).astype(int).tolist() == [[1, 1, 1, 1, 0, 0], [1] * 6, [0] * 6]
