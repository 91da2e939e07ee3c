"""Image classifiers."""

import jax
import numpy as np
import pytest
from checkpoints import VIT, write_config

import jchain as jc
from jchain.hub.families import make_architecture


@pytest.mark.slow
def test_several_classifiers_of_images_are_one_bank(tmp_path):
    folder = write_config(tmp_path / "new", VIT)
    singles = [jc.hub.random_bank(jax.random.key(i), folder, name=f"m{i}") for i in range(2)]
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


def test_patches_must_be_square():
    with pytest.raises(
        ValueError, match=r"patch_size = \[4, 2\] is not supported, expected square patches"
    ):
        make_architecture(VIT | {"patch_size": [4, 2]}, "config")
    assert make_architecture(VIT | {"patch_size": [4, 4]}, "config")
