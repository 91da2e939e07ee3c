"""The files of a checkpoint folder that an export takes over: tokenizer, settings, and license.

Nothing else of the folder belongs to the exported model: weights of other formats, states of
training, results, adapters, and code stay behind.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path

from jchain.hub.checkpoint import JsonObject, read_json

_TEMPLATES = "additional_chat_templates"
_TOKENIZERS = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "vocab.txt", "vocab.bpe", "encoder.json", "merges.txt", "spiece.model",
    "sentencepiece.bpe.model", "tekken.json", "chat_template.json", "chat_template.jinja",
)  # fmt: skip
# Settings of generation, and of how images become inputs.
_SETTINGS = ("generation_config.json", "preprocessor_config.json", "processor_config.json")
# tokenizer.4.0.json for old versions of transformers, and tokenizer.model.v3 of Mistral.
_VERSIONED = re.compile(r"tokenizer(\.\d+)+\.json|tokenizer\.model(\.v\w+)?|[\w-]+\.tiktoken")
# Licenses ask to be kept with copies: LICENSE, NOTICE.txt, LICENSE-APACHE-2.0, USE_POLICY.md, ...
_LICENSE = re.compile(
    r"(licen[sc]es?|notices?|copying|copyright|(acceptable_)?use_policy)"
    r"([-_ ][\w+-]+(\.\d+)*)*(\.(txt|md|rst|html|pdf))?",
    re.IGNORECASE,
)
# The start of a file that git-lfs has not downloaded.
_POINTER = b"version https://git-lfs"
# What says where the files were, which code of the source to run, or how its weights were stored.
_DROPPED = (
    "_name_or_path", "name_or_path", "_commit_hash", "auto_map", "quantization_config",
    "compression_config",
)  # fmt: skip
# Values of these keys are text of the model, even if they look like paths.
_TOKENS = re.compile(r".*(_tokens?|_decoder|template)|content")
_PATH = re.compile(
    r"(file:/*|[A-Za-z]:|~\w*)[\\/]+[^<>{}\n]*"  # with a scheme, a drive, or a home folder
    r"|[\\/]+[^\\/\s<>{}]+[\\/]+[^<>{}\n]+"  # at least a folder and a name
)


def read_small_files(folder: Path) -> dict[str, bytes]:
    """Read the files of a checkpoint folder that belong to its tokenizer, settings, and license.

    Paths of the machine that made the folder are left out of settings. A link may lead to a file
    of the folder, or of the blobs of a Hugging Face cache that the folder is a snapshot of.

    Args:
      folder: the checkpoint folder.

    Returns:
      A map from the name of each file, relative to the folder, to its content.

    Raises:
      ValueError: if a link leads elsewhere, for example to a private file, or to nothing, or if a
        file was not downloaded or is not valid JSON.
    """
    return {
        path.relative_to(folder).as_posix(): _read(path, folder)
        for path in sorted(_list_paths(folder))
    }


def read_licenses(folder: Path) -> dict[str, bytes]:
    """Read the files of a checkpoint folder that state terms of use.

    Args:
      folder: the checkpoint folder.

    Returns:
      A map from the name of each file to its content.

    Raises:
      ValueError: as in `read_small_files`.
    """
    names = [path.name for path in sorted(_list_paths(folder)) if path.parent == folder]
    return {name: _read(folder / name, folder) for name in names if is_license(name)}


def is_license(name: str) -> bool:
    """Check whether a file of a checkpoint folder states terms of use.

    Args:
      name: name of the file.
    """
    return _LICENSE.fullmatch(name) is not None


def clean_options(options: JsonObject) -> JsonObject:
    """Leave out paths, references to code, and the quantization of the weights of the source.

    Args:
      options: content of config.json, or of another file of settings.
    """
    return {
        key: clean_options(value) if isinstance(value, dict) else value
        for key, value in options.items()
        if _TOKENS.fullmatch(key) or (key not in _DROPPED and not _is_path(value))
    }


def _is_path(value: object) -> bool:
    """Check for an absolute path, or a list of them."""
    values = value if isinstance(value, list) and value else [value]
    return all(isinstance(item, str) and _PATH.fullmatch(item) for item in values)


def _list_paths(folder: Path) -> Iterator[Path]:
    for path in folder.iterdir():
        name = path.name
        is_known = name in _TOKENIZERS + _SETTINGS or _VERSIONED.fullmatch(name)
        if (is_known or is_license(name)) and (path.is_file() or path.is_symlink()):
            yield path
    yield from (folder / _TEMPLATES).glob("[!.]*.jinja")


def _read(path: Path, folder: Path) -> bytes:
    _check_link(path, folder)
    content = path.read_bytes()
    if content.startswith(_POINTER):
        raise ValueError(
            f"expected {path.name} of the model, got a pointer of git-lfs in {folder}: download "
            "it with `git lfs pull`"
        )
    if not path.name.endswith("_config.json"):
        return content
    options = read_json(path)
    cleaned = clean_options(options)
    if cleaned == options:
        return content
    return f"{json.dumps(cleaned, indent=2, ensure_ascii=False)}\n".encode()


def _check_link(path: Path, folder: Path) -> None:
    """Refuse a link that leads out of the folder or its cache, or to nothing."""
    root = folder.resolve()
    places = [root]
    if root.parent.name == "snapshots":
        places.append(root.parent.parent / "blobs")
    target, name = path.resolve(), path.relative_to(folder)
    if not any(target.is_relative_to(place) for place in places):
        raise ValueError(
            f"expected only files of {folder} to copy, got {name}, a link to {target}: replace it "
            "by a copy if the file belongs to the model"
        )
    if not target.is_file():
        raise ValueError(f"expected a file at {path}, got a link to {target}, which is no file")
