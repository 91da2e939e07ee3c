"""Images for pretrained transformers, resized and standardized as for their training."""

import os
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jchain import images
from jchain._typing import Array, Float
from jchain.arguments import checked
from jchain.data import SPLITS, Batch, Dataset, split
from jchain.hub.adapter import find_model
from jchain.hub.checkpoint import read_json
from jchain.hub.families import read_architecture

PathLike = str | os.PathLike[str]
PREPROCESSOR = "preprocessor_config.json"
# Number of images that are resized at a time.
_CHUNK_SIZE = 256
# The supported values of the option `resample`: PIL's numbers and the names of the filters.
_FILTERS = {2: "bilinear", 3: "bicubic"}


@checked
def load_images(
    checkpoint: PathLike,
    name: str,
    *,
    seed: int = 0,
    sizes: Sequence[int] | None = None,
    most: Sequence[int | None] | None = None,
    data_dir: str | Path | None = None,
) -> Dataset:
    """Load images, and resize and standardize them as for the training of a model.

    Args:
      checkpoint: a ViT, as in `load`, with preprocessor_config.json.
      name: name of the data set, as in `jchain.data.load`.
      seed: seed of the random splits.
      sizes: number of examples in each split; if None, all examples are used.
      most: maximum number of examples to keep in each split, because resized images need much
        memory; None for no maximum.
      data_dir: folder that holds prepared data sets; if None, tensorflow-datasets' default folder.

    Raises:
      FileNotFoundError: if preprocessor_config.json is missing, or the data set is not prepared.
      ValueError: if the model does not take images, its preprocessing is not supported (a scale
        other than 0 to 1 before standardization, a crop, or a filter other than PIL's bilinear and
        bicubic), or `jchain.data.load` would raise it.
    """
    checkpoint = find_model(checkpoint)
    architecture = read_architecture(checkpoint)
    if architecture.vocab_size is not None:
        raise ValueError(f"expected a model of images at {checkpoint}, got one of text")
    mean, std, method = _read_preprocessor(checkpoint / PREPROCESSOR)
    found = images.read(name, data_dir)
    _, height, width, channels = architecture.example_shape
    data = split(
        *found.train,
        seed=seed,
        name=name,
        test=found.test,
        sizes=sizes,
        statistics=(255 * mean, 255 * std),
    )

    @jax.jit
    def resize(x: Float[Array, "B H W C"]) -> Float[Array, "B h w c"]:
        colored = jnp.broadcast_to(x, (*x.shape[:3], channels))
        return jax.image.resize(colored, (x.shape[0], height, width, channels), method)

    def fit(batch: Batch, num: int | None) -> Batch:
        x, y = batch.x[:num], batch.y[:num]
        parts = [resize(x[i : i + _CHUNK_SIZE]) for i in range(0, len(x), _CHUNK_SIZE)]
        return Batch(jnp.concatenate(parts), y)

    kept = most or (None,) * len(SPLITS)
    splits = {name: fit(getattr(data, name), num) for name, num in zip(SPLITS, kept, strict=True)}
    return data._replace(**splits)


def _read_preprocessor(
    path: Path,
) -> tuple[Float[np.ndarray, "C"], Float[np.ndarray, "C"], str]:
    """Read the mean and standard deviation of the channels, in units of 0 to 1, and the filter."""
    options = read_json(path)
    factor = options.get("rescale_factor") or 1 / 255
    if abs(factor * 255 - 1) > 1e-6 or not options.get("do_rescale", True):
        raise ValueError(f"{path}: expected a rescale_factor of 1/255")
    if options.get("do_center_crop") or not options.get("do_resize", True):
        raise ValueError(f"{path}: expected do_resize without do_center_crop")
    if (resample := options.get("resample", 2)) not in _FILTERS:
        raise ValueError(
            f"{path}: expected resample of 2 (bilinear) or 3 (bicubic), got {resample!r}"
        )
    mean, std = (
        np.array(options.get(key) or [0.5] * 3, np.float32) for key in ("image_mean", "image_std")
    )
    if not options.get("do_normalize", True):
        mean, std = np.zeros(3, np.float32), np.ones(3, np.float32)
    return mean, std, _FILTERS[resample]
