"""From stored answers to scores: verdicts, means with their standard errors, a table."""

import json
import math
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

from common import run_folder
from common.errors import UserError
from tasks.task import Options, Task


def score(path: Path, task: Task, format_name: str, items: list[dict] | None, options: Options) -> dict[str, Any]:
    """Judge the answers in a file of JSON lines, write the verdicts beside them, and sum them up.

    Args:
        format_name: the word of the prompts' format.
        items: what the answers are judged by; None: the items that are stored with them.
    Raises:
        UserError: the file is damaged.
    """
    lines = read_lines(path)
    answer = "completions" if task.generates else "logprobs"
    if not lines or any(answer not in line or "item" not in line for line in lines):
        raise UserError(f"{path}: expected lines with item and {answer}: delete it and generate it again")
    items = items or [line["item"] for line in lines]
    if len(items) != len(lines):
        raise UserError(f"{path} has {len(lines)} lines for {len(items)} items: delete it and generate it again")
    verdicts = task.judge(items, [{**line, "format": format_name} for line in lines], options)
    for line, verdict in zip(lines, verdicts, strict=True):
        line.update(verdict)
        if is_too_long(line):
            line.update(dict.fromkeys(task.metrics, 0))
    if task.unit == "nats" and (bad := sum(map(is_too_long, lines))):
        raise UserError(f"{path}: {bad} texts are longer than the model's context, so that their loss is not known")
    write_lines(path, lines)
    weights = [line[task.weight] if task.weight else 1 for line in lines]
    groups = [task.group(item) for item in items] if task.group else [""] * len(items)
    metrics = {m: mean_of([float(line[m]) for line in lines], groups, task.macro, weights) for m in task.metrics}
    return {
        **metrics[task.metrics[0]],
        "n": len(lines),
        "unit": task.unit,
        "metrics": metrics,
        "nothing_extracted": sum(line.get("extracted", "") is None for line in lines),
        "timeouts": sum(line.get("timeouts", 0) for line in lines),
        "crashes": sum(line.get("crashes", 0) for line in lines),
        **({"sandbox": lines[0]["sandbox"]} if "sandbox" in lines[0] else {}),  # only of programs
        "cut_at_length": sum(why == "length" for line in lines for why in line.get("finish", [])),
        "prompt_too_long": sum(map(is_too_long, lines)),
        **run_folder.environment(),
    }


def is_too_long(line: dict[str, Any]) -> bool:
    """Whether an item's prompt left no room in the context; it counts as wrong."""
    return line.get("logprobs", 0) is None or "too_long" in line.get("finish", [])


def mean_of(values: list[float], groups: list[str], macro: bool, weights: list[float]) -> dict[str, Any]:
    """Score and standard error of the weighted mean: over items, or (macro) the unweighted mean over groups."""
    parts = defaultdict(list)
    for value, weight, group in zip(values, weights, groups, strict=True):
        parts[group].append((value, weight))
    units = list(parts.values()) if macro else [list(zip(values, weights, strict=True))]
    error = math.sqrt(sum(map(_variance_of_mean, units))) / len(units)
    return {
        "score": statistics.fmean(map(_mean, units)),
        "standard_error": None if math.isnan(error) else error,
        "groups": {g: {"score": _mean(part), "n": len(part)} for g, part in sorted(parts.items()) if g},
    }


def _mean(part: list[tuple[float, float]]) -> float:
    """The mean of (value, weight) pairs."""
    return statistics.fmean(*zip(*part, strict=True))


def _variance_of_mean(part: list[tuple[float, float]]) -> float:
    """Its variance as a ratio of two sums over items; with equal weights, the sample variance over their number."""
    n, mean, total = len(part), _mean(part), sum(weight for _, weight in part)
    squares = sum((weight * (value - mean)) ** 2 for value, weight in part)
    return n / (n - 1) * squares / total**2 if n > 1 else math.nan


COLUMNS = (
    ("task", 16), ("protocol", 14), ("format", 9), ("metric", 12), ("n", -6), ("score", -8), ("± s.e.", -7),
    ("no answer", -10), ("cut", -6), ("too long", -9), ("timeouts", -9), ("data", 0),
)  # fmt: skip


def print_table(scores: dict[str, dict[str, Any]]) -> None:
    """A line per metric: the first of a task is its score."""
    rows = [[name for name, _ in COLUMNS]]
    for s in scores.values():
        for metric, value in s["metrics"].items():
            style = ".2%" if s["unit"] == "share" else ".4f"
            error = "" if value["standard_error"] is None else format(value["standard_error"], style)
            score = format(value["score"], style)
            row = [s["task"], s["protocol"], s["prompt_format"], metric, s["n"], score, error]
            counts = [s["nothing_extracted"], s["cut_at_length"], s["prompt_too_long"], s["timeouts"]]
            rows.append([*row, *counts, s["dataset_version"] or s["dataset"]])
    for row in rows:
        cells = [
            str(cell).rjust(-width) if width < 0 else str(cell).ljust(width)
            for cell, (_, width) in zip(row, COLUMNS, strict=True)
        ]
        print(" ".join(cells).rstrip())


def write_lines(path: Path, lines: list[dict]) -> None:
    """Write a JSON-lines file so that it is either the old or the new one.

    Raises:
        UserError: it cannot be written.
    """
    run_folder.write_whole(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def read_lines(path: Path) -> list[dict]:
    """The objects of a JSON-lines file.

    Raises:
        UserError: it is missing or damaged.
    """
    try:
        with open(path, encoding="utf-8") as f:
            return [json.loads(line) for line in f]
    except (OSError, ValueError) as e:
        raise UserError(f"{path}: missing or damaged ({e}): delete it and generate it again") from None
