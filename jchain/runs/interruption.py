"""Signals that ask a run to stop: Ctrl-C and SIGTERM."""

import signal
import threading
from types import FrameType
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
SIGNAL_NAMES = tuple(number.name for number in _SIGNALS)


class Interruption:
    """Context manager that notes a signal in place of dying from it.

    The first signal is noted, so that a run can end at a safe point. A second one has its usual
    effect at once. Outside of the main thread, and for signals that are ignored, nothing changes.
    """

    def __init__(self) -> None:
        self.name: str | None = None  # the name of the signal that came, such as "SIGINT"
        self._handlers: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "Interruption":
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                handler = signal.getsignal(number)
                # None means that the handler was not installed by Python, and cannot be restored.
                if handler not in (None, signal.SIG_IGN):
                    self._handlers[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def _note(self, number: int, _: FrameType | None) -> None:
        self.name = signal.Signals(number).name
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}
