"""Chains as plain models."""

import jax
import numpy as np
import pytest
from checkpoints import make_tensors, write

import jchain as jc
from jchain.hub.chain_model import Change, parse_layer_name, unfold_chain
from jchain.hub.families import read_architecture


def test_a_chain_is_its_pinned_blocks_and_the_blocks_after_the_last_restart(tmp_path):
    folders = [
        write(tmp_path / f"m{i}", config={"n_layer": 3}, tensors=make_tensors(3, i))
        for i in range(2)
    ]
    bank = jc.hub.load_many(folders, pinned=(1, 1))
    assert bank.names == ("m0/1", "m1/1", "m1/embeddings", "m0/head", "m1/head")
    architecture = read_architecture(folders[0])
    model = unfold_chain(bank, [0, 2, 0, 1, 3], architecture)
    places = [(block.source, block.position) for block in model.blocks]
    assert places == [("m1", 0), ("m0", 1), ("m1", 1), ("m0", 2)]
    assert (model.stem_source, model.head_source, model.dtype) == ("m1", "m0", "float32")
    for block in model.blocks:
        tensors = make_tensors(3, int(block.source[1:]))
        expected = tensors[f"transformer.h.{block.position}.mlp.c_fc.weight"]
        np.testing.assert_array_equal(block.params["mlp"]["c_fc"]["weight"], expected)
    other = bank.replace([2], [jax.tree.map(lambda leaf: leaf / 2, bank.get_params(2))])
    with pytest.raises(ValueError, match=r"m1/embeddings to be .* one model, got shares \[0.5\]"):
        unfold_chain(other, [2, 0, 3], architecture)


def test_names_of_blocks_are_parsed():
    assert parse_layer_name("a/b/12") == ("a/b", 12, None, None)
    assert parse_layer_name("model/3+14") == ("model", 3, None, None)
    assert parse_layer_name("a/b/3/mlp+14") == ("a/b", 3, "mlp", None)
    with pytest.raises(ValueError, match="expected the name of a block, such as model/3, got 'x'"):
        parse_layer_name("x")


def test_names_of_mixed_and_scaled_layers_are_parsed():
    name = "a/3/mlp ~ b/5/mlp (linear 0.25)+14"
    assert parse_layer_name(name) == ("a", 3, "mlp", Change(name, ("b", 5), 0.25))
    name = "a/3 ~ b/3 (slerp 0.5)"
    assert parse_layer_name(name) == ("a", 3, None, Change(name, ("b", 3), None))
    assert parse_layer_name("a/3 x 0.5") == ("a", 3, None, Change("a/3 x 0.5", None, None))
