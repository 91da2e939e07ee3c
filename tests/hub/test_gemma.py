"""Options of Gemma."""

import pytest
from fuzz.targets import CONFIGS

from jchain.hub.families import make_architecture


def find(family, change):
    return make_architecture(CONFIGS[family] | change, "config").blocks


def test_gelu_means_its_approximation_in_gemma_1_only():
    assert find("gemma", {})[0].mlp.activation == "gelu_pytorch_tanh"
    assert find("gemma2", {"hidden_activation": "gelu"})[0].mlp.activation == "gelu"


@pytest.mark.parametrize(
    ("family", "change", "windows"),
    [
        ("gemma", {}, [None] * 4),
        ("gemma2", {}, [4, None, 4, None]),
        ("gemma3_text", {}, [4, None, 4, None]),
        ("gemma3_text", {"sliding_window_pattern": 3}, [4, 4, None, 4]),
        ("gemma3_text", {"layer_types": 4 * ["full_attention"]}, [None] * 4),
    ],
)
def test_some_blocks_have_windows(family, change, windows):
    blocks = find(family, change | {"num_hidden_layers": 4})
    assert [block.self_attn.window for block in blocks] == windows


def test_blocks_with_windows_have_frequencies_of_their_own():
    """Scaling changes the others only, and newer files list the options of both."""
    local, whole = (block.self_attn.frequencies for block in find("gemma3_text", {}))
    assert local == pytest.approx((1, 1e4**-0.5))
    assert whole == pytest.approx((0.125, 1e6**-0.5 / 8))
    both = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    assert find("gemma3_text", {"rope_parameters": both, "rope_scaling": None}) == find(
        "gemma3_text", {}
    )


def test_models_of_text_with_images_are_rejected_by_name():
    options = {"model_type": "gemma3", "text_config": CONFIGS["gemma3_text"]}
    with pytest.raises(
        ValueError,
        match="model_type = 'gemma3' is not supported, expected a model of text alone, without",
    ):
        make_architecture(options, "config")
