"""Mixtures of experts, compared with a loop over tokens in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import write_config
from fuzz.targets import CONFIGS

import jchain as jc
from jchain.hub.families import make_architecture
from jchain.hub.qwen3_moe import MixtureMLP

MOE = CONFIGS["qwen3_moe"]


@pytest.mark.parametrize("is_normalized", [True, False])
def test_each_token_uses_the_experts_with_the_largest_shares(is_normalized):
    mlp = MixtureMLP(5, 2, 3, "relu", is_normalized)
    x = jax.random.normal(jax.random.key(0), (2, 4, 6))
    params = mlp.init(jax.random.key(1), x)
    params = jax.tree.map(lambda leaf: 20 * leaf, params)
    wide = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params["params"])
    expected = np.zeros((2, 4, 6))
    for place in np.ndindex(2, 4):
        token = np.asarray(x[place], np.float64)
        odds = np.exp(wide["gate"]["weight"] @ token)
        shares = odds / odds.sum()
        chosen = np.argsort(-shares)[:2]
        total = shares[chosen].sum() if is_normalized else 1.0
        for expert in chosen:
            gate, up, down = (
                wide["experts"][str(expert)][f"{name}_proj"]["weight"]
                for name in ("gate", "up", "down")
            )
            hidden = np.maximum(gate @ token, 0) * (up @ token)
            expected[place] += shares[expert] / total * (down @ hidden)
    np.testing.assert_allclose(mlp.apply(params, x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "is_dense"),
    [
        ({"mlp_only_layers": []}, [False, False]),
        ({"mlp_only_layers": [1]}, [False, True]),
        ({"mlp_only_layers": None, "decoder_sparse_step": 2}, [True, False]),
        ({"mlp_only_layers": [1], "decoder_sparse_step": 2}, [True, True]),
        ({"num_experts": 0}, [True, True]),
        # The name that newer files have, which takes precedence.
        ({"mlp_only_layers": [], "num_local_experts": 0}, [True, True]),
    ],
)
def test_some_blocks_have_one_mlp(change, is_dense):
    blocks = make_architecture(MOE | change, "config").blocks
    assert [not isinstance(block.mlp, MixtureMLP) for block in blocks] == is_dense


@pytest.mark.slow
def test_exports_list_the_blocks_with_one_mlp_by_their_new_indices(tmp_path):
    options = MOE | {"mlp_only_layers": [], "decoder_sparse_step": 2}
    folder = write_config(tmp_path / "model", options)
    bank, ids = jc.hub.random_bank(jax.random.key(0), folder), jnp.arange(8)[None]
    chain = np.array([1, 1, 0, 2])
    again = jc.hub.load(jc.hub.export(bank, chain, folder, tmp_path / "out"))
    np.testing.assert_allclose(
        jc.apply_chain(again, np.arange(4), ids), jc.apply_chain(bank, chain, ids), rtol=1e-5
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_experts": 10**6}, "num_experts = 1000000 is not supported, expected 1 to 10,000 "),
        ({"mlp_only_layers": "1"}, "mlp_only_layers = '1' is not supported, expected a list of"),
        ({"decoder_sparse_step": 0}, "decoder_sparse_step = 0 is not supported, expected a number"),
        ({"num_experts_per_tok": 7}, "an option has an invalid value"),
    ],
)
def test_unsupported_options_are_rejected(change, message):
    with pytest.raises(ValueError, match=message):
        make_architecture(MOE | change, "config")
