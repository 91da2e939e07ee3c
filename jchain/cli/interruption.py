"""What the command line does if a signal stops it."""

import signal

from jchain.runs.result import Result


class Stopped(KeyboardInterrupt):
    """What stopped a search that ended with a result: a signal, or its time limit.

    Args:
      name: the name of the signal, such as "SIGTERM", or "max_seconds".
    """

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name


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
