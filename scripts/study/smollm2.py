"""The paper's claims on a real pretrained model: SmolLM2-135M-Instruct, fine-tuned on GSM8K's or MBPP's training split.

    GMT_DATA_DIR=FOLDER STUDY=smollm2 bash scripts/study.sh      # some 14 hours on 2 cores, half of them for
                                                          # what comes first; in results/smollm2

What is compared is a loss in nats per token: accuracies of so small a model are near chance (part accuracy), while
losses on fixed texts differ little between seeds. Learnt is what the loss on the new task's test solutions says (new).
Retained is what the loss on Wikipedia passages says (retained); the loss on the other task's solutions (other) stands
beside it. A line of runs.jsonl per scored model, in this order:

    rates       SFT, which all are measured against, at four learning rates, a factor of 2 apart, then every other rule,
                the middle rates first
    keep_ratio  gmt at the two middle rates, with other keep_ratios
    clip        gmt and rmt at the lower of these rates, clipped by the norm that masking leaves
    updates     gmt and rmt at this rate again, to see what share of their updates falls on masked weights
    frontier    SFT at further rates, so that what it retains is known at each loss that others reach
    seeds       every rule at its chosen rate, other samples of the data in another order
    accuracy    the first seed of the paper's rules again, to count the problems that it solves

All but the last two of the first task with the rules that the paper compares come first, then these two; then the same
of the other rules and tasks, of which the seeds of the paper's rules come first, then those of one rule after another.

Fixed before the part seeds was run, but for hft on MBPP, which was added when the others' seeds were there:

- The chosen rate of a rule is that of part rates with the lowest sum of new and retained, the lowest of equals; drop,
  which masks the task vectors of SFT's models, has SFT's.
- A rule that learns less and forgets less may just have taken smaller steps. So the first question is what is retained
  at an equal loss on the new task: a run's excess is its retained minus that of SFT's frontier at the same new, a
  monotone cubic through SFT's rates up to its best one, and level for REACH further at both ends, since seeds differ:
  whoever learns more than SFT at its best is held against that. A run beyond has none.
- gmt and gmt frozen are compared with SFT, rmt, hft and drop, every other rule with SFT, seed by seed, in new, retained
  and excess, once all seeds of the rules are there. A difference is one if it is at least MARGIN and the p-value of the
  paired t test, corrected by Holm, is below 0.05. Corrected are all pairs of a task and measure, those of the rules
  that the paper compares and the others apart; a pair that cannot be compared counts. They are less than MARGIN apart
  if the 95 % interval lies within MARGIN of 0; else this study cannot tell. Seeds alone vary in it: base model, test
  items, rates and frontier do not.
- keep_ratio does not matter if from 0.05 up, at both rates, new stays within 5 % of what SFT gains at that rate (base
  minus SFT) of that at 0.2; it does if it leaves that range by MARGIN or more; else this study cannot tell.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from safetensors import safe_open

import eval as evaluation
import train
from common import run_folder
from common.errors import UserError
from scripts import merge
from scripts.quickstart.data import write
from scripts.quickstart.gsm8k_to_metamath import to_metamath
from scripts.report.mask_figure import kept_by_place
from scripts.study.bf16 import fast_bf16
from scripts.study.driver import Lines, Run, answer_losses, logged
from tasks.general import squad_rows
from tasks.source import Source

ROOT = Path(__file__).parents[2]
KEEP_RATIO = 0.2
MARGIN = 0.005  # nats: smaller differences are not called one
REACH = 0.02  # nats
TUNING_SEED = 1000  # none of those of the part seeds
TEMPLATES = {"gsm8k": "metamath", "mbpp": "magicoder"}
RULES = {  # what the command line of train.py gets; drop masks the task vector of a model of rule none
    "none": ["--rule", "none"],
    "gmt": ["--rule", "gmt"],
    "rmt": ["--rule", "rmt"],
    "gmt_frozen": ["--rule", "gmt", "--masked_weights", "frozen"],
    "hft": ["--rule", "hft"],
    "lora": ["--rule", "none", "--adapter", "lora"],
    "mofo": ["--rule", "mofo"],
    "shira": ["--rule", "shira"],
    "sift": ["--rule", "sift"],
    "drop": [],
    "gmt_clip_after": ["--rule", "gmt", "--clip", "after"],
    "rmt_clip_after": ["--rule", "rmt", "--clip", "after"],
}
UNMASKED = ("none", "hft", "lora")
LORA_FACTOR = 8  # adapters are trained at higher rates


@dataclass(frozen=True)
class Size:
    """How large a study is."""

    rules: dict[str, tuple[str, ...]]  # of each new task
    rates: tuple[float, ...]
    between: tuple[float, ...]  # further rates of SFT, part frontier, on the first task
    keep_ratios: tuple[float, ...]  # and KEEP_RATIO; on the first task
    seeds: int
    steps: int
    batch: int
    golds: dict[str, int]  # test solutions of each task
    passages: int
    mmlu: int  # questions
    scored_in: str = "bfloat16"


PAPER = ("none", "gmt", "rmt", "gmt_frozen", "hft", "drop")  # what the paper compares
ALL = (*PAPER[:-1], "lora", "mofo", "shira", "sift", "drop")
RATES = (1e-4, 2e-4, 4e-4, 8e-4)
BETWEEN = (1.4e-4, 2.8e-4, 7e-5, 5e-5)
SIZES = {
    "smollm2": Size(
        {"gsm8k": ALL, "mbpp": PAPER},
        RATES, BETWEEN, (0.01, 0.05, 0.1, 0.4, 0.7), seeds=5, steps=20, batch=16,
        golds={"gsm8k": 200, "mbpp": 100}, passages=200, mmlu=200,
    ),
    "smollm2_tiny": Size(
        {"gsm8k": ("none", "gmt", "lora", "drop"), "mbpp": ("none",)},
        (1e-3, 2e-3), (), (0.5,), seeds=2, steps=2, batch=2, golds={"gsm8k": 3, "mbpp": 3}, passages=2, mmlu=2,
    ),
}  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Which runs
# ---------------------------------------------------------------------------------------------------------------------


def run_of(part: str, task: str, rule: str, rate: float, seed: int, keep_ratio: float = KEEP_RATIO) -> Run:
    return Run(part, task, rule, rate, None if rule in UNMASKED else keep_ratio, seed)


def rate_of(rule: str, rate: float) -> float:
    """The rate of the grid for a rule."""
    return rate * LORA_FACTOR if rule == "lora" else rate


def middle_first(rates: tuple[float, ...]) -> list[float]:
    middle = (len(rates) - 1) / 2
    return [rates[i] for i in sorted(range(len(rates)), key=lambda i: (abs(i - middle), i))]


def one_seed_runs(size: Size) -> list[Run]:
    """SFT, then rate by rate, rule by rule: whenever it is cut, all rules are there at the rates that are."""
    runs, first = [], next(iter(size.rules))
    for task, rules in size.rules.items():
        runs += [run_of("rates", task, "none", rate, TUNING_SEED) for rate in reversed(size.rates)]
        for i, rate in enumerate(middle_first(size.rates)):
            others = [rule for rule in rules if rule not in ("none", "drop")]
            runs += [run_of("rates", task, rule, rate_of(rule, rate), TUNING_SEED) for rule in others]
            if task == first and i == 0:
                clipped = [f"{rule}_clip_after" for rule in rules if f"{rule}_clip_after" in RULES]
                runs += [run_of("clip", task, rule, rate, TUNING_SEED) for rule in clipped]
                runs += [run_of("updates", task, rule, rate, TUNING_SEED) for rule in rules if rule in ("gmt", "rmt")]
            if task == first and i < 2:
                runs += [run_of("keep_ratio", task, "gmt", rate, TUNING_SEED, keep) for keep in size.keep_ratios]
        if task == first:
            runs += [run_of("frontier", task, "none", rate, TUNING_SEED) for rate in size.between]
    return runs


def choose_rate(lines: Lines, task: str, rule: str) -> float | None:
    """The learning rate with the lowest sum of new and retained, the lowest of equals; None without lines."""
    rule = "none" if rule == "drop" else rule
    found = [x for x in lines if (x["part"], x["task"], x["rule"]) == ("rates", task, rule)]
    return min(found, key=lambda x: (x["new"] + x["retained"], x["learning_rate"]))["learning_rate"] if found else None


def seed_runs(size: Size, lines: Lines) -> list[Run]:
    """Every rule but drop, which comes with SFT, at the rate that its lines choose."""
    chosen = {(task, rule): choose_rate(lines, task, rule) for task, rules in size.rules.items() for rule in rules}
    return [
        run_of("seeds", task, rule, rate, seed)
        for seed in range(size.seeds)
        for (task, rule), rate in chosen.items()
        if rule != "drop"
    ]


def accuracy_runs(size: Size, lines: Lines) -> list[Run]:
    """The first seed of the first task's rules that the paper compares; drop comes with SFT."""
    return [replace(run, part="accuracy") for run in seed_runs(replace(papers(size), seeds=1), lines)]


