import jax.numpy as jnp
import numpy as np
import pytest

import jchain as jc

RNG = np.random.default_rng(0)
Y = np.arange(200) % 3


def recover(x, data):
    """Find the rows of x that became the train split, by undoing the standardization."""
    rows = np.asarray(data.train.x) * data.statistics.std + data.statistics.mean
    return np.abs(x[:, None] - rows[None]).max(axis=-1).argmin(axis=0)


def test_new_examples_are_standardized_as_the_splits_were():
    x = (RNG.normal(size=(200, 4)) * [1, 10, 100, 0] + [0, 5, -50, 7]).astype(np.float32)
    data = jc.data.split(x, Y)
    rows = recover(x, data)
    np.testing.assert_array_equal(data.standardize(x[rows]), data.train.x)
    np.testing.assert_array_equal(data.standardize(x[rows].tolist()), data.train.x)
    np.testing.assert_allclose(data.statistics.mean, x[rows].mean(axis=0), rtol=1e-5)
    assert data.statistics.std[3] == 1  # a constant feature
    again = jc.data.split(x, Y, statistics=data.statistics)
    np.testing.assert_array_equal(again.search.x, data.search.x)


def test_channels_of_byte_images_share_statistics():
    x = RNG.integers(0, 256, (200, 3, 3, 2), dtype=np.uint8)
    data = jc.data.split(x, Y)
    assert data.statistics.mean.shape == (2,)
    new = data.standardize(x)
    assert new.dtype == jnp.float32
    np.testing.assert_array_equal(
        np.sort(new.ravel()), np.sort(np.concatenate([s.x.ravel() for s in data[:4]]))
    )


def test_integers_beside_other_inputs_stay_as_they_are():
    x = {"values": RNG.normal(3, 2, (200, 4)), "mask": RNG.random(200) < 0.5}
    data = jc.data.split(x, Y)
    new = data.standardize(x)
    assert (new["mask"].dtype, data.statistics.std["mask"]) == (bool, 1)
    np.testing.assert_array_equal(new["mask"], x["mask"])
    np.testing.assert_allclose(new["values"].mean(axis=0), 0, atol=0.3)
    again = jc.data.split(x, Y, statistics=data.statistics)
    np.testing.assert_array_equal(again.test.x["values"], data.test.x["values"])


def test_a_data_set_without_statistics_leaves_examples_alone():
    data = jc.data.split(np.arange(800).reshape(200, 4), Y)._replace(statistics=None)
    assert data.standardize([[1, 2, 3, 4]]).dtype == jnp.int32


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (np.zeros(4), r"expected x of shape \[B, 4\], got \[4\]"),
        (np.zeros((2, 5)), r"expected x of shape \[B, 4\], got \[2, 5\]"),
        (np.full((2, 4), np.nan), "expected finite examples"),
        (np.array([["a"] * 4]), "expected examples that are numbers"),
        ({"a": np.zeros((2, 4))}, "expected examples that are numbers"),
    ],
)
def test_new_examples_of_another_form_are_refused(x, message):
    data = jc.data.split(RNG.normal(size=(200, 4)), Y)
    with pytest.raises(ValueError, match=message):
        data.standardize(x)


def test_new_examples_with_other_inputs_are_refused():
    data = jc.data.split({"a": np.zeros((200, 2)), "b": np.zeros((200, 3))}, Y)
    with pytest.raises(ValueError, match="expected examples with the inputs .*'a'.*, got"):
        data.standardize({"a": np.zeros((2, 2))})
    with pytest.raises(ValueError, match=r"expected x\['b'\] of shape \[B, 3\], got \[2, 2\]"):
        data.standardize({"a": np.zeros((2, 2)), "b": np.zeros((2, 2))})
