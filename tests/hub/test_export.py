"""Checkpoint folders: what is refused, what is written. Parity with transformers stands in test_hub_parity.py."""

import contextlib
import inspect
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import make_tensors, write

import jchain as jc
from jchain.hub.places import describe

NAME = "transformer.h.1.mlp.c_fc.bias"


@pytest.mark.parametrize(
    ("change", "config", "message"),
    [
        ({NAME: None}, {}, f"expected tensors {NAME}, which are missing"),
        (
            {"transformer.extra": np.zeros(2, np.float32)},
            {},
            "tensors transformer.extra belong to no part of the model",
        ),
        (
            {NAME: np.zeros(7, np.float32)},
            {},
            rf"expected {NAME} of shape \[24\] by its config, got \[7\]",
        ),
        (
            {NAME: np.zeros(24, np.int8)},
            {},
            f"expected {NAME} of float32, bfloat16, float16, got I8",
        ),
        (
            {NAME: np.zeros(24, np.float16)},
            {},
            "expected weights of one dtype, got float16, float32: pass dtype=",
        ),
        ({}, {"model_type": "bert"}, "model_type = 'bert' is not supported, expected gpt2, llama"),
        ({}, {"model_type": None}, "expected model_type, got none"),
        ({}, {"n_embd": "six"}, "an option has a value that does not fit"),
        ({}, {"n_layer": None}, "expected n_layer, got none"),
        (
            {},
            {"activation_function": "sine"},
            "activation_function = 'sine' is not supported, expected gelu",
        ),
        (
            {},
            {"scale_attn_by_inverse_layer_idx": True},
            "scale_attn_by_inverse_layer_idx = True is not supported",
        ),
        ({}, {"new_option": 3}, "option new_option = 3 is not supported"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused(tmp_path, change, config, message):
    tensors = {
        name: tensor for name, tensor in (make_tensors() | change).items() if tensor is not None
    }
    with pytest.raises(ValueError, match=message):
        jc.hub.load(write(tmp_path / "model", tensors=tensors, config=config))


def test_files_that_are_missing_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="expected a checkpoint folder"):
        jc.hub.load(tmp_path / "none")
    folder = write(tmp_path / "model")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(
        FileNotFoundError, match="found pytorch_model.bin: only safetensors are read, never pickle"
    ):
        jc.hub.load(folder)
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {NAME: "../secret.safetensors"}})
    )
    with pytest.raises(
        ValueError, match=r"expected files of this folder, got '../secret.safetensors'"
    ):
        jc.hub.load(folder)
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {NAME: "model-2.safetensors"}})
    )
    with pytest.raises(FileNotFoundError, match=r"expected weights at .*model-2.safetensors"):
        jc.hub.load(folder)


def test_damaged_files_give_clear_errors_and_nothing_else(tmp_path):
    folder = write(tmp_path / "model")
    path = folder / "model.safetensors"
    whole, config = path.read_bytes(), (folder / "config.json").read_bytes()
    rng = np.random.default_rng(0)
    length = 8 + int.from_bytes(whole[:8], "little")
    for trial in range(100):
        damaged, options = bytearray(whole), bytearray(config)
        if trial % 4 == 0:
            damaged = damaged[: rng.integers(0, len(damaged))]
        elif trial % 4 == 1:
            options[rng.integers(0, len(options))] = rng.integers(0, 256)
        else:
            for place in rng.integers(0, length, 1 + trial % 3):
                damaged[place] = rng.integers(0, 256)
        path.write_bytes(damaged)
        (folder / "config.json").write_bytes(options)
        with contextlib.suppress(
            ValueError, FileNotFoundError
        ):  # of which each says what was expected, and where
            jc.hub.load(folder)


def test_damaged_shards_and_indices_give_clear_errors_and_nothing_else(tmp_path):
    source = write(tmp_path / "model")
    bank = jc.hub.load(source)
    folder = jc.hub.export(bank, bank.parents[0], source, tmp_path / "shards", max_shard_size=1000)
    index, shards = (
        folder / "model.safetensors.index.json",
        sorted(folder.glob("model-*.safetensors")),
    )
    assert len(shards) > 2
    whole, rng = {path: path.read_bytes() for path in (index, *shards)}, np.random.default_rng(0)
    for trial in range(60):
        for path, content in whole.items():
            path.write_bytes(content)
        damaged = bytearray(whole[index])
        if trial % 3 == 0:
            rng.choice(shards).unlink()
        elif trial % 3 == 1:
            first, second = rng.choice(len(shards), 2, replace=False)
            shards[first].write_bytes(whole[shards[second]])
        else:
            for place in rng.integers(0, len(damaged), 3):
                damaged[place] = rng.integers(32, 127)
        index.write_bytes(damaged)
        with contextlib.suppress(ValueError, FileNotFoundError):
            jc.hub.load(folder)
            assert trial % 3 == 2  # where what changed is not read


