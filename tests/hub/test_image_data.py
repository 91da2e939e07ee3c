"""Images for pretrained transformers."""

import json

import jax
import numpy as np
import pytest
from checkpoints import VIT, make_checkpoint, write_config

import jchain as jc
from jchain import images


def test_images_are_resized_and_standardized_as_in_training(tmp_path, monkeypatch):
    sizes = {"image_size": 16, "patch_size": 8, "num_channels": 3}
    folder = write_config(tmp_path / "vit", VIT | sizes)
    (folder / "preprocessor_config.json").write_text(
        json.dumps({"image_mean": [0.5, 0.4, 0.3], "image_std": [0.5, 0.5, 0.2]})
    )
    rng = np.random.default_rng(0)
    pixels, labels = rng.integers(0, 256, (80, 8, 8, 1)).astype(np.uint8), np.arange(80) % 2
    monkeypatch.setattr(
        images, "read", lambda name, data_dir: images.Images((pixels, labels), None, 2)
    )
    data = jc.hub.load_images(folder, "digits")
    assert data.test.x.shape[1:] == (16, 16, 3)
    plain = jc.data.split(pixels, labels, name="digits", statistics=(0.0, 1.0))
    expected = jax.image.resize(plain.test.x / 255, (len(plain.test.x), 16, 16, 1), "bilinear")
    expected = (np.asarray(expected) - [0.5, 0.4, 0.3]) / [0.5, 0.5, 0.2]
    np.testing.assert_allclose(data.test.x, expected, atol=1e-5)
    few = jc.hub.load_images(folder, "digits", most=(3, 2, 1, 100))
    assert [len(split.x) for split in few[:4]] == [3, 2, 1, len(data.test.x)]
    for changed, message in (
        ({"rescale_factor": 1.0}, "expected a rescale_factor of 1/255"),
        ({"do_center_crop": True}, "expected do_resize without do_center_crop"),
        (
            {"resample": 0, "rescale_factor": None},
            r"expected resample of 2 \(bilinear\) or 3 \(bicubic\), got 0",
        ),
    ):
        (folder / "preprocessor_config.json").write_text(json.dumps(changed))
        with pytest.raises(ValueError, match=message):
            jc.hub.load_images(folder, "digits")


def test_a_model_of_text_takes_no_images(tmp_path):
    pytest.importorskip("tokenizers")
    with pytest.raises(ValueError, match="expected a model of images at .*, got one of text"):
        jc.hub.load_images(make_checkpoint(tmp_path / "model"), "digits")
