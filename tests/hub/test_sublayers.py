"""Attention and MLP as layers of their own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import VIT, make_tensors, write, write_config

import jchain as jc

LLAMA = {
    "model_type": "llama",
    "vocab_size": 11,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
NEOX = {
    "model_type": "gpt_neox",
    "vocab_size": 11,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "use_parallel_residual": False,
}
IDS = jnp.array([[1, 2, 3, 4]])


def load(folder, options, **arguments):
    return jc.hub.random_bank(jax.random.key(0), write_config(folder, options), **arguments)


@pytest.mark.parametrize("options", [LLAMA, NEOX, VIT])
def test_all_sublayers_in_order_compute_the_model(tmp_path, options):
    whole, split = (load(tmp_path, options, sublayers=flag) for flag in (False, True))
    assert split.num_layers == 6
    assert split.names[:3] == ("model/0/attention", "model/0/mlp", "model/1/attention")
    assert split.origins[1].startswith("mlp of block 0 of 3")
    assert split.parents == ((*range(7),),)
    x = IDS if options is not VIT else jax.random.normal(jax.random.key(1), (2, 8, 8, 1))
    expected = jc.apply_chain(whole, np.arange(4), x)
    np.testing.assert_allclose(
        jc.apply_chain(split, np.arange(7), x), expected, rtol=1e-5, atol=1e-6
    )
    blocks = jc.apply_chain(whole, np.array([0, 2, 3]), x)
    np.testing.assert_allclose(
        jc.apply_chain(split, np.array([0, 1, 4, 5, 6]), x), blocks, rtol=1e-5, atol=1e-6
    )


def test_a_sublayer_adds_its_own_branch(tmp_path):
    bank = load(tmp_path, LLAMA, sublayers=True)
    hidden = bank.embed(IDS)

    def norm(x, weight):
        x = np.asarray(x, np.float64)
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * np.asarray(weight, np.float64)

    mlp = bank.get_params(1)
    gate, up, down = (
        np.asarray(mlp["mlp"][name]["weight"], np.float64)
        for name in ("gate_proj", "up_proj", "down_proj")
    )
    x = norm(hidden, mlp["post_attention_layernorm"]["weight"])
    opened = x @ gate.T
    expected = np.asarray(hidden) + (opened / (1 + np.exp(-opened)) * (x @ up.T)) @ down.T
    group, _ = bank.find(1)
    np.testing.assert_allclose(
        group.module.apply({"params": mlp}, hidden), expected, rtol=1e-5, atol=1e-6
    )
    assert {*bank.get_params(0)} == {"input_layernorm", "self_attn"}
    assert {*mlp} == {"post_attention_layernorm", "mlp"}


def test_parallel_blocks_are_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match="got blocks of gpt_neox that apply them in parallel"):
        load(tmp_path, NEOX | {"use_parallel_residual": True}, sublayers=True)


def test_attention_and_mlp_alternate_if_asked(tmp_path):
    bank = load(tmp_path, LLAMA, sublayers=True, alternate=True)
    assert bank.validate([0, 3, 4, 1, 6]).tolist() == [0, 3, 4, 1, 6]
    for chain in ([1, 0, 6], [0, 2, 6], [0, 6]):
        with pytest.raises(ValueError, match="expected a chain whose layers follow each other"):
            bank.validate(chain)
    problem = jc.Problem(bank, jc.Batch(IDS[:, :-1], IDS[:, 1:]), max_layers=4)
    assert problem.space.num_chains == 1 + 3 * 3 + 3**4
    chains, _ = jc.evaluate_all(problem)
    assert len(chains) == problem.space.num_chains
    with pytest.raises(ValueError, match="expected alternate=True only with sublayers=True"):
        load(tmp_path, LLAMA, alternate=True)


def test_pinned_blocks_stay_whole_and_models_mix(tmp_path):
    folders = [
        write(tmp_path / name, tensors=make_tensors(seed=seed, depth=4), config={"n_layer": 4})
        for seed, name in enumerate("ab")
    ]
    whole, split = (jc.hub.load_many(folders, pinned=(1, 1), sublayers=s) for s in (False, True))
    assert whole.names[:4] == ("a/1", "a/2", "b/1", "b/2")
    assert split.names[4:9:2] == ("b/1/attention", "b/2/attention", "b/embeddings")
    for chain, parts in [
        ([0, 1, 5], [0, 1, 2, 3, 9]),
        ([4, 3, 0, 6], [8, 6, 7, 0, 1, 10]),
    ]:
        np.testing.assert_allclose(
            jc.apply_chain(split, np.array(parts), IDS),
            jc.apply_chain(whole, np.array(chain), IDS),
            rtol=1e-5,
            atol=1e-6,
        )


def test_a_saved_bank_of_sublayers_is_the_same(tmp_path):
    bank = load(tmp_path, LLAMA, sublayers=True, alternate=True)
    bank.save(tmp_path / "bank.safetensors")
    again = jc.Bank.load(tmp_path / "bank.safetensors")
    assert [group.stages for group in again.layers] == [(0, 1), (1, 0)]
    np.testing.assert_array_equal(
        jc.apply_chain(again, np.arange(7), IDS), jc.apply_chain(bank, np.arange(7), IDS)
    )


def export(bank, chain, folder, out):
    """Export a chain, and return the folder and the bank of its blocks."""
    out = jc.hub.export(bank, chain, folder, out)
    again = jc.hub.load(out)
    np.testing.assert_allclose(
        jc.apply_chain(again, np.array(again.parents[0]), IDS),
        jc.apply_chain(bank, np.array(chain), IDS),
        rtol=1e-5,
        atol=1e-6,
    )
    return out, again


@pytest.mark.parametrize("options", [LLAMA, NEOX])
def test_attention_or_mlp_that_stands_alone_is_exported_with_zeros(tmp_path, options):
    folder = write_config(tmp_path / "model", options)
    bank = load(folder, options, sublayers=True)
    out, again = export(bank, [0, 1, 2, 5, 4, 5, 3, 6], folder, tmp_path / "out")
    # Blocks: 0, attention of 1 with mlp of 2, 2, mlp of 1.
    assert again.num_layers == 4
    assert any(np.any(leaf) for leaf in jax.tree.leaves(again.get_params(3)["mlp"]))
    params = again.get_params(3)
    attention = params.keys() & {"self_attn", "attention", "input_layernorm"}
    assert len(attention) == 2
    for child in attention:
        assert not any(np.any(leaf) for leaf in jax.tree.leaves(params[child]))
    card, recipe = (out / "README.md").read_text(), (out / "mergekit.yaml").read_text()
    assert (
        "`model/0 -> model/1 with mlp of model/2 -> model/2 -> model/1 without attention`" in card
    )
    assert "without attention: 1" in card
    assert "mergekit does not join attention and MLP of different blocks, as in model/1" in recipe
    child = "self_attn" if options is LLAMA else "attention"
    assert f"            - filter: {child}.\n              value: 0.0\n" in recipe
    assert recipe.count("layer_range") == 2  # 0 to 2, and 1 without attention


def test_chains_of_sublayers_of_two_models_are_exported(tmp_path):
    folders = {
        name: write(tmp_path / name, tensors=make_tensors(seed=seed))
        for seed, name in enumerate("ab")
    }
    bank = jc.hub.load_many([*folders.values()], sublayers=True)
    names = ["a/0/attention", "b/0/mlp", "b/1/attention", "a/head"]
    chain = [bank.names.index(name) for name in names]
    out, _ = export(bank, chain, folders, tmp_path / "out")
    assert "a/0 with mlp of b/0 -> b/1 without mlp" in (out / "README.md").read_text()


def test_recipes_and_starts_are_those_of_sublayers(tmp_path):
    bank = load(tmp_path, LLAMA, sublayers=True)
    problem = jc.Problem(bank, jc.Batch(IDS[:, :-1], IDS[:, 1:]), max_layers=6)
    found = jc.hub.recipes.find_chains(problem, bank.parents[0], 4)
    assert found["last blocks dropped"] == [0, 1, 2, 3, 6]
    assert {len(chain) for chain in found.values()} == {5}
    influence = jc.hub.recipes.compute_influence(bank, bank.parents[0], IDS)
    assert influence.shape == (6,)
    starts = jc.hub.recipes.find_starts(bank, 5)
    assert len(starts) == 6


@pytest.mark.parametrize("has_sublayers", [False, True])
def test_mixed_layers_are_exported_as_weights_and_in_a_linear_recipe(tmp_path, has_sublayers):
    folders = {
        name: write(tmp_path / name, tensors=make_tensors(seed=seed))
        for seed, name in enumerate("ab")
    }
    bank = jc.hub.load_many([*folders.values()], sublayers=has_sublayers)
    pairs = [(2, 6), (3, 7)] if has_sublayers else [(1, 3)]  # block 1 of each model
    bank = bank.blend([(*pair, 0.25) for pair in pairs])
    first = [0, 1] if has_sublayers else [0]
    num = bank.num_layers
    chain = [*first, *range(num - len(pairs), num), num]
    out, again = export(bank, chain, folders, tmp_path / "out")
    names = ("transformer.h.1.mlp.c_fc.weight",)
    a, b = (make_tensors(seed=seed)[names[0]] for seed in range(2))
    np.testing.assert_allclose(
        again.get_params(1)["mlp"]["c_fc"]["weight"], 0.75 * a + 0.25 * b, rtol=1e-5, atol=1e-6
    )
    recipe = (out / "mergekit.yaml").read_text()
    assert "merge_method: linear" in recipe
    assert "          weight: 0.75\n" in recipe
    assert "          weight: 0.25\n" in recipe
    assert recipe.count("layer_range: [1, 2]") == 2
    assert "~ b/1" in (out / "README.md").read_text()


def test_scaled_blocks_and_other_mixes_are_exported_with_a_comment(tmp_path):
    folder = write(tmp_path / "a")
    bank = jc.hub.load(folder).scale([(0, 0.5)]).blend([(0, 1, 0.5)], method="slerp")
    out, again = export(bank, [2, 3, 4], folder, tmp_path / "out")
    np.testing.assert_allclose(
        again.get_params(0)["attn"]["c_proj"]["weight"],
        0.5 * make_tensors()["transformer.h.0.attn.c_proj.weight"],
    )
    recipe = (out / "mergekit.yaml").read_text()
    assert "does not make the weights of (a/0 x 0.5), (a/0 ~ a/1 (slerp 0.5))" in recipe
