"""The table of tasks."""

import difflib
from collections.abc import Callable, Sequence

from jchain.arguments import checked
from jchain.tasks.base import Task
from jchain.tasks.repair import make_repair

# Each function takes a seed and the sizes of the four splits (None: the default sizes).
TASKS: dict[str, Callable[[int, Sequence[int] | None], Task]] = {
    "repair": lambda seed, sizes: make_repair(seed, sizes=sizes),
}


@checked
def make(name: str, seed: int = 0, *, sizes: Sequence[int] | None = None) -> Task:
    """Make a task by name: its data, and the function that trains its bank.

    Args:
      name: a key of `TASKS`, for example `repair`.
      seed: the seed of the splits and of everything else that the task draws at random.
      sizes: the number of examples in train, search, select, and test. If None, the task's own.

    Raises:
      ValueError: if the name is unknown, or `sizes` asks for more examples than there are.
    """
    if name not in TASKS:
        close = difflib.get_close_matches(name, TASKS, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise ValueError(f"expected the name of a task ({', '.join(TASKS)}), got {name!r}{hint}")
    return TASKS[name](seed, sizes)
