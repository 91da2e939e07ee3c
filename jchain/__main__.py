"""The command line: `jchain search`, `evaluate`, `compare`, `report`, `export`, and `prepare`."""

import argparse
import shlex
import sys
from collections.abc import Sequence

from jchain.cli.commands import COMMANDS
from jchain.cli.interruption import SignalHandlers, exit_process, get_exit_code
from jchain.cli.output import CheckedOutput, OutputError, discard_output
from jchain.cli.parser import make_parser

# What a shell reports for a program that SIGPIPE ended.
_CLOSED_PIPE = 141


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
      argv: the arguments after the program's name; `sys.argv[1:]` if None.

    Returns:
      The exit status: 0 on success, 2 if the input is invalid, 130 after Ctrl-C, and 143 after
      SIGTERM. For invalid input, the error is printed in one line. If only standard output cannot
      be written, the files of the command are complete, and the status is 141 for a closed pipe and
      1 otherwise.
    """
    command = shlex.join(["jchain", *(sys.argv[1:] if argv is None else argv)])
    args = make_parser().parse_args(argv, argparse.Namespace(command=command))
    try:
        with SignalHandlers(), CheckedOutput():
            COMMANDS[args.action](args)
            sys.stdout.flush()
    except OutputError as error:
        discard_output()
        if error.is_closed:
            return _CLOSED_PIPE
        print(f"jchain: error: {error}", file=sys.stderr)
        return 1
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
