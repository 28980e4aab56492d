"""From runs to figures: which curves report.py draws, and from which numbers."""

import json
import math
import re
from pathlib import Path
from statistics import fmean

from common.config import UserError, nearest
from scripts.report.figures import NAMES, Curve, forgetting_figure, loss_figure, sensitivity_figure, smooth
from scripts.report.runs import Group, Run, group_runs, labels, read_metrics
from scripts.report.stats import interval

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
    """Score of the task `new` against the mean score of the tasks `retained`.

    Raises:
        UserError: a task was not scored, or no run has all of them.
    """
    known = list(dict.fromkeys(job for group in groups for run in group.runs for job in run.scores))
    x_job, y_jobs = find_job(new, known), [find_job(word, known) for word in retained]
    if losses := [job for job in (x_job, *y_jobs) if in_nats(groups, job)]:
        raise UserError(f"--new, --retained: {losses[0]} is a loss, and the figure is of scores in per cent")
    groups = [group for group in groups if all(first_metric(group, job) for job in (x_job, *y_jobs))]
    if not groups:
        raise UserError(f"--new {new} --retained {' '.join(retained)}: no run has scores of all of these tasks")
    curves = []
    for group, label in zip(groups, labels(groups, NAMES), strict=True):
        x = group.values(x_job, first_metric(group, x_job))
        of_y = [group.values(job, first_metric(group, job)) for job in y_jobs]
        seeds = [seed for seed in x if all(seed in values for values in of_y)]
        xs, ys = [x[s] for s in seeds], [fmean(v[s] for v in of_y) for s in seeds]
        (mean_x, x_error), (mean_y, y_error) = in_per_cent(group, xs, [x_job]), in_per_cent(group, ys, y_jobs)
        each = [([100 * a], [100 * b]) for a, b in zip(xs, ys, strict=True)]
        curves.append(Curve(label, group.first.rule, [mean_x], [mean_y], [x_error], [y_error], each))
    names = [short(job, known) for job in y_jobs]
    title = ", ".join(names) if len(names) < 4 else f"mean of {len(names)} tasks"
    forgetting_figure(curves, f"new: {short(x_job, known)}", f"retained: {title}", what_bars_are(groups), path)


def draw_sweep(groups: list[Group], path: Path) -> None:
    """The first metric of every task against keep_ratio.

    Raises:
        UserError: no run has a keep_ratio.
    """
    panels = {}
    jobs = list(dict.fromkeys(job for group in groups for run in group.runs for job in run.scores))
    for job in [job for job in jobs if not in_nats(groups, job)]:
        here = [group for group in groups if first_metric(group, job)]
        lines: dict[str, list[Group]] = {}
        for group in here:
            settings = {k: v for k, v in group.first.settings().items() if k not in SWEPT}
            lines.setdefault(json.dumps(settings, sort_keys=True), []).append(group)
        with_ratio, without = [], []
        named = labels([line[0] for line in lines.values()], NAMES, SWEPT)
        for line, label in zip(lines.values(), named, strict=True):
            line.sort(key=lambda group: group.first.keep_ratio or 0)
            points = [list(group.values(job, first_metric(group, job)).values()) for group in line]
            means = [in_per_cent(group, values, [job]) for group, values in zip(line, points, strict=True)]
            ratios = [group.first.keep_ratio for group in line]
            each = [([r] * len(v), [100 * s for s in v]) for r, v in zip(ratios, points, strict=True) if len(v) > 1]
            y, y_error = [m for m, _ in means], [e for _, e in means]
            curve = Curve(label, line[0].first.rule, ratios, y, y_error=y_error, seeds=each)
            (without if ratios[0] is None else with_ratio).append(curve)
        if with_ratio:
            metric = first_metric(here[0], job)
            panels[f"{short(job, jobs)}: {metric}"] = (with_ratio, without)
    if not panels:
        raise UserError(
            "--sweep: no run here has a keep_ratio (its run.json is looked for beside the eval folder) and a score in "
            "per cent"
        )
    sensitivity_figure(panels, what_bars_are(groups), path)


def short(job: str, jobs: list[str]) -> str:
    """The task of a task.protocol, where that is enough to tell it from the others."""
    task = job.split(".")[0]
    return task if sum(other.split(".")[0] == task for other in jobs) == 1 else job


def find_job(word: str, known: list[str]) -> str:
    """The task.protocol that a word names: whole, or the task alone where that is enough."""
    found = [job for job in known if word in (job, job.split(".")[0])]
    if len(found) != 1:
        raise UserError(f"{word}: scored under {len(found)} names here{nearest(word, known)}")
    return found[0]


def first_metric(group: Group, job: str) -> str:
    """The metric that is a task's score; empty where no run of the group has the task."""
    return next((next(iter(run.scores[job]["metrics"])) for run in group.runs if job in run.scores), "")


def in_nats(groups: list[Group], job: str) -> bool:
    """Whether a task's score is a loss, for which the tables are."""
    return any(run.scores.get(job, {}).get("unit") == "nats" for group in groups for run in group.runs)


def in_per_cent(group: Group, values: list[float], jobs: list[str]) -> tuple[float, float]:
    """Mean and half of its 95 % interval: over seeds, or over the items where there is one run."""
    mean, half = interval(values)
    if math.isnan(half):
        errors = [group.standard_error(job, first_metric(group, job)) for job in jobs]
        half = 1.96 * math.hypot(*errors) / len(jobs)
    return 100 * mean, 100 * half


def what_bars_are(groups: list[Group]) -> str:
    """Two lines for a figure: what its points and intervals mean."""
    counts = sorted({len(group.runs) for group in groups})
    if counts[-1] == 1:
        return "one training run each\nintervals: 95 %, over the items"
    seeds = f"{counts[-1]}" if counts[0] == counts[-1] else f"up to {counts[-1]}"
    alone = "; over the items where there is one run" if counts[0] == 1 else ""
    return f"means over {seeds} seeds (each one pale)\nintervals: 95 %, over seeds{alone}"