def papers(size: Size) -> Size:
    """The part of a study that is made first: the first task, with the rules of the paper."""
    task, rules = next(iter(size.rules.items()))
    return replace(size, rules={task: tuple(rule for rule in rules if rule in PAPER)})


@dataclass(frozen=True)
class SmolLM2:
    """The study for the driver."""

    size: Size
    threads = 0
    processes = 1  # one of 7 GiB; two, with half of the cores each, are a tenth faster where memory allows
    may_grow = ("rules", "rates", "between", "keep_ratios", "seeds")

    def settings(self, folder: Path) -> dict[str, Any]:
        return {**asdict(self.size), "files": prepare(self.size, folder)}

    def bases(self, folder: Path, results: Path, pool: ProcessPoolExecutor) -> None:
        file = results / "bases.json"
        there = run_folder.read_json(file) if file.exists() else {}
        for score in (losses, accuracies):
            if not {*SCORES[score]} <= {*there}:
                there |= pool.submit(score_base, score, folder).result()
                run_folder.write_json(file, there)

    def parts(self) -> tuple[Callable[[Lines], list[Run]], ...]:
        def rates(lines: Lines) -> list[Run]:
            return one_seed_runs(papers(self.size))

        def seeds(lines: Lines) -> list[Run]:
            return seed_runs(papers(self.size), lines)

        def accuracy(lines: Lines) -> list[Run]:
            return accuracy_runs(self.size, lines)

        def other_rates(lines: Lines) -> list[Run]:
            return one_seed_runs(self.size)

        def other_seeds(lines: Lines) -> list[Run]:
            # rules that are compared with each other, together: a comparison waits for all of its seeds
            return sorted(seed_runs(self.size, lines), key=lambda run: 0 if run.rule in PAPER else ALL.index(run.rule))

        return rates, seeds, accuracy, other_rates, other_seeds

    def make(self, run: Run, folder: Path) -> Lines:
        return make(run, self.size, folder)