def test_nothing_is_overwritten_or_left_half_written(tmp_path, monkeypatch):
    folder = write(tmp_path / "model")
    bank = jc.hub.load(folder)
    with pytest.raises(ValueError, match="at least one block, got a head alone"):
        jc.hub.export(bank, [2], folder, tmp_path / "out")
    with pytest.raises(FileExistsError, match="expected no folder"):
        jc.hub.export(bank, [0, 2], folder, folder)
    other = write(tmp_path / "other", config={"layer_norm_epsilon": 0.1})
    with pytest.raises(ValueError, match="expected a bank of the blocks of"):
        jc.hub.export(bank, [0, 2], other, tmp_path / "out")

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr("jchain.hub.exporting.write_shards", fail)
    with pytest.raises(OSError, match="disk full"):
        jc.hub.export(bank, [0, 2], folder, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "other"]


def test_a_recipe_and_a_card_stand_beside_the_weights(tmp_path):
    folder = write(tmp_path / "model")
    (folder / "tokenizer.json").write_text("{}")
    for name in ("additional_chat_templates", "runs"):
        (folder / name).mkdir()
        (folder / name / "tools.jinja").write_text("{{ messages }}")
    bank = jc.hub.load(folder, name="tiny")
    out = jc.hub.export(
        bank, [0, 1, 1, 0, 2], folder, tmp_path / "out", facts={"loss on test": 1.25}
    )
    recipe = (out / "mergekit.yaml").read_text()
    assert recipe.count("layer_range") == 3
    assert "layer_range: [0, 2]" in recipe
    assert "merge_method: passthrough\ndtype: float32" in recipe
    card = (out / "README.md").read_text()
    assert (
        "`tiny/0 -> tiny/1 -> tiny/1 -> tiny/0`. Embeddings of tiny, output layer of tiny." in card
    )
    assert "| loss on test | 1.25 |" in card
    assert (out / "tokenizer.json").read_text() == "{}"
    assert [path.name for path in out.iterdir() if path.is_dir()] == ["additional_chat_templates"]
    assert (out / "additional_chat_templates" / "tools.jinja").read_text() == "{{ messages }}"
    assert jc.hub.load(out).num_layers == 4


def test_a_model_that_was_not_trained_has_all_its_weights(tmp_path):
    folder = tmp_path / "new"
    folder.mkdir()
    options = {
        "model_type": "gpt2",
        "vocab_size": 11,
        "n_embd": 6,
        "n_layer": 3,
        "n_head": 2,
        "n_positions": 8,
    }
    (folder / "config.json").write_text(json.dumps(options))
    bank = jc.hub.init(jax.random.key(0), folder, name="new")
    assert bank.names == ("new/0", "new/1", "new/2", "new/head")
    out = jc.hub.export(bank, bank.parents[0], folder, tmp_path / "out")
    assert "lm_head.weight" not in out.joinpath("model.safetensors").read_bytes()[:4096].decode(
        "latin-1"
    )
    again, ids = jc.hub.load(out, name="new"), jnp.array([[1, 2, 3]])
    np.testing.assert_array_equal(
        *(jc.apply_chain(b, np.array(b.parents[0]), ids) for b in (bank, again))
    )
    kernel = bank.layers[0].params["mlp"]["c_fc"]["weight"]
    assert not np.array_equal(kernel[0], kernel[1])
    other = jc.hub.init(jax.random.key(1), folder, pinned=(1, 1))
    assert other.num_layers == 1


@pytest.mark.parametrize(
    ("options", "name"),
    [
        (
            {"model_type": "gpt2", "n_embd": 8, "n_layer": 2, "n_head": 2, "n_positions": 8},
            "lm_head.weight",
        ),
        (
            {
                "model_type": "gpt_neox",
                "hidden_size": 8,
                "num_hidden_layers": 2,
                "num_attention_heads": 1,
            }
            | {"intermediate_size": 8, "tie_word_embeddings": True},
            "embed_out.weight",
        ),
    ],
)
def test_a_tied_output_layer_may_be_in_the_file_too(tmp_path, options, name):
    from safetensors.numpy import load_file, save_file

    folder = tmp_path / "new"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(options | {"vocab_size": 11}))
    bank = jc.hub.init(jax.random.key(0), folder)
    out = jc.hub.export(bank, bank.parents[0], folder, tmp_path / "out")
    tensors = load_file(out / "model.safetensors")
    assert name not in tensors
    (embeddings,) = (key for key in tensors if key.endswith(("wte.weight", "embed_in.weight")))
    save_file(tensors | {name: np.ones((11, 8), np.float32)}, out / "model.safetensors")
    with pytest.raises(
        ValueError,
        match=f"expected {name} to be {embeddings}, as tie_word_embeddings says, got other",
    ):
        jc.hub.load(out)
    save_file(tensors | {name: tensors[embeddings]}, out / "model.safetensors")
    again, ids = jc.hub.load(out), jnp.array([[1, 2]])
    np.testing.assert_array_equal(
        *(jc.apply_chain(b, np.array(b.parents[0]), ids) for b in (bank, again))
    )


def test_masks_of_other_dtypes_are_not_read(tmp_path):
    tensors = make_tensors() | {"transformer.h.0.attn.bias": np.ones((1, 1, 8, 8), bool)}
    folder = write(
        tmp_path / "model",
        tensors=tensors,
        config={"_num_labels": 1, "_attn_implementation_autoset": True},
    )
    assert jc.hub.load(folder).num_layers == 2
    with pytest.raises(
        ValueError, match="expected a dtype of float32, bfloat16, float16, got int32"
    ):
        jc.hub.load(folder, dtype=jnp.int32)


