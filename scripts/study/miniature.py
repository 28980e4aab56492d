"""The paper's claims in miniature: many short fine-tunings of small models, with seeds, tuned rates and intervals.

    bash scripts/study.sh                          # an hour or more on 2 cores; results in results/

Base models are trained from scratch on old skills, then fine-tuned on a new one, arithmetic or code (data.py), by
each rule, with the same train.py and eval.py that train and score 7B models. Three parts, a line of runs.jsonl per run:

    rates       every rule at five learning rates, scored on validation problems
    seeds       every rule at the rate that part chose, 16 seeds (sample of the data, order, base), on test problems
    keep_ratio  gmt at its chosen rate with other keep_ratios

A rate is chosen, as in the quickstart, by the highest harmonic mean of new-skill and retained accuracy on validation
problems, which asks for both; of equal ones the lowest. A call that was cut goes on: runs that have a line are not made
again.
"""

import json
import shutil
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import harmonic_mean, mean
from typing import Any

from tqdm import tqdm
from transformers import AutoTokenizer

import eval as evaluation
import train
from common import run_folder
from common.errors import UserError
from scripts import merge
from scripts.quickstart.data import OLD_SKILLS, save_random_model, write
from scripts.study import data as study_data
from scripts.study.driver import Lines, Run, answer_losses, logged

RULES = {  # what the command line of train.py gets; drop masks the task vector of a model of rule none
    "none": ["--rule", "none"],
    "rmt": ["--rule", "rmt"],
    "hft": ["--rule", "hft"],
    "gmt": ["--rule", "gmt"],
    "gmt_frozen": ["--rule", "gmt", "--masked_weights", "frozen"],
    "drop": ["--rule", "none"],
}
KEEPING = ("rmt", "gmt", "gmt_frozen", "drop")  # the rules with a keep_ratio
KEEP_RATIO = 0.2


@dataclass(frozen=True)
class Scale:
    """How large a study is."""

    bases: int
    base_steps: int
    rows: int  # of the new skill
    steps: int  # of a fine-tuning, batches of 32
    rates: tuple[float, ...]
    tuning_seeds: int
    seeds: int
    keep_ratios: tuple[float, ...]
    sweep_seeds: int
    problems: dict[str, int]  # per skill, in validation and in test
    hidden: int = 128
    layers: int = 3


RATES = (1e-4, 2.5e-4, 6e-4, 1.5e-3, 4e-3)
KEEP_RATIOS = (0.05, 0.1, 0.4, 0.6, 0.8, 1.0)  # and KEEP_RATIO
SCALES = {
    "tiny": Scale(1, 30, 64, 4, RATES[:2], 1, 3, (0.5,), 1, {"old": 4, "remainder": 4, "code": 2}, 32, 1),
    "small": Scale(3, 1600, 1000, 100, RATES, 3, 16, KEEP_RATIOS, 8, {"old": 60, "remainder": 150, "code": 40}),
    "large": Scale(
        4, 3000, 4000, 600, RATES, 4, 16, KEEP_RATIOS, 8, {"old": 200, "remainder": 400, "code": 200}, 256, 10
    ),
}


# ---------------------------------------------------------------------------------------------------------------------
# In a worker process
# ---------------------------------------------------------------------------------------------------------------------


def make_base(index: int, scale: Scale, folder: Path) -> None:
    """A base model: other initial weights, other problems, another order for each index."""
    run = folder / f"base{index}"
    if (run / "scores.json").exists():  # written last: a call that was cut before begins again
        return
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    save_random_model(folder / f"random{index}", tokenizer, index, scale.hidden, scale.layers)
    write(folder / "data" / f"base{index}.jsonl", study_data.base_rows(seed=index))
    with logged(folder / "logs" / f"base{index}.log"):
        train.main([
            "--model", str(folder / f"random{index}"), "--dataset", str(folder / "data" / f"base{index}.jsonl"),
            "--output_dir", str(run), "--template", "prompt_response", "--rule", "none", "--learning_rate", "2e-3",
            "--warmup_ratio", "0.02",
            "--max_steps", str(scale.base_steps), "--global_batch_size", "64", "--seed", str(index), *COMMON,
        ])  # fmt: skip
        scores = {task: score(folder, run / "final", "test", task) for task in study_data.TASKS}
    run_folder.write_json(run / "scores.json", scores)


COMMON = ["--max_length", "128", "--micro_batch_tokens", "4096", "--mixed_precision", "fp32", "--overwrite"]
COMMON += ["--log_every", "50"]


def make(run: Run, scale: Scale, folder: Path) -> list[dict]:
    """Fine-tune, score; the lines of runs.jsonl: a model of rule none is scored, then dropped and scored again."""
    base, here, log = folder / f"base{run.seed % scale.bases}" / "final", folder / "runs" / run.name, folder / "logs"
    rows = folder / "data" / f"{run.name}.jsonl"
    write(rows, study_data.training_rows(run.task, scale.rows, seed=run.seed))
    shutil.rmtree(here, ignore_errors=True)
    words = [*RULES[run.rule]]
    if run.rule in ("rmt", "gmt", "gmt_frozen"):
        words += ["--keep_ratio", str(run.keep_ratio)]
    split = "validation" if run.part == "rates" else "test"
    with logged(log / f"{run.name}.log"):
        line = train.main([
            "--model", str(base), "--dataset", str(rows), "--output_dir", str(here), "--seed", str(run.seed),
            "--template", study_data.TEMPLATES[run.task], "--learning_rate", str(run.learning_rate), *words,
            "--max_steps", str(scale.steps), "--global_batch_size", "32", "--warmup_ratio", "0.03", *COMMON,
        ])  # fmt: skip
        tuned = {run: here / "final"}
        if run.rule in ("none", "drop"):
            dropped = replace(run, rule="drop", keep_ratio=KEEP_RATIO)
            tuned[dropped] = here / "dropped" / "final"
            merge.main([
                "drop", "--base", str(base), "--tuned", str(here / "final"), "--output_dir", str(tuned[dropped]),
                "--keep_ratio", str(KEEP_RATIO),
            ])  # fmt: skip
        lines = []
        for this, model in tuned.items():
            scores = score(folder, model, split, run.task)
            lines.append({**asdict(this), "base": run.seed % scale.bases, **scores, "train_loss": line["loss"]})
    shutil.rmtree(here)
    rows.unlink()
    return lines


