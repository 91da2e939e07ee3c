"""What users bring to the command line: files of data, of modules, and of banks."""

import csv
import importlib.util
import math
import tokenize
import types
import zipfile
import zlib
from pathlib import Path

import flax.linen as nn
import numpy as np

from jchain import data as data_lib
from jchain.bank import Bank
from jchain.cli.config import DATA_FILES, DEFAULT_DATA, SearchConfig, require
from jchain.data import Dataset
from jchain.modules import is_nnx
from jchain.pytree import describe_type, get_first_line

# What the readers of NumPy, zip files, and tables raise for files that are damaged.
_DAMAGED = (
    ValueError,
    EOFError,
    KeyError,
    MemoryError,
    NotImplementedError,
    OSError,
    OverflowError,
    RuntimeError,
    SyntaxError,
    TypeError,
    csv.Error,
    tokenize.TokenError,
    zipfile.BadZipFile,
    zlib.error,
)


def load_data(config: SearchConfig) -> Dataset:
    """Load the data set that the options name, or read the file that they name.

    Args:
      config: the options: `data`, `target`, `seed`, `sizes`, and `data_dir`.

    Raises:
      ValueError, OSError, ImportError: if the data cannot be loaded.
    """
    name = config.data or DEFAULT_DATA
    path = Path(name)
    if config.target is not None and path.suffix != ".csv":
        raise ValueError(f"expected --target only with --data FILE.csv, got --data {name}")
    if path.suffix not in DATA_FILES:
        return data_lib.load(name, config.seed, sizes=config.sizes, data_dir=config.data_dir)
    try:
        x, y = _read_npz(path) if path.suffix == ".npz" else _read_csv(path, config.target)
        return data_lib.split(x, y, seed=config.seed, name=path.stem, sizes=config.sizes)
    except _DAMAGED as error:
        if isinstance(error, OSError) and error.filename is not None:
            raise
        reason = get_first_line(error)
        named = reason if str(path) in reason else f"{path}: {reason}"
        raise ValueError(named) from None


def _read_npz(path: Path) -> tuple[np.ndarray, np.ndarray]:
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            _check_array_size(archive, info)
    with np.load(path, allow_pickle=False) as arrays:
        if not {"x", "y"} <= set(arrays.files):
            raise ValueError(f"expected arrays x and y in {path}, got {', '.join(arrays.files)}")
        x, y = arrays["x"], arrays["y"]
    return x, _number_classes(y, path)


def _check_array_size(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> None:
    """Check that an array is not larger than its file, before memory is taken for it."""
    with archive.open(info) as file:
        version = np.lib.format.read_magic(file)
        if version not in ((1, 0), (2, 0)):
            raise ValueError(f"expected an array of NumPy in {info.filename}, got format {version}")
        read = np.lib.format.read_array_header_1_0
        shape, _, dtype = (read if version == (1, 0) else np.lib.format.read_array_header_2_0)(file)
    if math.prod(shape) * dtype.itemsize > info.file_size:
        raise ValueError(f"expected {info.filename} to hold the array {list(shape)} of its header")


def _read_csv(path: Path, target: str | None) -> tuple[np.ndarray, np.ndarray]:
    """Read a table with a header; the target is the last column, unless it is named."""
    with path.open(newline="") as file:
        lines = [[cell.strip() for cell in line] for line in csv.reader(file) if line]
    if len({len(line) for line in lines}) > 1:
        raise ValueError(f"expected as many cells in each line of {path} as in its header")
    rows = np.array(lines)
    if len(rows) < 2:
        raise ValueError(f"expected a header and at least one row in {path}, got {len(rows)} lines")
    names = [str(name) for name in rows[0]]
    if target is not None and target not in names:
        raise ValueError(f"expected --target of {', '.join(names)}, got {target!r}")
    column = len(names) - 1 if target is None else names.index(target)
    values = np.delete(rows[1:], column, axis=1)
    try:
        x = values.astype(np.float32)
    except ValueError:
        bad = next(
            (names[j + (j >= column)], str(values[i, j]))
            for i in range(len(values))
            for j in range(values.shape[1])
            if not _is_number(values[i, j])
        )
        raise ValueError(
            f"expected numbers in all columns of {path} but the target, got {bad[1]!r} in the "
            f"column {bad[0]}"
        ) from None
    return x, _number_classes(rows[1:, column], path)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _number_classes(y: np.ndarray, path: Path) -> np.ndarray:
    """Number the classes of labels, in the order of their values or names."""
    if y.dtype.kind in "US" and all(_is_number(text) for text in np.unique(y)):
        y = y.astype(np.float64)
    if np.issubdtype(y.dtype, np.floating):
        if y.ndim != 1 or not (y == np.round(y)).all():
            raise ValueError(
                f"expected classes as labels in {path}, got numbers such as {y.reshape(-1)[0]}: "
                "use Python, with jc.data.split(x, y) and loss_fn="
            )
        y = y.astype(np.int64)
    return np.unique(y, return_inverse=True)[1]


def load_bank(config: SearchConfig) -> Bank:
    """Read the bank that the options name.

    Args:
      config: the options: `bank_file`, and `modules`, a Python file that defines its modules.

    Raises:
      ValueError, OSError: if the bank or the modules cannot be read.
    """
    return Bank.load(require(config.bank_file), modules=load_modules(config.modules))


def load_modules(path: Path | None) -> list[object]:
    """Run a Python file, and return the modules that it defines.

    These are its linen classes, its functions, and its instances of nnx modules.

    Args:
      path: the file, or None.

    Raises:
      OSError: if there is no such file.
      ValueError: if the file fails.
    """
    if path is None:
        return []
    if not path.is_file():
        raise FileNotFoundError(f"expected a Python file of modules, got {path}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ValueError(f"expected a Python file of modules, got {path}")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever a user's file raises
        raise ValueError(f"{path} failed with {describe_type(error)}: {error}") from None
    return [value for value in vars(module).values() if _is_module(value)]


def _is_module(value: object) -> bool:
    is_class = isinstance(value, type) and issubclass(value, nn.Module)
    return is_class or is_nnx(value) or isinstance(value, types.FunctionType)
