"""Options of Llama, Mistral and Qwen2."""

import pytest

from jchain.hub.families import make_architecture

LLAMA = {
    "vocab_size": 11,
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 30,
    "num_attention_heads": 2,
    "is_llama_config": True,
}
TYPES = ["sliding_attention", "full_attention"] * 15


@pytest.mark.parametrize(
    ("options", "windows"),
    [
        ({"model_type": "mistral"}, [4096] * 30),
        ({"model_type": "mistral", "sliding_window": None}, [None] * 30),
        (
            {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 7},
            [None] * 28 + [7] * 2,
        ),
        ({"model_type": "llama"}, [None] * 30),
        ({"model_type": "mistral", "layer_types": TYPES, "sliding_window": 5}, [5, None] * 15),
        ({"model_type": "ministral", "sliding_window": 5}, [5] * 30),
        ({"model_type": "smollm3", "layer_types": TYPES, "sliding_window": 5}, [5, None] * 15),
    ],
)
def test_windows_have_the_defaults_of_their_family(options, windows):
    assert [
        block.window for block in make_architecture(LLAMA | options, "config").blocks
    ] == windows


@pytest.mark.parametrize(
    ("rope", "message"),
    [
        (
            {"rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5},
            "rope_scaling: partial_rotary_factor = 0.5 is not supported",
        ),
        ("linear", "rope_scaling = 'linear' is not supported, expected an object"),
    ],
)
def test_unsupported_rotary_options_are_rejected(rope, message):
    with pytest.raises(ValueError, match=message):
        make_architecture(LLAMA | {"model_type": "llama", "rope_scaling": rope}, "config")


@pytest.mark.parametrize(
    ("options", "is_rotated"),
    [
        ({}, [True, True, True, False, True]),
        ({"no_rope_layer_interval": 2}, [True, False, True, False, True]),
        ({"no_rope_layers": [0, 1, 1, 0, 1, 1, 1]}, [False, True, True, False, True]),
    ],
)
def test_some_blocks_of_smollm3_have_no_positions(options, is_rotated):
    options |= {"model_type": "smollm3", "num_hidden_layers": 5}
    blocks = make_architecture(LLAMA | options, "config").blocks
    assert [bool(block.frequencies) for block in blocks] == is_rotated
    with pytest.raises(ValueError, match=r"no_rope_layers = .1. is not supported, expected 5 of"):
        make_architecture(LLAMA | options | {"no_rope_layers": [1]}, "config")
