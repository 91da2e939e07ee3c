"""Standard output that is closed or full, which is not an error of what the command wrote."""

import os
import sys
from typing import Any, TextIO


class OutputError(Exception):
    """Standard output cannot be written, for example because the reader of a pipe has ended.

    Args:
      reason: what the system said.
    """

    def __init__(self, reason: OSError) -> None:
        super().__init__(f"cannot write to standard output: {reason.strerror}")
        self.is_closed = isinstance(reason, BrokenPipeError)


class CheckedOutput:
    """Context manager in which an error of standard output is an `OutputError`."""

    def __enter__(self) -> None:
        self._stream = sys.stdout
        sys.stdout = _Checked(self._stream)  # pyright: ignore[reportAttributeAccessIssue]

    def __exit__(self, *_: object) -> None:
        sys.stdout = self._stream


class _Checked:
    """A text stream whose errors are `OutputError`."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError as error:
            raise OutputError(error) from None

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            raise OutputError(error) from None


def discard_output() -> None:
    """Send the rest of standard output nowhere, so that the end of the process can flush it."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
