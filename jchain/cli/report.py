"""What the main job leaves behind: a table on the terminal, a folder of files."""

import contextlib
import itertools
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from jchain.cli.pipeline import Job
from jchain.cli.plot import plot_curve, plot_sweep
from jchain.data import EVALUATION_SPLITS
from jchain.files import find_umask

RESULT_FILE, BANK_FILE, CURVE_FILE, SWEEP_FILE = (
    "result.json",
    "bank.safetensors",
    "curve.png",
    "sweep.png",
)


def print_table(job: Job) -> None:
    """The chain that was found beside its controls, on the terminal."""
    from rich.console import Console
    from rich.table import Table

    result, controls = job.result, job.result["controls"]
    table = Table(title="loss (accuracy) by split", title_justify="left")
    table.add_column("", no_wrap=True)
    for name in EVALUATION_SPLITS:
        table.add_column(name, justify="right")
    parent = "best parent net" if job.bank.parents else "plain net, as many steps"
    rows = {
        "chain found": result,
        parent: controls["best_parent"],
        "random chain, as long": controls["random_chain"],
        **controls["recipes"],
    }
    for name, row in rows.items():
        table.add_row(
            name,
            *(_cell(row["loss"][split], row["accuracy"][split]) for split in EVALUATION_SPLITS),
        )
    if result["optimum"] is not None:
        table.add_row("optimum of all chains", f"{result['optimum']:.4f}        ")
    console = Console()
    console.print(table)
    if "sweep" in result:
        console.print(_make_sweep_table(result["sweep"]))
    updates = (
        f", {result['update_calls']:,} of them gradient steps" if result["update_calls"] else ""
    )
    console.print(
        f"chain found, in {result['layer_calls']:,} layer calls{updates}: {' -> '.join(result['layers'])}"
    )
    if result["chosen"] != "search":
        console.print(
            f"It is a recipe, {result['chosen']}: what the search found is no better on select"
        )
    if result["nonfinite_chains"]:
        console.print(
            f"{result['nonfinite_chains']} of {job.run.num_chains} scored chains had a loss that was not finite"
        )


def _make_sweep_table(rows: list[dict[str, Any]]) -> Any:
    """Loss on test by the number of layers, of what was found and of recipes."""
    from rich.table import Table

    names = list(dict.fromkeys(name for row in rows for name in row["recipes"]))
    table = Table(
        title="loss (accuracy) on test by layers beside pinned ones", title_justify="left"
    )
    for name in ("at most", "chain found", *names):
        table.add_column(name, justify="right")
    for row in rows:
        cells = [row, *(row["recipes"].get(name) for name in names)]
        shown = [
            "" if cell is None else _cell(cell["loss"]["test"], cell["accuracy"]["test"])
            for cell in cells
        ]
        table.add_row(str(row["max_layers"]), *shown)
    return table


def _cell(loss: float | None, accuracy: float) -> str:
    return _show(loss) if loss is None else f"{_show(loss)} ({accuracy:.1%})"


def _show(loss: float | None) -> str:
    """A loss, None where it is not finite."""
    return "not finite" if loss is None else f"{loss:.4f}"


def check_out(path: Path, *, replace: bool) -> None:
    """Refuse a place where no result can be written, or that holds something, unless it is a result and may be replaced.

    Raises:
      ValueError: it does.
    """
    path = path.absolute()
    above = next(place for place in (path, *path.parents) if place.exists())
    if not above.is_dir():
        raise ValueError(f"expected a folder for results, got the file {above}")
    if not os.access(above, os.W_OK | os.X_OK):
        raise ValueError(f"expected a folder in which results can be written, got {above}")
    if not path.exists() or not any(path.iterdir()):
        return
    others = sorted(
        {entry.name for entry in path.iterdir()} - {RESULT_FILE, BANK_FILE, CURVE_FILE, SWEEP_FILE}
    )
    if others or not (path / RESULT_FILE).exists():
        what = ", ".join(others[:4]) or f"no {RESULT_FILE}"
        raise ValueError(
            f"{path} holds files that are no result of jchain ({what}): choose another --out"
        )
    if not replace:
        raise ValueError(
            f"{path} already holds a result: pass --replace to replace it, or another --out"
        )
    if path.is_mount():
        raise ValueError(
            f"{path} is a mount, whose result cannot be replaced: choose another --out"
        )


