"""What the JSON headers of files may hold. They are checked before anything is built from them."""

import os
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from jchain.pytree import shorten

# Larger numbers are no token, stage, or size of a layer.
Number = Annotated[int, Field(ge=0, lt=2**31)]
# The structure of params and the fields of modules are checked where they are decoded.
Encoded = dict[str, Any]


class Header(BaseModel):
    """A part of a header. Unknown fields are refused, and values are not converted."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class ModuleHeader(Header):
    """A module: a linen class with its fields, a function, or an nnx module with its digest."""

    module: str | None = None
    fields: Encoded | None = None
    function: str | None = None
    nnx: str | None = None
    digest: str | None = None


class GroupHeader(ModuleHeader):
    """A group of layers or heads."""

    tokens: list[Number]
    stages: Annotated[list[Number], Field(min_length=2, max_length=2)] = [0, 0]
    params_structure: Encoded | None = None
    state_structure: Encoded | None = None


class BankHeader(Header):
    """A bank."""

    format: str
    layers: list[GroupHeader]
    heads: list[GroupHeader]
    stem: ModuleHeader | None = None
    stem_structure: Encoded | None = None
    names: list[str]
    origins: list[str]
    parents: list[list[Number]]
    num_steps: Annotated[int, Field(ge=0)]


class CriticHeader(Header):
    """A critic of prefixes."""

    format: str
    kind: str
    num_inputs: Number
    width: Annotated[int, Field(ge=1, lt=2**20)]


def check_header(kind: type[Header], header: object, path: str | os.PathLike[str]) -> None:
    """Check a header.

    Args:
      kind: what the header must be.
      header: the JSON.
      path: the file that it is from.

    Raises:
      ValueError: with the name of the file and of the first field that is missing, unknown, or of
        another type.
    """
    try:
        kind.model_validate(header)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(map(str, first["loc"])) or "header"
        raise ValueError(
            f"{path}: cannot read the {field} in its header: {first['msg']}, got "
            f"{shorten(first['input'])}"
        ) from None
