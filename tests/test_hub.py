"""Checkpoint folders: what is refused, what is written. Parity with transformers stands in test_hub_parity.py."""

import contextlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jchain as jc


def write(folder, *, tensors=None, config=None, name="model.safetensors"):
    """A tiny GPT-2 without torch."""
    from safetensors.numpy import save_file

    folder.mkdir(exist_ok=True)
    options = {"model_type": "gpt2", "vocab_size": 11, "n_embd": 6, "n_layer": 2, "n_head": 2, "n_positions": 8}
    (folder / "config.json").write_text(json.dumps(options | (config or {})))
    if tensors is None:
        tensors = make_tensors()
    save_file(tensors, folder / name)
    return folder


def make_tensors(depth=2, seed=0, vocabulary=11, positions=8):
    rng = np.random.default_rng(seed)
    block = {
        "ln_1.weight": 6, "ln_1.bias": 6, "ln_2.weight": 6, "ln_2.bias": 6, "attn.c_attn.weight": (6, 18), "attn.c_attn.bias": 18,
        "attn.c_proj.weight": (6, 6), "attn.c_proj.bias": 6, "mlp.c_fc.weight": (6, 24), "mlp.c_fc.bias": 24,
        "mlp.c_proj.weight": (24, 6), "mlp.c_proj.bias": 6,
    }  # fmt: skip
    shapes = {"transformer.wte.weight": (vocabulary, 6), "transformer.wpe.weight": (positions, 6)}
    shapes |= {"transformer.ln_f.weight": 6, "transformer.ln_f.bias": 6}
    shapes |= {f"transformer.h.{i}.{name}": shape for i in range(depth) for name, shape in block.items()}
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


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
        ({NAME: np.zeros(7, np.float32)}, {}, rf"expected {NAME} of shape \[24\] by its config, got \[7\]"),
        ({NAME: np.zeros(24, np.int8)}, {}, f"expected {NAME} of float32, bfloat16, float16, got I8"),
        ({NAME: np.zeros(24, np.float16)}, {}, "expected weights of one dtype, got float16, float32: pass dtype="),
        ({}, {"model_type": "bert"}, "model_type = 'bert' is not supported, expected gpt2, llama"),
        ({}, {"model_type": None}, "expected model_type, got none"),
        ({}, {"n_embd": "six"}, "an option has a value that does not fit"),
        ({}, {"n_layer": None}, "expected n_layer, got none"),
        ({}, {"activation_function": "sine"}, "activation_function = 'sine' is not supported, expected gelu"),
        ({}, {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx = True is not supported"),
        ({}, {"new_option": 3}, "option new_option = 3 is not supported"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused(tmp_path, change, config, message):
    tensors = {name: tensor for name, tensor in (make_tensors() | change).items() if tensor is not None}
    with pytest.raises(ValueError, match=message):
        jc.hub.load(write(tmp_path / "model", tensors=tensors, config=config))


def test_files_that_are_missing_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="expected a checkpoint folder"):
        jc.hub.load(tmp_path / "none")
    folder = write(tmp_path / "model")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match="found pytorch_model.bin: only safetensors are read, never pickle"):
        jc.hub.load(folder)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {NAME: "../secret.safetensors"}}))
    with pytest.raises(ValueError, match=r"expected files of this folder, got '../secret.safetensors'"):
        jc.hub.load(folder)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {NAME: "model-2.safetensors"}}))
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
        with contextlib.suppress(ValueError, FileNotFoundError):  # of which each says what was expected, and where
            jc.hub.load(folder)


def test_damaged_shards_and_indices_give_clear_errors_and_nothing_else(tmp_path):
    source = write(tmp_path / "model")
    bank = jc.hub.load(source)
    folder = jc.hub.export(bank, bank.parents[0], source, tmp_path / "shards", max_shard_size=1000)
    index, shards = folder / "model.safetensors.index.json", sorted(folder.glob("model-*.safetensors"))
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
    bank = jc.hub.load(folder, name="tiny")
    out = jc.hub.export(bank, [0, 1, 1, 0, 2], folder, tmp_path / "out", facts={"loss on test": 1.25})
    recipe = (out / "mergekit.yaml").read_text()
    assert recipe.count("layer_range") == 3
    assert "layer_range: [0, 2]" in recipe
    assert "merge_method: passthrough\ndtype: float32" in recipe
    card = (out / "README.md").read_text()
    assert "`tiny/0 -> tiny/1 -> tiny/1 -> tiny/0`. Embeddings of tiny, output layer of tiny." in card
    assert "| loss on test | 1.25 |" in card
    assert (out / "tokenizer.json").read_text() == "{}"
    assert jc.hub.load(out).num_layers == 4


