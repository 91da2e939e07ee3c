"""Conversion of linen modules, nnx modules, and functions to one common interface."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import flax.linen as nn
import jax

from jchain._typing import PyTree
from jchain.modules import nnx
from jchain.modules.functions import FunctionModule
from jchain.modules.staged import StagedModule, unwrap
from jchain.pytree import describe_type

_MAX_CHARACTERS = 80
_EXPECTED = "an instance of a Flax linen or nnx module, or a function apply_fn(params, x)"


# What a bank applies. Modules are hashable, and equal modules share a group of a bank.
Module: TypeAlias = nn.Module | FunctionModule | nnx.NnxModule | StagedModule

# What a user may pass as a layer, head, or stem. Other types are refused by `convert`, whose error
# says more than that of a type checker at run time.
if TYPE_CHECKING:
    from flax import nnx as flax_nnx

    ModuleLike: TypeAlias = Module | flax_nnx.Module | Callable[[Any, Any], Any]
else:
    ModuleLike: TypeAlias = object


class Converted(NamedTuple):
    """A module in the form that banks hold, and its variables."""

    module: Module
    params: PyTree
    state: PyTree  # the other collections by name, or None if there are none


def convert(module: object, params: PyTree, kind: str) -> Converted:
    """Convert what a user passes for one layer, head, or stem.

    Args:
      module: a linen or nnx module, or a pure function `apply_fn(params, x)`.
      params: of a linen module, its params or all its collections, as in `{"params": ...,
        "batch_stats": ...}`; of a function, any pytree; None for an nnx module, which carries its
        own.
      kind: "layer 3", "head 0", or "stem", for errors.

    Raises:
      ValueError: if the module is of another kind, or an nnx module is given with params.
    """
    if nnx.is_nnx(module):
        if params is not None:
            raise ValueError(
                f"expected no params for {kind}, an nnx module, which carries its own, got "
                f"{describe_type(params)}"
            )
        structure, variables = nnx.split(module)  # pyright: ignore[reportArgumentType]
        return Converted(structure, variables.pop("params"), variables or None)
    if isinstance(module, FunctionModule | nnx.NnxModule):
        return Converted(module, *split_variables(module, params))
    if isinstance(module, nn.Module):
        return Converted(module, *split_variables(module, params))
    is_torch = type(module).__module__.partition(".")[0] == "torch"
    if isinstance(module, type) or not callable(module) or is_torch:
        raise ValueError(f"expected {_EXPECTED} for {kind}, got {describe_type(module)}")
    return Converted(FunctionModule(module), params, None)  # pyright: ignore[reportArgumentType]


def convert_stem(stem: ModuleLike | None, params: PyTree) -> tuple[Module | None, PyTree]:
    """Convert what a user passes as the stem of a bank.

    Args:
      stem: as for `convert`; None for the identity.
      params: as for `convert`.

    Returns:
      The module, and its params, or all its collections if it has others; None for no stem.

    Raises:
      ValueError: as for `convert`.
    """
    if stem is None:
        if params is not None:
            raise ValueError("expected a stem with stem_params, got only stem_params")
        return None, None
    module, params, state = convert(stem, params, "stem")
    return module, params if state is None else {"params": params, **state}


def apply_stem(stem: Module | None, params: PyTree, x: PyTree) -> PyTree:
    """Apply the stem of a bank to raw input.

    Args:
      stem: the module that `convert_stem` returned; None for the identity.
      params: its params, or all its collections.
      x: the raw input.
    """
    return x if stem is None else apply_module(stem, *split_variables(stem, params), x)


def split_variables(module: Module, variables: PyTree) -> tuple[PyTree, PyTree]:
    """Split the variables of a module into its params and its other collections.

    Args:
      module: the module.
      variables: its params, or all its collections, as in `{"params": ..., "batch_stats": ...}`.

    Returns:
      The params, and a dict of the other collections or None.
    """
    if isinstance(unwrap(module), FunctionModule):
        return variables, None
    if not isinstance(variables, Mapping) or not isinstance(variables.get("params"), Mapping):
        return variables, None
    others = {name: tree for name, tree in variables.items() if name != "params"}
    return variables["params"], others or None


def apply_module(module: Module, params: PyTree, state: PyTree, x: PyTree) -> Any:
    """Apply a module to a batch.

    Args:
      module: the module.
      params: its params; None for a linen module without params.
      state: its other collections of variables by name, or None.
      x: the activations of a batch, `[B, ...F]`, or a pytree of such arrays.
    """
    if isinstance(module, StagedModule):
        x, inner = module.read(x), module.module
        return module.write(x if inner is None else apply_module(inner, params, state, x))
    if params is None and not isinstance(module, FunctionModule):
        params = {}
    variables = {"params": params} if state is None else {"params": params, **state}
    # Pass other containers with the same arrays, because modules may write into a dict or list.
    own = jax.tree.map(lambda leaf: leaf, x)
    return module.apply(variables, own)  # pyright: ignore[reportArgumentType]


def describe_module(module: Module) -> str:
    """Describe a module in one line, as in `ResidualMLP(64, hidden=128)`.

    Fields that have their default values are left out.

    Args:
      module: any module of a bank.
    """
    if isinstance(module, StagedModule):
        return "identity" if module.module is None else describe_module(module.module)
    if isinstance(module, nnx.NnxModule):
        return module.cls.__name__
    if isinstance(module, FunctionModule):
        return name_function(module.apply_fn)
    parts = []
    for name, field in type(module).__dataclass_fields__.items():
        value = getattr(module, name, None)
        if name in ("parent", "name") or value is field.default:
            continue
        is_required = field.default is dataclasses.MISSING and not any("=" in p for p in parts)
        parts.append(_describe_value(value) if is_required else f"{name}={_describe_value(value)}")
    text = f"{type(module).__name__}({', '.join(parts)})"
    return text if len(text) <= _MAX_CHARACTERS else f"{type(module).__name__}(...)"


def name_function(function: Callable[..., object]) -> str:
    """Return the name of a function, or the type of a callable object.

    Args:
      function: the function.
    """
    return getattr(function, "__name__", type(function).__name__)


def _describe_value(value: object) -> str:
    if isinstance(value, nn.Module):
        return describe_module(value)
    return getattr(value, "__name__", None) or repr(value)
