"""Banks of one model or several."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import make_tensors, write

import jchain as jc


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


@pytest.mark.slow
def test_the_default_loss_of_chains_of_blocks_is_that_of_the_next_token(tmp_path):
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


@pytest.mark.parametrize(
    ("config", "names", "message"),
    [
        ({"n_layer": 3}, None, "the same blocks, got 3 blocks in .*m1 and 2 blocks in .*m0"),
        ({"n_head": 3}, None, "the same blocks, got num_heads=3 in .*m1 and num_heads=2 in .*m0"),
        ({}, ["a", "a"], "expected different names, got a, a"),
        ({}, ["a"], "expected a name for each of 2 checkpoints, got 1"),
    ],
)
def test_checkpoints_of_different_architectures_are_rejected(tmp_path, config, names, message):
    folders = [
        write(tmp_path / "m0"),
        write(tmp_path / "m1", config=config, tensors=make_tensors(config.get("n_layer", 2))),
    ]
    with pytest.raises(ValueError, match=message):
        jc.hub.load_many(folders, names=names)
    with pytest.raises(ValueError, match="expected at least one checkpoint, got none"):
        jc.hub.load_many([])


def test_a_model_with_a_few_tokens_more_contributes_its_blocks(tmp_path):
    folders = [
        write(
            tmp_path / name,
            config={"vocab_size": size},
            tensors=make_tensors(seed=seed, vocabulary=size),
        )
        for seed, (name, size) in enumerate([("a", 11), ("b", 13), ("c", 11)])
    ]
    bank = jc.hub.load_many(folders)
    assert bank.names == (
        *("a/0", "a/1", "b/0", "b/1", "c/0", "c/1"),
        *("c/embeddings", "a/head", "c/head"),
    )
    assert bank.parents == ((0, 1, 7), (6, 4, 5, 8))
    ids = jnp.array([[1, 2, 3]])
    logits = jc.apply_chain(bank, np.array([2, 1, 7]), ids)
    assert logits.shape == (1, 3, 11)
    out = jc.hub.export(bank, [2, 1, 7], dict(zip("abc", folders, strict=True)), tmp_path / "out")
    again = jc.hub.load(out)
    np.testing.assert_allclose(
        jc.apply_chain(again, np.array([0, 1, 2]), ids), logits, rtol=1e-5, atol=1e-6
    )
    large = write(
        tmp_path / "d",
        config={"vocab_size": 2000},
        tensors=make_tensors(vocabulary=2000),
    )
    with pytest.raises(ValueError, match="the same stem, got vocabulary=2000 in"):
        jc.hub.load_many([folders[0], large])
