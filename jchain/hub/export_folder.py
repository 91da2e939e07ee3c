"""Writing the folder of an exported checkpoint, whole or not at all."""

import json
import os
import secrets
import shutil
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from jchain.files import sync, write_atomically
from jchain.hub.checkpoint import INDEX, WEIGHTS


def check_out(out: Path) -> None:
    """Check that a folder can be made, before anything is computed.

    Args:
      out: the folder.

    Raises:
      FileExistsError: if it exists.
      ValueError: if it cannot be made.
    """
    if os.path.lexists(out):
        raise FileExistsError(f"{out} already exists; choose another output folder")
    above = _find_existing(out)
    if not above.is_dir():
        raise ValueError(f"expected out to be in a folder, got {out}, below the file {above}")
    if not os.access(above, os.W_OK | os.X_OK):
        raise ValueError(f"expected out to be in a folder that can be written, got {above}")


def write_folder(
    out: Path,
    small_files: Mapping[str, bytes],
    tensors: Mapping[str, np.ndarray],
    max_shard_size: int,
) -> None:
    """Write the files to a hidden folder next to `out`, and rename it when it is complete.

    If this fails or is interrupted, the hidden folder is removed, and so are folders above it that
    were made for it.

    Args:
      out: the folder, which must not exist.
      small_files: map from the name of each small file to its content.
      tensors: the tensors by name.
      max_shard_size: maximum number of bytes in one file of weights.

    Raises:
      FileExistsError: if something has appeared at `out`.
      OSError: if there is not enough space, or a file cannot be written.
    """
    from safetensors import SafetensorError

    num_bytes = sum(map(len, small_files.values())) + sum(t.nbytes for t in tensors.values())
    new_folders = [parent for parent in out.absolute().parents if not os.path.lexists(parent)]
    free = shutil.disk_usage(_find_existing(out)).free
    if num_bytes > free:
        raise OSError(f"cannot write {out}: it needs {num_bytes:,} bytes, and {free:,} are free")
    folder = out.parent / f".{out.name}.{secrets.token_hex(4)}"
    try:
        folder.mkdir(parents=True)
        for name, content in small_files.items():
            (folder / name).parent.mkdir(exist_ok=True)
            _write(folder / name, content)
        write_shards(folder, tensors, max_shard_size)
        sync(folder)
        _rename(folder, out)
    except BaseException as error:
        shutil.rmtree(folder, ignore_errors=True)
        _remove_empty(new_folders)
        if isinstance(error, FileExistsError) or not isinstance(error, OSError | SafetensorError):
            raise
        raise OSError(f"cannot write {out}: {error}") from None
    sync(out.parent)


def write_shards(folder: Path, tensors: Mapping[str, np.ndarray], max_shard_size: int) -> None:
    """Write tensors to one file, or to several with an index.

    Args:
      folder: the folder to write to.
      tensors: the tensors by name.
      max_shard_size: maximum number of bytes in a file; a file with a single tensor may be larger.
    """
    from safetensors.numpy import save_file

    shards = _cut(tensors, max_shard_size)
    num = len(shards)
    names = [f"model-{i + 1:05}-of-{num:05}.safetensors" for i in range(num)]
    if num == 1:
        names = [WEIGHTS]
    for name, shard in zip(names, shards, strict=True):
        rows = {key: np.ascontiguousarray(tensor) for key, tensor in shard.items()}
        save_fn = partial(save_file, rows, metadata={"format": "pt"})
        write_atomically(folder / name, save_fn)
    if num > 1:
        weight_map = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
        total_size = sum(tensor.nbytes for tensor in tensors.values())
        index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
        _write(folder / INDEX, f"{json.dumps(index, indent=2)}\n".encode())


def _cut(tensors: Mapping[str, np.ndarray], max_shard_size: int) -> list[dict[str, np.ndarray]]:
    """Cut tensors, in their order, into shards."""
    shards: list[dict[str, np.ndarray]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > max_shard_size:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    return shards


def _write(path: Path, content: bytes) -> None:
    write_atomically(path, lambda temporary: Path(temporary).write_bytes(content))


def _rename(folder: Path, out: Path) -> None:
    try:
        os.rename(folder, out)
    except OSError:
        if os.path.lexists(out):
            raise FileExistsError(f"{out} has appeared meanwhile; nothing is written") from None
        raise


def _find_existing(out: Path) -> Path:
    """Find the first existing path above a path that does not exist."""
    return next(parent for parent in out.absolute().parents if os.path.lexists(parent))


def _remove_empty(folders: Sequence[Path]) -> None:
    """Remove folders, the innermost first, up to one that holds something."""
    for folder in folders:
        try:
            folder.rmdir()
        except OSError:
            return
