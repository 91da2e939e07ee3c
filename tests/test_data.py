import jax.numpy as jnp
import numpy as np
import pytest

import jchain as jc
from jchain.datasets.splitting import split_stratified


@pytest.mark.parametrize(
    ("name", "size", "features", "classes"),
    [("digits", 1797, 64, 10), ("wine", 178, 13, 3), ("breast_cancer", 569, 30, 2)],
)
def test_splits_are_complete_disjoint_stratified_and_standardized(name, size, features, classes):
    data = jc.data.load(name, seed=3)
    splits = [data.train, data.search, data.select, data.test]
    assert sum(len(split.y) for split in splits) == size
    assert data.num_classes == classes
    assert all(
        split.x.shape[1:] == (features,) and split.x.dtype == jnp.float32 for split in splits
    )
    # Every row of the file is in some split, equally often.
    from sklearn import datasets

    raw = getattr(datasets, f"load_{name}")()
    mean, std = _unstandardize(raw.data, raw.target, data)
    rows = np.concatenate([np.asarray(split.x) * std + mean for split in splits])
    order, expected = (np.lexsort(a.round(2).T) for a in (rows, raw.data))
    np.testing.assert_allclose(rows[order], raw.data[expected], rtol=1e-3, atol=2e-2)
    shares = np.array(
        [[np.mean(np.asarray(split.y) == c) for c in range(classes)] for split in splits]
    )
    assert np.abs(shares - shares[0]).max() < 0.03
    x = np.asarray(data.train.x)
    np.testing.assert_allclose(x.mean(axis=0), 0, atol=1e-4)
    np.testing.assert_allclose(x.std(axis=0)[x.std(axis=0) > 0], 1, atol=1e-4)
    assert abs(np.asarray(data.test.x).mean()) > 1e-5  # not standardized with its own statistics


def _unstandardize(x, y, data):
    """Find the mean and deviation of the rows of train by inverting the affine map."""
    for_seed = split_stratified(y, jc.data.SHARES, np.random.default_rng(3))[0]
    x = x.astype(np.float32)[for_seed]
    return x.mean(axis=0), np.where(x.std(axis=0) > 0, x.std(axis=0), 1)


def test_seed_decides_the_split():
    one, same, other = (jc.data.load("wine", seed=seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one.test.x, same.test.x)
    assert not np.array_equal(one.test.y, other.test.y) or not np.allclose(one.test.x, other.test.x)


def test_unknown_name():
    pytest.importorskip("tensorflow_datasets")
    with pytest.raises(ValueError, match="unknown data set 'mnits': did you mean mnist"):
        jc.data.load("mnits")


def test_digits_are_images_too():
    flat, images = jc.data.load("digits", seed=2), jc.data.load("digits_8x8", seed=2)
    assert images.train.x.shape[1:] == (8, 8, 1)
    np.testing.assert_array_equal(flat.test.y, images.test.y)
    # One mean and deviation for all positions.
    raw = (
        16
        * (np.asarray(images.train.x) - np.asarray(images.train.x).min())
        / np.ptp(np.asarray(images.train.x))
    )
    np.testing.assert_allclose(raw, raw.round(), atol=1e-3)


def test_sizes_take_an_even_sample():
    whole, few = jc.data.load("digits"), jc.data.load("digits", sizes=(200, 50, 40, 30))
    for name, size in zip(jc.data.SPLITS, (200, 50, 40, 30), strict=True):
        labels = np.asarray(getattr(few, name).y)
        assert len(labels) == size
        assert np.ptp(np.bincount(labels, minlength=10)) <= 3
    rows = {tuple(row) for row in np.asarray(whole.test.y)[:, None]}
    assert len(rows) == 10
    with pytest.raises(ValueError, match=r"at most \[898, 360, 270, 269\], got \[200, 50, 40\]"):
        jc.data.load("digits", sizes=(200, 50, 40))


def test_split_takes_your_own_examples_of_any_shape():
    y = np.arange(40) % 2
    data = jc.data.split(np.random.default_rng(0).normal(size=(40, 3, 3)), y, name="mine")
    assert data.train.x.shape == (20, 3, 3)
    assert data.name == "mine"


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (np.zeros((40, 2)), np.zeros(39, int), "one label per example"),
        (np.zeros((40, 2)), np.full(40, "a"), "integer labels"),
        (np.zeros((40, 2)), np.full(40, -1), "integer labels"),
        (np.full((40, 2), np.nan), np.zeros(40, int), "finite examples"),
        (np.zeros((40, 2)), np.arange(40) // 39, "at least 8 examples of each class"),
    ],
)
def test_split_refuses_bad_examples(x, y, message):
    with pytest.raises(ValueError, match=message):
        jc.data.split(x, y)


def test_constants_of_the_training_split_are_not_divided_by_rounding():
    x = np.random.default_rng(0).normal(size=(900, 2))
    x[:, 1] = 0.1
    data = jc.data.split(x, np.arange(900) % 2, name="own")
    assert np.abs(data.test.x[:, 1]).max() < 1e-6


def test_concat_joins_splits_in_order():
    data = jc.data.load("wine")
    both = jc.data.concat([data.search, data.select])
    np.testing.assert_array_equal(both.x[-len(data.select.y) :], data.select.x)
    np.testing.assert_array_equal(both.y[: len(data.search.y)], data.search.y)
    with pytest.raises(ValueError, match=r"same inputs, got .*float32\[35, 13\].*float32\[35, 2\]"):
        jc.data.concat([data.search, jc.Batch(data.search.x[:, :2], data.search.y)])
    with pytest.raises(ValueError, match=r"same inputs, got \[\]"):
        jc.data.concat([])
