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
        ({}, ["a", "a"], "expected checkpoints with different names, got a, a; set names="),
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
