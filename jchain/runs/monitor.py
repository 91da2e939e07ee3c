"""What happens on the host between two parts of a run: logs, callbacks, limits, checkpoints."""

import time
from collections.abc import Callable, Sequence

import jax
import numpy as np

from jchain.runs.history import History, Part
from jchain.runs.interruption import Interruption
from jchain.runs.processes import agree
from jchain.runs.progress import Progress, ProgressLine
from jchain.runs.result import RunState, StopRule
from jchain.runs.run_folder import RunFolder, warn_of_errors
from jchain.runs.scored_chains import ScoredChains

Callback = Callable[[Sequence[Progress]], object]


class Monitor:
    """Watches a run, saves it, and says when to stop it.

    Args:
      history: what the run has done so far.
      stop: the rule that ends the runs.
      line: the progress line.
      interruption: the signals that ask the run to stop.
      folder: where to save the run; None to save nothing.
      save_every: the seconds between two checkpoints.
      max_seconds: the seconds after which the run stops; None for no limit.
      callback: the function that is given the progress of all runs; None for none.
      keep_scored: whether to keep the scored chains for the results.
      is_shared: whether other processes take part in the run, which must stop at the same step.
    """

    def __init__(
        self,
        history: History,
        stop: StopRule,
        line: ProgressLine,
        interruption: Interruption,
        *,
        folder: RunFolder | None,
        save_every: float,
        max_seconds: float | None,
        callback: Callback | None,
        keep_scored: bool,
        is_shared: bool,
    ) -> None:
        self._history, self._stop, self._line = history, stop, line
        self._interruption, self._folder, self._callback = interruption, folder, callback
        self._save_every, self._keep_scored = save_every, keep_scored
        self._is_shared = is_shared
        now = time.monotonic()
        self._saved_at = now
        self._deadline = None if max_seconds is None else now + max_seconds
        self._is_saved = True
        self._update_line(history.runs)

    def after_part(self, part: Part) -> str | None:
        """Take note of a part.

        Args:
          part: the steps that were taken.

        Returns:
          Why the run must stop: "callback", "max_seconds", or the name of a signal; None to go on.
        """
        scored = self._history.add(part)
        self._is_saved &= not np.asarray(part.trace.is_counted).any()
        if self._folder is not None:
            with warn_of_errors(self._folder.path):
                self._folder.log.append(scored)
        if self._keep_scored:
            self._history.scored.append(scored)
        self._update_line(part.runs)
        reason = self._interruption.name
        if self._callback is not None and self._call(self._callback, scored):
            reason = reason or "callback"
        if self._deadline is not None and time.monotonic() >= self._deadline:
            reason = reason or "max_seconds"
        is_due = time.monotonic() - self._saved_at >= self._save_every
        if self._folder is not None and is_due and not self._folder.is_saving:
            self._save(self._folder)
        return agree(reason) if self._is_shared else reason

    def _update_line(self, runs: RunState) -> None:
        stats = runs.stats
        self._line.update(int(np.min(stats.layer_calls)), float(np.min(stats.pool.loss)))

    def finish(self) -> None:
        """Save the run, and wait until it is written.

        If it cannot be written, there is a warning, so that its result is not lost.
        """
        if self._folder is None:
            return
        is_written = self._wait(self._folder)
        if not (self._is_saved and is_written):
            self._save(self._folder)
            self._wait(self._folder)

    def _wait(self, folder: RunFolder) -> bool:
        """Wait for the checkpoint, and return whether it was written."""
        is_written = False
        with warn_of_errors(folder.path):
            folder.wait()
            is_written = True
        return is_written

    def _save(self, folder: RunFolder) -> None:
        self._saved_at = time.monotonic()
        with warn_of_errors(folder.path):
            folder.save(self._history.to_snapshot(self._stop))
            self._is_saved = True

    def _call(self, callback: Callback, scored: Sequence[ScoredChains]) -> bool:
        """Call the callback; if it raises an error, save the run first."""
        stats = jax.tree.map(np.asarray, self._history.runs.stats)
        progress = [
            Progress(
                layer_calls=stats.total[i].item(),
                seconds=self._history.seconds,
                best_chain=stats.pool.chains[i, 0],
                best_loss=float(stats.pool.loss[i, 0]),
                chains=own.chains,
                loss=own.loss,
            )
            for i, own in enumerate(scored)
        ]
        try:
            return bool(callback(progress))
        except BaseException:
            self.finish()
            raise
