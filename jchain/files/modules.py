"""Groups and modules as JSON. A module is the name of its class and its fields.

A file cannot import code: the name is looked up among the classes of `jchain.layers`, `flax.linen`,
the model families of `jchain.hub`, and the classes that the caller passes.
"""

import dataclasses
from collections.abc import Sequence
from importlib import import_module
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jchain import layers
from jchain._typing import PyTree
from jchain.groups import LayerGroup
from jchain.modules import FunctionModule, Module, NnxModule, describe_module
from jchain.modules.encoding import (
    decode_function,
    decode_nnx,
    decode_tree,
    encode_function,
    encode_nnx,
    encode_tree,
    get_only_item,
)
from jchain.pytree import get_first_line, shorten

# The Python modules that define the blocks of pretrained transformers, one per model family.
FAMILIES = (
    "jchain.hub.gpt2", "jchain.hub.llama", "jchain.hub.gpt_neox", "jchain.hub.vit",
    "jchain.hub.gemma", "jchain.hub.phi3", "jchain.hub.olmo", "jchain.hub.qwen3_moe",
    "jchain.hub.granite", "jchain.hub.starcoder2",
)  # fmt: skip
# The dtypes that a field may name.
_DTYPES = (
    "bool", "int4", "int8", "int16", "int32", "int64", "uint4", "uint8", "uint16", "uint32",
    "uint64", "bfloat16", "float16", "float32", "float64", "complex64", "complex128",
    "float8_e4m3fn", "float8_e5m2",
)  # fmt: skip
# Suffix of the group index, for the other collections of variables than params.
_STATE = "-state"
HUB = (*FAMILIES, "jchain.hub.attention", "jchain.hub.modules", "jchain.hub.wrapping")


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
    if isinstance(encoded.get("function"), str):
        return decode_function(encoded["function"], modules)
    if isinstance(encoded.get("nnx"), str):
        return decode_nnx(encoded, modules)
    name, fields = encoded.get("module"), encoded.get("fields")
    if not isinstance(name, str) or not isinstance(fields, dict):
        raise ValueError(f"expected a module and its fields, got {shorten(encoded)}")
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
    values = {field: _decode_value(value, modules) for field, value in fields.items()}
    try:
        return cls(**values)
    except (TypeError, ValueError, AttributeError) as error:
        reason = get_first_line(error)
        raise ValueError(f"{name} does not have the fields that were saved: {reason}") from None


def _decode_value(value: object, modules: Sequence[object]) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    kind, content = get_only_item(value, "the field of a module")
    if kind == "tuple" and isinstance(content, list):
        return tuple(_decode_value(item, modules) for item in content)
    if kind == "flax" and isinstance(content, dict):
        return decode_module(content, modules)
    if kind == "jax.nn" and content in _list_activations():
        return getattr(jax.nn, content)
    if kind == "dtype" and content in _DTYPES:
        return jnp.dtype(content)
    raise ValueError(
        f"expected a tuple, a module, a dtype, or a function of jax.nn, got {shorten(value)}"
    )


def _list_activations() -> list[str]:
    """List the functions of `jax.nn` that a field may name."""
    return [
        name
        for name, value in vars(jax.nn).items()
        if callable(value) and not isinstance(value, type) and not name.startswith("_")
    ]
