"""Array types for public signatures, from jaxtyping or as placeholders if it is not installed."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jax.typing import ArrayLike
    from jaxtyping import Array, Bool, Float, Int, Key, PyTree, Shaped, UInt

    class Numbers:
        """A field that accepts a number or several, and holds them as an array."""

        def __get__(self, instance: object, owner: object) -> Array: ...
        def __set__(self, instance: object, value: ArrayLike | Sequence[float]) -> None: ...

    class OptionalNumbers:
        """A field that also accepts None. Its users check that, so it reads as any type."""

        def __get__(self, instance: object, owner: object) -> Any: ...
        def __set__(self, instance: object, value: ArrayLike | Sequence[float] | None) -> None: ...

else:
    # `jchain.Problem` checks these fields itself.
    Numbers = OptionalNumbers = object
    try:
        from jaxtyping import Array, Bool, Float, Int, Key, PyTree, Shaped, UInt
    except ImportError:

        class _Hint:
            """A placeholder that keeps what `jchain.arguments.checked` reads."""

            def __class_getitem__(cls, hint: tuple[object, str]) -> type:
                return type(f"{cls.__name__}[...]", (), {"dim_str": hint[1]})

        class PyTree:
            def __class_getitem__(cls, _: object) -> type:
                return type("PyTree[...]", (), {})

        Array = Any
        Bool, Float, Int, Key, Shaped, UInt = (
            type(name, (_Hint,), {}) for name in ("Bool", "Float", "Int", "Key", "Shaped", "UInt")
        )

# Examples or activations of a batch: one array, or a pytree of arrays (several inputs, a stream
# beside a mask), each with the examples on its leading axis.
Activations = PyTree[Shaped[Array, "B ..."]]

__all__ = [
    "Activations",
    "Array",
    "Bool",
    "Float",
    "Int",
    "Key",
    "Numbers",
    "OptionalNumbers",
    "PyTree",
    "Shaped",
    "UInt",
]