# ---------------------------------------------------------------------------------------------------------------------
# Model and data
# ---------------------------------------------------------------------------------------------------------------------


def prepare(size: Size, folder: Path) -> dict[str, str]:
    """Write model/ and data/*.jsonl where they are missing; returns the SHA-256 of what decides the scores.

    Raises:
        UserError: GMT_DATA_DIR does not name a folder with the files that are needed, or the model cannot be had.
    """
    model, data = folder / "model", folder / "data"
    if not data.exists():
        aside = folder / ".aside_data"
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        for name, rows in data_rows(size, data_dir()).items():
            write(aside / f"{name}.jsonl", rows)
        aside.rename(data)
    if not model.exists():
        done = subprocess.run([sys.executable, str(ROOT / "scripts" / "get_smollm2.py"), str(model)], check=False)
        if done.returncode:
            raise UserError(f"no model: see above, or put HuggingFaceTB/SmolLM2-135M-Instruct of the Hub into {model}")
    files = [*sorted(data.glob("*.jsonl")), model / "model.safetensors"]
    return {path.name: digest(path) for path in files}


def digest(path: Path) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()[:16]


def data_dir() -> str:
    """The folder of the data sets."""
    folder = os.environ.get("GMT_DATA_DIR", "")
    if not Path(folder or "/nowhere").is_dir():
        raise UserError(
            "GMT_DATA_DIR must name a folder with gsm8k/train.jsonl.gz and gsm8k/test.jsonl (on the Hub: openai/gsm8k, "
            "main), mbpp/mbpp.jsonl (google-research-datasets/mbpp, full), mmlu/test.jsonl.gz (cais/mmlu, all) and "
            "tydiqa_goldp/english_dev.json.gz (google-research-datasets/tydiqa, secondary_task)"
        )
    return folder


