"""Checkpoint folders in the format of Hugging Face, with config.json and safetensors files.

The tensors are in one file, or in several files (shards) with an index.
"""

import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from jchain.hub.file_kinds import WEIGHT_SUFFIXES, check_exists, list_files, name_kind
from jchain.hub.tensor_files import TensorFiles

JsonObject = dict[str, Any]

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"


class Checkpoint(TensorFiles):
    """The tensors of a checkpoint folder.

    Attributes:
      path: the checkpoint folder.
      location: path of config.json, for error messages.
      config: content of the folder's config.json.
      shapes, dtypes: as in `TensorFiles`.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Open the files of a folder and read their headers.

        Args:
          path: the checkpoint folder.

        Raises:
          FileNotFoundError: if the folder or one of its files is missing.
          ValueError: if a file is damaged.
        """
        self.path = Path(path)
        self.location = str(self.path / CONFIG)
        self.config = read_json(self.path / CONFIG)
        # As in transformers, a single file takes precedence over shards, which may be older.
        is_single = (self.path / WEIGHTS).exists() or not (self.path / INDEX).exists()
        places = {} if is_single else read_index(self.path / INDEX)
        if is_single and not (self.path / WEIGHTS).exists():
            raise FileNotFoundError(_describe_missing(self.path))
        files = [self.path / name for name in sorted(set(places.values())) or [WEIGHTS]]
        super().__init__(files, places)


def read_index(path: Path) -> dict[str, str]:
    """Read the map from the name of each tensor to the name of its file.

    Args:
      path: the index, a JSON file.

    Raises:
      FileNotFoundError: if the index is missing.
      ValueError: if it is not an index, or names files outside of its folder.
    """
    index = read_json(path).get("weight_map")
    is_map = isinstance(index, dict) and all(isinstance(name, str) for name in index.values())
    if not is_map or not index:
        raise ValueError(f"{path}: expected a weight_map from tensors to files, got {index!r:.80}")
    outside = [name for name in index.values() if Path(name).name != name]
    if outside:
        raise ValueError(f"{path}: expected files of this folder, got {outside[0]!r}")
    return index


def _describe_missing(folder: Path) -> str:
    """Say which weights a folder has in place of model.safetensors, and what to do about it."""
    path = folder / WEIGHTS
    if path.is_symlink():
        return f"expected weights at {path}, got a link to {path.readlink()}, which is missing"
    found = list_files(folder, WEIGHT_SUFFIXES)
    if any(re.fullmatch(r"model-\d+-of-\d+\.safetensors", file.name) for file in folder.iterdir()):
        return (
            f"expected {INDEX} in {folder}, which names the file of each tensor, found only "
            f"{found}: copy the index from where the shards come from"
        )
    return (
        f"expected weights at {path}, found {found}: only safetensors and GGUF files are read, "
        "never pickle; transformers' save_pretrained writes safetensors"
    )


def read_json(path: Path) -> JsonObject:
    """Read a JSON object from a file of a checkpoint folder.

    Args:
      path: the JSON file.

    Raises:
      FileNotFoundError: if the folder or the file is missing.
      ValueError: if the file does not contain a JSON object.
    """
    check_exists(path)
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # JSONDecodeError, UnicodeDecodeError, too long
        kind = name_kind(path)
        raise ValueError(f"{path} is not valid JSON: {kind or error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path}: expected an object, got {found!r:.80}")
    return found


def list_names(names: Iterable[str], most: int = 4) -> str:
    """Sort names and join the first few of them, for an error message.

    Args:
      names: all names.
      most: maximum number of names to list; the remaining names are only counted.
    """
    names = sorted(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
