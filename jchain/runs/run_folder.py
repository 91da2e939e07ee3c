"""The folder of a run: what the run is, its last two checkpoints, and the log of scored chains.

The layout is

    run.json          what the run is (`jchain.runs.identity`)
    chains.jsonl      one scored chain per line
    checkpoints/      numbered checkpoints, written by orbax; the last two are kept
    lock, holder.json which process uses the folder
"""

import contextlib
import json
import os
import shutil
import socket
import textwrap
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jchain import files
from jchain._typing import PyTree
from jchain.pytree import get_first_line
from jchain.runs.identity import find_differences
from jchain.runs.processes import call_on_first
from jchain.runs.scored_chains import ChainLog

FORMAT = "jchain run 1"
_MAX_SHOWN = 5
# The number of letters of an error of orbax or of the operating system that a warning shows.
_MAX_REASON = 300


class Snapshot(NamedTuple):
    """A run as it is written to a checkpoint."""

    arrays: PyTree  # the state of the runs, their trace, and their records
    info: dict[str, Any]  # numbers and text, as JSON


class RunFolder:
    """The folder of one run, which this process holds until `close`.

    Args:
      path: the folder, which is made if it does not exist.
      identity: what the run is, from `jchain.runs.identity.describe_run`.

    Raises:
      ValueError: if the folder holds another run, or something else, or another process holds it.
    """

    def __init__(self, path: str | os.PathLike[str], identity: Mapping[str, object]) -> None:
        self.path = Path(path).absolute()
        self.log = ChainLog(self.path / "chains.jsonl")
        self._manager: Any = None
        self._check_content()
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = acquire_lock(self.path)
        try:
            self._check_identity(identity)
        except BaseException:
            self._release()
            raise

    def restore(
        self, make_template: Callable[[dict[str, Any]], PyTree], key_impl: Any
    ) -> Snapshot | None:
        """Read the last checkpoint that is whole, and cut the log there.

        Args:
          make_template: a function of the checkpoint's `info` that returns a pytree of the shapes
            and dtypes of the arrays. A leading size of -1 stands for any size.
          key_impl: the implementation of PRNG keys, from `jax.random.key_impl`.

        Returns:
          The checkpoint, or None if there is none.

        Raises:
          ValueError: if the log up to the checkpoint was changed.
        """
        manager = self._get_manager()
        for number in sorted(manager.all_steps(), reverse=True):
            try:
                snapshot = self._read(number, make_template, key_impl)
            except Exception as error:
                warnings.warn(
                    f"checkpoint {number} of {self.path} is damaged, so an earlier one is used: "
                    f"{str(error).splitlines()[0] if str(error) else type(error).__name__}",
                    stacklevel=2,
                )
                shutil.rmtree(self.path / "checkpoints" / str(number))
                manager.reload()
                continue
            self.log.cut(snapshot.info["log"])
            return snapshot
        self.log.cut({"size": 0, "crc32": 0})
        return None

    def save(self, snapshot: Snapshot) -> None:
        """Start to write a checkpoint in the background.

        Args:
          snapshot: the run.

        Raises:
          Exception: if this or the last checkpoint cannot be written, whatever orbax raises.
        """
        import orbax.checkpoint as ocp

        self.log.append([])
        self.log.sync()
        arrays = flatten(snapshot.arrays)
        info = {**snapshot.info, "log": self.log.position, "crc32": _checksum(arrays)}
        with self._begin_anew_after_errors():
            manager = self._get_manager()
            number = (manager.latest_step() or 0) + 1
            manager.save(
                number,
                args=ocp.args.Composite(
                    arrays=ocp.args.StandardSave(arrays), info=ocp.args.JsonSave(info)
                ),
            )

    @property
    def is_saving(self) -> bool:
        """Whether a checkpoint is being written."""
        return self._manager is not None and self._manager.is_saving_in_progress()

    def wait(self) -> None:
        """Wait until the checkpoint is written.

        Raises:
          Exception: if it could not be written, whatever orbax raises.
        """
        with self._begin_anew_after_errors():
            if self._manager is not None:
                self._manager.wait_until_finished()

    @contextlib.contextmanager
    def _begin_anew_after_errors(self) -> Iterator[None]:
        """After an error, forget orbax's manager, which may not be used any more."""
        try:
            yield
        except Exception:
            manager, self._manager = self._manager, None
            with contextlib.suppress(Exception):
                manager.close()
            raise

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Wait until the checkpoint is written, and give the folder back."""
        try:
            if self._manager is not None:
                self._manager.close()
        finally:
            self._release()

    def _release(self) -> None:
        (self.path / "holder.json").unlink(missing_ok=True)
        self._lock.release()

    def _check_content(self) -> None:
        """Refuse a folder that is not the folder of a run."""
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"expected a folder for the run, got the file {self.path}")
        if not self.path.exists() or (self.path / "run.json").exists():
            return
        ours = ("lock", "holder.json")
        names = sorted(
            p.name for p in self.path.iterdir() if p.name not in ours and ".run.json." not in p.name
        )
        if names:
            more = ", ..." if len(names) > _MAX_SHOWN else ""
            raise ValueError(
                f"expected an empty folder, or one of a run, got {self.path}, which holds "
                f"{', '.join(names[:_MAX_SHOWN])}{more}"
            )

    def _check_identity(self, identity: Mapping[str, object]) -> None:
        """Write what the run is, or compare it with what the folder says."""
        path = self.path / "run.json"
        for left in self.path.glob(".run.json.*"):
            left.unlink()
        mine = json.loads(json.dumps(identity))
        if not path.exists():
            files.write_json(path, {"format": FORMAT, "identity": mine})
            return
        try:
            header = json.loads(path.read_text())
            if header["format"] != FORMAT:
                raise ValueError(f"expected the format {FORMAT!r}, got {header['format']!r}")
            old = header["identity"]
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"cannot read {path}, which says what the run is: {error!r}") from None
        if differences := find_differences(old, mine):
            more = f"; {len(differences) - _MAX_SHOWN} more" * (len(differences) > _MAX_SHOWN)
            raise ValueError(
                f"expected the run that {self.path} belongs to, got another one: "
                f"{'; '.join(differences[:_MAX_SHOWN])}{more}"
            )

    def _get_manager(self) -> Any:
        import orbax.checkpoint as ocp

        if self._manager is None:
            path = self.path / "checkpoints"
            path.mkdir(exist_ok=True)
            # Of several processes, this one writes without waiting for the others.
            process = jax.process_index()
            alone = ocp.options.MultiprocessingOptions(
                primary_host=process, active_processes={process}, barrier_sync_key_prefix="jchain"
            )
            options = ocp.CheckpointManagerOptions(
                max_to_keep=2,
                cleanup_tmp_directories=True,
                create=False,
                multiprocessing_options=alone,
            )
            self._manager = ocp.CheckpointManager(path, options=options)
        return self._manager

    def _read(
        self, number: int, make_template: Callable[[dict[str, Any]], PyTree], key_impl: Any
    ) -> Snapshot:
        import orbax.checkpoint as ocp

        out = self._get_manager().restore(
            number,
            args=ocp.args.Composite(arrays=ocp.args.StandardRestore(), info=ocp.args.JsonRestore()),
        )
        if _checksum(out.arrays) != out.info["crc32"]:
            raise ValueError("its checksum does not match")
        template = make_template(out.info)
        return Snapshot(unflatten(out.arrays, template, key_impl), out.info)


def open_folder(
    path: str | os.PathLike[str] | None, identity: Mapping[str, object], *, is_shared: bool
) -> contextlib.AbstractContextManager[RunFolder | None]:
    """Hold the folder of a run; None on all but the first of the processes that share the run.

    Args:
      path: the folder, which is made if it does not exist; None for a run that is not saved.
      identity: what the run is, from `jchain.runs.identity.describe_run`.
      is_shared: whether several processes make the run together, and this call.

    Raises:
      ValueError: if the folder holds another run, or something else, or another process holds it.
    """
    if path is None:
        return contextlib.nullcontext()
    if not is_shared:
        return RunFolder(path, identity)
    opened: list[RunFolder] = []
    call_on_first(lambda: opened.append(RunFolder(path, identity)))
    return opened[0] if opened else contextlib.nullcontext()


@contextlib.contextmanager
def warn_of_errors(path: Path) -> Iterator[None]:
    """Turn an error of saving, for example of a full disk, into a warning.

    Args:
      path: the folder that is written.
    """
    try:
        yield
    except Exception as error:
        reason = textwrap.shorten(get_first_line(error), _MAX_REASON)
        warnings.warn(
            f"{path} cannot be written: {reason}. The run goes on, but what it did since the last "
            "checkpoint is lost if it stops now",
            stacklevel=4,
        )


def acquire_lock(path: Path) -> Any:
    """Lock a folder. The operating system frees the lock of a process that dies.

    Args:
      path: the folder.

    Returns:
      The lock, whose method `release` gives the folder back.

    Raises:
      ValueError: if another process holds the folder.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(path / "lock", timeout=0)
    holder = path / "holder.json"
    try:
        lock.acquire()
    except Timeout:
        try:
            held = json.loads(holder.read_text())
            who = f"process {held['process']} on {held['host']}"
        except (OSError, ValueError, TypeError, KeyError):
            who = "another process"
        raise ValueError(f"expected a folder that is free, got {path}, which {who} uses") from None
    files.write_json(holder, {"process": os.getpid(), "host": socket.gethostname()})
    return lock


