"""The result folder of `jchain search`.

The path is checked before the search starts. The files are written to `jchain.cli.work_folder`, and
moved when they are complete.
"""

import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import get_type_hints

from jchain.cli.config import PATH_OPTIONS, SearchConfig
from jchain.cli.plot import plot_curve, plot_seeds, plot_sweep
from jchain.cli.records import (
    Configured,
    ResultRecord,
    SearchOutput,
    Summary,
    check_type,
    format_calls,
    format_loss,
    read,
)
from jchain.cli.trust import check_trust
from jchain.data import EVALUATION_SPLITS
from jchain.files import write_atomically, write_json
from jchain.pytree import get_first_line

RESULT_FILE = "result.json"
BANK_FILE = "bank.safetensors"
# The result of the run, without its state (`jchain.Result.to_json`).
SEARCH_FILE = "search.json"
CURVE_FILE = "curve.png"
SWEEP_FILE = "sweep.png"
# Files for several seeds, next to one folder per seed.
SUMMARY_FILE, SEEDS_FILE = "summary.json", "seeds.png"
# The folder of what is needed to continue the search.
WORK_FOLDER = "run"
_LAST = (RESULT_FILE, SUMMARY_FILE)
_FILES = {RESULT_FILE, BANK_FILE, SEARCH_FILE, CURVE_FILE, SWEEP_FILE, SUMMARY_FILE, SEEDS_FILE}
_SEED_FOLDER = re.compile(r"seed-\d+")


class UnwrittenError(OSError):
    """The error of a result that cannot be written, for example to a full disk.

    Args:
      record: the result.
      reason: the error of the operating system.
    """

    def __init__(self, record: ResultRecord | Summary, reason: OSError) -> None:
        super().__init__(
            f"the result above is not written: {reason}. The same command writes it, from what "
            "was saved of the search"
        )
        self.record = record


def check_out(path: Path) -> None:
    """Check that a result can be written, before anything is computed.

    Args:
      path: the result folder that is to be written.

    Raises:
      ValueError: if the folder cannot be written or holds something that is not a result.
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
    others = sorted((entries - seeds - _FILES - {WORK_FOLDER}) | within)
    if others or not (has_result(path) or (path / WORK_FOLDER).is_dir()):
        what = ", ".join(others[:4]) or f"no {RESULT_FILE}"
        raise ValueError(
            f"{path} holds files that are not a result of jchain ({what}): choose another --out"
        )


def has_result(path: Path) -> bool:
    """Return whether a folder holds the result of one seed or of several.

    Args:
      path: the folder.
    """
    return any((path / name).is_file() for name in _LAST)


def list_files(path: Path) -> list[str]:
    """List the files of a result, and its folders of seeds.

    Args:
      path: the folder.
    """
    names = (entry.name for entry in path.iterdir())
    return sorted(name for name in names if name in _FILES or _SEED_FOLDER.fullmatch(name))


def write(folder: Path, output: SearchOutput) -> None:
    """Write the files of the result of one seed, with `result.json` last.

    Weights that are unchanged from the checkpoints are not written again.

    Args:
      folder: the folder, which is made if it does not exist.
      output: the output of the search.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if not output.record["config"].get("checkpoint") or output.bank.versions is not None:
        output.bank.save(folder / BANK_FILE)
    found = output.result.to_json()
    write_atomically(
        folder / SEARCH_FILE, lambda temporary: Path(temporary).write_text(f"{found}\n")
    )
    plot_curve(folder / CURVE_FILE, output.result.curve, output.levels)
    if "sweep" in output.record:
        plot_sweep(folder / SWEEP_FILE, output.record["sweep"])
    write_json(folder / RESULT_FILE, output.record)


def write_summary(folder: Path, summary: Summary) -> None:
    """Write the summary of several seeds and its figure.

    Args:
      folder: the folder, which holds a folder per seed.
      summary: the summary.
    """
    plot_seeds(folder / SEEDS_FILE, summary)
    write_json(folder / SUMMARY_FILE, summary)


def move(folder: Path, out: Path, names: Sequence[str]) -> None:
    """Move the files of a result, and remove those that an older result has left.

    `result.json` or `summary.json` is removed first and moved last, so that a part of the files is
    never read as a result. If this is interrupted, call it again with the same names.

    Args:
      folder: the folder with the files, which is removed at the end.
      out: the result folder.
      names: the names that `list_files` returned for the folder.
    """
    left = [name for name in names if (folder / name).exists()]
    if any(name in _LAST for name in left):
        for name in _LAST:
            (out / name).unlink(missing_ok=True)
    for name in set(list_files(out)) - set(names):
        _remove(out / name)
    for name in sorted(left, key=lambda name: name in _LAST):
        if (out / name).is_dir():
            shutil.rmtree(out / name)
        os.replace(folder / name, out / name)
    shutil.rmtree(folder, ignore_errors=True)


