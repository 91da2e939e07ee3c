"""Options of GPT-NeoX."""

import numpy as np

from jchain.hub.families import make_architecture

LLAMA = {
    "vocab_size": 11,
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 30,
    "num_attention_heads": 2,
    "is_llama_config": True,
}
ROPE = {"rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5}


def test_rotary_options_may_be_in_two_places():
    options = LLAMA | {
        "model_type": "gpt_neox",
        "hidden_size": 32,
        "rotary_pct": 0.25,
        "rotary_emb_base": 5000,
    }

    def find(changes):
        return make_architecture(options | changes, "config").blocks[0].frequencies

    assert find({}) == find({"partial_rotary_factor": 0.25, "rope_theta": 5000})
    np.testing.assert_allclose(find({}), [1, 5000**-0.5], rtol=1e-6)
    np.testing.assert_allclose(
        find({"rope_scaling": ROPE}), 5000 ** -np.array([0, 0.25, 0.5, 0.75]) / 2, rtol=1e-6
    )
    # As in transformers, the names of other families are ignored.
    for name, value in (("rope_theta", 10000.0), ("partial_rotary_factor", 0.5)):
        assert find({name: value}) == find({})