def has_own_weights(job: Job) -> bool:
    """Whether the weights of the bank are in no checkpoint."""
    return not job.result["config"].get("checkpoint") or job.bank.versions is not None


def write(path: Path, job: Job, *, replace: bool = False) -> Path:
    """Write the result folder beside its place, then rename it: all of it or nothing.

    Weights of checkpoints are not written again where they are as they were. An empty folder that is there is filled, the
    result last.

    Args:
      path: of the folder.
      job: what to write.
      replace: a result that is there.

    Returns:
      The folder: `path`, or where that has come to hold something else, another one beside it.

    Raises:
      OSError: it cannot be written, or not be put in its place; then the error says where it is.
    """
    path = path.resolve()
    is_filled = path.is_dir() and not any(path.iterdir())
    above = path if is_filled else path.parent
    above.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=above, prefix=f".{path.name}."))
    try:
        _write_files(temporary, job)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    try:
        return _fill(path, temporary) if is_filled else _put(path, temporary, replace=replace)
    except OSError as error:
        raise OSError(f"{error}; the result is kept in {temporary}") from error


def _write_files(folder: Path, job: Job) -> None:
    (folder / RESULT_FILE).write_text(json.dumps(job.result, indent=1) + "\n")
    if has_own_weights(job):
        job.bank.save(folder / BANK_FILE)
    plot_curve(folder / CURVE_FILE, job.run.curve, job.levels)
    if "sweep" in job.result:
        plot_sweep(folder / SWEEP_FILE, job.result["sweep"])
    folder.chmod(0o777 & ~find_umask())


def _fill(path: Path, temporary: Path) -> Path:
    """Files of the temporary folder, which lies in this one, moved into it, the result last."""
    if [*path.iterdir()] != [temporary]:  # something came meanwhile
        return _put(path, temporary, replace=False)
    for file in sorted(temporary.iterdir(), key=lambda file: file.name == RESULT_FILE):
        os.rename(file, path / file.name)
    temporary.rmdir()
    return path


def _put(path: Path, temporary: Path, *, replace: bool) -> Path:
    """The temporary folder renamed to the path, or to another one beside it."""
    path = _find_place(path, replace=replace)
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
    # The result is there: an interruption only leaves the old one.
    with contextlib.suppress(KeyboardInterrupt):
        shutil.rmtree(aside, ignore_errors=True)
    return path


def _find_place(path: Path, *, replace: bool) -> Path:
    """The folder, or the first of `path-2`, `path-3`, ... that is not there."""
    try:
        check_out(path, replace=replace)
    except ValueError:
        return next(
            other
            for i in itertools.count(2)
            if not (other := path.with_name(f"{path.name}-{i}")).exists()
        )
    return path


def tell(path: Path) -> dict[str, Any]:
    """What is known of the chain of a result folder, for people."""
    result = json.loads((path / RESULT_FILE).read_text())
    config, parent = result["config"], result["controls"]["best_parent"]["loss"]
    data = config.get("text") or config.get("choices") or config.get("data")
    told: dict[str, Any] = {"data": ", ".join(data) if isinstance(data, list) else data}
    for split in EVALUATION_SPLITS:
        told[f"loss on {split}"] = (
            f"{_show(result['loss'][split])}, the model as it was {_show(parent[split])}"
        )
    if result["chosen"] != "search":
        told["recipe"] = f"{result['chosen']}: what the search found was no better on select"
    told["search"] = (
        f"{config['search']}, seed {config['seed']}, {result['layer_calls']:,} layer calls"
    )
    return told | {"command": f"`{config['command']}`"}


def read_config(path: Path) -> tuple[dict[str, Any], list[list[int]]]:
    """Configuration and found chain of a result folder; of a bank file, which has none, an empty one and no chain.

    Raises:
      ValueError: the folder holds no result, or a damaged one.
    """
    if not path.is_dir():
        return {}, []
    try:
        result = json.loads((path / RESULT_FILE).read_text())
        return result["config"], [result["best_chain"]]
    except (OSError, json.JSONDecodeError, KeyError, TypeError) as error:
        is_checkpoint = (path / "config.json").exists()
        hint = (
            "; of a checkpoint pass the result of jchain search --checkpoint"
            if is_checkpoint
            else ""
        )
        raise ValueError(
            f"expected a bank file or a result folder, got {path}: {error}{hint}"
        ) from None
