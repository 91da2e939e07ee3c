"""Lines that say what the command line is doing."""

import sys


def print_progress(line: str) -> None:
    """Print a line to standard error, which leaves standard output to results."""
    print(line, file=sys.stderr, flush=True)
