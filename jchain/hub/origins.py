"""Where a model comes from: its name on the Hugging Face Hub, and its license."""

import re
from pathlib import Path
from typing import Any, NamedTuple

from jchain.hub.small_files import is_license

_CARD = "README.md"
# The sizes of files of which more is not read.
_MOST = 1 << 16
# The number of characters of a license in the metadata of which more is not parsed.
_MOST_ENTRY = 400
_REVISION = re.compile(r"[0-9a-f]{40}")
_CACHED = re.compile(r"models(--[\w.-]+){1,2}")
_LICENSE_ID = re.compile(r"[\w.+-]{1,64}")
# How the texts of common licenses begin, and their identifiers on the Hub.
_TEXTS = {
    r"\s*Apache License\s+Version 2\.0": "apache-2.0",
    r"\s*(The )?MIT License|.{0,200}Permission is hereby granted, free of charge": "mit",
    r"\s*GNU GENERAL PUBLIC LICENSE\s+Version 3": "gpl-3.0",
    r"\s*BSD 3-Clause License": "bsd-3-clause",
}


class License(NamedTuple):
    """A license as in the metadata of a model card."""

    id: str  # such as apache-2.0; "other" if the Hub knows no identifier
    name: str | None = None
    link: str | None = None


class Origin(NamedTuple):
    """Where a model comes from."""

    path: str  # as it was given
    hub_name: str | None  # owner/name, if it is known
    revision: str | None  # the commit on the Hub
    license: License | None


def find_origin(given: str, folder: Path) -> Origin:
    """Find where a model comes from.

    Its name on the Hub is known if the folder is a snapshot in the Hub's cache.

    Args:
      given: what the caller passed for the model.
      folder: its checkpoint folder, or its GGUF file.
    """
    folder = folder.resolve()
    folder = folder if folder.is_dir() else folder.parent
    name = revision = None
    cache = folder.parent.parent.name
    if folder.parent.name == "snapshots" and _CACHED.fullmatch(cache):
        name = "/".join(cache.split("--")[1:])
        revision = folder.name if _REVISION.fullmatch(folder.name) else None
    return Origin(given, name, revision, find_license(folder))


def find_license(folder: Path) -> License | None:
    """Find the license of a model in its model card, or in the text of its license.

    Args:
      folder: the checkpoint folder.

    Returns:
      The license, or None if there is none or it is not known.
    """
    metadata = _read_metadata(folder / _CARD)
    found, name, link = (metadata.get(key) for key in ("license", "license_name", "license_link"))
    if isinstance(found, list) and len(found) == 1:
        found = found[0]
    if isinstance(found, str) and _LICENSE_ID.fullmatch(found):
        return License(found, *(text if _is_line(text) else None for text in (name, link)))
    texts = [path for path in sorted(folder.iterdir()) if is_license(path.name) and path.is_file()]
    for start in (_read_start(path) for path in texts):
        for pattern, known in _TEXTS.items():
            if re.match(pattern, start, re.DOTALL | re.IGNORECASE):
                return License(known)
    return None


def _read_metadata(path: Path) -> dict[Any, Any]:
    """Read the YAML block at the start of a model card; it is empty if there is no valid one."""
    import yaml

    start = _read_start(path) if path.is_file() else ""
    found = re.match(r"\ufeff?---\s*\n(.*?\n)---\s*(\n|$)", start, re.DOTALL)
    if found is None:
        return {}
    # Only these keys are parsed, because YAML takes long for what is nested deeply.
    entries = re.findall(r"^license(?:_name|_link)?:.*\n(?:[ -].*\n)*", found[1], re.MULTILINE)
    try:
        metadata = yaml.safe_load("".join(entry[:_MOST_ENTRY] for entry in entries))
    except (yaml.YAMLError, ValueError, RecursionError):
        return {}
    return metadata if isinstance(metadata, dict) else {}


def _read_start(path: Path) -> str:
    with path.open("rb") as file:
        return file.read(_MOST).decode("utf-8", "replace")


def _is_line(text: object) -> bool:
    return isinstance(text, str) and 0 < len(text) <= 300 and text.isprintable()
