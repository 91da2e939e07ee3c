"""A decorator that checks the arguments of a function against its annotations.

Each public function has it, so that a wrong argument ends in one line that names it, and not in an
error from inside JAX. A check looks at the kind of a value, at the dtype and rank of an array, and
at the items of a sequence; limits of values are checked by the function itself.
"""

import functools
import inspect
import math
import os
import sys
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, ParamSpec, TypeVar, Union

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jchain._typing import Activations
from jchain.arguments.values import is_integer, is_key, read_number
from jchain.pytree import describe_type, shorten

P = ParamSpec("P")
T = TypeVar("T")

# What the classes of a hint are called in errors, if not `a jc.Name`.
_WORDS = {
    "Batch": "one split of data, such as data.search or jc.Batch(x, y)",
    "HostBatch": "one split of data, such as data.search or jc.Batch(x, y)",
    "Dataset": "a data set of four splits, such as jc.data.load('digits')",
    "Module": "a linen module, such as jc.layers.Dense(64)",
    "GradientTransformation": "an optimizer, such as optax.adam(1e-3)",
    "Mesh": "a jax.sharding.Mesh",
    "Search": "a search, such as jc.LocalSearch(), decorated with @jc.pytree_dataclass",
    "Plan": "a plan, such as jc.engine.DepthFirst()",
    "Encoding": "an encoding, such as jc.TokenEncoding()",
}
_ARRAYS = {
    "Int": ("an array of integers", jnp.integer),
    "UInt": ("an array of unsigned integers", jnp.unsignedinteger),
    "Float": ("an array of floats", jnp.floating),
    "Bool": ("an array of booleans", jnp.bool_),
    "Shaped": ("an array", None),
}
_NUMBERS = (bool, int, float, complex, np.bool_, np.number)


class _Expectation(NamedTuple):
    """What a hint allows.

    Attributes:
      words: a description for errors.
      accepts: returns whether a value is allowed.
      axes: the names of the axes of an array. Axes of one name must have one size in all arguments.
    """

    words: str
    accepts: Callable[[object], bool]
    axes: tuple[str, ...] = ()


def checked(function: Callable[P, T], but: Sequence[str] = ()) -> Callable[P, T]:
    """Check the arguments of a function against its annotations before it is called.

    Traced values are checked as far as their dtype and rank.

    Args:
      function: a function whose arguments are annotated. What is annotated as `object`, `Any`, or
        a pytree is not checked.
      but: the names of arguments that the function checks itself, in words of its own.

    Returns:
      The function with the checks. It raises a `ValueError` that names the argument, what was
      expected, and what came. Axes of one name must have one size in all arguments, and in what has
      `named_sizes`, such as a problem.
    """
    parameters = list(inspect.signature(function).parameters)
    known = set(parameters)

    @functools.cache
    def read_hints() -> dict[str, _Expectation]:
        names = [name for name in parameters if name not in but]
        return _read_annotations(inspect.unwrap(function), names)

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> T:
        if not kwargs.keys() <= known:
            return function(*args, **kwargs)  # which names the unknown argument
        expected, sizes = read_hints(), {}
        for name, value in (*zip(parameters, args, strict=False), *kwargs.items()):
            if hasattr(type(value), "named_sizes"):
                sizes = _get_own_sizes(name, value) | sizes
            if name not in expected:
                continue
            _check(name, value, expected[name])
            if expected[name].axes and value is not None:
                _check_sizes(name, value, expected[name].axes, sizes)
        return function(*args, **kwargs)

    return wrapper


def check_fields(instance: object) -> None:
    """Check the fields of a dataclass against their annotations.

    Args:
      instance: an instance whose fields are set.

    Raises:
      ValueError: if a field holds something else, with its name, what was expected, and what came.
    """
    for name, expectation in _read_fields(type(instance)).items():
        _check(name, getattr(instance, name), expectation)


@functools.cache
def _read_fields(cls: type) -> dict[str, _Expectation]:
    return _read_annotations(cls, [*inspect.get_annotations(cls)])


def _read_annotations(source: Any, names: Sequence[str]) -> dict[str, _Expectation]:
    """Return what the annotations of a function or class allow, without those that allow all."""
    scope, found = vars(sys.modules[source.__module__]), {}
    for name in names:
        one = types.SimpleNamespace(__annotations__={name: source.__annotations__.get(name, Any)})
        try:
            expectation = _read(typing.get_type_hints(one, scope)[name])
        except NameError:  # a type that is imported only for type checkers
            continue
        if expectation:
            found[name] = expectation
    return found


def _check(name: str, value: object, expectation: _Expectation) -> None:
    if not expectation.accepts(value):
        raise ValueError(f"expected {name} to be {expectation.words}, got {_describe(value)}")


