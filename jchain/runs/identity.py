"""What a run is: its search, its problem, and its arguments, so that runs can be compared.

A run that continues from files must be the run that wrote them. Large arrays are described by a
hash of their content.
"""

import dataclasses
import hashlib
import re
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jchain.engine.fingerprint import describe_function
from jchain.modules.host_batch import HostBatch
from jchain.runs.stepping import RunSpec

# Arrays of at most this many numbers are written out.
_MAX_SHOWN = 8
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")
# The fields of a linen module that say where it is used, not what it computes.
_MODULE_FIELDS = ("parent", "name")


def describe_run(spec: RunSpec) -> dict[str, object]:
    """Describe everything that the steps of a run depend on, as JSON.

    Names of layers, the budget, and the device are left out.

    Args:
      spec: what the runs are.
    """
    problem = spec.problem
    bank, data = problem.bank, problem.data
    groups = {
        kind: [
            {
                "module": describe(group.module),
                "tokens": list(group.tokens),
                "weights": _hash_tree((group.params, group.state)),
            }
            for group in given
        ]
        for kind, given in (("layers", bank.layers), ("heads", bank.heads))
    }
    is_host = isinstance(data, HostBatch)
    versions = None if bank.versions is None else describe(bank.versions)
    return {
        "search": describe(spec.search),
        "keys": describe(spec.keys),
        "bank": {
            **groups,
            "stem": describe(bank.stem),
            "stem_weights": _hash_tree(bank.stem_params),
            "versions": versions,
        },
        "data": f"source {data.source.fingerprint}" if is_host else _hash_tree((data.x, data.y)),
        "problem": {
            name: describe(getattr(problem, name))
            for name in (
                "max_layers",
                "min_layers",
                "batch_size",
                "loss_fn",
                "accuracy_fn",
                "layer_cost",
                "token_costs",
                "max_cost",
            )
        },
        "starts": spec.starts.tolist(),
        "num_finalists": int(spec.num_finalists),
        "record_fn": describe(spec.recording.record_fn),
        "jax_enable_x64": bool(jax.config.read("jax_enable_x64")),
        "versions": {name: version(name) for name in ("jchain", "jax", "jaxlib")},
    }


def find_differences(old: object, new: object, name: str = "") -> list[str]:
    """List what differs between two descriptions, as `search.num_chains: 8 there, 16 here`.

    Args:
      old: the description that was read.
      new: the description of the present run.
      name: the name of both.
    """
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        return [
            line
            for key in {**old, **new}
            for line in find_differences(
                old.get(key, "nothing"), new.get(key, "nothing"), f"{name}.{key}" if name else key
            )
        ]
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        pairs = enumerate(zip(old, new, strict=True))
        return [line for i, pair in pairs for line in find_differences(*pair, f"{name}[{i}]")]
    return [] if old == new else [f"{name}: {_shorten(old)} there, {_shorten(new)} here"]


def describe(value: object) -> object:
    """Describe a value as JSON that is equal in another process.

    Args:
      value: a search, a module, a function, an array, a number, or a container of these.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, np.ndarray | np.generic | jax.Array):
        return _describe_array(value)
    if isinstance(value, type):
        return f"{value.__module__}.{value.__qualname__}"
    if dataclasses.is_dataclass(value):
        names = [field.name for field in dataclasses.fields(value)]
        fields = {
            name: describe(getattr(value, name)) for name in names if name not in _MODULE_FIELDS
        }
        return {"class": describe(type(value)), **fields}
    if isinstance(value, tuple) and hasattr(value, "_fields"):  # a NamedTuple
        names = value._fields  # pyright: ignore[reportAttributeAccessIssue]
        items = dict(zip(names, value, strict=True))
        return {"class": describe(type(value)), **describe_items(items)}
    if isinstance(value, Mapping):
        return describe_items(value)
    if isinstance(value, list | tuple):
        return [describe(item) for item in value]
    if callable(value):
        text = _ADDRESS.sub("", repr(describe_function(value)))
        name = getattr(value, "__qualname__", type(value).__qualname__)
        return f"{name} {_hash_bytes(text.encode())}"
    return _ADDRESS.sub("", repr(value))


def describe_items(items: Mapping[Any, object]) -> dict[str, object]:
    """Describe the values of a mapping.

    Args:
      items: the mapping, whose keys are turned into strings.
    """
    return {str(key): describe(item) for key, item in items.items()}


def _describe_array(value: np.ndarray | np.generic | jax.Array) -> object:
    if isinstance(value, jax.Array) and jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
        return f"{jax.random.key_impl(value)} {_describe_array(jax.random.key_data(value))}"
    array = np.asarray(value)
    name = f"{array.dtype}{list(array.shape)}"
    if array.size <= _MAX_SHOWN:
        return f"{name} {array.tolist()}"
    return f"{name} {_hash_bytes(np.ascontiguousarray(array))}"


def _hash_tree(tree: Any) -> str:
    leaves, structure = jax.tree.flatten(tree)
    described = [_describe_array(leaf) for leaf in leaves]
    return _hash_bytes(f"{structure} {described}".encode())


def _hash_bytes(data: bytes | np.ndarray) -> str:
    buffer = data if isinstance(data, bytes) else data.view(np.uint8).reshape(-1).data
    return hashlib.sha256(buffer).hexdigest()[:16]


def _shorten(value: object, num_characters: int = 60) -> str:
    text = str(value)
    return text if len(text) <= num_characters else f"{text[:num_characters]}..."