def read_record(path: Path) -> ResultRecord | Summary:
    """Read the result of a folder.

    Args:
      path: a folder that holds the result of one seed or of several.
    """
    (name,) = (name for name in _LAST if (path / name).is_file())
    kind = ResultRecord if name == RESULT_FILE else Summary
    return read(path / name, kind, kind.__required_keys__)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


def describe(path: Path) -> dict[str, str]:
    """Collect facts about the chain of a result folder, for a model card.

    Args:
      path: the result folder.
    """
    needed = ("loss", "controls", "chosen", "layer_calls", "config")
    record = read(path / RESULT_FILE, ResultRecord, needed)
    config = SearchConfig.load(record["config"])
    parent = record["controls"].get("best_parent", record)["loss"]
    scored_on = config.text or config.choices or config.data or ""
    facts = {"data": scored_on if isinstance(scored_on, str) else ", ".join(scored_on)}
    for split in EVALUATION_SPLITS:
        loss, unchanged = (format_loss(own[split], 4) for own in (record["loss"], parent))
        facts[f"loss on {split}"] = f"{loss}, the unchanged model {unchanged}"
    if record["chosen"] != "search":
        facts["recipe"] = f"{record['chosen']}: no chain that the search found was better on select"
    calls = f"{format_calls(record['layer_calls'])} layer calls"
    facts["search"] = f"{config.search}, seed {config.seed}, {calls}"
    return facts | {"command": f"`{config.command}`"}


def read_options(path: Path, *, is_trusted: bool = False) -> dict[str, object]:
    """Read the options of an earlier result, to run a search with them again.

    The result folder, the command, and how it was run are left out.

    Args:
      path: a result folder, or its `result.json` or `summary.json`.
      is_trusted: whether the files that it names may be read (see `jchain.cli.trust`).

    Raises:
      ValueError: if there is no result, or it names files that may not be read.
    """
    files = [path / name for name in (SUMMARY_FILE, RESULT_FILE)] if path.is_dir() else [path]
    found = [file for file in files if file.is_file()]
    try:
        record = read(found[0], Configured, ("config",))
    except (IndexError, OSError, ValueError) as error:
        reason = f": {get_first_line(error)}" if isinstance(error, ValueError) else ""
        raise ValueError(
            f"expected a result folder, or its {RESULT_FILE} or {SUMMARY_FILE}, got {path}{reason}"
        ) from None
    config = record["config"]
    check_trust(config, record.get("signature"), path, is_trusted=is_trusted)
    return {name: value for name, value in config.items() if name not in ("out", "command")}


def _load_config(values: Mapping[str, object], path: Path) -> SearchConfig:
    """Make the options of a result, and check their types."""
    for name in PATH_OPTIONS:
        check_type(values.get(name), str | None, path, f"config.{name}")
    config = SearchConfig.load(values)
    for name, kind in get_type_hints(SearchConfig).items():
        check_type(getattr(config, name), kind, path, f"config.{name}")
    return config


def read_config(
    path: Path, *, is_trusted: bool = False
) -> tuple[SearchConfig | None, list[list[int]]]:
    """Read the options and the best chain from a result folder.

    Args:
      path: a result folder or a bank file.
      is_trusted: whether the files that it names may be read (see `jchain.cli.trust`).

    Returns:
      The options, and a list with the tokens of the chain. For a bank file, they are None and an
      empty list.

    Raises:
      ValueError: if the folder holds no result or a damaged one, or it names files that may not be
        read.
    """
    if not path.is_dir():
        return None, []
    try:
        record = read(path / RESULT_FILE, ResultRecord, ("best_chain", "config"))
        config = _load_config(record["config"], path / RESULT_FILE)
    except (OSError, ValueError) as error:
        hint = ""
        if (path / "config.json").exists():
            hint = "; to use a checkpoint, pass the result of jchain search --checkpoint"
        if not has_result(path) and (path / WORK_FOLDER).exists():
            hint = "; its search is not finished: run the same command again to continue it"
        if (path / SUMMARY_FILE).exists():
            hint = f"; it holds several seeds: pass one of them, such as {min(path.glob('seed-*'))}"
        raise ValueError(
            f"expected a bank file or a result folder, got {path}: {error}{hint}"
        ) from None
    check_trust(record["config"], record.get("signature"), path, is_trusted=is_trusted)
    return config, [record["best_chain"]]