def test_a_bank_is_saved_and_loaded_without_naming_its_modules(tmp_path):
    bank = jc.hub.load(write(tmp_path / "model"))
    bank.save(tmp_path / "bank.safetensors")
    again = jc.Bank.load(tmp_path / "bank.safetensors")
    assert again.layers[0].module == bank.layers[0].module
    ids = jnp.array([[1, 2, 3]])
    chain = np.array([1, 0, 1, 2])
    np.testing.assert_array_equal(jc.apply_chain(again, chain, ids), jc.apply_chain(bank, chain, ids))


def test_chains_of_blocks_are_evaluated_as_any_others(tmp_path):
    """The default loss is that of the next token."""
    bank = jc.hub.load(write(tmp_path / "model"))
    ids = jax.random.randint(jax.random.key(0), (5, 8), 0, 11)
    problem = jc.Problem(bank, jc.Batch(ids[:, :-1], ids[:, 1:]), max_layers=3)
    chains, out = jc.evaluate_all(problem)
    assert len(chains) == 1 + 2 + 4 + 8
    for chain, loss in zip(chains[::2], np.asarray(out.loss)[::2], strict=True):
        logits = np.asarray(jc.apply_chain(bank, chain, ids[:, :-1]), np.float64)
        log_sum = np.log(np.exp(logits).sum(axis=-1))
        expected = np.mean(log_sum - np.take_along_axis(logits, ids[:, 1:, None], axis=-1)[..., 0])
        assert loss == pytest.approx(expected, rel=1e-4)


PINS = [(0, 0), (1, 1), (1, 0), (0, 1)]


@pytest.mark.parametrize("pinned", PINS)
def test_pinned_blocks_are_in_every_chain(tmp_path, pinned):
    folder = write(tmp_path / "model", config={"n_layer": 4}, tensors=make_tensors(4))
    whole, bank = jc.hub.load(folder), jc.hub.load(folder, pinned=pinned)
    first, last = pinned
    assert bank.names[:-1] == tuple(f"model/{i}" for i in range(first, 4 - last))
    chain = [1, 0, 0, bank.num_layers]
    same = [*range(first), first + 1, first, first, *range(4 - last, 4), 4]
    ids = jnp.array([[1, 2, 3, 4]])
    expected = np.asarray(jc.apply_chain(whole, np.array(same), ids))
    np.testing.assert_allclose(jc.apply_chain(bank, np.array(chain), ids), expected, rtol=1e-5, atol=1e-5)
    out = jc.hub.export(bank, chain, folder, tmp_path / "out")
    again = jc.hub.load(out)
    np.testing.assert_allclose(jc.apply_chain(again, np.array(again.parents[0]), ids), expected, rtol=1e-5, atol=1e-5)
    bank.save(tmp_path / "bank.safetensors")
    kept = jc.Bank.load(tmp_path / "bank.safetensors")
    np.testing.assert_array_equal(
        jc.apply_chain(kept, np.array(chain), ids), jc.apply_chain(bank, np.array(chain), ids)
    )


def test_more_blocks_than_there_are_cannot_be_pinned(tmp_path):
    with pytest.raises(
        ValueError, match=r"expected fewer pinned blocks than the 2 of the model, at least 0, got \(1, 1\)"
    ):
        jc.hub.load(write(tmp_path / "model"), pinned=(1, 1))


@pytest.mark.parametrize(
    ("pinned", "is_stem_shared"),
    [
        ((1, 1), False),
        ((0, 0), True),
        pytest.param((0, 0), False, marks=pytest.mark.slow),
        pytest.param((1, 1), True, marks=pytest.mark.slow),
    ],
)
def test_fine_tunes_of_one_model_are_one_bank(tmp_path, pinned, is_stem_shared):
    models = [make_tensors(4, seed) for seed in range(3)]
    if is_stem_shared:
        for tensors in models[1:]:
            tensors |= {name: models[0][name] for name in models[0] if "h.0." in name or "wte" in name or "wpe" in name}
    folders = [write(tmp_path / f"m{i}", config={"n_layer": 4}, tensors=tensors) for i, tensors in enumerate(models)]
    bank = jc.hub.load_many(folders, pinned=pinned)
    first, last = pinned
    middle = 4 - first - last
    names = [f"m{m}/{i}" for m in range(3) for i in range(first, 4 - last)]
    names += [] if is_stem_shared else ["m1/embeddings", "m2/embeddings"]
    assert bank.names == (*names, "m0/head", "m1/head", "m2/head")
    ids = jnp.array([[1, 2, 3, 4]])
    singles = [jc.hub.load(folder) for folder in folders]
    for single, parent in zip(singles, bank.parents, strict=True):
        expected = jc.apply_chain(single, np.arange(5), ids)
        np.testing.assert_allclose(jc.apply_chain(bank, np.array(parent), ids), expected, rtol=1e-5, atol=1e-5)
    # Of the last model's embeddings and the second one's blocks and head, whatever came before.
    start = [] if is_stem_shared else [0, 3 * middle + 1]
    chain = [*start, middle, middle + 1, bank.num_layers + 1]
    paths = dict(zip(("m0", "m1", "m2"), map(str, folders), strict=True))
    out = jc.hub.export(bank, chain, paths, tmp_path / "out")
    again = jc.hub.load(out)
    expected = jc.apply_chain(bank, np.array(chain), ids)
    np.testing.assert_allclose(jc.apply_chain(again, np.array(again.parents[0]), ids), expected, rtol=1e-5, atol=1e-5)
    assert "output layer of m1" in (out / "README.md").read_text()
    assert str(folders[1]) in (out / "mergekit.yaml").read_text()
    problem = jc.Problem(bank, jc.Batch(ids, ids), max_layers=len(chain) - 1)
    loss = jc.evaluate(problem, jc.chain.pad([chain])).loss[0]
    scores = jc.gradient.score_edits(problem, np.array(chain))
    assert float(scores.loss) == pytest.approx(float(loss), rel=1e-5)
    bank.save(tmp_path / "bank.safetensors")
    kept = jc.Bank.load(tmp_path / "bank.safetensors")
    np.testing.assert_array_equal(jc.apply_chain(kept, np.array(chain), ids), expected)


