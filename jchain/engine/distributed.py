"""Several processes, one on each host: `jax.distributed` with a time limit that ends in an error.

Every process runs the same program: `initialize` first, then the same calls with `mesh=make_mesh()`.
"""

import threading

import jax
import numpy as np
from jax.sharding import Mesh

# JAX ends the whole process, without an exception, when its own limit is reached: so that limit is never reached.
_NEVER = 10**6


def initialize(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    timeout: float | int = 300,
) -> None:
    """Join the other processes. Call it before anything is computed.

    Args:
      coordinator: `host:port` of process 0, reachable by all. On clusters that JAX knows (Slurm, Open MPI, Kubernetes,
        Cloud TPU) this and the next two may be left out.
      num_processes: how many there are.
      process_id: which of them this is, from 0.
      timeout: seconds to wait for the others.

    Raises:
      ValueError: only some of the three are given, or they do not fit each other.
      TimeoutError: not all processes joined in time.
      RuntimeError: something was computed before.
    """
    given = (coordinator, num_processes, process_id)
    if any(value is None for value in given) and any(value is not None for value in given):
        raise ValueError(
            f"expected coordinator, num_processes and process_id together, or none of them, got {given}"
        )
    if num_processes is not None and process_id is not None and not 0 <= process_id < num_processes:
        raise ValueError(f"expected a process_id in 0..{num_processes - 1}, got {process_id}")
    errors = []

    def join() -> None:
        try:
            jax.distributed.initialize(*given, initialization_timeout=_NEVER)
        except Exception as error:  # handed to the caller's thread
            errors.append(error)

    thread = threading.Thread(target=join, daemon=True)
    thread.start()
    thread.join(timeout)
    if thread.is_alive():
        expected = "all processes" if num_processes is None else f"{num_processes} processes"
        raise TimeoutError(
            f"expected {expected} to join at {coordinator or 'the coordinator that JAX found'} within {timeout:g} seconds, "
            "but not all did: start the same command on every host"
        )
    if errors:
        raise errors[0]


def make_mesh() -> Mesh:
    """A mesh of all devices of all processes."""
    return Mesh(np.array(jax.devices()), ("chains",))
