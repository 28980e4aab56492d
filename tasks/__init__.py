"""Benchmarks, one file per family. To add one, write a Task in one of the files and enter it in TASKS.  <- edit here"""

from tasks.math import GSM8K
from tasks.task import Task

TASKS: dict[str, Task] = {task.name: task for task in (GSM8K,)}
GROUPS: dict[str, list[str]] = {}  # words for several tasks