def _get_own_sizes(name: str, value: Any) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {axis: (name, (size,)) for axis, size in value.named_sizes.items()}


def _check_sizes(
    name: str, value: object, axes: tuple[str, ...], sizes: dict[str, tuple[str, tuple[int, ...]]]
) -> None:
    """Check that named axes have the sizes that earlier arguments gave them, and note new ones."""
    shape = np.shape(value)  # pyright: ignore[reportCallIssue, reportArgumentType]
    variadic = next((i for i, axis in enumerate(axes) if axis.startswith(("*", "..."))), None)
    num_last = 0 if variadic is None else len(axes) - variadic - 1
    for i, axis in enumerate(axes):
        if i == variadic:
            found = shape[i : len(shape) - num_last]
        else:
            place = i if variadic is None or i < variadic else i - len(axes)
            found = shape[place : place + 1 or None]
        if axis in ("...", "_"):
            continue
        other, known = sizes.setdefault(axis, (name, found))
        if found != known:
            size = f"{axis.lstrip('*')} = {', '.join(map(str, known)) or 'no axes'}"
            why = "" if other == name else f" with {size}, as in {other}"
            raise ValueError(
                f"expected {name} of shape [{', '.join(axes)}]{why}, got {list(shape)}"
            )


def _describe(value: object) -> str:
    """Describe a value: the value if it is short, else its type."""
    is_plain = value is None or isinstance(value, int | float | str | bytes | np.generic)
    return shorten(value) if is_plain else describe_type(value)


