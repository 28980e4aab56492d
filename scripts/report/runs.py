"""Runs as report.py sees them: what eval.py has scored, how it was trained, and which runs differ in the seed alone."""

import json
import os
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from common.config import FREE_TO_CHANGE
from common.errors import UserError, one_line
from common.run_folder import METRICS, RUN
from evaluation.scores import mean_of, read_lines
from tasks import TASKS

DROP = "drop.json"  # what merge.py drop leaves in a model's folder
SEED = re.compile(r"[_.-]?seed[_=-]?\d+")  # as part of a path
EVALUATION = re.compile(
    r"((?<![a-z])eval.*)?$"
)  # what the name of a folder says of an evaluation: eval_tulu of run1_eval_tulu


@dataclass
class Run:
    """A model: its scores and its training, as far as folders tell."""

    folder: Path  # as it was given: eval.py's output_dir, or train.py's
    name: str  # the folder's, for tables: short, and different for each run
    scores: dict[str, dict[str, Any]]  # scores.json, by task.protocol; empty: not scored
    training: Path | None  # train.py's output_dir; None: no training is known
    config: dict[str, Any]  # of train.py; empty: no training is known
    drop: dict[str, Any]  # keys of merge.py drop; empty: the model is as it was trained
    model: str  # the base model that everything began with
    rule: str  # of train.py; base: of a base model; drop: of what merge.py drop made; empty: not known
    # of losses: by how much the loss has risen against the base model, where that was scored on the same texts
    rises: dict[str, dict[str, float]] = field(default_factory=dict)

    @property
    def keep_ratio(self) -> float | None:
        return self.drop.get("keep_ratio", self.config.get("keep_ratio"))

    @property
    def seed(self) -> int | None:
        return self.config.get("seed", self.drop.get("seed"))

    def result(self, job: str, metric: str) -> dict[str, Any] | None:
        """Score and standard error, of a loss its rise where that is known; None where there is no such score."""
        return self.rises.get(job) or self.scores.get(job, {}).get("metrics", {}).get(metric)

    def settings(self) -> dict[str, Any]:
        """All that tells this run from others but for the seed, and for what changes no result."""
        if not self.config and not self.drop:
            return {"run": self.name}
        trained = {k: v for k, v in self.config.items() if k not in FREE_TO_CHANGE and k != "seed"}
        dropped = {f"drop {k}": v for k, v in self.drop.items() if k not in ("seed", "output_dir")}
        start = self.config.get("model", "")  # of a second stage: the model that a first one made
        everything = {**trained, **dropped, "model": self.model, "from": start if start != self.model else ""}
        return {k: SEED.sub("", v) if isinstance(v, str) else v for k, v in everything.items()}


@dataclass
class Group:
    """Runs that differ in the seed alone, or one run."""

    name: str
    runs: list[Run] = field(default_factory=list)

    @property
    def first(self) -> Run:
        return self.runs[0]

    def values(self, job: str, metric: str) -> dict[int | None, float]:
        """{seed: score in [0, 1], or in nats} of the runs that have it."""
        found = {run.seed: run.result(job, metric) for run in self.runs}
        return {seed: value["score"] for seed, value in found.items() if value}

    def standard_error(self, job: str, metric: str) -> float:
        """Over the items, of the first run that has the score; 0 where scores.json has none."""
        return next(r.result(job, metric)["standard_error"] or 0.0 for r in self.runs if job in r.scores)


def read_runs(folders: list[Path]) -> list[Run]:
    """One run per folder; a folder is an output_dir of eval.py or of train.py.

    Raises:
        UserError: a folder holds neither's results, or they are damaged.
    """
    folders = list(dict.fromkeys(folders))
    runs = [_read(folder, name) for folder, name in zip(folders, _names(folders), strict=True)]
    # A model that was scored outside of a run's folder, and that other runs here fine-tune, is their base.
    started_from = {_resolved(run.config["model"]) for run in runs if run.config.get("objective") == "sft"}
    for run in runs:
        scored = {_resolved(entry.get("model", "")) for entry in run.scores.values()}
        if run.training != run.folder.parent and not run.drop and scored & started_from:
            run.rule, run.training, run.config = "base", None, {}
    for base in reversed([run for run in runs if run.rule == "base"]):  # of several of one model, the first counts
        for run in runs:
            if run.model == base.model:
                run.rises |= {job: rise for job in base.scores if (rise := _rise(base, run, job))}
    return runs


def _rise(base: Run, run: Run, job: str) -> dict[str, float] | None:
    """The mean rise of a loss, and its standard error, on the base model's very texts; None where that is unknown."""
    if base.scores[job].get("unit") != "nats" or job not in run.scores:
        return None
    task = TASKS[job.split(".")[0]]
    before, after = (read_lines(r.folder / f"{job}.jsonl") for r in (base, run))
    tokens = [[line[task.weight] for line in lines] for lines in (before, after)]
    if [line["item"] for line in before] != [line["item"] for line in after] or tokens[0] != tokens[1]:
        return None
    metric = task.metrics[0]
    rises = np.subtract(*([line[metric] for line in lines] for lines in (after, before))).tolist()
    return mean_of(rises, [""] * len(rises), False, tokens[0])


