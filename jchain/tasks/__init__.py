"""Tasks: data sets on which composing layers should beat a single net, each made from one seed.

A task brings its own data and the function that trains its bank. `jchain search` runs one.
"""

from jchain.tasks.base import Task
from jchain.tasks.faults import FAULTS, damage
from jchain.tasks.registry import TASKS, make
from jchain.tasks.repair import make_repair

__all__ = ["FAULTS", "TASKS", "Task", "damage", "make", "make_repair"]
