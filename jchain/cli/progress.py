"""Progress messages, which go to standard error, so that standard output holds only results."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import numpy as np

from jchain._typing import Float, Int
from jchain.engine.evaluation import evaluate
from jchain.problem import Problem

# The seconds between two lines about one phase if standard error is not a terminal.
_LINE_SECONDS = 30.0


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


@contextmanager
def show_parts(title: str, num_parts: int) -> Iterator[Callable[[int], None]]:
    """Show how many parts of the `with` block's work are done, and the time left.

    Args:
      title: text that says what is done, for example "Re-ranking 16 chains".
      num_parts: the number of parts, which take about the same time.

    Returns:
      A function to call with the number of parts that were done since the last call.
    """
    from rich import progress
    from rich.console import Console

    console = Console(stderr=True)
    if console.is_terminal:
        columns = (
            progress.TextColumn("{task.description}"),
            progress.BarColumn(),
            progress.MofNCompleteColumn(),
            progress.TimeRemainingColumn(),
        )
        with progress.Progress(*columns, console=console, transient=True) as bar:
            task = bar.add_task(title, total=num_parts)
            yield partial(bar.advance, task)
        return
    print_progress(f"{title} ...")
    yield _Lines(title, num_parts).advance


class _Lines:
    """Prints a line about the time left, at most every 30 seconds."""

    def __init__(self, title: str, num_parts: int) -> None:
        self._title, self._num_parts, self._num_done = title, num_parts, 0
        self._start = self._printed = time.monotonic()

    def advance(self, num_parts: int) -> None:
        self._num_done += num_parts
        now = time.monotonic()
        if now - self._printed < _LINE_SECONDS or self._num_done == self._num_parts:
            return
        self._printed = now
        left = (now - self._start) / self._num_done * (self._num_parts - self._num_done)
        print_progress(
            f"{self._title}: {self._num_done} of {self._num_parts} parts, about {left:,.0f} s left"
        )


class ChainScores(NamedTuple):
    """The loss and the accuracy of each chain."""

    loss: Float[np.ndarray, "P"]  # with layer penalties
    accuracy: Float[np.ndarray, "P"]


def evaluate_in_parts(
    problem: Problem, chains: Int[np.ndarray, "P L"], title: str, part_size: int | None
) -> ChainScores:
    """Score chains, and show the time left if this takes several parts.

    Args:
      problem: the problem that defines the losses.
      chains: the chains.
      title: text that says what is done.
      part_size: the number of chains in a part; None for one part, without a message.
    """
    num = len(chains)
    if part_size is None or num <= part_size:
        out = evaluate(problem, chains)
        return ChainScores(np.asarray(out.loss), np.asarray(out.accuracy))
    # Chains that share their first layers, which are computed once per part, are neighbors.
    order = np.lexsort(chains.T[::-1])
    num_parts = -(-num // part_size)
    # Copies of the last chain fill the last part.
    rows = chains[np.append(order, np.full(num_parts * part_size - num, order[-1]))]
    found = []
    with show_parts(title, num_parts) as advance:
        for part in np.split(rows, num_parts):
            found.append(evaluate_in_parts(problem, part, title, None))
            advance(1)
    restored = np.argsort(order)
    return ChainScores(*(np.concatenate(parts)[restored] for parts in zip(*found, strict=True)))