def data_rows(size: Size, folder: str) -> dict[str, list[dict]]:
    """{file: rows}: training rows and test solutions of both tasks, Wikipedia passages, MMLU's questions."""
    source = Source(folder)

    def rows(path: str, columns: tuple[str, ...]) -> list[dict]:
        return source.rows(path, ("the Hub", None, ""), columns)

    gsm8k = {
        part: [to_metamath(row) for row in rows(f"gsm8k/{file}", ("question", "answer"))]
        for part, file in (("train", "train.jsonl.gz"), ("test", "test.jsonl"))
    }
    mbpp = rows("mbpp/mbpp.jsonl", ("task_id", "text", "code", "test_list"))
    passages = [row["context"] for row in squad_rows(source, "dev", "validation", ["english"])["english"]]
    questions = rows("mmlu/test.jsonl.gz", ("question", "subject", "choices", "answer"))
    return {
        "train_gsm8k": gsm8k["train"],
        "train_mbpp": [code_row(row) for row in mbpp if 601 <= row["task_id"] <= 974],  # its split train
        "gold_gsm8k": evenly(gsm8k["test"], size.golds["gsm8k"]),
        "gold_mbpp": evenly([code_row(row) for row in mbpp if 11 <= row["task_id"] <= 510], size.golds["mbpp"]),  # test
        "wikipedia": [{"text": text} for text in evenly(list(dict.fromkeys(passages)), size.passages)],
        "mmlu": evenly(questions, size.mmlu),
    }


def code_row(row: dict[str, Any]) -> dict[str, str]:
    """An MBPP problem in Magicoder's columns, asked for as tasks/code.py asks for it."""
    text = row["text"].strip().rstrip(".")
    check = f"Your code should satisfy the following assertion:\n```python\n{row['test_list'][0]}\n```"
    return {"instruction": f"{text}. {check}", "response": f"```python\n{row['code'].replace(chr(13), '')}\n```"}


