"""Configs from the metadata of GGUF files."""

import gguf
import numpy as np
import pytest
from gguf_files import CONFIGS, convert, read_options

import jchain as jc
from jchain.hub.opening import open_checkpoint


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.add_expert_count(8), "llama.expert_count to be 0 or none, .* got 8"),
        (lambda w: w.add_logit_scale(0.5), "llama.logit_scale to be 0 or none"),
        (lambda w: w.add_causal_attention(False), "llama.attention.causal to be True or none"),
        (lambda w: w.add_type("adapter"), "is not a model, but a LoRA adapter: merge"),
        (lambda w: w.add_type("mmproj"), "is not a model, but the vision part"),
        (lambda w: w.add_uint16("split.count", 3), "is one of 3 parts of a model: join them"),
        (
            lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE),
            "rope.scaling.type to be none, linear, or yarn, got 'longrope'",
        ),
        (
            lambda w: w.add_float32("llama.rope.scaling.attn_factor", 2.0),
            "llama.rope.scaling.attn_factor to be none, got 2.0",
        ),
        (
            lambda w: w.add_tensor("blk.0.attn_sinks.weight", np.ones(4, np.float32)),
            "expected only tensors of the model .* got blk.0.attn_sinks.weight",
        ),
    ],
)
def test_what_would_change_outputs_is_refused(tmp_path, change, message):
    file = convert(tmp_path, change=change)
    with pytest.raises(ValueError, match=message) as caught:
        jc.hub.load(file)
    assert str(file) in str(caught.value)


@pytest.mark.parametrize("missing", ["block_count", "context_length", "attention.head_count"])
def test_a_missing_option_is_named(tmp_path, missing):
    def remove(writer):
        del writer.kv_data[0][f"llama.{missing}"]

    with pytest.raises(ValueError, match=f"expected llama.{missing} to be .* got none"):
        jc.hub.load(convert(tmp_path, change=remove))


def test_other_parts_of_the_config_are_those_of_the_source(tmp_path):
    for case in CONFIGS:
        folder = tmp_path / case.replace(" ", "-")
        folder.mkdir()
        file = convert(folder, case)
        found, expected = open_checkpoint(file).config, read_options(folder / "model")
        del expected["dtype"]
        # A window makes a Llama a Mistral; older options name the vocabulary by its tensor.
        assert {key: found.get(key) for key in expected} == expected, case


def test_counts_of_each_block_must_be_equal(tmp_path):
    def repeat(counts):
        return lambda w: w.add_array("llama.attention.head_count_kv", counts)

    def convert_with(counts):
        def change(writer):
            del writer.kv_data[0]["llama.attention.head_count_kv"]
            repeat(counts)(writer)

        return convert(tmp_path, change=change)

    assert open_checkpoint(convert_with([2, 2])).config["num_key_value_heads"] == 2
    with pytest.raises(ValueError, match="head_count_kv to be an integer .* the same for all"):
        jc.hub.load(convert_with([2, 1]))


def test_arrays_in_place_of_one_value_are_refused(tmp_path):
    for key in ("llama.rope.scaling.type", "llama.attention.sliding_window", "general.type"):
        with pytest.raises(ValueError, match=f"expected one value of {key}, got"):
            jc.hub.load(convert(tmp_path, change=lambda w, key=key: w.add_array(key, [1, 2])))
