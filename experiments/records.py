"""What experiments share: where ChainBench lies, what a result says of its machine, and keeping what was computed."""

import hashlib
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

import jchain as jc
from jchain.files import read_arrays, write_arrays

CACHE = Path.home() / ".cache" / "jchain"
CHAINBENCH = CACHE / "chainbench"


def describe_machine() -> dict[str, Any]:
    return {
        "device": f"{jax.devices()[0].device_kind}, {platform.machine()}",
        "versions": {"python": platform.python_version(), "jax": jax.__version__, "jchain": jc.__version__},
    }


def keep(script: str, name: str, inputs: Any, make: Callable[[], dict[str, Any]]) -> dict[str, np.ndarray]:
    """The arrays that `make` returns; from a file when they were made before, so that an interrupted run goes on.

    Args:
      script: the file of the experiment.
      name: of the file.
      inputs: what the arrays depend on beside the code of jchain and of the script: plain data or file contents.
      make: makes them.
    """
    path = CACHE / "experiments" / f"{name}-{_digest(script, inputs)}.safetensors"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_arrays(path, {}, make())
    return {key: np.asarray(array) for key, array in read_arrays(path)[1].items()}


def _digest(script: str, inputs: Any) -> str:
    digest = hashlib.sha256(repr((inputs, jax.__version__)).encode())
    for path in (Path(script), *sorted(Path(jc.__file__).parent.rglob("*.py"))):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
