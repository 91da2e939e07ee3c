"""Array types for public signatures, from jaxtyping or as placeholders if it is not installed."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float, Int, Key, PyTree, Shaped, UInt
else:
    try:
        from jaxtyping import Array, Bool, Float, Int, Key, PyTree, Shaped, UInt
    except ImportError:

        class _Unchecked:
            def __class_getitem__(cls, _: object) -> object:
                return Any

        Array = Any
        Bool = Float = Int = Key = PyTree = Shaped = UInt = _Unchecked

# Examples or activations of a batch: one array, or a pytree of arrays (several inputs, a stream
# beside a mask), each with the examples on its leading axis.
Activations = PyTree[Shaped[Array, "B ..."]]

__all__ = ["Activations", "Array", "Bool", "Float", "Int", "Key", "PyTree", "Shaped", "UInt"]
