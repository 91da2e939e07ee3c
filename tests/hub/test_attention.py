"""Attention, compared with loops in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from jchain.hub.attention import RotaryAttention, attend


@pytest.mark.parametrize(
    ("is_causal", "window"), [(True, None), (False, None), (True, 3), (True, 99)]
)
@pytest.mark.parametrize(("num_kinds", "leading"), [(4, (2,)), (2, (2, 3)), (1, ())])
def test_attention_equals_a_loop_over_heads_and_positions(num_kinds, leading, is_causal, window):
    rng, length, num_heads, size = np.random.default_rng(0), 7, 4, 3
    parts = [
        rng.normal(size=(*leading, length, num, size)) for num in (num_heads, num_kinds, num_kinds)
    ]

    def reference(query, key, value):
        out = np.zeros((length, num_heads, size))
        for head in range(num_heads):
            kind = head * num_kinds // num_heads
            for at in range(length):
                last = at if is_causal else length - 1
                seen = range(0 if window is None else max(0, at - window + 1), last + 1)
                odds = np.exp([query[at, head] @ key[i, kind] / np.sqrt(size) for i in seen])
                out[at, head] = (odds / odds.sum()) @ value[list(seen), kind]
        return out.reshape(length, -1)

    def run(*parts):
        return attend(*parts, is_causal=is_causal, window=window)

    flat = [part.reshape(-1, *part.shape[-3:]) for part in parts]
    expected = np.stack([reference(*row) for row in zip(*flat, strict=True)]).reshape(
        *leading, length, -1
    )
    with jax.enable_x64(True):
        parts = [jnp.asarray(part) for part in parts]
        np.testing.assert_allclose(run(*parts), expected, rtol=1e-6)
        check_grads(run, parts, order=1, modes=("rev",))
    np.testing.assert_allclose(
        run(*(part.astype(jnp.float32) for part in parts)), expected, rtol=1e-4, atol=1e-6
    )
    half = run(*(part.astype(jnp.bfloat16) for part in parts))
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(half.astype(jnp.float32), expected, atol=0.05)


def test_scores_are_scaled_and_bounded():
    rng = np.random.default_rng(0)
    query, key, value = (rng.normal(size=(5, 1, 3)) for _ in range(3))
    expected = np.zeros((5, 3))
    for at in range(5):
        scores = 2.0 * np.tanh(0.7 * key[: at + 1, 0] @ query[at, 0] / 2.0)
        expected[at] = np.exp(scores) @ value[: at + 1, 0] / np.exp(scores).sum()
    parts = (jnp.asarray(part, jnp.float32) for part in (query, key, value))
    found = attend(*parts, is_causal=True, scale=0.7, softcap=2.0)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_without_frequencies_positions_do_not_matter():
    """A block without rotary positions sees a set of earlier tokens, not their order."""
    attention = RotaryAttention(2, 1, 3, frequencies=())
    x = jax.random.normal(jax.random.key(0), (1, 5, 6))
    swapped = x[:, jnp.array([2, 0, 1, 3, 4])]
    params = jax.tree.map(lambda leaf: 50 * leaf, attention.init(jax.random.key(1), x))
    np.testing.assert_allclose(
        attention.apply(params, x)[:, 3:], attention.apply(params, swapped)[:, 3:], rtol=1e-4
    )
    rotated = attention.clone(frequencies=(1.0,))
    difference = rotated.apply(params, x)[:, 3:] - rotated.apply(params, swapped)[:, 3:]
    assert np.abs(difference).max() > 0.01
