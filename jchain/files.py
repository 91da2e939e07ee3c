"""Files of arrays: safetensors with a JSON header and a checksum, written atomically.

Nothing is pickled. A module is stored as the name of its class and its fields. A file cannot import
arbitrary code, because loading looks the name up among the classes of `jchain.layers`,
`flax.linen`, the model families of `jchain.hub`, and the classes that the caller passes.
"""

import dataclasses
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jchain import layers
from jchain._typing import Array, PyTree
from jchain.groups import LayerGroup
from jchain.modules import FunctionModule, Module, NnxModule, describe_module
from jchain.modules.encoding import (
    decode_function,
    decode_nnx,
    decode_tree,
    encode_function,
    encode_nnx,
    encode_tree,
)

FORMAT = "jchain/1"
# The Python modules that define the blocks of pretrained transformers, one per model family.
FAMILIES = ("jchain.hub.gpt2", "jchain.hub.llama", "jchain.hub.gpt_neox", "jchain.hub.vit")
# Suffix of the group index, for the other collections of variables than params.
_STATE = "-state"
HUB = (*FAMILIES, "jchain.hub.wrapping")


def write_atomically(path: str | os.PathLike[str], write_fn: Callable[[str], object]) -> None:
    """Write a temporary file next to `path`, then rename it.

    A reader sees either the old file or the complete new one.

    Args:
      path: the file to write.
      write_fn: function that takes the path of the temporary file and writes that file.
    """
    path = Path(path)
    handle, temporary = tempfile.mkstemp(
        dir=path.parent, prefix=f".{path.name}.", suffix=path.suffix
    )
    os.close(handle)
    try:
        write_fn(temporary)
        os.chmod(temporary, 0o666 & ~get_umask())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def write_json(path: str | os.PathLike[str], value: object) -> None:
    """Write a value as indented JSON.

    Args:
      path: the file to write, atomically.
      value: the value, which must be JSON-serializable.
    """
    write_atomically(
        path, lambda temporary: Path(temporary).write_text(json.dumps(value, indent=1) + "\n")
    )


def get_umask() -> int:
    """Return the umask of this process: the permission bits that new files do not get."""
    umask = os.umask(0)
    os.umask(umask)
    return umask


def write_arrays(
    path: str | os.PathLike[str], header: dict[str, Any], arrays: Mapping[str, ArrayLike]
) -> None:
    """Write named arrays and a JSON header to one file.

    Args:
      path: the file to write, atomically.
      header: the header, which must be JSON-serializable.
      arrays: the arrays by name.
    """
    import safetensors.flax

    arrays = {name: jnp.asarray(array) for name, array in arrays.items()}
    header = json.loads(json.dumps(header | {"format": FORMAT}))
    header["sha256"] = checksum(header, arrays)
    blob = safetensors.flax.save(arrays, metadata={"jchain": json.dumps(header)})
    write_atomically(path, lambda temporary: Path(temporary).write_bytes(blob))


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
            sizes = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
            arrays = {name: file.get_tensor(name) for name in sizes}
    except (
        safetensors.SafetensorError,
        KeyError,
        json.JSONDecodeError,
        UnicodeDecodeError,
        ValueError,
    ) as error:
        raise ValueError(f"{path} is damaged, truncated, or not a jchain file: {error}") from None
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
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def encode_groups(
    groups: Sequence[LayerGroup],
) -> tuple[list[dict[str, Any]], dict[str, PyTree]]:
    """Encode groups as JSON (modules and tokens) and a dict of their variables by group index.

    Args:
      groups: the groups of layers or heads of a bank.

    Raises:
      ValueError: if a module or its params cannot be encoded; see `encode_module`.
    """
    header, trees = [], {}
    for i, group in enumerate(groups):
        header.append(encode_module(group.module) | {"tokens": group.tokens})
        if group.stages != (0, 0):
            header[-1]["stages"] = group.stages
        for key, field in (("", "params"), (_STATE, "state")):
            tree = getattr(group, field)
            if field == "params" or tree is not None:
                structure, trees[f"{i}{key}"] = encode_tree(tree, describe_module(group.module))
                if structure is not None:
                    header[-1][f"{field}_structure"] = structure
    return header, trees


