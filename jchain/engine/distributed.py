"""Evaluation by several processes, one per host.

This wraps `jax.distributed` with a timeout that raises an error. Every process runs the same
program: it first calls `initialize`, and then makes the same calls with `mesh=make_mesh()`.
"""

import threading

import jax
import numpy as np
from jax.sharding import Mesh

from jchain.arguments import checked

# The timeout that is passed to JAX, in seconds. It is too long to be reached, because JAX would end
# the process without an exception.
_NEVER = 10**6


@checked
def initialize(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    timeout: float | int = 300,
) -> None:
    """Connect this process to the other processes.

    Call this function before any computation. On clusters that JAX recognizes (Slurm, Open MPI,
    Kubernetes, Cloud TPU), omit the first three arguments.

    Args:
      coordinator: the address `host:port` of process 0, which all processes can reach; None if JAX
        finds it.
      num_processes: the number of processes; None if JAX finds it.
      process_id: the index of this process, from 0; None if JAX finds it.
      timeout: the number of seconds to wait for the other processes.

    Raises:
      ValueError: if only some of the first three arguments are given, or process_id is out of
        range.
      TimeoutError: if not all processes joined in time.
      RuntimeError: if JAX has already computed something.
    """
    given = (coordinator, num_processes, process_id)
    if any(value is None for value in given) and any(value is not None for value in given):
        raise ValueError(
            "expected coordinator, num_processes, and process_id together, or none of them, got "
            f"{given}"
        )
    if num_processes is not None and process_id is not None and not 0 <= process_id < num_processes:
        raise ValueError(f"expected a process_id in 0..{num_processes - 1}, got {process_id}")
    errors = []

    def join() -> None:
        try:
            jax.distributed.initialize(*given, initialization_timeout=_NEVER)
        except Exception as error:  # raised again in the caller's thread
            errors.append(error)

    thread = threading.Thread(target=join, daemon=True)
    thread.start()
    thread.join(timeout)
    if thread.is_alive():
        expected = "all processes" if num_processes is None else f"{num_processes} processes"
        raise TimeoutError(
            f"expected {expected} to join at {coordinator or 'the coordinator that JAX found'} "
            f"within {timeout:g} seconds, but not all did: start the same command on every host"
        )
    if errors:
        raise errors[0]


def make_mesh() -> Mesh:
    """Return a mesh of all devices of all processes."""
    return Mesh(np.array(jax.devices()), ("chains",))
