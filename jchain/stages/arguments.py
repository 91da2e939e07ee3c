"""What a user may pass as the stages of layers and heads."""

from collections.abc import Sequence
from numbers import Integral
from typing import TYPE_CHECKING, TypeAlias, TypeGuard

# Other types are refused by `read_stages`, whose error says more than that of a type checker at run
# time.
if TYPE_CHECKING:
    Stages: TypeAlias = tuple[int, int] | Sequence[tuple[int, int]]
    HeadStages: TypeAlias = int | Sequence[int]
else:
    Stages: TypeAlias = object
    HeadStages: TypeAlias = object

_PAIRS = "one pair (stage read, stage written) for all layers, or a list of one pair per layer"
_NUMBERS = "the number of the stage of all heads, or a list of one number per head"


def read_stages(stages: object, num: int, kind: str) -> list[tuple[int, int]]:
    """Return the stage that each layer or head reads, and the stage that it writes.

    Args:
      stages: for layers, one pair or a pair for each; for heads, one number or a number for each;
        None for stage 0.
      num: the number of layers or heads.
      kind: "layer" or "head".

    Raises:
      ValueError: if the stages have another form, or differ from the layers or heads in number.
    """
    is_head = kind == "head"
    is_one, expected = (_is_stage, _NUMBERS) if is_head else (_is_pair, _PAIRS)
    if stages is None:
        given = [0 if is_head else (0, 0)] * num
    elif is_one(stages):
        given = [stages] * num
    else:
        given = list(stages) if isinstance(stages, Sequence) else [stages]
        if not all(map(is_one, given)):
            name = "head_stages" if is_head else "stages"
            raise ValueError(f"expected {name} as {expected}, got {stages!r}")
    if len(given) != num:
        raise ValueError(f"expected the stages of {num} {kind}s, got those of {len(given)}")
    pairs = [(one, one) if _is_stage(one) else one for one in given]
    return [(int(read), int(write)) for read, write in pairs]  # pyright: ignore


def _is_stage(value: object) -> TypeGuard[int]:
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= 0


def _is_pair(value: object) -> TypeGuard[tuple[int, int]]:
    return isinstance(value, tuple | list) and len(value) == 2 and all(map(_is_stage, value))
