"""The metrics that the protocols name, each a local module of the evaluate library.

Anyone can use them: `evaluate.load("tasks/metrics/squad_f1").compute(predictions=..., references=...)`. No network is
needed.
"""

from pathlib import Path
from typing import Any

from common.errors import UserError


def per_item(name: str, **inputs: Any) -> dict[str, list]:
    """The values of a metric for each item.

    Args:
        name: a folder beside this file.
        inputs: what the metric's `compute` takes: predictions, references, options.
    Raises:
        UserError: evaluate cannot write to its cache, into which it copies a module before it imports it.
    """
    import evaluate  # takes seconds: only when answers are judged

    try:
        metric = evaluate.load(str(Path(__file__).parent / name), keep_in_memory=True)
    except OSError as e:
        raise UserError(f"evaluate cannot write to its cache, {e.filename}: set HF_HOME to a folder that can") from None
    return metric.compute(average=False, **inputs)
