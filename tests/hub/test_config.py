"""Options of a config that are missing, unknown or not supported."""

import pytest
from checkpoints import GPT2

from jchain.hub.families import make_architecture


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_layer": None}, "config: expected n_layer, got none"),
        (
            {"activation_function": "sine"},
            "activation_function = 'sine' is not supported, expected gelu",
        ),
        (
            {"scale_attn_by_inverse_layer_idx": True},
            "scale_attn_by_inverse_layer_idx = True is not supported",
        ),
        ({"new_option": 3}, "option new_option = 3 is not supported"),
    ],
)
def test_unsupported_options_are_rejected(change, message):
    with pytest.raises(ValueError, match=message):
        make_architecture(GPT2 | change, "config")


@pytest.mark.parametrize(
    "change", [{"_num_labels": 1, "_attn_implementation_autoset": True}, {"new_option": None}]
)
def test_irrelevant_options_change_nothing(change):
    assert make_architecture(GPT2 | change, "config") == make_architecture(GPT2, "config")