def flatten(tree: PyTree) -> dict[str, np.ndarray]:
    """Name the leaves of a tree by their paths; keys become numbers, empty leaves are dropped.

    Args:
      tree: arrays. If devices of other processes have a part in them, each device has all numbers.
    """
    named = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            leaf = leaf.addressable_data(0)
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        array = np.asarray(leaf)
        if array.size:
            named[jax.tree_util.keystr(path)] = array
    return named


def unflatten(arrays: Mapping[str, np.ndarray], template: PyTree, key_impl: Any) -> PyTree:
    """Restore a tree from `flatten`.

    Args:
      arrays: the arrays by name.
      template: the shapes and dtypes of the tree; a leading size of -1 stands for any size.
      key_impl: the implementation of PRNG keys, from `jax.random.key_impl`.

    Raises:
      ValueError: if an array is missing, unknown, or of another shape or dtype.
    """
    left = dict(arrays)

    def take(path: Any, leaf: Any) -> Any:
        name = jax.tree_util.keystr(path)
        is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        if name not in left:
            shape = tuple(max(0, size) for size in leaf.shape)
            if 0 not in shape:
                raise ValueError(f"it has no {name}")
            return jnp.zeros(shape, leaf.dtype)
        array = left.pop(name)
        if is_key:
            return jax.random.wrap_key_data(jnp.asarray(array), impl=key_impl)
        is_free = leaf.shape[:1] == (-1,)
        if array.dtype != leaf.dtype or array.shape[is_free:] != leaf.shape[is_free:]:
            raise ValueError(
                f"its {name} is {array.dtype}{list(array.shape)}, "
                f"not {leaf.dtype}{list(leaf.shape)}"
            )
        return array

    tree = jax.tree_util.tree_map_with_path(take, template)
    if left:
        raise ValueError(f"it has an unknown {next(iter(left))}")
    return tree


def _checksum(arrays: Mapping[str, np.ndarray]) -> int:
    total = 0
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        total = zlib.crc32(f"{name} {array.dtype} {array.shape}".encode(), total)
        total = zlib.crc32(array.reshape(-1).view(np.uint8).data, total)
    return total
