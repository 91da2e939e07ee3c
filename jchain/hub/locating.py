"""Where a checkpoint is: a folder, a GGUF file, or a model of the Hugging Face hub.

Models of the hub are downloaded to the cache of huggingface_hub, and read from it without a network
once they are there.
"""

import os
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from jchain.hub.checkpoint import CONFIG, INDEX, WEIGHTS, read_index
from jchain.hub.file_kinds import WEIGHT_SUFFIXES
from jchain.pytree import get_first_line

if TYPE_CHECKING:
    from huggingface_hub import HfApi

PathLike = str | os.PathLike[str]
GGUF = ".gguf"
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

# owner/name, owner/name/file.gguf, and either with @revision
_HUB_NAME = re.compile(
    r"(?P<repo>\w[\w.-]*/\w[\w.-]*)(?P<file>/[^@]+\.gguf)?(@(?P<revision>[\w./-]+))?"
)
# The files of a model that are downloaded. Weights in other formats are not.
_FILES = (
    CONFIG, "generation_config.json", "preprocessor_config.json", "tokenizer.json",
    "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json",
    "additional_chat_templates/*", "LICENSE*", "NOTICE*", ADAPTER_CONFIG, ADAPTER_WEIGHTS, WEIGHTS,
    INDEX,
)  # fmt: skip


class Location(NamedTuple):
    """Where the files of a checkpoint are.

    Attributes:
      path: the folder, or the GGUF file.
      parts: name of the model, preceded by what distinguishes it from models of the same name: the
        owner on the hub, or the folders around it.
    """

    path: Path
    parts: tuple[str, ...]

    @property
    def name(self) -> str:
        """Name of the model."""
        return self.parts[-1]


def locate(source: PathLike) -> Location:
    """Find the files of a checkpoint, and download them if they are those of a model of the hub.

    Args:
      source: a checkpoint folder, which may be a snapshot in the cache of huggingface_hub or the
        folder of a model in this cache; a GGUF file; or, as a string, `owner/name` of a model of
        the Hugging Face hub, or `owner/name/file.gguf`, with `@revision` after it for a branch, a
        tag, or a commit. A path that exists has precedence.

    Raises:
      FileNotFoundError: if nothing is found, also if the hub cannot be reached and the model is not
        in the cache.
      ImportError: if a name of the hub is given, and huggingface_hub is not installed.
      ValueError: if the file is not a GGUF file, or it is not clear which one of several is meant.
    """
    path = Path(source)
    if not os.path.lexists(path):
        found = _HUB_NAME.fullmatch(source) if isinstance(source, str) else None
        if found is None:
            raise FileNotFoundError(
                f"expected a checkpoint folder, a GGUF file, or a model of the Hugging Face hub "
                f"(owner/name), found none at {os.fspath(source)}"
            )
        return _fetch(found["repo"], found["file"], found["revision"])
    if not path.exists():
        raise FileNotFoundError(
            f"expected a checkpoint at {path}, got a link to {path.readlink()}, which is missing"
        )
    if path.is_dir():
        path = _find_snapshot(path)
        return Location(path, _get_parts(path))
    if path.suffix.lower() != GGUF:
        raise ValueError(
            f"expected a checkpoint folder or a GGUF file, got the file {path}; a folder has "
            f"{CONFIG} beside its weights"
        )
    # A file of the cache of huggingface_hub is a link, and what it leads to is named by a hash.
    return Location(path, (*path.parent.resolve().parts, path.stem))


def choose_names(locations: Sequence[Location]) -> list[str]:
    """Name each model by the fewest parts of its location that make all names different.

    Args:
      locations: where the models are.

    Raises:
      ValueError: if two locations are the same.
    """
    for num in range(1, max(len(location.parts) for location in locations) + 1):
        names = ["/".join(location.parts[-num:]) for location in locations]
        if len(set(names)) == len(names):
            return names
    got = ", ".join(str(location.path) for location in locations)
    raise ValueError(f"expected different checkpoints, got {got}")


def _get_parts(folder: Path) -> tuple[str, ...]:
    """Return the owner and the name of a cached model, or the parts of the path of a folder."""
    whole = folder.resolve()
    if whole.parent.name == "snapshots" and whole.parent.parent.name.startswith("models--"):
        return tuple(whole.parent.parent.name.split("--")[1:])
    return whole.parts


