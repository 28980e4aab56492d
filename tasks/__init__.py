"""Benchmarks, one file per family. To add one, write a Task in one of the files and enter it in TASKS.  <- edit here"""

from tasks.code import HUMANEVAL, HUMANEVAL_PASS1, HUMANEVAL_PASS10, HUMANEVAL_PLUS, MBPP, MBPP_PLUS
from tasks.general import BBH, BBH_DIRECT, MMLU, MMLU_5SHOT, TRUTHFULQA, TYDIQA
from tasks.math import GSM8K, GSM8K_8SHOT, GSM8K_PEFT, MATH
from tasks.task import Task
from tasks.text_loss import TEXT_LOSS

MATHEMATICS = (GSM8K, MATH, GSM8K_PEFT)
CODE = (HUMANEVAL_PLUS, MBPP_PLUS, HUMANEVAL, MBPP, HUMANEVAL_PASS1, HUMANEVAL_PASS10)
GENERAL = (MMLU, MMLU_5SHOT, GSM8K_8SHOT, BBH, BBH_DIRECT, TYDIQA, TRUTHFULQA, TEXT_LOSS)
TASKS: dict[str, Task] = {task.name: task for task in (*MATHEMATICS, *CODE, *GENERAL)}
# Words for several tasks: the paper's three groups.
GROUPS = {
    "math": ["gsm8k", "hendrycks_math"],
    "code": ["humaneval_plus", "mbpp_plus"],
    "general": ["mmlu", "gsm8k_8shot", "bbh", "tydiqa", "truthfulqa", "humaneval_pass10"],
}
