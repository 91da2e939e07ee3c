"""The result folder of `jchain search`.

The path is checked before the search starts. The result is written to a temporary folder, which is
renamed at the end.
"""

import contextlib
import itertools
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from jchain.cli.config import SearchConfig
from jchain.cli.plot import plot_curve, plot_seeds, plot_sweep
from jchain.cli.progress import print_progress
from jchain.cli.records import ResultRecord, SearchOutput, Summary, format_loss
from jchain.data import EVALUATION_SPLITS
from jchain.files import get_umask

RESULT_FILE = "result.json"
BANK_FILE = "bank.safetensors"
CURVE_FILE = "curve.png"
SWEEP_FILE = "sweep.png"
# Files for several seeds, next to one folder per seed.
SUMMARY_FILE, SEEDS_FILE = "summary.json", "seeds.png"
_FILES = {RESULT_FILE, BANK_FILE, CURVE_FILE, SWEEP_FILE, SUMMARY_FILE, SEEDS_FILE}
_SEED_FOLDER = re.compile(r"seed-\d+")


def check_out(path: Path, *, replace: bool) -> None:
    """Check that a result can be written, before anything is computed.

    Args:
      path: the result folder that is to be written.
      replace: whether an existing result may be replaced.

    Raises:
      ValueError: if the folder cannot be written or holds something that must not be replaced.
    """
    path = path.absolute()
    above = next(folder for folder in (path, *path.parents) if folder.exists())
    if not above.is_dir():
        raise ValueError(f"expected a folder for results, got the file {above}")
    if not os.access(above, os.W_OK | os.X_OK):
        raise ValueError(f"expected a folder in which results can be written, got {above}")
    if not path.exists() or not any(path.iterdir()):
        return
    entries = {entry.name for entry in path.iterdir()}
    seeds = {name for name in entries if _SEED_FOLDER.fullmatch(name) and (path / name).is_dir()}
    within = {f"{name}/{own.name}" for name in seeds for own in (path / name).iterdir()}
    within = {name for name in within if name.partition("/")[2] not in _FILES}
    others = sorted((entries - seeds - _FILES) | within)
    if others or not any((path / name).exists() for name in (RESULT_FILE, SUMMARY_FILE)):
        what = ", ".join(others[:4]) or f"no {RESULT_FILE}"
        raise ValueError(
            f"{path} holds files that are not a result of jchain ({what}): choose another --out"
        )
    if not replace:
        raise ValueError(
            f"{path} already holds a result: pass --replace to replace it, or another --out"
        )
    if path.is_mount():
        raise ValueError(
            f"{path} is a mount point, so its result cannot be replaced: choose another --out"
        )


def write(path: Path, output: SearchOutput, *, replace: bool = False) -> Path:
    """Write the result folder, either completely or not at all.

    The result is written to a temporary folder next to `path`, which is then renamed. If `path` is
    an empty folder, the files are moved into it instead, with `result.json` last. Weights that
    are unchanged from the checkpoints are not written again.

    Args:
      path: the result folder.
      output: the output of the search.
      replace: whether to replace an existing result.

    Returns:
      The folder that was written: `path`, or another folder next to it if `path` was filled in the
      meantime.

    Raises:
      OSError: if the folder cannot be written or cannot be renamed; in the latter case the error
        names the temporary folder, which holds the result.
    """
    with _write_beside(path, replace=replace) as temp_folder:
        _write_files(temp_folder.path, output)
    return temp_folder.written


class SeedWriter:
    """Writer of the results of several seeds, each of which is written when it is finished.

    Attributes:
      temporary: the folder that holds the results until all seeds are finished.
    """

    def __init__(self, temp_folder: "_TempFolder") -> None:
        self._temp_folder = temp_folder
        self.temporary = temp_folder.path

    @property
    def has_seeds(self) -> bool:
        """Whether at least one seed is finished."""
        return any(_SEED_FOLDER.fullmatch(entry.name) for entry in self.temporary.iterdir())

    @property
    def written(self) -> Path:
        """The folder that was written; valid after the `with` block."""
        return self._temp_folder.written

    def add(self, output: SearchOutput) -> None:
        """Write the result of one seed.

        Args:
          output: the output of the search with this seed.
        """
        folder = self.temporary / f"seed-{output.record['config']['seed']}"
        unfinished = folder.with_name(f".{folder.name}")
        unfinished.mkdir()
        _write_files(unfinished, output)
        os.rename(unfinished, folder)

    def finish(self, summary: Summary) -> None:
        """Write the summary of all seeds and its figure.

        Args:
          summary: the summary of all seeds.
        """
        (self.temporary / SUMMARY_FILE).write_text(json.dumps(summary, indent=1) + "\n")
        plot_seeds(self.temporary / SEEDS_FILE, summary)
        self.temporary.chmod(0o777 & ~get_umask())


@contextlib.contextmanager
def write_seeds(path: Path, *, replace: bool = False) -> Iterator[SeedWriter]:
    """Write the results of several seeds to a temporary folder, which is renamed at the end.

    If a seed fails or is interrupted, the results of the seeds before it are kept in the temporary
    folder, and its path is printed to standard error.

    Args:
      path: the result folder.
      replace: whether to replace an existing result.

    Raises:
      OSError: if the folder cannot be written or cannot be renamed, as in `write`.
    """
    with _write_beside(path, replace=replace) as temp_folder:
        writer = SeedWriter(temp_folder)
        try:
            yield writer
        except BaseException:
            temp_folder.is_kept = writer.has_seeds
            if temp_folder.is_kept:
                print_progress(f"The finished seeds are kept in {temp_folder.path}")
            raise


