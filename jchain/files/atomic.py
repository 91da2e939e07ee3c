"""Files that are written whole or not at all."""

import json
import os
import secrets
import stat
from collections.abc import Callable
from pathlib import Path


def write_atomically(path: str | os.PathLike[str], write_fn: Callable[[str], object]) -> None:
    """Write a temporary file next to `path`, then rename it.

    A reader sees either the old file or the complete new one, also after a power cut.

    Args:
      path: the file to write.
      write_fn: function that takes the path of the temporary file, which exists, and writes that
        file or replaces it.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}{path.suffix}")
    # The process's umask applies to the file. Reading it would change it for all threads.
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        mode = stat.S_IMODE(os.fstat(handle).st_mode)
    finally:
        os.close(handle)
    try:
        write_fn(str(temporary))
        # safetensors replaces the file by one that only its owner can read.
        if stat.S_IMODE(os.stat(temporary).st_mode) != mode:
            os.chmod(temporary, mode)
        sync(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def sync(path: str | os.PathLike[str]) -> None:
    """Wait until a file, or the names of the files of a folder, are on the disk.

    Args:
      path: the file or folder. Nothing is done on systems that cannot open folders.
    """
    if os.name != "posix" and os.path.isdir(path):
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: str | os.PathLike[str], value: object) -> None:
    """Write a value as indented JSON.

    Args:
      path: the file to write, atomically.
      value: the value, which must be JSON-serializable.
    """
    write_atomically(
        path, lambda temporary: Path(temporary).write_text(json.dumps(value, indent=1) + "\n")
    )
