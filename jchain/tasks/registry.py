"""The tasks by name."""

import difflib
from collections.abc import Callable, Sequence

from jchain.tasks.base import Task
from jchain.tasks.repair import make_repair

# Functions of a seed and of the sizes of the four splits, or None.
TASKS: dict[str, Callable[[int, Sequence[int] | None], Task]] = {
    "repair": lambda seed, sizes: make_repair(seed, sizes=sizes),
}


def make(name: str, seed: int = 0, *, sizes: Sequence[int] | None = None) -> Task:
    """Make the data of a task, and the function that trains its bank.

    Args:
      name: one of `TASKS`.
      seed: decides the splits and whatever the task draws.
      sizes: number of examples in train, search, select, and test; the task's own if None.

    Raises:
      ValueError: the name is unknown, or `sizes` asks for more examples than there are.
    """
    if name not in TASKS:
        close = difflib.get_close_matches(name, TASKS, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise ValueError(f"expected a task of {', '.join(TASKS)}, got {name!r}{hint}")
    return TASKS[name](seed, sizes)
