"""The work of a search that is not finished, from which the same command continues.

It is the folder `run` within the result folder:

    options.json   the options of the search, and the budget of the result that is finished
    seed-0/        for each seed, the bank that was trained, and the run (`jchain.runs.run_folder`)
    result/        the files of the result, until they are complete
    ready          there while complete files are moved from `result` to the result folder
    programs/      compiled programs, which workers share
    lock           held by the process that works here
"""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path

from jchain import files
from jchain.cli.config import SearchConfig, require
from jchain.cli.result_folder import WORK_FOLDER, check_out, has_result, list_files, move
from jchain.runs.identity import find_differences
from jchain.runs.run_folder import acquire_lock

_FORMAT = "jchain search 1"
_OPTIONS_FILE, _READY_FILE = "options.json", "ready"
# Options that do not change what is computed, or that may change when a search continues.
_FREE = ("budget", "max_seconds", "num_workers", "out", "command", "replace", "json")


class WorkFolder:
    """The folder of one search, which this process holds.

    Args:
      config: the resolved options of `jchain search`.

    Attributes:
      path: the folder.
      result: the folder in which the result is put together.
      programs: the folder of the compiled programs that workers share.
      is_finished: whether the result folder holds the result for these options and this budget.
    """

    def __init__(self, config: SearchConfig) -> None:
        self._config = config
        self._out = require(config.out)
        self.path = self._out / WORK_FOLDER
        self.result = self.path / "result"
        self.programs = self.path / "programs"
        self.is_finished = False

    def seed_folder(self, seed: int) -> Path:
        """Return the folder for the bank and the run of one seed.

        Args:
          seed: the seed.
        """
        return self.path / f"seed-{seed}"

    def begin(self) -> None:
        """Read what an earlier call of the command left, or begin anew.

        Raises:
          ValueError: if the folder belongs to a search with other options.
        """
        if self._config.replace:
            for name in ("result", *(path.name for path in self.path.glob("seed-*"))):
                shutil.rmtree(self.path / name, ignore_errors=True)
            for name in (_OPTIONS_FILE, _READY_FILE):
                (self.path / name).unlink(missing_ok=True)
        if not (self.path / _OPTIONS_FILE).exists():
            self._write_options(None)
            return
        finished = self._check_options()
        if (self.path / _READY_FILE).exists():
            finished = self._move()
        budget = require(self._config.budget)
        if finished is not None and finished > budget:
            raise ValueError(
                f"expected a budget of at least {finished:,}, which this search has had, got "
                f"{budget:,}: pass --replace to begin anew"
            )
        self.is_finished = finished == budget

    def publish(self, *, is_finished: bool = True) -> None:
        """Move the files of the result to the result folder.

        Args:
          is_finished: whether the result is complete; otherwise, the same command continues.
        """
        budget = require(self._config.budget) if is_finished else None
        ready = {"budget": budget, "names": list_files(self.result)}
        files.write_json(self.path / _READY_FILE, ready)
        self._move()
        shutil.rmtree(self.programs, ignore_errors=True)

    @property
    def is_worth_keeping(self) -> bool:
        """Whether anything was saved that took time to compute."""
        return any(
            next(self.path.glob(pattern), None) is not None
            for pattern in ("seed-*/bank.safetensors", "seed-*/*/checkpoints/*", "result/seed-*")
        )

    def _move(self) -> int | None:
        path = self.path / _READY_FILE
        ready = json.loads(path.read_text())
        move(self.result, self._out, ready["names"])
        self._write_options(ready["budget"])
        path.unlink()
        return ready["budget"]

    def _describe(self) -> dict[str, object]:
        options = {name: value for name, value in asdict(self._config).items() if name not in _FREE}
        return json.loads(json.dumps(options, default=str))

    def _write_options(self, finished: int | None) -> None:
        header = {"format": _FORMAT, "options": self._describe(), "finished": finished}
        files.write_json(self.path / _OPTIONS_FILE, header)

    def _check_options(self) -> int | None:
        """Compare the options with those of the folder, and return its finished budget."""
        path = self.path / _OPTIONS_FILE
        try:
            header = json.loads(path.read_text())
            if header["format"] != _FORMAT:
                raise ValueError(f"expected the format {_FORMAT!r}, got {header['format']!r}")
            old, finished = header["options"], header["finished"]
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(
                f"cannot read {path}, which says what the search is: {error!r}; pass --replace to "
                "begin anew"
            ) from None
        if differences := find_differences(old, self._describe()):
            raise ValueError(
                f"{self._out} belongs to a search with other options: {'; '.join(differences)}: "
                "pass --replace to begin anew, or another --out"
            )
        return finished


@contextmanager
def open_work(config: SearchConfig) -> Iterator[WorkFolder]:
    """Hold the folder of a search, and continue what an earlier call of the command left there.

    If the `with` block fails before anything is saved, the folder is removed.

    Args:
      config: the resolved options of `jchain search`.

    Raises:
      ValueError: if the folder holds something else, belongs to a search with other options, or is
        in use.
    """
    out, work = require(config.out), WorkFolder(config)
    check_out(out)
    if has_result(out) and not config.replace and not (work.path / _OPTIONS_FILE).exists():
        raise ValueError(
            f"{out} already holds a result: pass --replace to replace it, or another --out"
        )
    new_folders = [folder for folder in (out, *out.parents) if not folder.exists()]
    work.path.mkdir(parents=True, exist_ok=True)
    lock = acquire_lock(work.path)
    is_kept = True
    try:
        work.begin()
        is_kept = work.is_finished
        yield work
        is_kept = True
    finally:
        is_kept = is_kept or work.is_worth_keeping
        if is_kept:
            (work.path / "holder.json").unlink(missing_ok=True)
        else:
            shutil.rmtree(work.path, ignore_errors=True)
        lock.release()
        for folder in new_folders if not is_kept else []:
            with suppress(OSError):  # somebody else has written to it
                folder.rmdir()
