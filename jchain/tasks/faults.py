"""Image faults, as a broken camera would cause: functions of images `[B, H, W]` in [0, 1].

Each fault preserves the shape and the range of values and is invertible on 8 x 8 images. `blurred`
has the largest condition number.
"""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import ArrayLike

from jchain._typing import Float
from jchain.arguments import checked, read_array

Images = Float[np.ndarray, "B H W"]
# The number of columns or rows by which images are shifted.
_SHIFT = 3
# The range of values of a faded image.
_FADED = (0.35, 0.65)


def _blur(images: Images) -> Images:
    """Average over 3 x 3 windows that wrap around the border."""
    offsets = (-1, 0, 1)
    shifted = [np.roll(images, (i, j), axis=(1, 2)) for i in offsets for j in offsets]
    return np.mean(shifted, axis=0)


def _skew(images: Images) -> Images:
    """Shift each row one column further than the row above it."""
    rows = [np.roll(images[:, i], i, axis=1) for i in range(images.shape[1])]
    return np.stack(rows, axis=1)


FAULTS: dict[str, Callable[[Images], Images]] = {
    "upside down": lambda images: images[:, ::-1, ::-1],
    "mirrored": lambda images: images[:, :, ::-1],
    "sideways": lambda images: np.rot90(images, axes=(1, 2)),
    "scrolled": lambda images: np.roll(images, _SHIFT, axis=2),
    "lifted": lambda images: np.roll(images, _SHIFT, axis=1),
    "interlaced": lambda images: np.concatenate([images[:, ::2], images[:, 1::2]], axis=1),
    "skewed": _skew,
    "negative": lambda images: 1 - images,
    "faded": lambda images: _FADED[0] + (_FADED[1] - _FADED[0]) * images,
    "blurred": _blur,
}


@checked
def damage(images: ArrayLike, faults: Sequence[str]) -> Float[np.ndarray, "B H W"]:
    """Apply faults to square images, in the given order.

    Args:
      images: `[B, H, H]`, with values in [0, 1].
      faults: keys of `FAULTS`; the same fault may appear more than once.

    Raises:
      ValueError: if a fault is unknown, or the images are not square.
    """
    images = read_array("images", images, np.float32)
    if images.ndim != 3 or images.shape[1] != images.shape[2]:
        raise ValueError(f"expected square images [B, H, H], got {list(images.shape)}")
    check_faults(faults)
    for name in faults:
        images = FAULTS[name](images)
    return np.ascontiguousarray(images)


def check_faults(faults: Sequence[str]) -> None:
    """Check that all faults are known.

    Args:
      faults: names of faults.

    Raises:
      ValueError: if a name is not a key of `FAULTS`.
    """
    unknown = [name for name in faults if name not in FAULTS]
    if unknown:
        known = ", ".join(FAULTS)
        raise ValueError(f"expected names of faults ({known}), got {', '.join(unknown)}")
