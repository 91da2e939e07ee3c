"""Standard ways to make a model shallower or deeper."""

import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import make_tensors, write

import jchain as jc


def test_recipes_change_the_chain_of_the_model(tmp_path):
    bank = jc.hub.load(write(tmp_path / "model", config={"n_layer": 4}, tensors=make_tensors(4)))
    (parent,), recipes = bank.parents, jc.hub.recipes
    ids = jnp.array([[1, 2, 3], [4, 5, 6]])
    influence = recipes.compute_influence(bank, parent, ids)
    hidden, expected = np.asarray(bank.embed(ids), np.float64), []
    for token in range(4):
        output = np.asarray(
            bank.layers[0].apply(token, jnp.asarray(hidden, jnp.float32)), np.float64
        )
        cosine = (hidden * output).sum(-1) / np.sqrt((hidden**2).sum(-1) * (output**2).sum(-1))
        expected.append(1 - cosine.mean())
        hidden = output
    np.testing.assert_allclose(influence, expected, rtol=1e-4)
    many = jc.hub.load_many(
        [
            tmp_path / "model",
            write(tmp_path / "m1", config={"n_layer": 4}, tensors=make_tensors(4, 1)),
        ]
    )
    np.testing.assert_allclose(
        recipes.compute_influence(many, many.parents[0], ids), expected, rtol=1e-4
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


def test_runs_of_blocks_have_the_losses_of_their_chains(tmp_path):
    path = write(tmp_path / "model", config={"n_layer": 4}, tensors=make_tensors(4))
    bank = jc.hub.load(path)
    ids = np.array([[1, 2, 3], [4, 5, 6]])
    problem = jc.Problem(bank, jc.Batch(ids, ids), max_layers=2, min_layers=1)
    losses = jc.hub.recipes.score_runs(problem, bank.parents[0])
    wide = jc.Problem(bank, jc.Batch(ids, ids), max_layers=8)

    def score(*tokens):
        return float(jc.evaluate(wide, jc.chain.pad([[*tokens, 4]], 8)).loss[0])

    assert losses.loss == pytest.approx(score(0, 1, 2, 3), rel=1e-5)
    assert losses.repeated[1, 2] == pytest.approx(score(0, 1, 2, 1, 2, 3), rel=1e-5)
    assert losses.dropped[1, 2] == pytest.approx(score(0, 3), rel=1e-5)
    assert losses.repeated[0, 3] == pytest.approx(score(0, 1, 2, 3, 0, 1, 2, 3), rel=1e-5)
    assert losses.dropped[0, 3] == pytest.approx(score(), rel=1e-5)
    for values in (losses.repeated, losses.dropped):
        np.testing.assert_array_equal(np.isnan(values), np.tri(4, k=-1, dtype=bool))