def decode_groups(
    header: Sequence[dict[str, Any]], trees: dict[str, PyTree], modules: Sequence[object] = ()
) -> tuple[LayerGroup, ...]:
    """Decode groups from what `encode_groups` returned.

    Args:
      header: the encoded module and the tokens of each group.
      trees: the variables by group index; groups without params may be missing.
      modules: the caller's own module classes, functions, and nnx modules.

    Raises:
      ValueError: if a module cannot be decoded; see `decode_module`.
    """
    groups = []
    for i, group in enumerate(header):
        params = decode_tree(group.get("params_structure"), trees.get(str(i), {}))
        state = None
        if f"{i}{_STATE}" in trees:
            state = decode_tree(group.get("state_structure"), trees[f"{i}{_STATE}"])
        module = decode_module(group, modules)
        read, write = group.get("stages", (0, 0))
        groups.append(LayerGroup(params, module, tuple(group["tokens"]), state, (read, write)))
    return tuple(groups)


def encode_module(module: Module) -> dict[str, Any]:
    """Encode a module as JSON: its name, and the fields of a linen module that are not defaults.

    Args:
      module: any module of a bank.

    Raises:
      ValueError: if a field is not plain data, a dtype, a module, or a function of `jax.nn`, or a
        function cannot be imported by its name.
    """
    if isinstance(module, FunctionModule):
        return encode_function(module)
    if isinstance(module, NnxModule):
        return encode_nnx(module)
    fields = {}
    for field in dataclasses.fields(module):
        value = getattr(module, field.name)
        if field.name in ("parent", "name") or value is field.default or value == field.default:
            continue
        fields[field.name] = _encode_value(value, f"{type(module).__name__}.{field.name}")
    return {"module": _name_class(type(module)), "fields": fields}


def _name_class(cls: type) -> str:
    """Return the name of a class, with its package unless it is the caller's own class.

    The package is needed because both `jchain.layers` and `flax.linen` have a class `Dense`.
    """
    for package in (layers, nn):
        if getattr(package, cls.__name__, None) is cls:
            return f"{package.__name__}.{cls.__name__}"
    return f"{cls.__module__}.{cls.__name__}" if cls.__module__ in HUB else cls.__name__


def _encode_value(value: Any, field: str) -> object:
    """Encode a field's value as JSON; `field` names the field in error messages."""
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, tuple | list):
        return {"tuple": [_encode_value(item, field) for item in value]}
    if isinstance(value, nn.Module):
        return {"flax": encode_module(value)}
    name = getattr(value, "__name__", "")
    if getattr(jax.nn, name, None) is value:
        return {"jax.nn": name}
    try:
        dtype = jnp.dtype(value)
    except TypeError:
        dtype = None
    if dtype is None or dtype == np.dtype(object):  # the dtype that NumPy gives to any class
        raise ValueError(
            f"{field} = {value!r} cannot be saved: expected data, a dtype, or a jax.nn function"
        )
    return {"dtype": dtype.name}


def decode_module(encoded: dict[str, Any], modules: Sequence[object] = ()) -> Module:
    """Decode a module from what `encode_module` returned.

    Args:
      encoded: the JSON value that `encode_module` returned.
      modules: the caller's own linen classes, functions, and nnx modules, which are found by name.

    Raises:
      ValueError: if the name is unknown, or the class does not have the encoded fields.
    """
    if "function" in encoded:
        return decode_function(encoded["function"], modules)
    if "nnx" in encoded:
        return decode_nnx(encoded, modules)
    name = encoded["module"]
    package, _, class_name = name.rpartition(".")
    hub = {package: vars(import_module(package))} if package in HUB else {}
    namespaces = hub | {
        layers.__name__: vars(layers),
        nn.__name__: vars(nn),
        "": {cls.__name__: cls for cls in modules if isinstance(cls, type)},
    }
    cls = namespaces.get(package, {}).get(class_name)
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise ValueError(
            f"unknown module {name!r}: pass its class, as in Bank.load(path, modules=[{name}])"
        )
    try:
        return cls(
            **{field: _decode_value(value, modules) for field, value in encoded["fields"].items()}
        )
    except TypeError as error:
        raise ValueError(f"{name} does not have the fields that were saved: {error}") from None


def _decode_value(value: Any, modules: Sequence[object]) -> Any:
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tuple":
        return tuple(_decode_value(item, modules) for item in content)
    if kind == "flax":
        return decode_module(content, modules)
    return getattr(jax.nn, content) if kind == "jax.nn" else jnp.dtype(content)
