"""Checks of values: of their kind and of their limits."""

import math
from typing import Any, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jchain.pytree import describe_type, shorten

# JAX counts with 32 bits.
_MAX_SIZE = 2**31 - 1
# Larger arrays of chains overflow what XLA computes from their sizes, which ends the process.
_MAX_ARRAY = 2**24


def is_integer(value: object) -> TypeGuard[int | np.integer]:
    """Return whether a value is an integer, of Python or NumPy, and not a boolean.

    Args:
      value: any value.
    """
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def check_integers(*, at_least: int, at_most: int = _MAX_SIZE, **values: object) -> None:
    """Check that values are integers.

    Args:
      at_least: the smallest value that is allowed.
      at_most: the largest value that is allowed.
      **values: the values by name.

    Raises:
      ValueError: if a value is not an integer, below `at_least`, or above `at_most`.
    """
    for name, value in values.items():
        kind = "" if is_integer(value) else "an integer of "
        if kind or value < at_least:  # pyright: ignore[reportOperatorIssue]
            raise ValueError(
                f"expected {name} to be {kind}at least {at_least}, got {shorten(value)}"
            )
        if value > at_most:  # pyright: ignore[reportOperatorIssue]
            raise ValueError(f"expected {name} to be at most {at_most}, got {shorten(value)}")


def check_at_least_one(**sizes: object) -> None:
    """Check that sizes are integers of at least 1.

    Args:
      **sizes: the sizes by name.

    Raises:
      ValueError: if a size is not an integer, below 1, or above 2^24.
    """
    check_integers(at_least=1, at_most=_MAX_ARRAY, **sizes)


def check_numbers(
    *,
    above: float | int | None = None,
    at_least: float | int | None = None,
    at_most: float | int | None = None,
    is_finite: bool = True,
    **values: object,
) -> None:
    """Check that values are numbers in a range. Traced values are not checked.

    Args:
      above: a number that the values must be above; None for no such limit.
      at_least: the smallest value that is allowed; None for no such limit.
      at_most: the largest value that is allowed; None for no such limit.
      is_finite: whether infinity is refused; nan always is.
      **values: the values by name: numbers of Python, NumPy, or JAX.

    Raises:
      ValueError: if a value is not a number, or out of the range.
    """
    for name, value in values.items():
        if isinstance(value, Tracer):
            continue
        number = read_number(value)
        is_valid = (
            (math.isfinite(number) or (not is_finite and math.isinf(number)))
            and (above is None or number > above)
            and (at_least is None or number >= at_least)
            and (at_most is None or number <= at_most)
        )
        if not is_valid:
            kind = "finite number" if is_finite else "number"
            limits = (("above", above), ("of at least", at_least), ("of at most", at_most))
            words = " and ".join(f"{word} {end:g}" for word, end in limits if end is not None)
            raise ValueError(
                f"expected {name} to be a {kind}{words and f' {words}'}, got {shorten(value)}"
            )


def check_functions(**values: object) -> None:
    """Check that values can be called. A class is refused: it is not a function of its instances.

    Args:
      **values: the values by name.

    Raises:
      ValueError: if a value is not callable, or a class.
    """
    for name, value in values.items():
        if not callable(value) or isinstance(value, type):
            raise ValueError(f"expected {name} to be a function, got {describe_type(value)}")


def check_flags(**values: object) -> None:
    """Check that values are True or False.

    Args:
      **values: the values by name.

    Raises:
      ValueError: if a value is something else.
    """
    for name, value in values.items():
        if not isinstance(value, bool | np.bool_):
            raise ValueError(f"expected {name} to be True or False, got {shorten(value)}")


def check_instances(kind: type, example: str, **values: object) -> None:
    """Check that values are instances of a class.

    Args:
      kind: the class.
      example: code that makes an instance, for the error.
      **values: the values by name.

    Raises:
      ValueError: if a value is something else, for example the class itself or its name.
    """
    for name, value in values.items():
        if not isinstance(value, kind):
            raise ValueError(f"expected {name} such as {example}, got {describe_type(value)}")


def read_array(
    name: str, value: Any, dtype: type[np.float64] | type[np.float32] | None = None
) -> np.ndarray:
    """Return a value as an array in host memory.

    Args:
      name: the name of the argument, for the error.
      value: an array, a number, or nested sequences of numbers or strings.
      dtype: the dtype of the array; None for that of the values.

    Raises:
      ValueError: if the value is something else.
    """
    try:
        array = np.asarray(value, dtype)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        array = None
    if array is None or array.dtype.kind not in "biufSU":
        kind = "numbers or strings" if dtype is None else "numbers"
        raise ValueError(f"expected {name} to be an array of {kind}, got {describe_type(value)}")
    return array


def read_numbers(name: str, value: Any) -> jax.Array:
    """Return real numbers as a float32 array.

    Args:
      name: the name of the argument, for the error.
      value: an array, a number, or nested sequences of numbers. Traced ones are not checked.

    Raises:
      ValueError: if the value is something else.
    """
    is_traced = any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(value))
    if not is_traced and read_array(name, value).dtype.kind not in "iuf":
        raise ValueError(f"expected {name} to be numbers, got {shorten(value)}")
    return jnp.asarray(value, jnp.float32)


def is_key(keys: object, num_axes: int) -> bool:
    """Return whether a value is an array of typed PRNG keys, at least one.

    Args:
      keys: any value.
      num_axes: the number of axes that the array must have; 0 for one key.
    """
    dtype, shape = getattr(keys, "dtype", None), getattr(keys, "shape", None)
    if dtype is None or not isinstance(shape, tuple) or isinstance(keys, type):
        return False
    try:
        is_key_type = jnp.issubdtype(dtype, jax.dtypes.prng_key)
    except TypeError:
        return False
    return is_key_type and len(shape) == num_axes and 0 not in shape


def read_number(value: Any) -> float:
    """Return a number as a float, and nan for anything else.

    Args:
      value: any value.
    """
    is_array = hasattr(value, "dtype") and getattr(value, "shape", None) == ()
    if isinstance(value, bool) or not (is_array or isinstance(value, int | float)):
        return math.nan
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan
