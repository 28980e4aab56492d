"""From run folders to tables and figures: scores with paired tests, means over seeds, curves, published scores.

    python scripts/report.py outputs/math_sft/eval outputs/math_gmt/eval [--out report.md] [--csv scores.csv]
    python scripts/report.py outputs/*/eval --figures outputs/figures [--new gsm8k --retained mmlu text_loss]
    python scripts/report.py --sweep outputs/sweep/*/eval --out report.md
    python scripts/report.py results                    # of scripts/study.sh: README.md, scores.csv and figures, there

Each folder is an output_dir of eval.py (or of train.py, for figures alone). Where two runs have answered the same
items, their difference is tested on these pairs: verdicts of 0 and 1 by McNemar's exact test, others (and means over
groups) by a paired bootstrap. Runs that differ in the seed alone (run.json tells) are averaged in a second table.
Runs that differ in more than the model are named, since a score belongs to its protocol. A loss, in nats per token, is
shown as its rise against the base model, if that is among the runs.

--figures DIR draws, as PNG and PDF, the loss curves of the runs; with --new and --retained, what was learnt against
what was kept; with --sweep, the scores against keep_ratio. Of a run that has logged its masks (log_masks_every)
masks.png and masks.pdf are drawn into its folder, see mask_figure.py.
"""

import argparse
import csv
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import binomtest

from common.errors import UserError
from common.run_folder import MASKS
from evaluation.scores import read_lines
from scripts.report.curves import draw
from scripts.report.figures import NAMES
from scripts.report.mask_figure import mask_figure
from scripts.report.published import PUBLISHED
from scripts.report.runs import Group, Run, group_runs, read_runs
from scripts.report.stats import interval
from tasks import TASKS

RESAMPLES = 10_000
STUDY = "runs.jsonl"  # what marks a folder of scripts/study.sh
# What two runs may not differ in, if their difference is to be one of models
SETTINGS = ("dataset_sha256", "prompts_sha256", "prompt_format", "n", "dtype", "batch_size", "max_new_tokens", "seed")


def mcnemar(a: np.ndarray, b: np.ndarray) -> float:
    """Two-sided p-value of McNemar's exact test for verdicts (n,) of 0 and 1 on the same items."""
    only_a, only_b = int(((a == 1) & (b == 0)).sum()), int(((a == 0) & (b == 1)).sum())
    n, k = only_a + only_b, min(only_a, only_b)
    return float(binomtest(k, n).pvalue) if n else 1.0


def bootstrap(a: np.ndarray, b: np.ndarray, groups: list[str], seed: int = 0) -> tuple[float, float]:
    """95 % interval of the mean of b - a over items (n,), or of the mean over groups, drawn anew within each group."""
    names = np.array(groups)
    means = []
    rng = np.random.default_rng(seed)
    for name in sorted(set(groups)):
        d = (b - a)[names == name]
        values, counts = np.unique(d, return_counts=True)  # verdicts have three: a draw of each item is one of counts
        if len(values) < 2000:
            means.append(rng.multinomial(len(d), counts / len(d), size=RESAMPLES) @ values / len(d))
        else:  # large: one resample at a time
            means.append(np.array([d[rng.integers(len(d), size=len(d))].mean() for _ in range(RESAMPLES)]))
    low, high = np.percentile(np.mean(means, axis=0), [2.5, 97.5])
    return float(low), float(high)


def weighted_bootstrap(a: np.ndarray, b: np.ndarray, weights: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """95 % interval of the weighted mean of b - a over items (n,), each drawn with its weight."""
    rng, n, means = np.random.default_rng(seed), len(weights), []
    while len(means) < RESAMPLES:
        drawn = rng.integers(n, size=(max(1, 10**6 // n), n))  # as many resamples as there is room for
        means += (((b - a) * weights)[drawn].sum(1) / weights[drawn].sum(1)).tolist()
    low, high = np.percentile(means[:RESAMPLES], [2.5, 97.5])
    return float(low), float(high)


def compare(first: Path, second: Path, name: str, metric: str) -> str:
    """The difference second - first of two runs on the items of a job, and whether it may be chance."""
    task = TASKS[name.split(".")[0]]
    lines = [read_lines(folder / f"{name}.jsonl") for folder in (first, second)]
    if [(line["id"], line["item"]) for line in lines[0]] != [(line["id"], line["item"]) for line in lines[1]]:
        return "other items"
    a, b = (np.array([float(line[metric]) for line in run]) for run in lines)
    if task.weight:
        weights, others = (np.array([float(line[task.weight]) for line in run]) for run in lines)
        if not np.array_equal(weights, others):
            return "other tokens"
        low, high = (shown(value, task.unit, "+") for value in weighted_bootstrap(a, b, weights))
        return f"{shown(float(np.average(b - a, weights=weights)), task.unit, '+')} [{low}, {high}]"
    if not task.macro and set(np.unique([a, b])) <= {0.0, 1.0}:
        return f"{100 * (b - a).mean():+.2f}, p = {mcnemar(a, b):.2g}"
    groups = [task.group(line["item"]) for line in lines[0]] if task.macro else [""] * len(a)
    share = Counter(groups)
    mean = sum((y - x) / share[g] for x, y, g in zip(a, b, groups, strict=True)) / len(share)
    low, high = (shown(value, task.unit, "+") for value in bootstrap(a, b, groups))
    return f"{shown(mean, task.unit, '+')} [{low}, {high}]"


# ---------------------------------------------------------------------------------------------------------------------
# Tables
# ---------------------------------------------------------------------------------------------------------------------


def shown(value: float, unit: str, sign: str = "") -> str:
    """A share as per cent, a loss in nats as it is."""
    return format(value, f"{sign}.4f") if unit == "nats" else format(100 * value, f"{sign}.2f")


def unit_of(job: str, runs: list[Run]) -> str:
    """The unit of a job's scores: share, or nats."""
    return next(run.scores[job].get("unit", "share") for run in runs if job in run.scores)


def cell(value: dict[str, Any], unit: str, sign: str = "") -> str:
    error = value["standard_error"]
    return shown(value["score"], unit, sign) + ("" if error is None else f" ± {shown(error, unit)}")


def report(runs: list[Run]) -> str:
    """The whole report, in Markdown."""
    runs = [run for run in runs if run.scores]
    keys = metrics_of(runs)
    rows = []
    for run in runs:
        cells = []
        for job, metric in keys:
            value = run.result(job, metric)
            if run.rule == "base":  # its own loss: it has not risen
                value = run.scores.get(job, {}).get("metrics", {}).get(metric)
            sign = "+" if job in run.rises and run.rule != "base" else ""
            cells.append(cell(value, unit_of(job, runs), sign) if value else "")
            if value and run is not runs[0] and job in runs[0].scores:
                cells[-1] += f" ({compare(runs[0].folder, run.folder, job, metric)})"
        rows.append([run.name, *facts(run), "" if run.seed is None else run.seed, *cells])
    head = ["run", "rule", "keep_ratio", "learning rate", "seed", *(f"{job} {metric}" for job, metric in keys)]
    text = f"# Scores, per cent ± one standard error\n\n{table(head, rows)}\n"
    if len(runs) > 1:
        text += (
            f"In brackets: the difference from {runs[0].name} on the same items, with the p-value of McNemar's exact "
            "test or, for other than 0/1 verdicts, the 95 % interval of a paired bootstrap. They know nothing of the "
            "variation between training seeds.\n\n"
        )
    text += "\n".join(notes(runs)) + "\n"
    return text + over_seeds(group_runs(runs), keys) + published({job.split(".")[0] for job, _ in keys})


def table(head: list[Any], rows: list[list[Any]]) -> str:
    """In Markdown, without the columns that are empty in all rows."""
    used = [i for i in range(len(head)) if i == 0 or any(row[i] != "" for row in rows)]
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(str(line[i]) for i in used) + " |\n" for line in lines)


def facts(run: Run) -> list[str]:
    """Cells: rule, keep_ratio, learning rate; empty where no training is known."""
    rate = run.config.get("learning_rate")
    number = ["" if value is None else f"{value:g}" for value in (run.keep_ratio, rate)]
    return [NAMES.get(run.rule, run.rule), *number]


def metrics_of(runs: list[Run]) -> list[tuple[str, str]]:
    """(task.protocol, metric) of all runs, in order of appearance."""
    return list(dict.fromkeys((job, m) for run in runs for job, entry in run.scores.items() for m in entry["metrics"]))


def notes(runs: list[Run]) -> list[str]:
    """What was scored, and what stands in the way of a comparison."""
    lines = []
    for job in dict.fromkeys(job for run in runs for job in run.scores):
        scored = [run for run in runs if job in run.scores]
        known = scored[0].scores[job]
        lines.append(f"- {job}: {known['n']} items, {known.get('dataset_version') or known.get('dataset', '')}")
        if unit_of(job, runs) == "nats":
            lines[-1] += "; nats per token, not per cent: lower is better"
            if any(job in run.rises for run in scored):
                lines[-1] += "; shown is the rise against the base model, whose row has its own loss"
            for run in scored:
                if run.rule != "base" and job not in run.rises and any(job in other.rises for other in scored):
                    lines.append(f"- {job}: of {run.name} it is the loss itself: the base model's texts were others")
        for run in scored:
            entry = run.scores[job]
            if differ := [k for k in SETTINGS if entry.get(k) != known.get(k)]:
                lines.append(f"- {job}: {run.name} differs from {scored[0].name} in {', '.join(differ)}")
            if entry.get("timeouts"):
                lines.append(f"- {job}: {run.name}: {entry['timeouts']} verdicts timed out and count as wrong")
    return lines


def over_seeds(groups: list[Group], keys: list[tuple[str, str]]) -> str:
    """Means over the runs that differ in the seed alone, and differences from the first of them, seed by seed."""
    several = [group for group in groups if len(group.runs) > 1]
    if not several:
        return ""
    rows = []
    for group in groups:
        cells = []
        for job, metric in keys:
            values = group.values(job, metric)
            unit = unit_of(job, [run for group in groups for run in group.runs])
            risen = all(job in run.rises for run in group.runs)
            if group.first.rule == "base" and risen:  # its own loss: it has not risen
                values, risen = {None: group.first.scores[job]["metrics"][metric]["score"]}, False
            text = plus_minus(list(values.values()), unit, "+" * risen) if values else ""
            others = several[0].values(job, metric)
            if group is not several[0] and len(common := sorted(set(values) & set(others) - {None})) > 1:
                mean, half = interval([values[seed] - others[seed] for seed in common])
                text += f" ({shown(mean, unit, '+')} ± {shown(half, unit)})"
            cells.append(text)
        rows.append([group.name, *facts(group.first), len(group.runs), *cells])
    head = ["runs", "rule", "keep_ratio", "learning rate", "seeds", *(f"{job} {metric}" for job, metric in keys)]
    return (
        f"\n# Means over training seeds, per cent ± half of the 95 % interval\n\n{table(head, rows)}\n"
        "The intervals are Student's t over the seeds: they hold for another seed, on the same items. In brackets: the "
        f"difference from {several[0].name}, seed by seed.\n"
    )


def plus_minus(values: list[float], unit: str, sign: str = "") -> str:
    mean, half = interval(values)
    return shown(mean, unit, sign) + ("" if math.isnan(half) else f" ± {shown(half, unit)}")


def write_csv(runs: list[Run], path: Path) -> None:
    """A row per run, task and metric; scores in [0, 1], losses in nats, and their rise against the base model."""
    rows = []
    for run in runs:
        of_run = {
            "run": run.name, "folder": run.folder, "model": run.model, "rule": run.rule,
            "keep_ratio": run.keep_ratio, "learning_rate": run.config.get("learning_rate"), "seed": run.seed,
        }  # fmt: skip
        for job, entry in run.scores.items():
            task, _, protocol = job.partition(".")
            for metric, value in entry["metrics"].items():
                numbers = {"score": value["score"], "standard_error": value["standard_error"], "n": entry["n"]}
                numbers |= {"unit": entry.get("unit", "share"), "rise": run.rises.get(job, {}).get("score")}
                rows.append({**of_run, "task": task, "protocol": protocol, "metric": metric, **numbers})
    with open(path, "w", newline="", encoding="utf-8") as f:
        writer = csv.DictWriter(f, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def published(tasks: set[str]) -> str:
    """Published scores on these tasks."""
    rows = [row for row in PUBLISHED if row[0] in tasks]
    if not rows:
        return ""
    keys = list(dict.fromkeys((task, metric) for task, metric, *_ in rows))
    lines: dict[tuple[str, str], dict] = {}
    for task, metric, model, value, source in rows:
        lines.setdefault((model, source), {})[task, metric] = value
    head = ["model", *(f"{task} {metric}" for task, metric in keys), "source"]
    cells = [[model, *(values.get(key, "") for key in keys), source] for (model, source), values in lines.items()]
    return "\n# Published scores\n\n" + table(head, cells)


def make_room(path: Path) -> None:
    """Make the folder of a file that is to be written.

    Raises:
        UserError: it cannot be made.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"{path} cannot be written: {e.strerror}") from None
    if path.is_dir():
        raise UserError(f"{path} cannot be written: it is a folder")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, metavar="DIR")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the tables there, too")
    parser.add_argument(
        "--csv", type=Path, metavar="FILE", help="write all scores there, a row per run, task and metric"
    )
    parser.add_argument("--figures", type=Path, metavar="DIR", help="draw figures there; empty: beside --out")
    parser.add_argument(
        "--new", default="", metavar="TASK", help="the task that was learnt, for forgetting.png; of a group, the first"
    )
    parser.add_argument(
        "--retained", nargs="+", default=[], metavar="TASK", help="tasks to be kept, for forgetting.png"
    )
    parser.add_argument("--sweep", action="store_true", help="draw scores against keep_ratio")
    args = parser.parse_args(argv)
    if any((folder / STUDY).exists() for folder in args.folders):
        from scripts.study import report as study_report  # it needs what training needs

        for folder in args.folders:
            print(study_report.write_report(folder))
        return
    if bool(args.new) != bool(args.retained):
        raise UserError("--new and --retained go together: the task that was learnt, and those that were to be kept")
    figures = args.figures or (args.out.parent if args.out and (args.sweep or args.new) else None)
    if (args.sweep or args.new) and figures is None:
        raise UserError("--sweep and --new draw figures: name a folder for them, --figures DIR")
    for path in filter(None, (args.out, args.csv, figures and figures / "loss.png")):
        make_room(path)
    runs = read_runs(args.folders)
    for run in runs:
        if not run.scores and not figures and not (run.training / MASKS).exists():
            raise UserError(
                f"{run.folder} holds a training and no scores: name the folder that eval.py wrote, or a folder for "
                "the figure of its loss, --figures DIR"
            )
    if any(run.scores for run in runs):
        text = report(runs)
        print(text)
        if args.out:
            args.out.write_text(text, encoding="utf-8")
        if args.csv:
            write_csv(runs, args.csv)
    drawn = draw(runs, figures, args.new, args.retained, args.sweep) if figures else []
    masks = [run.training for run in runs if run.training and (run.training / MASKS).exists()]
    for folder in dict.fromkeys(folder for folder in masks if b"\n" in (folder / MASKS).read_bytes()):
        mask_figure(folder, folder / "masks")
        drawn.append(folder / "masks")
    for path in drawn:
        print(f"figure: {path}.png, {path.name}.pdf")
