"""What the command line does if a signal stops it."""

import signal

from jchain.runs.result import Result


class Stopped(KeyboardInterrupt):
    """A signal that a search noted, so that it could end with a result.

    Args:
      name: the name of the signal, such as "SIGTERM".
    """

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name


def raise_if_stopped(result: Result) -> None:
    """Raise `Stopped` if a signal stopped a run.

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
    """Return the exit code for a signal: 130 for SIGINT, 143 for SIGTERM.

    Args:
      error: the interruption.
    """
    return 128 + signal.Signals[get_name(error)]
