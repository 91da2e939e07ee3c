"""Array shapes for public signatures: jaxtyping's where it is installed, which evaluation does not need."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float, Int, Key, PyTree, Shaped
else:
    try:
        from jaxtyping import Array, Bool, Float, Int, Key, PyTree, Shaped
    except ImportError:

        class _Unchecked:
            def __class_getitem__(cls, _: Any) -> Any:
                return Any

        Array = Any
        Bool = Float = Int = Key = PyTree = Shaped = _Unchecked

__all__ = ["Array", "Bool", "Float", "Int", "Key", "PyTree", "Shaped"]
