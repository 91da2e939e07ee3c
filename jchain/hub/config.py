"""The options of a model's config.json.

As in transformers, an option that the model's family does not read changes nothing, whether it is
misspelt, belongs to a newer version, or matters in other families only. So each family reads all
options that can change its outputs, and checks with `Config.expect` those that it does not support.
The options that transformers reads for every family are checked here.
"""

import sys
from typing import Any

from jchain.arguments import is_integer
from jchain.hub.checkpoint import JsonObject
from jchain.pytree import shorten

# Options whose presence means that the file holds no plain weights.
_QUANTIZATION = ("quantization_config", "compression_config")
# Numbers are below this limit in all models. An error is better than arrays of such a size.
_MOST = 2**31


class Config:
    """The options of a config.

    Attributes:
      options: the options by name.
      location: path of the file, for error messages.
    """

    def __init__(self, options: JsonObject, location: str, num_tensors: int = 10_000) -> None:
        """Wrap the options of a config.

        Args:
          options: the options by name.
          location: path of the file, for error messages.
          num_tensors: the number of tensors of the model, at most; it has at most as many blocks.
        """
        self.options, self.location, self._num_tensors = options, location, num_tensors

    def get(self, key: str, default: object) -> Any:
        """Read an option.

        Args:
          key: name of the option.
          default: value to return if the config does not have the option.

        Raises:
          ValueError: if it is a number that no model has.
        """
        value = self.options.get(key, default)
        if isinstance(value, int | float) and not abs(value) < _MOST:
            raise self.reject(key, value, f"a number below {_MOST:,}")
        return value

    def get_flag(self, key: str, default: bool) -> bool:
        """Read an option that is true or false; null means false.

        Args:
          key: name of the option.
          default: value to return if the config does not have the option.

        Raises:
          ValueError: if the option has another type.
        """
        value = self.get(key, default)
        if value not in (True, False, None):
            raise self.reject(key, value, "true or false")
        return bool(value)

    def get_number(self, key: str, default: float) -> float:
        """Read an option that is a finite number, of any size.

        Args:
          key: name of the option.
          default: value to return if the config does not have the option.

        Raises:
          ValueError: if the option has another type, or is not finite.
        """
        value = self.options.get(key, default)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not abs(value) <= sys.float_info.max:
            raise self.reject(key, value, "a number")
        return float(value)

    def require(self, key: str) -> Any:
        """Read an option that must be present.

        Args:
          key: name of the option.

        Raises:
          ValueError: if the option is missing or null.
        """
        value = self.get(key, None)
        if value is None:
            raise ValueError(f"{self.location}: expected {key}, got none")
        return value

    def require_depth(self, key: str) -> int:
        """Read the number of blocks, which must be present.

        Args:
          key: name of the option.

        Raises:
          ValueError: if the option is not an integer, or larger than the number of tensors.
        """
        self.require(key)
        return self.get_count(key, 0, "blocks")

    def get_count(self, key: str, default: int, parts: str) -> int:
        """Read a number of parts, each of which has tensors.

        Args:
          key: name of the option.
          default: value to return if the config does not have the option.
          parts: name of the parts.

        Raises:
          ValueError: if the option is not an integer, or larger than the number of tensors.
        """
        count = self.get(key, default)
        if not is_integer(count) or not 1 <= count <= self._num_tensors:
            raise self.reject(key, count, f"1 to {self._num_tensors:,} {parts}")
        return int(count)

    def expect(self, key: str, *allowed: object) -> None:
        """Check that an option has one of the supported values.

        Args:
          key: name of the option.
          *allowed: the supported values; the first one is assumed if the config does not have the
            option.

        Raises:
          ValueError: if the option has another value.
        """
        value = self.get(key, allowed[0])
        if value not in allowed:
            raise self.reject(key, value, " or ".join(map(repr, allowed)))

    def reject(self, key: str, value: object, expected: str) -> ValueError:
        """Make the error for an unsupported value, which the caller raises.

        Args:
          key: name of the option.
          value: value of the option.
          expected: description of the supported values.
        """
        return ValueError(
            f"{self.location}: {key} = {shorten(value)} is not supported, expected {expected}"
        )

    def inner(self, key: str, options: JsonObject) -> "Config":
        """Wrap the options that are nested in an option.

        Args:
          key: name of the outer option.
          options: the nested options by name.
        """
        return Config(options, f"{self.location}, {key}")

    def rename(self, names: dict[str, str]) -> "Config":
        """Return a config whose options have the family's own names.

        Args:
          names: map from the other names that transformers reads, which take precedence, to the
            family's own.
        """
        found = {own: self.options[name] for name, own in names.items() if name in self.options}
        return Config(self.options | found, self.location, self._num_tensors)

    def check_common(self) -> None:
        """Check the options that transformers reads for every family.

        Raises:
          ValueError: if the weights are quantized, pruned, or in a file of another name, or if
            blocks have options of their own.
        """
        for key in _QUANTIZATION:
            if self.options.get(key) not in (None, False, {}):
                raise ValueError(
                    f"{self.location}: {key} = {shorten(self.options[key])} is not supported, "
                    "because the weights are quantized: expected a checkpoint of float weights, "
                    "such as the model before it was quantized, or this one after "
                    "model.dequantize() and save_pretrained in transformers"
                )
        self.expect("per_layer_config", None, {})
        self.expect("pruned_heads", None, {})
        self.expect("transformers_weights", None)

    def check_causal(self) -> None:
        """Check that each position attends to itself and to earlier positions only.

        Raises:
          ValueError: if the config sets `is_causal` to false or null.
        """
        self.expect("is_causal", True)