def test_blocks_that_a_config_tells_apart_by_number_stay_what_they_were(tmp_path):
    options = {
        "model_type": "qwen2",
        "vocab_size": 11,
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 2,
    }
    options |= {
        "num_attention_heads": 2,
        "use_sliding_window": True,
        "sliding_window": 2,
        "max_window_layers": 2,
    }
    folder = tmp_path / "new"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(options))
    bank = jc.hub.init(jax.random.key(0), folder)
    chain, ids = np.array([0, 1, 0, 1, 2]), jnp.arange(8)[None]
    again = jc.hub.load(jc.hub.export(bank, chain, folder, tmp_path / "out"))
    expected = jc.apply_chain(bank, chain, ids)
    np.testing.assert_allclose(
        jc.apply_chain(again, np.array(again.parents[0]), ids), expected, rtol=1e-5, atol=1e-6
    )


def test_recipes_say_what_mergekit_cannot_make(tmp_path):
    folders = [write(tmp_path / f"m{i}", tensors=make_tensors(seed=i)) for i in range(2)]
    bank = jc.hub.load(folders[0])
    bank = bank.replace([1], [jax.tree.map(lambda leaf: 2 * leaf, bank.get_params(1))])
    out = jc.hub.export(bank, [0, 1, 2], folders[0], tmp_path / "out")
    assert "in which m0/1 have other weights" in (out / "mergekit.yaml").read_text()
    assert "Trained on since: m0/1." in (out / "README.md").read_text()
    many = jc.hub.load_many(folders)
    with pytest.raises(
        ValueError, match="expected a folder, or the folder of each model by name, got"
    ):
        inspect.unwrap(jc.hub.export)(many, [0, 2, 5], folders, tmp_path / "other")
    with pytest.raises(
        ValueError, match="expected the folder of each model by name, m0, m1, got none of m1"
    ):
        jc.hub.export(many, [0, 2, 5], folders[0], tmp_path / "other")


def test_weights_of_another_dtype_are_said_to_be_so(tmp_path):
    folder = write(tmp_path / "model", config={"torch_dtype": "float32"})
    bank = jc.hub.load(folder, dtype=jnp.bfloat16)
    out = jc.hub.export(bank, bank.parents[0], folder, tmp_path / "out")
    assert json.loads((out / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert "dtype: bfloat16" in (out / "mergekit.yaml").read_text()


LLAMA = {
    "vocab_size": 11, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 30, "num_attention_heads": 2, "is_llama_config": True
}  # fmt: skip
ROPE = {"rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5}


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
    ],
)
def test_windows_that_a_config_does_not_say_are_those_of_the_family(options, windows):
    assert [block.window for block in describe(LLAMA | options, "config").blocks] == windows


def test_rotary_options_of_gpt_neox_may_stand_in_two_places():
    options = LLAMA | {
        "model_type": "gpt_neox",
        "hidden_size": 32,
        "rotary_pct": 0.25,
        "rotary_emb_base": 5000,
    }

    def find(changes):
        return describe(options | changes, "config").blocks[0].frequencies

    assert find({}) == find({"partial_rotary_factor": 0.25, "rope_theta": 5000})
    np.testing.assert_allclose(find({}), [1, 5000**-0.5], rtol=1e-6)
    np.testing.assert_allclose(
        find({"rope_scaling": ROPE}), 5000 ** -np.array([0, 0.25, 0.5, 0.75]) / 2, rtol=1e-6
    )
    for name, value in (("rope_theta", 10000.0), ("partial_rotary_factor", 0.5)):
        with pytest.raises(ValueError, match=f"{name} = {value} is not supported, expected"):
            find({name: value})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model_type": "llama", "rope_scaling": ROPE}, "rope_scaling: partial_rotary_factor = 0.5 is not supported"),
        ({"model_type": "llama", "rope_scaling": "linear"}, "rope_scaling = 'linear' is not supported, expected an object"),
        ({"model_type": "vit", "image_size": 8, "patch_size": [4, 2]}, r"patch_size = \[4, 2\] is not supported, expected squares"),
    ],
)  # fmt: skip
def test_options_that_cannot_be_followed_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        describe(LLAMA | options, "config")
    if options["model_type"] == "vit":
        assert describe(
            {
                k: v
                for k, v in (LLAMA | options | {"patch_size": [4, 4]}).items()
                if k != "vocab_size"
            },
            "config",
        )


def test_a_whole_file_comes_before_shards(tmp_path):
    from safetensors.numpy import save_file

    folder, other = write(tmp_path / "model"), make_tensors(seed=1)
    save_file(other, folder / "old.safetensors")
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": dict.fromkeys(other, "old.safetensors")})
    )
    bank = jc.hub.load(folder)
    np.testing.assert_array_equal(
        bank.stem_params["wte"]["weight"], make_tensors()["transformer.wte.weight"]
    )
