"""The `jchain` command. It is outside of the package, so that Ctrl-C ends its import quietly."""

import os
import signal
import sys


def main() -> int:
    """Import jchain, and run its command line.

    Returns:
      The exit status; see `jchain.__main__.main`.
    """
    # A signal is ignored from the start in some background jobs, and stays so.
    is_ours = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if is_ours:
        signal.signal(signal.SIGINT, _quit)
    from jchain.__main__ import main as run

    if is_ours:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    code = run()
    # Everything is written, and a traceback from the interpreter's last steps would say otherwise.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if code in (130, 143):
        # A computation that was interrupted may still use the interpreter, which must not end then.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def _quit(*_: object) -> None:
    # While C extensions are imported, an exception would become one of many others.
    os.write(2, b"jchain: interrupted\n")
    os._exit(130)


if __name__ == "__main__":
    sys.exit(main())
