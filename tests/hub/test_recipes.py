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


def make_padded_questions(rng):
    """Make questions of 2 rows, padded at the end with 0, which is also a real token."""
    lengths = rng.integers(2, 8, (5, 2))
    x, y = np.zeros((5, 2, 8), np.int32), np.full((5, 2, 8), -1)
    for i, j in np.ndindex(5, 2):
        x[i, j, : lengths[i, j]] = rng.integers(0, 11, lengths[i, j])
        y[i, j, lengths[i, j] - 1] = 3
    is_text = np.arange(8) < lengths[..., None]
    x[1, 1], y[1, 1], is_text[1, 1] = 0, -1, False  # a question with one choice
    return x, y, is_text


@pytest.mark.parametrize("is_zero", [False, True])
def test_padding_has_no_influence(tmp_path, is_zero):
    tensors = make_tensors(4)
    if is_zero:  # as in models with a token of padding
        tensors["transformer.wte.weight"][0] = 0.0
        tensors["transformer.wpe.weight"][5:] = 0.0
    bank = jc.hub.load(write(tmp_path / "model", config={"n_layer": 4}, tensors=tensors))
    (parent,), find = bank.parents, jc.hub.recipes.compute_influence
    x, y, is_text = make_padded_questions(np.random.default_rng(0))
    hidden, expected = np.asarray(bank.embed(jnp.asarray(x)), np.float64), []
    for token in range(4):
        output = np.asarray(
            bank.layers[0].apply(token, jnp.asarray(hidden, jnp.float32)), np.float64
        )
        lengths = np.sqrt((hidden**2).sum(-1) * (output**2).sum(-1))
        is_counted = is_text & (lengths > 0)
        cosines = (hidden * output).sum(-1)[is_counted] / lengths[is_counted]
        expected.append(1 - cosines.mean())
        hidden = output
    found = find(bank, parent, jnp.asarray(x), y=jnp.asarray(y))
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    # Text has no padding, and labels of another shape tell nothing about tokens.
    text = jnp.asarray(x[:, 0])
    labels = jnp.asarray(y[:, 0] * 0 + 1)
    whole = find(bank, parent, text)
    np.testing.assert_array_equal(find(bank, parent, text, y=labels), whole)
    np.testing.assert_array_equal(find(bank, parent, text, y=jnp.arange(5)), whole)
    assert np.isfinite(whole).all()


def test_questions_without_labels_end_at_their_last_token_that_is_not_0(tmp_path):
    bank = jc.hub.load(write(tmp_path / "model", config={"n_layer": 4}, tensors=make_tensors(4)))
    x, y, is_text = make_padded_questions(np.random.default_rng(1))
    x[..., 1:] = np.where(is_text[..., 1:], np.maximum(x[..., 1:], 1), 0)
    find = jc.hub.recipes.compute_influence
    x, y = jnp.asarray(x), jnp.asarray(y)
    found = find(bank, bank.parents[0], x)
    np.testing.assert_array_equal(found, find(bank, bank.parents[0], x, y=y))


def test_recipes_for_questions_use_the_influence_without_padding(tmp_path, monkeypatch):
    bank = jc.hub.load(write(tmp_path / "model", config={"n_layer": 4}, tensors=make_tensors(4)))
    x, y = map(jnp.asarray, make_padded_questions(np.random.default_rng(0))[:2])
    recipes = jc.hub.recipes
    problem = jc.Problem(bank, jc.Batch(x, y), 2, loss_fn=jc.hub.choice_loss)
    given = []
    original = recipes.compute_influence
    monkeypatch.setattr(
        recipes,
        "compute_influence",
        lambda *args, **options: given.append(original(*args, **options)) or given[-1],
    )
    found = recipes.find_chains(problem, bank.parents[0], 2)
    expected = original(bank, bank.parents[0], x, y=y)
    np.testing.assert_array_equal(given[0], expected)
    kept = recipes.drop_least_influential(bank.parents[0], expected, 2).tolist()
    assert found["blocks of least influence dropped"] == kept


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
