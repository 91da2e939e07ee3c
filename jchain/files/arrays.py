"""Files of named arrays: safetensors with a JSON header and a checksum."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jchain._typing import Array
from jchain.files.atomic import write_atomically
from jchain.pytree import get_first_line, shorten

FORMAT = "jchain/1"


def write_arrays(
    path: str | os.PathLike[str], header: dict[str, Any], arrays: Mapping[str, ArrayLike]
) -> None:
    """Write named arrays and a JSON header to one file.

    Args:
      path: the file to write, atomically.
      header: the header, which must be JSON-serializable.
      arrays: the arrays by name.
    """
    from safetensors.numpy import save_file

    # As JAX keeps them, so that 64-bit numbers become 32-bit ones unless they are enabled.
    rows = {name: np.asarray(jnp.asarray(array), order="C") for name, array in arrays.items()}
    header = json.loads(json.dumps(header | {"format": FORMAT}))
    header["sha256"] = checksum(header, rows)
    metadata = {"jchain": json.dumps(header)}
    write_atomically(path, lambda temporary: save_file(rows, temporary, metadata))


def read_arrays(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Array]]:
    """Read the JSON header and the arrays of a file written by `write_arrays`.

    Args:
      path: the file to read.

    Raises:
      FileNotFoundError: if the file does not exist.
      ValueError: if the file is damaged or truncated, has another format, or holds dtypes that need
        `jax_enable_x64`.
    """
    import safetensors

    if not Path(path).is_file():
        raise FileNotFoundError(f"expected a jchain file at {path}, found none")
    try:
        with safetensors.safe_open(path, framework="flax") as file:
            header = json.loads((file.metadata() or {})["jchain"])
            if not isinstance(header, dict):
                raise ValueError(f"expected a header with fields, got {shorten(header)}")
            sizes = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
            # JAX keeps what it copies from until the copy is done.
            arrays = {name: file.get_tensor(name).block_until_ready() for name in sizes}
    except (
        safetensors.SafetensorError,
        KeyError,
        json.JSONDecodeError,
        UnicodeDecodeError,
        ValueError,
        RecursionError,
    ) as error:
        reason = get_first_line(error)
        raise ValueError(f"{path} is damaged, truncated, or not a jchain file: {reason}") from None
    if header.get("format") != FORMAT:
        raise ValueError(f"{path}: expected format {FORMAT!r}, got {header.get('format')!r}")
    is_x64 = jax.dtypes.canonicalize_dtype(np.float64) == np.float64
    if not is_x64 and any(dtype in ("F64", "I64", "U64") for dtype in sizes.values()):
        raise ValueError(
            f"{path} holds 64-bit weights: set jax_enable_x64 to load them to the same bits"
        )
    if header.pop("sha256", None) != checksum(header, arrays):
        raise ValueError(f"{path} is damaged: it does not have the checksum it was saved with")
    return header, arrays


def checksum(header: dict[str, Any], arrays: Mapping[str, ArrayLike]) -> str:
    """Compute the SHA-256 of the header and of the arrays' names, dtypes, shapes, and contents.

    Args:
      header: the header, which must be JSON-serializable.
      arrays: the arrays by name.
    """
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for name in sorted(arrays):
        array = np.asarray(arrays[name])
        digest.update(f"{name} {array.dtype} {array.shape};".encode())
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()
