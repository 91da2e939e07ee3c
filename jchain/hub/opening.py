"""Checkpoints of all formats: folders with safetensors, and GGUF files."""

import os
from pathlib import Path

from jchain.hub.checkpoint import (
    CONFIG,
    INDEX,
    WEIGHTS,
    Checkpoint,
    JsonObject,
    list_names,
    read_json,
)
from jchain.hub.gguf_config import read_config as read_gguf_config
from jchain.hub.gguf_file import GGUFCheckpoint
from jchain.hub.gguf_header import SUFFIX, Header


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Open a checkpoint folder, a GGUF file, or a folder with a GGUF file.

    Args:
      path: the folder or file.

    Raises:
      FileNotFoundError: if the folder or one of its files is missing.
      ImportError: if gguf is needed and not installed.
      ValueError: if a file is damaged or not supported, or the folder has several GGUF files.
    """
    file = find_gguf(path)
    return Checkpoint(path) if file is None else GGUFCheckpoint(file)


def read_config(path: str | os.PathLike[str]) -> tuple[JsonObject, str]:
    """Read the config of a checkpoint, and nothing of its weights.

    Args:
      path: the folder or file, as for `open_checkpoint`.

    Returns:
      The config, and the file that has it, for error messages.

    Raises:
      FileNotFoundError: if the file is missing.
      ImportError: if gguf is needed and not installed.
      ValueError: if the file is damaged or not supported, or the folder has several GGUF files.
    """
    file = find_gguf(path)
    if file is not None:
        return read_gguf_config(Header(file)), str(file)
    location = Path(path) / CONFIG
    return read_json(location), str(location)


def find_gguf(path: str | os.PathLike[str]) -> Path | None:
    """Find the GGUF file of a checkpoint; None if it is in the format of Hugging Face.

    In a folder with both formats, a GGUF file is not used.

    Args:
      path: the folder or file.

    Raises:
      ValueError: if the folder has several GGUF files and no other weights.
    """
    path = Path(path)
    if path.suffix.lower() == SUFFIX and not path.is_dir():
        return path
    if not path.is_dir():
        return None
    if any((path / name).exists() for name in (WEIGHTS, INDEX)):
        return None
    files = [file for file in path.iterdir() if file.suffix.lower() == SUFFIX]
    if len(files) > 1:
        raise ValueError(
            f"{path}: expected one GGUF file, got {list_names(file.name for file in files)}: give "
            "the path of one of them"
        )
    return files[0] if files else None
