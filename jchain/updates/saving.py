"""How the run of an update policy is saved, continued, and stopped."""

import contextlib
import os
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from jchain._typing import PyTree
from jchain.runs.identity import describe, describe_run
from jchain.runs.interruption import Interruption
from jchain.runs.run_folder import RunFolder, Snapshot, warn_of_errors
from jchain.runs.stepping import RunSpec


class Saving(NamedTuple):
    """When a run is saved, and when it stops.

    Attributes:
      checkpoint_dir: the folder to save the run to; None to save nothing.
      save_every: the seconds between two checkpoints.
      max_seconds: the seconds after which the run stops; None for no limit.
    """

    checkpoint_dir: str | os.PathLike[str] | None = None
    save_every: float = 30.0
    max_seconds: float | None = None


class Checkpoints:
    """Context manager that saves the run of a policy, and says when to stop it.

    Args:
      saving: when to save and stop.
      spec: what the search is; its budget is left out.
      details: what else the run is, such as the policy, as `jchain.runs.identity.describe` takes.

    Raises:
      ValueError: if the folder holds another run, something else, or is in use.
    """

    def __init__(self, saving: Saving, spec: RunSpec, details: dict[str, object]) -> None:
        self._saving, self._keys = saving, spec.keys
        self._folder: RunFolder | None = None
        self._identity: Callable[[], dict[str, object]] = lambda: {
            **describe_run(spec),
            **{name: describe(value) for name, value in details.items()},
        }

    def __enter__(self) -> "Checkpoints":
        with contextlib.ExitStack() as stack:
            self._interruption = stack.enter_context(Interruption())
            if self._saving.checkpoint_dir is not None:
                folder = RunFolder(self._saving.checkpoint_dir, self._identity())
                self._folder = stack.enter_context(folder)
            self._stack = stack.pop_all()
        self._saved_at = self._began = time.monotonic()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def restore(self, make_template: Callable[[dict[str, Any]], PyTree]) -> Snapshot | None:
        """Read the last checkpoint, if there is one.

        Args:
          make_template: as for `RunFolder.restore`.
        """
        if self._folder is None:
            return None
        return self._folder.restore(make_template, jax.random.key_impl(self._keys))

    def after_part(self, make_snapshot: Callable[[], Snapshot]) -> str | None:
        """Save the run if a checkpoint is due.

        Args:
          make_snapshot: makes the checkpoint.

        Returns:
          Why the run must stop: "max_seconds", or the name of a signal; None to go on.
        """
        now, limit = time.monotonic(), self._saving.max_seconds
        is_due = now - self._saved_at >= self._saving.save_every
        if self._folder is not None and is_due and not self._folder.is_saving:
            self._save(self._folder, make_snapshot)
        if self._interruption.name is None and limit is not None and now - self._began >= limit:
            return "max_seconds"
        return self._interruption.name

    @property
    def signal_name(self) -> str | None:
        """The name of the signal that came; None if there was none."""
        return self._interruption.name

    def finish(self, make_snapshot: Callable[[], Snapshot]) -> None:
        """Save the run, and wait until it is written.

        Args:
          make_snapshot: makes the checkpoint.
        """
        if self._folder is not None:
            with warn_of_errors(self._folder.path):
                self._folder.wait()
            self._save(self._folder, make_snapshot)
            with warn_of_errors(self._folder.path):
                self._folder.wait()

    def _save(self, folder: RunFolder, make_snapshot: Callable[[], Snapshot]) -> None:
        self._saved_at = time.monotonic()
        with warn_of_errors(folder.path):
            folder.save(make_snapshot())