def _read(hint: Any) -> _Expectation | None:
    """Return what a hint allows; None if it allows everything."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is None or hint is type(None):
        return _Expectation("None", lambda value: value is None)
    if origin in (Union, types.UnionType):
        return _read_union(args)
    if origin is Literal:
        return _Expectation(
            f"one of {', '.join(map(repr, args))}",
            lambda value: isinstance(value, str) and value in args,
        )
    if origin is Callable or hint is Callable:
        return _read_function(args)
    if origin is tuple:
        return _read_tuple(args)
    if origin in (Sequence, Iterable, list):
        return _read_sequence(args[0])
    if origin in (Mapping, dict):
        item = _read(args[1])
        return _Expectation(
            f"a dict{f', each value {item.words}' if item else ''}",
            lambda value: (
                isinstance(value, Mapping)
                and (item is None or all(map(item.accepts, value.values())))
            ),
        )
    if hint == Activations:
        return _Expectation("an array or a pytree of arrays, with examples on axis 0", _is_batch)
    if os.PathLike in (hint, origin) or hint is Path:
        return _Expectation("a path", lambda value: isinstance(value, os.PathLike))
    if hasattr(hint, "dim_str"):
        return _read_array(hint.__name__.partition("[")[0], hint.dim_str)
    return _read_class(hint) if origin is None and isinstance(hint, type) else None


def _read_union(hints: Sequence[Any]) -> _Expectation | None:
    if jax.Array in hints:  # numbers beside arrays are arrays to JAX
        hints = [hint for hint in hints if hint not in _NUMBERS and hint is not np.ndarray]
        hints = [typing.cast(Any, np.ndarray) if hint is jax.Array else hint for hint in hints]
    members = [_read(hint) for hint in hints]
    if any(member is None for member in members):
        return None
    found = [member for member in members if member]
    words = list(dict.fromkeys(member.words for member in found))
    axes = next((member.axes for member in found if member.axes), ())
    is_one_kind = all(member.axes == axes for member in found if member.words != "None")
    return _Expectation(
        " or ".join(words),
        lambda value: any(member.accepts(value) for member in found),
        axes if is_one_kind else (),
    )


def _read_function(hints: Sequence[Any]) -> _Expectation:
    """Return what the hint of a function allows, from those of its arguments and of its value."""
    if not hints or not isinstance(hints[0], list):
        return _Expectation("a function", _is_function)
    number = len(hints[0])
    words = f"a function of {number} {'argument' if number == 1 else 'arguments'}"
    return _Expectation(words, lambda value: _is_function(value) and _takes(value, number))


def _takes(function: Any, num_arguments: int) -> bool:
    """Return whether a function can be called with some positional arguments, if that is known."""
    try:
        inspect.signature(function).bind(*[None] * num_arguments)
    except TypeError:
        return False
    except ValueError:  # a function of C has no signature
        return True
    return True


def _read_tuple(hints: Sequence[Any]) -> _Expectation:
    if len(hints) == 2 and hints[1] is Ellipsis:
        item = _read_sequence(hints[0])
        return _Expectation(
            item.words.replace("a sequence", "a tuple"),
            lambda value: isinstance(value, tuple) and item.accepts(value),
        )
    items = [_read(hint) for hint in hints]
    words = ", ".join(item.words if item else "any value" for item in items)
    return _Expectation(
        f"a tuple of {words}",
        lambda value: (
            isinstance(value, tuple)
            and len(value) == len(items)
            and all(
                item is None or item.accepts(part) for item, part in zip(items, value, strict=True)
            )
        ),
    )


def _read_sequence(hint: Any) -> _Expectation:
    item = _read(hint)

    def accepts(value: object) -> bool:
        if isinstance(value, np.ndarray):
            return value.ndim > 0 and (item is None or all(map(item.accepts, value)))
        if not isinstance(value, Sequence) or isinstance(value, str | bytes):
            return False
        return item is None or all(map(item.accepts, value))

    return _Expectation(f"a sequence{f', each item {item.words}' if item else ''}", accepts)


def _read_array(kind: str, axes: str) -> _Expectation | None:
    """Return what the hint of an array allows, from its kind, such as `Int`, and its axes."""
    names = axes.split()
    num_axes = sum(name != "..." and not name.startswith("*") for name in names)
    is_exact = num_axes == len(names)
    if kind == "Key":
        shape = f" of shape [{', '.join(names)}]" if names else ""
        words = (
            f"keys of jax.random.key{shape}, at least one" if names else "one key of jax.random.key"
        )
        return _Expectation(words, lambda value: is_key(value, num_axes))
    if kind not in _ARRAYS:
        return None
    words, parent = _ARRAYS[kind]

    def accepts(value: object) -> bool:
        dtype, shape = getattr(value, "dtype", None), getattr(value, "shape", None)
        if dtype is None or not isinstance(shape, tuple) or isinstance(value, type):
            return False
        try:
            is_kind = parent is None or jnp.issubdtype(dtype, parent)
        except TypeError:
            return False
        return is_kind and (len(shape) == num_axes if is_exact else len(shape) >= num_axes)

    if not names:  # one number
        return _Expectation(
            f"{words} with no axes", lambda value: accepts(value) and _is_number(value)
        )
    return _Expectation(f"{words} of shape [{', '.join(names)}]", accepts, tuple(names))


def _read_class(cls: Any) -> _Expectation | None:
    if cls in (object, Any) or cls.__name__.startswith("PyTree"):
        return None
    plain: dict[type, _Expectation] = {
        bool: _Expectation("True or False", lambda value: isinstance(value, bool | np.bool_)),
        int: _Expectation("an integer", is_integer),
        float: _Expectation("a number", _is_number),
        str: _Expectation("a string", lambda value: isinstance(value, str)),
        slice: _Expectation("a slice", lambda value: isinstance(value, slice)),
        np.ndarray: _Expectation("an array", _is_array),
        jax.Array: _Expectation("an array", _is_array),
    }
    if cls in plain:
        return plain[cls]
    words = _WORDS.get(cls.__name__, f"a jc.{cls.__name__}")
    if getattr(cls, "_is_protocol", False):
        shown = {n: v for n, v in vars(cls).items() if not n.startswith("_") or n == "__call__"}
        members = [name for name, value in shown.items() if inspect.isfunction(value)]
        num_arguments = None
        if "__call__" in members:
            num_arguments = len(inspect.signature(cls.__call__).parameters) - 1
        return _Expectation(
            words,
            lambda value: (
                not isinstance(value, type)
                and all(callable(getattr(value, name, None)) for name in members)
                and (num_arguments is None or _takes(value, num_arguments))
            ),
        )
    if cls.__name__ == "Batch":  # also an (x, y) tuple, which is read by `jchain.data.read_batch`
        return _Expectation(
            words,
            lambda value: isinstance(value, cls) or (type(value) is tuple and len(value) == 2),
        )
    return _Expectation(words, lambda value: isinstance(value, cls))


def _is_function(value: object) -> bool:
    return callable(value) and not isinstance(value, type)


def _is_array(value: object) -> bool:
    """Return whether a value is an array or a number."""
    if isinstance(value, type):
        return False
    return isinstance(value, _NUMBERS) or (hasattr(value, "dtype") and hasattr(value, "shape"))


def _is_batch(value: object) -> bool:
    """Return whether a value is a pytree of arrays of numbers with at least one example."""
    leaves = jax.tree.leaves(value)
    shapes = [getattr(leaf, "shape", None) for leaf in leaves]
    if not all(isinstance(shape, tuple) and shape and shape[0] > 0 for shape in shapes):
        return False
    kinds = (np.number, np.bool_)
    return bool(leaves) and all(
        any(jnp.issubdtype(leaf.dtype, kind) for kind in kinds) for leaf in leaves
    )


def _is_number(value: object) -> bool:
    if isinstance(value, Tracer):
        return value.ndim == 0
    return not math.isnan(read_number(value))
