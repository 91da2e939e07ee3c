"""Tasks: data and a bank for which composing layers is worth it, made from one seed."""

from jchain.tasks.base import Task
from jchain.tasks.faults import FAULTS, damage
from jchain.tasks.registry import TASKS, make
from jchain.tasks.repair import make_repair

__all__ = ["FAULTS", "TASKS", "Task", "damage", "make", "make_repair"]
