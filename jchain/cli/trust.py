"""Whether the files that a result names may be read.

A result names checkpoints, data, and Python files of modules, and `jchain evaluate` reads them
again. A result from somebody else could name any file, so its files are read only if the user asks
for that. The user's own results are recognized by a signature with a key that stays on the machine.
"""

import hashlib
import hmac
import json
import os
import secrets
from collections.abc import Mapping
from pathlib import Path

from jchain.cli.config import DATA_FILES

# Options that name files.
_PATHS = ("checkpoint", "text", "choices", "data_dir", "bank_file", "modules")
_KEY_BYTES = 32


def sign(config: Mapping[str, object]) -> str | None:
    """Return the signature of the files that a result names.

    Args:
      config: the options of the result, as JSON.

    Returns:
      The signature; None if there are no files, or no key can be kept.
    """
    files = _list_files(config)
    key = _read_key() if files else None
    if key is None:
        return None
    return hmac.new(key, json.dumps(files).encode(), hashlib.sha256).hexdigest()


def check_trust(
    config: Mapping[str, object], signature: object, path: Path, *, is_trusted: bool
) -> None:
    """Check that the files that a result names may be read.

    Args:
      config: the options of the result, as JSON.
      signature: its signature, if it has one.
      path: the result, for the error.
      is_trusted: whether the user asked to read the files.

    Raises:
      ValueError: if the result names files, was not made here, and is not trusted.
    """
    files = _list_files(config)
    if is_trusted or not files:
        return
    mine = sign(config)
    if mine is not None and isinstance(signature, str) and hmac.compare_digest(mine, signature):
        return
    names = ", ".join(file for group in files.values() for file in group)
    raise ValueError(
        f"{path} was not made by you on this machine, and it names files to read: {names}. Pass "
        "--trust if you want them to be read, and run if they are modules"
    )


def _list_files(config: Mapping[str, object]) -> dict[str, list[str]]:
    """List the files that each option names."""
    names: list[str] = [*_PATHS]
    if str(config.get("data")).endswith(DATA_FILES):
        names.append("data")
    given = {name: config.get(name) for name in names}
    return {
        name: [str(file) for file in (value if isinstance(value, list | tuple) else [value])]
        for name, value in given.items()
        if value is not None and value != []
    }


def _read_key() -> bytes | None:
    """Read the key of this user on this machine, or make it."""
    base = os.environ.get("XDG_STATE_HOME")
    try:
        folder = Path(base) if base else Path.home() / ".local" / "state"
        path = folder / "jchain" / "key"
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        try:
            handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError:
            pass
        else:
            with os.fdopen(handle, "wb") as file:
                file.write(secrets.token_bytes(_KEY_BYTES))
        key = path.read_bytes()
    except (OSError, RuntimeError):  # there is no home, or it cannot be written
        return None
    return key if len(key) == _KEY_BYTES else None
