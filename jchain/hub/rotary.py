"""Rotary positions (Su et al. 2021, arXiv:2104.09864), with all scalings of transformers."""

import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from jchain._typing import Array, Float
from jchain.hub.config import Config

_MAX_HEAD_SIZE = 2**16
_LONGROPE_FACTORS = ("short_factor", "long_factor")
_KINDS = ("default", "linear", "dynamic", "yarn", "longrope", "llama3", "proportional")

# How the frequencies change in long sequences: a number of positions, and for longer sequences
# either other frequencies or the factor of dynamic scaling.
LongRotary = tuple[int, float | tuple[float, ...]]


class Rotary(NamedTuple):
    """Rotary positions of a block.

    Attributes:
      frequencies: rotation frequency of each pair of features, in radians per position.
      scale: factor that multiplies the sines and cosines.
      long: how the frequencies change in long sequences; None if they do not.
    """

    frequencies: tuple[float, ...]
    scale: float = 1.0
    long: LongRotary | None = None


def rotate(
    x: Float[Array, "*B T N H"], frequencies: tuple[float, ...], scale: float
) -> Float[Array, "*B T N H"]:
    """Apply rotary positions.

    The first `2 * len(frequencies)` features of each head rotate, and the others stay unchanged.

    Args:
      x: queries or keys.
      frequencies: rotation frequency of each pair of features, in radians per position.
      scale: factor that multiplies the sines and cosines.
    """
    angles = (
        jnp.arange(x.shape[-3], dtype=jnp.float32)[:, None]
        * jnp.array(frequencies, jnp.float32)[None]
    )
    axes = (1,) * (x.ndim - 3) + (x.shape[-3], 1, len(frequencies))
    cos, sin = ((scale * f(angles)).astype(x.dtype).reshape(axes) for f in (jnp.cos, jnp.sin))
    half = len(frequencies)
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1)


def select_frequencies(
    frequencies: tuple[float, ...], long: LongRotary | None, length: int
) -> tuple[float, ...]:
    """Select the frequencies for sequences of some length.

    Args:
      frequencies: the frequencies for short sequences.
      long: how the frequencies change in long sequences; None if they do not.
      length: number of positions.
    """
    if long is None or length <= long[0]:
        return frequencies
    most, change = long
    if isinstance(change, tuple):
        return change
    # Dynamic scaling (bloc97 and emozilla 2023) multiplies the base by a power of this stretch.
    stretch = change * length / most - (change - 1)
    steps = np.arange(len(frequencies)) / (len(frequencies) - 1)
    return tuple((np.array(frequencies) * stretch**-steps).tolist())


def read_rope_options(
    config: Config,
    base_key: str = "rope_theta",
    default_base: float = 10000.0,
    share_key: str = "partial_rotary_factor",
    default_share: float | None = None,
) -> Config:
    """Read the options of rotary positions, which older files store under other names.

    As in transformers, `rope_scaling` takes the place of `rope_parameters` if a file has both, and
    what either of them contains takes precedence over the options `base_key` and `share_key`.

    Args:
      config: the options of the model.
      base_key: name of the option that holds the base in older files, which do not store it with
        the other options of rotary positions.
      default_base: the base if the config does not have it.
      share_key: name of the option that holds the share of rotated features in older files.
      default_share: that share if the config does not have it.

    Raises:
      ValueError: if the options are not an object.
    """
    key = "rope_scaling" if config.get("rope_scaling", None) else "rope_parameters"
    given = config.get(key, None) or {}
    if not isinstance(given, dict):
        raise config.reject(key, given, "an object")
    defaults = {"rope_theta": config.options.get(base_key, default_base)}
    share = config.get(share_key, default_share)
    if share is not None:
        defaults["partial_rotary_factor"] = share
    return config.inner(key, defaults | given)


def compute_rotary(
    config: Config, rope: Config, head_size: int, *, is_partial: bool = False
) -> Rotary:
    """Compute the frequencies of rotary positions, as transformers does.

    Args:
      config: the options of the model.
      rope: the options of rotary positions, which `read_rope_options` returned.
      head_size: number of features of each head.
      is_partial: whether the family can rotate a part of these features; others rotate all.

    Raises:
      ValueError: if the kind of scaling or one of its options is not supported.
    """
    if not isinstance(head_size, int) or not 1 <= head_size <= _MAX_HEAD_SIZE:
        raise config.reject("head_dim", head_size, f"1 to {_MAX_HEAD_SIZE:,} features of each head")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in _KINDS:
        raise rope.reject("rope_type", kind, ", ".join(_KINDS))
    size = head_size
    if is_partial and kind != "proportional":
        size = _read_size(rope, head_size)
    elif kind not in ("default", "proportional"):
        rope.expect("partial_rotary_factor", None, 1.0)
    base = rope.get_number("rope_theta", 10000.0)
    if base <= 0:
        raise rope.reject("rope_theta", base, "a positive number")
    unscaled = base ** (-np.arange(0, size, 2, dtype=np.float64) / size)
    scale, long = 1.0, None
    if kind == "default":
        found = unscaled
    elif kind == "linear":
        found = unscaled / rope.require("factor")
    elif kind == "dynamic":
        found, long = unscaled, _read_dynamic(rope, config, size)
    elif kind == "llama3":
        found = _scale_by_wavelength(unscaled, rope, config)
    elif kind == "yarn":
        found, scale = _scale_by_yarn(unscaled, base, size, rope, config)
    elif kind == "longrope":
        found, scale, long = _scale_by_longrope(unscaled, rope, config)
    else:
        found = _scale_proportionally(unscaled, rope)
    if not (np.isfinite(found).all() and np.isfinite(scale)):
        raise rope.reject("rope_type", kind, "options with which frequencies are finite")
    return Rotary(_to_floats(found), float(scale), long)