def evenly(rows: list, n: int) -> list:
    """n rows at equal distances."""
    return [rows[i * len(rows) // n] for i in range(min(n, len(rows)))]


# ---------------------------------------------------------------------------------------------------------------------
# In a worker process
# ---------------------------------------------------------------------------------------------------------------------


def make(run: Run, size: Size, folder: Path) -> Lines:
    """Fine-tune and score; a model of rule none is scored, then dropped and scored again where that is asked for."""
    base, here = folder / "model", folder / "runs" / run.name
    shutil.rmtree(here, ignore_errors=True)
    words = [*RULES[run.rule]]
    if run.keep_ratio is not None:
        words += ["--keep_ratio", str(run.keep_ratio), "--log_masks_every", "1", "--mask_jaccard", "true"]
    if run.part == "updates":
        words += ["--mask_update_share", "true"]
    with logged(folder / "logs" / f"{run.name}.log"), fast_bf16():
        start = time.monotonic()
        train.main([
            "--model", str(base), "--dataset", str(folder / "data" / f"train_{run.task}.jsonl"),
            "--output_dir", str(here), "--template", TEMPLATES[run.task], "--seed", str(run.seed),
            "--learning_rate", str(run.learning_rate), *words, "--lr_schedule", "linear", "--warmup_ratio", "0.1",
            "--max_steps", str(size.steps), "--global_batch_size", str(size.batch), "--max_length", "512",
            "--micro_batch_tokens", "2048",
        ])  # fmt: skip
        line = {**asdict(run), **trained(here), "train_seconds": round(time.monotonic() - start, 1)}
        lines = [{**line, **scored(folder, here / "final", run)}]
        if run.rule == "none" and run.part != "frontier" and "drop" in size.rules[run.task]:
            dropped = here / "dropped" / "final"
            words = ["--base", str(base), "--tuned", str(here / "final"), "--output_dir", str(dropped)]
            merge.main(["drop", *words, "--keep_ratio", str(KEEP_RATIO)])
            of_drop = asdict(replace(run, rule="drop", keep_ratio=KEEP_RATIO))
            # before its own line, which says that the run is there: a cut between the two loses neither
            lines.insert(0, {**of_drop, **scored(folder, dropped, run)})
    shutil.rmtree(here)
    return lines


def trained(folder: Path) -> dict[str, Any]:
    """What a run folder says of its training: losses and norms, and where the kept energy of its gradients lies."""
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    found: dict[str, Any] = {
        "train_loss": digits(fmean(step["loss"] for step in steps[-4:])),
        **{key: digits(fmean(step[key] for step in steps)) for key in ("grad_norm", "grad_norm_kept")},
        "tokens": steps[-1]["tokens"],
    }
    masks, share = folder / "masks.jsonl", "update_share_masked"
    if masks.exists():
        overlaps = [json.loads(line)["jaccard"] for line in masks.read_text().splitlines()]
        found["masks"] = {
            "energy_kept": [digits(step["energy_kept"]) for step in steps],
            "jaccard": [digits(x) for x in overlaps if x is not None],  # with the mask of the step before
            # a first step of rate 0 moves nothing, and has none
            "update_share": {step["step"]: digits(step[share]) for step in steps if step.get(share) is not None},
            "places": [
                [c["layer"], c["type"], *(digits(c[key]) for key in ("kept", "energy_kept", "share_of_energy_kept"))]
                for c in kept_by_place(masks)
            ],
        }
    return found


def digits(x: float, n: int = 4) -> float:
    return float(f"{x:.{n}g}")


def scored(folder: Path, model: Path, run: Run) -> dict[str, Any]:
    """The losses of a fine-tuned model, and how far it is from the base model; in part accuracy, accuracies too."""
    start = time.monotonic()
    found = losses(folder, model)
    (other,) = TEMPLATES.keys() - {run.task}
    more = accuracies(folder, model) if run.part == "accuracy" else {}
    return {
        "new": found[run.task], "retained": found["wikipedia"], "other": found[other], **more,
        **task_vector(folder / "model", model), "score_seconds": round(time.monotonic() - start, 1),
    }  # fmt: skip


def losses(folder: Path, model: Path) -> dict[str, float]:
    """Nats per token on both tasks' test solutions and on the passages, in bf16."""
    data = folder / "data"
    found = answer_losses(
        model, {t: (data / f"gold_{t}.jsonl", word) for t, word in TEMPLATES.items()}, 512, 4096, True
    )
    return {**found, "wikipedia": evaluated(model, "text_loss", data / "wikipedia.jsonl")}


def accuracies(folder: Path, model: Path) -> dict[str, float]:
    """The share of GSM8K's problems, whose solutions' loss is measured, that greedy answers solve (MetaMath's prompt
    and rule), and of MMLU's questions that the likelihoods of A to D get right (open-instruct's format, no examples).
    """
    problems, golds = model.parent / "problems.jsonl", folder / "data" / "gold_gsm8k.jsonl"
    rows = [json.loads(line) for line in golds.read_text().splitlines()]
    write(problems, [{"question": row["query"], "answer": row["response"].rpartition("\n")[0]} for row in rows])
    return {
        "solved": evaluated(model, "gsm8k", problems, 32),
        "mmlu": evaluated(model, "mmlu", folder / "data" / "mmlu.jsonl"),
    }


SCORES = {losses: (*TEMPLATES, "wikipedia"), accuracies: ("solved", "mmlu")}  # what bases.json holds of each


def score_base(score: Callable[[Path, Path], dict[str, float]], folder: Path) -> dict[str, float]:
    """losses() or accuracies() of the model before training."""
    with logged(folder / "logs" / "base.log"), fast_bf16():
        return score(folder, folder / "model")


def evaluated(model: Path, task: str, items: Path, batch_size: int = 8) -> float:
    """The score of a task of eval.py on the items of a file."""
    words = ["--model", str(model), "--output_dir", str(model.parent / "eval"), "--dtype", "bfloat16", "--overwrite"]
    scores = evaluation.main([*words, "--tasks", f"{task}={items}", "--batch_size", str(batch_size)])
    (entry,) = scores.values()
    return next(iter(entry["metrics"].values()))["score"]


def task_vector(base: Path, tuned: Path) -> dict[str, float]:
    """Of tuned minus base weights, over all matrices: the share of entries that changed, the L2 norm, and the share of
    the squared norm that lies in the largest KEEP_RATIO of each matrix's entries."""
    moved = entries = 0
    energy = largest = 0.0
    with safe_open(base / "model.safetensors", "pt") as a, safe_open(tuned / "model.safetensors", "pt") as b:
        for name in b.keys():  # noqa: SIM118  no dict
            squares = (b.get_tensor(name).float() - a.get_tensor(name).float()).flatten().double().square()
            if len(b.get_slice(name).get_shape()) < 2:
                continue
            k = max(1, round(KEEP_RATIO * squares.numel()))
            threshold = squares.kthvalue(squares.numel() - k + 1).values
            moved, entries = moved + int(squares.count_nonzero()), entries + squares.numel()
            energy, largest = energy + float(squares.sum()), largest + float(squares[squares >= threshold].sum())
    top = largest / energy if energy else 0.0
    return {"moved": digits(moved / entries), "distance": digits(energy**0.5), "largest_share": digits(top)}
