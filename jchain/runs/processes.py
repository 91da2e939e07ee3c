"""Runs that several processes of `jax.distributed` make together."""

import pickle
from collections.abc import Callable
from typing import TypeVar

import jax
import numpy as np

from jchain.problem import Problem
from jchain.pytree import get_first_line
from jchain.runs.interruption import SIGNAL_NAMES

T = TypeVar("T")

_REASONS = ("callback", "max_seconds", *SIGNAL_NAMES)
_BLOCK_BYTES = 2**20


def is_shared(problem: Problem) -> bool:
    """Return whether the mesh of a problem has devices of other processes.

    Args:
      problem: the problem.
    """
    devices = () if problem.mesh is None else problem.mesh.devices.flat
    return any(device.process_index != jax.process_index() for device in devices)


def agree(reason: str | None) -> str | None:
    """Return the reason of any process, so that all processes of a run stop together.

    All processes must make this call.

    Args:
      reason: why this process wants to stop; None if it does not.
    """
    from jax.experimental.multihost_utils import process_allgather

    mine = 0 if reason is None else _REASONS.index(reason) + 1
    found = int(np.max(process_allgather(np.int32(mine))))
    return _REASONS[found - 1] if found else None


def call_on_first(call: Callable[[], T]) -> T:
    """Call a function on process 0, and return what it returned there.

    All processes must make this call.

    Args:
      call: the function. What it returns must be made of NumPy arrays and of Python's own types.

    Raises:
      Exception: what the function raised, on process 0.
      ValueError: on the other processes, with the first line of that error.
    """
    if jax.process_index() > 0:
        value, error = pickle.loads(_broadcast(b""))
        if error is not None:
            raise ValueError(error)
        return value
    try:
        value = call()
    except Exception as error:
        _broadcast(pickle.dumps((None, get_first_line(error))))
        raise
    _broadcast(pickle.dumps((value, None)))
    return value


def _broadcast(data: bytes) -> bytes:
    """Return the bytes that process 0 gave."""
    from jax.experimental.multihost_utils import broadcast_one_to_all

    # Without 64-bit numbers, a size of 2 GiB or more does not fit into one integer.
    size = np.array(divmod(len(data), _BLOCK_BYTES), np.int32)
    num_blocks, rest = np.asarray(broadcast_one_to_all(size)).tolist()
    buffer = np.zeros(num_blocks * _BLOCK_BYTES + rest, np.uint8)
    buffer[: len(data)] = np.frombuffer(data, np.uint8)
    return np.asarray(broadcast_one_to_all(buffer)).tobytes()