@pytest.mark.parametrize(
    ("config", "names", "message"),
    [
        ({"n_layer": 3}, None, "the blocks of .*m1 is 3, and 2 in .*m0"),
        ({"n_head": 3}, None, "the blocks of .*m1 is of num_heads 3, and of 2 in .*m0"),
        ({}, ["a", "a"], "expected checkpoints of different names, got a, a: pass names="),
        ({}, ["a"], "expected a name for each of 2 checkpoints, got 1"),
    ],
)
def test_checkpoints_that_differ_make_no_bank(tmp_path, config, names, message):
    folders = [
        write(tmp_path / "m0"),
        write(tmp_path / "m1", config=config, tensors=make_tensors(config.get("n_layer", 2))),
    ]
    with pytest.raises(ValueError, match=message):
        jc.hub.load_many(folders, names=names)
    with pytest.raises(ValueError, match="expected at least one checkpoint, got none"):
        jc.hub.load_many([])


def test_recipes_are_chains_of_the_model(tmp_path):
    bank = jc.hub.load(write(tmp_path / "model", config={"n_layer": 4}, tensors=make_tensors(4)))
    (parent,), recipes = bank.parents, jc.hub.recipes
    ids = jnp.array([[1, 2, 3], [4, 5, 6]])
    influence = recipes.find_influence(bank, parent, ids)
    hidden, expected = np.asarray(bank.embed(ids), np.float64), []
    for token in range(4):
        made = np.asarray(bank.layers[0].apply(token, jnp.asarray(hidden, jnp.float32)), np.float64)
        cosine = (hidden * made).sum(-1) / np.sqrt((hidden**2).sum(-1) * (made**2).sum(-1))
        expected.append(1 - cosine.mean())
        hidden = made
    np.testing.assert_allclose(influence, expected, rtol=1e-4)
    many = jc.hub.load_many(
        [tmp_path / "model", write(tmp_path / "m1", config={"n_layer": 4}, tensors=make_tensors(4, 1))]
    )
    np.testing.assert_allclose(recipes.find_influence(many, many.parents[0], ids), expected, rtol=1e-4)
    assert recipes.drop_last(parent, 2).tolist() == [0, 1, 4]
    assert recipes.drop_least_influential(parent, np.array([0.3, 0.1, 0.4, 0.2]), 2).tolist() == [0, 2, 4]
    assert recipes.drop_contiguous(parent, 2).tolist() == [[2, 3, 4], [0, 3, 4], [0, 1, 4]]
    assert recipes.repeat_contiguous(parent, 3).tolist() == [[0, 1, 2, 0, 1, 2, 3, 4], [0, 1, 2, 3, 1, 2, 3, 4]]
    assert recipes.drop_last(parent, 4).tolist() == [4]
    with pytest.raises(ValueError, match="expected 0 to 4 blocks of this chain, got 5"):
        recipes.drop_last(parent, 5)