class _TempFolder:
    """A temporary folder for a result, and the folder that it finally becomes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.written = path
        self.is_kept = False  # whether to keep the temporary folder if the `with` block fails


@contextlib.contextmanager
def _write_beside(path: Path, *, replace: bool) -> Iterator[_TempFolder]:
    """Make a temporary folder, and rename it to `path` or to a path next to it on success."""
    path = path.resolve()
    is_filled = path.is_dir() and not any(path.iterdir())
    above = path if is_filled else path.parent
    above.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=above, prefix=f".{path.name}."))
    temp_folder = _TempFolder(temporary)
    try:
        yield temp_folder
    except BaseException:
        if not temp_folder.is_kept:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    try:
        moved = _fill(path, temporary) if is_filled else _put(path, temporary, replace=replace)
    except OSError as error:
        raise OSError(f"{error}; the result is kept in {temporary}") from error
    temp_folder.written = moved


def _write_files(folder: Path, output: SearchOutput) -> None:
    (folder / RESULT_FILE).write_text(json.dumps(output.record, indent=1) + "\n")
    if not output.record["config"].get("checkpoint") or output.bank.versions is not None:
        output.bank.save(folder / BANK_FILE)
    plot_curve(folder / CURVE_FILE, output.result.curve, output.levels)
    if "sweep" in output.record:
        plot_sweep(folder / SWEEP_FILE, output.record["sweep"])
    folder.chmod(0o777 & ~get_umask())


def _fill(path: Path, temporary: Path) -> Path:
    """Move the files of `temporary`, a folder in `path`, up into `path`, with the result last."""
    if [*path.iterdir()] != [temporary]:  # another process has written to `path`
        return _put(path, temporary, replace=False)
    for file in sorted(
        temporary.iterdir(), key=lambda file: file.name in (RESULT_FILE, SUMMARY_FILE)
    ):
        os.rename(file, path / file.name)
    temporary.rmdir()
    return path


def _put(path: Path, temporary: Path, *, replace: bool) -> Path:
    """Rename the temporary folder to `path`, or to another path next to it."""
    path = _find_free_path(path, replace=replace)
    if not path.exists():
        os.rename(temporary, path)
        return path
    aside = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        os.rename(path, aside / "old")
        os.rename(temporary, path)
    except BaseException:
        if not path.exists():
            os.rename(aside / "old", path)
        with contextlib.suppress(OSError):
            aside.rmdir()
        raise
    # The new result is in place, so an interruption can only leave the old one behind in `aside`.
    with contextlib.suppress(KeyboardInterrupt):
        shutil.rmtree(aside, ignore_errors=True)
    return path


def _find_free_path(path: Path, *, replace: bool) -> Path:
    """Return `path` if it may be written, or else the first unused `path-2`, `path-3`, ..."""
    try:
        check_out(path, replace=replace)
    except ValueError:
        return next(
            other
            for i in itertools.count(2)
            if not (other := path.with_name(f"{path.name}-{i}")).exists()
        )
    return path


def describe(path: Path) -> dict[str, str]:
    """Collect facts about the chain of a result folder, for a model card.

    Args:
      path: the result folder.
    """
    record: ResultRecord = json.loads((path / RESULT_FILE).read_text())
    config = SearchConfig.load(record["config"])
    parent = record["controls"].get("best_parent", record)["loss"]
    scored_on = config.text or config.choices or config.data or ""
    facts = {"data": scored_on if isinstance(scored_on, str) else ", ".join(scored_on)}
    for split in EVALUATION_SPLITS:
        loss, unchanged = (format_loss(own[split], 4) for own in (record["loss"], parent))
        facts[f"loss on {split}"] = f"{loss}, the unchanged model {unchanged}"
    if record["chosen"] != "search":
        facts["recipe"] = f"{record['chosen']}: no chain that the search found was better on select"
    calls = f"{record['layer_calls']:,} layer calls"
    facts["search"] = f"{config.search}, seed {config.seed}, {calls}"
    return facts | {"command": f"`{config.command}`"}


def read_options(path: Path) -> dict[str, object]:
    """Read the options of an earlier result, to run a search with them again.

    The result folder, the command, and how it was run are left out.

    Args:
      path: a result folder, or its `result.json` or `summary.json`.

    Raises:
      ValueError: if there is no result.
    """
    files = [path / name for name in (SUMMARY_FILE, RESULT_FILE)] if path.is_dir() else [path]
    found = [file for file in files if file.is_file()]
    try:
        config = json.loads(found[0].read_text())["config"]
        return {name: value for name, value in config.items() if name not in ("out", "command")}
    except (IndexError, OSError, json.JSONDecodeError, KeyError, TypeError, AttributeError):
        raise ValueError(
            f"expected a result folder, or its {RESULT_FILE} or {SUMMARY_FILE}, got {path}"
        ) from None


def read_config(path: Path) -> tuple[SearchConfig | None, list[list[int]]]:
    """Read the options and the best chain from a result folder.

    Args:
      path: a result folder or a bank file.

    Returns:
      The options, and a list with the tokens of the chain. For a bank file, they are None and an
      empty list.

    Raises:
      ValueError: if the folder holds no result or a damaged one.
    """
    if not path.is_dir():
        return None, []
    try:
        record: ResultRecord = json.loads((path / RESULT_FILE).read_text())
        return SearchConfig.load(record["config"]), [record["best_chain"]]
    except (OSError, json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        hint = ""
        if (path / "config.json").exists():
            hint = "; to use a checkpoint, pass the result of jchain search --checkpoint"
        if (path / SUMMARY_FILE).exists():
            hint = f"; it holds several seeds: pass one of them, such as {min(path.glob('seed-*'))}"
        raise ValueError(
            f"expected a bank file or a result folder, got {path}: {error}{hint}"
        ) from None
