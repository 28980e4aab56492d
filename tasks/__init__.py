"""Benchmarks, one file per family. To add one, write a Task in one of the files and enter it in TASKS.  <- edit here"""

from tasks.math import GSM8K, GSM8K_8SHOT, MATH
from tasks.task import Task

TASKS: dict[str, Task] = {task.name: task for task in (GSM8K, MATH, GSM8K_8SHOT)}
GROUPS = {"math": ["gsm8k", "hendrycks_math"]}  # words for several tasks: the paper's three groups