def test_a_model_that_was_not_trained_has_all_its_weights(tmp_path):
    folder = tmp_path / "new"
    folder.mkdir()
    options = {"model_type": "gpt2", "vocab_size": 11, "n_embd": 6, "n_layer": 3, "n_head": 2, "n_positions": 8}
    (folder / "config.json").write_text(json.dumps(options))
    bank = jc.hub.init(jax.random.key(0), folder, name="new")
    assert bank.names == ("new/0", "new/1", "new/2", "new/head")
    out = jc.hub.export(bank, bank.parents[0], folder, tmp_path / "out")
    assert "lm_head.weight" not in out.joinpath("model.safetensors").read_bytes()[:4096].decode("latin-1")
    again, ids = jc.hub.load(out, name="new"), jnp.array([[1, 2, 3]])
    np.testing.assert_array_equal(*(jc.apply_chain(b, np.array(b.parents[0]), ids) for b in (bank, again)))
    kernel = bank.layers[0].params["mlp"]["c_fc"]["weight"]
    assert not np.array_equal(kernel[0], kernel[1])
    other = jc.hub.init(jax.random.key(1), folder, pinned=(1, 1))
    assert other.num_layers == 1


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"model_type": "gpt2", "n_embd": 8, "n_layer": 2, "n_head": 2, "n_positions": 8}, "lm_head.weight"),
        (
            {"model_type": "gpt_neox", "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 1}
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
    save_file(tensors | {name: np.ones((11, 8), np.float32)}, out / "model.safetensors")
    again, ids = jc.hub.load(out), jnp.array([[1, 2]])
    np.testing.assert_array_equal(*(jc.apply_chain(b, np.array(b.parents[0]), ids) for b in (bank, again)))


def test_masks_of_other_dtypes_are_not_read(tmp_path):
    tensors = make_tensors() | {"transformer.h.0.attn.bias": np.ones((1, 1, 8, 8), bool)}
    folder = write(tmp_path / "model", tensors=tensors, config={"_num_labels": 1, "_attn_implementation_autoset": True})
    assert jc.hub.load(folder).num_layers == 2
    with pytest.raises(ValueError, match="expected a dtype of float32, bfloat16, float16, got int32"):
        jc.hub.load(folder, dtype=jnp.int32)


def test_blocks_that_a_config_tells_apart_by_number_stay_what_they_were(tmp_path):
    options = {
        "model_type": "qwen2",
        "vocab_size": 11,
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 2,
    }
    options |= {"num_attention_heads": 2, "use_sliding_window": True, "sliding_window": 2, "max_window_layers": 2}
    folder = tmp_path / "new"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(options))
    bank = jc.hub.init(jax.random.key(0), folder)
    chain, ids = np.array([0, 1, 0, 1, 2]), jnp.arange(8)[None]
    again = jc.hub.load(jc.hub.export(bank, chain, folder, tmp_path / "out"))
    expected = jc.apply_chain(bank, chain, ids)
    np.testing.assert_allclose(jc.apply_chain(again, np.array(again.parents[0]), ids), expected, rtol=1e-5, atol=1e-6)


def test_recipes_say_what_mergekit_cannot_make(tmp_path):
    folders = [write(tmp_path / f"m{i}", tensors=make_tensors(seed=i)) for i in range(2)]
    bank = jc.hub.load(folders[0])
    bank = bank.replace([1], [jax.tree.map(lambda leaf: 2 * leaf, bank.get_params(1))])
    out = jc.hub.export(bank, [0, 1, 2], folders[0], tmp_path / "out")
    assert "in which m0/1 have other weights" in (out / "mergekit.yaml").read_text()
    assert "Trained on since: m0/1." in (out / "README.md").read_text()
    many = jc.hub.load_many(folders)
    with pytest.raises(ValueError, match="expected the folder of each model by name, m0, m1, got none of m1"):
        jc.hub.export(many, [0, 2, 5], folders[0], tmp_path / "other")


def test_weights_of_another_dtype_are_said_to_be_so(tmp_path):
    folder = write(tmp_path / "model", config={"torch_dtype": "float32"})
    bank = jc.hub.load(folder, dtype=jnp.bfloat16)
    out = jc.hub.export(bank, bank.parents[0], folder, tmp_path / "out")
    assert json.loads((out / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert "dtype: bfloat16" in (out / "mergekit.yaml").read_text()


def test_classifiers_of_images_are_one_bank_too(tmp_path):
    options = {
        "model_type": "vit",
        "hidden_size": 8,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "intermediate_size": 8,
    }
    folder = tmp_path / "new"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(options | {"image_size": 8, "patch_size": 4, "num_channels": 1}))
    singles = [jc.hub.init(jax.random.key(i), folder, name=f"m{i}") for i in range(2)]
    paths = [jc.hub.export(bank, bank.parents[0], folder, tmp_path / f"m{i}") for i, bank in enumerate(singles)]
    bank = jc.hub.load_many(paths, pinned=(0, 1))
    images = jax.random.normal(jax.random.key(2), (3, 8, 8, 1))
    for single, parent in zip(singles, bank.parents, strict=True):
        expected = jc.apply_chain(single, np.arange(4), images)
        np.testing.assert_allclose(jc.apply_chain(bank, np.array(parent), images), expected, rtol=1e-5, atol=1e-6)
