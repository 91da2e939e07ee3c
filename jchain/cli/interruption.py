"""What the command line does if a signal stops it."""

import _thread
import os
import signal
import sys
import threading
from types import FrameType
from typing import Any, NoReturn

from jchain.runs.interruption import replace_handlers, restore_handlers
from jchain.runs.result import Result

# The exit codes of a worker that was stopped (`jchain.cli.workers`).
EXIT_CODES = {"SIGINT": 130, "SIGTERM": 143, "max_seconds": 75}


class Stopped(KeyboardInterrupt):
    """What stopped a search that ended with a result: a signal, or its time limit.

    Args:
      name: the name of the signal, such as "SIGTERM", or "max_seconds".
    """

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name


class SignalHandlers:
    """Context manager in which SIGINT and SIGTERM raise `Stopped`, which is not lost.

    Python drops an exception that a signal raises in a callback or in a destructor, and prints its
    traceback. Here, the signal comes again a moment later. Outside of the main thread, and for
    signals that are ignored, nothing changes.
    """

    def __enter__(self) -> "SignalHandlers":
        self._hook = sys.unraisablehook
        self._handlers = replace_handlers(self._raise)
        if self._handlers:
            sys.unraisablehook = self._repeat
        return self

    def __exit__(self, *_: object) -> None:
        sys.unraisablehook = self._hook
        restore_handlers(self._handlers)

    def _raise(self, number: int, _: FrameType | None) -> None:
        raise Stopped(signal.Signals(number).name)

    def _repeat(self, unraisable: Any) -> None:
        error = unraisable.exc_value
        if not isinstance(error, Stopped):
            return self._hook(unraisable)
        number = signal.Signals[error.name]
        threading.Timer(0.05, _thread.interrupt_main, (number,)).start()


def raise_if_stopped(result: Result) -> None:
    """Raise `Stopped` if a run was stopped.

    Args:
      result: the result of the run.
    """
    if result.stopped_by is not None:
        raise Stopped(result.stopped_by)


def get_name(error: KeyboardInterrupt) -> str:
    """Return the name of the signal that an interruption comes from.

    Args:
      error: the interruption.
    """
    return error.name if isinstance(error, Stopped) else "SIGINT"


def get_exit_code(error: KeyboardInterrupt) -> int:
    """Return the exit code: 130 for SIGINT, 143 for SIGTERM, and 0 for a time limit.

    Args:
      error: the interruption.
    """
    name = get_name(error)
    return 0 if name == "max_seconds" else 128 + signal.Signals[name]


def exit_process(code: int) -> NoReturn:
    """End the process: at once if a signal stopped it, and otherwise as usual.

    An interrupted call can leave a compilation behind, which goes on in a thread of jaxlib's and
    crashes when the interpreter's end destroys the devices that it compiles for.

    Args:
      code: the exit code.
    """
    if code in (EXIT_CODES["SIGINT"], EXIT_CODES["SIGTERM"]):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
