"""Signals that ask a run to stop: Ctrl-C and SIGTERM."""

import signal
import threading
from collections.abc import Callable, Mapping
from types import FrameType
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
SIGNAL_NAMES = tuple(number.name for number in _SIGNALS)


def replace_handlers(
    handle: Callable[[int, FrameType | None], object],
) -> dict[signal.Signals, Any]:
    """Let a function handle SIGINT and SIGTERM.

    Outside of the main thread, and for signals that are ignored, nothing changes.

    Args:
      handle: the function, which is given the number of the signal.

    Returns:
      The handlers that were replaced, for `restore_handlers`.
    """
    handlers = {}
    if threading.current_thread() is threading.main_thread():
        for number in _SIGNALS:
            handler = signal.getsignal(number)
            # None means that the handler was not installed by Python, and cannot be restored.
            if handler not in (None, signal.SIG_IGN):
                handlers[number] = signal.signal(number, handle)
    return handlers


def restore_handlers(handlers: Mapping[signal.Signals, Any]) -> None:
    """Install the handlers that `replace_handlers` returned.

    Args:
      handlers: the handlers by signal.
    """
    for number, handler in handlers.items():
        signal.signal(number, handler)


class Interruption:
    """Context manager that notes a signal in place of dying from it.

    The first signal is noted, so that a run can end at a safe point. A second one has its usual
    effect at once. Outside of the main thread, and for signals that are ignored, nothing changes.
    """

    def __init__(self) -> None:
        self.name: str | None = None  # the name of the signal that came, such as "SIGINT"
        self._handlers: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "Interruption":
        self._handlers = replace_handlers(self._note)
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def _note(self, number: int, _: FrameType | None) -> None:
        self.name = signal.Signals(number).name
        self._restore()

    def _restore(self) -> None:
        restore_handlers(self._handlers)
        self._handlers = {}
