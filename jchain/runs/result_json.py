"""Results as JSON text, and back."""

import json
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jchain.pytree import describe_type
from jchain.runs.front import Front
from jchain.runs.scored_chains import ScoredChains


def encode(value: object) -> Any:
    """Return a part of a result as JSON.

    Numbers that are not finite become strings, because JSON has none.

    Args:
      value: arrays, numbers, text, and None, in dicts, lists, tuples, fronts, and scored chains.

    Raises:
      ValueError: if there is a value of another type.
    """
    if isinstance(value, np.ndarray | jax.Array):
        array = np.asarray(value)
        data = array.astype(np.float64) if jnp.issubdtype(array.dtype, jnp.floating) else array
        flat = [_encode_number(number) for number in data.reshape(-1).tolist()]
        return {"dtype": str(array.dtype), "shape": list(array.shape), "data": flat}
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return {"float": _encode_number(value)}
    if isinstance(value, Front | ScoredChains):
        return {type(value).__name__: [encode(item) for item in value]}
    if type(value) is dict and all(isinstance(key, str) for key in value):
        return {"dict": {key: encode(item) for key, item in value.items()}}
    if type(value) in (list, tuple):
        return {type(value).__name__: [encode(item) for item in value]}  # pyright: ignore
    raise ValueError(
        "expected results of arrays, numbers, and text in dicts, lists, and tuples, got "
        f"{describe_type(value)}"
    )


def decode(value: Any) -> Any:
    """Return what `encode` was given; arrays are NumPy arrays.

    Args:
      value: the JSON.
    """
    if not isinstance(value, dict):
        return value
    if "dtype" in value:
        flat = [float(one) if isinstance(one, str) else one for one in value["data"]]
        dtype = jnp.dtype(value["dtype"])
        if not (jnp.issubdtype(dtype, jnp.number) or jnp.issubdtype(dtype, jnp.bool_)):
            raise ValueError(f"expected an array of numbers, got {dtype}")
        return np.array(flat).astype(dtype).reshape(value["shape"])
    ((kind, content),) = value.items()
    if kind == "float":
        return float(content)
    if kind == "dict":
        return {key: decode(item) for key, item in content.items()}
    items = [decode(item) for item in content]
    classes = {"Front": Front, "ScoredChains": ScoredChains}
    return classes[kind](*items) if kind in classes else items if kind == "list" else tuple(items)


def dump(fields: dict[str, object]) -> str:
    """Return the fields of a result as JSON text.

    Args:
      fields: the fields by name.

    Raises:
      ValueError: as for `encode`.
    """
    return json.dumps({name: encode(value) for name, value in fields.items()}, allow_nan=False)


def load(text: str) -> dict[str, Any]:
    """Return the fields that `dump` was given.

    Args:
      text: the JSON text.

    Raises:
      ValueError: if the text is not what `dump` returns.
    """
    try:
        return {name: decode(value) for name, value in json.loads(text).items()}
    except (
        ArithmeticError,
        AttributeError,
        LookupError,
        RecursionError,
        TypeError,
        ValueError,
    ) as error:
        raise ValueError(f"expected the JSON text of a jc.Result, got {text[:40]!r}") from error


def _encode_number(number: Any) -> Any:
    return number if not isinstance(number, float) or math.isfinite(number) else str(number)
