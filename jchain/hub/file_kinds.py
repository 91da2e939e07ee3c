"""What a file of a checkpoint is, if it is not what its name says or if it is missing."""

from pathlib import Path

# The first bytes of files that are often found in place of safetensors or JSON files.
_STARTS = {
    b"version https://git-lfs": (
        "a pointer of git-lfs in place of the file: run `git lfs pull` in its folder"
    ),
    b"PK\x03\x04": "a pickle of PyTorch, which is never read: convert it to safetensors",
    b"\x80": "a pickle, which is never read: convert it to safetensors",
    b"GGUF": "a GGUF file: name it with the ending .gguf",
    b"\x89HDF": "an HDF5 file: convert it to safetensors",
    b"<": "a web page or XML: the download failed",
}
# Endings of files that hold weights.
WEIGHT_SUFFIXES = (
    ".safetensors", ".gguf", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".h5", ".msgpack", ".onnx",
    ".ot", ".tflite", ".npz", ".mlmodel", ".distcp",
)  # fmt: skip


def name_kind(path: Path) -> str | None:
    """Name the kind of a file by its first bytes, with what to do about it.

    Args:
      path: the file.

    Returns:
      The kind; None if it is not known.
    """
    try:
        with path.open("rb") as file:
            start = file.read(32)
    except OSError:
        return None
    if not start:
        return "an empty file"
    return next((kind for known, kind in _STARTS.items() if start.startswith(known)), None)


def check_exists(path: Path) -> None:
    """Check that a file of a checkpoint exists.

    Args:
      path: the file.

    Raises:
      FileNotFoundError: if the file or its folder is missing, or the file is a dangling link.
    """
    if path.is_file():
        return
    if path.is_symlink():
        raise FileNotFoundError(
            f"expected a file at {path}, got a link to {path.readlink()}, which is missing: the "
            "download may be incomplete"
        )
    if not path.parent.is_dir():
        raise FileNotFoundError(f"expected a checkpoint folder at {path.parent}, found none")
    raise FileNotFoundError(
        f"expected {path.name} in {path.parent}, found {list_files(path.parent)}"
    )


def list_files(folder: Path, suffixes: tuple[str, ...] = ("",), most: int = 6) -> str:
    """List the first few files of a folder for an error message, "none" if there are none.

    Args:
      folder: the folder.
      suffixes: endings of the files to list.
      most: maximum number of names; the remaining names are only counted.
    """
    found = sorted(path.name for path in folder.iterdir() if path.name.endswith(suffixes))
    more = f" and {len(found) - most} more" if len(found) > most else ""
    return (", ".join(found[:most]) or "none") + more
