"""Banks of a model or several: chains, pinned blocks, recipes."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import make_tensors, write

import jchain as jc

PINS = [(0, 0), (1, 1), (1, 0), (0, 1)]


def test_a_bank_is_saved_and_loaded_without_naming_its_modules(tmp_path):
    bank = jc.hub.load(write(tmp_path / "model"))
    bank.save(tmp_path / "bank.safetensors")
    again = jc.Bank.load(tmp_path / "bank.safetensors")
    assert again.layers[0].module == bank.layers[0].module
    ids = jnp.array([[1, 2, 3]])
    chain = np.array([1, 0, 1, 2])
    np.testing.assert_array_equal(
        jc.apply_chain(again, chain, ids), jc.apply_chain(bank, chain, ids)
    )


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
    np.testing.assert_allclose(
        jc.apply_chain(bank, np.array(chain), ids), expected, rtol=1e-5, atol=1e-5
    )
    out = jc.hub.export(bank, chain, folder, tmp_path / "out")
    again = jc.hub.load(out)
    np.testing.assert_allclose(
        jc.apply_chain(again, np.array(again.parents[0]), ids), expected, rtol=1e-5, atol=1e-5
    )
    bank.save(tmp_path / "bank.safetensors")
    kept = jc.Bank.load(tmp_path / "bank.safetensors")
    np.testing.assert_array_equal(
        jc.apply_chain(kept, np.array(chain), ids), jc.apply_chain(bank, np.array(chain), ids)
    )


def test_more_blocks_than_there_are_cannot_be_pinned(tmp_path):
    with pytest.raises(
        ValueError,
        match=r"expected fewer pinned blocks than the 2 of the model, at least 0, got \(1, 1\)",
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
            tensors |= {
                name: models[0][name]
                for name in models[0]
                if "h.0." in name or "wte" in name or "wpe" in name
            }
    folders = [
        write(tmp_path / f"m{i}", config={"n_layer": 4}, tensors=tensors)
        for i, tensors in enumerate(models)
    ]
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
        np.testing.assert_allclose(
            jc.apply_chain(bank, np.array(parent), ids), expected, rtol=1e-5, atol=1e-5
        )
    # Of the last model's embeddings and the second one's blocks and head, whatever came before.
    start = [] if is_stem_shared else [0, 3 * middle + 1]
    chain = [*start, middle, middle + 1, bank.num_layers + 1]
    paths = dict(zip(("m0", "m1", "m2"), map(str, folders), strict=True))
    out = jc.hub.export(bank, chain, paths, tmp_path / "out")
    again = jc.hub.load(out)
    expected = jc.apply_chain(bank, np.array(chain), ids)
    np.testing.assert_allclose(
        jc.apply_chain(again, np.array(again.parents[0]), ids), expected, rtol=1e-5, atol=1e-5
    )
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
    (folder / "config.json").write_text(
        json.dumps(options | {"image_size": 8, "patch_size": 4, "num_channels": 1})
    )
    singles = [jc.hub.init(jax.random.key(i), folder, name=f"m{i}") for i in range(2)]
    paths = [
        jc.hub.export(bank, bank.parents[0], folder, tmp_path / f"m{i}")
        for i, bank in enumerate(singles)
    ]
    bank = jc.hub.load_many(paths, pinned=(0, 1))
    images = jax.random.normal(jax.random.key(2), (3, 8, 8, 1))
    for single, parent in zip(singles, bank.parents, strict=True):
        expected = jc.apply_chain(single, np.arange(4), images)
        np.testing.assert_allclose(
            jc.apply_chain(bank, np.array(parent), images), expected, rtol=1e-5, atol=1e-6
        )


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
        [
            tmp_path / "model",
            write(tmp_path / "m1", config={"n_layer": 4}, tensors=make_tensors(4, 1)),
        ]
    )
    np.testing.assert_allclose(
        recipes.find_influence(many, many.parents[0], ids), expected, rtol=1e-4
    )
    assert recipes.drop_last(parent, 2).tolist() == [0, 1, 4]
    assert recipes.drop_least_influential(parent, np.array([0.3, 0.1, 0.4, 0.2]), 2).tolist() == [
        0,
        2,
        4,
    ]
    assert recipes.drop_contiguous(parent, 2).tolist() == [[2, 3, 4], [0, 3, 4], [0, 1, 4]]
    assert recipes.repeat_contiguous(parent, 3).tolist() == [
        [0, 1, 2, 0, 1, 2, 3, 4],
        [0, 1, 2, 3, 1, 2, 3, 4],
    ]
    assert recipes.drop_last(parent, 4).tolist() == [4]
    with pytest.raises(ValueError, match="expected 0 to 4 blocks of this chain, got 5"):
        recipes.drop_last(parent, 5)


def test_trained_chains_keep_the_embeddings_that_they_begin_with(tmp_path):
    """Weight decay is no gradient: it reaches the choice too."""
    folders = {f"m{i}": write(tmp_path / f"m{i}", tensors=make_tensors(seed=i)) for i in range(2)}
    bank, ids = jc.hub.load_many([*folders.values()]), jnp.array([[1, 2, 3, 4]])
    chain = np.array(bank.parents[1])
    problem = jc.Problem(bank, jc.Batch(ids, ids), max_layers=len(chain) - 1)
    bank = jc.updates.tune.tune_chain(jax.random.key(0), problem, chain, num_steps=30)
    np.testing.assert_array_equal(bank.get_params(int(chain[0]))["shares"], [1.0])
    assert not np.array_equal(
        bank.get_params(2)["block"]["ln_1"]["weight"],
        make_tensors(seed=1)["transformer.h.0.ln_1.weight"],
    )
    out = jc.hub.export(bank, chain, folders, tmp_path / "out")
    assert "Embeddings of m1" in (out / "README.md").read_text()
    again = jc.hub.load(out)
    expected = jc.apply_chain(bank, chain, ids)
    np.testing.assert_allclose(
        jc.apply_chain(again, np.array(again.parents[0]), ids), expected, rtol=1e-5, atol=1e-5
    )