def _read_size(rope: Config, head_size: int) -> int:
    """Read the number of rotated features of each head."""
    share = rope.get_number("partial_rotary_factor", 1.0)
    size = int(head_size * share)
    # An odd number of features is rounded up to pairs.
    if size < 1 or size + size % 2 > head_size:
        raise rope.reject("partial_rotary_factor", share, f"a share of {head_size} features")
    return size


def _to_floats(frequencies: np.ndarray) -> tuple[float, ...]:
    return tuple(frequencies.astype(np.float32).tolist())


def _read_original_length(rope: Config, config: Config) -> int:
    """Read the length that a model was first trained with; the outer option takes precedence."""
    key = "original_max_position_embeddings"
    if key in config.options:
        return config.require(key)
    return rope.get(key, None) or config.require("max_position_embeddings")


def _read_factor(rope: Config, config: Config, length: int) -> float:
    factor = rope.get("factor", None)
    return config.require("max_position_embeddings") / length if factor is None else factor


def _read_dynamic(rope: Config, config: Config, size: int) -> LongRotary:
    """Read dynamic scaling, which changes only sequences longer than the model's."""
    if size % 2 or size < 4:
        raise rope.reject("rope_type", "dynamic", f"another kind for {size} rotated features")
    return config.require("max_position_embeddings"), float(rope.require("factor"))


def _scale_by_wavelength(unscaled: np.ndarray, rope: Config, config: Config) -> np.ndarray:
    """Scale as in Llama 3.1: divide low frequencies by a factor, and keep high ones unchanged."""
    factor, length = rope.require("factor"), _read_original_length(rope, config)
    low, high = rope.require("low_freq_factor"), rope.require("high_freq_factor")
    turns = length * unscaled / (2 * math.pi)
    share = np.clip((turns - low) / (high - low), 0, 1)
    return unscaled * (share + (1 - share) / factor)


def _scale_by_yarn(
    unscaled: np.ndarray, base: float, size: int, rope: Config, config: Config
) -> tuple[np.ndarray, float]:
    """Scale as in YaRN (Peng et al. 2023, arXiv:2309.00071); also return the scale of the sines."""
    if size % 2:
        raise rope.reject("rope_type", "yarn", f"another kind for {size} rotated features")
    length = _read_original_length(rope, config)
    factor = _read_factor(rope, config, length)
    fast, slow = rope.get("beta_fast", None) or 32, rope.get("beta_slow", None) or 1

    def compute_pair(num_turns: float) -> float:
        return size * math.log(length / (num_turns * 2 * math.pi)) / (2 * math.log(base))

    low, high = compute_pair(fast), compute_pair(slow)
    if rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    share = 1 - np.clip((np.arange(len(unscaled)) - low) / (high - low or 0.001), 0, 1)
    scale, mscale, over_all = (
        rope.get(key, None) for key in ("attention_factor", "mscale", "mscale_all_dim")
    )

    def compute_scale(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    if scale is None:
        scale = (
            compute_scale(mscale) / compute_scale(over_all)
            if mscale and over_all
            else compute_scale(1.0)
        )
    return unscaled * (share + (1 - share) / factor), scale


def _scale_by_longrope(
    unscaled: np.ndarray, rope: Config, config: Config
) -> tuple[np.ndarray, float, LongRotary]:
    """Scale as in LongRoPE (Ding et al. 2024, arXiv:2402.13753), by the length of sequences."""
    length = _read_original_length(rope, config)
    short, long = (_read_factors(rope, key, len(unscaled)) for key in _LONGROPE_FACTORS)
    factor, scale = _read_factor(rope, config, length), rope.get("attention_factor", None)
    if scale is None:
        scale = math.sqrt(1 + math.log(factor) / math.log(length)) if factor > 1 else 1.0
    return unscaled / short, scale, (int(length), _to_floats(unscaled / long))


def _read_factors(rope: Config, key: str, num: int) -> np.ndarray:
    factors = rope.require(key)
    if not isinstance(factors, list) or len(factors) != num:
        raise rope.reject(key, factors, f"a list of {num} numbers")
    found = np.array(factors, np.float64)
    if not (np.isfinite(found) & (found > 0)).all():
        raise rope.reject(key, factors, f"a list of {num} positive numbers")
    return found


def _scale_proportionally(unscaled: np.ndarray, rope: Config) -> np.ndarray:
    """Keep the first pairs of features of each head, and do not rotate the others."""
    num = int(rope.get_number("partial_rotary_factor", 1.0) * 2 * len(unscaled) // 2)
    kept = np.where(np.arange(len(unscaled)) < num, unscaled, 0.0)
    return kept / rope.get_number("factor", 1.0)