def group_runs(runs: list[Run]) -> list[Group]:
    """Runs of equal settings and different seeds together, in the order of their first ones.

    Several of one seed are other evaluations of its model, which the folders' names tell, or repetitions.
    """
    settings = [json.dumps(run.settings(), sort_keys=True) for run in runs]
    seeds = Counter((key, run.seed) for key, run in zip(settings, runs, strict=True))
    repeated = {key for (key, _), n in seeds.items() if n > 1}
    groups: dict[str, Group] = {}
    for run, key in zip(runs, settings, strict=True):
        if key in repeated:
            name = SEED.sub("", run.folder.name)
            key += name if run.training == run.folder.parent else EVALUATION.search(name)[0]
        while key in groups and run.seed in {other.seed for other in groups[key].runs}:
            key += " again"
        groups.setdefault(key, Group("")).runs.append(run)
    found = list(groups.values())
    for group in found:
        group.name = group.first.name if len(group.runs) == 1 else SEED.sub("", group.first.name) or group.first.rule
    return found


def labels(groups: list[Group], names: dict[str, str], but: tuple[str, ...] = ()) -> list[str]:
    """What to call each group in a legend: its rule, and what tells it from others of that rule; or its folder.

    Args:
        names: of the rules.
        but: settings that the figure shows otherwise.
    """
    result = []
    for group in groups:
        same = [other.first.settings() for other in groups if other.first.rule == group.first.rule]
        mine = group.first.settings()
        differ = [k for k in mine if k not in but and any(other.get(k) != mine[k] for other in same)]
        name = names.get(group.first.rule, group.first.rule) or group.name
        if len(differ) > 2 or "run" in differ:
            result.append(group.name)
        else:
            result.append(", ".join([name, *(f"{k.removeprefix('drop ')} {_short(mine[k])}" for k in differ)]))
    return result


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _names(folders: list[Path]) -> list[str]:
    """The folders' names without what they have in common, and without eval where it tells nothing."""
    short = [folder.parent if folder.name == "eval" else folder for folder in folders]
    if len(set(short)) < len(folders):
        short = folders
    if len(short) == 1:
        return [str(short[0])]
    common = os.path.commonpath([path.absolute().parent for path in short])
    return [os.path.relpath(path, common) for path in short]


def _read(folder: Path, name: str) -> Run:
    scores = _json(folder / "scores.json") or {}
    models = list(dict.fromkeys(entry.get("model", "") for entry in scores.values()))
    if len(models) > 1:
        raise UserError(f"{folder}/scores.json holds scores of several models: {', '.join(models)}")
    scored = Path(models[0]) if models and models[0] else folder.parent / "final"
    near = [folder]
    if scores:
        model = _where_now(folder, scored)
        near += [model, model.parent] if model.name == "final" else [model]
    drop = next((found for place in near if (found := _json(place / DROP))), {})
    if drop:
        near = [Path(drop["tuned"]), Path(drop["tuned"]).parent]
    training = next((place for place in near if (place / RUN).exists()), None)
    if not scores and training is None:
        raise UserError(f"{folder}: no scores.json, which eval.py writes, and no {RUN}, which train.py writes")
    config = (_json(training / RUN) or {}).get("config", {}) if training else {}
    if training and "rule" not in config:
        raise UserError(f"{training / RUN}: no configuration of train.py in it")
    rule = "drop" if drop else config.get("rule", "")
    model = _root(config["model"]) if config else drop.get("base", models[0] if models else "")
    return Run(folder, name, scores, training, config, drop, model, rule)


def _where_now(folder: Path, scored: Path) -> Path:
    """Where the model is that was scored into a folder: where it was, or beside the folder.

    Beside it in the layout RUN/{final,eval}, which is moved and copied as a whole.
    """
    beside = folder.parent / "final"
    same_run = scored.name == "final" and scored.parent.name == folder.parent.name
    if same_run and ((folder.parent / RUN).exists() or (beside / DROP).exists()):
        return beside
    if scored.exists() or (scored.parent / RUN).exists():
        return scored
    if scored.name == "final":
        return beside
    return folder.parent if scored.name == folder.parent.name else scored


def _root(model: str, depth: int = 10) -> str:
    """The model that the run began with that made `model`, and so on; `model` itself where no run made it."""
    run = _json(Path(model).parent / RUN) if depth else None
    return _root(run["config"]["model"], depth - 1) if run else model


def _resolved(model: str) -> str:
    return str(Path(model).resolve()) if model and Path(model).exists() else model


def _json(path: Path) -> Any:
    """The content of a JSON file, None where there is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as e:
        raise UserError(f"{path}: damaged or not readable ({one_line(e)})") from None


def read_metrics(run: Run) -> list[dict[str, Any]]:
    """The lines of the training's metrics.jsonl; empty where there is none. A line that a crash has cut is left out."""
    lines = []
    if run.training and (run.training / METRICS).exists():
        for line in (run.training / METRICS).read_text(encoding="utf-8").splitlines():
            try:
                lines.append(json.loads(line))
            except ValueError:
                continue
    return lines
