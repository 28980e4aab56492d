"""Benchmarks, one file per family. To add one, write a Task in one of the files and enter it in TASKS.  <- edit here"""

from tasks.general import BBH, BBH_DIRECT, MMLU, MMLU_5SHOT, TRUTHFULQA, TYDIQA
from tasks.math import GSM8K, GSM8K_8SHOT, MATH
from tasks.task import Task

TASKS: dict[str, Task] = {
    task.name: task for task in (GSM8K, MATH, MMLU, MMLU_5SHOT, GSM8K_8SHOT, BBH, BBH_DIRECT, TYDIQA, TRUTHFULQA)
}
# Words for several tasks: the paper's three groups. HumanEval belongs to the last one, too.
GROUPS = {
    "math": ["gsm8k", "hendrycks_math"],
    "general": ["mmlu", "gsm8k_8shot", "bbh", "tydiqa", "truthfulqa"],
}
