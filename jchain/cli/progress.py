"""Progress messages, which go to standard error, so that standard output holds only results."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager


def print_progress(line: str) -> None:
    """Print a line to standard error.

    Args:
      line: text that says what is done next.
    """
    print(line, file=sys.stderr, flush=True)


@contextmanager
def show_phase(title: str) -> Iterator[None]:
    """Show what the `with` block does; on a terminal, also show how long it has been running.

    Args:
      title: text that says what is done, for example "Training the layers".
    """
    from rich import progress
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        print_progress(f"{title} ...")
        yield
        return
    start = time.perf_counter()
    columns = (
        progress.SpinnerColumn(),
        progress.TextColumn("{task.description}"),
        progress.TimeElapsedColumn(),
    )
    with progress.Progress(*columns, console=console, transient=True) as line:
        line.add_task(f"{title} ...", total=None)
        yield
    console.print(f"{title}: {time.perf_counter() - start:.1f} s", highlight=False)
