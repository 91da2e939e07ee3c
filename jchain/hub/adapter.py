"""LoRA adapters, which are merged into the weights of their model when these are read.

LoRA (Hu et al. 2021, arXiv:2106.09685) adds `scale * B A` to a weight, where A and B have few rows
and columns. The format is that of the package peft.
"""

import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jchain.hub.checkpoint import CONFIG, JsonObject, list_names, read_json
from jchain.hub.file_kinds import WEIGHT_SUFFIXES, list_files
from jchain.hub.locating import ADAPTER_CONFIG, ADAPTER_WEIGHTS, Location, locate
from jchain.hub.tensor_files import DTYPES, TensorFiles
from jchain.hub.weights import Weights
from jchain.pytree import shorten

# Options that make an adapter compute something other than `scale * B A`.
_REFUSED = (
    "alora_invocation_tokens", "arrow_config", "kasa_config", "layer_replication", "lora_bias",
    "modules_to_save", "monteclora_config", "target_parameters", "trainable_token_indices",
    "use_bdlora", "use_dora", "use_qalora",
)  # fmt: skip
# Initializations that leave the weights of the model as they are. Others, such as pissa, also
# change these, and an adapter does not contain this change.
_INITIALIZATIONS = (True, False, None, "gaussian", "eva", "orthogonal")
_PREFIX = "base_model.model."
_MATRIX = re.compile(r"(?P<module>.+)\.lora_(?P<kind>[AB])(\.default)?\.weight")


class _Update(NamedTuple):
    """What the adapter adds to one weight, before it is multiplied."""

    a: str  # name of the tensor A, [r, inputs]
    b: str  # name of the tensor B, [outputs, r]
    scale: float
    is_transposed: bool = False  # whether the weight is stored as [inputs, outputs]


class Adapter:
    """A LoRA adapter.

    Attributes:
      path: the folder of the adapter.
      base: the model that the adapter was trained on: a folder, or a name on the Hugging Face hub.
    """

    def __init__(self, path: Path) -> None:
        """Read the config of an adapter and the headers of its weights.

        Args:
          path: the folder of the adapter, with adapter_config.json and adapter_model.safetensors.

        Raises:
          FileNotFoundError: if a file is missing.
          ValueError: if a file is damaged, or the adapter is not a plain LoRA.
        """
        self.path = path
        location = path / ADAPTER_CONFIG
        options = read_json(location)
        if not (path / ADAPTER_WEIGHTS).exists():
            raise FileNotFoundError(
                f"expected {ADAPTER_WEIGHTS} beside {location}, found "
                f"{list_files(path, WEIGHT_SUFFIXES)}: only safetensors are read, never pickle"
            )
        if (kind := options.get("peft_type")) != "LORA":
            raise ValueError(f"{location}: expected an adapter of peft_type LORA, got {kind!r}")
        for name in _REFUSED:
            if options.get(name):
                raise ValueError(
                    f"{location}: {name} = {shorten(options[name])} is not supported; merge the "
                    "adapter with peft's merge_and_unload, and save the model"
                )
        if (bias := options.get("bias", "none")) != "none":
            raise ValueError(f"{location}: bias = {shorten(bias)} is not supported, expected none")
        if (init := options.get("init_lora_weights", True)) not in _INITIALIZATIONS:
            raise ValueError(
                f"{location}: init_lora_weights = {shorten(init)} is not supported, as it changes "
                "the weights of the model too; convert the adapter to a plain LoRA with peft"
            )
        self.base = options.get("base_model_name_or_path")
        self._tensors = TensorFiles([path / ADAPTER_WEIGHTS])
        self._updates = self._find_updates(options, str(location))

    def merge(
        self, weights: Weights, transposed: frozenset[str], tied: frozenset[str]
    ) -> "AdaptedWeights":
        """Return the weights of a model with the adapter merged into them.

        Args:
          weights: the weights of the model.
          transposed: names of the tensors that are stored as `[inputs, outputs]`. The config of an
            adapter also has an option for this, but peft corrects it by the type of the module.
          tied: names of the tensors that are used twice, as embeddings and as output layer.

        Raises:
          ValueError: if the model has no weight of the right shape for a part of the adapter, or
            the adapter changes a tensor that is used twice.
        """
        updates = {}
        for module, update in self._updates.items():
            name = self._find_weight(module, weights)
            expected = self._tensors.shapes[update.b][0], self._tensors.shapes[update.a][1]
            if name in transposed:
                expected = expected[::-1]
            if weights.shapes[name] != expected:
                raise ValueError(
                    f"{self.path}: expected an adapter of {name}, which has shape "
                    f"{list(weights.shapes[name])} in {weights.path}, got one for shape "
                    f"{list(expected)}"
                )
            if name in tied:
                raise ValueError(
                    f"{self.path}: expected an adapter that leaves tied embeddings unchanged, got "
                    f"one of {name}; merge it with peft's merge_and_unload, and save the model"
                )
            updates[name] = update._replace(is_transposed=name in transposed)
        return AdaptedWeights(self, weights, updates)

    def compute(self, update: _Update) -> np.ndarray:
        """Compute what the adapter adds to a weight, in float32.

        Args:
          update: how to compute it.
        """
        a, b = (np.empty(self._tensors.shapes[name], np.float32) for name in (update.a, update.b))
        self._tensors.read(update.a, a)
        self._tensors.read(update.b, b)
        # Factors that are not finite give a weight that is not finite, which is found later.
        with np.errstate(all="ignore"):
            product = np.float32(update.scale) * (b @ a)
        return product.T if update.is_transposed else product

    def _find_updates(self, options: JsonObject, location: str) -> dict[str, _Update]:
        """Pair the factors A and B of each module, and compute their scales."""
        pairs: dict[str, dict[str, str]] = {}
        unknown = []
        for name, shape in self._tensors.shapes.items():
            found = _MATRIX.fullmatch(name.removeprefix(_PREFIX))
            is_readable = len(shape) == 2 and self._tensors.dtypes[name] in DTYPES.values()
            if found is None or not is_readable:
                unknown.append(name)
                continue
            pairs.setdefault(found["module"], {})[found["kind"]] = name
        if unknown or not pairs:
            raise ValueError(
                f"{self.path / ADAPTER_WEIGHTS}: expected matrices lora_A and lora_B of "
                f"{', '.join(DTYPES.values())}, got {list_names(unknown) or 'none'}"
            )
        updates = {}
        for module, names in pairs.items():
            if len(names) != 2:
                raise ValueError(f"{self.path}: expected lora_A and lora_B of {module}, got one")
            rank, other = self._tensors.shapes[names["A"]][0], self._tensors.shapes[names["B"]][1]
            if not rank == other == self._choose(options, "rank_pattern", "r", 8, module, location):
                raise ValueError(
                    f"{location}: expected the rank of {module} to be that of its matrices, "
                    f"{rank} and {other}"
                )
            alpha = self._choose(options, "alpha_pattern", "lora_alpha", 8, module, location)
            root = math.sqrt(rank) if options.get("use_rslora", False) else rank
            updates[module] = _Update(names["A"], names["B"], alpha / root)
        return updates

    @staticmethod
    def _choose(
        options: JsonObject, pattern_key: str, key: str, default: int, module: str, location: str
    ) -> float:
        """Read the rank or alpha of a module, which patterns of module names may set."""
        patterns = options.get(pattern_key) or {}
        if not isinstance(patterns, Mapping):
            raise ValueError(f"{location}: expected {pattern_key} to be an object")
        try:
            matches = (v for k, v in patterns.items() if re.match(rf"(.*\.)?({k})$", module))
            value = next(matches, options.get(key, default))
        except re.error as error:
            raise ValueError(f"{location}: {pattern_key} has an invalid pattern: {error}") from None
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not 0 < abs(value) < 2**31:
            raise ValueError(f"{location}: expected {key} to be a number, got {shorten(value)}")
        return value

    def _find_weight(self, module: str, weights: Weights) -> str:
        """Find the weight of a module, whose name may lack the model's prefix in the file."""
        name = f"{module}.weight"
        for candidate in (name, name.partition(".")[2]):
            if candidate in weights.shapes:
                return candidate
        raise ValueError(
            f"{self.path}: expected an adapter of a model with the tensors of {weights.path}, got "
            f"one with {name}"
        )


