import numpy as np
import pytest

from jchain.tasks import FAULTS, damage

IMAGES = np.random.default_rng(0).uniform(size=(3, 8, 8)).astype(np.float32)
UNDO = {
    "upside down": lambda x: x[:, ::-1, ::-1],
    "mirrored": lambda x: x[:, :, ::-1],
    "sideways": lambda x: np.rot90(x, -1, axes=(1, 2)),
    "scrolled": lambda x: np.roll(x, -3, axis=2),
    "lifted": lambda x: np.roll(x, -3, axis=1),
    "interlaced": lambda x: np.stack([x[:, (i % 2) * 4 + i // 2] for i in range(8)], axis=1),
    "skewed": lambda x: np.stack([np.roll(x[:, i], -i, axis=1) for i in range(8)], axis=1),
    "negative": lambda x: 1 - x,
    "faded": lambda x: (x - 0.35) / 0.3,
}


@pytest.mark.parametrize("name", FAULTS)
def test_faults_keep_shape_and_range_and_change_images(name):
    damaged = damage(IMAGES, [name])
    assert damaged.shape == IMAGES.shape
    assert damaged.dtype == np.float32
    assert damaged.min() >= 0
    assert damaged.max() <= 1
    assert not np.allclose(damaged, IMAGES)


@pytest.mark.parametrize("name", UNDO)
def test_faults_are_undone_exactly(name):
    np.testing.assert_allclose(UNDO[name](damage(IMAGES, [name])), IMAGES, atol=1e-6)


def test_all_faults_except_blurred_have_an_inverse():
    assert set(FAULTS) - set(UNDO) == {"blurred"}
    blurred = damage(IMAGES, ["blurred"])
    assert blurred[0, 4, 4] == pytest.approx(IMAGES[0, 3:6, 3:6].mean(), rel=1e-5)


def test_damage_applies_faults_in_order():
    expected = damage(damage(IMAGES, ["scrolled"]), ["sideways"])
    np.testing.assert_array_equal(damage(IMAGES, ["scrolled", "sideways"]), expected)
    assert not np.allclose(expected, damage(IMAGES, ["sideways", "scrolled"]))


def test_damage_rejects_unknown_faults_and_images_that_are_not_square():
    with pytest.raises(ValueError, match="expected names of faults .upside down, .*, got rotten"):
        damage(IMAGES, ["scrolled", "rotten"])
    with pytest.raises(ValueError, match=r"square images \[B, H, H\], got \[3, 8, 7\]"):
        damage(IMAGES[:, :, :7], ["scrolled"])