def _find_snapshot(folder: Path) -> Path:
    """Find the snapshot to read if a folder is that of a model in the cache of huggingface_hub."""
    snapshots = folder / "snapshots"
    if not folder.resolve().name.startswith("models--") or not snapshots.is_dir():
        return folder
    main = folder / "refs" / "main"
    if main.is_file() and (snapshots / (name := main.read_text().strip())).is_dir():
        return snapshots / name
    found = sorted(path for path in snapshots.iterdir() if path.is_dir())
    if len(found) != 1:
        raise ValueError(
            f"expected one snapshot in {snapshots}, or refs/main to name one, got {len(found)}: "
            "pass the folder of a snapshot"
        )
    return found[0]


def _fetch(repo: str, file: str | None, revision: str | None) -> Location:
    """Download what is missing of a model of the hub."""
    try:
        import huggingface_hub
    except ImportError as error:
        raise ImportError(
            f"expected a folder at {repo}, found none, and a model of the Hugging Face hub needs "
            f'huggingface_hub: pip install "jchain[hub]" ({error})'
        ) from None
    label = repo if revision is None else f"{repo}@{revision}"
    owner, name = label.split("/", 1)
    get = partial(_download, label, repo, revision)
    if file is not None:
        path = get([file[1:]]) / file[1:]
        if not path.is_file():
            raise FileNotFoundError(f"expected the file {file[1:]} of {label} on the hub, got none")
        return Location(path, (owner, name, path.stem))
    folder = get(_FILES)
    if (folder / INDEX).exists() and not (folder / WEIGHTS).exists():
        get(sorted(set(read_index(folder / INDEX).values())))
    if not any((folder / weights).exists() for weights in (WEIGHTS, INDEX, ADAPTER_WEIGHTS)):
        return _fetch_other(huggingface_hub.HfApi(), label, repo, revision)
    return Location(folder, (owner, name))


def _fetch_other(api: "HfApi", label: str, repo: str, revision: str | None) -> Location:
    """Download the GGUF file of a model that has no safetensors, or say what the model has."""
    owner, name = label.split("/", 1)
    try:
        files = api.list_repo_files(repo, revision=revision)
    except OSError:  # there is no network: only what is in the cache is known
        folder = _download(label, repo, revision, ["*"])
        files = [path.name for path in folder.iterdir()]
    weights = sorted(file for file in files if file.endswith(WEIGHT_SUFFIXES))
    found = [file for file in weights if file.endswith(GGUF)]
    if len(found) == 1:
        return Location(_download(label, repo, revision, found) / found[0], (owner, name))
    if found:
        raise ValueError(
            f"expected one GGUF file in {label}, got {', '.join(found)}: name one of them, such as "
            f"{repo}/{found[0]}"
        )
    raise FileNotFoundError(
        f"expected {WEIGHTS} or a GGUF file in {label}, found "
        f"{', '.join(weights) or 'no weights'}: only these are read, never pickle"
    )


def _download(label: str, repo: str, revision: str | None, files: Sequence[str]) -> Path:
    """Download files of a model to the cache, and return the folder of the snapshot."""
    from huggingface_hub import errors, snapshot_download

    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=[*files]))
    except errors.GatedRepoError:
        reason = "its owner restricts access: accept the conditions on its page, and log in"
    except errors.RepositoryNotFoundError:
        reason = "there is no such folder here, and no such model on the hub (or it is private)"
    except errors.RevisionNotFoundError:
        reason = f"it has no branch, tag, or commit {revision}"
    except errors.LocalEntryNotFoundError as error:
        cause = error.__cause__ or error
        reason = (
            "there is no such folder here, and the model is not in the cache of huggingface_hub, "
            f"and the hub cannot be reached ({type(cause).__name__}: {get_first_line(cause)})"
        )
    except (errors.HFValidationError, OSError) as error:
        reason = f"{type(error).__name__}: {get_first_line(error)}"
    raise FileNotFoundError(f"expected the checkpoint {label}: {reason}") from None