def score(folder: Path, model: Path, split: str, task: str) -> dict[str, float]:
    """Accuracy and negative log-likelihood (nats per trained token) on the new skill and on the old ones."""
    out, data = model.parent / "eval", folder / "data"
    tasks = {"gsm8k": data / f"skills_{split}.jsonl"}
    if task == "code":
        tasks["humaneval"] = data / f"code_{split}.jsonl"
    evaluation.main([
        "--model", str(model), "--output_dir", str(out), "--dtype", "float32", "--batch_size", "100", "--workers", "1",
        "--tasks", *(f"{name}={file}" for name, file in tasks.items()),
    ])  # fmt: skip
    skills = [json.loads(line)["skill"] for line in tasks["gsm8k"].read_text().splitlines()]
    verdicts = [json.loads(line) for line in (out / "gsm8k.metamath.jsonl").read_text().splitlines()]
    correct = {skill: [v["correct"] for v in verdicts if skills[v["id"]] == skill] for skill in set(skills)}
    if task == "code":
        programs = [json.loads(line) for line in (out / "humaneval.plain.jsonl").read_text().splitlines()]
        correct["code"] = [program["pass@1"] for program in programs]
    skills = (task, *OLD_SKILLS)
    files = {s: (data / f"nll_{s}_{split}.jsonl", study_data.TEMPLATES.get(s, "metamath")) for s in skills}
    nlls = answer_losses(model, files, max_length=128)
    return {
        "new": mean(correct[task]),
        "retained": mean(mean(correct[skill]) for skill in OLD_SKILLS),
        "new_nll": nlls[task],
        "retained_nll": mean(nlls[skill] for skill in OLD_SKILLS),
    }


# ---------------------------------------------------------------------------------------------------------------------
# Which runs
# ---------------------------------------------------------------------------------------------------------------------


def choose_rate(lines: Iterable[dict], task: str, rule: str) -> float:
    """The learning rate with the highest harmonic mean of new-skill and retained accuracy, the lowest of equals."""
    found: dict[float, list[dict]] = {}
    for line in lines:
        if (line["part"], line["task"], line["rule"]) == ("rates", task, rule):
            found.setdefault(line["learning_rate"], []).append(line)

    def both(rate: float) -> float:
        return harmonic_mean(mean(line[metric] for line in found[rate]) for metric in ("new", "retained"))

    return max(found, key=lambda rate: (both(rate), -rate))


def runs_of_rates(scale: Scale) -> list[Run]:
    tuning = range(1000, 1000 + scale.tuning_seeds)  # none of the seeds of the other parts
    return [
        Run("rates", task, rule, rate, KEEP_RATIO if rule in KEEPING else None, seed)
        for seed in tuning
        for task in study_data.TASKS
        for rule in RULES
        for rate in scale.rates
        if rule != "drop"  # made of none's models
    ]


def runs_at_chosen_rates(scale: Scale, lines: list[dict]) -> list[Run]:
    rates = {(task, rule): choose_rate(lines, task, rule) for task in study_data.TASKS for rule in RULES}
    seeds = [
        Run("seeds", task, rule, rate, KEEP_RATIO if rule in KEEPING else None, seed)
        for seed in range(scale.seeds)
        for (task, rule), rate in rates.items()
        if rule != "drop" or rate != rates[task, "none"]
    ]
    sweep = [
        Run("keep_ratio", task, "gmt", rates[task, "gmt"], keep_ratio, seed)
        for seed in range(scale.sweep_seeds)
        for task in study_data.TASKS
        for keep_ratio in scale.keep_ratios
    ]
    return seeds + sweep


@dataclass(frozen=True)
class Miniature:
    """The study for the driver."""

    scale: Scale
    threads = 1  # of a run
    processes = evaluation.physical_cores()
    may_grow = ()

    def settings(self, folder: Path) -> dict[str, Any]:
        study_data.main(folder, self.scale.problems)
        return asdict(self.scale)

    def bases(self, folder: Path, results: Path, pool: ProcessPoolExecutor) -> None:
        bases = [pool.submit(make_base, i, self.scale, folder) for i in range(self.scale.bases)]
        for done in tqdm(as_completed(bases), "bases", len(bases), unit="model"):
            done.result()
        scores = [run_folder.read_json(folder / f"base{i}" / "scores.json") for i in range(self.scale.bases)]
        about = results / "bases.json"
        if about.exists() and json.loads(about.read_text()) != scores:  # another processor, another rounding
            raise UserError(f"{about} is of other base models than {folder}/base*: set RESULTS to a new folder")
        run_folder.write_json(about, scores)

    def parts(self) -> tuple[Callable[[Lines], list[Run]], ...]:
        def rates(lines: Lines) -> list[Run]:
            return runs_of_rates(self.scale)

        def seeds_and_keep_ratios(lines: Lines) -> list[Run]:
            return runs_at_chosen_rates(self.scale, lines)

        return rates, seeds_and_keep_ratios

    def make(self, run: Run, folder: Path) -> Lines:
        return make(run, self.scale, folder)
