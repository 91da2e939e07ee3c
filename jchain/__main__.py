"""The command line: `jchain search`, `evaluate`, `compare`, `report`, `export`, and `prepare`."""

import argparse
import shlex
import sys
from collections.abc import Sequence

from jchain.cli.commands import COMMANDS
from jchain.cli.interruption import SignalHandlers, exit_process, get_exit_code
from jchain.cli.parser import make_parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
      argv: the arguments after the program's name; `sys.argv[1:]` if None.

    Returns:
      The exit status: 0 on success, 2 if the input is invalid, 130 after Ctrl-C, and 143 after
      SIGTERM. For invalid input, the error is printed in one line.
    """
    command = shlex.join(["jchain", *(sys.argv[1:] if argv is None else argv)])
    args = make_parser().parse_args(argv, argparse.Namespace(command=command))
    try:
        with SignalHandlers():
            COMMANDS[args.action](args)
    except (ValueError, OSError, ImportError) as error:
        print(f"jchain: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as error:
        code = get_exit_code(error)
        print("jchain: interrupted" if code else "jchain: out of time", file=sys.stderr)
        return code
    return 0


if __name__ == "__main__":
    exit_process(main())
