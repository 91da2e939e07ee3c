"""Architectures from configs, made by the model family that `model_type` names."""

import os
from importlib import import_module
from pathlib import Path
from types import ModuleType

from jchain.files import FAMILIES
from jchain.hub.architecture import Architecture
from jchain.hub.checkpoint import CONFIG, JsonObject, read_json
from jchain.hub.config import Config
from jchain.hub.tensor_names import get_shapes
from jchain.pytree import get_first_line


def make_architecture(options: JsonObject, location: str) -> Architecture:
    """Make the architecture that a config describes.

    Args:
      options: content of config.json.
      location: path of the file, for error messages.

    Raises:
      ValueError: if the family or an option is not supported.
    """
    config = Config(options, location)
    kind = config.require("model_type")
    families: dict[str, ModuleType] = {
        known: family for family in map(import_module, FAMILIES) for known in family.MODEL_TYPES
    }
    if kind not in families:
        raise config.reject("model_type", kind, ", ".join(families))
    try:
        architecture = families[kind].make_architecture(config)
        config.finish()
        get_shapes(architecture)
    except (TypeError, ZeroDivisionError, AttributeError) as error:
        # These errors arise if the value of an option has a type that the family does not expect.
        reason = get_first_line(error)
        raise ValueError(f"{location}: an option has an invalid value: {reason}") from None
    return architecture


def read_architecture(folder: str | os.PathLike[str]) -> Architecture:
    """Make the architecture of a checkpoint folder from its config.json.

    Args:
      folder: the checkpoint folder.

    Raises:
      FileNotFoundError: if config.json is missing.
      ValueError: if config.json is not valid JSON, or the family or an option is not supported.
    """
    path = Path(folder) / CONFIG
    return make_architecture(read_json(path), str(path))
