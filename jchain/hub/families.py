"""Architectures from configs, made by the model family that `model_type` names."""

import os
from importlib import import_module
from types import ModuleType

from jchain.files import FAMILIES
from jchain.hub.architecture import Architecture
from jchain.hub.checkpoint import JsonObject
from jchain.hub.config import Config
from jchain.hub.opening import read_config
from jchain.hub.tensor_names import get_shapes
from jchain.pytree import get_first_line

# Lists with an entry for each block whose length transformers checks in every family.
_LISTS = ("layer_types", "mlp_layer_types")


def make_architecture(
    options: JsonObject, location: str, num_tensors: int | None = None
) -> Architecture:
    """Make the architecture that a config describes.

    Args:
      options: content of config.json.
      location: path of the file, for error messages.
      num_tensors: the number of tensors of the checkpoint, which has at most as many blocks; None
        if it is not known.

    Raises:
      ValueError: if the family or an option is not supported.
    """
    config = Config(options, location, *([] if num_tensors is None else [num_tensors]))
    kind = config.require("model_type")
    families: dict[str, ModuleType] = {
        known: family for family in map(import_module, FAMILIES) for known in family.MODEL_TYPES
    }
    if not isinstance(kind, str) or kind not in families:
        holds = (
            ""
            if "text_config" not in options
            else ("a model of text alone, without the parts for images or sound, of ")
        )
        raise config.reject("model_type", kind, holds + ", ".join(families))
    try:
        config.check_common()
        architecture = _keep_lists(config, families[kind].make_architecture(config))
        get_shapes(architecture)
    except Exception as error:
        # Other errors arise if an option has a type or a size that the family does not expect.
        reason = get_first_line(error)
        if isinstance(error, ValueError) and reason.startswith(location):
            raise
        raise ValueError(f"{location}: an option has an invalid value: {reason}") from None
    return architecture


def _keep_lists(config: Config, architecture: Architecture) -> Architecture:
    """Let exports adapt lists that the family ignores; transformers checks their length anyway."""
    depth = len(architecture.blocks)
    lists = {key: config.get(key, None) for key in _LISTS}
    ignored = {
        key: tuple(entries)
        for key, entries in lists.items()
        if isinstance(entries, list) and len(entries) == depth
    }
    options = ignored | dict(architecture.options_per_block)
    return architecture._replace(options_per_block=options)


def read_architecture(folder: str | os.PathLike[str]) -> Architecture:
    """Make the architecture of a checkpoint from its config.

    Args:
      folder: the checkpoint folder, or a GGUF file.

    Raises:
      FileNotFoundError: if config.json or the file is missing.
      ImportError: if gguf is needed and not installed.
      ValueError: if the config is damaged, or the family or an option is not supported.
    """
    return make_architecture(*read_config(folder))
