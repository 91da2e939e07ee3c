"""Modules and their variables as JSON, for files of banks. Nothing is pickled or imported."""

import hashlib
import re
import sys
from collections.abc import Sequence
from typing import Any

from jchain._typing import PyTree
from jchain.modules import nnx
from jchain.modules.convert import name_function
from jchain.modules.functions import FunctionModule
from jchain.pytree import describe_type, shorten


def encode_function(module: FunctionModule) -> dict[str, Any]:
    """Encode a function by its name.

    Args:
      module: the function as a module.

    Raises:
      ValueError: if the function cannot be imported by its name, as a lambda or an inner function.
    """
    function = module.apply_fn
    name = name_function(function)
    owner = sys.modules.get(getattr(function, "__module__", ""))
    if getattr(owner, name, None) is not function:
        raise ValueError(
            f"{name} cannot be saved: expected a function that can be imported by its name, so "
            "that it can be found again"
        )
    return {"function": name}


def decode_function(name: str, modules: Sequence[object]) -> FunctionModule:
    """Find a saved function among those that the caller passes.

    Args:
      name: the saved name.
      modules: the functions, and other modules, that the caller passes.

    Raises:
      ValueError: if no function has this name.
    """
    for module in modules:
        if callable(module) and not isinstance(module, type) and name_function(module) == name:
            return FunctionModule(module)  # pyright: ignore[reportArgumentType]
    raise ValueError(f"unknown function {name!r}: pass it, as in Bank.load(path, modules=[{name}])")


def encode_nnx(module: nnx.NnxModule) -> dict[str, Any]:
    """Encode the structure of an nnx module by its class and a digest.

    Args:
      module: the structure.
    """
    return {"nnx": module.cls.__name__, "digest": _digest(module)}


def decode_nnx(encoded: dict[str, Any], modules: Sequence[object]) -> nnx.NnxModule:
    """Find a saved structure among the nnx modules that the caller passes.

    Args:
      encoded: what `encode_nnx` returned.
      modules: instances of the nnx modules, with any weights, and other modules.

    Raises:
      ValueError: if no instance has the class and the structure that were saved.
    """
    name = encoded["nnx"]
    found = [m for m in modules if nnx.is_nnx(m) and type(m).__name__ == name]
    for module in found:
        structure = nnx.split(module)[0]  # pyright: ignore[reportArgumentType]
        if _digest(structure) == encoded["digest"]:
            return structure
    if found:
        raise ValueError(f"expected an nnx module {name} of the saved structure, got another one")
    raise ValueError(
        f"unknown nnx module {name!r}: pass an instance, with any weights, as in "
        f"Bank.load(path, modules=[{name}(...)])"
    )


def _digest(module: nnx.NnxModule) -> str:
    text = re.sub(r" at 0x[0-9a-f]+", "", repr((module.graphdef, module.streams)))
    return hashlib.sha256(text.encode()).hexdigest()


def encode_tree(tree: PyTree, name: str) -> tuple[object, dict[str, Any]]:
    """Encode variables as a nested dict of arrays, which a file can hold.

    Args:
      tree: nested dicts, lists, tuples, and None, with arrays as leaves.
      name: what to call the module in errors.

    Returns:
      The structure as JSON and the arrays. The structure is None if `tree` is nested dicts with
      names as keys, which is then returned itself.

    Raises:
      ValueError: if the tree has nodes of another type.
    """
    if _is_plain(tree):
        return None, tree
    leaves: dict[str, Any] = {}
    return _encode_node(tree, leaves, name), leaves


def decode_tree(structure: Any, arrays: Any) -> PyTree:
    """Decode what `encode_tree` returned.

    Args:
      structure: the structure as JSON, or None.
      arrays: the arrays.

    Raises:
      ValueError: if the structure is not from `encode_tree`, or an array is missing.
    """
    if structure is None:
        return arrays
    kind, content = get_only_item(structure, "the structure of params")
    if kind == "leaf" and isinstance(content, str):
        if not isinstance(arrays, dict) or not hasattr(arrays.get(content), "dtype"):
            raise ValueError(f"expected an array {shorten(content)} of params, got none")
        return arrays[content]
    if kind == "none":
        return None
    if kind == "dict" and isinstance(content, list) and all(map(_is_pair, content)):
        return {key: decode_tree(value, arrays) for key, value in content}
    if kind in ("list", "tuple") and isinstance(content, list):
        items = [decode_tree(value, arrays) for value in content]
        return items if kind == "list" else tuple(items)
    raise ValueError(
        f"expected leaf, none, dict, list, or tuple in the structure of params, got {shorten(kind)}"
    )


def get_only_item(value: object, name: str) -> tuple[str, Any]:
    """Return the kind and the content of an encoded value, a dict of one item.

    Args:
      value: the encoded value.
      name: what to call it in errors.

    Raises:
      ValueError: if it is something else.
    """
    if not isinstance(value, dict) or len(value) != 1:
        raise ValueError(f"expected one kind of value in {name}, got {shorten(value)}")
    ((kind, content),) = value.items()
    return kind, content


def _is_pair(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and isinstance(value[0], str | int)


def _is_plain(tree: PyTree) -> bool:
    """Whether a tree is nested dicts, none of them empty, with names as keys."""
    if not isinstance(tree, dict):
        return False
    for key, value in tree.items():
        if not isinstance(key, str) or "/" in key:
            return False
        is_inner = isinstance(value, dict) and value
        if (is_inner and not _is_plain(value)) or not (is_inner or hasattr(value, "dtype")):
            return False
    return True


def _encode_node(tree: PyTree, leaves: dict[str, Any], name: str) -> dict[str, Any]:
    if tree is None:
        return {"none": True}
    if hasattr(tree, "dtype"):
        leaves[str(len(leaves))] = tree
        return {"leaf": str(len(leaves) - 1)}
    if type(tree) is dict and all(isinstance(key, str | int) for key in tree):
        return {"dict": [[key, _encode_node(value, leaves, name)] for key, value in tree.items()]}
    if type(tree) in (list, tuple):
        return {type(tree).__name__: [_encode_node(value, leaves, name) for value in tree]}
    raise ValueError(
        f"the params of {name} cannot be saved: expected nested dicts, lists, and tuples of "
        f"arrays, got {describe_type(tree)}"
    )
