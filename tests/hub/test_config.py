"""Options of a config that are missing, unknown or not supported."""

import json

import pytest
from checkpoints import GPT2, write

import jchain as jc
from jchain.hub.families import make_architecture


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_layer": None}, "config: expected n_layer, got none"),
        (
            {"activation_function": "sine"},
            "activation_function = 'sine' is not supported, expected gelu",
        ),
        ({"scale_attn_weights": "no"}, "scale_attn_weights = 'no' is not supported"),
        ({"add_cross_attention": True}, "add_cross_attention = True is not supported"),
        ({"is_causal": False}, "is_causal = False is not supported, expected True"),
        ({"is_causal": None}, "is_causal = None is not supported, expected True"),
        (
            {"quantization_config": {"quant_method": "awq"}},
            "quantization_config = {'quant_method': 'awq'} is not supported, because the weights "
            "are quantized: expected a checkpoint of float weights",
        ),
        ({"compression_config": {"format": "int"}}, "the weights are quantized"),
        ({"pruned_heads": {"0": [1]}}, "pruned_heads = {'0': .1.} is not supported"),
        ({"per_layer_config": {"0": {"n_inner": 3}}}, "per_layer_config = .* is not supported"),
        ({"transformers_weights": "b.safetensors"}, "transformers_weights = 'b.safetensors' is"),
        ({"n_layer": 10**6}, "n_layer = 1000000 is not supported, expected 1 to 10,000 blocks"),
        ({"n_layer": 2.5}, "n_layer = 2.5 is not supported"),
        ({"n_positions": 10**18}, "n_positions = 1000000000000000000 is not supported"),
        ({"n_embd": float("nan")}, "n_embd = nan is not supported"),
    ],
)
def test_unsupported_options_are_rejected(change, message):
    with pytest.raises(ValueError, match=message):
        make_architecture(GPT2 | change, "config")


@pytest.mark.parametrize(
    "change",
    [
        {"_num_labels": 1, "_attn_implementation_autoset": True},
        {"new_option": None},
        # Options that matter in other families, and a misspelt one.
        {"new_option": 3, "rope_scaling": {"rope_type": "x"}, "sliding_window": 3, "n_iner": 7},
        {"quantization_config": None, "pruned_heads": {}, "per_layer_config": {}},
        # The names of other families, which transformers reads as well.
        {"hidden_size": 6, "num_hidden_layers": 2, "num_attention_heads": 2},
    ],
)
def test_irrelevant_options_change_nothing(change):
    found = make_architecture(GPT2 | change, "config")
    assert found._replace(depth_option="n_layer") == make_architecture(GPT2, "config")


def test_names_of_other_families_take_precedence_in_gpt2():
    found = make_architecture(GPT2 | {"hidden_size": 12, "num_hidden_layers": 1}, "config")
    assert found.stem.features == 12
    assert len(found.blocks) == 1
    assert found.depth_option == "num_hidden_layers"


def test_a_checkpoint_has_at_most_as_many_blocks_as_tensors(tmp_path):
    folder = write(tmp_path / "model")
    options = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(options | {"n_layer": 5000}))
    with pytest.raises(ValueError, match=r"model/config.json: n_layer = 5000 is not supported"):
        jc.hub.load(folder)


def test_a_head_has_no_more_features_than_any_model(tmp_path):
    options = {
        "model_type": "llama",
        "vocab_size": 11,
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "head_dim": 10**9,
    }
    with pytest.raises(ValueError, match="head_dim = 1000000000 is not supported"):
        make_architecture(options, "config")
