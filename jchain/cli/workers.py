"""Several seeds at the same time, each in a process of its own.

A process that is killed loses only its own search, which the same command continues. A process
whose parent is gone saves its search and ends.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict
from types import FrameType
from typing import Any

from jchain.cli.config import SearchConfig
from jchain.cli.interruption import EXIT_CODES, Stopped
from jchain.cli.progress import print_progress
from jchain.cli.work_folder import WorkFolder
from jchain.runs.interruption import replace_handlers, restore_handlers

_POLL_SECONDS = 0.1
# The worker's argument says what to run (`jchain.cli.worker`).
_MODULE = "jchain.cli.worker"


class _Worker:
    """The process of one seed, whose messages are printed behind the seed."""

    def __init__(self, config: SearchConfig, work: WorkFolder, deadline: float | None) -> None:
        self.seed = config.seed
        self.num_signals = 0  # how many of the signals it was sent
        seconds = None if deadline is None else max(1e-3, deadline - time.monotonic())
        options = {"config": asdict(config), "seconds": seconds}
        # The workers compile the same programs, so they share a cache of them.
        cache = {"JAX_COMPILATION_CACHE_DIR": str(work.programs)}
        self.process = subprocess.Popen(
            [sys.executable, "-m", _MODULE, json.dumps(options, default=str)],
            stdin=subprocess.PIPE,
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            env=cache | os.environ,
            text=True,
            errors="replace",
            # The parent hands on the signals, so that Ctrl-C does not come twice.
            start_new_session=True,
        )
        self._last = ""
        self._reader = threading.Thread(target=self._print, daemon=True)
        self._reader.start()

    def _print(self) -> None:
        assert self.process.stderr is not None
        with self.process.stderr as lines:
            for line in lines:
                self._last = line.strip() or self._last
                print_progress(f"[seed {self.seed}] {line.rstrip()}")

    def close(self) -> None:
        """Print the last messages of a process that ended."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self._reader.join()

    def explain(self) -> str:
        """Return why the process ended."""
        code = self.process.returncode
        if code < 0:
            return f"seed {self.seed} was killed by {signal.Signals(-code).name}"
        return f"seed {self.seed} failed: {self._last.removeprefix('jchain: error: ')}"


def run_workers(
    configs: Sequence[SearchConfig], num_workers: int, work: WorkFolder, deadline: float | None
) -> None:
    """Search with several seeds, some of them at the same time.

    If a seed fails, the others still run to their ends.

    Args:
      configs: the resolved options of each seed.
      num_workers: the number of processes at a time.
      work: the folder in which the searches are saved.
      deadline: the `time.monotonic()` at which searches stop; None for no limit.

    Raises:
      Stopped: if a signal or the deadline stopped a seed.
      ValueError: if a seed failed or was killed.
    """
    shutil.rmtree(work.programs, ignore_errors=True)  # a killed worker leaves a part of a program
    waiting, done = list(configs), []
    with _SignalRelay() as relay:
        running = relay.workers
        while True:
            is_late = deadline is not None and time.monotonic() >= deadline
            while waiting and len(running) < num_workers and relay.name is None and not is_late:
                running.append(_Worker(waiting.pop(0), work, deadline))
            if not running:
                break
            time.sleep(_POLL_SECONDS)
            relay.send()
            for worker in [one for one in running if one.process.poll() is not None]:
                running.remove(worker)
                worker.close()
                done.append(worker)
    if relay.name is not None:
        raise Stopped(relay.name)
    stops = {code: name for name, code in EXIT_CODES.items()}
    failed = [worker for worker in done if worker.process.returncode not in (0, *stops)]
    if failed:
        raise ValueError(
            f"{'; '.join(worker.explain() for worker in failed)}. Other seeds are kept; the same "
            "command continues"
        )
    stopped = [stops[worker.process.returncode] for worker in done if worker.process.returncode]
    if stopped or waiting:
        raise Stopped(stopped[0] if stopped else "max_seconds")


class _SignalRelay:
    """Context manager that hands Ctrl-C and SIGTERM on to the workers, and notes the first one.

    Signals that are ignored stay so.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self._num_signals = 0
        self.workers: list[_Worker] = []
        self._handlers: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "_SignalRelay":
        self._handlers = replace_handlers(self._note)
        return self

    def __exit__(self, *_: object) -> None:
        restore_handlers(self._handlers)
        for worker in self.workers:  # there are some only after an error
            worker.process.kill()
            worker.process.wait()
            worker.close()

    def send(self) -> None:
        """Send the signals that came to the workers that did not get them yet."""
        for worker in self.workers:
            if worker.num_signals < self._num_signals:
                worker.num_signals = self._num_signals
                worker.process.send_signal(signal.Signals[self.name or "SIGTERM"])

    def _note(self, number: int, _: FrameType | None) -> None:
        self.name = self.name or signal.Signals(number).name
        self._num_signals += 1
