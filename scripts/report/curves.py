"""From runs to figures: which curves report.py draws, and from which numbers."""

import json
import math
import re
from collections import Counter
from pathlib import Path
from statistics import fmean

from common.errors import UserError, nearest
from scripts.report.figures import NAMES, Curve, forgetting_figure, loss_figure, sensitivity_figure, smooth
from scripts.report.runs import Group, Run, group_runs, labels, read_metrics
from scripts.report.stats import interval
from tasks import GROUPS

SWEPT = ("keep_ratio", "drop keep_ratio")  # settings that a sensitivity curve shows


def draw(runs: list[Run], folder: Path, new: str, retained: list[str], sweep: bool) -> list[Path]:
    """Draw what these runs give; returns the files without their suffixes. Base models have figures of their own."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    models = list(dict.fromkeys(run.model for run in runs))
    names = [Path(model).name for model in models]
    for model, name in zip(models, names, strict=True):
        part = [run for run in runs if run.model == model]
        unique = name if names.count(name) == 1 else model.strip("/")
        end = "_" + re.sub(r"[^\w.-]+", "_", unique) if len(models) > 1 else ""
        if panels := loss_panels(group_runs(part)):
            loss_figure(panels, folder / f"loss{end}")
            drawn.append(folder / f"loss{end}")
        scored = group_runs([run for run in part if run.scores])
        if new:
            draw_forgetting(scored, new, retained, folder / f"forgetting{end}")
            drawn.append(folder / f"forgetting{end}")
        if sweep:
            draw_sweep(scored, folder / f"sweep{end}")
            drawn.append(folder / f"sweep{end}")
    return drawn


def loss_panels(groups: list[Group]) -> dict[str, list[Curve]]:
    """{unit: curves} of the training losses, smoothed over 2 % of a run; means over seeds, at steps that all logged."""
    by_unit: dict[str, list[Group]] = {}
    trained = {group.first.training: group for group in groups if group.first.rule != "drop"}  # once if scored twice
    for group in trained.values():
        if read_metrics(group.first):
            dpo = group.first.config.get("objective") == "dpo"
            unit = "DPO loss (nats per pair)" if dpo else "training loss (nats per token)"
            by_unit.setdefault(unit, []).append(group)
    return {
        unit: [loss_curve(group, label) for group, label in zip(here, labels(here, NAMES), strict=True)]
        for unit, here in by_unit.items()
    }


def loss_curve(group: Group, label: str) -> Curve:
    seeds = []
    for run in group.runs:
        lines = [line for line in read_metrics(run) if line.get("loss") is not None]
        window = 1 + len(lines) // 50
        seeds.append(([line["step"] for line in lines], smooth([line["loss"] for line in lines], window)))
    shared = sorted(set.intersection(*(set(steps) for steps, _ in seeds)))
    at_step = [dict(zip(steps, losses, strict=True)) for steps, losses in seeds]
    mean = [fmean(losses[step] for losses in at_step) for step in shared]
    return Curve(label, group.first.rule, shared, mean, seeds=seeds)


def draw_forgetting(groups: list[Group], new: str, retained: list[str], path: Path) -> None:
    """Score of the task `new` against the mean score of the tasks `retained`; losses have a panel of their own.

    Raises:
        UserError: a task was not scored, or no run has all of them.
    """
    known = [job for group in groups for run in group.runs for job in run.scores]
    x_job, y_jobs = find_jobs([new], known)[0], find_jobs(retained, known)
    for job in (x_job, *y_jobs):
        groups = [group for group in groups if is_comparable(group, job, groups)]
    if not groups:
        raise UserError(f"--new {new} --retained {' '.join(retained)}: no run has scores of all of these tasks")
    panels = {}
    for nats in (False, True):
        if jobs := [job for job in y_jobs if in_nats(groups, job) == nats]:
            names = [short(job, known) for job in jobs]
            title = ", ".join(names) if len(names) < 4 else f"mean of {len(names)} tasks"
            panels[f"retained: {axis(title, groups, jobs)}"] = [
                point(group, label, x_job, jobs) for group, label in zip(groups, labels(groups, NAMES), strict=True)
            ]
    forgetting_figure(panels, f"new: {axis(short(x_job, known), groups, [x_job])}", what_bars_are(groups), path)


def point(group: Group, label: str, x_job: str, y_jobs: list[str]) -> Curve:
    """A group's score of one task against its mean score of others, over the seeds that have them all."""
    x = group.values(x_job, first_metric(group, x_job))
    of_y = [group.values(job, first_metric(group, job)) for job in y_jobs]
    seeds = [seed for seed in x if all(seed in values for values in of_y)]
    xs, ys = [x[s] for s in seeds], [fmean(v[s] for v in of_y) for s in seeds]
    (mean_x, x_error), (mean_y, y_error) = with_error(group, xs, [x_job]), with_error(group, ys, y_jobs)
    by_x, by_y = scale([group], x_job), scale([group], y_jobs[0])
    each = [([by_x * a], [by_y * b]) for a, b in zip(xs, ys, strict=True)]
    return Curve(label, group.first.rule, [mean_x], [mean_y], [x_error], [y_error], each)


