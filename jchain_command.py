"""The `jchain` command. It is outside of the package, so that Ctrl-C ends its import quietly."""

import os
import signal
from typing import NoReturn


def main() -> NoReturn:
    """Import jchain, run its command line, and end the process; see `jchain.__main__.main`."""
    # A signal is ignored from the start in some background jobs, and stays so.
    is_ours = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if is_ours:
        signal.signal(signal.SIGINT, _quit)
    from jchain.__main__ import main as run
    from jchain.cli.interruption import exit_process

    if is_ours:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    code = run()
    # Everything is written, and a traceback from the interpreter's last steps would say otherwise.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    exit_process(code)


def _quit(*_: object) -> None:
    # While C extensions are imported, an exception would become one of many others.
    os.write(2, b"jchain: interrupted\n")
    os._exit(130)


if __name__ == "__main__":
    main()
