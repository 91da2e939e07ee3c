"""Typed access to the metadata of a GGUF file."""

from typing import Any

import numpy as np

from jchain.hub.gguf_header import Header
from jchain.hub.gguf_names import NAMES
from jchain.pytree import shorten

# What `general.type` says of files that hold no whole model.
_OTHER_TYPES = {
    "adapter": "a LoRA adapter: merge it into its model first, then convert the result",
    "mmproj": "the vision part of a model: give the file of the language model",
    "imatrix": "an importance matrix: give the file of the model",
    "vocab": "a vocabulary without weights: give the file of the model",
}


class Options:
    """The options of a model, whose keys have the architecture as a prefix.

    Attributes:
      header: the header of the file.
      architecture: `general.architecture` of the file.
    """

    def __init__(self, header: Header) -> None:
        """Check that the file holds a whole model of a supported architecture.

        Args:
          header: the header of the file.

        Raises:
          ValueError: if the file holds something else.
        """
        self.header, self.architecture = header, _read_architecture(header)

    @property
    def num_heads(self) -> int:
        """Number of query heads."""
        return self.require_count("attention.head_count")

    @property
    def num_kv_heads(self) -> int:
        """Number of key and value heads, which by default is that of query heads."""
        return self.read_count("attention.head_count_kv", self.num_heads)

    def get(self, key: str, default: Any = None) -> Any:
        """Return an option that is not an array.

        Args:
          key: name of the option, without the architecture.
          default: value to return if the file does not have the option.

        Raises:
          ValueError: if it is an array.
        """
        return self.header.get(f"{self.architecture}.{key}", default)

    def reject(self, key: str, value: object, expected: str) -> ValueError:
        """Make the error for an unsupported value, which the caller raises.

        Args:
          key: name of the option, without the architecture.
          value: the value; None if it is missing.
          expected: description of the supported values.
        """
        got = "none" if value is None else shorten(value)
        return ValueError(
            f"{self.header.path}: expected {self.architecture}.{key} to be {expected}, got {got}"
        )

    def require_count(self, key: str) -> int:
        """Return an integer of at least 1, which may be given once for each block.

        Args:
          key: name of the option, without the architecture.

        Raises:
          ValueError: if it is missing, another value, or not the same for all blocks.
        """
        value = self.header.metadata.get(f"{self.architecture}.{key}")
        if isinstance(value, np.ndarray) and value.size and (value == value[0]).all():
            value = value[0].item()
        if type(value) is not int or value < 1:
            raise self.reject(key, value, "an integer of at least 1, the same for all blocks")
        return value

    def read_count(self, key: str, default: int) -> int:
        """Return an integer of at least 1, or the default if the file does not have the option.

        Args:
          key: name of the option, without the architecture.
          default: the default.

        Raises:
          ValueError: if it is another value, or not the same for all blocks.
        """
        is_given = f"{self.architecture}.{key}" in self.header.metadata
        return self.require_count(key) if is_given else default

    def read_number(self, key: str, default: float | None = None) -> float:
        """Return a number.

        Args:
          key: name of the option, without the architecture.
          default: the default; None if the option must be present.

        Raises:
          ValueError: if it is missing or not finite.
        """
        value = self.get(key, default)
        if type(value) not in (int, float) or not np.isfinite(np.float32(value)):
            raise self.reject(key, value, "a finite number")
        # The file has float32; the shortest number that rounds to it is the one that was meant.
        return float(str(np.float32(value)))


def _read_architecture(header: Header) -> str:
    """Return `general.architecture` of a file that holds a whole model of a supported family."""
    kind = header.get("general.type", "model")
    architecture = header.get("general.architecture")
    if architecture in ("clip", "mmproj"):
        kind = "mmproj"
    if kind in _OTHER_TYPES:
        raise ValueError(f"{header.path} is not a model, but {_OTHER_TYPES[kind]}")
    if architecture not in NAMES:
        got = "none" if architecture is None else shorten(architecture)
        raise ValueError(
            f"{header.path}: expected general.architecture to be one of {', '.join(NAMES)}, got "
            f"{got}"
        )
    num_parts = header.get("split.count", 0)
    if not isinstance(num_parts, int) or num_parts > 1:
        raise ValueError(
            f"{header.path} is one of {shorten(num_parts)} parts of a model: join them with "
            "llama-gguf-split --merge"
        )
    return architecture