def has_adapter(folder: Path) -> bool:
    """Check whether a folder has an adapter; one that also has a model needs the adapter's weights.

    Args:
      folder: the folder.
    """
    if not (folder / ADAPTER_CONFIG).exists():
        return False
    return not (folder / CONFIG).exists() or any(folder.glob("adapter_model*"))


def locate_base(adapter: Adapter) -> Location:
    """Find the model that an adapter was trained on.

    Args:
      adapter: the adapter.

    Raises:
      FileNotFoundError: if the model is not found.
      ValueError: if the adapter does not name a model.
    """
    if not isinstance(adapter.base, str) or not adapter.base:
        raise ValueError(
            f"{adapter.path / ADAPTER_CONFIG}: expected base_model_name_or_path, got "
            f"{adapter.base!r}: load the model with adapter={str(adapter.path)!r}"
        )
    try:
        return locate(adapter.base)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{adapter.path} is a LoRA adapter ({ADAPTER_CONFIG}) of {adapter.base}, which is not "
            f"found: load the model with adapter={str(adapter.path)!r} ({error})"
        ) from None


def find_model(source: str | os.PathLike[str]) -> Path:
    """Find the folder or the GGUF file of a model, which is that of the base for an adapter.

    Args:
      source: a checkpoint, as in `jchain.hub.load`.

    Raises:
      FileNotFoundError: if there is none.
      ValueError: if the adapter does not name a model.
    """
    path = locate(source).path
    is_alone = has_adapter(path) and not (path / CONFIG).exists()
    return locate_base(Adapter(path)).path if is_alone else path


class AdaptedWeights:
    """The weights of a model with an adapter merged into them, read like a `Checkpoint`.

    Attributes:
      path: the folder of the adapter.
      shapes, dtypes: as in the model's `Checkpoint`.
    """

    def __init__(self, adapter: Adapter, weights: Weights, updates: dict[str, _Update]) -> None:
        """Combine an adapter with the weights of its model.

        Args:
          adapter: the adapter.
          weights: the weights of the model.
          updates: what the adapter adds, by the name of the tensor.
        """
        self.path, self.shapes, self.dtypes = adapter.path, weights.shapes, weights.dtypes
        self._adapter, self._weights, self._updates = adapter, weights, updates

    def read(self, name: str, row: np.ndarray) -> None:
        """Read a tensor into an array, with the adapter added in float32.

        Args:
          name: name of the tensor.
          row: contiguous array of the tensor's shape, which is overwritten.
        """
        if name not in self._updates:
            self._weights.read(name, row)
            return
        wide = np.empty(row.shape, np.float32)
        self._weights.read(name, wide)
        wide += self._adapter.compute(self._updates[name])
        row[...] = wide.astype(row.dtype)
