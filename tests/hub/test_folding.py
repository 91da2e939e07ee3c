"""Scales that differ from block to block and are folded into weights."""

import json

import jax
import jax.numpy as jnp
import numpy as np
from checkpoints import GPT2, write, write_config

import jchain as jc

OPTION = "scale_attn_by_inverse_layer_idx"


def test_queries_of_block_i_are_divided_by_i_plus_1(tmp_path):
    plain = jc.hub.load(write(tmp_path / "plain"))
    scaled = jc.hub.load(write(tmp_path / "scaled", config={OPTION: True}))
    assert len(scaled.layers) == 1  # the blocks share one module
    for token, divisor in ((0, 1), (1, 2)):
        before, after = (bank.get_params(token) for bank in (plain, scaled))
        for name in ("weight", "bias"):
            own, folded = (np.asarray(p["attn"]["c_attn"][name]) for p in (before, after))
            np.testing.assert_allclose(folded[..., :6], own[..., :6] / divisor, rtol=1e-6)
            np.testing.assert_array_equal(folded[..., 6:], own[..., 6:])
        np.testing.assert_array_equal(
            before["mlp"]["c_fc"]["weight"], after["mlp"]["c_fc"]["weight"]
        )


def test_exports_turn_the_option_off(tmp_path):
    """Blocks keep their scale if a chain moves them."""
    folder = write(tmp_path / "model", config={OPTION: True})
    bank, ids = jc.hub.load(folder), jnp.array([[1, 2, 3, 4]])
    out = jc.hub.export(bank, [1, 0, 1, 2], folder, tmp_path / "out")
    assert json.loads((out / "config.json").read_text())[OPTION] is False
    again = jc.hub.load(out)
    np.testing.assert_array_equal(
        jc.apply_chain(again, np.arange(4), ids), jc.apply_chain(bank, np.array([1, 0, 1, 2]), ids)
    )


def test_half_precision_is_rounded_once(tmp_path):
    folder = write(tmp_path / "model", config={OPTION: True, "n_layer": 2})
    bank = jc.hub.load(folder, dtype=jnp.bfloat16)
    wide = jc.hub.load(write(tmp_path / "plain"), dtype=jnp.bfloat16)
    own, folded = (np.asarray(b.get_params(1)["attn"]["c_attn"]["bias"]) for b in (wide, bank))
    expected = (own[:6].astype(np.float32) / 2).astype(own.dtype)
    np.testing.assert_array_equal(folded[:6], expected)


def test_random_banks_are_scaled_too(tmp_path):
    banks = [
        jc.hub.random_bank(jax.random.key(0), write_config(tmp_path / name, GPT2 | options))
        for name, options in (("plain", {}), ("scaled", {OPTION: True}))
    ]
    weights = [np.asarray(bank.get_params(1)["attn"]["c_attn"]["weight"]) for bank in banks]
    np.testing.assert_allclose(weights[1][:, :6], weights[0][:, :6] / 2, rtol=1e-6)