def draw_sweep(groups: list[Group], path: Path) -> None:
    """The first metric of every task against keep_ratio.

    Raises:
        UserError: no run has a keep_ratio.
    """
    panels = {}
    jobs = list(dict.fromkeys(job for group in groups for run in group.runs for job in run.scores))
    for job in jobs:
        here = [group for group in groups if is_comparable(group, job, groups)]
        lines: dict[str, list[Group]] = {}
        for group in here:
            settings = {k: v for k, v in group.first.settings().items() if k not in SWEPT}
            lines.setdefault(json.dumps(settings, sort_keys=True), []).append(group)
        with_ratio, without = [], []
        named = labels([line[0] for line in lines.values()], NAMES, SWEPT)
        for line, label in zip(lines.values(), named, strict=True):
            line.sort(key=lambda group: group.first.keep_ratio or 0)
            points = [list(group.values(job, first_metric(group, job)).values()) for group in line]
            means = [with_error(group, values, [job]) for group, values in zip(line, points, strict=True)]
            ratios, by = [group.first.keep_ratio for group in line], scale(here, job)
            each = [([r] * len(v), [by * s for s in v]) for r, v in zip(ratios, points, strict=True) if len(v) > 1]
            y, y_error = [m for m, _ in means], [e for _, e in means]
            if ratios[0] is not None:
                with_ratio.append(Curve(label, line[0].first.rule, ratios, y, y_error=y_error, seeds=each))
                continue
            names = [label] if len(line) == 1 else [f"{label}, {group.name}" for group in line]
            for group, name, mean, error in zip(line, names, y, y_error, strict=True):
                without.append(Curve(name, group.first.rule, [None], [mean], y_error=[error]))
        if with_ratio:
            label = axis("loss" if in_nats(here, job) else "score", here, [job])
            panels[f"{short(job, jobs)}: {first_metric(here[0], job)}"] = (with_ratio, without, label)
    if not panels:
        raise UserError("--sweep: no run here has a keep_ratio (its run.json is looked for beside the eval folder)")
    sensitivity_figure(panels, what_bars_are(groups), path)


def short(job: str, jobs: list[str]) -> str:
    """The task of a task.protocol, where that is enough to tell it from the others."""
    task = job.split(".")[0]
    return task if sum(other.split(".")[0] == task for other in dict.fromkeys(jobs)) == 1 else job


def find_jobs(words: list[str], known: list[str]) -> list[str]:
    """The task.protocol that each word names: whole, or the task, of which the one that most runs have.

    Args:
        words: a group of tasks stands for those of them that were scored; what follows a = (a file) tells nothing.
        known: those of each run, one after the other.
    Raises:
        UserError: a word names none, or several that are equally frequent.
    """
    counts = Counter(known)
    tasks = {job.split(".")[0] for job in counts}
    found = []
    for word in (word.partition("=")[0] for word in words):
        for name in [task for task in GROUPS.get(word, []) if task in tasks] or [word]:
            jobs = {job: n for job, n in counts.items() if name in (job, job.split(".")[0])}
            first = [job for job, n in jobs.items() if n == max(jobs.values())]
            if len(first) != 1:
                raise UserError(f"{name}: scored under {len(first)} names here{nearest(name, counts)}")
            found += first
    return list(dict.fromkeys(found))


def first_metric(group: Group, job: str) -> str:
    """The metric that is a task's score; empty where no run of the group has the task."""
    return next((next(iter(run.scores[job]["metrics"])) for run in group.runs if job in run.scores), "")


def in_nats(groups: list[Group], job: str) -> bool:
    """Whether a task's score is a loss."""
    return any(run.scores.get(job, {}).get("unit") == "nats" for group in groups for run in group.runs)


def has_risen(group: Group, job: str) -> bool:
    """Whether a loss is known as its rise against the base model."""
    return any(job in run.rises for run in group.runs)


def is_comparable(group: Group, job: str, groups: list[Group]) -> bool:
    """Whether a group has a task's score; of a loss, its rise, where other groups have that."""
    return bool(first_metric(group, job)) and (has_risen(group, job) or not any(has_risen(g, job) for g in groups))


def axis(name: str, groups: list[Group], jobs: list[str]) -> str:
    """An axis' label, of tasks of one unit."""
    if not in_nats(groups, jobs[0]):
        return f"{name} (%)"
    risen = all(has_risen(group, job) for group in groups for job in jobs)
    return f"{name}{', rise over the base model' if risen else ''}\n(nats per token, lower is better)"


def scale(groups: list[Group], job: str) -> float:
    """What turns a score into per cent; a loss stays as it is."""
    return 1.0 if in_nats(groups, job) else 100.0


def with_error(group: Group, values: list[float], jobs: list[str]) -> tuple[float, float]:
    """Mean and half of its 95 % interval, as drawn: over seeds, or over the items where there is one run."""
    mean, half = interval(values)
    if math.isnan(half):
        errors = [group.standard_error(job, first_metric(group, job)) for job in jobs]
        half = 1.96 * math.hypot(*errors) / len(jobs)
    by = scale([group], jobs[0])
    return by * mean, by * half


def what_bars_are(groups: list[Group]) -> str:
    """Two lines for a figure: what its points and intervals mean."""
    counts = sorted({len(group.runs) for group in groups})
    if counts[-1] == 1:
        return "one training run each\nintervals: 95 %, over the items"
    seeds = f"{counts[-1]}" if counts[0] == counts[-1] else f"up to {counts[-1]}"
    alone = "; over the items where there is one run" if counts[0] == 1 else ""
    return f"means over {seeds} seeds (each one pale)\nintervals: 95 %, over seeds{alone}"
